/* The attention kernels on math/simd.h; included once by each instruction set's file, which names the table.
 *
 * rows: bound by memory. Rows go in batches: scores of all heads (a key vector converted once serves up to HEADS heads; four rows share
 * one horizontal sum), one maximum and one vector exp per batch, then the values with o in registers. While a batch is worked on, the
 * next one's lines are brought to the second-level cache: asked into the first level, they keep its few miss buffers busy for the whole
 * latency of memory (Zen 4, gathered rows of 256 bytes: 6.5 GB/s, not 19). One core reads contiguous rows at 21 GB/s with AVX-512, 19
 * with AVX2 (bench/bench_attention.c; d = 64, three heads).
 *
 * tile: bound by arithmetic. Keys (transposed) and values become f32 panels in scratch, each PANEL vectors wide, so that scores and
 * outputs are both the product
 *
 *     acc[QUERIES][PANEL] += broadcast a[QUERIES][k] * panel[k][PANEL]
 *
 * with all accumulators in registers. Queries go in chunks of CHUNK, so that the panels stay in the first-level cache for several
 * blocks. */
#include <stdbool.h>

#include "math/attention.h"
#include "math/simd.h"

enum {
    BATCH = 64, /* rows of a batch; what is asked for one batch ahead arrives in time */
#if defined(__AVX512F__)
    PANEL = 4, /* vectors */
    HEADS = 4,
#else
    PANEL = 2,
    HEADS = 3,
#endif
    QUERIES = 6, /* of one register block */
    CHUNK = 24,
    PANEL_LANES = PANEL * LANES,
};

SIMD_INLINE vf load_row(kv_type type, const void *row, int i)
{
    return type == KV_F16 ? vf_from_f16((const uint16_t *)row + i) : vf_load((const float *)row + i);
}

SIMD_INLINE vf load_row_n(kv_type type, const void *row, int i, int n)
{
    return type == KV_F16 ? vf_from_f16_n((const uint16_t *)row + i, n) : vf_load_n((const float *)row + i, n);
}

/* ---- rows ---- */

/* A batch: rows[n], and p[HEADS][BATCH], scores at first and weights later. next: rows of the batch after it. */
typedef struct row_batch {
    const void *const *rows;
    const void *const *next;
    int n, n_next;
    kv_type type;
    int d;
    float *p;
} row_batch;

/* Asks for the keys or the values of row i of the next batch. */
SIMD_INLINE void prefetch_half(const row_batch *b, int i, bool values)
{
    if (i >= b->n_next) return;
    size_t bytes = kv_row_bytes(b->type, b->d) / 2;
    const char *at = (const char *)b->next[i] + (values ? bytes : 0);
    for (size_t line = 0; line < bytes; line += 64) _mm_prefetch(at + line, _MM_HINT_T1);
}

/* p[h][r] = q[h] · k[r] for G heads; rows beyond n repeat the last one. */
SIMD_INLINE void batch_scores(const row_batch *b, const float *q, const int G, const kv_type type)
{
    int d = b->d, whole = d / LANES * LANES;
    for (int r = 0; r < b->n; r += 4) {
        const void *k[4];
        vf sum[HEADS][4];
        for (int j = 0; j < 4; j++) {
            k[j] = b->rows[r + j < b->n ? r + j : b->n - 1];
            prefetch_half(b, r + j, false);
        }
        for (int h = 0; h < G; h++)
            for (int j = 0; j < 4; j++) sum[h][j] = vf_zero();
        for (int i = 0; i < whole; i += LANES) {
            vf y[HEADS];
            for (int h = 0; h < G; h++) y[h] = vf_load(q + h * d + i);
            for (int j = 0; j < 4; j++) {
                vf x = load_row(type, k[j], i);
                for (int h = 0; h < G; h++) sum[h][j] = vf_fma(x, y[h], sum[h][j]);
            }
        }
        if (whole < d)
            for (int h = 0; h < G; h++)
                for (int j = 0; j < 4; j++)
                    sum[h][j] = vf_fma(load_row_n(type, k[j], whole, d - whole), vf_load_n(q + h * d + whole, d - whole), sum[h][j]);
        for (int h = 0; h < G; h++) _mm_storeu_ps(b->p + h * BATCH + r, vf_sum4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]));
    }
}

