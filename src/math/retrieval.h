/* Kernels of the key index: product-code scan by byte shuffles, selection by threshold, int8 cluster vectors, and the two dense products
 * that building an index takes. Integer results are equal on every instruction set; f32 ones accumulate in f32 and agree to rounding. */
#ifndef MATH_RETRIEVAL_H
#define MATH_RETRIEVAL_H

#include <stdbool.h>
#include <stdint.h>

#include "math/attention.h"

enum {
    SCAN_BLOCK = 32 /* tokens per block of codes */,
    SCAN_CODES = 16 /* centroids of a 4-bit code */,
    SCAN_TOP = 63 /* largest table entry: four of them add up in a byte */
};

/* Codes of one block of 32 tokens: for each of n_sub sub-vectors 16 bytes; byte i holds token i in its low nibble and token i + 16 in
 * its high one.
 *
 *     block b: [sub 0: 16 bytes][sub 1: 16 bytes] … [sub n_sub-1]
 * */
typedef struct retrieval_kernels {
    /* ---- one decode step ---- */

    /* Tables of one query: lut[s][c] = sum over j of q[s * d_sub + j] * centroids[s][j][c], low[s] = min over c. Returns the largest max
     * - min over c of any s. */
    float (*lut)(const float *q, const float *centroids, int n_sub, int d_sub, float *lut, float *low);
    /* out[s][c] = (lut[s][c] - low[s]) * inverse_step, rounded to nearest (ties to even), at most SCAN_TOP. */
    void (*lut_quantise)(const float *lut, const float *low, float inverse_step, int n_sub, uint8_t *out);
    /* out[h * stride + t] = saturating u16 (offset[h] + sum over sub s of lut[h][s][code(t, s)]), t < 32 n_blocks. lut[g][n_sub][16] of
     * entries <= SCAN_TOP; n_sub <= 256. */
    void (*scan)(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, int g, const uint16_t *offset, uint16_t *out,
                 int64_t stride);
    /* *top = the largest key; returns the sum over the keys > 0 of exp(step * (key - *top)), 0 if there is none, with 2^x linear between
     * integers: at most 6.2 % above, 0.2 % below, 4 % above on average. n is a multiple of SCAN_BLOCK. */
    float (*exp_sum)(const uint16_t *keys, int64_t n, float step, uint16_t *top);
    /* out[t] = max over h < g of saturating u16 (keys[h * stride + t] + up[h] - down[h]), n a multiple of SCAN_BLOCK; the sum saturates
     * before the difference. */
    void (*merge)(const uint16_t *keys, int64_t stride, int g, const uint16_t *up, const uint16_t *down, int64_t n, uint16_t *out);
    /* Keys >= threshold among n, a multiple of SCAN_BLOCK. */
    int64_t (*count)(const uint16_t *keys, int64_t n, uint16_t threshold);
    /* ids of the keys > threshold, and of the first *n_ties equal to it (*n_ties counts down), ascending: ids[…] = first + index. n is a
     * multiple of SCAN_BLOCK. Returns how many. Up to SCAN_BLOCK ids after the last may be overwritten. */
    int64_t (*collect)(const uint16_t *keys, int64_t n, uint16_t threshold, int64_t *n_ties, int32_t first, int32_t *ids);
    /* out[h * stride + c] = bias[h] + scale[c] * sum over i of q[h][i] * x[c][i], c < n; x int8 [n][d], d a multiple of 8. */
    void (*dot_i8)(const float *q, int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                   int64_t stride);
    /* out[h * stride + i] = bias[h] + factor[h] * (scale[at[i]] * sum over j of q[h][j] * (x(at[i], j) - 8)), rounded to nearest and kept
     * within 1 and 65535, i < n; top[h] = the largest of them and of what it was. x has 4 bits a dimension: row r has in byte j < d/2 of
     * x[r][d/2] dimension j in the low nibble and d/2 + j in the high one. q int8 [g][d], not -128; d a multiple of 8, at most 1024; g at
     * most 64. */
    void (*dot_i4)(const int8_t *q, const float *factor, const float *bias, int g, int d, const uint8_t *x, const float *scale,
                   const int32_t *at, int64_t n, uint16_t *out, int64_t stride, uint16_t *top);
    /* sums[c] = sum over the keys > 0 of cell c, keys[begin[c]] to keys[begin[c + 1] - 1], of exp(step * (key - top)), with the powers of
     * exp_sum over their mean error: at most 2.1 % above, 4.1 % below. No key is larger than top; SCAN_BLOCK keys after the last of a cell
     * are readable. */
    void (*cell_sums)(const uint16_t *keys, const uint32_t *begin, int64_t n_cells, float step, uint16_t top, float *sums);
    /* o[h][i] += sum over c of w[h * stride + c] * scale[c] * x[c][i]. Clusters whose weights are all 0 may be skipped. */
    void (*accumulate_i8)(const float *w, int64_t stride, int g, int d, const int8_t *x, const float *scale, int64_t n, float *o);
    /* o[h][i] += sum over r of w[h][r] * value of rows[r][i]; w[g][n], K|V rows as in math/attention.h. */
    void (*accumulate_rows)(const float *w, int g, int d, kv_type type, const void *const *rows, int64_t n, float *o);

    /* ---- building an index ---- */

    /* For each of the n columns of y[d][stride]: the row j of c[k][d] with the largest c_j·y - half[j] (with half = |c_j|²/2 the nearest
     * one; the first of equals), and that value. */
    void (*nearest)(const float *c, const float *half, int k, int d, const float *y, int64_t stride, int64_t n, int32_t *index,
                    float *value);
    /* c[m][n] = or (add) += a[m][k] b[k][n], with a(i, l) = a[i * a_row + l * a_column] and row strides for b and c. */
    void (*product)(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t m,
                    int64_t n, int64_t k, bool add);
} retrieval_kernels;

extern const retrieval_kernels retrieval_scalar, retrieval_avx2, retrieval_avx512;

#endif
