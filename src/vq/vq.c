#include "vq/vq.h"

#include <math.h>
#include <string.h>

void vq_transpose(const float *rows, int64_t row_stride, int64_t n, int d, float *columns, int64_t column_stride)
{
    enum { TILE = 16 }; /* a tile of rows and its columns stay in L1 */
    for (int64_t first = 0; first < n; first += TILE) {
        int64_t end = first + TILE < n ? first + TILE : n;
        for (int i = 0; i < d; i++)
            for (int64_t t = first; t < end; t++) columns[i * column_stride + t] = rows[t * row_stride + i];
    }
}

/* ---- k-means ---- */

static float norm2(const float *x, int d)
{
    float sum = 0;
    for (int i = 0; i < d; i++) sum += x[i] * x[i];
    return sum;
}

static void half_norms(const float *centroids, int k, int d, float *half)
{
    for (int j = 0; j < k; j++) half[j] = 0.5f * norm2(centroids + (size_t)j * d, d);
}

static void count_assigned(const int32_t *assign, int64_t n, int k, int32_t *counts)
{
    memset(counts, 0, (size_t)k * sizeof *counts);
    for (int64_t t = 0; t < n; t++) counts[assign[t]]++;
}

/* Means of the assigned points; the centroid of an empty cluster becomes the point farthest from its own centroid, which is then out of
 * the running. value: x·c - |c|²/2. */
static void update(const vq_points *x, int k, float *centroids, const int32_t *assign, float *value, int32_t *counts)
{
    int d = x->d;
    count_assigned(assign, x->n, k, counts);
    memset(centroids, 0, (size_t)k * (size_t)d * sizeof *centroids);
    for (int64_t t = 0; t < x->n; t++) {
        float *centroid = centroids + (size_t)assign[t] * d;
        const float *row = x->rows + t * x->row_stride;
        for (int i = 0; i < d; i++) centroid[i] += row[i];
    }
    for (int j = 0; j < k; j++) {
        float *centroid = centroids + (size_t)j * d;
        if (counts[j]) {
            float inverse = 1 / (float)counts[j];
            for (int i = 0; i < d; i++) centroid[i] *= inverse;
            continue;
        }
        int64_t farthest = 0;
        float most = -INFINITY;
        for (int64_t t = 0; t < x->n; t++) {
            if (value[t] == INFINITY) continue;
            float distance = norm2(x->rows + t * x->row_stride, d) - 2 * value[t];
            if (distance > most) {
                most = distance;
                farthest = t;
            }
        }
        value[farthest] = INFINITY;
        memcpy(centroid, x->rows + farthest * x->row_stride, (size_t)d * sizeof *centroid);
    }
}

quarry_code vq_kmeans(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, float *centroids,
                      int32_t *assign, int32_t *counts, arena *scratch, quarry_error *error)
{
    float *value = arena_alloc(scratch, (size_t)x->n, sizeof *value, error);
    float *half = arena_alloc(scratch, (size_t)k, sizeof *half, error);
    if (!value || !half) return QUARRY_ERROR_MEMORY;
    random_state random;
    random_seed(&random, seed);
    for (int j = 0; j < k; j++) { /* one point of each of k runs of neighbours */
        int64_t t = (j * x->n + (int64_t)random_below(&random, (uint64_t)x->n)) / k;
        memcpy(centroids + (size_t)j * x->d, x->rows + t * x->row_stride, (size_t)x->d * sizeof *centroids);
    }
    for (int i = 0;; i++) {
        half_norms(centroids, k, x->d, half);
        kernels->retrieval->nearest(centroids, half, k, x->d, x->columns, x->column_stride, x->n, assign, value);
        if (i == iterations) break;
        update(x, k, centroids, assign, value, counts);
    }
    count_assigned(assign, x->n, k, counts);
    return QUARRY_OK;
}

/* Scratch of one group: its members, their points in both orders, and their clusters. */
typedef struct group_scratch {
    int64_t *member;
    float *rows, *columns, *centroids;
    int32_t *assign, *counts;
} group_scratch;

static bool group_scratch_make(group_scratch *g, size_t n, size_t k, size_t d, arena *scratch, quarry_error *error)
{
    g->member = arena_alloc(scratch, n, sizeof *g->member, error);
    g->rows = arena_alloc(scratch, n * d, sizeof *g->rows, error);
    g->columns = arena_alloc(scratch, (size_t)vq_column_stride((int64_t)n) * d, sizeof *g->columns, error);
    g->centroids = arena_alloc(scratch, k * d, sizeof *g->centroids, error);
    g->assign = arena_alloc(scratch, n, sizeof *g->assign, error);
    g->counts = arena_alloc(scratch, k, sizeof *g->counts, error);
    return g->member && g->rows && g->columns && g->centroids && g->assign && g->counts;
}