/* o[h][i …] = o * shrink[h] + sum over rows of p[h][r] v[r], for V vectors from element i on; valid: elements of the last vector. */
SIMD_INLINE void batch_values(const row_batch *b, float *o, const float *shrink, int i, int valid, const int G, const int V,
                              const kv_type type)
{
    vf sum[HEADS][4];
    int d = b->d;
    for (int h = 0; h < G; h++)
        for (int v = 0; v < V; v++) {
            const float *at = o + h * d + i + v * LANES;
            sum[h][v] = vf_mul(v + 1 == V ? vf_load_n(at, valid) : vf_load(at), vf_set(shrink[h]));
        }
    for (int r = 0; r < b->n; r++) {
        vf w[HEADS];
        if (i == 0) prefetch_half(b, r, true);
        for (int h = 0; h < G; h++) w[h] = vf_set(b->p[h * BATCH + r]);
        for (int v = 0; v < V; v++) {
            int at = d + i + v * LANES;
            vf x = v + 1 == V && valid < LANES ? load_row_n(type, b->rows[r], at, valid) : load_row(type, b->rows[r], at);
            for (int h = 0; h < G; h++) sum[h][v] = vf_fma(w[h], x, sum[h][v]);
        }
    }
    for (int h = 0; h < G; h++)
        for (int v = 0; v < V; v++) {
            float *at = o + h * d + i + v * LANES;
            if (v + 1 == V)
                vf_store_n(at, sum[h][v], valid);
            else
                vf_store(at, sum[h][v]);
        }
}

/* Turns p[n] from scores to exp(score - new maximum), updates m and l, and returns exp(old maximum - new maximum), by which o shrinks.
 * Scores of -INFINITY weigh 0, also when there is no other. p has room up to a multiple of LANES, and is 0 there afterwards. */
SIMD_INLINE float weigh(float *p, int n, float *m, float *l)
{
    vf top = vf_set(*m), sum = vf_zero();
    int whole = n / LANES * LANES;
    if (whole < n) {
        vf_store(p + whole, vf_first_n(vf_load(p + whole), vf_set(-INFINITY), n - whole));
        whole += LANES;
    }
    for (int i = 0; i < whole; i += LANES) top = vf_max(top, vf_load(p + i));
    float max = vf_top(top), shift = max == -INFINITY ? 0 : max;
    float shrink = vf_first(vf_exp(vf_set(*m - shift)));
    for (int i = 0; i < whole; i += LANES) {
        vf e = vf_exp(vf_sub(vf_load(p + i), vf_set(shift)));
        vf_store(p + i, e);
        sum = vf_add(sum, e);
    }
    *m = max;
    *l = *l * shrink + vf_sum(sum);
    return shrink;
}

/* One batch for G heads: state of these heads only; scores (or NULL) at the batch's first row, of stride n_scores. */
SIMD_INLINE void batch_heads(const row_batch *b, const float *q, attention_state s, float *scores, int64_t n_scores, const int G,
                             const kv_type type)
{
    int d = b->d, n_vectors = (d + LANES - 1) / LANES;
    float shrink[HEADS];
    batch_scores(b, q, G, type);
    for (int h = 0; h < G; h++) {
        if (scores) memcpy(scores + h * n_scores, b->p + h * BATCH, (size_t)b->n * sizeof *scores);
        shrink[h] = weigh(b->p + h * BATCH, b->n, s.m + h, s.l + h);
    }
    for (int v = 0; v < n_vectors; v += 4) {
        int left = n_vectors - v, i = v * LANES, valid = left > 4 || d % LANES == 0 ? LANES : d % LANES;
        switch (left) {
        case 1: batch_values(b, s.o, shrink, i, valid, G, 1, type); break;
        case 2: batch_values(b, s.o, shrink, i, valid, G, 2, type); break;
        case 3: batch_values(b, s.o, shrink, i, valid, G, 3, type); break;
        default:
            if (valid < LANES)
                batch_values(b, s.o, shrink, i, valid, G, 4, type);
            else
                batch_values(b, s.o, shrink, i, LANES, G, 4, type);
        }
    }
}

