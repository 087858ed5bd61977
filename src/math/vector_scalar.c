#include <math.h>

#include "math/blocks.h"
#include "math/vector.h"

static void rms_norm(const float *x, const float *w, float eps, int64_t n, float *y)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / (float)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

static void swiglu(const float *gate, const float *up, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) y[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

static void geglu(const float *gate, const float *up, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) {
        float z = gate[i], u = GELU_SCALE * (z + GELU_CUBE * (z * z * z));
        y[i] = z / (1 + expf(-2 * u)) * up[i];
    }
}

static void rope(float *x, const float *cs, int n_rot, bool halves)
{
    int n = n_rot / 2;
    for (int i = 0; i < n; i++) {
        float *a = halves ? x + i : x + 2 * i, *b = halves ? a + n : a + 1;
        float u = *a, v = *b, c = cs[2 * i], s = cs[2 * i + 1];
        *a = u * c - v * s;
        *b = u * s + v * c;
    }
}

static void to_f16(const float *x, int64_t n, uint16_t *y)
{
    for (int64_t i = 0; i < n; i++) y[i] = f32_to_f16(x[i]);
}

static void from_f16(const uint16_t *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++) y[i] = f16_to_f32(x[i]);
}

static float dot(const float *x, const float *y, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static float softmax_exp(float *x, int64_t n, float *max)
{
    float top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    float shift = top == -INFINITY ? 0 : top; /* all masked: every exp is 0, none NaN */
    for (int64_t i = 0; i < n; i++) sum += x[i] = expf(x[i] - shift);
    *max = top;
    return sum;
}

const vector_kernels vector_scalar = {rms_norm, swiglu, geglu, rope, to_f16, from_f16, dot, softmax_exp};