quarry_code vq_cluster(const math_kernels *kernels, const vq_points *x, int k, int iterations, uint64_t seed, int32_t *assign,
                       int32_t *n_clusters, arena *scratch, quarry_error *error)
{
    int n_groups = (int)sqrtf((float)k);
    int64_t d = x->d, seen = 0;
    group_scratch g;
    int32_t *group = arena_alloc(scratch, (size_t)x->n, sizeof *group, error);
    if (!group || !group_scratch_make(&g, (size_t)x->n, (size_t)k, (size_t)d, scratch, error)) return QUARRY_ERROR_MEMORY;
    quarry_code code = vq_kmeans(kernels, x, n_groups, iterations, seed, g.centroids, group, g.counts, scratch, error);
    *n_clusters = 0;
    for (int j = 0; j < n_groups && code == QUARRY_OK; j++) {
        vq_points part = {g.rows, g.columns, 0, d, 0, x->d};
        for (int64_t t = 0; t < x->n; t++) {
            if (group[t] != j) continue;
            memcpy(g.rows + part.n * d, x->rows + t * x->row_stride, (size_t)d * sizeof *g.rows);
            g.member[part.n++] = t;
        }
        if (part.n == 0) continue;
        /* one cluster, and of the others as many as the group has of the points */
        int64_t before = seen * (k - n_groups) / x->n;
        seen += part.n;
        int clusters = 1 + (int)(seen * (k - n_groups) / x->n - before);
        part.column_stride = vq_column_stride(part.n);
        vq_transpose(g.rows, d, part.n, x->d, g.columns, part.column_stride);
        code = vq_kmeans(kernels, &part, clusters, iterations, seed + (uint64_t)j, g.centroids, g.assign, g.counts, scratch, error);
        for (int64_t i = 0; i < part.n && code == QUARRY_OK; i++) assign[g.member[i]] = *n_clusters + g.assign[i];
        *n_clusters += clusters;
    }
    return code;
}

/* ---- product codes ---- */

quarry_code vq_codebook_train(vq_codebook *b, const math_kernels *kernels, const vq_points *y, int iterations, uint64_t seed,
                              int32_t *assign, arena *scratch, quarry_error *error)
{
    int d_sub = b->d / b->n_sub;
    size_t n = (size_t)y->n, cells = (size_t)d_sub * SCAN_CODES;
    float *centroids = arena_alloc(scratch, cells, sizeof *centroids, error);
    int32_t *own = arena_alloc(scratch, n, sizeof *own, error), counts[SCAN_CODES];
    if (!centroids || !own) return QUARRY_ERROR_MEMORY;
    for (int s = 0; s < b->n_sub; s++) {
        vq_points part = *y;
        part.rows += (int64_t)s * d_sub;
        part.columns += s * d_sub * y->column_stride;
        part.d = d_sub;
        int32_t *codes = assign ? assign + (size_t)s * n : own;
        quarry_code code = vq_kmeans(kernels, &part, SCAN_CODES, iterations, seed + (uint64_t)s, centroids, codes, counts, scratch, error);
        if (code != QUARRY_OK) return code;
        vq_transpose(centroids, d_sub, SCAN_CODES, d_sub, b->centroids + (size_t)s * cells, SCAN_CODES);
    }
    return QUARRY_OK;
}

void vq_encode(const vq_codebook *b, const math_kernels *kernels, const float *y, int64_t stride, int64_t n, int32_t *assign, float *values)
{
    enum { MAX_SUB = 64 };
    int d_sub = b->d / b->n_sub;
    float centroids[SCAN_CODES * MAX_SUB], half[SCAN_CODES];
    for (int s = 0; s < b->n_sub; s++) {
        vq_transpose(b->centroids + (size_t)s * d_sub * SCAN_CODES, SCAN_CODES, d_sub, SCAN_CODES, centroids, d_sub);
        half_norms(centroids, SCAN_CODES, d_sub, half);
        kernels->retrieval->nearest(centroids, half, SCAN_CODES, d_sub, y + s * d_sub * stride, stride, n, assign + s * n, values);
    }
}

void vq_pack(int n_sub, const int32_t *assign, int64_t n, int64_t first, uint8_t *codes)
{
    for (int s = 0; s < n_sub; s++) {
        const int32_t *from = assign + s * n;
        for (int64_t t = 0; t < n; t++) {
            int64_t lane = first + t;
            uint8_t *byte = codes + ((size_t)(lane / SCAN_BLOCK) * (size_t)n_sub + (size_t)s) * (SCAN_BLOCK / 2) + lane % 16;
            bool high = lane % SCAN_BLOCK >= 16;
            *byte = (uint8_t)(high ? (*byte & 15) | from[t] << 4 : (*byte & 240) | from[t]);
        }
    }
}

/* ---- int8 vectors ---- */

/* The largest magnitude; 0 for what is so small that its inverse would not be finite. Comparisons and not fmaxf, here and below: they are instructions everywhere. */
static float largest(const float *x, int d)
{
    float most = 0;
    for (int i = 0; i < d; i++) {
        const float size = fabsf(x[i]);
        most = size > most ? size : most;
    }
    return most > 1e-30f ? most : 0;
}

/* The nearest whole number, of two the even one, for -most <= x <= most < 2^22; what is no number, which only a hostile file holds, becomes `most`. */
static int32_t nearest(float x, float most)
{
    const float magic = 12582912; /* 1.5 * 2^23: the last bit of a sum with it is worth 1 */
    x = x < most ? x : most;
    x = x > -most ? x : -most;
    const float sum = x + magic;
    int32_t bits, zero;
    memcpy(&bits, &sum, sizeof bits);
    memcpy(&zero, &magic, sizeof zero);
    return bits - zero;
}

float vq_quantise_i4(const float *x, int d, uint8_t *out)
{
    const float most = largest(x, d), scale = most / 7, inverse = most > 0 ? 1 / scale : 0;
    for (int i = 0; i < d / 2; i++) out[i] = (uint8_t)((nearest(x[i] * inverse, 7) + 8) | (nearest(x[d / 2 + i] * inverse, 7) + 8) << 4);
    return scale;
}

float vq_quantise_i8(const float *x, int d, int8_t *out)
{
    const float most = largest(x, d);
    if (most == 0) {
        memset(out, 0, (size_t)d);
        return 0;
    }
    float scale = most / 127, inverse = 1 / scale;
    for (int i = 0; i < d; i++) out[i] = (int8_t)nearest(x[i] * inverse, 127);
    return scale;
}
