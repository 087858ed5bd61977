/* Private to math: what blocks and matrix products share. */
#ifndef MATH_MATMUL_INTERNAL_H
#define MATH_MATMUL_INTERNAL_H

#include "math/matmul.h"

/* A source block taken apart without loss. */
typedef struct block_parts {
    uint16_t d, m;     /* f16 */
    uint8_t scale[16]; /* K types: one per 16 or 32 weights; int8 for Q3_K and Q6_K */
    uint8_t min[16];   /* Q2_K, Q4_K, Q5_K */
    uint8_t q[256];    /* quants, unsigned (Q8_0: two's complement) */
} block_parts;

/* What the quantised types have in common: weight = scale * value(q) [+ min]. */
typedef struct block_traits {
    uint8_t n_bits;  /* of a quant */
    uint8_t offset;  /* value(q) = q - offset; IQ4_NL: a table */
    uint8_t n_scale; /* 8-bit scales per block (0: d alone) */
    bool has_m;      /* a second f16 */
    bool has_min;    /* 8-bit mins beside the scales (min = -m * min) */
    bool fine;       /* a scale spans 16 weights instead of 32 */
} block_traits;

/* NULL for plain floats. */
const block_traits *block_traits_get(block_type type);
extern const int8_t iq4_nl_values[16];

void block_split(block_type type, const void *block, block_parts *parts);
/* Scale and min (0 if none) of the weights [32 sub + 16 half, + 16). */
void block_scale(block_type type, const block_parts *parts, int sub, int half, float *scale, float *min);
int block_value(block_type type, uint8_t q);
/* The weights of a split block as block_dequantize gives them. */
void block_parts_values(block_type type, const block_parts *parts, float *out);

/* Packed weights. A panel is 16 output rows; it is a sequence of panel blocks of 32 (K types: 256) inputs:
 *
 *     [d f16[16]] [m f16[16]] [scales u8[n_scale][16]] [mins u8[n_scale][16]]      the fields the type has (Q2_K: one byte holds scale | min << 4)
 *     per 32 inputs: [low plane][high plane]
 *
 * A plane of b bits is 64 b bytes. Vector v of a sub-block (v < 8) holds inputs 4v … 4v+3 of the 16 rows, byte 4 row + i for input 4v + i. Four bits: vectors v
 * and v + 4 share 64 bytes (low and high nibbles, as in the source blocks); one and two bits: 8/b consecutive vectors do, vector v at bit b * (v % (8/b)). A
 * quant of 5, 6 or 3 bits is a low plane of 4, 4 or 2 bits and a high plane
 * of the rest. So one 64-byte load and a shift give the same four inputs of 16 rows, and the size is the source's (Q4_K, Q5_K, Q3_K: up to 3.6 % more,
 * their 6-bit scales are kept in bytes). */
enum { PANEL_ROWS = 16, SUB_BLOCK = 32 };

typedef struct panel_layout {
    uint16_t n_weights;             /* inputs per panel block */
    uint16_t n_bytes;               /* of a panel block */
    uint16_t m, scale, min, planes; /* offsets in bytes */
    uint16_t sub_bytes;             /* of the planes of 32 inputs */
    uint8_t low_bits, high_bits;
} panel_layout;

void panel_layout_get(block_type type, panel_layout *layout);
/* Writes row `row` of a panel block, and reads it back. */
void panel_put_block(block_type type, const panel_layout *layout, uint8_t *block, int row, const uint8_t *source);
void panel_get(block_type type, const panel_layout *layout, const uint8_t *block, int row, block_parts *parts);

/* 32 inputs of a panel as integers and f32 scales. */
typedef struct panel_values {
    int8_t q[8][64];                /* [vector][4 row + i] */
    float scale[2][16], min[2][16]; /* [half][row] */
} panel_values;

void panel_unpack(block_type type, const panel_layout *layout, const uint8_t *block, int sub, panel_values *values);

/* Quantised activations: groups of rows (the last one smaller), the most a register tile takes. A group of n rows is, for each 32 inputs,
 *
 *     [int8 quants [n][32]] [activation_scale [n]]              ACTIVATION_GROUP rows
 *     [int8 quants [n][2][32]] [activation_scale [n]]           precise, half as many: q = 256 * first + second
 *
 * The second term counts in 256ths of the first, so that one integer holds the dot product of both: |sum| <= 256 * 255 * 127 * 32 < 2^28.
 */
