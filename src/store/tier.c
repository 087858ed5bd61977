#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <stdatomic.h>

#include "store/tier.h"

#include "store/piece_format.h"

typedef struct tier_segment {
    piece_file *piece;
    const piece_region *region;
    uint64_t *sums; /* [n_parts][n_blocks] */
} tier_segment;

struct tier {
    tier_segment *segments;
    int64_t n_segments;
    _Atomic int64_t damaged; /* segment, counted from 1; 0: none */
};

/* ---- the source ---- */

/* The blocks' ranges, neighbours in one. */
static int64_t ranges_make(const tier_segment *s, int part, const int64_t *blocks, int64_t n, uint8_t *out, file_range *ranges)
{
    const size_t bytes = (size_t)s->piece->layout.block_bytes;
    const uint64_t at = s->region->rows_at + (uint64_t)part * s->region->rows_bytes;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint64_t offset = at + (uint64_t)blocks[i] * bytes;
        if (m && ranges[m - 1].offset + ranges[m - 1].n == offset)
            ranges[m - 1].n += bytes;
        else
            ranges[m++] = (file_range){offset, bytes, out + (size_t)i * bytes};
    }
    return m;
}

static quarry_code read_blocks(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n, uint8_t *out, quarry_error *error)
{
    enum { AT_ONCE = 64 };
    tier *t = data;
    const tier_segment *s = &t->segments[segment];
    const size_t bytes = (size_t)s->piece->layout.block_bytes;
    const uint64_t *sums = s->sums + (int64_t)part * s->region->n_blocks;
    file_range ranges[AT_ONCE];
    for (int64_t first = 0, m; first < n; first += m, out += (size_t)m * bytes) {
        m = n - first < AT_ONCE ? n - first : AT_ONCE;
        const int64_t n_ranges = ranges_make(s, part, blocks + first, m, out, ranges);
        quarry_code code = file_map_read_many(s->piece->file, ranges, n_ranges, error);
        if (code != QUARRY_OK) return code;
        for (int64_t i = 0; i < m; i++)
            if (sums[blocks[first + i]] != XXH3_64bits(out + (size_t)i * bytes, bytes)) {
                atomic_store(&t->damaged, segment + 1);
                return piece_damaged(s->piece, "the checksum of a block of its keys and values is wrong", error);
            }
    }
    return QUARRY_OK;
}

static void drop_segments(tier *t, int64_t n)
{
    while (t->n_segments > n) {
        piece_close(t->segments[--t->n_segments].piece);
        memory_free(t->segments[t->n_segments].sums);
    }
}

static void expect_blocks(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n)
{
    const tier *t = data;
    const tier_segment *s = &t->segments[segment];
    const size_t bytes = (size_t)s->piece->layout.block_bytes;
    for (int64_t i = 0; i < n; i++)
        file_map_expect(s->piece->file, s->region->rows_at + (uint64_t)part * s->region->rows_bytes + (uint64_t)blocks[i] * bytes, bytes);
}

static void release(void *data)
{
    tier *t = data;
    drop_segments(t, 0);
    memory_free(t->segments);
    memory_free(t);
}

kv_cold *tier_open(const kv_shape *shape, size_t derived_bytes, tier **t, quarry_error *error)
{
    const size_t row = kv_row_bytes(shape->type, shape->head_dim);
    if (!(*t = memory_zero(1, sizeof **t, "cold rows", error))) return NULL;
    const kv_source source = {.data = *t,
                              .block_rows = piece_block_rows(row),
                              .block_bytes = (size_t)piece_block_rows(row) * row,
                              .row_bytes = row,
                              .read = read_blocks,
                              .expect = expect_blocks,
                              .release = release};
    return kv_cold_create(&source, shape->n_layer * shape->n_head_kv, derived_bytes, error);
}

tier *tier_of(const kv_cold *cold)
{
    return kv_cold_source(cold);
}

const piece_file *tier_damaged(const tier *t)
{
    const int64_t damaged = atomic_load(&t->damaged);
    return damaged ? t->segments[damaged - 1].piece : NULL;
}

/* ---- segments ---- */

static quarry_code add_segment(tier *t, piece_file *p, int64_t i, quarry_error *error)
{
    const piece_region *r = &p->layout.regions[i];
    uint64_t *sums = memory_zero((size_t)r->n_parts * (size_t)r->n_blocks, sizeof *sums, "checksums", error);
    if (!sums) return QUARRY_ERROR_MEMORY;
    t->segments[t->n_segments++] = (tier_segment){piece_hold(p), r, sums};
    return QUARRY_OK;
}

