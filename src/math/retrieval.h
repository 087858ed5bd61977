/* Kernels of the key index: product-code scan by byte shuffles, and int8 cluster vectors. Integer results are equal on every instruction set. */
#ifndef MATH_RETRIEVAL_H
#define MATH_RETRIEVAL_H

#include <stdint.h>

enum { SCAN_BLOCK = 32 }; /* tokens per block of codes */

/* Codes of one block of 32 tokens: for each of n_sub sub-vectors 16 bytes; byte i holds token i in its low nibble and token i + 16 in its high one.
 *
 *     block b: [sub 0: 16 bytes][sub 1: 16 bytes] … [sub n_sub-1]
 */
typedef struct retrieval_kernels {
    /* out[t] = max over heads h < g of saturating u16 (offset[h] + sum over sub s of lut[h][s][code(t, s)]), t < 32 n_blocks. lut[g][n_sub][16]. */
    void (*scan)(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, int g, const uint16_t *offset, uint16_t *out);
    /* out[h][c] = scale[c] * sum over i of q[h][i] * x[c][i]; x int8 [n][d], f32 accumulation. */
    void (*dot_i8)(const float *q, int g, int d, const int8_t *x, const float *scale, int64_t n, float *out);
    /* o[h][i] += sum over c of w[h][c] * scale[c] * x[c][i]. Clusters whose weights are all 0 may be skipped. */
    void (*accumulate_i8)(const float *w, int g, int d, const int8_t *x, const float *scale, int64_t n, float *o);
} retrieval_kernels;

extern const retrieval_kernels retrieval_scalar, retrieval_avx2, retrieval_avx512;

#endif
