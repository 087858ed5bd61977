/* Building the index: segments, their parts, and the open one. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "attn/ivfpq.h"

enum { CLUSTER_ITERATIONS = 5, CODE_ITERATIONS = 6 };

/* ---- memory ---- */

static size_t take(size_t *at, size_t bytes)
{
    size_t here = *at;
    *at = (here + bytes + 63) / 64 * 64;
    return here;
}

static ivfpq_layout layout_make(const ivfpq *p, int64_t n, int64_t n_clusters, bool sealed)
{
    ivfpq_layout l;
    size_t at = 0, d = (size_t)p->d, c = (size_t)n_clusters, f = sizeof(float);
    l.centre = take(&at, sealed ? d * f : 0);
    l.centroids = take(&at, sealed ? d * SCAN_CODES * f : 0);
    l.forward = take(&at, sealed ? d * d : 0);
    l.forward_scale = take(&at, sealed ? d * f : 0);
    l.query = take(&at, sealed ? d * d : 0);
    l.query_scale = take(&at, sealed ? d * f : 0);
    l.begin = take(&at, (c + 1) * sizeof(uint32_t));
    l.value_scale = take(&at, c * f);
    l.values = take(&at, c * d);
    l.order = take(&at, (size_t)n * sizeof(uint16_t));
    l.cluster = take(&at, (size_t)n * sizeof(uint16_t));
    l.codes = take(&at, vq_code_bytes(p->n_sub, n));
    const size_t outliers = sealed ? (size_t)ivfpq_outliers(p, n) : 0;
    l.errors = take(&at, sealed ? (size_t)p->n_sub * f : 0);
    l.outliers = take(&at, outliers * sizeof(uint16_t));
    l.outlier_scale = take(&at, outliers * f);
    l.outlier_keys = take(&at, outliers * (d / 2));
    l.total = at;
    at = 0;
    take(&at, (size_t)n * (d / 2));
    l.key_scale = take(&at, (size_t)n * f);
    l.keys_total = at;
    return l;
}

int64_t ivfpq_cluster_count(const ivfpq *p, int64_t n, bool sealed)
{
    int64_t size = sealed ? (int64_t)p->options.size : IVFPQ_RUN;
    return (n + size - 1) / size;
}

ivfpq_segment *ivfpq_segment_create(const ivfpq *p, int64_t n, bool sealed, bool cold, quarry_error *error)
{
    ivfpq_segment *s = memory_zero(1, sizeof *s, "key index", error);
    if (!s) return NULL;
    atomic_init(&s->n_refs, 1);
    s->n = n;
    s->layout = layout_make(p, n, ivfpq_cluster_count(p, n, sealed), sealed);
    s->bytes = s->layout.total * (size_t)p->n_parts;
    s->status = memory_zero((size_t)p->n_parts, sizeof *s->status, "key index", error);
    s->memory = s->status ? memory_aligned((size_t)p->n_parts, s->layout.total, "key index", error) : NULL;
    if (s->memory && !cold) {
        s->key_bytes = s->layout.keys_total * (size_t)p->n_parts;
        s->keys = memory_aligned((size_t)p->n_parts, s->layout.keys_total, "key index", error);
    }
    if (s->memory && (s->keys || cold)) return s;
    ivfpq_segment_release(s);
    return NULL;
}

void ivfpq_segment_release(ivfpq_segment *s)
{
    if (!s || atomic_fetch_sub(&s->n_refs, 1) != 1) return;
    memory_free(s->memory);
    memory_free(s->keys);
    memory_free(s->status);
    memory_free(s);
}

