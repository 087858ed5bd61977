/* Cold rows: those of sealed segments that lie in files (store/tier.h), and come to memory as they are asked for.
 *
 * A row is known by its part (layer * n_head_kv + head), its segment, and its slot there: its place in the file. A search asks twice: for what is derived from many rows (their 4-bit keys, an
 * eighth of their size), and then for the few rows that it selects. Each has a cache of its own (kv/cold_cache.h): decode steps look mostly at what
 * one of the last few looked at (docs/tiers.md). */
#ifndef KV_COLD_H
#define KV_COLD_H

#include "base/base.h"

/* Where the rows lie. All of its functions may be called at the same time. */
typedef struct kv_source {
    void *data;
    int64_t block_rows; /* rows of a block, which is what can be read, and checked, by itself */
    size_t block_bytes, row_bytes;
    /* Reads blocks[n], ascending, of a part of a segment to out[n][block_bytes]. Errors: IO; FORMAT: damaged. */
    quarry_code (*read)(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n, uint8_t *out, quarry_error *error);
    /* They will be read soon. */
    void (*expect)(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n);
    void (*release)(void *data);
} kv_source;

typedef struct kv_cold kv_cold;

/* Takes the source over, also on failure. derived_bytes: of what is derived from a row (kv_derive). */
kv_cold *kv_cold_create(const kv_source *source, int n_parts, size_t derived_bytes, quarry_error *error);
kv_cold *kv_cold_hold(kv_cold *c); /* one more owner; forks share the caches */
void kv_cold_release(kv_cold *c);  /* NULL allowed */

/* Segments of lengths[n] tokens more, behind those there are, which the source has. The caches keep nothing of them for certain before they are set anew. Not while rows are
 * fetched. On error nothing changed. */
quarry_code kv_cold_extend(kv_cold *c, const int64_t *lengths, int64_t n, quarry_error *error);
/* Takes back those behind the first n_segments, of which no row was fetched yet. */
void kv_cold_cut(kv_cold *c, int64_t n_segments);
void *kv_cold_source(const kv_cold *c);                    /* its data */
int64_t kv_cold_length(const kv_cold *c, int64_t segment); /* tokens */

/* Empties the caches and lets them take so many bytes for rows, and for what is derived, or, SIZE_MAX, keep everything; what is derived stays where that is as before. Not while rows are fetched. On error they are empty and take nothing. */
quarry_code kv_cold_set_cache(kv_cold *c, size_t row_bytes, size_t derived_bytes, quarry_error *error);
/* What they take now. */
size_t kv_cold_row_bytes(const kv_cold *c);
size_t kv_cold_derived_bytes(const kv_cold *c);
/* The same, and what of it is in RAM; NULL: not wanted. */
void kv_cold_tally(const kv_cold *c, memory_tally *rows, memory_tally *derived);
/* Since it was made: blocks read; rows, and what is derived of such, asked for and found in memory. */
typedef struct kv_cold_counts {
    int64_t n_blocks, n_rows, n_rows_found, n_derived, n_derived_found;
} kv_cold_counts;
kv_cold_counts kv_cold_count(const kv_cold *c);

/* Makes derived[derived_bytes] of a row. */
typedef struct kv_derive {
    void (*make)(const void *data, const void *row, uint8_t *derived);
    const void *data;
} kv_derive;

/* (parallel) What is derived from the rows at slots[n], ascending, of a segment, to derived[n][derived_bytes]. rows[i] becomes the row, in scratch, if it had to be read, else NULL.
 * Errors: MEMORY, IO, FORMAT. */
quarry_code kv_cold_find(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const kv_derive *derive, uint8_t *derived,
                         const void **rows, arena *scratch, quarry_error *error);
/* (parallel) Those of the rows at slots[n], ascending, that are NULL in rows and not in memory will be taken soon: the source is told. */
void kv_cold_expect(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void *const *rows, arena *scratch);
/* (parallel) Those of rows[n] that are NULL become the rows at slots[n], ascending, in scratch. All of them are kept. */
quarry_code kv_cold_take(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void **rows, arena *scratch,
                         quarry_error *error);
/* (parallel) Rows [first, first + n) of slots, to out, which has room for whole blocks: for those who read everything. first is a multiple of block_rows. Past the caches. */
quarry_code kv_cold_read(kv_cold *c, int part, int64_t segment, int64_t first, int64_t n, uint8_t *out, quarry_error *error);
int64_t kv_cold_block_rows(const kv_cold *c);
size_t kv_cold_block_bytes(const kv_cold *c);

#endif
