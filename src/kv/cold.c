#include "kv/cold.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "kv/cold_cache.h"

typedef struct part_state {
    pthread_mutex_t lock; /* of what the caches have of the part */
    uint32_t now;         /* grows with every call that finds or takes */
} part_state;

struct kv_cold {
    _Atomic int64_t n_refs;
    kv_source source;
    int n_parts;
    int64_t n_segments, n_rows;
    int64_t *starts; /* [n_segments + 1]: slots before the segment */
    part_state *parts;
    cold_cache rows, derived;
    int64_t derived_rows; /* what `derived` was set for */
    size_t derived_room;
    _Atomic int64_t n_blocks, n_rows_asked, n_rows_found, n_derived, n_derived_found;
};

/* ---- making ---- */

static void destroy(kv_cold *c)
{
    for (int i = 0; c->parts && i < c->n_parts; i++) pthread_mutex_destroy(&c->parts[i].lock);
    cold_cache_free(&c->rows);
    cold_cache_free(&c->derived);
    c->source.release(c->source.data);
    memory_free(c->parts);
    memory_free(c->starts);
    memory_free(c);
}

kv_cold *kv_cold_create(const kv_source *source, int n_parts, size_t derived_bytes, quarry_error *error)
{
    kv_cold *c = memory_zero(1, sizeof *c, "cold rows", error);
    if (!c) {
        source->release(source->data);
        return NULL;
    }
    c->source = *source;
    c->n_parts = n_parts;
    atomic_init(&c->n_refs, 1);
    c->parts = memory_zero((size_t)n_parts, sizeof *c->parts, "cold rows", error);
    c->starts = memory_zero(1, sizeof *c->starts, "cold rows", error);
    for (int i = 0; c->parts && i < n_parts; i++) pthread_mutex_init(&c->parts[i].lock, NULL);
    if (c->parts && c->starts && cold_cache_init(&c->rows, n_parts, source->row_bytes, error) == QUARRY_OK &&
        cold_cache_init(&c->derived, n_parts, derived_bytes, error) == QUARRY_OK)
        return c;
    destroy(c);
    return NULL;
}

kv_cold *kv_cold_hold(kv_cold *c)
{
    atomic_fetch_add(&c->n_refs, 1);
    return c;
}

void kv_cold_release(kv_cold *c)
{
    if (c && atomic_fetch_sub(&c->n_refs, 1) == 1) destroy(c);
}

quarry_code kv_cold_extend(kv_cold *c, const int64_t *lengths, int64_t n, quarry_error *error)
{
    int64_t rows = c->n_rows;
    for (int64_t i = 0; i < n; i++) rows += lengths[i];
    if (rows >= UINT32_MAX)
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "a context of %lld tokens on disk is too long", (long long)rows);
    quarry_code code = memory_grow(&c->starts, (size_t)(c->n_segments + n + 1), sizeof *c->starts, "cold rows", error);
    if (code != QUARRY_OK) return code;
    for (int64_t i = 0; i < n; i++, c->n_segments++) c->starts[c->n_segments + 1] = c->starts[c->n_segments] + lengths[i];
    c->n_rows = rows;
    return QUARRY_OK;
}

void kv_cold_cut(kv_cold *c, int64_t n_segments)
{
    c->n_segments = n_segments;
    c->n_rows = c->starts[n_segments];
}

void *kv_cold_source(const kv_cold *c)
{
    return c->source.data;
}

int64_t kv_cold_length(const kv_cold *c, int64_t segment)
{
    return c->starts[segment + 1] - c->starts[segment];
}

int64_t kv_cold_block_rows(const kv_cold *c)
{
    return c->source.block_rows;
}

size_t kv_cold_block_bytes(const kv_cold *c)
{
    return c->source.block_bytes;
}

/* ---- the caches ---- */

quarry_code kv_cold_set_cache(kv_cold *c, size_t row_bytes, size_t derived_bytes, quarry_error *error)
{
    quarry_code code = cold_cache_set(&c->rows, c->n_rows, row_bytes, error);
    if (code == QUARRY_OK && (c->derived_rows != c->n_rows || c->derived_room != derived_bytes))
        code = cold_cache_set(&c->derived, c->n_rows, derived_bytes, error);
    if (code != QUARRY_OK) {
        cold_cache_set(&c->rows, 0, 0, NULL);
        cold_cache_set(&c->derived, 0, 0, NULL);
    }
    c->derived_rows = code == QUARRY_OK ? c->n_rows : -1;
    c->derived_room = derived_bytes;
    return code;
}