ivfpq_part ivfpq_part_of(const ivfpq *p, const ivfpq_segment *s, int part)
{
    const ivfpq_layout *l = &s->layout;
    unsigned char *m = s->memory + (size_t)part * l->total, *keys = s->keys ? s->keys + (size_t)part * l->keys_total : NULL;
    return (ivfpq_part){
        .status = &s->status[part],
        .centre = (float *)(m + l->centre),
        .book = {p->d, p->n_sub, (float *)(m + l->centroids)},
        .forward = (int8_t *)(m + l->forward),
        .query = (int8_t *)(m + l->query),
        .forward_scale = (float *)(m + l->forward_scale),
        .query_scale = (float *)(m + l->query_scale),
        .begin = (uint32_t *)(m + l->begin),
        .value_scale = (float *)(m + l->value_scale),
        .values = (int8_t *)(m + l->values),
        .order = (uint16_t *)(m + l->order),
        .cluster = (uint16_t *)(m + l->cluster),
        .codes = m + l->codes,
        .errors = (float *)(m + l->errors),
        .outliers = (uint16_t *)(m + l->outliers),
        .outlier_scale = (float *)(m + l->outlier_scale),
        .outlier_keys = m + l->outlier_keys,
        .key_scale = keys ? (float *)(keys + l->key_scale) : NULL,
        .keys = keys,
    };
}

void ivfpq_drop_pending(ivfpq *p)
{
    for (; p->n_pending > 0; p->n_pending--) ivfpq_segment_release(p->sealed[p->n_sealed + p->n_pending - 1]);
}

/* One more segment of n tokens at the end of the pending ones. */
static quarry_code push_pending(ivfpq *p, int64_t first, int64_t n, bool cold, quarry_error *error)
{
    int64_t index = p->n_sealed + p->n_pending;
    if (index == p->capacity) {
        int64_t capacity = p->capacity * 2 + 8;
        quarry_code code = memory_grow(&p->sealed, (size_t)capacity, sizeof *p->sealed, "key index", error);
        if (code != QUARRY_OK) return code;
        p->capacity = capacity;
    }
    ivfpq_segment *s = ivfpq_segment_create(p, n, true, cold, error);
    if (!s) return QUARRY_ERROR_MEMORY;
    s->first = first;
    p->sealed[index] = s;
    p->n_pending++;
    return QUARRY_OK;
}

/* ---- one part ---- */

/* The work of one (layer, KV head); its scratch serves one segment after the other. */
typedef struct builder {
    const ivfpq *p;
    const math_kernels *kernels;
    const kv_seq *kv;
    int layer, head, part;
    int64_t capacity;       /* tokens */
    float *x, *y;           /* [capacity][d]: centred keys; [capacity][2 d]: their coordinates in the basis, later with the values */
    float *columns;         /* [2 d][vq_column_stride(capacity)]: y */
    float *values;          /* [capacity] */
    float *sums;            /* [clusters][d]: of values */
    float *row;             /* [d] */
    float *basis;           /* [4][d][d] */
    int32_t *assign;        /* [n_sub][capacity] */
    int32_t *clusters;      /* [capacity] */
    int32_t *counts, *free; /* [clusters]: tokens; the next free slot */
    arena *scratch;
} builder;

static bool builder_init(builder *b, ivfpq *p, const kv_seq *kv, int layer, int head, int64_t n, arena *scratch)
{
    size_t d = (size_t)p->d, tokens = (size_t)n, k = (size_t)(n / ivfpq_min64(IVFPQ_RUN, (int64_t)p->options.size) + 2);
    *b = (builder){.p = p, .kernels = p->base.kernels, .kv = kv, .layer = layer, .head = head, .capacity = n, .scratch = scratch};
    b->part = layer * p->base.shape.kv.n_head_kv + head;
    b->x = arena_alloc(scratch, tokens * d, sizeof(float), NULL);
    b->y = arena_alloc(scratch, tokens * 2 * d, sizeof(float), NULL);
    b->columns = arena_alloc(scratch, 2 * d * (size_t)vq_column_stride(n), sizeof(float), NULL);
    b->values = arena_alloc(scratch, tokens, sizeof(float), NULL);
    b->basis = arena_alloc(scratch, 4 * d * d, sizeof(float), NULL);
    b->sums = arena_alloc(scratch, k * d, sizeof(float), NULL);
    b->row = arena_alloc(scratch, d, sizeof(float), NULL);
    b->assign = arena_alloc(scratch, tokens * (size_t)p->n_sub, sizeof(int32_t), NULL);
    b->clusters = arena_alloc(scratch, tokens, sizeof(int32_t), NULL);
    b->counts = arena_alloc(scratch, k, sizeof(int32_t), NULL);
    b->free = arena_alloc(scratch, k, sizeof(int32_t), NULL);
    return b->x && b->y && b->columns && b->values && b->basis && b->sums && b->row && b->assign && b->clusters && b->counts && b->free;
}

