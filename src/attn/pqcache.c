/* pqcache (Zhang et al., arXiv 2407.12820): product codes of the keys, learned by plain k-means from the context at the end of the prompt: 2
 * sub-vectors of 6 bits as published. A token's score is the inner product of the query with its code's centroids; the best tokens are
 * read. Tokens that follow are coded with the same centroids. */
#include <math.h>
#include <string.h>

#include "attn/scored.h"
#include "vq/vq.h"

enum { OWN_SUBVECTORS, OWN_BITS };
enum { ITERATIONS = 12, MOST_BITS = 8 };

static int n_sub_of(const scored *p)
{
    int n = (int)p->options.own[OWN_SUBVECTORS];
    while (p->d % n != 0) n--; /* as many as divide the head */
    return n;
}

static int n_centroids_of(const scored *p)
{
    return 1 << (int)p->options.own[OWN_BITS];
}

static size_t unit_bytes(const scored *p)
{
    return (size_t)n_sub_of(p);
}

/* [n_sub][centroids][d / n_sub], then half of their squared lengths [n_sub][centroids] */
static size_t table_bytes(const scored *p)
{
    return (size_t)n_centroids_of(p) * (size_t)(p->d + n_sub_of(p)) * sizeof(float);
}

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    const scored *p = part->p;
    const int n_sub = n_sub_of(p), d = p->d / n_sub, most = n_centroids_of(p);
    const float *centroids = (const float *)part->tables, *half = centroids + (size_t)most * (size_t)p->d;
    float *key = arena_alloc(scratch, (size_t)p->d, sizeof *key, NULL);
    (void)n; /* a unit is a token */
    for (int64_t t = first; key && t < end; t++) {
        scored_key(part, t, key);
        for (int s = 0; s < n_sub; s++) {
            const float *c = centroids + (size_t)s * (size_t)most * (size_t)d;
            float best = -INFINITY;
            for (int j = 0; j < most && half[s * most + j] < INFINITY; j++) {
                float x = p->base.kernels->vector->dot(key + s * d, c + j * d, d) - half[s * most + j];
                if (x <= best) continue;
                best = x;
                part->units[t * n_sub + s] = (uint8_t)j;
            }
        }
    }
    return key != NULL;
}

static bool learn(const scored_part *part, int64_t n, arena *scratch)
{
    const scored *p = part->p;
    const int n_sub = n_sub_of(p), d = p->d / n_sub, most = n_centroids_of(p), k = n < most ? (int)n : most;
    float *centroids = (float *)part->tables, *half = centroids + (size_t)most * (size_t)p->d;
    float *key = arena_alloc(scratch, (size_t)p->d, sizeof *key, NULL);
    float *rows = arena_alloc(scratch, (size_t)n * (size_t)d, sizeof *rows, NULL);
    float *columns = arena_alloc(scratch, (size_t)d * (size_t)vq_column_stride(n), sizeof *columns, NULL);
    int32_t *assign = arena_alloc(scratch, (size_t)n, sizeof *assign, NULL),
            *counts = arena_alloc(scratch, (size_t)k, sizeof *counts, NULL);
    if (!key || !rows || !columns || !assign || !counts) return false;
    for (int s = 0; s < n_sub; s++) {
        for (int64_t t = 0; t < n; t++) {
            scored_key(part, t, key);
            memcpy(rows + t * d, key + s * d, (size_t)d * sizeof *rows);
        }
        vq_transpose(rows, d, n, d, columns, vq_column_stride(n));
        const vq_points points = {rows, columns, n, d, vq_column_stride(n), d};
        float *c = centroids + (size_t)s * (size_t)most * (size_t)d, *of = half + (size_t)s * (size_t)most;
        if (vq_kmeans(p->base.kernels, &points, k, ITERATIONS, (uint64_t)s, c, assign, counts, scratch, NULL) != QUARRY_OK) return false;
        for (int j = 0; j < most; j++) of[j] = j < k ? p->base.kernels->vector->dot(c + j * d, c + j * d, d) / 2 : INFINITY;
    }
    return encode(part, 0, n, n, scratch);
}

/* Counted: codes of so many bits, and the centroids in 16. */
static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const scored *p = part->p;
    const int n_sub = n_sub_of(p), d = p->d / n_sub, most = n_centroids_of(p);
    const float *centroids = (const float *)part->tables;
    float *lut = arena_alloc(scratch, (size_t)n_sub * (size_t)most, sizeof *lut, error);
    if (!lut) return false;
    for (int h = 0; h < p->group; h++) {
        for (int i = 0; i < n_sub * most; i++)
            lut[i] = p->base.kernels->vector->dot(q + h * p->d + i / most * d, centroids + (size_t)i * (size_t)d, d);
        for (int64_t t = 0; t < n; t++) {
            float sum = 0;
            for (int s = 0; s < n_sub; s++) sum += lut[s * most + part->units[t * n_sub + s]];
            scores[h * n + t] = sum;
        }
    }
    cost->index_bytes += (n * n_sub * (int64_t)p->options.own[OWN_BITS] + 7) / 8;
    cost->table_bytes += (int64_t)most * p->d * (int64_t)sizeof(uint16_t);
    return true;
}

static const scored_method method = {.type = &attn_pqcache,
                                     .defaults = {.budget = 0.03, .min = 16, .max = 0.3, .own = {2, 6}},
                                     .own = {"subvectors", "bits"},
                                     .least = {1, 1},
                                     .most = {256, MOST_BITS},
                                     .unit = 1,
                                     .unit_bytes = unit_bytes,
                                     .table_bytes = table_bytes,
                                     .learn = learn,
                                     .encode = encode,
                                     .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_pqcache = {
    .name = "pqcache",
    .summary = "reads the tokens whose product codes, learned by plain k-means, score highest (arXiv 2407.12820)",
    .options = "subvectors=2      of a key, each with a code\n"
               "bits=6            of a code\n" SCORED_OPTIONS("0.03", "0"),
    .create = create,
    SCORED_FUNCTIONS,
};
