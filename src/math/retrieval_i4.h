/* Inner products with keys of 4 bits a dimension: what the instruction sets share. Private to retrieval_avx2.c and retrieval_avx512.c. */
#ifndef MATH_RETRIEVAL_I4_H
#define MATH_RETRIEVAL_I4_H

#include <stdint.h>
#include <string.h>

/* Rows are found anywhere in memory: the one so many ahead is asked for. */
enum { DOT_I4_AHEAD = 12, DOT_I4_MOST = 1024 };

/* dot_i4 for g heads, 1 to 4, a constant wherever it is called; the instruction set's own. */
static inline __attribute__((always_inline)) void dot_i4_heads(const int8_t *q, const float *factor, const float *bias, const int g, int d,
                                                               const uint8_t *x, const float *scale, const int32_t *at, int64_t n,
                                                               uint16_t *out, int64_t stride, uint16_t *top);

/* A head of a query in the order of nibbles: for each n_chunk bytes of a row the dimensions of their low nibbles, then of their high ones, with zeros
 * where a row ends. *shift is what the 8 in every nibble adds. Returns how many chunks. */
static inline __attribute__((always_inline)) int order_query(const int8_t *q, int d, const int n_chunk, int8_t *out, float *shift)
{
    const int half = d / 2, n_chunks = (half + n_chunk - 1) / n_chunk;
    int32_t sum = 0;
    memset(out, 0, (size_t)n_chunks * 2 * n_chunk);
    for (int j = 0; j < half; j++) {
        int8_t *chunk = out + j / n_chunk * 2 * n_chunk + j % n_chunk;
        chunk[0] = q[j];
        chunk[n_chunk] = q[half + j];
        sum += q[j] + q[half + j];
    }
    *shift = 8 * (float)sum;
    return n_chunks;
}

static void dot_i4(const int8_t *q, const float *factor, const float *bias, int g, int d, const uint8_t *x, const float *scale,
                   const int32_t *at, int64_t n, uint16_t *out, int64_t stride, uint16_t *top)
{
    for (int h = 0; h < g; h += 4) {
        const int8_t *part = q + h * d;
        uint16_t *to = out + h * stride;
        switch (g - h) {
        case 1: dot_i4_heads(part, factor + h, bias + h, 1, d, x, scale, at, n, to, stride, top + h); break;
        case 2: dot_i4_heads(part, factor + h, bias + h, 2, d, x, scale, at, n, to, stride, top + h); break;
        case 3: dot_i4_heads(part, factor + h, bias + h, 3, d, x, scale, at, n, to, stride, top + h); break;
        default: dot_i4_heads(part, factor + h, bias + h, 4, d, x, scale, at, n, to, stride, top + h);
        }
    }
}

#endif
