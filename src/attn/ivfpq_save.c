/* Saving an index and loading it: what docs/context-format.md calls "ivfpq 2".
 *
 * What can be made again from the rows is not kept: the 4-bit keys (an eighth of the rows' size) and what the open segment holds. */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "attn/ivfpq.h"

static void describe(const attn_policy *policy, char *text, size_t size)
{
    const ivfpq_options *o = &((const ivfpq *)policy)->options;
    snprintf(text, size, "ivfpq 2 size=%g values=%g alpha=%g shrink=%g segment=%g outliers=%g", o->size, o->values, o->alpha, o->shrink,
             o->segment, o->outliers);
}

static int64_t n_segments(const attn_policy *policy)
{
    return ((const ivfpq *)policy)->n_sealed;
}

static int64_t n_open(const attn_policy *policy, int64_t n_far)
{
    const ivfpq *p = (const ivfpq *)policy;
    int64_t first = p->open_first;
    for (int64_t full; n_far - first >= (full = ivfpq_full_segment(p, first));) first += full;
    return n_far - first;
}

/* ---- a part ---- */

/* One array of a part, as it is and as it is kept: n numbers of `width` bytes, little-endian; those from `used` on are 0. */
typedef struct field {
    void *data;
    size_t n, used, width;
    bool is_float;
} field;

enum { MAX_FIELDS = 16, STATUS_BYTES = 8 };