static const void *row_of(const builder *b, int64_t pos)
{
    return kv_row(b->kv, b->layer, b->head, pos);
}

static void read_keys(builder *b, int64_t first, int64_t n)
{
    for (int64_t t = 0; t < n; t++) kv_read_key(b->kernels, row_of(b, first + t), &b->p->base.shape.kv, b->x + t * b->p->d);
}

static void subtract(builder *b, int64_t n, const float *centre)
{
    int d = b->p->d;
    for (int64_t t = 0; t < n; t++)
        for (int i = 0; i < d; i++) b->x[t * d + i] -= centre[i];
}

/* Rows of b->y = x times the forward matrix (by input dimension), and their columns. */
static void transform(builder *b, const float *forward, int64_t n)
{
    int64_t d = b->p->d;
    b->kernels->retrieval->product(b->x, d, 1, forward, d, b->y, d, n, d, d, false);
    vq_transpose(b->y, d, n, b->p->d, b->columns, vq_column_stride(n));
}

/* Puts the tokens from position `first` on, which clusters[n] assigns to 0 … k - 1, into the slots from `slot` on in the order of their
 * clusters, whose numbers begin at `at`; empty ones take none. Returns how many clusters. */
static int32_t fill_clusters(builder *b, const ivfpq_part *part, int64_t first, int64_t n, int32_t k, int32_t at, int64_t slot)
{
    int d = b->p->d;
    const kv_shape *shape = &b->p->base.shape.kv;
    memset(b->sums, 0, (size_t)k * (size_t)d * sizeof *b->sums);
    memset(b->counts, 0, (size_t)k * sizeof *b->counts);
    for (int64_t t = 0; t < n; t++) {
        float *sum = b->sums + (size_t)b->clusters[t] * (size_t)d;
        b->counts[b->clusters[t]]++;
        kv_read_value(b->kernels, row_of(b, first + t), shape, b->row);
        for (int i = 0; i < d; i++) sum[i] += b->row[i];
    }
    int32_t used = 0;
    uint32_t next = (uint32_t)slot;
    for (int32_t c = 0; c < k; c++) {
        if (!b->counts[c]) continue;
        size_t to = (size_t)(at + used++);
        part->begin[to] = next;
        part->value_scale[to] = vq_quantise_i8(b->sums + (size_t)c * (size_t)d, d, part->values + to * (size_t)d);
        b->free[c] = (int32_t)next;
        for (uint32_t end = next + (uint32_t)b->counts[c]; next < end; next++) part->cluster[next] = (uint16_t)to;
    }
    part->begin[at + used] = next;
    for (int64_t t = 0; t < n; t++) part->order[b->free[b->clusters[t]]++] = (uint16_t)(slot + t);
    return used;
}

/* Codes and 4-bit keys of the n slots from `slot` on; b->x and b->assign have theirs from the token of the same number on. */
static void fill_slots(builder *b, const ivfpq_part *part, int64_t slot, int64_t n)
{
    const ivfpq *p = b->p;
    int64_t d = p->d;
    for (int64_t t = 0; t < n; t++) {
        const int64_t token = part->order[slot + t] - slot;
        part->key_scale[slot + t] = vq_quantise_i4(b->x + token * d, p->d, part->keys + (slot + t) * (d / 2));
    }
    for (int j = 0; j < p->n_sub; j++) {
        int32_t *codes = b->assign + (int64_t)j * n;
        for (int64_t t = 0; t < n; t++) b->clusters[t] = codes[part->order[slot + t] - slot];
        memcpy(codes, b->clusters, (size_t)n * sizeof *codes);
    }
    vq_pack(p->n_sub, b->assign, n, slot, part->codes);
}

/* m[d][d] by input dimension -> int8 rows by output dimension. */
static void quantise_matrix(const float *m, int d, float *row, int8_t *out, float *scale)
{
    for (int j = 0; j < d; j++) {
        for (int i = 0; i < d; i++) row[i] = m[(size_t)i * (size_t)d + (size_t)j];
        scale[j] = vq_quantise_i8(row, d, out + (size_t)j * (size_t)d);
    }
}