quarry_code tier_add(tier *t, kv_cold *cold, piece_file *p, quarry_error *error)
{
    const int64_t had = t->n_segments, n = p->header.n_segments;
    int64_t *lengths = memory_alloc((size_t)n, sizeof *lengths, "cold rows", error);
    quarry_code code =
        lengths ? memory_grow(&t->segments, (size_t)(had + n), sizeof *t->segments, "cold rows", error) : QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++) {
        lengths[i] = p->segments[i].n;
        code = add_segment(t, p, i, error);
    }
    if (code == QUARRY_OK) code = kv_cold_extend(cold, lengths, n, error);
    if (code != QUARRY_OK) drop_segments(t, had);
    memory_free(lengths);
    if (code == QUARRY_OK) file_map_scatter(p->file);
    return code;
}

void tier_take_sums(tier *t, int64_t segment, int part, const uint8_t *sums)
{
    const tier_segment *s = &t->segments[segment];
    for (int64_t b = 0; b < s->region->n_blocks; b++) s->sums[(int64_t)part * s->region->n_blocks + b] = get64(sums + 8 * b);
}

/* ---- from memory to the files ---- */

static quarry_code not_its_own(const piece_file *p, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_FORMAT, "%s: is not what was written: another process has replaced it", file_map_path(p->file));
}

/* Whether the record's order is the one in which the policy has the part. */
static bool same_order(const attn_policy *policy, int64_t segment, const piece_region *r, int part, const uint8_t *record)
{
    const int heads = policy->shape.kv.n_head_kv;
    const uint16_t *order = policy->type->saving->order(policy, segment, part / heads, part % heads);
    for (int64_t i = 0; i < r->n_rows; i++)
        if (get16(record + 2 * i) != (order ? order[i] : i)) return false;
    return true;
}

/* Checksums of the segments that are the policy's from `first` on. */
static quarry_code read_sums(tier *t, int64_t first, const piece_file *p, const attn_policy *policy, arena *scratch, quarry_error *error)
{
    for (int64_t i = 0; i < p->header.n_segments; i++) {
        const piece_region *r = &p->layout.regions[i];
        for (int part = 0; part < r->n_parts; part++) {
            uint8_t *record;
            arena_reset(scratch);
            const quarry_code code = piece_read_record(p, r, part, &record, scratch, error);
            if (code != QUARRY_OK) return code;
            if (!same_order(policy, first + i, r, part, record)) return not_its_own(p, error);
            tier_take_sums(t, first + i, part, record + r->extra);
        }
    }
    return QUARRY_OK;
}

/* Whether the piece ends where the cache does, with the segments that the policy has from `first` on. */
static bool same_segments(const piece_file *p, int64_t first, const kv_seq *kv, const attn_policy *policy)
{
    const attn_saving *saving = policy->type->saving;
    bool same = memcmp(&p->header.subject.kv, kv_shape_of(kv), sizeof(kv_shape)) == 0 && p->header.subject.end == kv_length(kv) &&
                first + p->header.n_segments == saving->n_segments(policy);
    for (int64_t i = 0; same && i < p->header.n_segments; i++) {
        const attn_saved_segment s = saving->segment(policy, first + i);
        same = s.first == p->segments[i].first && s.n == p->segments[i].n;
    }
    return same;
}

quarry_code piece_set_cold(piece_file *p, kv_seq *kv, attn_policy *policy, arena *scratch, quarry_error *error)
{
    const int64_t first = kv_cold_in(kv)->n_segments, n = p->header.n_segments;
    if (!same_segments(p, first, kv, policy)) return not_its_own(p, error);
    if (first + n == 0) return QUARRY_OK;
    tier *t;
    kv_cold *old = kv_cold_of(kv);
    kv_cold *cold = old ? kv_cold_hold(old) : tier_open(kv_shape_of(kv), policy->type->saving->derived_bytes(policy), &t, error);
    if (!cold) return QUARRY_ERROR_MEMORY;
    t = tier_of(cold);
    const kv_cold_span span = {ATTN_SINKS, p->header.segments_end, first + n, p->header.subject.end};
    assert(first == t->n_segments);
    quarry_code code = tier_add(t, cold, p, error);
    if (code == QUARRY_OK) code = read_sums(t, first, p, policy, scratch, error);
    if (code == QUARRY_OK) code = kv_set_cold(kv, cold, &span, error);
    if (code == QUARRY_OK) {
        policy->type->saving->set_cold(policy, first + n);
    } else {
        drop_segments(t, first);
        kv_cold_cut(cold, first);
    }
    kv_cold_release(cold);
    return code;
}
