/* The header of a GGUF file: counts, keys and values, tensor descriptions. Everything here comes from a file that may be hostile. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gguf/parts.h"

enum {
    NAME_MAX_BYTES = 64,     /* of a tensor, by the format */
    KEY_MAX_BYTES = 65535,   /* by the format */
    ALIGNMENT_MIN = 8,       /* the format asks for a multiple of 8; ggml for a power of two */
    ALIGNMENT_MAX = 1 << 20, /* a page or a disk block, with room */
    ALIGNMENT_DEFAULT = 32,
    FIRST_READ = 1 << 20,
    HEADER_MAX = 512 << 20, /* 262,144-token vocabularies take 16 MB; offsets fit 32 bits */
};

typedef struct reader {
    gguf_file *g;
    size_t at;
    uint64_t limit; /* bytes that may be read: of the file, at most HEADER_MAX */
    size_t capacity_keys, capacity_tensors;
    char where[2 * NAME_SHOWN]; /* for messages: what is being read */
    quarry_error *error;
} reader;

const char *gguf_shown(char out[NAME_SHOWN], const char *text, size_t n)
{
    size_t shown = n < NAME_SHOWN - 1 ? n : NAME_SHOWN - 1;
    for (size_t i = 0; i < shown; i++) out[i] = (unsigned char)text[i] < 32 || text[i] == 127 ? '?' : text[i];
    if (shown < n) memcpy(out + shown - 3, "...", 3);
    out[shown] = 0;
    return out;
}