typedef struct activation_scale {
    float d;          /* x = d * q; NaN if any of the 32 is not finite */
    float sum;        /* d * sum of q */
    int32_t minus;    /* -sum of q */
    int32_t minus_lo; /* -sum of the first 16 q */
} activation_scale;

enum { ACTIVATION_GROUP = 16, PAIR_BITS = 8 };

/* Rows with one term: a block whose scale is far above the others of its row (a massive activation) loses the most in rounding. What the first term
 * leaves of blocks with d^2 > REST_LIMIT times the row's mean d^2, fewer than one in REST_LIMIT, is quantised again and kept beside the groups: a
 * list for each, by block and then by row. SmolLM2 Q4_1: divergence from unrounded activations 3.7e-3 without, 1.2e-3 for a limit of 4, 1.4e-3 for 8. */
enum { REST_LIMIT = 8 };

typedef struct rest_block {
    int8_t q[SUB_BLOCK];
    activation_scale scale;
    int32_t block, row; /* row within the group */
    int32_t unused[2];
} rest_block;

typedef struct rest_list {
    int32_t n;
    int32_t unused[15];
    rest_block blocks[];
} rest_list;

static inline size_t rest_list_bytes(int64_t n_in)
{
    return sizeof(rest_list) + ACTIVATION_GROUP * (size_t)(n_in / SUB_BLOCK / REST_LIMIT) * sizeof(rest_block);
}

static inline const rest_list *rest_list_at(const rest_list *rests, int64_t group, int64_t n_in)
{
    return (const rest_list *)(const void *)((const uint8_t *)rests + (size_t)group * rest_list_bytes(n_in));
}

/* Bytes of 32 inputs of a row, and rows of a full group. */
static inline int activation_row_bytes(bool pairs)
{
    return (pairs ? 2 : 1) * SUB_BLOCK + (int)sizeof(activation_scale);
}

static inline int activation_group(bool pairs)
{
    return pairs ? ACTIVATION_GROUP / 2 : ACTIVATION_GROUP;
}

/* The result of each output is one chain of f32 operations in the order of the inputs, the same for every batch size, tile and instruction set: per 32
 * inputs (16 where a scale spans 16)
 *
 *     y = fma((float)integer dot product, scale_w * d, y);  then, with mins, y = fma(min_w, sum, y)
 *
 * and the same for the rests of the row, if it has any, in the order of the inputs. (Q2_K: lo, hi, then min_lo * (d * sum_lo), min_hi * (d * sum_hi).) Float weights: 16 (scalar: 1, AVX2: 8) partial sums, so equal for every batch size only. */
struct matmul_kernels {
    /* One group: x[n][n_in] to the layout above. */
    void (*quantize)(const float *x, int n, int64_t n_in, uint8_t *out);
    /* The same for precise activations, n <= ACTIVATION_GROUP / 2. */
    void (*quantize_pairs)(const float *x, int n, int64_t n_in, uint8_t *out);
    /* out[n][16] = one panel times n rows from the start of a group on; rests: the lists of these groups, NULL for precise rows. */
    void (*panel)(block_type type, const uint8_t *panel, int64_t n_in, const uint8_t *quantized, const rest_list *rests, int64_t n,
                  float *out);
    /* out[n][16] = n_w <= 16 rows of F32, F16 or BF16 weights times x[n][n_in]; columns from n_w on are not written. */
    void (*floats)(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out);
};

/* Bytes of quantised activations of n rows. */
static inline size_t activation_bytes(int64_t n, int64_t n_in, bool pairs)
{
    return (size_t)n * (size_t)((n_in + SUB_BLOCK - 1) / SUB_BLOCK) * (size_t)activation_row_bytes(pairs);
}

/* The functions of the tables; a table may borrow those of a lower level. */
void activations_quantize_scalar(const float *x, int n, int64_t n_in, uint8_t *out);
void activations_quantize_avx2(const float *x, int n, int64_t n_in, uint8_t *out);
void activations_quantize_pairs_avx2(const float *x, int n, int64_t n_in, uint8_t *out);
void floats_product_avx2(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out);
void floats_product_avx512(block_type type, const void *w, int n_w, int64_t n_in, const float *x, int64_t n, float *out);

#endif
