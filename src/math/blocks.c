#include "math/blocks.h"

#include <string.h>

#include "math/matmul_internal.h"

static const struct known_type {
    block_info info;
    block_traits traits; /* n_bits 0: plain floats */
} known[] = {
    /* by type; others have no name */
    [BLOCK_F32] = {{"F32", 1, 4}, {0}},
    [BLOCK_F16] = {{"F16", 1, 2}, {0}},
    [BLOCK_BF16] = {{"BF16", 1, 2}, {0}},
    [BLOCK_Q4_0] = {{"Q4_0", 32, 18}, {.n_bits = 4, .offset = 8}},
    [BLOCK_Q4_1] = {{"Q4_1", 32, 20}, {.n_bits = 4, .has_m = true}},
    [BLOCK_Q5_0] = {{"Q5_0", 32, 22}, {.n_bits = 5, .offset = 16}},
    [BLOCK_Q5_1] = {{"Q5_1", 32, 24}, {.n_bits = 5, .has_m = true}},
    [BLOCK_Q8_0] = {{"Q8_0", 32, 34}, {.n_bits = 8}},
    [BLOCK_IQ4_NL] = {{"IQ4_NL", 32, 18}, {.n_bits = 4}},
    [BLOCK_Q2_K] = {{"Q2_K", 256, 84}, {.n_bits = 2, .n_scale = 16, .has_m = true, .has_min = true, .fine = true}},
    [BLOCK_Q3_K] = {{"Q3_K", 256, 110}, {.n_bits = 3, .offset = 4, .n_scale = 16, .fine = true}},
    [BLOCK_Q4_K] = {{"Q4_K", 256, 144}, {.n_bits = 4, .n_scale = 8, .has_m = true, .has_min = true}},
    [BLOCK_Q5_K] = {{"Q5_K", 256, 176}, {.n_bits = 5, .n_scale = 8, .has_m = true, .has_min = true}},
    [BLOCK_Q6_K] = {{"Q6_K", 256, 210}, {.n_bits = 6, .offset = 32, .n_scale = 16, .fine = true}},
};

static const struct known_type *known_find(uint32_t type)
{
    return type < sizeof known / sizeof known[0] && known[type].info.name ? &known[type] : NULL;
}

const block_info *block_info_get(uint32_t type)
{
    const struct known_type *k = known_find(type);
    return k ? &k->info : NULL;
}

const block_traits *block_traits_get(block_type type)
{
    const struct known_type *k = known_find(type);
    return k && k->traits.n_bits ? &k->traits : NULL;
}

const char *block_type_name(uint32_t type)
{
    static const struct {
        uint32_t type;
        const char *name;
    } unsupported[] = {
        {9, "Q8_1"},   {15, "Q8_K"},   {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {21, "IQ3_S"},
        {22, "IQ2_S"}, {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},    {26, "I32"},     {27, "I64"},   {28, "F64"},
        {29, "IQ1_M"}, {34, "TQ1_0"},  {35, "TQ2_0"},   {39, "MXFP4"},  {40, "NVFP4"},
    };
    const struct known_type *k = known_find(type);
    if (k) return k->info.name;
    for (size_t i = 0; i < sizeof unsupported / sizeof unsupported[0]; i++)
        if (unsupported[i].type == type) return unsupported[i].name;
    return NULL;
}

float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023, bits;
    if (exponent == 0) {
        float magnitude = (float)mantissa * 0x1p-24f; /* zero and subnormals, exact */
        memcpy(&bits, &magnitude, sizeof bits);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0); /* NaNs become quiet, as the F16C instructions make them */
    } else {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

uint16_t f32_to_f16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff)); /* NaN */
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);                            /* 65536 and more, infinity */
    if (magnitude < 0x38800000) {
        /* Below 2^-14: adding 0.5 leaves the subnormal mantissa, rounded to nearest even, in the low bits. */
        float positive, sum;
        uint32_t sum_bits;
        memcpy(&positive, &magnitude, sizeof positive);
        sum = positive + 0.5f;
        memcpy(&sum_bits, &sum, sizeof sum_bits);
        return (uint16_t)(sign | (sum_bits - 0x3f000000));
    }
    magnitude += 0xfff + (magnitude >> 13 & 1); /* round to nearest even; may carry into infinity, as it should */
    return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