size_t kv_cold_row_bytes(const kv_cold *c)
{
    return cold_cache_bytes(&c->rows);
}

size_t kv_cold_derived_bytes(const kv_cold *c)
{
    return cold_cache_bytes(&c->derived);
}

void kv_cold_tally(const kv_cold *c, memory_tally *rows, memory_tally *derived)
{
    if (rows) cold_cache_tally(&c->rows, rows);
    if (derived) cold_cache_tally(&c->derived, derived);
}

kv_cold_counts kv_cold_count(const kv_cold *c)
{
    return (kv_cold_counts){atomic_load(&c->n_blocks), atomic_load(&c->n_rows_asked), atomic_load(&c->n_rows_found),
                            atomic_load(&c->n_derived), atomic_load(&c->n_derived_found)};
}

static void add(_Atomic int64_t *count, int64_t n)
{
    atomic_fetch_add_explicit(count, n, memory_order_relaxed);
}

/* ---- fetching ---- */

/* The blocks of those of slots[n] that are missing; NULL without memory. */
static int64_t *blocks_of(const kv_cold *c, const int32_t *slots, const uint8_t *missing, int64_t n, int64_t *n_blocks, arena *scratch,
                          quarry_error *error)
{
    const int64_t per = c->source.block_rows;
    int64_t *blocks = arena_alloc(scratch, (size_t)n, sizeof *blocks, error);
    *n_blocks = 0;
    for (int64_t i = 0; blocks && i < n; i++)
        if (missing[i] && (*n_blocks == 0 || blocks[*n_blocks - 1] != slots[i] / per)) blocks[(*n_blocks)++] = slots[i] / per;
    return blocks;
}

/* Points rows[i] of the missing ones at what was read of their blocks. */
static quarry_code read_missing(kv_cold *c, int part, int64_t segment, const int32_t *slots, const uint8_t *missing, int64_t n,
                                const void **rows, arena *scratch, quarry_error *error)
{
    const int64_t per = c->source.block_rows;
    int64_t n_blocks;
    const int64_t *blocks = blocks_of(c, slots, missing, n, &n_blocks, scratch, error);
    uint8_t *bytes = blocks ? arena_alloc(scratch, (size_t)n_blocks, c->source.block_bytes, error) : NULL;
    if (!bytes) return QUARRY_ERROR_MEMORY;
    const quarry_code code = c->source.read(c->source.data, segment, part, blocks, n_blocks, bytes, error);
    if (code != QUARRY_OK) return code;
    add(&c->n_blocks, n_blocks);
    for (int64_t i = 0, b = 0; i < n; i++) {
        if (!missing[i]) continue;
        while (blocks[b] != slots[i] / per) b++;
        rows[i] = bytes + (size_t)b * c->source.block_bytes + (size_t)(slots[i] % per) * c->source.row_bytes;
    }
    return QUARRY_OK;
}

/* The lock is held while blocks are read: who else wants rows of this part wants many of the same. */
static quarry_code find_locked(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const kv_derive *derive,
                               uint8_t *derived, const void **rows, arena *scratch, quarry_error *error)
{
    const size_t width = c->derived.width;
    const uint32_t start = (uint32_t)c->starts[segment], now = ++c->parts[part].now;
    int64_t n_missing = 0, n_found = 0;
    uint8_t *missing = arena_alloc(scratch, (size_t)n, 1, error), *made = arena_alloc(scratch, (size_t)n, 1, error);
    if (!missing || !made) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *known = cold_cache_get(&c->derived, part, start + (uint32_t)slots[i], now), *row = NULL;
        rows[i] = NULL;
        missing[i] = made[i] = 0;
        if (known) {
            memcpy(derived + (size_t)i * width, known, width);
            n_found++;
        } else if ((row = cold_cache_get(&c->rows, part, start + (uint32_t)slots[i], now))) {
            derive->make(derive->data, row, derived + (size_t)i * width);
            made[i] = 1;
        } else {
            missing[i] = 1;
            n_missing++;
        }
    }
    add(&c->n_derived, n);
    add(&c->n_derived_found, n_found);
    quarry_code code = n_missing ? read_missing(c, part, segment, slots, missing, n, rows, scratch, error) : QUARRY_OK;
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++) {
        if (missing[i]) derive->make(derive->data, rows[i], derived + (size_t)i * width);
        if (missing[i] || made[i]) cold_cache_put(&c->derived, part, start + (uint32_t)slots[i], now, derived + (size_t)i * width);
        if (missing[i] && c->rows.whole) cold_cache_put(&c->rows, part, start + (uint32_t)slots[i], now, rows[i]);
    }
    return code;
}

