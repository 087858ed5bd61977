/* The vector kernels on math/simd.h; included once by each instruction set's file, which names the table. Sums run in several partial
 * sums of LANES. */
#include "math/simd.h"
#include "math/vector.h"

static float dot(const float *x, const float *y, int64_t n)
{
    vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) sum[k] = vf_fma(vf_load(x + i + k * LANES), vf_load(y + i + k * LANES), sum[k]);
    for (; i + LANES <= n; i += LANES) sum[0] = vf_fma(vf_load(x + i), vf_load(y + i), sum[0]);
    if (i < n) sum[1] = vf_fma(vf_load_n(x + i, (int)(n - i)), vf_load_n(y + i, (int)(n - i)), sum[1]);
    return vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
}

static void rms_norm(const float *x, const float *w, float eps, int64_t n, float *y)
{
    float scale = 1 / sqrtf(dot(x, x, n) / (float)n + eps);
    vf s = vf_set(scale);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(y + i, vf_mul(vf_mul(vf_load(x + i), s), vf_load(w + i)));
    for (; i < n; i++) y[i] = x[i] * scale * w[i];
}

SIMD_INLINE vf swiglu_vector(vf gate, vf up)
{
    return vf_mul(vf_div(gate, vf_add(vf_set(1), vf_exp(vf_sub(vf_zero(), gate)))), up);
}

static void swiglu(const float *gate, const float *up, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(y + i, swiglu_vector(vf_load(gate + i), vf_load(up + i)));
    if (i < n) vf_store_n(y + i, swiglu_vector(vf_load_n(gate + i, (int)(n - i)), vf_load_n(up + i, (int)(n - i))), (int)(n - i));
}

SIMD_INLINE vf geglu_vector(vf z, vf up)
{
    vf u = vf_mul(vf_set(-2 * GELU_SCALE), vf_fma(vf_set(GELU_CUBE), vf_mul(vf_mul(z, z), z), z));
    return vf_mul(vf_div(z, vf_add(vf_set(1), vf_exp(u))), up);
}

static void geglu(const float *gate, const float *up, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(y + i, geglu_vector(vf_load(gate + i), vf_load(up + i)));
    if (i < n) vf_store_n(y + i, geglu_vector(vf_load_n(gate + i, (int)(n - i)), vf_load_n(up + i, (int)(n - i))), (int)(n - i));
}

static void rope_pairs(float *x, const float *cs, int n_rot)
{
    int i = 0;
    for (; i + LANES <= n_rot; i += LANES) vf_store(x + i, vf_rotate_pairs(vf_load(x + i), vf_load(cs + i)));
    if (i < n_rot) vf_store_n(x + i, vf_rotate_pairs(vf_load_n(x + i, n_rot - i), vf_load_n(cs + i, n_rot - i)), n_rot - i);
}

static void rope(float *x, const float *cs, int n_rot, bool halves)
{
    if (!halves) {
        rope_pairs(x, cs, n_rot / 2 * 2);
        return;
    }
    int n = n_rot / 2, i = 0;
    float *y = x + n;
    for (; i + LANES <= n; i += LANES) {
        vf c, s, a = vf_load(x + i), b = vf_load(y + i);
        vf_deinterleave(cs + 2 * i, &c, &s);
        vf_store(x + i, vf_fnma(b, s, vf_mul(a, c)));
        vf_store(y + i, vf_fma(a, s, vf_mul(b, c)));
    }
    for (; i < n; i++) {
        float a = x[i], b = y[i], c = cs[2 * i], s = cs[2 * i + 1];
        x[i] = a * c - b * s;
        y[i] = a * s + b * c;
    }
}

static void to_f16(const float *x, int64_t n, uint16_t *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_to_f16(y + i, vf_load(x + i));
    if (i < n) vf_to_f16_n(y + i, vf_load_n(x + i, (int)(n - i)), (int)(n - i));
}

static void from_f16(const uint16_t *x, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(y + i, vf_from_f16(x + i));
    if (i < n) vf_store_n(y + i, vf_from_f16_n(x + i, (int)(n - i)), (int)(n - i));
}

static float softmax_exp(float *x, int64_t n, float *max)
{
    vf top = vf_set(-INFINITY), sum = vf_zero();
    int64_t i = 0;
    int rest = (int)(n % LANES);
    for (; i + LANES <= n; i += LANES) top = vf_max(top, vf_load(x + i));
    if (rest) top = vf_max(top, vf_first_n(vf_load_n(x + i, rest), vf_set(-INFINITY), rest));
    *max = vf_top(top);
    vf shift = vf_set(*max == -INFINITY ? 0 : *max); /* all masked: every exp is 0, none NaN */
    for (i = 0; i + LANES <= n; i += LANES) {
        vf e = vf_exp(vf_sub(vf_load(x + i), shift));
        vf_store(x + i, e);
        sum = vf_add(sum, e);
    }
    if (rest) {
        vf e = vf_first_n(vf_exp(vf_sub(vf_load_n(x + i, rest), shift)), vf_zero(), rest);
        vf_store_n(x + i, e, rest);
        sum = vf_add(sum, e);
    }
    return vf_sum(sum);
}

#define VECTOR_KERNELS                                                                                                                     \
    {                                                                                                                                      \
        rms_norm, swiglu, geglu, rope, to_f16, from_f16, dot, softmax_exp                                                                  \
    }
