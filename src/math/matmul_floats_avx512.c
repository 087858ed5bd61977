/* F32, F16 and BF16 weights times f32 activations. Each output is 16 partial sums in f32 (element i goes to sum i % 16, in order), added by halves at the
 * end: one order for every tile. */
#include <immintrin.h>

#include "math/matmul_internal.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum { TILE_W = 4, TILE_X = 5 }; /* 20 sums, 4 weights and an activation in 32 registers */

static ALWAYS_INLINE __m512 load_weights(const block_type type, const uint8_t *w, int64_t i, __mmask16 mask)
{
    if (type == BLOCK_F32) return _mm512_maskz_loadu_ps(mask, w + 4 * i);
    __m256i h = _mm256_maskz_loadu_epi16(mask, w + 2 * i);
    if (type == BLOCK_F16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static ALWAYS_INLINE void step(const block_type type, const int n_w, const int n_x, const uint8_t *w, int64_t w_stride, const float *x,
                               int64_t n_in, int64_t i, __mmask16 mask, __m512 sum[TILE_W][TILE_X])
{
    __m512 row[TILE_W];
    for (int r = 0; r < n_w; r++) row[r] = load_weights(type, w + r * w_stride, i, mask);
    for (int t = 0; t < n_x; t++) {
        __m512 v = _mm512_maskz_loadu_ps(mask, x + t * n_in + i);
        for (int r = 0; r < n_w; r++) sum[r][t] = _mm512_fmadd_ps(row[r], v, sum[r][t]);
    }
}

static ALWAYS_INLINE void tile(const block_type type, const int n_w, const int n_x, const uint8_t *w, int64_t n_in, const float *x,
                               float *out)
{
    const int64_t w_stride = n_in * (type == BLOCK_F32 ? 4 : 2);
    __m512 sum[TILE_W][TILE_X];
    int64_t i = 0;
    for (int r = 0; r < n_w; r++)
        for (int t = 0; t < n_x; t++) sum[r][t] = _mm512_setzero_ps();
    for (; i + 16 <= n_in; i += 16) step(type, n_w, n_x, w, w_stride, x, n_in, i, 0xffff, sum);
    if (i < n_in) step(type, n_w, n_x, w, w_stride, x, n_in, i, (__mmask16)((1u << (n_in - i)) - 1), sum);
    for (int r = 0; r < n_w; r++)
        for (int t = 0; t < n_x; t++) out[t * PANEL_ROWS + r] = _mm512_reduce_add_ps(sum[r][t]);
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

void floats_product_avx512(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out)
{
    if (type == BLOCK_F32)
        product(BLOCK_F32, w, n_w, n_in, x, n, out);
    else if (type == BLOCK_F16)
        product(BLOCK_F16, w, n_w, n_in, x, n, out);
    else
        product(BLOCK_BF16, w, n_w, n_in, x, n, out);
}
