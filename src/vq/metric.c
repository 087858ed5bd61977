#include <math.h>
#include <string.h>

#include "vq/vq.h"

void vq_moments_add(vq_moments *h, const math_kernels *kernels, const float *q, int64_t n, int64_t stride)
{
    kernels->retrieval->product(q, 1, stride, q, stride, h->sum, h->d, h->d, h->d, n, true);
    h->n += n;
}

/* out = sum over i of values[i] * v_i v_i' for the rows v_i of vectors */
static void recompose(int d, const float *values, const float *vectors, float *out)
{
    memset(out, 0, (size_t)d * (size_t)d * sizeof *out);
    for (int i = 0; i < d; i++) {
        const float *v = vectors + (size_t)i * d;
        for (int j = 0; j < d; j++) {
            float factor = values[i] * v[j];
            for (int k = 0; k < d; k++) out[(size_t)j * d + k] += factor * v[k];
        }
    }
}

static void identity(int d, float *out)
{
    memset(out, 0, (size_t)d * (size_t)d * sizeof *out);
    for (int i = 0; i < d; i++) out[(size_t)i * d + i] = 1;
}

quarry_code vq_metric_make(vq_metric *m, const vq_moments *h, float alpha, float shrink, arena *scratch, quarry_error *error)
{
    int d = m->d;
    double trace = 0;
    for (int i = 0; i < d; i++) trace += h->sum[(size_t)i * d + i];
    if (h->n == 0 || !(trace > 0)) {
        identity(d, m->root);
        identity(d, m->inverse);
        return QUARRY_OK;
    }
    float *values = arena_alloc(scratch, (size_t)d * (size_t)(d + 2), sizeof *values, error);
    if (!values) return QUARRY_ERROR_MEMORY;
    float *powers = values + d, *vectors = powers + d;
    quarry_code code = vq_eigen(d, h->sum, values, vectors, scratch, error);
    if (code != QUARRY_OK) return code;
    float scale = (float)(d / trace);
    for (int i = 0; i < d; i++) powers[i] = powf(fmaxf(values[i], 0) * scale + shrink, alpha / 2);
    recompose(d, powers, vectors, m->root);
    for (int i = 0; i < d; i++) powers[i] = 1 / powers[i];
    recompose(d, powers, vectors, m->inverse);
    return QUARRY_OK;
}

/* Deals the axes, by falling eigenvalue, to the sub-vector with room whose product of eigenvalues is smallest; place[i] is the output
 * dimension of axis i (values ascend). */
static void deal_axes(int d, int n_sub, const float *values, int *place, float *load, int *filled)
{
    int d_sub = d / n_sub;
    for (int s = 0; s < n_sub; s++) {
        load[s] = 0;
        filled[s] = 0;
    }
    float floor = fmaxf(values[d - 1], 1e-30f) * 1e-6f;
    for (int i = d - 1; i >= 0; i--) {
        int best = -1;
        for (int s = 0; s < n_sub; s++)
            if (filled[s] < d_sub && (best < 0 || load[s] < load[best])) best = s;
        place[i] = best * d_sub + filled[best]++;
        load[best] += logf(fmaxf(values[i], floor) / floor);
    }
}

quarry_code vq_basis_make(vq_basis *b, const math_kernels *kernels, const vq_metric *metric, const float *x, int64_t n, int n_sub,
                          arena *scratch, quarry_error *error)
{
    size_t d = (size_t)b->d, cells = d * d;
    float *work = arena_alloc(scratch, 4 * cells + 2 * d, sizeof *work, error);
    int *ints = arena_alloc(scratch, 2 * d, sizeof *ints, error);
    if (!work || !ints) return QUARRY_ERROR_MEMORY;
    float *covariance = work, *half = covariance + cells, *vectors = half + cells, *axes = vectors + cells, *values = axes + cells;
    void (*product)(const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int64_t, int64_t, int64_t, bool) =
        kernels->retrieval->product;
    int64_t m = b->d;
    product(x, 1, m, x, m, covariance, m, m, m, n, false);
    product(metric->root, m, 1, covariance, m, half, m, m, m, m, false);
    product(half, m, 1, metric->root, m, covariance, m, m, m, m, false);
    quarry_code code = vq_eigen(b->d, covariance, values, vectors, scratch, error);
    if (code != QUARRY_OK) return code;
    deal_axes(b->d, n_sub, values, ints, values + d, ints + d);
    for (size_t i = 0; i < d; i++)
        for (size_t k = 0; k < d; k++) axes[k * d + (size_t)ints[i]] = vectors[i * d + k];
    product(metric->root, m, 1, axes, m, b->forward, m, m, m, m, false); /* x' root axes = (axes' root x)', root being symmetric */
    product(metric->inverse, m, 1, axes, m, b->query, m, m, m, m, false);
    return QUARRY_OK;
}
