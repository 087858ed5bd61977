#include "text/unicode.h"

static uint32_t continuation(const char *text, size_t i)
{
    uint32_t c = (unsigned char)text[i];
    return (c & 0xC0) == 0x80 ? c & 0x3F : UTF8_INVALID;
}

size_t utf8_decode(const char *text, size_t n, uint32_t *cp)
{
    uint32_t c = (unsigned char)text[0];
    *cp = c;
    if (c < 0x80) return 1;
    size_t length = c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
    *cp = UTF8_INVALID;
    if (length == 0 || length > n) return 1;
    uint32_t value = c & (0xFFu >> (length + 1));
    for (size_t i = 1; i < length; i++) {
        uint32_t low = continuation(text, i);
        if (low == UTF8_INVALID) return 1;
        value = value << 6 | low;
    }
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (value < least[length] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return 1;
    *cp = value;
    return length;
}

size_t utf8_encode(uint32_t cp, char *out)
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    size_t length = cp < 0x800 ? 2 : cp < 0x10000 ? 3 : 4;
    static const unsigned char lead[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = length - 1; i > 0; i--, cp >>= 6) out[i] = (char)(0x80 | (cp & 0x3F));
    out[0] = (char)(lead[length] | cp);
    return length;
}
