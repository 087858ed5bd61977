#include "base/arena.h"

#include <stdint.h>

#include "base/memory.h"

struct arena_block {
    arena_block *next;
    size_t size, used; /* bytes of data, which starts at the next multiple of 64 after the header */
};

enum { HEADER = 64, SMALLEST_BLOCK = 64 << 10 };

static arena_block *block_new(size_t size, quarry_error *error)
{
    arena_block *b = memory_aligned(size + HEADER, 1, "arena", error);
    if (b) *b = (arena_block){.size = size};
    return b;
}

static quarry_code push_block(arena *a, size_t size, quarry_error *error)
{
    arena_block *b = block_new(size, error);
    if (!b) return QUARRY_ERROR_MEMORY;
    b->next = a->block;
    a->block = b;
    a->n_bytes += b->size + HEADER;
    return QUARRY_OK;
}

quarry_code arena_reserve(arena *a, size_t n_bytes, quarry_error *error)
{
    return push_block(a, (n_bytes + 63) / 64 * 64, error);
}

void *arena_alloc(arena *a, size_t n, size_t size, quarry_error *error)
{
    size_t bytes;
    if (!size_multiply(n, size, &bytes) || bytes > SIZE_MAX / 4) {
        error_memory(error, "arena", SIZE_MAX);
        return NULL;
    }
    bytes = (bytes + 63) / 64 * 64;
    if (!a->block || a->block->size - a->block->used < bytes) {
        size_t want = a->block ? a->block->size * 2 : SMALLEST_BLOCK;
        if (a->block && want > ((size_t)4 << 20)) want = (size_t)4 << 20;
        if (push_block(a, bytes > want ? bytes : want, error) != QUARRY_OK) return NULL;
    }
    void *p = (char *)a->block + HEADER + a->block->used;
    a->block->used += bytes;
    return p;
}

void arena_reset(arena *a)
{
    size_t used = 0;
    bool several = a->block && a->block->next;
    for (arena_block *b = a->block; b; b = b->next) used += b->used;
    if (several) {
        arena_free(a);
        a->block = block_new(used, NULL); /* if this fails the next allocation reports it */
        if (a->block) a->n_bytes = used + HEADER;
    }
    if (a->block) a->block->used = 0;
}

void arena_free(arena *a)
{
    while (a->block) {
        arena_block *next = a->block->next;
        memory_free(a->block);
        a->block = next;
    }
    a->n_bytes = 0;
}

void arena_tally(const arena *a, memory_tally *tally)
{
    for (const arena_block *b = a->block; b; b = b->next) memory_tally_add(tally, b, b->size + HEADER);
}

bool arena_lock(const arena *a)
{
    bool locked = true;
    for (const arena_block *b = a->block; b && locked; b = b->next) locked = memory_lock(b, b->size + HEADER);
    return locked;
}

void arena_unlock(const arena *a)
{
    for (const arena_block *b = a->block; b; b = b->next) memory_unlock(b, b->size + HEADER);
}