size_t gguf_type_size(gguf_type type)
{
    static const uint8_t size[TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < TYPE_COUNT ? size[type] : 0;
}

/* Error FORMAT: file, what was being read, and what is wrong with it. */
__attribute__((format(printf, 2, 3))) static quarry_code bad(reader *r, const char *format, ...)
{
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: %s %s", r->g->path, r->where, what);
}

/* Makes header[at, at + n) present. */
static quarry_code need(reader *r, uint64_t n)
{
    gguf_file *g = r->g;
    if (n > r->limit - r->at) {
        if (r->limit < g->n_bytes) return bad(r, "goes beyond %d MiB of metadata", HEADER_MAX >> 20);
        return bad(r, "goes past the end of the file (%llu bytes); the file is damaged or incomplete", (unsigned long long)g->n_bytes);
    }
    size_t end = r->at + (size_t)n;
    if (end <= g->n_header) return QUARRY_OK;
    uint64_t want = end > FIRST_READ ? (uint64_t)end * 2 : FIRST_READ;
    if (want > r->limit) want = r->limit;
    quarry_code code = memory_grow(&g->header, (size_t)want + 1, 1, "GGUF header", r->error); /* + 1: a NUL behind a last string */
    if (code != QUARRY_OK) return code;
    size_t missing = (size_t)want - g->n_header;
    if (g->bytes && !g->map)
        memcpy(g->header + g->n_header, g->bytes + g->n_header, missing);
    else if ((code = file_map_read(g->map, g->n_header, missing, g->header + g->n_header, r->error)) != QUARRY_OK)
        return code;
    g->n_header = (size_t)want;
    return QUARRY_OK;
}

static quarry_code read_u32(reader *r, uint32_t *value)
{
    quarry_code code = need(r, 4);
    if (code != QUARRY_OK) return code;
    memcpy(value, r->g->header + r->at, 4);
    r->at += 4;
    return QUARRY_OK;
}

static quarry_code read_u64(reader *r, uint64_t *value)
{
    quarry_code code = need(r, 8);
    if (code != QUARRY_OK) return code;
    memcpy(value, r->g->header + r->at, 8);
    r->at += 8;
    return QUARRY_OK;
}

/* A length and that many bytes; *at is where they begin. */
static quarry_code read_string(reader *r, size_t *at, uint64_t *n)
{
    quarry_code code;
    if ((code = read_u64(r, n)) != QUARRY_OK || (code = need(r, *n)) != QUARRY_OK) return code;
    *at = r->at;
    r->at += (size_t)*n;
    return QUARRY_OK;
}

/* A key or tensor name: not empty, not too long, no NUL. */
static quarry_code read_name(reader *r, size_t max, size_t *at, uint64_t *n)
{
    quarry_code code = read_u64(r, n);
    if (code != QUARRY_OK) return code;
    if (*n == 0) return bad(r, "has an empty name");
    if (*n > max) return bad(r, "has a name of %llu bytes, at most %zu are allowed", (unsigned long long)*n, max);
    if ((code = need(r, *n)) != QUARRY_OK) return code;
    *at = r->at;
    r->at += (size_t)*n;
    if (memchr(r->g->header + *at, 0, (size_t)*n)) return bad(r, "has a NUL byte in its name");
    return QUARRY_OK;
}

static quarry_code read_string_array(reader *r, gguf_entry *e)
{
    uint64_t n;
    size_t at;
    quarry_code code;
    if (e->count > (r->limit - r->at) / 8) return bad(r, "has %llu strings, more than the file can hold", (unsigned long long)e->count);
    if (!(e->strings = memory_alloc((size_t)e->count, sizeof *e->strings, "GGUF string array", r->error))) return QUARRY_ERROR_MEMORY;
    for (uint64_t i = 0; i < e->count; i++) {
        e->strings[i] = (uint32_t)r->at;
        if ((code = read_string(r, &at, &n)) != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

static quarry_code read_array(reader *r, gguf_entry *e)
{
    uint32_t type;
    quarry_code code;
    if ((code = read_u32(r, &type)) != QUARRY_OK || (code = read_u64(r, &e->count)) != QUARRY_OK) return code;
    if (type == TYPE_ARRAY) return bad(r, "is an array of arrays, which is not supported");
    if (type >= TYPE_COUNT) return bad(r, "is an array of unknown value type %u", type);
    e->type = (gguf_type)type;
    e->is_array = true;
    e->value_at = r->at;
    if (type == TYPE_STRING) return read_string_array(r, e);
    size_t size = gguf_type_size(e->type);
    if (e->count > (r->limit - r->at) / size) return bad(r, "has %llu elements, more than the file can hold", (unsigned long long)e->count);
    if ((code = need(r, e->count * size)) != QUARRY_OK) return code;
    r->at += (size_t)e->count * size;
    return QUARRY_OK;
}

static quarry_code read_entry(reader *r, gguf_entry *e)
{
    char shown[NAME_SHOWN];
    uint64_t n;
    uint32_t type;
    quarry_code code = read_name(r, KEY_MAX_BYTES, &e->key_at, &n);
    if (code != QUARRY_OK) return code;
    e->key_bytes = (size_t)n;
    snprintf(r->where, sizeof r->where, "key %s", gguf_shown(shown, (const char *)r->g->header + e->key_at, e->key_bytes));
    if ((code = read_u32(r, &type)) != QUARRY_OK) return code;
    if (type == TYPE_ARRAY) return read_array(r, e);
    if (type >= TYPE_COUNT) return bad(r, "has unknown value type %u", type);
    e->type = (gguf_type)type;
    if (type == TYPE_STRING) return read_string(r, &e->value_at, &e->count);
    e->count = 1;
    e->value_at = r->at;
    if ((code = need(r, gguf_type_size(e->type))) != QUARRY_OK) return code;
    r->at += gguf_type_size(e->type);
    return QUARRY_OK;
}

/* Grows with what was really read, so that a false count costs no memory. */
static quarry_code grow(reader *r, void *pointer_to_array, size_t *capacity, int64_t n, size_t size)
{
    if ((size_t)n < *capacity) return QUARRY_OK;
    size_t want = *capacity ? *capacity * 2 : 64;
    quarry_code code = memory_grow(pointer_to_array, want, size, "GGUF header", r->error);
    if (code == QUARRY_OK) *capacity = want;
    return code;
}

static quarry_code read_entries(reader *r, uint64_t n)
{
    gguf_file *g = r->g;
    for (uint64_t i = 0; i < n; i++) {
        quarry_code code = grow(r, &g->entries, &r->capacity_keys, g->n_entries, sizeof *g->entries);
        if (code != QUARRY_OK) return code;
        gguf_entry *e = &g->entries[g->n_entries++];
        *e = (gguf_entry){0};
        snprintf(r->where, sizeof r->where, "key number %llu", (unsigned long long)i);
        if ((code = read_entry(r, e)) != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

/* dims and type to the number of bytes. */
static quarry_code tensor_size(reader *r, gguf_tensor *t, uint32_t type, const uint64_t dims[4])
{
    size_t n = 1;
    for (int d = 0; d < 4; d++) {
        if (dims[d] == 0) return bad(r, "has a dimension of 0");
        if (dims[d] > INT64_MAX || !size_multiply(n, (size_t)dims[d], &n) || n > INT64_MAX)
            return bad(r, "has dimensions whose product is too large");
        t->dims[d] = (int64_t)dims[d];
    }
    const block_info *info = block_info_get(type);
    if (!info) {
        const char *name = block_type_name(type);
        if (!name) return bad(r, "has unknown type %u", type);
        return error_set(r->error, QUARRY_ERROR_UNSUPPORTED,
                         "%s: %s has type %s, which is not supported; use a model in another quantisation", r->g->path, r->where, name);
    }
    t->type = (block_type)type;
    if (dims[0] % info->n_weights)
        return bad(r, "has rows of %lld, not a multiple of the block of %u of type %s", (long long)t->dims[0], info->n_weights, info->name);
    if (!size_multiply(n / info->n_weights, info->n_bytes, &t->n_bytes)) return bad(r, "has dimensions whose product is too large");
    return QUARRY_OK;
}

static quarry_code read_tensor(reader *r, gguf_tensor *t, size_t *name_at)
{
    char shown[NAME_SHOWN];
    uint64_t n, dims[4] = {1, 1, 1, 1};
    uint32_t n_dims, type;
    quarry_code code = read_name(r, NAME_MAX_BYTES, name_at, &n);
    if (code != QUARRY_OK) return code;
    snprintf(r->where, sizeof r->where, "tensor %s", gguf_shown(shown, (const char *)r->g->header + *name_at, (size_t)n));
    if ((code = read_u32(r, &n_dims)) != QUARRY_OK) return code;
    if (n_dims < 1 || n_dims > 4) return bad(r, "has %u dimensions, 1 to 4 are allowed", n_dims);
    t->n_dims = (int)n_dims;
    for (uint32_t d = 0; d < n_dims; d++) {
        if ((code = read_u64(r, &dims[d])) != QUARRY_OK) return code;
    }
    if ((code = read_u32(r, &type)) != QUARRY_OK || (code = read_u64(r, &t->offset)) != QUARRY_OK) return code;
    r->g->header[*name_at + n] = 0; /* over n_dims, which has been read */
    return tensor_size(r, t, type, dims);
}

/* The header may move while it grows: until it is complete, a name is kept as its offset. */
static quarry_code read_tensors(reader *r, uint64_t n)
{
    gguf_file *g = r->g;
    for (uint64_t i = 0; i < n; i++) {
        size_t name_at = 0;
        quarry_code code = grow(r, &g->tensors, &r->capacity_tensors, g->n_tensors, sizeof *g->tensors);
        if (code != QUARRY_OK) return code;
        gguf_tensor *t = &g->tensors[g->n_tensors++];
        *t = (gguf_tensor){0};
        snprintf(r->where, sizeof r->where, "tensor number %llu", (unsigned long long)i);
        if ((code = read_tensor(r, t, &name_at)) != QUARRY_OK) return code;
        t->name = (const char *)(uintptr_t)name_at;
    }
    return QUARRY_OK;
}

static int compare_keys(const void *a, const void *b)
{
    return strcmp((*(gguf_entry *const *)a)->key, (*(gguf_entry *const *)b)->key);
}

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(gguf_tensor *const *)a)->name, (*(gguf_tensor *const *)b)->name);
}

static int compare_offsets(const void *a, const void *b)
{
    uint64_t x = (*(gguf_tensor *const *)a)->offset, y = (*(gguf_tensor *const *)b)->offset;
    return (x > y) - (x < y);
}

/* Ends the names and strings with a NUL and sorts what is looked up; refuses duplicates. */
static quarry_code index_build(reader *r)
{
    gguf_file *g = r->g;
    char shown[NAME_SHOWN];
    if (!(g->by_key = memory_alloc((size_t)g->n_entries, sizeof *g->by_key, "GGUF keys", r->error)) ||
        !(g->by_name = memory_alloc((size_t)g->n_tensors, sizeof *g->by_name, "GGUF tensors", r->error)))
        return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < g->n_entries; i++) {
        gguf_entry *e = g->by_key[i] = &g->entries[i];
        e->key = (const char *)g->header + e->key_at;
        g->header[e->key_at + e->key_bytes] = 0;
        if (e->type == TYPE_STRING && !e->is_array) g->header[e->value_at + e->count] = 0;
    }
    for (int64_t i = 0; i < g->n_tensors; i++) {
        g->by_name[i] = &g->tensors[i];
        g->tensors[i].name = (const char *)g->header + (uintptr_t)g->tensors[i].name;
    }
    qsort(g->by_key, (size_t)g->n_entries, sizeof *g->by_key, compare_keys);
    for (int64_t i = 1; i < g->n_entries; i++) {
        const char *key = g->by_key[i]->key;
        if (strcmp(key, g->by_key[i - 1]->key) == 0)
            return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: key %s occurs twice", g->path, gguf_shown(shown, key, strlen(key)));
    }
    qsort(g->by_name, (size_t)g->n_tensors, sizeof *g->by_name, compare_names);
    for (int64_t i = 1; i < g->n_tensors; i++) {
        const char *name = g->by_name[i]->name;
        if (strcmp(name, g->by_name[i - 1]->name) == 0)
            return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: tensor %s occurs twice", g->path, gguf_shown(shown, name, strlen(name)));
    }
    return QUARRY_OK;
}

static quarry_code alignment_read(reader *r, uint64_t *alignment)
{
    static const char key[] = "general.alignment";
    const gguf_file *g = r->g;
    quarry_error wrong = {0};
    int64_t a = gguf_int(g, key, ALIGNMENT_DEFAULT);
    if (gguf_metadata_error(g, &wrong) != QUARRY_OK) return error_set(r->error, wrong.code, "%s", wrong.message);
    if (a < ALIGNMENT_MIN || a > ALIGNMENT_MAX || (a & (a - 1)))
        return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: key %s is %lld, not a power of two from %d to %d", g->path, key, (long long)a,
                         ALIGNMENT_MIN, ALIGNMENT_MAX);
    *alignment = (uint64_t)a;
    return QUARRY_OK;
}

/* Makes tensor offsets absolute; each tensor lies inside the file and on no other. */
static quarry_code tensors_place(reader *r)
{
    gguf_file *g = r->g;
    char shown[NAME_SHOWN], other[NAME_SHOWN];
    uint64_t alignment = ALIGNMENT_DEFAULT;
    quarry_code code = alignment_read(r, &alignment);
    if (code != QUARRY_OK) return code;
    uint64_t start = (r->at + alignment - 1) / alignment * alignment;
    for (int64_t i = 0; i < g->n_tensors; i++) {
        gguf_tensor *t = &g->tensors[i];
        snprintf(r->where, sizeof r->where, "tensor %s", gguf_shown(shown, t->name, strlen(t->name)));
        if (t->offset % alignment)
            return bad(r, "begins at offset %llu, not a multiple of the alignment %llu", (unsigned long long)t->offset,
                       (unsigned long long)alignment);
        if (start > g->n_bytes || t->offset > g->n_bytes - start || t->n_bytes > g->n_bytes - start - t->offset)
            return bad(r, "goes past the end of the file (%llu bytes); the file is damaged or incomplete", (unsigned long long)g->n_bytes);
        t->offset += start;
    }
    gguf_tensor **sorted = memory_alloc((size_t)g->n_tensors, sizeof(gguf_tensor *), "GGUF tensors", r->error);
    if (!sorted) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < g->n_tensors; i++) sorted[i] = &g->tensors[i];
    qsort(sorted, (size_t)g->n_tensors, sizeof *sorted, compare_offsets);
    for (int64_t i = 1; i < g->n_tensors && code == QUARRY_OK; i++) {
        const gguf_tensor *a = sorted[i - 1], *b = sorted[i];
        if (b->offset - a->offset < a->n_bytes)
            code = error_set(r->error, QUARRY_ERROR_FORMAT, "%s: tensors %s and %s overlap", g->path,
                             gguf_shown(shown, a->name, strlen(a->name)), gguf_shown(other, b->name, strlen(b->name)));
    }
    memory_free(sorted);
    return code;
}

static quarry_code read_version(reader *r)
{
    const char *path = r->g->path;
    uint32_t magic, version;
    quarry_code code;
    if (r->g->n_bytes < 4)
        return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: not a GGUF file (%llu bytes)", path, (unsigned long long)r->g->n_bytes);
    if ((code = read_u32(r, &magic)) != QUARRY_OK) return code;
    if (magic != 0x46554747) return error_set(r->error, QUARRY_ERROR_FORMAT, "%s: not a GGUF file (it does not begin with \"GGUF\")", path);
    if ((code = read_u32(r, &version)) != QUARRY_OK) return code;
    if (version == 2 || version == 3) return QUARRY_OK;
    if (version != 0 && (version & 0xffff) == 0)
        return error_set(r->error, QUARRY_ERROR_UNSUPPORTED, "%s: a big-endian GGUF file; convert it to little-endian", path);
    return error_set(r->error, QUARRY_ERROR_UNSUPPORTED, "%s: GGUF version %u; versions 2 and 3 are supported, convert the model again",
                     path, version);
}

quarry_code gguf_header_read(gguf_file *g, quarry_error *error)
{
    enum { ENTRY_MIN = 8 + 1 + 4 + 1, TENSOR_MIN = 8 + 1 + 4 + 8 + 4 + 8 }; /* bytes */
    reader r = {.g = g, .limit = g->n_bytes < HEADER_MAX ? g->n_bytes : HEADER_MAX, .where = "the header", .error = error};
    uint64_t n_tensors, n_entries;
    quarry_code code;
    if ((code = read_version(&r)) != QUARRY_OK || (code = read_u64(&r, &n_tensors)) != QUARRY_OK ||
        (code = read_u64(&r, &n_entries)) != QUARRY_OK)
        return code;
    uint64_t left = r.limit - r.at;
    if (n_entries > left / ENTRY_MIN) return bad(&r, "promises %llu keys, more than the file can hold", (unsigned long long)n_entries);
    if (n_tensors > left / TENSOR_MIN) return bad(&r, "promises %llu tensors, more than the file can hold", (unsigned long long)n_tensors);
    if ((code = read_entries(&r, n_entries)) != QUARRY_OK || (code = read_tensors(&r, n_tensors)) != QUARRY_OK) return code;
    if (memory_grow(&g->header, r.at + 1, 1, "GGUF header", NULL) == QUARRY_OK) g->n_header = r.at; /* gives back what was read too far */
    if ((code = index_build(&r)) != QUARRY_OK) return code;
    return tensors_place(&r);
}
