#include <math.h>
#include <string.h>

#include "math/blocks.h"
#include "math/retrieval.h"
#include "math/retrieval_exp.h"

static float lut_scalar(const float *q, const float *centroids, int n_sub, int d_sub, float *lut, float *low)
{
    float widest = 0;
    for (int s = 0; s < n_sub; s++) {
        float *row = lut + s * SCAN_CODES;
        const float *centroid = centroids + (size_t)s * d_sub * SCAN_CODES; /* [d_sub][16] */
        float least = INFINITY, most = -INFINITY;
        for (int c = 0; c < SCAN_CODES; c++) {
            float sum = 0;
            for (int j = 0; j < d_sub; j++) sum += q[s * d_sub + j] * centroid[j * SCAN_CODES + c];
            row[c] = sum;
            least = sum < least ? sum : least;
            most = sum > most ? sum : most;
        }
        low[s] = least;
        if (most - least > widest) widest = most - least;
    }
    return widest;
}

static void lut_quantise_scalar(const float *lut, const float *low, float inverse_step, int n_sub, uint8_t *out)
{
    for (int i = 0; i < n_sub * SCAN_CODES; i++) {
        float x = rintf((lut[i] - low[i / SCAN_CODES]) * inverse_step);
        out[i] = x < SCAN_TOP ? (uint8_t)x : SCAN_TOP;
    }
}

static void scan_scalar(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, int g, const uint16_t *offset, uint16_t *out,
                        int64_t stride)
{
    for (int h = 0; h < g; h++)
        for (int64_t t = 0; t < n_blocks * SCAN_BLOCK; t++) {
            const uint8_t *block = codes + (size_t)(t / SCAN_BLOCK) * (size_t)n_sub * 16,
                          *table = lut + (size_t)h * (size_t)n_sub * SCAN_CODES;
            uint32_t sum = offset[h];
            for (int s = 0; s < n_sub; s++) sum += table[s * SCAN_CODES + (block[s * 16 + t % 16] >> (t % SCAN_BLOCK / 16 * 4) & 15)];
            out[h * stride + t] = (uint16_t)(sum < UINT16_MAX ? sum : UINT16_MAX);
        }
}

static float power_sum(const uint16_t *keys, int64_t n, exp_scale scale, uint16_t top)
{
    float sum = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t distance = (uint32_t)(top - keys[i]);
        if (distance > scale.most) distance = scale.most;
        uint32_t below = distance * scale.whole + (distance * scale.part >> 16);
        if (keys[i] > 0 && below < EXP_TOP_BITS) sum += f16_to_f32((uint16_t)(EXP_TOP_BITS - below));
    }
    return sum * 0x1p-13f;
}

static float exp_sum_scalar(const uint16_t *keys, int64_t n, float step, uint16_t *top)
{
    *top = 0;
    for (int64_t i = 0; i < n; i++)
        if (keys[i] > *top) *top = keys[i];
    return power_sum(keys, n, exp_scale_make(step), *top);
}

static void cell_sums_scalar(const uint16_t *keys, const uint32_t *begin, int64_t n_cells, float step, uint16_t top, float *sums)
{
    const exp_scale scale = exp_scale_make(step);
    for (int64_t c = 0; c < n_cells; c++) sums[c] = power_sum(keys + begin[c], begin[c + 1] - begin[c], scale, top) / EXP_MEAN;
}

static void merge_scalar(const uint16_t *keys, int64_t stride, int g, const uint16_t *up, const uint16_t *down, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i++) {
        int best = 0;
        for (int h = 0; h < g; h++) {
            int x = keys[h * stride + i] + up[h];
            x = (x < UINT16_MAX ? x : UINT16_MAX) - down[h];
            if (x > best) best = x;
        }
        out[i] = (uint16_t)best;
    }
}

static int64_t count_scalar(const uint16_t *keys, int64_t n, uint16_t threshold)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += keys[i] >= threshold;
    return count;
}

static int64_t collect_scalar(const uint16_t *keys, int64_t n, uint16_t threshold, int64_t *n_ties, int32_t first, int32_t *ids)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        if (keys[i] < threshold || (keys[i] == threshold && *n_ties <= 0)) continue;
        if (keys[i] == threshold) --*n_ties;
        ids[found++] = first + (int32_t)i;
    }
    return found;
}

