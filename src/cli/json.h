/* JSON output through jansson: 64-bit integers, strict UTF-8. */
#ifndef CLI_JSON_H
#define CLI_JSON_H

#include <jansson.h>

#include "cli/cli.h"

/* A string of text[n_bytes]; bytes that are not UTF-8 become U+FFFD. NULL out of memory. */
json_t *json_text(const char *text, size_t n_bytes);
/* The same, but bytes that are not UTF-8 make it an array of the byte values: a token may be part of a character. */
json_t *json_piece(const char *text, size_t n_bytes);

/* Length of the UTF-8 character at text[n], n > 0; 0 if there is none. */
size_t json_utf8_length(const char *text, size_t n);

/* Prints the value and a newline, and releases it; NULL is out of memory. Returns an exit code. */
int json_print(json_t *value);

#endif
