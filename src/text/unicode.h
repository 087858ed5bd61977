/* UTF-8 and the classes of code points that pre-tokenizers tell apart. */
#ifndef TEXT_UNICODE_H
#define TEXT_UNICODE_H

#include <stddef.h>
#include <stdint.h>

typedef enum unicode_class { UNICODE_OTHER, UNICODE_LETTER, UNICODE_NUMBER, UNICODE_SPACE, UNICODE_MARK, UNICODE_END } unicode_class;

extern const uint8_t unicode_page_index[0x110000 / 256];
extern const uint8_t unicode_pages[][128];

/* Class of a code point < 0x110000; never UNICODE_END. */
static inline unicode_class unicode_class_of(uint32_t cp)
{
    uint8_t pair = unicode_pages[unicode_page_index[cp >> 8]][(cp & 255) >> 1];
    return (unicode_class)(cp & 1 ? pair >> 4 : pair & 15);
}

#define UTF8_INVALID 0xFFFFFFFFu

/* Decodes the character at text[0], n >= 1; returns its length. A byte that begins no complete character gives UTF8_INVALID and length 1. */
size_t utf8_decode(const char *text, size_t n, uint32_t *cp);
/* Writes cp (< 0x110000) to out[4]; returns the length. */
size_t utf8_encode(uint32_t cp, char *out);

#endif
