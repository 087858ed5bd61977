#include "kv/cold_cache.h"

#include <string.h>

enum {
    WAYS = 8,
    CHUNK = 64,        /* things for which a part takes memory at a time */
    NONE = UINT32_MAX, /* no slot; no place */
};

typedef struct entry {
    uint32_t slot;
    uint32_t place; /* in the part's chunks, taken when the entry is first used; NONE before */
    uint32_t used;  /* when it was asked for last */
} entry;

struct cold_part {
    entry *entries;   /* [n_sets][WAYS] */
    uint8_t **chunks; /* [n_sets * WAYS / CHUNK] of [CHUNK][width]; NULL: not yet */
    uint32_t n_places;
};

quarry_code cold_cache_init(cold_cache *c, int n_parts, size_t width, quarry_error *error)
{
    *c = (cold_cache){.n_parts = n_parts, .width = width, .parts = memory_zero((size_t)n_parts, sizeof *c->parts, "cold rows", error)};
    return c->parts ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

static void drop(cold_cache *c)
{
    for (int i = 0; c->parts && i < c->n_parts; i++) {
        memory_free(c->parts[i].entries);
        memory_free(c->parts[i].chunks);
        c->parts[i] = (cold_part){0};
    }
    memory_free(c->memory);
    c->memory = NULL;
    c->n_sets = 0;
    atomic_store(&c->n_taken, 0);
    atomic_store(&c->entry_bytes, 0);
}

void cold_cache_free(cold_cache *c)
{
    drop(c);
    memory_free(c->parts);
    c->parts = NULL;
}

static quarry_code part_alloc(const cold_cache *c, cold_part *p, quarry_error *error)
{
    const size_t n = (size_t)c->n_sets * WAYS;
    p->entries = memory_alloc(n, sizeof *p->entries, "cache of cold rows", error);
    p->chunks = memory_zero(n / CHUNK, sizeof *p->chunks, "cache of cold rows", error);
    if (!p->entries || !p->chunks) return QUARRY_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) p->entries[i] = (entry){NONE, NONE, 0};
    return QUARRY_OK;
}

quarry_code cold_cache_set(cold_cache *c, int64_t n_slots, size_t n_bytes, quarry_error *error)
{
    const size_t parts = (size_t)c->n_parts;
    const int64_t all = (n_slots + CHUNK - 1) / CHUNK, fit = (int64_t)(n_bytes / parts / (c->width + sizeof(entry)) / CHUNK);
    const int64_t chunks = fit < all ? fit : all;
    drop(c);
    c->whole = fit >= all;
    c->n_sets = chunks * (CHUNK / WAYS);
    if (c->n_sets == 0) return QUARRY_OK;
    c->n_chunks = parts * (size_t)chunks;
    quarry_code code = QUARRY_OK;
    c->memory = memory_aligned(c->n_chunks, CHUNK * c->width, "cache of cold rows", error);
    if (!c->memory) code = QUARRY_ERROR_MEMORY;
    for (int i = 0; i < c->n_parts && code == QUARRY_OK; i++) code = part_alloc(c, &c->parts[i], error);
    if (code != QUARRY_OK)
        drop(c);
    else
        atomic_store(&c->entry_bytes, parts * (size_t)c->n_sets * WAYS * sizeof(entry));
    return code;
}

size_t cold_cache_bytes(const cold_cache *c)
{
    return atomic_load(&c->n_taken) * CHUNK * c->width + atomic_load(&c->entry_bytes);
}

void cold_cache_tally(const cold_cache *c, memory_tally *tally)
{
    memory_tally_add(tally, c->memory, atomic_load(&c->n_taken) * CHUNK * c->width);
    for (int i = 0; i < c->n_parts; i++) memory_tally_add(tally, c->parts[i].entries, (size_t)c->n_sets * WAYS * sizeof(entry));
}

/* NULL: there is no place for the slot. */
static entry *set_of(const cold_cache *c, int part, uint32_t slot)
{
    const uint64_t hash = slot * UINT64_C(0x9e3779b97f4a7c15) >> 32;
    const uint64_t set = c->whole ? slot / WAYS : hash * (uint64_t)c->n_sets >> 32;
    return set < (uint64_t)c->n_sets ? c->parts[part].entries + set * WAYS : NULL;
}

static uint8_t *place_of(const cold_cache *c, int part, uint32_t place)
{
    return c->parts[part].chunks[place / CHUNK] + (size_t)(place % CHUNK) * c->width;
}

const uint8_t *cold_cache_get(cold_cache *c, int part, uint32_t slot, uint32_t now)
{
    entry *set = set_of(c, part, slot);
    for (int i = 0; set && i < WAYS; i++) {
        if (set[i].slot != slot) continue;
        set[i].used = now;
        return place_of(c, part, set[i].place);
    }
    return NULL;
}

void cold_cache_put(cold_cache *c, int part, uint32_t slot, uint32_t now, const void *thing)
{
    cold_part *p = &c->parts[part];
    entry *set = set_of(c, part, slot), *e = set;
    if (!set || cold_cache_get(c, part, slot, now)) return;
    for (int i = 0; i < WAYS && e->slot != NONE; i++)
        if (set[i].slot == NONE || now - set[i].used > now - e->used) e = &set[i];
    if (e->slot != NONE && e->used == now) return;
    if (e->place == NONE) {
        e->place = p->n_places++;
        uint8_t **chunk = &p->chunks[e->place / CHUNK];
        if (!*chunk) *chunk = c->memory + atomic_fetch_add(&c->n_taken, 1) * CHUNK * c->width;
    }
    e->slot = slot;
    e->used = now;
    memcpy(place_of(c, part, e->place), thing, c->width);
}
