/* Block types of GGUF tensors: sizes, names, and scalar dequantisation (the specification). Layouts as in ggml. */
#ifndef MATH_BLOCKS_H
#define MATH_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/base.h"

/* Values are GGUF's own type numbers. */
typedef enum block_type {
    BLOCK_F32 = 0,
    BLOCK_F16 = 1,
    BLOCK_Q4_0 = 2,
    BLOCK_Q4_1 = 3,
    BLOCK_Q5_0 = 6,
    BLOCK_Q5_1 = 7,
    BLOCK_Q8_0 = 8,
    BLOCK_Q2_K = 10,
    BLOCK_Q3_K = 11,
    BLOCK_Q4_K = 12,
    BLOCK_Q5_K = 13,
    BLOCK_Q6_K = 14,
    BLOCK_IQ4_NL = 20,
    BLOCK_BF16 = 30,
} block_type;

typedef struct block_info {
    const char *name;   /* "Q4_1" */
    uint32_t n_weights; /* per block */
    uint32_t n_bytes;   /* per block */
} block_info;

/* NULL for a type this version does not know. */
const block_info *block_info_get(uint32_t type);
/* Name for messages, also of types known but not supported ("IQ2_XXS"); "type 99" forms are the caller's. NULL if unknown. */
const char *block_type_name(uint32_t type);
/* Dequantises n weights (a multiple of the block's) to out[n]. */
void block_dequantize(block_type type, const void *blocks, int64_t n, float *out);
/* Quantises (scalar; for tests and tiny models): F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Returns false for other types. */
bool block_quantize(block_type type, const float *x, int64_t n, void *blocks);

float f16_to_f32(uint16_t h);
uint16_t f32_to_f16(float x); /* round to nearest even */

#endif