SIMD_INLINE void batch_dispatch(const row_batch *b, const float *q, int g, attention_state s, float *scores, int64_t n_scores,
                                const kv_type type)
{
    for (int h = 0; h < g; h += HEADS) {
        attention_state heads = {s.m + h, s.l + h, s.o + h * b->d};
        const float *x = q + h * b->d;
        float *out = scores ? scores + h * n_scores : NULL;
        switch (g - h < HEADS ? g - h : HEADS) {
        case 1: batch_heads(b, x, heads, out, n_scores, 1, type); break;
        case 2: batch_heads(b, x, heads, out, n_scores, 2, type); break;
        case 3: batch_heads(b, x, heads, out, n_scores, 3, type); break;
        default: batch_heads(b, x, heads, out, n_scores, HEADS, type);
        }
    }
}

static void batch_f16(const row_batch *b, const float *q, int g, attention_state s, float *scores, int64_t n_scores)
{
    batch_dispatch(b, q, g, s, scores, n_scores, KV_F16);
}

static void batch_f32(const row_batch *b, const float *q, int g, attention_state s, float *scores, int64_t n_scores)
{
    batch_dispatch(b, q, g, s, scores, n_scores, KV_F32);
}

static void attend_rows(const float *q, int g, int d, kv_type type, const void *const *rows, int64_t n, float *scores,
                        attention_state *state)
{
    float p[HEADS * BATCH] = {0};
    row_batch b = {.next = rows, .n_next = n < BATCH ? (int)n : BATCH, .type = type, .d = d, .p = p};
    for (int i = 0; i < b.n_next; i++) {
        prefetch_half(&b, i, false);
        prefetch_half(&b, i, true);
    }
    for (int64_t r = 0; r < n; r += BATCH) {
        int64_t after = n - r - BATCH;
        b.rows = rows + r;
        b.n = n - r < BATCH ? (int)(n - r) : BATCH;
        b.next = rows + r + b.n;
        b.n_next = after < 0 ? 0 : after < BATCH ? (int)after : BATCH;
        (type == KV_F16 ? batch_f16 : batch_f32)(&b, q, g, *state, scores ? scores + r : NULL, n);
    }
}

/* ---- tile ---- */

typedef struct tile_job {
    const float *q;   /* [nq][d] */
    const int *limit; /* [nq] */
    int d, n;         /* n: rows that some query sees */
    float *keys;      /* panels over the keys:   [ATTENTION_TILE / PANEL_LANES][d][PANEL_LANES] */
    float *values;    /* panels over elements:   [ceil(d / PANEL_LANES)][ATTENTION_TILE][width], the last panel narrower */
    float *p;         /* [CHUNK][ATTENTION_TILE] scores, then weights */
    attention_state state;
} tile_job;

/* Vectors of the panel that starts at lane `first` of `lanes`. */
SIMD_INLINE int panel_width(int lanes, int first)
{
    int n = (lanes - first + LANES - 1) / LANES;
    return n < PANEL ? n : PANEL;
}

SIMD_INLINE __m256 load_eight(kv_type type, const void *row, int i)
{
    return type == KV_F16 ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + i)))
                          : _mm256_loadu_ps((const float *)row + i);
}

