/* A bump allocator for memory that is freed together: scratch of one forward pass, tables of one model. */
#ifndef BASE_ARENA_H
#define BASE_ARENA_H

#include <stddef.h>

#include "base/error.h"
#include "base/resident.h"

typedef struct arena_block arena_block;

typedef struct arena {
    arena_block *block; /* newest */
    size_t n_bytes;     /* held from the system */
} arena;                /* zero-initialise */

/* n * size bytes aligned to 64, not cleared; valid until arena_reset or arena_free. NULL and *error on failure. */
void *arena_alloc(arena *a, size_t n, size_t size, quarry_error *error);
/* One block for the next n_bytes (every allocation counts as a multiple of 64): they lie together, in huge pages if there is enough. */
quarry_code arena_reserve(arena *a, size_t n_bytes, quarry_error *error);
/* Forgets all allocations; keeps one block large enough for what was used. */
void arena_reset(arena *a);
void arena_free(arena *a);
void arena_tally(const arena *a, memory_tally *tally); /* counts its blocks */
bool arena_lock(const arena *a);                       /* as memory_lock, all of its blocks */
void arena_unlock(const arena *a);

#endif
