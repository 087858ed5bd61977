/* vq: the heart. Quantise a vector x so that its inner products with the queries q that will be asked survive: minimise (x - x')' H (x -
 * x'), H = E[q q']. With M = H^α, that is ordinary k-means on M^½ x, and scores are (M^-½ q)·(M^½ x'). Knows vectors, not attention. */
#ifndef VQ_VQ_H
#define VQ_VQ_H

#include "base/base.h"
#include "math/math.h"

/* ---- the query-aware metric ---- */

/* H statistics of d-dimensional queries: sum of q q' and their count. */
typedef struct vq_moments {
    int d;
    int64_t n;
    float *sum; /* [d][d], symmetric */
} vq_moments;
/* Adds n queries, `stride` floats apart. */
void vq_moments_add(vq_moments *h, const math_kernels *kernels, const float *q, int64_t n, int64_t stride);

/* Eigenvalues (ascending) and unit eigenvectors (rows of vectors[d][d]) of the symmetric a[d][d]: Householder's reduction to a
 * tridiagonal matrix, then implicit QL steps (Golub and Van Loan, Matrix Computations, 8.3), in double precision. Own code and no
 * LAPACK, as the engine needs it while it reads: 0.3, 1.9 and 21 ms at d = 64, 128 and 256 (Zen 4). */
quarry_code vq_eigen(int d, const float *a, float *values, float *vectors, arena *scratch, quarry_error *error);

/* A metric: root[d][d] = M^½ and inverse[d][d] = M^-½, M = (d H / tr H + shrink I)^α. */
typedef struct vq_metric {
    int d;
    float *root, *inverse; /* the caller's memory */
} vq_metric;
/* Moments of nothing (n == 0 or all zero) give the identity. */
quarry_code vq_metric_make(vq_metric *m, const vq_moments *h, float alpha, float shrink, arena *scratch, quarry_error *error);

/* The metric of A2ATS (arXiv 2502.12665): lower[d][d] = L with L L' = H / rms(H) + shrink I, rms over the entries of H = moments[d][d], and inverse[d][d] = L^-1. Distances of
 * rows k L are those of k under H. Moments that are all zero give the identity; UNSUPPORTED if not positive definite. In double: at shrink = 1e-6 the small eigenvalues are lost in f32. Own
 * code, as it is a dozen lines and the library has no LAPACK. */
quarry_code vq_cholesky(int d, const double *moments, double shrink, float *lower, float *inverse, arena *scratch, quarry_error *error);

/* The same with an exponent: root root' = (H / rms(H) + shrink I)^exponent up to a factor. 1: vq_cholesky, 0: the identity, else a symmetric root (vq_metric_make). */
quarry_code vq_root(int d, const double *moments, double exponent, double shrink, float *root, float *inverse, arena *scratch,
                    quarry_error *error);

/* Coordinates in which a product code is good: y = R M^½ x with a rotation R onto the principal axes of M^½ x, dealt out to the
 * sub-vectors so that the products of their eigenvalues are balanced (Ge et al., Optimized Product Quantization, 2013, 4.2). q·x =
 * (query q)·y. Both matrices are stored by input dimension: y[j] = sum over i of x[i] forward[i][j]. */
typedef struct vq_basis {
    int d;
    float *forward, *query; /* [d][d]; the caller's memory */
} vq_basis;
/* x[n][d] are centred: their mean was subtracted. */
quarry_code vq_basis_make(vq_basis *b, const math_kernels *kernels, const vq_metric *metric, const float *x, int64_t n, int n_sub,
                          arena *scratch, quarry_error *error);

/* ---- k-means ---- */

/* Points in both orders, as k-means reads them: rows for sums, columns for distances. */
typedef struct vq_points {
    const float *rows;    /* [n][row_stride] */
    const float *columns; /* [d][column_stride] */
    int64_t n, row_stride, column_stride;
    int d;
} vq_points;

/* Distance of columns in a matrix of n of them: not a multiple of a page, so that the rows of a column do not fall on the same cache
 * set. */
static inline int64_t vq_column_stride(int64_t n)
{
    return (n + 15) / 16 * 16 + 16;
}
/* columns[d][column_stride] of rows[n][row_stride]. */
void vq_transpose(const float *rows, int64_t row_stride, int64_t n, int d, float *columns, int64_t column_stride);

/* Lloyd's iterations from a stratified random start; centroids[k][d], assign[n] (nearest of the final centroids), counts[k]. While it
 * iterates, empty clusters are re-seeded with the points farthest from their centroids; at the end some may be empty. 1 <= k.
 * Deterministic for a seed. */
quarry_code vq_kmeans(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, float *centroids,
                      int32_t *assign, int32_t *counts, arena *scratch, quarry_error *error);

/* The same from k-means++ seeds until no point changes its centroid, at most `iterations` times; *used: how many were. Means are summed in double. A centroid without points
 * stays where it is. */
quarry_code vq_kmeans_converge(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, float *centroids,
                               int32_t *assign, int *used, arena *scratch, quarry_error *error);

/* At most k clusters by k-means in two levels, about sqrt(k) groups and then each group by itself: a fifth of the work of one level at k
 * = 128. assign[n]; returns their number in *n_clusters (some may be empty). 1 <= k <= n. */
quarry_code vq_cluster(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, int32_t *assign,
                       int32_t *n_clusters, arena *scratch, quarry_error *error);

/* ---- product codes ---- */

/* n_sub sub-vectors of d_sub = d / n_sub dimensions, 16 centroids each. */
typedef struct vq_codebook {
    int d, n_sub;
    float *centroids; /* [n_sub][d_sub][16] */
} vq_codebook;

/* Learns centroids from y, which should be centred. assign, if not NULL, receives the codes [n_sub][n]. */
quarry_code vq_codebook_train(vq_codebook *b, const math_kernels *kernels, const vq_points *y, int iterations, uint64_t seed,
                              int32_t *assign, arena *scratch, quarry_error *error);
/* Codes of columns y[d][stride] to assign[n_sub][n]. */
void vq_encode(const vq_codebook *b, const math_kernels *kernels, const float *y, int64_t stride, int64_t n, int32_t *assign,
               float *values /*[n], scratch*/);
/* Puts assign[n_sub][n] into 4-bit lanes of scan blocks (math/retrieval.h): token i goes to lane first + i; n and first need not be
 * multiples of SCAN_BLOCK. */
void vq_pack(int n_sub, const int32_t *assign, int64_t n, int64_t first, uint8_t *codes);
static inline size_t vq_code_bytes(int n_sub, int64_t n)
{
    return (size_t)((n + SCAN_BLOCK - 1) / SCAN_BLOCK) * (size_t)n_sub * (SCAN_BLOCK / 2);
}

/* ---- int8 vectors ---- */

/* x[d] = scale * out to half a step; returns scale (0 for a zero vector). */
float vq_quantise_i8(const float *x, int d, int8_t *out);

/* x[d] = scale * (nibble - 8) to half a step, nibbles 1 to 15, in bytes out[d / 2] as dot_i4 reads them (math/retrieval.h); returns scale
 * (0 for a zero vector). d is even. */
float vq_quantise_i4(const float *x, int d, uint8_t *out);

#endif