SIMD_INLINE void transpose_eight(const __m256 *x, float *out, int stride)
{
    __m256 t[8], u[8];
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
        u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(u[i], u[4 + i], 0x20));
        _mm256_storeu_ps(out + (4 + i) * stride, _mm256_permute2f128_ps(u[i], u[4 + i], 0x31));
    }
}

/* Keys beyond n, up to the next vector, are 0. */
static void pack_keys(const tile_job *job, kv_type type, const void *rows)
{
    size_t bytes = kv_row_bytes(type, job->d);
    int end = (job->n + LANES - 1) / LANES * LANES;
    for (int r = 0; r < end; r += 8) {
        float *out = job->keys + r / PANEL_LANES * PANEL_LANES * job->d + r % PANEL_LANES;
        for (int i = 0; i < job->d; i += 8) {
            __m256 x[8];
            for (int j = 0; j < 8; j++)
                x[j] = r + j < job->n ? load_eight(type, (const char *)rows + (size_t)(r + j) * bytes, i) : _mm256_setzero_ps();
            transpose_eight(x, out + i * PANEL_LANES, PANEL_LANES);
        }
    }
}

/* Elements beyond d, up to the next vector, are 0. */
static void pack_values(const tile_job *job, kv_type type, const void *rows)
{
    size_t bytes = kv_row_bytes(type, job->d);
    int d = job->d;
    for (int first = 0; first < d; first += PANEL_LANES) {
        int width = panel_width(d, first) * LANES;
        float *out = job->values + first * ATTENTION_TILE;
        for (int r = 0; r < job->n; r++) {
            const void *row = (const char *)rows + (size_t)r * bytes;
            for (int i = 0; i < width; i += LANES) {
                int left = d - first - i;
                vf x = left < LANES ? load_row_n(type, row, d + first + i, left) : load_row(type, row, d + first + i);
                vf_store(out + r * width + i, x);
            }
        }
    }
}

/* acc[R][V] += a[R][n] (row stride a_stride) times panel[n][V] (row stride p_stride) */
SIMD_INLINE void panel_product(vf acc[QUERIES][PANEL], const float *a, int a_stride, int n, const float *panel, int p_stride, const int R,
                               const int V)
{
    for (int k = 0; k < n; k++) {
        vf b[PANEL];
        for (int v = 0; v < V; v++) b[v] = vf_load(panel + k * p_stride + v * LANES);
        for (int r = 0; r < R; r++) {
            vf x = vf_set(a[r * a_stride + k]);
            for (int v = 0; v < V; v++) acc[r][v] = vf_fma(x, b[v], acc[r][v]);
        }
    }
}

/* p[R][first …] = q[R] · keys, for V vectors of keys from key `first` on, the start of a panel. */
SIMD_INLINE void score_block(const tile_job *job, const float *q, float *p, int first, const int R, const int V)
{
    vf acc[QUERIES][PANEL];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = vf_zero();
    panel_product(acc, q, job->d, job->d, job->keys + first * job->d, PANEL_LANES, R, V);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) vf_store(p + r * ATTENTION_TILE + first + v * LANES, acc[r][v]);
}

/* o[R][first …] = o * shrink[R] + p[R] · values of the first n rows, for V vectors from element `first` on; valid: elements of the last
 * vector. */
SIMD_INLINE void value_block(const tile_job *job, const float *p, const float *shrink, float *o, int n, int first, int valid, const int R,
                             const int V)
{
    vf acc[QUERIES][PANEL];
    int d = job->d;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            const float *at = o + r * d + first + v * LANES;
            acc[r][v] = vf_mul(v + 1 == V ? vf_load_n(at, valid) : vf_load(at), vf_set(shrink[r]));
        }
    panel_product(acc, p, ATTENTION_TILE, n, job->values + first * ATTENTION_TILE, V * LANES, R, V);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float *at = o + r * d + first + v * LANES;
            if (v + 1 == V)
                vf_store_n(at, acc[r][v], valid);
            else
                vf_store(at, acc[r][v]);
        }
}

