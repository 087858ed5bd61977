/* What a piece is known by: 16 bytes, a digest of everything it depends on (piece.h). */
#ifndef STORE_KEY_H
#define STORE_KEY_H

#include "base/base.h"

enum { STORE_KEY_BYTES = 16, STORE_KEY_CHARS = 2 * STORE_KEY_BYTES + 1 };

typedef struct store_key {
    uint8_t bytes[STORE_KEY_BYTES]; /* all zero: none */
} store_key;

void store_key_text(const store_key *key, char text[STORE_KEY_CHARS]); /* 32 hexadecimal digits */
bool store_key_parse(const char *text, store_key *key);                /* false if text is anything else; upper case counts as such */
bool store_key_none(const store_key *key);
bool store_key_same(const store_key *a, const store_key *b);

#endif