/* What is kept of a part of n tokens, in the file's order, after its status. */
static int fields_of(const ivfpq *p, const ivfpq_segment *s, const ivfpq_part *part, field fields[MAX_FIELDS])
{
    const size_t d = (size_t)p->d, c = (size_t)ivfpq_cluster_count(p, s->n, true);
    const size_t outliers = (size_t)ivfpq_outliers(p, s->n), codes = vq_code_bytes(p->n_sub, s->n), k = (size_t)part->status->n_clusters;
    const field all[] = {
        {part->centre, d, d, 4, true},
        {part->book.centroids, d * SCAN_CODES, d * SCAN_CODES, 4, true},
        {part->forward_scale, d, d, 4, true},
        {part->query_scale, d, d, 4, true},
        {part->errors, (size_t)p->n_sub, (size_t)p->n_sub, 4, true},
        {part->outlier_scale, outliers, outliers, 4, true},
        {part->value_scale, c, k, 4, true},
        {part->begin, c + 1, k + 1, 4, false},
        {part->outliers, outliers, outliers, 2, false},
        {part->forward, d * d, d * d, 1, false},
        {part->query, d * d, d * d, 1, false},
        {part->values, c * d, k * d, 1, false},
        {part->outlier_keys, outliers * d / 2, outliers * d / 2, 1, false},
        {part->codes, codes, codes, 1, false},
    };
    memcpy(fields, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

static size_t part_bytes(const ivfpq *p, const ivfpq_segment *s)
{
    const ivfpq_part part = ivfpq_part_of(p, s, 0);
    field fields[MAX_FIELDS];
    size_t bytes = STATUS_BYTES;
    for (int i = 0, n = fields_of(p, s, &part, fields); i < n; i++) bytes += fields[i].n * fields[i].width;
    return bytes;
}

static attn_saved_segment segment(const attn_policy *policy, int64_t i)
{
    const ivfpq *p = (const ivfpq *)policy;
    return (attn_saved_segment){p->sealed[i]->first, p->sealed[i]->n, part_bytes(p, p->sealed[i])};
}

static void field_put(const field *f, uint8_t *out)
{
    if (f->width == 1) memcpy(out, f->data, f->used);
    for (size_t i = 0; f->width == 2 && i < f->used; i++) put16(out + 2 * i, ((const uint16_t *)f->data)[i]);
    for (size_t i = 0; f->width == 4 && i < f->used; i++) put32(out + 4 * i, ((const uint32_t *)f->data)[i]);
    memset(out + f->used * f->width, 0, (f->n - f->used) * f->width);
}

/* False if it holds a number that is none. */
static bool field_get(const field *f, const uint8_t *in)
{
    if (f->width == 1) memcpy(f->data, in, f->n);
    for (size_t i = 0; f->width == 2 && i < f->n; i++) ((uint16_t *)f->data)[i] = get16(in + 2 * i);
    for (size_t i = 0; f->width == 4 && i < f->n; i++) ((uint32_t *)f->data)[i] = get32(in + 4 * i);
    for (size_t i = 0; f->is_float && i < f->n; i++)
        if (!isfinite(((const float *)f->data)[i])) return false;
    return true;
}

static ivfpq_part part_at(const ivfpq *p, int64_t i, int layer, int head)
{
    return ivfpq_part_of(p, p->sealed[i], layer * p->base.shape.kv.n_head_kv + head);
}

static void save_part(const attn_policy *policy, int64_t i, int layer, int head, uint8_t *out)
{
    const ivfpq *p = (const ivfpq *)policy;
    const ivfpq_part part = part_at(p, i, layer, head);
    field fields[MAX_FIELDS];
    put32(out, part.status->coded);
    put32(out + 4, part.status->coded ? (uint32_t)part.status->n_clusters : 0);
    if (!part.status->coded) {
        memset(out + STATUS_BYTES, 0, part_bytes(p, p->sealed[i]) - STATUS_BYTES);
        return;
    }
    out += STATUS_BYTES;
    for (int f = 0, n = fields_of(p, p->sealed[i], &part, fields); f < n; f++) {
        field_put(&fields[f], out);
        out += fields[f].n * fields[f].width;
    }
}

/* Clusters follow each other and hold all tokens; outliers are slots. */
static bool part_is_sound(const ivfpq *p, const ivfpq_part *part, int64_t n)
{
    const int32_t k = part->status->n_clusters;
    if (part->begin[0] != 0 || part->begin[k] != (uint32_t)n) return false;
    for (int32_t c = 0; c < k; c++) {
        if (part->begin[c + 1] < part->begin[c] || part->begin[c + 1] > (uint32_t)n) return false;
        for (uint32_t slot = part->begin[c]; slot < part->begin[c + 1]; slot++) part->cluster[slot] = (uint16_t)c;
    }
    for (int64_t i = 0; i < ivfpq_outliers(p, n); i++)
        if (part->outliers[i] >= n || (i > 0 && part->outliers[i] <= part->outliers[i - 1])) return false;
    return true;
}

static const uint16_t *order_of(const attn_policy *policy, int64_t i, int layer, int head)
{
    const ivfpq_part part = part_at((const ivfpq *)policy, i, layer, head);
    return part.status->coded ? part.order : NULL;
}

static quarry_code load_part(attn_policy *policy, int64_t i, int layer, int head, const uint16_t *order, const uint8_t *bytes)
{
    ivfpq *p = (ivfpq *)policy;
    const ivfpq_segment *s = p->sealed[i];
    const ivfpq_part part = part_at(p, i, layer, head);
    const uint32_t coded = get32(bytes), n_clusters = get32(bytes + 4);
    field fields[MAX_FIELDS];
    *part.status = (ivfpq_status){0};
    if (!coded) return QUARRY_OK; /* it is read in full */
    if (n_clusters < 1 || n_clusters > (uint32_t)ivfpq_cluster_count(p, s->n, true)) return QUARRY_ERROR_FORMAT;
    bytes += STATUS_BYTES;
    for (int f = 0, n = fields_of(p, s, &part, fields); f < n; f++) {
        if (!field_get(&fields[f], bytes)) return QUARRY_ERROR_FORMAT;
        bytes += fields[f].n * fields[f].width;
    }
    part.status->n_clusters = (int32_t)n_clusters;
    if (!part_is_sound(p, &part, s->n)) return QUARRY_ERROR_FORMAT;
    memcpy(part.order, order, (size_t)s->n * sizeof *order);
    part.status->coded = true;
    return QUARRY_OK;
}

/* ---- the rest ---- */

static size_t triangle(const ivfpq *p)
{
    return (size_t)p->n_parts * (size_t)p->d * (size_t)(p->d + 1) / 2;
}

/* Whether a batch brought queries that no segment knows yet. */
static bool has_ahead(const ivfpq *p)
{
    for (int i = 0; i < p->n_parts; i++)
        if (p->n_ahead[i]) return true;
    return false;
}

static size_t state_bytes(const attn_policy *policy)
{
    const ivfpq *p = (const ivfpq *)policy;
    const size_t one = triangle(p) * 4 + (size_t)p->n_parts * 8;
    return 16 + (has_ahead(p) ? 2 : 1) * one;
}

/* The lower triangles of symmetric matrices [n_parts][d][d], and their counts. */
static uint8_t *moments_put(const ivfpq *p, const float *sum, const int64_t *count, uint8_t *out)
{
    for (int part = 0; part < p->n_parts; part++, sum += p->d * p->d)
        for (int i = 0; i < p->d; i++)
            for (int j = 0; j <= i; j++, out += 4) put_float(out, sum[i * p->d + j]);
    for (int part = 0; part < p->n_parts; part++, out += 8) put64(out, (uint64_t)count[part]);
    return out;
}

static const uint8_t *moments_get(const ivfpq *p, float *sum, int64_t *count, const uint8_t *in, bool *sound)
{
    for (int part = 0; part < p->n_parts; part++, sum += p->d * p->d)
        for (int i = 0; i < p->d; i++)
            for (int j = 0; j <= i; j++, in += 4) {
                sum[i * p->d + j] = sum[j * p->d + i] = get_float(in);
                *sound = *sound && isfinite(sum[i * p->d + j]);
            }
    for (int part = 0; part < p->n_parts; part++, in += 8) {
        count[part] = (int64_t)get64(in);
        *sound = *sound && count[part] >= 0;
    }
    return in;
}

static void save_state(const attn_policy *policy, uint8_t *out)
{
    const ivfpq *p = (const ivfpq *)policy;
    put64(out, (uint64_t)p->base.n_far);
    put64(out + 8, has_ahead(p));
    out = moments_put(p, p->moments, p->n_queries, out + 16);
    if (has_ahead(p)) moments_put(p, p->ahead, p->n_ahead, out);
}

static quarry_code load_segment(attn_policy *policy, int64_t n, size_t bytes, bool cold, quarry_error *error)
{
    ivfpq *p = (ivfpq *)policy;
    quarry_code code = n <= IVFPQ_LARGEST ? ivfpq_push_loaded(p, n, cold, error) : QUARRY_ERROR_FORMAT;
    return code == QUARRY_OK && part_bytes(p, p->sealed[p->n_sealed - 1]) != bytes ? QUARRY_ERROR_FORMAT : code;
}

static quarry_code load_state(attn_policy *policy, const uint8_t *bytes, size_t n_bytes, int64_t length, quarry_error *error)
{
    ivfpq *p = (ivfpq *)policy;
    if (n_bytes < 16) return QUARRY_ERROR_FORMAT;
    const uint64_t n_far = get64(bytes), ahead = get64(bytes + 8), first = (uint64_t)p->open_first;
    const size_t one = triangle(p) * 4 + (size_t)p->n_parts * 8;
    const int64_t full = ivfpq_full_segment(p, p->open_first);
    if (ahead > 1 || n_bytes != 16 + (1 + (size_t)ahead) * one || n_far < first || n_far - first >= (uint64_t)full ||
        (n_far > ATTN_SINKS && n_far + ATTN_WINDOW > (uint64_t)length))
        return QUARRY_ERROR_FORMAT;
    bool sound = true;
    bytes = moments_get(p, p->moments, p->n_queries, bytes + 16, &sound);
    if (ahead) moments_get(p, p->ahead, p->n_ahead, bytes, &sound);
    if (!sound) return QUARRY_ERROR_FORMAT;
    p->base.n_far = (int64_t)n_far;
    p->n_open = p->base.n_far - p->open_first;
    return ivfpq_grow_open(p, full, error);
}

/* Segments that a fork has too keep their keys, and are searched as before. */
static void set_cold(attn_policy *policy, int64_t n)
{
    ivfpq *p = (ivfpq *)policy;
    for (int64_t i = 0; i < n; i++) {
        ivfpq_segment *s = p->sealed[i];
        if (!s->keys || atomic_load(&s->n_refs) > 1) continue;
        memory_free(s->keys);
        s->keys = NULL;
        s->key_bytes = 0;
    }
}

const attn_saving ivfpq_saving = {
    .describe = describe,
    .n_segments = n_segments,
    .segment = segment,
    .n_open = n_open,
    .order = order_of,
    .save_part = save_part,
    .state_bytes = state_bytes,
    .save_state = save_state,
    .load_segment = load_segment,
    .load_part = load_part,
    .load_state = load_state,
    .load_rows = ivfpq_load_rows,
    .load_commit = ivfpq_load_commit,
    .derived_bytes = ivfpq_derived_bytes,
    .set_cold = set_cold,
};