/* The way back. */
static void expand_matrix(const int8_t *from, const float *scale, int d, float *m)
{
    for (int j = 0; j < d; j++)
        for (int i = 0; i < d; i++) m[(size_t)i * (size_t)d + (size_t)j] = scale[j] * from[(size_t)j * (size_t)d + (size_t)i];
}

/* Learns the basis from the centred keys and the queries seen so far; b->basis[0] becomes the forward matrix as it is kept. */
static quarry_code learn_basis(builder *b, int64_t index, const ivfpq_part *part, int64_t n)
{
    const ivfpq *p = b->p;
    size_t cells = (size_t)p->d * (size_t)p->d;
    vq_moments h = {p->d, p->n_queries[b->part], p->moments + (size_t)b->part * cells};
    if (index > p->n_sealed) { /* a second segment in one step: its queries are among those ahead */
        float *sum = b->basis; /* free until the basis is made */
        for (size_t i = 0; i < cells; i++) sum[i] = h.sum[i] + p->ahead[(size_t)b->part * cells + i];
        h = (vq_moments){p->d, h.n + p->n_ahead[b->part], sum};
    }
    vq_metric metric = {p->d, b->basis + 2 * cells, b->basis + 3 * cells};
    vq_basis basis = {p->d, b->basis, b->basis + cells};
    quarry_code code = vq_metric_make(&metric, &h, (float)p->options.alpha, (float)p->options.shrink, b->scratch, NULL);
    if (code == QUARRY_OK) code = vq_basis_make(&basis, b->kernels, &metric, b->x, n, p->n_sub, b->scratch, NULL);
    if (code != QUARRY_OK) return code;
    quantise_matrix(basis.forward, p->d, b->row, part->forward, part->forward_scale);
    quantise_matrix(basis.query, p->d, b->row, part->query, part->query_scale);
    expand_matrix(part->forward, part->forward_scale, p->d, b->basis);
    return QUARRY_OK;
}

/* Points of 2 d dimensions, in both orders in place of what b->y and b->columns held: the keys' coordinates and the values, each scaled so that
 * their variances have the stated share. */
static vq_points join_values(builder *b, int64_t first, int64_t n)
{
    int64_t d = b->p->d, stride = vq_column_stride(n);
    double of_keys = 0, of_values = 0;
    memset(b->row, 0, (size_t)d * sizeof *b->row);
    for (int64_t t = n - 1; t >= 0; t--) { /* from the last on, for the rows are spread out in place */
        float *key = b->y + t * 2 * d, *value = key + d;
        memmove(key, b->y + t * d, (size_t)d * sizeof *key);
        kv_read_value(b->kernels, row_of(b, first + t), &b->p->base.shape.kv, value);
        for (int64_t i = 0; i < d; i++) b->row[i] += value[i] / (float)n;
    }
    for (int64_t t = 0; t < n; t++) {
        float *key = b->y + t * 2 * d, *value = key + d;
        float squares[2] = {0, 0};
        for (int64_t i = 0; i < d; i++) {
            value[i] -= b->row[i];
            squares[0] += key[i] * key[i];
            squares[1] += value[i] * value[i];
        }
        of_keys += (double)squares[0];
        of_values += (double)squares[1];
    }
    const float share = (float)b->p->options.values;
    const float by_key = of_keys > 0 ? sqrtf((1 - share) * (float)((double)(n * d) / of_keys)) : 0;
    const float by_value = of_values > 0 ? sqrtf(share * (float)((double)(n * d) / of_values)) : 0;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < d; i++) {
            b->y[t * 2 * d + i] *= by_key;
            b->y[t * 2 * d + d + i] *= by_value;
        }
    vq_transpose(b->y, 2 * d, n, (int)(2 * d), b->columns, stride);
    return (vq_points){b->y, b->columns, n, 2 * d, stride, (int)(2 * d)};
}

