#include "store/key.h"

void store_key_text(const store_key *key, char text[STORE_KEY_CHARS])
{
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < STORE_KEY_BYTES; i++) {
        text[2 * i] = digits[key->bytes[i] >> 4];
        text[2 * i + 1] = digits[key->bytes[i] & 15];
    }
    text[STORE_KEY_CHARS - 1] = 0;
}

static int digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool store_key_parse(const char *text, store_key *key)
{
    for (int i = 0; i < STORE_KEY_BYTES; i++, text += 2) {
        const int high = digit(text[0]), low = high < 0 ? -1 : digit(text[1]);
        if (low < 0) return false;
        key->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return *text == 0;
}

bool store_key_none(const store_key *key)
{
    return store_key_same(key, &(store_key){{0}});
}

bool store_key_same(const store_key *a, const store_key *b)
{
    return memcmp(a, b, sizeof *a) == 0;
}
