#include "cli/json.h"

#include <string.h>

/* By the table of RFC 3629. */
size_t json_utf8_length(const char *text, size_t n)
{
    unsigned char c = (unsigned char)text[0], low = 0x80, high = 0xbf;
    size_t length = c < 0x80 ? 1 : c >= 0xc2 && c <= 0xdf ? 2 : (c & 0xf0) == 0xe0 ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
    if (!length || length > n) return 0;
    if (c == 0xe0) low = 0xa0;
    if (c == 0xed) high = 0x9f;
    if (c == 0xf0) low = 0x90;
    if (c == 0xf4) high = 0x8f;
    for (size_t i = 1; i < length; i++) {
        c = (unsigned char)text[i];
        if (c < low || c > high) return 0;
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

json_t *json_text(const char *text, size_t n_bytes)
{
    json_t *whole = json_stringn(text, n_bytes);
    if (whole) return whole;
    char *copy = memory_alloc(n_bytes, 3, "text", NULL), *out = copy;
    if (!copy) return NULL;
    for (size_t i = 0; i < n_bytes;) {
        size_t n = json_utf8_length(text + i, n_bytes - i);
        memcpy(out, n ? text + i : "\xef\xbf\xbd", n ? n : 3);
        out += n ? n : 3;
        i += n ? n : 1;
    }
    whole = json_stringn(copy, (size_t)(out - copy));
    memory_free(copy);
    return whole;
}

json_t *json_piece(const char *text, size_t n_bytes)
{
    json_t *piece = json_stringn(text, n_bytes);
    if (piece) return piece;
    if (!(piece = json_array())) return NULL;
    for (size_t i = 0; i < n_bytes; i++)
        if (json_array_append_new(piece, json_integer((unsigned char)text[i]))) {
            json_decref(piece);
            return NULL;
        }
    return piece;
}

static int write_chunk(const char *text, size_t n_bytes, void *data)
{
    (void)data;
    return cli_write(text, n_bytes) ? 0 : -1;
}

int json_print(json_t *value)
{
    if (!value) return cli_fail("out of memory");
    /* A failed write is reported by cli_output_end. */
    if (!json_dump_callback(value, write_chunk, NULL, JSON_INDENT(2) | JSON_REAL_PRECISION(9))) cli_write("\n", 1);
    json_decref(value);
    return CLI_OK;
}
