/* gguf: the file format (version 2 and 3, little-endian). Knows block sizes, nothing about models. Never trusts a length: every count, product and
 * offset is checked against the file before use, so a hostile file gives an error FORMAT that names file, key or tensor. */
#ifndef GGUF_GGUF_H
#define GGUF_GGUF_H

#include "base/base.h"
#include "math/math.h"

typedef struct gguf_file gguf_file;

typedef struct gguf_tensor {
    const char *name;
    block_type type;
    int n_dims;
    int64_t dims[4]; /* dims[0] is contiguous (columns); unused ones are 1 */
    uint64_t offset; /* in the file */
    size_t n_bytes;
} gguf_tensor;

gguf_file *gguf_open(const char *path, bool use_mmap, quarry_error *error);
/* The same over bytes in memory (the fuzz target's way in); bytes must outlive the file. */
gguf_file *gguf_open_memory(const void *bytes, size_t n_bytes, const char *name, quarry_error *error);
void gguf_close(gguf_file *g);

bool gguf_identity(const gguf_file *g, quarry_file_identity *identity); /* as file_map_identity; false in memory */
const char *gguf_path(const gguf_file *g);
uint64_t gguf_size(const gguf_file *g);  /* bytes of the file */
bool gguf_is_mapped(const gguf_file *g); /* or in memory: its tensors need not be copied */
int64_t gguf_n_tensors(const gguf_file *g);
const gguf_tensor *gguf_tensor_at(const gguf_file *g, int64_t i);
const gguf_tensor *gguf_find(const gguf_file *g, const char *name); /* NULL if absent; O(log n) */

/* Bytes of a tensor: the mapping, or (not mapped) a copy read now, which the caller frees with memory_free when *copy is set non-NULL. Error IO. */
const void *gguf_tensor_data(const gguf_file *g, const gguf_tensor *t, void **copy, quarry_error *error);
/* The tensor was copied elsewhere: give its mapped pages back. */
void gguf_tensor_release(const gguf_file *g, const gguf_tensor *t);
/* The same for all bytes from one offset to another. */
void gguf_release(const gguf_file *g, uint64_t first, uint64_t end);
/* Counts what is kept of the header, and, apart, the mapping. */
void gguf_tally(const gguf_file *g, memory_tally *metadata, memory_tally *mapped);
/* Error IO if the file shrank while mapped. */
quarry_code gguf_check(const gguf_file *g, quarry_error *error);

/* Metadata. Numbers of any integer or float type convert if exact; false / NULL / def when the key is absent. A key of the wrong type is an error, reported
 * once by gguf_metadata_error() below (so that a model reads all its keys first and checks at the end). */
bool gguf_has(const gguf_file *g, const char *key);
int64_t gguf_int(const gguf_file *g, const char *key, int64_t def);
double gguf_float(const gguf_file *g, const char *key, double def);
bool gguf_bool(const gguf_file *g, const char *key, bool def);
const char *gguf_string(const gguf_file *g, const char *key, size_t *n_bytes); /* NUL-terminated; n_bytes may be NULL */

typedef enum gguf_value_kind { GGUF_INT, GGUF_FLOAT, GGUF_BOOL, GGUF_STRING } gguf_value_kind;
/* Arrays: length, or -1 if absent or not an array of that kind. */
int64_t gguf_array(const gguf_file *g, const char *key, gguf_value_kind kind);
int64_t gguf_array_int(const gguf_file *g, const char *key, int64_t i);
double gguf_array_float(const gguf_file *g, const char *key, int64_t i);
const char *gguf_array_string(const gguf_file *g, const char *key, int64_t i, size_t *n_bytes); /* O(1); not NUL-terminated */

/* The first wrong-typed key met by the getters, as an error FORMAT; QUARRY_OK if none. Not thread-safe: a file is read by one thread. */
quarry_code gguf_metadata_error(const gguf_file *g, quarry_error *error);

#endif