static int by_error(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* The tokens whose codes are farthest from their keys, in the metric, as tokens; false without memory. */
static bool find_outliers(builder *b, const ivfpq_part *part, int64_t n)
{
    const int d = b->p->d, n_sub = b->p->n_sub, d_sub = d / n_sub;
    const int64_t k = ivfpq_outliers(b->p, n);
    float *sorted = arena_alloc(b->scratch, (size_t)n, sizeof *sorted, NULL);
    if (!sorted) return false;
    memset(part->errors, 0, (size_t)n_sub * sizeof *part->errors);
    for (int64_t t = 0; t < n; t++) {
        float sum = 0;
        for (int s = 0; s < n_sub; s++) {
            float square = 0;
            for (int j = 0; j < d_sub; j++) {
                const float x = b->y[t * d + s * d_sub + j] - part->book.centroids[(s * d_sub + j) * SCAN_CODES + b->assign[s * n + t]];
                square += x * x;
            }
            part->errors[s] += square / (float)(n * d_sub);
            sum += square;
        }
        b->values[t] = sorted[t] = sum;
    }
    qsort(sorted, (size_t)n, sizeof *sorted, by_error);
    int64_t found = 0;
    for (int64_t t = 0; t < n && found < k; t++)
        if (b->values[t] >= sorted[k - 1]) part->outliers[found++] = (uint16_t)t;
    for (int64_t t = 0; t < n && found < k; t++) /* what is no number is in no order */
        if (!(b->values[t] >= sorted[k - 1])) part->outliers[found++] = (uint16_t)t;
    return true;
}

/* Their slots, in order, and their keys. */
static void place_outliers(builder *b, const ivfpq_part *part, int64_t n)
{
    const size_t half = (size_t)b->p->d / 2;
    const int64_t n_outliers = ivfpq_outliers(b->p, n);
    memset(b->clusters, 0, (size_t)n * sizeof *b->clusters);
    for (int64_t i = 0; i < n_outliers; i++) b->clusters[part->outliers[i]] = 1;
    for (int64_t slot = 0, i = 0; slot < n; slot++) {
        if (!b->clusters[part->order[slot]]) continue;
        part->outliers[i] = (uint16_t)slot;
        part->outlier_scale[i] = part->key_scale[slot];
        memcpy(part->outlier_keys + (size_t)i++ * half, part->keys + (size_t)slot * half, half);
    }
}

/* Trains and fills the part of segment `index`. Without memory for it the part stays uncoded: all of its tokens are read. */
static void build_part(builder *b, int64_t index)
{
    const ivfpq *p = b->p;
    const ivfpq_segment *s = p->sealed[index];
    ivfpq_part part = ivfpq_part_of(p, s, b->part);
    int64_t d = p->d, n = s->n, k = ivfpq_cluster_count(p, n, true);
    part.status->coded = false;
    read_keys(b, s->first, n);
    memset(part.centre, 0, (size_t)d * sizeof *part.centre);
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < d; i++) part.centre[i] += b->x[t * d + i];
    for (int64_t i = 0; i < d; i++) part.centre[i] /= (float)n;
    subtract(b, n, part.centre);
    if (learn_basis(b, index, &part, n) != QUARRY_OK) return;
    transform(b, b->basis, n);
    vq_points points = {b->y, b->columns, n, d, vq_column_stride(n), p->d};
    uint64_t seed = (uint64_t)(s->first * p->n_parts + b->part);
    if (vq_codebook_train(&part.book, b->kernels, &points, CODE_ITERATIONS, seed, b->assign, b->scratch, NULL) != QUARRY_OK) return;
    int32_t n_clusters;
    if (!find_outliers(b, &part, n)) return;
    points = join_values(b, s->first, n);
    if (vq_cluster(b->kernels, &points, (int)k, CLUSTER_ITERATIONS, seed, b->clusters, &n_clusters, b->scratch, NULL) != QUARRY_OK) return;
    part.status->n_clusters = fill_clusters(b, &part, s->first, n, n_clusters, 0, 0);
    memset(part.codes, 0, vq_code_bytes(p->n_sub, n));
    fill_slots(b, &part, 0, n);
    place_outliers(b, &part, n);
    part.status->coded = true;
}

/* Codes and runs of tokens [from, end) of the open segment that begins at `first`, with the tables of segment `index`; from is rounded
 * down to a whole run. */
