#include "gguf/gguf.h"

#include <stdlib.h>
#include <string.h>

#include "gguf/parts.h"

static gguf_file *open_source(file_map *map, const void *bytes, uint64_t n_bytes, const char *path, quarry_error *error)
{
    gguf_file *g = memory_zero(1, sizeof *g, "GGUF file", error);
    if (!g) {
        file_map_close(map);
        return NULL;
    }
    g->map = map;
    g->bytes = bytes;
    g->n_bytes = n_bytes;
    if (!(g->path = memory_string(path, strlen(path), error))) goto failed;
    if (!(g->wrong = memory_zero(1, sizeof *g->wrong, "GGUF file", error))) goto failed;
    if (gguf_header_read(g, error) != QUARRY_OK) goto failed;
    return g;
failed:
    gguf_close(g);
    return NULL;
}

gguf_file *gguf_open(const char *path, bool use_mmap, quarry_error *error)
{
    file_map *map = file_map_open(path, use_mmap, error);
    return map ? open_source(map, file_map_data(map), file_map_size(map), path, error) : NULL;
}

gguf_file *gguf_open_memory(const void *bytes, size_t n_bytes, const char *name, quarry_error *error)
{
    return open_source(NULL, bytes, n_bytes, name, error);
}

void gguf_close(gguf_file *g)
{
    if (!g) return;
    for (int64_t i = 0; i < g->n_entries; i++) memory_free(g->entries[i].strings);
    memory_free(g->entries);
    memory_free(g->by_key);
    memory_free(g->tensors);
    memory_free(g->by_name);
    memory_free(g->header);
    memory_free(g->wrong);
    memory_free(g->path);
    file_map_close(g->map);
    memory_free(g);
}

bool gguf_identity(const gguf_file *g, quarry_file_identity *identity)
{
    return g->map && file_map_identity(g->map, identity);
}

const char *gguf_path(const gguf_file *g)
{
    return g->path;
}

uint64_t gguf_size(const gguf_file *g)
{
    return g->n_bytes;
}

bool gguf_is_mapped(const gguf_file *g)
{
    return g->bytes != NULL;
}

int64_t gguf_n_tensors(const gguf_file *g)
{
    return g->n_tensors;
}

const gguf_tensor *gguf_tensor_at(const gguf_file *g, int64_t i)
{
    return &g->tensors[i];
}

static int compare_name(const void *name, const void *tensor)
{
    return strcmp(name, (*(gguf_tensor *const *)tensor)->name);
}

const gguf_tensor *gguf_find(const gguf_file *g, const char *name)
{
    gguf_tensor *const *found = bsearch(name, g->by_name, (size_t)g->n_tensors, sizeof *g->by_name, compare_name);
    return found ? *found : NULL;
}

const void *gguf_tensor_data(const gguf_file *g, const gguf_tensor *t, void **copy, quarry_error *error)
{
    *copy = NULL;
    if (g->bytes) return g->bytes + t->offset;
    void *out = memory_aligned(t->n_bytes, 1, t->name, error);
    if (!out) return NULL;
    if (file_map_read(g->map, t->offset, t->n_bytes, out, error) != QUARRY_OK) {
        memory_free(out);
        return NULL;
    }
    return *copy = out;
}

void gguf_tensor_release(const gguf_file *g, const gguf_tensor *t)
{
    if (g->map) file_map_release(g->map, t->offset, t->n_bytes);
}

void gguf_release(const gguf_file *g, uint64_t first, uint64_t end)
{
    if (g->map && first < end) file_map_release(g->map, first, (size_t)(end - first));
}

quarry_code gguf_check(const gguf_file *g, quarry_error *error)
{
    return g->map ? file_map_check(g->map, error) : QUARRY_OK;
}

void gguf_tally(const gguf_file *g, memory_tally *metadata, memory_tally *mapped)
{
    const size_t entries = (size_t)g->n_entries, tensors = (size_t)g->n_tensors;
    memory_tally_add(metadata, g->header, g->n_header);
    memory_tally_add(metadata, g->entries, entries * sizeof *g->entries);
    memory_tally_add(metadata, g->by_key, entries * sizeof *g->by_key);
    memory_tally_add(metadata, g->tensors, tensors * sizeof *g->tensors);
    memory_tally_add(metadata, g->by_name, tensors * sizeof *g->by_name);
    for (size_t i = 0; i < entries; i++) memory_tally_add(metadata, g->entries[i].strings, (size_t)g->entries[i].count * sizeof(uint32_t));
    if (g->map) memory_tally_add(mapped, file_map_data(g->map), (size_t)g->n_bytes);
}
