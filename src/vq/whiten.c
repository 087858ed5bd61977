/* The metric of A2ATS and its k-means (arXiv 2502.12665; Arthur and Vassilvitskii, k-means++, 2007). */
#include <math.h>
#include <string.h>

#include "vq/vq.h"

quarry_code vq_cholesky(int d, const double *moments, double shrink, float *lower, float *inverse, arena *scratch, quarry_error *error)
{
    const size_t n = (size_t)d, cells = n * n;
    double *l = arena_alloc(scratch, 2 * cells, sizeof *l, error), squares = 0;
    if (!l) return QUARRY_ERROR_MEMORY;
    double *x = l + cells;
    for (size_t i = 0; i < cells; i++) squares += moments[i] * moments[i];
    const double scale = squares > 0 ? 1 / sqrt(squares / (double)cells) : 0;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++) {
            double sum = squares > 0 ? moments[i * n + j] * scale + (i == j ? shrink : 0) : (double)(i == j);
            for (size_t k = 0; k < j; k++) sum -= l[i * n + k] * l[j * n + k];
            if (i == j && !(sum > 0))
                return error_set(error, QUARRY_ERROR_UNSUPPORTED, "the moments of the queries are not positive definite");
            l[i * n + j] = i == j ? sqrt(sum) : sum / l[j * n + j];
            l[j * n + i] = i == j ? l[i * n + i] : 0;
        }
    memset(x, 0, cells * sizeof *x);
    for (size_t j = 0; j < n; j++)
        for (size_t i = j; i < n; i++) {
            double sum = i == j;
            for (size_t k = j; k < i; k++) sum -= l[i * n + k] * x[k * n + j];
            x[i * n + j] = sum / l[i * n + i];
        }
    for (size_t i = 0; i < cells; i++) {
        lower[i] = (float)l[i];
        inverse[i] = (float)x[i];
    }
    return QUARRY_OK;
}

quarry_code vq_root(int d, const double *moments, double exponent, double shrink, float *root, float *inverse, arena *scratch,
                    quarry_error *error)
{
    if (exponent == 1) return vq_cholesky(d, moments, shrink, root, inverse, scratch, error);
    const size_t cells = (size_t)d * (size_t)d;
    vq_metric metric = {d, root, inverse};
    vq_moments h = {d, 0, arena_alloc(scratch, cells, sizeof *h.sum, error)};
    if (!h.sum) return QUARRY_ERROR_MEMORY;
    double squares = 0, trace = 0;
    for (size_t i = 0; i < cells; i++) squares += moments[i] * moments[i];
    const double rms = sqrt(squares / (double)cells);
    for (size_t i = 0; i < cells; i++) h.sum[i] = rms > 0 ? (float)(moments[i] / rms) : 0;
    for (int i = 0; i < d; i++) trace += h.sum[(size_t)i * (size_t)d + (size_t)i];
    h.n = exponent > 0 && trace > 0; /* of none, the identity is made */
    return vq_metric_make(&metric, &h, (float)exponent, h.n ? (float)(shrink * d / trace) : 0, scratch, error);
}

/* Draws each further centroid with a probability in proportion to the squared distance to the nearest one drawn so far. */
static void seed_centroids(const math_kernels *kernels, const vq_points *x, int k, uint64_t seed, const float *norms, float *distance,
                           float *dots, float *centroids)
{
    const int64_t d = x->d;
    random_state random;
    random_seed(&random, seed);
    int64_t chosen = (int64_t)random_below(&random, (uint64_t)x->n);
    for (int64_t t = 0; t < x->n; t++) distance[t] = INFINITY;
    for (int j = 0;; j++) {
        float *centroid = centroids + j * d;
        memcpy(centroid, x->rows + chosen * x->row_stride, (size_t)d * sizeof *centroid);
        if (j + 1 == k) return;
        kernels->retrieval->product(centroid, d, 1, x->columns, x->column_stride, dots, x->n, 1, x->n, d, false);
        double total = 0;
        for (int64_t t = 0; t < x->n; t++) {
            const float to = fmaxf(norms[chosen] + norms[t] - 2 * dots[t], 0);
            if (to < distance[t]) distance[t] = to;
            total += distance[t];
        }
        double left = random_unit(&random) * total;
        chosen = -1;
        for (int64_t t = 0; t < x->n; t++) {
            if (!(distance[t] > 0)) continue;
            chosen = t;
            if ((left -= distance[t]) < 0) break;
        }
        if (chosen < 0) chosen = (int64_t)random_below(&random, (uint64_t)x->n); /* fewer different points than centroids */
    }
}

static float norm2(const float *x, int64_t d)
{
    float sum = 0;
    for (int64_t i = 0; i < d; i++) sum += x[i] * x[i];
    return sum;
}

/* Means of the assigned points, summed in double; a centroid without points stays. */
static void update_means(const vq_points *x, int k, const int32_t *assign, double *sums, int32_t *counts, float *centroids)
{
    const size_t d = (size_t)x->d;
    memset(sums, 0, (size_t)k * d * sizeof *sums);
    memset(counts, 0, (size_t)k * sizeof *counts);
    for (int64_t t = 0; t < x->n; t++) {
        double *sum = sums + (size_t)assign[t] * d;
        const float *row = x->rows + t * x->row_stride;
        counts[assign[t]]++;
        for (size_t i = 0; i < d; i++) sum[i] += row[i];
    }
    for (int j = 0; j < k; j++)
        for (size_t i = 0; counts[j] && i < d; i++) centroids[(size_t)j * d + i] = (float)(sums[(size_t)j * d + i] / counts[j]);
}

quarry_code vq_kmeans_converge(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, float *centroids,
                               int32_t *assign, int *used, arena *scratch, quarry_error *error)
{
    const size_t n = (size_t)x->n;
    float *norms = arena_alloc(scratch, 3 * n, sizeof *norms, error), *half = arena_alloc(scratch, (size_t)k, sizeof *half, error);
    int32_t *ints = arena_alloc(scratch, n + (size_t)k, sizeof *ints, error);
    double *sums = arena_alloc(scratch, (size_t)k * (size_t)x->d, sizeof *sums, error);
    if (!norms || !half || !ints || !sums) return QUARRY_ERROR_MEMORY;
    float *value = norms + n, *dots = value + n;
    int32_t *before = ints, *counts = ints + n;
    for (size_t t = 0; t < n; t++) norms[t] = norm2(x->rows + (int64_t)t * x->row_stride, x->d);
    seed_centroids(kernels, x, k, seed, norms, value, dots, centroids);
    memset(before, 0xff, n * sizeof *before);
    for (*used = 0;; ++*used) {
        for (int j = 0; j < k; j++) half[j] = 0.5f * norm2(centroids + (int64_t)j * x->d, x->d);
        kernels->retrieval->nearest(centroids, half, k, x->d, x->columns, x->column_stride, x->n, assign, value);
        if (*used == iterations || !memcmp(assign, before, n * sizeof *before)) return QUARRY_OK;
        memcpy(before, assign, n * sizeof *before);
        update_means(x, k, assign, sums, counts, centroids);
    }
}
