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
 * with all accumulators in registers, where scores also become weights. The maximum of a query is raised, and its sums are shrunk, only
 * when a score exceeds it by more than ATTENTION_LAG, which is rare after the first tile. Queries go in chunks of CHUNK, so that the
 * panels stay in the first-level cache for several blocks. d = 64, 192 queries: AVX-512 97, AVX2 86 of 118 GFLOP/s. */
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
    float *p;         /* [CHUNK][ATTENTION_TILE] weights */
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

SIMD_INLINE int clamp_lanes(int n)
{
    return n < 0 ? 0 : n < LANES ? n : LANES;
}

/* exp(x) for x <= 87, exp(-87) below -87; relative error below 2e-7. vf_exp without its checks. */
SIMD_INLINE vf exp_weight(vf x)
{
    const vf magic = vf_set(12582912.0f);
    vf y = vf_max(vf_set(-87.0f), x), t = vf_fma(y, vf_set(1.44269504f), magic), n = vf_sub(t, magic);
    return vf_scale_magic(vf_exp_reduced(vf_exp_reduce(y, n)), t);
}

/* Raises the maximum of query i to max: shrinks its sums, and the first n weights of this tile, which are of the old maximum. */
SIMD_INLINE vf raise_maximum(const tile_job *job, int64_t i, float max, float *p, int n, vf sum)
{
    float *o = job->state.o + i * job->d;
    vf shrink = vf_exp(vf_set(job->state.m[i] - max));
    for (int e = 0; e < job->d; e += LANES) {
        int left = job->d - e < LANES ? job->d - e : LANES;
        vf_store_n(o + e, vf_mul(vf_load_n(o + e, left), shrink), left);
    }
    for (int r = 0; r < n; r += LANES) vf_store(p + r, vf_mul(vf_load(p + r), shrink));
    job->state.l[i] *= vf_first(shrink);
    job->state.m[i] = max;
    return vf_mul(sum, shrink);
}

/* Weights p[R][first …] of queries [i, i + R), for V vectors of keys from key `first` on, the start of a panel; 0 for keys a query does not see.
 * sum[R] gets the weights added. */
SIMD_INLINE void score_block(const tile_job *job, int64_t i, float *p, vf *sum, int first, const int R, const int V)
{
    vf acc[QUERIES][PANEL];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = vf_zero();
    panel_product(acc, job->q + i * job->d, job->d, job->d, job->keys + first * job->d, PANEL_LANES, R, V);
    for (int r = 0; r < R; r++) {
        float *out = p + r * ATTENTION_TILE;
        int seen = job->limit[i + r] - first;
        vf top = vf_set(-INFINITY);
        if (seen < V * LANES)
            for (int v = 0; v < V; v++) acc[r][v] = vf_first_n(acc[r][v], vf_set(-INFINITY), clamp_lanes(seen - v * LANES));
        for (int v = 0; v < V; v++) top = vf_max(top, acc[r][v]);
        if (vf_any_above(top, vf_set(job->state.m[i + r] + ATTENTION_LAG)))
            sum[r] = raise_maximum(job, i + r, vf_top(top), out, first, sum[r]);
        vf max = vf_set(job->state.m[i + r]);
        for (int v = 0; v < V; v++) {
            vf e = exp_weight(vf_sub(acc[r][v], max));
            if (seen < V * LANES) e = vf_first_n(e, vf_zero(), clamp_lanes(seen - v * LANES));
            vf_store(out + first + v * LANES, e);
            sum[r] = vf_add(sum[r], e);
        }
    }
}

/* o[R][first …] += p[R] · values of the first n rows, for V vectors from element `first` on; valid: elements of the last
 * vector. */
SIMD_INLINE void value_block(const tile_job *job, const float *p, float *o, int n, int first, int valid, const int R, const int V)
{
    vf acc[QUERIES][PANEL];
    int d = job->d;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            const float *at = o + r * d + first + v * LANES;
            acc[r][v] = v + 1 == V ? vf_load_n(at, valid) : vf_load(at);
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

/* Weights of queries [i, i + R), 0 for keys that one of them sees but another does not. */
SIMD_INLINE void score_rows(const tile_job *job, int64_t i, float *p, const int R)
{
    int end = limit_max(job->limit + i, R);
    vf sum[(QUERIES + 3) / 4 * 4];
    for (int r = 0; r < (R + 3) / 4 * 4; r++) sum[r] = vf_zero();
    for (int first = 0; first < end; first += PANEL_LANES) {
        switch (panel_width(end, first)) {
        case 1: score_block(job, i, p, sum, first, R, 1); break;
#if defined(__AVX512F__)
        case 2: score_block(job, i, p, sum, first, R, 2); break;
        case 3: score_block(job, i, p, sum, first, R, 3); break;
#endif
        default: score_block(job, i, p, sum, first, R, PANEL);
        }
    }
    for (int r = 0; r < R; r += 4) {
        float total[4];
        _mm_storeu_ps(total, vf_sum4(sum[r], sum[r + 1], sum[r + 2], sum[r + 3]));
        for (int j = 0; j < 4 && r + j < R; j++) job->state.l[i + r + j] += total[j];
    }
}

SIMD_INLINE void value_rows(const tile_job *job, int64_t i, const float *p, const int R)
{
    int n = limit_max(job->limit + i, R), d = job->d;
    float *o = job->state.o + i * d;
    if (n == 0) return;
    for (int first = 0; first < d; first += PANEL_LANES) {
        int valid = (d - first) % LANES == 0 || d - first > PANEL_LANES ? LANES : d % LANES;
        switch (panel_width(d, first)) {
        case 1: value_block(job, p, o, n, first, valid, R, 1); break;
#if defined(__AVX512F__)
        case 2: value_block(job, p, o, n, first, valid, R, 2); break;
        case 3: value_block(job, p, o, n, first, valid, R, 3); break;
#endif
        default: value_block(job, p, o, n, first, valid, R, PANEL);
        }
    }
}

/* Queries [i, i + n), n <= CHUNK. */
static void tile_chunk(const tile_job *job, int64_t i, int n)
{
    int r = 0;
    for (; r + QUERIES <= n; r += QUERIES) score_rows(job, i + r, job->p + r * ATTENTION_TILE, QUERIES);
    for (; r < n; r++) score_rows(job, i + r, job->p + r * ATTENTION_TILE, 1);
    for (r = 0; r + QUERIES <= n; r += QUERIES) value_rows(job, i + r, job->p + r * ATTENTION_TILE, QUERIES);
    for (; r < n; r++) value_rows(job, i + r, job->p + r * ATTENTION_TILE, 1);
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