static uint16_t load_u16(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

const int8_t iq4_nl_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* q[i] |= bit i of bits, moved to bit `to`; i < 8. */
static void or_bits(uint8_t bits, int to, uint8_t *q)
{
    uint64_t word, spread = bits * 0x0101010101010101u & 0x8040201008040201u; /* byte i keeps bit i */
    spread = ((spread + 0x7f7f7f7f7f7f7f7fu) & 0x8080808080808080u) >> (7 - to);
    memcpy(&word, q, sizeof word);
    word |= spread;
    memcpy(q, &word, sizeof word);
}

/* out[n] |= bits [from, from + n_bits) of the bytes, moved to bit `to`. A loop that compilers vectorise. */
static void or_field(const uint8_t *bytes, int n, int from, int n_bits, int to, uint8_t *out)
{
    const int mask = (1 << n_bits) - 1;
    for (int i = 0; i < n; i++) out[i] |= (uint8_t)((bytes[i] >> from & mask) << to);
}

/* 256 quants of two bits: 32 bytes hold 128 of them, 32 to a shift. */
static void split_crumbs(const uint8_t *plane, int to, uint8_t *q)
{
    for (int i = 0; i < 8; i++) or_field(plane + 32 * (i / 4), 32, 2 * (i % 4), 2, to, q + 32 * i);
}

/* The 32-weight types: nibbles with weight j low and j + 16 high in byte j, and a bit per weight for the fifth. */
static void split_small(block_type type, const uint8_t *b, block_parts *p)
{
    const block_traits *traits = block_traits_get(type);
    p->d = load_u16(b);
    b += 2;
    p->m = 0;
    if (traits->has_m) {
        p->m = load_u16(b);
        b += 2;
    }
    if (traits->n_bits == 8) {
        memcpy(p->q, b, 32);
        return;
    }
    const uint8_t *high = b;
    if (traits->n_bits == 5) b += 4;
    for (int j = 0; j < 16; j++) {
        p->q[j] = b[j] & 15;
        p->q[j + 16] = b[j] >> 4;
    }
    for (int j = 0; j < 32 && traits->n_bits == 5; j += 8) or_bits(high[j / 8], 4, p->q + j);
}

/* Eight 6-bit scales and mins in 12 bytes. */
static void split_scales_6bit(const uint8_t *s, block_parts *p)
{
    for (int i = 0; i < 4; i++) {
        p->scale[i] = s[i] & 63;
        p->min[i] = s[i + 4] & 63;
        p->scale[i + 4] = (uint8_t)((s[i + 8] & 15) | (s[i] >> 2 & 48));
        p->min[i + 4] = (uint8_t)(s[i + 8] >> 4 | (s[i + 4] >> 2 & 48));
    }
}

static void split_q4_k_q5_k(block_type type, const uint8_t *b, block_parts *p)
{
    const uint8_t *high = type == BLOCK_Q5_K ? b + 16 : NULL, *q = high ? b + 48 : b + 16;
    p->d = load_u16(b);
    p->m = load_u16(b + 2);
    split_scales_6bit(b + 4, p);
    memset(p->q, 0, sizeof p->q);
    for (int i = 0; i < 8; i++) {
        or_field(q + 32 * (i / 2), 32, 4 * (i % 2), 4, 0, p->q + 32 * i);
        if (high) or_field(high, 32, i, 1, 4, p->q + 32 * i);
    }
}

static void split_q6_k(const uint8_t *b, block_parts *p)
{
    memset(p->q, 0, sizeof p->q);
    for (int i = 0; i < 4; i++) or_field(b + 64 * (i / 2), 64, 4 * (i % 2), 4, 0, p->q + 64 * i);
    split_crumbs(b + 128, 4, p->q);
    memcpy(p->scale, b + 192, 16);
    p->d = load_u16(b + 208);
}

static void split_q3_k(const uint8_t *b, block_parts *p)
{
    const uint8_t *s = b + 96;
    memset(p->q, 0, sizeof p->q);
    split_crumbs(b + 32, 0, p->q);
    for (int i = 0; i < 8; i++) or_field(b, 32, i, 1, 2, p->q + 32 * i);
    for (int i = 0; i < 16; i++) {
        int low = s[i % 8] >> 4 * (i / 8) & 15, high = s[8 + i % 4] >> 2 * (i / 4) & 3;
        p->scale[i] = (uint8_t)(int8_t)((low | high << 4) - 32);
    }
    p->d = load_u16(b + 108);
}

static void split_q2_k(const uint8_t *b, block_parts *p)
{
    for (int i = 0; i < 16; i++) {
        p->scale[i] = b[i] & 15;
        p->min[i] = b[i] >> 4;
    }
    memset(p->q, 0, sizeof p->q);
    split_crumbs(b + 16, 0, p->q);
    p->d = load_u16(b + 80);
    p->m = load_u16(b + 82);
}

void block_split(block_type type, const void *block, block_parts *parts)
{
    switch ((int)type) {
    case BLOCK_Q2_K: split_q2_k(block, parts); break;
    case BLOCK_Q3_K: split_q3_k(block, parts); break;
    case BLOCK_Q4_K:
    case BLOCK_Q5_K: split_q4_k_q5_k(type, block, parts); break;
    case BLOCK_Q6_K: split_q6_k(block, parts); break;
    default: split_small(type, block, parts); break;
    }
}

void block_scale(block_type type, const block_parts *parts, int sub, int half, float *scale, float *min)
{
    const block_traits *traits = block_traits_get(type);
    float d = f16_to_f32(parts->d), m = traits->has_m ? f16_to_f32(parts->m) : 0;
    if (!traits->n_scale) {
        *scale = d;
        *min = m;
        return;
    }
    int i = traits->fine ? 2 * sub + half : sub;
    *scale = d * (float)(traits->has_min ? (int)parts->scale[i] : (int)(int8_t)parts->scale[i]);
    *min = traits->has_min ? -(m * (float)parts->min[i]) : 0;
}

int block_value(block_type type, uint8_t q)
{
    if (type == BLOCK_Q8_0) return (int8_t)q;
    if (type == BLOCK_IQ4_NL) return iq4_nl_values[q];
    return q - block_traits_get(type)->offset;
}

void block_parts_values(block_type type, const block_parts *parts, float *out)
{
    const block_traits *traits = block_traits_get(type);
    int n = traits->n_scale ? 256 : 32;
    for (int i = 0; i < n; i += 16) {
        float scale, min;
        block_scale(type, parts, i / 32, i / 16 % 2, &scale, &min);
        for (int j = i; j < i + 16; j++) {
            out[j] = scale * (float)block_value(type, parts->q[j]);
            if (traits->has_m) out[j] += min;
        }
    }
}

static void floats_convert(block_type type, const uint8_t *b, int64_t n, float *out)
{
    if (type == BLOCK_F32) {
        memcpy(out, b, (size_t)n * sizeof *out);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = load_u16(b + 2 * i);
        uint32_t bits = (uint32_t)h << 16;
        if (type == BLOCK_F16)
            out[i] = f16_to_f32(h);
        else
            memcpy(&out[i], &bits, sizeof bits);
    }
}

void block_dequantize(block_type type, const void *blocks, int64_t n, float *out)
{
    const struct known_type *k = known_find(type);
    const uint8_t *b = blocks;
    if (!k->traits.n_bits) {
        floats_convert(type, b, n, out);
        return;
    }
    for (int64_t i = 0; i < n; i += k->info.n_weights, b += k->info.n_bytes) {
        block_parts parts;
        block_split(type, b, &parts);
        block_parts_values(type, &parts, out + i);
    }
}
