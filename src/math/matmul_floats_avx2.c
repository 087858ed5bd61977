/* F32, F16 and BF16 weights times f32 activations. Each output is 8 partial sums in f32 (element i goes to sum i % 8, in order), added by halves at the
 * end; the up to 7 last elements go to a ninth, added last: one order for every tile. */
#include <immintrin.h>
#include <math.h>

#include "math/matmul_internal.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum { TILE_W = 3, TILE_X = 4 }; /* 12 sums, 3 weights and an activation in 16 registers */

static ALWAYS_INLINE __m256 load_weights(const block_type type, const uint8_t *w, int64_t i)
{
    if (type == BLOCK_F32) return _mm256_loadu_ps((const float *)(const void *)(w + 4 * i));
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)(w + 2 * i));
    if (type == BLOCK_F16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

static ALWAYS_INLINE float add_lanes(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

static ALWAYS_INLINE void tile(const block_type type, const int n_w, const int n_x, const uint8_t *w, int64_t n_in, const float *x,
                               float *out)
{
    const int64_t size = type == BLOCK_F32 ? 4 : 2, w_stride = n_in * size;
    __m256 sum[TILE_W][TILE_X];
    int64_t i = 0;
    for (int r = 0; r < n_w; r++)
        for (int t = 0; t < n_x; t++) sum[r][t] = _mm256_setzero_ps();
    for (; i + 8 <= n_in; i += 8) {
        __m256 row[TILE_W];
        for (int r = 0; r < n_w; r++) row[r] = load_weights(type, w + r * w_stride, i);
        for (int t = 0; t < n_x; t++) {
            __m256 v = _mm256_loadu_ps(x + t * n_in + i);
            for (int r = 0; r < n_w; r++) sum[r][t] = _mm256_fmadd_ps(row[r], v, sum[r][t]);
        }
    }
    for (int r = 0; r < n_w; r++) {
        float last[8];
        block_dequantize(type, w + r * w_stride + i * size, n_in - i, last);
        for (int t = 0; t < n_x; t++) {
            float rest = 0;
            for (int64_t k = i; k < n_in; k++) rest = fmaf(last[k - i], x[t * n_in + k], rest);
            out[t * PANEL_ROWS + r] = add_lanes(sum[r][t]) + rest;
        }
    }
}

static ALWAYS_INLINE void product(const block_type type, const uint8_t *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out)
{
    const int64_t w_stride = n_in * (type == BLOCK_F32 ? 4 : 2);
    for (int r = 0; r < n_w;) {
        const uint8_t *row = w + r * w_stride;
        bool wide = n_w - r >= TILE_W;
        for (int64_t t = 0; t < n;) {
            const float *v = x + t * n_in;
            float *y = out + t * PANEL_ROWS + r;
            if (wide && n - t >= TILE_X)
                tile(type, TILE_W, TILE_X, row, n_in, v, y), t += TILE_X;
            else if (wide)
                tile(type, TILE_W, 1, row, n_in, v, y), t++;
            else
                tile(type, 1, 1, row, n_in, v, y), t++;
        }
        r += wide ? TILE_W : 1;
    }
}

void floats_product_avx2(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out)
{
    if (type == BLOCK_F32)
        product(BLOCK_F32, w, n_w, n_in, x, n, out);
    else if (type == BLOCK_F16)
        product(BLOCK_F16, w, n_w, n_in, x, n, out);
    else
        product(BLOCK_BF16, w, n_w, n_in, x, n, out);
}