static void code_open(builder *b, int64_t index, int64_t first, int64_t from, int64_t end)
{
    const ivfpq *p = b->p;
    ivfpq_part part = ivfpq_part_of(p, p->open, b->part), tables = ivfpq_part_of(p, p->sealed[index], b->part);
    part.status->coded = tables.status->coded;
    part.status->n_clusters = 0;
    if (!part.status->coded) return;
    from = from / IVFPQ_RUN * IVFPQ_RUN;
    int64_t n = end - from;
    int32_t before = (int32_t)(from / IVFPQ_RUN);
    read_keys(b, first + from, n);
    subtract(b, n, tables.centre);
    expand_matrix(tables.forward, tables.forward_scale, p->d, b->basis);
    transform(b, b->basis, n);
    vq_encode(&tables.book, b->kernels, b->columns, vq_column_stride(n), n, b->assign, b->values);
    for (int64_t t = 0; t < n; t++) b->clusters[t] = (int32_t)(t / IVFPQ_RUN);
    int32_t runs = (int32_t)((n + IVFPQ_RUN - 1) / IVFPQ_RUN);
    part.status->n_clusters = before + fill_clusters(b, &part, first + from, n, runs, before, from);
    fill_slots(b, &part, from, n);
}

/* ---- a step ---- */

int64_t ivfpq_full_segment(const ivfpq *p, int64_t first)
{
    int64_t n = p->segment, past = first - ATTN_SINKS;
    while (2 * n <= past && 2 * n <= IVFPQ_GROWTH * p->segment && 2 * n <= IVFPQ_LARGEST) n *= 2;
    return n;
}

static int64_t pending_tokens(const ivfpq *p)
{
    int64_t n = 0;
    for (int64_t i = 0; i < p->n_pending; i++) n += p->sealed[p->n_sealed + i]->n;
    return n;
}

/* A larger open segment once those before it are sealed: nothing of the old one is needed then. */
quarry_code ivfpq_grow_open(ivfpq *p, int64_t n, quarry_error *error)
{
    if (p->open && p->open->n >= n) return QUARRY_OK;
    ivfpq_segment *open = ivfpq_segment_create(p, n, false, false, error);
    if (!open) return QUARRY_ERROR_MEMORY;
    ivfpq_segment_release(p->open);
    p->open = open;
    return QUARRY_OK;
}

quarry_code ivfpq_reserve(attn_policy *policy, int64_t n, quarry_error *error)
{
    ivfpq *p = (ivfpq *)policy;
    ivfpq_drop_pending(p);
    int64_t first = p->open_first, rest = p->n_open + n, full;
    quarry_code code = QUARRY_OK;
    for (; rest >= (full = ivfpq_full_segment(p, first)) && code == QUARRY_OK; first += full, rest -= full)
        code = push_pending(p, first, full, false, error);
    if (code == QUARRY_OK) code = ivfpq_grow_open(p, full, error);
    if (code != QUARRY_OK) ivfpq_drop_pending(p);
    return code;
}

void ivfpq_append(attn_policy *policy, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch)
{
    ivfpq *p = (ivfpq *)policy;
    ivfpq_status *open = ivfpq_part_of(p, p->open, layer * p->base.shape.kv.n_head_kv + head).status;
    int64_t closed = pending_tokens(p), rest = p->n_open + n - closed, end = p->n_sealed + p->n_pending;
    int64_t from = closed || !open->coded ? 0 : p->n_coded, most = rest - from / IVFPQ_RUN * IVFPQ_RUN;
    if (end == 0) return; /* no tables yet */
    for (int64_t i = p->n_sealed; i < end; i++) most = p->sealed[i]->n > most ? p->sealed[i]->n : most;
    builder b;
    if (!builder_init(&b, p, kv, layer, head, most, scratch)) {
        open->coded = false;
        return;
    }
    for (int64_t i = p->n_sealed; i < end; i++) build_part(&b, i);
    if (rest > 0) code_open(&b, end - 1, p->open_first + closed, from, rest);
}

