/* vq: the heart. Quantise a vector x so that its inner products with the queries q that will be asked survive: minimise (x - x')' H (x - x'), H = E[q q'].
 * With M = H^α, that is ordinary k-means on M^½ x, and scores are (M^-½ q)·(M^½ x'). Knows vectors, not attention. */
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
void vq_moments_add(vq_moments *h, const math_kernels *kernels, const float *q, int64_t n, int64_t stride);

/* A metric: root[d][d] = M^½ and inverse[d][d] = M^-½, M = (d H / tr H + shrink I)^α. */
typedef struct vq_metric {
    int d;
    float *root, *inverse;
} vq_metric;
/* n == 0 moments give the identity. root and inverse are the caller's [d][d]. Symmetric eigenproblem by Jacobi rotations or LAPACK; see docs. scratch: arena. */
quarry_code vq_metric_make(vq_metric *m, const vq_moments *h, float alpha, float shrink, arena *scratch, quarry_error *error);

/* ---- k-means ---- */

/* Lloyd's iterations from k-means++ or a strided start over x[n][d]; centroids[k][d], assign[n], counts[k]. Empty clusters are re-seeded with the farthest point. Deterministic for a seed. */
quarry_code vq_kmeans(const math_kernels *kernels, const float *x, int64_t n, int d, int k, int iterations, uint64_t seed, float *centroids, int32_t *assign, int32_t *counts, arena *scratch, quarry_error *error);

/* ---- product codes ---- */

/* n_sub sub-vectors of d / n_sub dimensions, 16 centroids each, over y = R (x - mean) with R = rotation · M^½. */
typedef struct vq_codebook {
    int d, n_sub;
    float *mean;      /* [d] */
    float *transform; /* [d][d]: y = transform (x - mean) */
    float *query;     /* [d][d]: scores q·x = (query q)·y + q·mean, query = transform^-T */
    float *centroids; /* [n_sub][16][d / n_sub] */
} vq_codebook;

size_t vq_codebook_floats(int d, int n_sub);
void vq_codebook_bind(vq_codebook *b, int d, int n_sub, float *memory); /* points the fields into memory */
quarry_code vq_codebook_train(vq_codebook *b, const math_kernels *kernels, const vq_metric *metric, const float *x, int64_t n, int iterations, uint64_t seed, arena *scratch, quarry_error *error);
/* Codes of x[n][d] into 4-bit lanes of scan blocks (math/retrieval.h): token i of x goes to lane first + i; n and first need not be multiples of SCAN_BLOCK. */
quarry_code vq_encode(const vq_codebook *b, const math_kernels *kernels, const float *x, int64_t n, int64_t first, uint8_t *codes, arena *scratch, quarry_error *error);
/* Float tables lut[n_sub][16] of query q (scaled): score(token) = bias + sum over sub of lut[sub][code]. */
void vq_lut(const vq_codebook *b, const math_kernels *kernels, const float *q, float *lut, float *bias);

#endif