/* The largest of n limits. */
SIMD_INLINE int limit_max(const int *limit, int n)
{
    int most = 0;
    for (int i = 0; i < n; i++) most = limit[i] > most ? limit[i] : most;
    return most;
}

SIMD_INLINE void score_rows(const tile_job *job, int i, float *p, const int R)
{
    int end = limit_max(job->limit + i, R);
    const float *q = job->q + (int64_t)i * job->d;
    for (int first = 0; first < end; first += PANEL_LANES) {
        switch (panel_width(end, first)) {
        case 1: score_block(job, q, p, first, R, 1); break;
#if defined(__AVX512F__)
        case 2: score_block(job, q, p, first, R, 2); break;
        case 3: score_block(job, q, p, first, R, 3); break;
#endif
        default: score_block(job, q, p, first, R, PANEL);
        }
    }
}

SIMD_INLINE void value_rows(const tile_job *job, int i, const float *p, const float *shrink, const int R)
{
    int n = limit_max(job->limit + i, R), d = job->d;
    float *o = job->state.o + (int64_t)i * d;
    if (n == 0) return;
    for (int first = 0; first < d; first += PANEL_LANES) {
        int valid = (d - first) % LANES == 0 || d - first > PANEL_LANES ? LANES : d % LANES;
        switch (panel_width(d, first)) {
        case 1: value_block(job, p, shrink, o, n, first, valid, R, 1); break;
#if defined(__AVX512F__)
        case 2: value_block(job, p, shrink, o, n, first, valid, R, 2); break;
        case 3: value_block(job, p, shrink, o, n, first, valid, R, 3); break;
#endif
        default: value_block(job, p, shrink, o, n, first, valid, R, PANEL);
        }
    }
}

/* Weights of query i from its scores, 0 for rows it does not see but its register block does; returns the shrink of o. */
static float weigh_row(const tile_job *job, int i, float *p, int end)
{
    int limit = job->limit[i];
    float shrink = limit > 0 ? weigh(p, limit, job->state.m + i, job->state.l + i) : 1;
    for (int r = (limit + LANES - 1) / LANES * LANES; r < end; r += LANES) vf_store(p + r, vf_zero());
    return shrink;
}

/* Queries [i, i + n), n <= CHUNK. */
static void tile_chunk(const tile_job *job, int i, int n)
{
    float shrink[CHUNK];
    int r = 0;
    for (; r + QUERIES <= n; r += QUERIES) score_rows(job, i + r, job->p + r * ATTENTION_TILE, QUERIES);
    for (; r < n; r++) score_rows(job, i + r, job->p + r * ATTENTION_TILE, 1);
    for (r = 0; r < n; r++) shrink[r] = weigh_row(job, i + r, job->p + r * ATTENTION_TILE, job->n);
    for (r = 0; r + QUERIES <= n; r += QUERIES) value_rows(job, i + r, job->p + r * ATTENTION_TILE, shrink + r, QUERIES);
    for (; r < n; r++) value_rows(job, i + r, job->p + r * ATTENTION_TILE, shrink + r, 1);
}

static void attend_tile(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                        attention_state *state)
{
    int lanes = (d + LANES - 1) / LANES * LANES;
    tile_job job = {.q = q, .limit = limit, .d = d, .n = limit_max(limit, nq), .state = *state};
    job.keys = scratch;
    job.values = job.keys + lanes * ATTENTION_TILE;
    job.p = job.values + lanes * ATTENTION_TILE;
    (void)n;
    if (job.n == 0) return;
    pack_keys(&job, type, rows);
    pack_values(&job, type, rows);
    for (int i = 0; i < nq; i += CHUNK) tile_chunk(&job, i, nq - i < CHUNK ? nq - i : CHUNK);
}

#define ATTENTION_KERNELS                                                                                                                  \
    {                                                                                                                                      \
        attend_rows, attend_tile, attend_tile                                                                                              \
    }
