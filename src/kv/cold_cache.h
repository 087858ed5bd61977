/* A cache of things of one size that are known by a part and a slot, for kv/cold.c. The room is divided evenly among the parts. In each it is set-associative, and of a set goes
 * what was not asked for longest; if there is room for every slot, nothing goes. Memory is taken as it is filled. Calls for different parts may happen at the same time. */
#ifndef KV_COLD_CACHE_H
#define KV_COLD_CACHE_H

#include <stdatomic.h>

#include "base/base.h"

typedef struct cold_part cold_part;

typedef struct cold_cache {
    int n_parts;
    size_t width;     /* bytes of a thing */
    cold_part *parts; /* [n_parts] */
    int64_t n_sets;   /* of a part */
    bool whole;       /* there is room for every slot */
    uint8_t *memory;  /* of all chunks: first touched as they are taken */
    size_t n_chunks;
    _Atomic size_t n_taken;     /* chunks */
    _Atomic size_t entry_bytes; /* of all parts */
} cold_cache;

quarry_code cold_cache_init(cold_cache *c, int n_parts, size_t width, quarry_error *error);
void cold_cache_free(cold_cache *c); /* zero-initialised: allowed */

/* Empties it, and lets it take so many bytes for slots [0, n_slots). On error it is empty and takes nothing. */
quarry_code cold_cache_set(cold_cache *c, int64_t n_slots, size_t n_bytes, quarry_error *error);
size_t cold_cache_bytes(const cold_cache *c); /* that it takes now */
void cold_cache_tally(const cold_cache *c, memory_tally *tally);

/* The thing at a slot, or NULL; valid until the next put. now: what grows by one with every call of whoever asks, so that what it asked for stays. */
const uint8_t *cold_cache_get(cold_cache *c, int part, uint32_t slot, uint32_t now);
/* Keeps it, unless all that could make room was asked for just now, or it is there. */
void cold_cache_put(cold_cache *c, int part, uint32_t slot, uint32_t now, const void *thing);

#endif
