/* The coarse tile of f16 rows on bf16 dot products (vdpbf16ps: twice the multiply-adds of an f32 FMA, accumulated in f32). Everything else is
 * that of attention_avx512.c.
 *
 * Keys and values are rounded to bf16 once per tile and laid out in pairs, as vdpbf16ps takes them: two neighbouring elements of a key, the same
 * element of two neighbouring values. A block of QUERIES queries then has its scores against all 64 keys in registers
 * (4 vectors each), and its outputs 4 vectors at a time.
 *
 * The maximum of a query is raised only when a score exceeds it by more than ATTENTION_LAG, which is rare after the first tile, so that the sums are
 * seldom rescaled and no maximum across a vector is taken. l sums the weights as rounded for the values. */
#include <stdbool.h>

#include "math/attention.h"
#include "math/simd.h"

enum {
    QUERIES = 6, /* of a block: with 4 vectors of keys or values each, 24 accumulators */
    VECTORS = 4,
    KEY_PAIRS = ATTENTION_TILE / 2,
};

typedef struct tile_job {
    const float *q;   /* [nq][d] */
    const int *limit; /* [nq] */
    int d, width;     /* width: d up to a multiple of 16 */
    uint32_t *keys;   /* [d / 2][ATTENTION_TILE] pairs of elements */
    uint32_t *values; /* [KEY_PAIRS][width] pairs of keys */
    uint32_t *block;  /* [QUERIES][d / 2] queries, pairs of elements */
    uint32_t *p;      /* [QUERIES][KEY_PAIRS] weights, pairs of keys */
    attention_state state;
} tile_job;

/* Two vectors in bf16: low in the lower half. */
SIMD_INLINE __m512i to_bf16(vf low, vf high)
{
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

SIMD_INLINE vf dot_pairs(vf sum, __m512i a, __m512i b)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* exp(x - shift) to 8e-5, where shift_log2 is shift / ln 2; 2^-126 for everything smaller. x - shift <= 88. The weight is rounded to bf16 next, which
 * is 50 times coarser. */
SIMD_INLINE vf exp_rough(vf x, vf shift_log2)
{
    const vf magic = vf_set(12582912.0f);
    vf y = vf_max(vf_set(-126.0f), _mm512_fmsub_ps(x, vf_set(1.44269504f), shift_log2));
    vf n = vf_add(y, magic), r = vf_sub(y, vf_sub(n, magic));
    vf p = vf_fma(vf_set(5.517167e-2f), r, vf_set(2.4261112e-1f));
    p = vf_fma(p, r, vf_set(6.9326099e-1f));
    p = vf_fma(p, r, vf_set(9.9992807e-1f));
    return vf_scale_magic(p, n);
}

/* ---- packing ---- */

/* Transposes 16 x 16 pairs. */
SIMD_INLINE void transpose_pairs(__m512i x[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) { /* x[i + c]: column c of each quarter, of rows i … i + 3 */
            x[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), b = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        __m512i e = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xDD), f = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xDD);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xDD);
        t[4 + c] = _mm512_shuffle_i32x4(e, f, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(e, f, 0xDD);
    }
    for (int i = 0; i < 16; i++) x[i] = t[i];
}

/* 32 elements of a row in bf16; 0 beyond the first n. */
SIMD_INLINE __m512i load_pairs(const uint16_t *row, int n)
{
    if (n >= 32) return to_bf16(vf_from_f16(row), vf_from_f16(row + 16));
    return to_bf16(vf_from_f16_n(row, n < 16 ? n : 16), n > 16 ? vf_from_f16_n(row + 16, n - 16) : vf_zero());
}

/* Keys beyond n, up to the next vector, repeat the last one. */
static void pack_keys(const tile_job *job, const uint16_t *rows, int n)
{
    int d = job->d;
    for (int r = 0; r < n; r += 16)
        for (int i = 0; i < d; i += 32) {
            __m512i x[16];
            for (int j = 0; j < 16; j++) x[j] = load_pairs(rows + (r + j < n ? r + j : n - 1) * 2 * d + i, d - i);
            transpose_pairs(x);
            uint32_t *out = job->keys + i / 2 * ATTENTION_TILE + r;
            for (int j = 0; j < 16 && i / 2 + j < d / 2; j++) _mm512_storeu_si512(out + j * ATTENTION_TILE, x[j]);
        }
}

