/* Matrix products on quantised weights.
 *
 * A `weight` is a matrix [n_out][n_in] made ready once at load. Block types with a packed layout are repacked into panels of 16 output rows so that
 * one vector holds the same four inputs of 16 rows (an integer dot product per 32-bit lane); the others point at the source blocks.
 * Activations are quantised to int8 in blocks of 32 with an f32 scale, once per input, and shared by every matrix that reads them; weights
 * in F32, F16 and BF16 are multiplied in f32 by the unquantised activations instead, without loss. */
#ifndef MATH_MATMUL_H
#define MATH_MATMUL_H

#include <stddef.h>
#include <stdint.h>

#include "base/base.h"
#include "math/blocks.h"

typedef struct matmul_kernels matmul_kernels; /* one table per instruction set, private to math */
extern const matmul_kernels matmul_scalar, matmul_avx2, matmul_avx512vnni;

typedef struct weight {
    block_type type;     /* of the source */
    int64_t n_out, n_in; /* rows, columns */
    const void *data;    /* packed panels or source blocks, row after row */
    size_t n_bytes;
    bool packed; /* data is in panels; otherwise it is the source's */
    bool owned;  /* data is freed by weight_free */
} weight;

/* Makes *w from source blocks [n_out][n_in]. Packs where that pays: w then owns memory and no longer needs source (true in w->packed). Otherwise w
 * refers to source, which must outlive it. Error: MEMORY; UNSUPPORTED if n_in is no multiple of the block. Parallel over the pool. */
quarry_code weight_make(weight *w, const matmul_kernels *kernels, thread_pool *pool, block_type type, int64_t n_out, int64_t n_in,
                        const void *source, quarry_error *error);
/* The same with the memory of an arena (weight_free then frees nothing), and how much of it that will take: 0 for types that are not packed. */
quarry_code weight_make_in(weight *w, arena *memory, const matmul_kernels *kernels, thread_pool *pool, block_type type, int64_t n_out,
                           int64_t n_in, const void *source, quarry_error *error);
size_t weight_packed_bytes(block_type type, int64_t n_out, int64_t n_in);
void weight_free(weight *w);
/* out[n_in] = row `row` dequantised exactly as the source blocks say (embedding look-up). */
void weight_row(const weight *w, int64_t row, float *out);

/* Activations of n_rows vectors of n_in floats; memory is the caller's. */
typedef struct activations {
    int64_t n_rows, n_in;
    const float *x; /* [n_rows][n_in], the caller's */
    bool
        precise; /* two int8 terms per float instead of one: what the first leaves is counted in 256ths of it, and rounding falls below that of f16 */
    void *quantized; /* activations_bytes() bytes, aligned to 64 */
} activations;

size_t activations_bytes(int64_t n_rows, int64_t n_in, bool precise);
/* Quantises x into a->quantized; parallel over the pool when large. n_in must be a multiple of 32 unless all weights it meets are plain floats. */
void activations_quantize(activations *a, const matmul_kernels *kernels, thread_pool *pool);

/* One product: y[n_rows][n_out] = x · wᵀ (+ bias[n_out] if not NULL) (+ y if accumulate). */
typedef struct matmul_job {
    const weight *w;
    const float *bias;
    float *y;
    bool accumulate;
} matmul_job;

/* Runs several products over the same activations in one parallel loop (q, k and v; gate and up). n_rows small: bandwidth-bound; large: tiled. */
void matmul_run(const matmul_kernels *kernels, thread_pool *pool, const activations *a, const matmul_job *jobs, int n_jobs);

/* After the coming loop of the pool, a product or another, these products will run: threads that wait for one another until then fetch what they
 * will read first, if they have so few rows of activations that memory is what they wait for. Only the weights of the jobs matter. */
void matmul_expect(thread_pool *pool, int64_t n_rows, const matmul_job *jobs, int n_jobs);

#endif
