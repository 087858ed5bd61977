/* math: kernels. `*_scalar.c` is the specification; one file per instruction set beside it, chosen at run time per function.
 * Nothing above this room names a kernel: it takes the tables from a `math_kernels`. */
#ifndef MATH_MATH_H
#define MATH_MATH_H

#include "math/attention.h"
#include "math/blocks.h"
#include "math/matmul.h"
#include "math/retrieval.h"
#include "math/vector.h"

typedef struct math_kernels {
    const char *isa;                    /* name of the level chosen */
    const vector_kernels *vector;       /* norm, RoPE, activation, conversions */
    const matmul_kernels *matmul;       /* quantised matrix products */
    const attention_kernels *attention; /* attention over K|V rows */
    const retrieval_kernels *retrieval; /* code scans, cluster scores and tails */
} math_kernels;

/* The tables for an instruction set level; each function is the best one that exists at or below it. Static, immutable. */
const math_kernels *math_kernels_get(cpu_isa isa);

#endif