void ivfpq_commit(attn_policy *policy, int64_t n)
{
    ivfpq *p = (ivfpq *)policy;
    if (p->n_pending) ivfpq_catch_up(p);
    p->base.n_far += n;
    int64_t closed = pending_tokens(p);
    p->open_first += closed;
    p->n_open += n - closed;
    p->n_sealed += p->n_pending;
    p->n_pending = 0;
    p->n_coded = p->n_sealed ? p->n_open : 0;
}

quarry_code ivfpq_reserve_seal(attn_policy *policy, quarry_error *error)
{
    ivfpq *p = (ivfpq *)policy;
    ivfpq_drop_pending(p);
    int64_t least = p->n_sealed ? p->segment / IVFPQ_LATER_SEAL : ivfpq_min64(IVFPQ_FIRST_SEAL, p->segment);
    if (p->n_open < least) return QUARRY_OK;
    ivfpq_catch_up(p);
    return push_pending(p, p->open_first, p->n_open, false, error);
}

void ivfpq_seal(attn_policy *policy, int layer, int head, const kv_seq *kv, arena *scratch)
{
    ivfpq *p = (ivfpq *)policy;
    bool codes_only = !p->n_pending; /* too few for tables of their own, but truncation may have left tokens without codes */
    if (p->n_open == 0 || (codes_only && (!p->n_sealed || p->n_coded == p->n_open))) return;
    ivfpq_status *open = ivfpq_part_of(p, p->open, layer * p->base.shape.kv.n_head_kv + head).status;
    builder b;
    if (!builder_init(&b, p, kv, layer, head, p->n_open, scratch)) {
        open->coded = false;
        return;
    }
    if (codes_only)
        code_open(&b, p->n_sealed - 1, p->open_first, open->coded ? p->n_coded : 0, p->n_open);
    else
        build_part(&b, p->n_sealed);
}

void ivfpq_commit_seal(attn_policy *policy)
{
    ivfpq *p = (ivfpq *)policy;
    if (p->n_pending) {
        p->open_first += p->n_open;
        p->n_open = 0;
        p->n_sealed += p->n_pending;
        p->n_pending = 0;
    }
    p->n_coded = p->n_sealed ? p->n_open : 0;
}

/* ---- a saved index ---- */

quarry_code ivfpq_push_loaded(ivfpq *p, int64_t n, bool cold, quarry_error *error)
{
    const quarry_code code = push_pending(p, p->open_first, n, cold, error);
    if (code != QUARRY_OK) return code;
    p->n_pending = 0;
    p->n_sealed++;
    p->open_first += n;
    p->base.n_far = p->open_first;
    return QUARRY_OK;
}

/* The 4-bit keys of a segment, in the order of its slots. */
static void restore_keys(const ivfpq *p, const ivfpq_segment *s, const ivfpq_part *part, int layer, int head, const kv_seq *kv, float *x)
{
    const int d = p->d;
    for (int64_t slot = 0; slot < s->n; slot++) {
        kv_read_key(p->base.kernels, kv_row(kv, layer, head, s->first + part->order[slot]), &p->base.shape.kv, x);
        for (int i = 0; i < d; i++) x[i] -= part->centre[i];
        part->key_scale[slot] = vq_quantise_i4(x, d, part->keys + slot * (d / 2));
    }
}

void ivfpq_load_rows(attn_policy *policy, int64_t i, int layer, int head, const kv_seq *kv, arena *scratch)
{
    ivfpq *p = (ivfpq *)policy;
    const int part = layer * p->base.shape.kv.n_head_kv + head;
    builder b;
    if (i < p->n_sealed) {
        const ivfpq_part sealed = ivfpq_part_of(p, p->sealed[i], part);
        float *x = arena_alloc(scratch, (size_t)p->d, sizeof *x, NULL);
        if (!x) sealed.status->coded = false;
        if (sealed.status->coded) restore_keys(p, p->sealed[i], &sealed, layer, head, kv, x);
    } else if (p->n_sealed && p->n_open) {
        if (builder_init(&b, p, kv, layer, head, p->n_open, scratch)) code_open(&b, p->n_sealed - 1, p->open_first, 0, p->n_open);
    }
}

void ivfpq_load_commit(attn_policy *policy)
{
    ivfpq *p = (ivfpq *)policy;
    p->n_coded = p->n_sealed ? p->n_open : 0;
}
