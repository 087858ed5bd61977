/* The specification of the matrix products: see the order of operations in matmul_internal.h. */
#include <math.h>
#include <string.h>

#include "math/matmul_internal.h"

static void quantize_block(const float *x, int8_t *q, activation_scale *s)
{
    uint32_t max_bits = 0; /* as integers, infinities and NaNs are larger than all finite magnitudes */
    for (int i = 0; i < SUB_BLOCK; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        if (bits > max_bits) max_bits = bits;
    }
    float max;
    memcpy(&max, &max_bits, sizeof max);
    bool finite = max_bits < 0x7f800000, zero = !(max >= 1e-30f); /* smaller ones would overflow 127 / max, and matter to nobody */
    float inverse = finite && !zero ? 127 / max : 0;
    int sum = 0, sum_lo = 0;
    for (int i = 0; i < SUB_BLOCK; i++) {
        q[i] = inverse != 0 ? (int8_t)lrintf(x[i] * inverse) : 0;
        sum += q[i];
        if (i == 15) sum_lo = sum;
    }
    s->d = !finite ? NAN : zero ? 0 : max / 127;
    s->sum = s->d * (float)sum;
    s->minus = -sum;
    s->minus_lo = -sum_lo;
}

void activations_quantize_scalar(const float *x, int n, int64_t n_in, uint8_t *out)
{
    for (int64_t b = 0; b < n_in / SUB_BLOCK; b++, out += n * activation_row_bytes(false)) {
        activation_scale *s = (activation_scale *)(void *)(out + n * SUB_BLOCK);
        for (int t = 0; t < n; t++) quantize_block(x + t * n_in + b * SUB_BLOCK, (int8_t *)out + t * SUB_BLOCK, &s[t]);
    }
}

/* The second term of a block: what the first left, in 256ths of its unit; s becomes that of both. */
static void quantize_rest(const float *x, const int8_t *first, int8_t *q, activation_scale *s)
{
    float d = s->d, inverse = d > 0 ? (1 << PAIR_BITS) / d : 0; /* NaN: 0 */
    int sum = 0, sum_lo = 0;
    for (int i = 0; i < SUB_BLOCK; i++) {
        float rest = inverse != 0 ? rintf((x[i] - d * (float)first[i]) * inverse) : 0;
        q[i] = (int8_t)(rest > 127 ? 127 : rest < -127 ? -127 : rest); /* the units of half the first's are 128 of ours */
        sum += q[i];
        if (i == 15) sum_lo = sum;
    }
    s->minus = s->minus * (1 << PAIR_BITS) - sum;
    s->minus_lo = s->minus_lo * (1 << PAIR_BITS) - sum_lo;
    s->d = d / (1 << PAIR_BITS);
    s->sum = s->d * (float)-s->minus;
}

static void quantize_pairs(const float *x, int n, int64_t n_in, uint8_t *out)
{
    for (int64_t b = 0; b < n_in / SUB_BLOCK; b++, out += n * activation_row_bytes(true)) {
        activation_scale *s = (activation_scale *)(void *)(out + 2 * n * SUB_BLOCK);
        for (int t = 0; t < n; t++) {
            const float *row = x + t * n_in + b * SUB_BLOCK;
            int8_t *q = (int8_t *)out + 2 * t * SUB_BLOCK;
            quantize_block(row, q, &s[t]);
            quantize_rest(row, q, q + SUB_BLOCK, &s[t]);
        }
    }
}

/* |dot| <= 16 * 128 * 127 */
static int dot_half(const panel_values *w, int row, int half, const int8_t *q)
{
    int sum = 0;
    for (int k = 16 * half; k < 16 * half + 16; k++) sum += w->q[k / 4][4 * row + k % 4] * q[k];
    return sum;
}

