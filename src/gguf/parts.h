/* What the files of gguf/ share. */
#ifndef GGUF_PARTS_H
#define GGUF_PARTS_H

#include "gguf/gguf.h"

/* The format's own numbers of value types. */
typedef enum gguf_type {
    TYPE_UINT8,
    TYPE_INT8,
    TYPE_UINT16,
    TYPE_INT16,
    TYPE_UINT32,
    TYPE_INT32,
    TYPE_FLOAT32,
    TYPE_BOOL,
    TYPE_STRING,
    TYPE_ARRAY,
    TYPE_UINT64,
    TYPE_INT64,
    TYPE_FLOAT64,
    TYPE_COUNT,
} gguf_type;

/* One key with its value. */
typedef struct gguf_entry {
    const char *key;
    gguf_type type; /* of the value, or of an array's elements */
    bool is_array;
    size_t key_at; /* in the header, as value_at */
    size_t key_bytes;
    size_t value_at;   /* first byte of the number, string or element */
    uint64_t count;    /* elements; bytes of a string */
    uint32_t *strings; /* [count], array of strings: where in the header each one's length stands */
} gguf_entry;

struct gguf_file {
    char *path;
    file_map *map;        /* NULL: in memory */
    const uint8_t *bytes; /* [n_bytes] in memory or mapped, else NULL */
    uint64_t n_bytes;
    uint8_t *
        header; /* [n_header] the file up to the tensor data: our copy, so that it cannot change under us; strings get a NUL behind them in place */
    size_t n_header;
    gguf_entry *entries; /* [n_entries] in the file's order */
    gguf_entry **by_key; /* [n_entries] */
    int64_t n_entries;
    gguf_tensor *tensors;  /* [n_tensors] in the file's order */
    gguf_tensor **by_name; /* [n_tensors] */
    int64_t n_tensors;
    quarry_error *wrong; /* first key of a wrong type that a getter met */
};

/* Reads keys and tensor descriptions into *g, checks them and sets header, entries and tensors. */
quarry_code gguf_header_read(gguf_file *g, quarry_error *error);

size_t gguf_type_size(gguf_type type); /* 0: string or array */
const gguf_entry *gguf_entry_find(const gguf_file *g, const char *key);
/* n bytes of text made fit for a message: cut, and control characters replaced. Returns out. */
enum { NAME_SHOWN = 80 };
const char *gguf_shown(char out[NAME_SHOWN], const char *text, size_t n);

#endif
