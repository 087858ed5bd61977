/* Makes a GGUF file with a tokenizer in memory, right or wrong in any way a test wants. */
#ifndef TOKENIZER_BUILDER_H
#define TOKENIZER_BUILDER_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "text/text.h"

enum { GGUF_TYPE_U32 = 4, GGUF_TYPE_I32 = 5, GGUF_TYPE_F32 = 6, GGUF_TYPE_BOOL = 7, GGUF_TYPE_STRING = 8, GGUF_TYPE_ARRAY = 9 };

typedef struct builder {
    unsigned char bytes[1 << 16];
    size_t n;
    uint64_t n_keys;
} builder;

static inline void put_bytes(builder *b, const void *bytes, size_t n)
{
    if (n > 0) memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
}

static inline void put_u32(builder *b, uint32_t value)
{
    put_bytes(b, &value, 4);
}

static inline void put_u64(builder *b, uint64_t value)
{
    put_bytes(b, &value, 8);
}

static inline void put_string(builder *b, const char *text)
{
    put_u64(b, strlen(text));
    put_bytes(b, text, strlen(text));
}

static inline void builder_start(builder *b)
{
    b->n = 0;
    b->n_keys = 0;
    put_bytes(b, "GGUF", 4);
    put_u32(b, 3);
    put_u64(b, 0); /* tensors */
    put_u64(b, 0); /* keys, written at the end */
}

/* Adds the key tokenizer.NAME, or general.…; its value follows. */
static inline void builder_key(builder *b, const char *name, uint32_t type)
{
    char key[96] = "tokenizer.";
    strcat(key, name);
    put_string(b, strncmp(name, "general.", 8) == 0 ? name : key);
    put_u32(b, type);
    b->n_keys++;
}

static inline void builder_string(builder *b, const char *name, const char *value)
{
    builder_key(b, name, GGUF_TYPE_STRING);
    put_string(b, value);
}

static inline void builder_u32(builder *b, const char *name, uint32_t value)
{
    builder_key(b, name, GGUF_TYPE_U32);
    put_u32(b, value);
}

static inline void builder_bool(builder *b, const char *name, bool value)
{
    builder_key(b, name, GGUF_TYPE_BOOL);
    put_bytes(b, &value, 1);
}

static inline void builder_strings(builder *b, const char *name, const char *const *values, size_t n)
{
    builder_key(b, name, GGUF_TYPE_ARRAY);
    put_u32(b, GGUF_TYPE_STRING);
    put_u64(b, n);
    for (size_t i = 0; i < n; i++) put_string(b, values[i]);
}

static inline void builder_numbers(builder *b, const char *name, uint32_t type, const void *values, size_t n)
{
    builder_key(b, name, GGUF_TYPE_ARRAY);
    put_u32(b, type);
    put_u64(b, n);
    put_bytes(b, values, 4 * n);
}

/* The tokenizer of what was built, or NULL and *error. */
static inline tokenizer *builder_tokenizer(builder *b, quarry_error *error)
{
    memcpy(b->bytes + 16, &b->n_keys, 8);
    gguf_file *g = gguf_open_memory(b->bytes, b->n, "built.gguf", error);
    tokenizer *t = g ? tokenizer_create(g, error) : NULL;
    gguf_close(g);
    return t;
}

#endif