static float accumulate(const block_traits *t, const panel_values *w, int row, const int8_t *q, bool pair, const activation_scale *s,
                        float y)
{
    int lo = dot_half(w, row, 0, q), hi = dot_half(w, row, 1, q);
    if (pair) {
        lo = lo * (1 << PAIR_BITS) + dot_half(w, row, 0, q + SUB_BLOCK);
        hi = hi * (1 << PAIR_BITS) + dot_half(w, row, 1, q + SUB_BLOCK);
    }
    if (!t->fine) {
        y = fmaf((float)(lo + hi), w->scale[0][row] * s->d, y);
        return t->has_m ? fmaf(w->min[0][row], s->sum, y) : y;
    }
    y = fmaf((float)lo, w->scale[0][row] * s->d, y);
    y = fmaf((float)hi, w->scale[1][row] * s->d, y);
    if (!t->has_min) return y;
    y = fmaf(w->min[0][row], s->d * (float)-s->minus_lo, y);
    return fmaf(w->min[1][row], s->d * (float)(s->minus_lo - s->minus), y);
}

/* out[n][16] += what the first terms left. */
static void add_rests(block_type type, const panel_layout *layout, const uint8_t *panel, int64_t n_in, const rest_list *rests, int64_t n,
                      float *out)
{
    int n_sub = layout->n_weights / SUB_BLOCK;
    for (int64_t first = 0; first < n; first += ACTIVATION_GROUP, out += ACTIVATION_GROUP * PANEL_ROWS) {
        const rest_list *list = rest_list_at(rests, first / ACTIVATION_GROUP, n_in);
        for (const rest_block *r = list->blocks; r < list->blocks + list->n; r++) {
            panel_values w;
            panel_unpack(type, layout, panel + r->block / n_sub * layout->n_bytes, r->block % n_sub, &w);
            float *y = out + r->row * PANEL_ROWS;
            for (int row = 0; row < PANEL_ROWS; row++) y[row] = accumulate(block_traits_get(type), &w, row, r->q, false, &r->scale, y[row]);
        }
    }
}

static void panel_product(block_type type, const uint8_t *panel, int64_t n_in, const uint8_t *quantized, const rest_list *rests, int64_t n,
                          float *out)
{
    const bool pairs = !rests;
    const block_traits *traits = block_traits_get(type);
    panel_layout layout;
    panel_layout_get(type, &layout);
    int n_sub = layout.n_weights / SUB_BLOCK, n_q = (pairs ? 2 : 1) * SUB_BLOCK, group = activation_group(pairs);
    memset(out, 0, (size_t)n * PANEL_ROWS * sizeof *out);
    for (int64_t b = 0; b < n_in / SUB_BLOCK; b++) {
        panel_values w;
        panel_unpack(type, &layout, panel + b / n_sub * layout.n_bytes, (int)(b % n_sub), &w);
        for (int64_t t = 0; t < n; t++) {
            int64_t first = t / group * group, size = n - first < group ? n - first : group;
            const uint8_t *block = quantized + activation_bytes(first, n_in, pairs) + b * size * activation_row_bytes(pairs);
            const activation_scale *s = (const activation_scale *)(const void *)(block + size * n_q) + (t - first);
            float *y = out + t * PANEL_ROWS;
            for (int row = 0; row < PANEL_ROWS; row++)
                y[row] = accumulate(traits, &w, row, (const int8_t *)block + (t - first) * n_q, pairs, s, y[row]);
        }
    }
    if (!pairs) add_rests(type, &layout, panel, n_in, rests, n, out);
}

static void floats_product(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out)
{
    enum { CHUNK = 256 };
    const block_info *info = block_info_get(type);
    for (int64_t t = 0; t < n; t++)
        for (int row = 0; row < n_w; row++) out[t * PANEL_ROWS + row] = 0;
    for (int row = 0; row < n_w; row++) {
        for (int64_t k = 0; k < n_in; k += CHUNK) {
            int64_t m = n_in - k < CHUNK ? n_in - k : CHUNK;
            float values[CHUNK];
            block_dequantize(type, (const uint8_t *)w + (row * n_in + k) * info->n_bytes, m, values);
            for (int64_t t = 0; t < n; t++) {
                float y = out[t * PANEL_ROWS + row];
                for (int64_t i = 0; i < m; i++) y = fmaf(values[i], x[t * n_in + k + i], y);
                out[t * PANEL_ROWS + row] = y;
            }
        }
    }
}

const matmul_kernels matmul_scalar = {activations_quantize_scalar, quantize_pairs, panel_product, floats_product};