quarry_code kv_cold_find(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const kv_derive *derive, uint8_t *derived,
                         const void **rows, arena *scratch, quarry_error *error)
{
    if (n == 0) return QUARRY_OK;
    pthread_mutex_lock(&c->parts[part].lock);
    quarry_code code = find_locked(c, part, segment, slots, n, derive, derived, rows, scratch, error);
    pthread_mutex_unlock(&c->parts[part].lock);
    return code;
}

void kv_cold_expect(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void *const *rows, arena *scratch)
{
    const uint32_t start = (uint32_t)c->starts[segment];
    uint8_t *missing = arena_alloc(scratch, (size_t)n, 1, NULL);
    int64_t n_missing = 0, n_blocks;
    if (!missing || n == 0) return;
    pthread_mutex_lock(&c->parts[part].lock);
    for (int64_t i = 0; i < n; i++) {
        missing[i] = !rows[i] && !cold_cache_get(&c->rows, part, start + (uint32_t)slots[i], c->parts[part].now);
        n_missing += missing[i];
    }
    pthread_mutex_unlock(&c->parts[part].lock);
    const int64_t *blocks = n_missing ? blocks_of(c, slots, missing, n, &n_blocks, scratch, NULL) : NULL;
    if (blocks) c->source.expect(c->source.data, segment, part, blocks, n_blocks);
}

static quarry_code take_locked(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void **rows, arena *scratch,
                               quarry_error *error)
{
    const size_t row = c->source.row_bytes;
    const uint32_t start = (uint32_t)c->starts[segment], now = ++c->parts[part].now;
    uint8_t *missing = arena_alloc(scratch, (size_t)n, 1, error), *keep = arena_alloc(scratch, (size_t)n, 1, error);
    uint8_t *copies = arena_alloc(scratch, (size_t)n, row, error);
    int64_t n_missing = 0;
    if (!missing || !keep || !copies) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *known = rows[i] ? NULL : cold_cache_get(&c->rows, part, start + (uint32_t)slots[i], now);
        if (known) rows[i] = memcpy(copies + (size_t)i * row, known, row);
        missing[i] = !rows[i];
        keep[i] = !known;
        n_missing += missing[i];
    }
    add(&c->n_rows_asked, n);
    add(&c->n_rows_found, n - n_missing);
    quarry_code code = n_missing ? read_missing(c, part, segment, slots, missing, n, rows, scratch, error) : QUARRY_OK;
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++)
        if (keep[i]) cold_cache_put(&c->rows, part, start + (uint32_t)slots[i], now, rows[i]);
    return code;
}

quarry_code kv_cold_take(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void **rows, arena *scratch,
                         quarry_error *error)
{
    if (n == 0) return QUARRY_OK;
    pthread_mutex_lock(&c->parts[part].lock);
    quarry_code code = take_locked(c, part, segment, slots, n, rows, scratch, error);
    pthread_mutex_unlock(&c->parts[part].lock);
    return code;
}

quarry_code kv_cold_read(kv_cold *c, int part, int64_t segment, int64_t first, int64_t n, uint8_t *out, quarry_error *error)
{
    enum { AT_ONCE = 64 };
    int64_t blocks[AT_ONCE], n_blocks = (n + c->source.block_rows - 1) / c->source.block_rows;
    for (int64_t at = 0, m; at < n_blocks; at += m) {
        m = n_blocks - at < AT_ONCE ? n_blocks - at : AT_ONCE;
        for (int64_t i = 0; i < m; i++) blocks[i] = first / c->source.block_rows + at + i;
        quarry_code code = c->source.read(c->source.data, segment, part, blocks, m, out + (size_t)at * c->source.block_bytes, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}
