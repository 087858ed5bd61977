/* Vector kernels over f32. Accumulate in f32 (scalar: in f32, plain order). Bounds against scalar are stated in tests. */
#ifndef MATH_VECTOR_H
#define MATH_VECTOR_H

#include <stdbool.h>
#include <stdint.h>

#define GELU_SCALE 0.797884561f /* sqrt(2 / pi) */
#define GELU_CUBE 0.044715f

typedef struct vector_kernels {
    /* y[n] = x / sqrt(mean(x²) + eps) * w; y may be x */
    void (*rms_norm)(const float *x, const float *w, float eps, int64_t n, float *y);
    /* y[n] = silu(gate) * up, silu(z) = z / (1 + exp(-z)); y may be gate */
    void (*swiglu)(const float *gate, const float *up, int64_t n, float *y);
    /* y[n] = gelu(gate) * up, gelu(z) = z/2 (1 + tanh(u)) = z / (1 + exp(-2u)) with u = sqrt(2/pi) (z + 0.044715 z³); y may be gate */
    void (*geglu)(const float *gate, const float *up, int64_t n, float *y);
    /* Rotates one head in place: pair i by the angle with cosine cs[2i] and sine cs[2i+1], i < n_rot/2. Pairs are (2i, 2i+1), or with
     * halves (i, i + n_rot/2). Elements from n_rot on are left. */
    void (*rope)(float *x, const float *cs, int n_rot, bool halves);
    void (*to_f16)(const float *x, int64_t n, uint16_t *y);
    void (*from_f16)(const uint16_t *x, int64_t n, float *y);
    float (*dot)(const float *x, const float *y, int64_t n);
    /* max(x); x[i] = exp(x[i] - max); returns the sum and the max. n >= 1. Relative error of exp <= 2e-7 * 8. */
    float (*softmax_exp)(float *x, int64_t n, float *max);
} vector_kernels;

extern const vector_kernels vector_scalar, vector_avx2, vector_avx512;

#endif