static void dot_i8_scalar(const float *q, int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                          int64_t stride)
{
    for (int64_t c = 0; c < n; c++) {
        for (int h = 0; h < g; h++) {
            float sum = 0;
            for (int i = 0; i < d; i++) sum += q[h * d + i] * x[c * d + i];
            out[h * stride + c] = bias[h] + sum * scale[c];
        }
    }
}

static void dot_i4_scalar(const int8_t *q, const float *factor, const float *bias, int g, int d, const uint8_t *x, const float *scale,
                          const int32_t *at, int64_t n, uint16_t *out, int64_t stride, uint16_t *top)
{
    const int half = d / 2;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = x + (size_t)at[i] * (size_t)half;
        for (int h = 0; h < g; h++) {
            int32_t sum = 0;
            for (int j = 0; j < half; j++) sum += q[h * d + j] * ((row[j] & 15) - 8) + q[h * d + half + j] * ((row[j] >> 4) - 8);
            const float steps = rintf(bias[h] + factor[h] * (scale[at[i]] * (float)sum));
            const uint16_t score = steps < 1 ? 1 : steps < UINT16_MAX ? (uint16_t)steps : UINT16_MAX;
            out[h * stride + i] = score;
            if (score > top[h]) top[h] = score;
        }
    }
}

static void accumulate_i8_scalar(const float *w, int64_t stride, int g, int d, const int8_t *x, const float *scale, int64_t n, float *o)
{
    for (int64_t c = 0; c < n; c++) {
        for (int h = 0; h < g; h++) {
            float weight = w[h * stride + c] * scale[c];
            for (int i = 0; i < d; i++) o[h * d + i] += weight * x[c * d + i];
        }
    }
}

/* IEEE half to float; a plain C translation so that the specification needs no instruction set. */
static float half_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float x = ldexpf((float)mantissa, -24);
        return sign ? -x : x;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void accumulate_rows_scalar(const float *w, int g, int d, kv_type type, const void *const *rows, int64_t n, float *o)
{
    for (int64_t r = 0; r < n; r++) {
        for (int i = 0; i < d; i++) {
            float value = type == KV_F16 ? half_float(((const uint16_t *)rows[r])[d + i]) : ((const float *)rows[r])[d + i];
            for (int h = 0; h < g; h++) o[h * d + i] += w[h * n + r] * value;
        }
    }
}

static void nearest_scalar(const float *c, const float *half, int k, int d, const float *y, int64_t stride, int64_t n, int32_t *index,
                           float *value)
{
    for (int64_t t = 0; t < n; t++) {
        float best = -INFINITY;
        int32_t at = 0;
        for (int j = 0; j < k; j++) {
            float sum = -half[j];
            for (int i = 0; i < d; i++) sum += c[(size_t)j * d + i] * y[i * stride + t];
            if (sum > best) {
                best = sum;
                at = j;
            }
        }
        index[t] = at;
        value[t] = best;
    }
}

static void product_scalar(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row,
                           int64_t m, int64_t n, int64_t k, bool add)
{
    for (int64_t i = 0; i < m; i++) {
        float *row = c + i * c_row;
        if (!add) memset(row, 0, (size_t)n * sizeof *row);
        for (int64_t l = 0; l < k; l++) {
            float factor = a[i * a_row + l * a_column];
            for (int64_t j = 0; j < n; j++) row[j] += factor * b[l * b_row + j];
        }
    }
}

const retrieval_kernels retrieval_scalar = {
    .lut = lut_scalar,
    .lut_quantise = lut_quantise_scalar,
    .scan = scan_scalar,
    .exp_sum = exp_sum_scalar,
    .merge = merge_scalar,
    .count = count_scalar,
    .collect = collect_scalar,
    .dot_i8 = dot_i8_scalar,
    .dot_i4 = dot_i4_scalar,
    .cell_sums = cell_sums_scalar,
    .accumulate_i8 = accumulate_i8_scalar,
    .accumulate_rows = accumulate_rows_scalar,
    .nearest = nearest_scalar,
    .product = product_scalar,
};