/* A value beyond n that shares a pair with the last one, and elements beyond d, are 0. */
static void pack_values(const tile_job *job, const uint16_t *rows, int n)
{
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    int d = job->d;
    for (int r = 0; r < n; r += 2) {
        const uint16_t *row = rows + r * 2 * d + d;
        uint32_t *out = job->values + r / 2 * job->width;
        for (int i = 0; i < d; i += 32) {
            __m512i a = load_pairs(row + i, d - i), b = r + 1 < n ? load_pairs(row + 2 * d + i, d - i) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(a, low, b));
            if (i + 16 < job->width) _mm512_storeu_si512(out + i + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

/* ---- one block of queries ---- */

/* acc[R][V] += a[R][n] (row stride a_stride) times panel[n][V] (row stride p_stride), all in pairs. */
SIMD_INLINE void panel_product(vf acc[QUERIES][VECTORS], const uint32_t *a, int a_stride, int n, const uint32_t *panel, int p_stride,
                               const int R, const int V)
{
    for (int k = 0; k < n; k++) {
        __m512i b[VECTORS];
        for (int v = 0; v < V; v++) b[v] = _mm512_loadu_si512(panel + k * p_stride + v * LANES);
        for (int r = 0; r < R; r++) {
            __m512i x = _mm512_set1_epi32((int)a[r * a_stride + k]);
            for (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], x, b[v]);
        }
    }
}

/* Raises the maximum of query i to the largest score of a block, and shrinks its sums accordingly. */
SIMD_INLINE void raise(const tile_job *job, int64_t i, float max)
{
    float *o = job->state.o + i * job->d, *m = job->state.m + i;
    vf shrink = vf_exp(vf_set(*m - max));
    for (int e = 0; e < job->d; e += 8) _mm256_storeu_ps(o + e, _mm256_mul_ps(_mm256_loadu_ps(o + e), _mm512_castps512_ps256(shrink)));
    job->state.l[i] *= vf_first(shrink);
    *m = max;
}

/* scores[R][ATTENTION_TILE] of the block against V vectors of keys. */
SIMD_INLINE void score_block(const tile_job *job, float *scores, const int R, const int V)
{
    vf acc[QUERIES][VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = vf_zero();
    panel_product(acc, job->block, job->d / 2, job->d / 2, job->keys, ATTENTION_TILE, R, V);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) vf_store(scores + r * ATTENTION_TILE + v * LANES, acc[r][v]);
}

/* Weights of query i from its scores against V vectors of keys, to p[KEY_PAIRS]; returns sums of 16 parts of them. MASKED: it may see fewer keys than
 * that. */
SIMD_INLINE vf weigh_row(const tile_job *job, int64_t i, const float *scores, uint32_t *p, const int V, const bool MASKED)
{
    uint64_t seen = MASKED && job->limit[i] < ATTENTION_TILE ? ((uint64_t)1 << job->limit[i]) - 1 : ~(uint64_t)0;
    vf x[VECTORS + 1], top = vf_set(-INFINITY), sum = vf_zero();
    for (int v = 0; v < V; v++) {
        x[v] = vf_load(scores + v * LANES);
        if (MASKED) x[v] = _mm512_mask_blend_ps((__mmask16)(seen >> 16 * v), vf_set(-INFINITY), x[v]);
        top = vf_max(top, x[v]);
    }
    if (vf_any_above(top, vf_set(job->state.m[i] + ATTENTION_LAG))) raise(job, i, vf_top(top));
    vf shift = vf_set(job->state.m[i] * 1.44269504f);
    for (int v = 0; v < V; v++) x[v] = exp_rough(x[v], shift);
    x[V] = vf_zero();
    for (int v = 0; v < V; v += 2) {
        __m512i pairs = to_bf16(x[v], x[v + 1]);
        if (MASKED) pairs = _mm512_maskz_mov_epi16((__mmask32)(seen >> 16 * v), pairs);
        sum = dot_pairs(sum, pairs, _mm512_set1_epi16(0x3F80)); /* times 1 */
        _mm512_storeu_si512(p + v * LANES / 2, pairs);
    }
    return sum;
}

SIMD_INLINE void weigh_block(const tile_job *job, int64_t i, const int R, const int V, const bool MASKED)
{
    float scores[QUERIES * ATTENTION_TILE], *l = job->state.l + i;
    vf sum[QUERIES];
    score_block(job, scores, R, V);
    for (int r = 0; r < R; r++) sum[r] = weigh_row(job, i + r, scores + r * ATTENTION_TILE, job->p + r * KEY_PAIRS, V, MASKED);
    if (R == QUERIES) {
        __m128 rest = vf_sum4(sum[4], sum[5], vf_zero(), vf_zero());
        _mm_storeu_ps(l, _mm_add_ps(_mm_loadu_ps(l), vf_sum4(sum[0], sum[1], sum[2], sum[3])));
        l[4] += _mm_cvtss_f32(rest);
        l[5] += _mm_cvtss_f32(_mm_movehdup_ps(rest));
    } else {
        for (int r = 0; r < R; r++) l[r] += _mm_cvtss_f32(vf_sum4(sum[r], vf_zero(), vf_zero(), vf_zero())); /* in the same order */
    }
}

/* o[R][first …] += p[R] · values of the first n pairs of keys, for V vectors; valid: elements of the last vector. */
SIMD_INLINE void value_block(const tile_job *job, int64_t i, int n, int first, int valid, const int R, const int V)
{
    vf acc[QUERIES][VECTORS];
    int d = job->d;
    float *o = job->state.o + i * d + first;
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = v + 1 == V ? vf_load_n(o + r * d + v * LANES, valid) : vf_load(o + r * d + v * LANES);
    panel_product(acc, job->p, KEY_PAIRS, n, job->values + first, job->width, R, V);
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            if (v + 1 == V)
                vf_store_n(o + r * d + v * LANES, acc[r][v], valid);
            else
                vf_store(o + r * d + v * LANES, acc[r][v]);
        }
}

SIMD_INLINE void value_rows(const tile_job *job, int64_t i, int n, const int R)
{
    int d = job->d;
    for (int first = 0; first < d; first += VECTORS * LANES) {
        int left = d - first, valid = left % LANES == 0 || left > VECTORS * LANES ? LANES : left % LANES;
        switch ((left + LANES - 1) / LANES) {
        case 1: value_block(job, i, n, first, valid, R, 1); break;
        case 2: value_block(job, i, n, first, valid, R, 2); break;
        case 3: value_block(job, i, n, first, valid, R, 3); break;
        default: value_block(job, i, n, first, valid, R, VECTORS);
        }
    }
}

SIMD_INLINE void round_query(const float *q, int d, uint16_t *out)
{
    int i = 0;
    for (; i + 32 <= d; i += 32) _mm512_storeu_si512(out + i, to_bf16(vf_load(q + i), vf_load(q + i + 16)));
    for (; i < d; i += 8) _mm_storeu_si128((__m128i *)(out + i), (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(q + i)));
}

/* Queries [i, i + R). */
SIMD_INLINE void attend_block(const tile_job *job, int64_t i, const int R)
{
    int d = job->d, least = ATTENTION_TILE, most = 0;
    for (int r = 0; r < R; r++) {
        int limit = job->limit[i + r];
        least = limit < least ? limit : least;
        most = limit > most ? limit : most;
    }
    if (most == 0) return;
    for (int r = 0; r < R; r++) round_query(job->q + (i + r) * d, d, (uint16_t *)(job->block + r * d / 2));
    if (least == ATTENTION_TILE) {
        weigh_block(job, i, R, VECTORS, false);
    } else {
        switch ((most + LANES - 1) / LANES) {
        case 1: weigh_block(job, i, R, 1, true); break;
        case 2: weigh_block(job, i, R, 2, true); break;
        case 3: weigh_block(job, i, R, 3, true); break;
        default: weigh_block(job, i, R, VECTORS, true);
        }
    }
    value_rows(job, i, (most + 1) / 2, R);
}

static void attend_coarse(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                          attention_state *state)
{
    if (type != KV_F16) {
        attention_avx512.tile(q, limit, nq, d, type, rows, n, scratch, state);
        return;
    }
    tile_job job = {.q = q, .limit = limit, .d = d, .width = (d + 15) / 16 * 16, .keys = scratch, .state = *state};
    job.values = job.keys + d / 2 * ATTENTION_TILE;
    job.p = job.values + KEY_PAIRS * job.width;
    job.block = job.p + QUERIES * KEY_PAIRS;
    int seen = 0, i = 0;
    for (int j = 0; j < nq; j++) seen = limit[j] > seen ? limit[j] : seen;
    if (seen == 0) return;
    pack_keys(&job, rows, seen);
    pack_values(&job, rows, seen);
    for (; i + QUERIES <= nq; i += QUERIES) attend_block(&job, i, QUERIES);
    for (; i < nq; i++) attend_block(&job, i, 1);
}

static void attend_rows(const float *q, int g, int d, kv_type type, const void *const *rows, int64_t n, float *scores,
                        attention_state *state)
{
    attention_avx512.rows(q, g, d, type, rows, n, scores, state);
}

static void attend_tile(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                        attention_state *state)
{
    attention_avx512.tile(q, limit, nq, d, type, rows, n, scratch, state);
}

const attention_kernels attention_avx512bf16 = {attend_rows, attend_tile, attend_coarse};
