/* Quantisation as ggml's reference does it: round to nearest on a grid between the extremes. */
#include <math.h>
#include <string.h>

#include "math/blocks.h"

static void store_u16(uint8_t *p, uint16_t v)
{
    p[0] = (uint8_t)v;
    p[1] = (uint8_t)(v >> 8);
}

static float inverse(float d)
{
    return d != 0 ? 1 / d : 0;
}

/* x as a quant in [0, max], cut towards zero. */
static uint8_t quant_clamp(float x, int max)
{
    if (!(x > 0)) return 0; /* also NaN */
    return x >= (float)max ? (uint8_t)max : (uint8_t)x;
}

/* 4 and 5 bits: with a min on [min, max], without on a grid of which -2^(bits-1) is the value of largest magnitude. */
static void quantize_small(const float *x, int bits, bool with_min, uint8_t *out)
{
    float largest = 0, max = x[0], min = x[0], d, add;
    for (int i = 0; i < 32; i++) {
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
        if (x[i] > max) max = x[i];
        if (x[i] < min) min = x[i];
    }
    int top = (1 << bits) - 1;
    d = with_min ? (max - min) / (float)top : largest / (float)-(1 << (bits - 1));
    add = with_min ? 0.5f : (float)(1 << (bits - 1)) + 0.5f;
    store_u16(out, f32_to_f16(d));
    out += 2;
    if (with_min) {
        store_u16(out, f32_to_f16(min));
        out += 2;
    }
    uint8_t q[32];
    uint32_t high = 0;
    for (int i = 0; i < 32; i++) {
        q[i] = quant_clamp((with_min ? x[i] - min : x[i]) * inverse(d) + add, top);
        high |= (uint32_t)(q[i] >> 4) << i;
    }
    if (bits == 5) {
        store_u16(out, (uint16_t)high);
        store_u16(out + 2, (uint16_t)(high >> 16));
        out += 4;
    }
    for (int i = 0; i < 16; i++) out[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
}

static void quantize_q8_0(const float *x, uint8_t *out)
{
    float max = 0;
    for (int i = 0; i < 32; i++) max = fmaxf(max, fabsf(x[i]));
    float d = max / 127;
    store_u16(out, f32_to_f16(d));
    for (int i = 0; i < 32; i++) {
        float r = roundf(x[i] * inverse(d));
        out[2 + i] = (uint8_t)(int8_t)(r >= 127 ? 127 : r >= -127 ? (int)r : r < -127 ? -127 : 0);
    }
}

static uint16_t f32_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* keeps a NaN one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

bool block_quantize(block_type type, const float *x, int64_t n, void *blocks)
{
    uint8_t *out = blocks;
    switch ((int)type) {
    case BLOCK_F32: memcpy(out, x, (size_t)n * sizeof *x); return true;
    case BLOCK_F16:
        for (int64_t i = 0; i < n; i++) store_u16(out + 2 * i, f32_to_f16(x[i]));
        return true;
    case BLOCK_BF16:
        for (int64_t i = 0; i < n; i++) store_u16(out + 2 * i, f32_to_bf16(x[i]));
        return true;
    case BLOCK_Q4_0:
    case BLOCK_Q4_1:
    case BLOCK_Q5_0:
    case BLOCK_Q5_1:
    case BLOCK_Q8_0: break;
    default: return false;
    }
    for (int64_t i = 0; i < n; i += 32, out += block_info_get(type)->n_bytes) {
        if (type == BLOCK_Q8_0)
            quantize_q8_0(x + i, out);
        else
            quantize_small(x + i, type == BLOCK_Q5_0 || type == BLOCK_Q5_1 ? 5 : 4, type == BLOCK_Q4_1 || type == BLOCK_Q5_1, out);
    }
    return true;
}
