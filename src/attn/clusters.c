/* clusters (RetroInfer, Chen et al., arXiv 2505.02922): clusters of about 16 tokens by k-means on centred keys, made at the end of the prompt
 * in segments of 8,192 tokens. Each query head ranks the centroids: the tokens of the best clusters are read (the retrieval zone), the next
 * ones are estimated by centroid, mean value and size (the estimation zone), the rest is dropped. Tokens that follow are clustered as runs
 * of 16; the first of them may fill the prompt's last place and join the cluster of its number. As published the clusters of the retrieval zone are read whole; here the last one may be cut at the budget. */
#include <math.h>
#include <string.h>

#include "attn/choose.h"
#include "attn/scored.h"
#include "vq/vq.h"

enum { OWN_ESTIMATE };
enum { SIZE = 16, SEGMENT = 8192, ITERATIONS = 6 };

/* A unit is the place of 16 tokens, and of one cluster: there are not more clusters than places. */
typedef struct place {
    int32_t cluster[SIZE]; /* of these tokens */
    float count;           /* of the cluster of this number; then its centroid [d] and the mean of its values [d] */
} place;

static size_t unit_bytes(const scored *p)
{
    return sizeof(place) + 2 * (size_t)p->d * sizeof(float);
}

static size_t table_bytes(const scored *p)
{
    (void)p;
    return 0;
}

static place *place_at(const scored_part *part, int64_t i)
{
    return (place *)(part->units + (size_t)i * part->p->unit_bytes);
}

static float *centroid_of(place *c)
{
    return &c->count + 1;
}

/* Centroids and values of the clusters [from, to) from the tokens [first, end) that belong to them. */
static void fill(const scored_part *part, int64_t from, int64_t to, int64_t first, int64_t end, float *row)
{
    const int d = part->p->d;
    for (int64_t c = from; c < to; c++) memset(&place_at(part, c)->count, 0, (1 + 2 * (size_t)d) * sizeof(float));
    for (int64_t t = first; t < end; t++) {
        place *c = place_at(part, place_at(part, t / SIZE)->cluster[t % SIZE]);
        float *centroid = centroid_of(c), *value = centroid + d;
        c->count += 1;
        scored_key(part, t, row);
        for (int i = 0; i < d; i++) centroid[i] += (row[i] - centroid[i]) / c->count;
        scored_value(part, t, row);
        for (int i = 0; i < d; i++) value[i] += (row[i] - value[i]) / c->count;
    }
}

static bool cluster_segment(const scored_part *part, int64_t first, int64_t end, arena *scratch)
{
    const scored *p = part->p;
    const int64_t d = p->d, n = end - first, stride = vq_column_stride(n);
    float *rows = arena_alloc(scratch, (size_t)(n * d), sizeof *rows, NULL), *mean = arena_alloc(scratch, (size_t)d, sizeof *mean, NULL);
    float *columns = arena_alloc(scratch, (size_t)(d * stride), sizeof *columns, NULL);
    int32_t *assign = arena_alloc(scratch, (size_t)n, sizeof *assign, NULL), n_clusters;
    if (!rows || !mean || !columns || !assign) return false;
    memset(mean, 0, (size_t)d * sizeof *mean);
    for (int64_t t = 0; t < n; t++) {
        scored_key(part, first + t, rows + t * d);
        for (int64_t i = 0; i < d; i++) mean[i] += rows[t * d + i] / (float)n;
    }
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < d; i++) rows[t * d + i] -= mean[i];
    vq_transpose(rows, d, n, (int)d, columns, stride);
    const vq_points points = {rows, columns, n, d, stride, (int)d};
    const int64_t from = first / SIZE, to = (end + SIZE - 1) / SIZE;
    if (vq_cluster(p->base.kernels, &points, (int)(to - from), ITERATIONS, (uint64_t)first, assign, &n_clusters, scratch, NULL) !=
        QUARRY_OK)
        return false;
    for (int64_t t = 0; t < n; t++) place_at(part, (first + t) / SIZE)->cluster[(first + t) % SIZE] = (int32_t)from + assign[t];
    fill(part, from, to, first, end, mean);
    return true;
}

static bool learn(const scored_part *part, int64_t n, arena *scratch)
{
    for (int64_t first = 0; first < n; first += SEGMENT)
        if (!cluster_segment(part, first, first + SEGMENT < n ? first + SEGMENT : n, scratch)) return false;
    return true;
}

/* Runs of tokens that follow; the last place of the prompt may have room for some, which join the cluster of its number. */
static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    float *row = arena_alloc(scratch, (size_t)part->p->d, sizeof *row, NULL);
    if (!row) return false;
    for (int64_t t = first * SIZE > part->p->n_coded ? first * SIZE : part->p->n_coded; t < n; t++)
        place_at(part, t / SIZE)->cluster[t % SIZE] = (int32_t)(t / SIZE);
    for (int64_t c = first; c < end; c++) {
        place *to = place_at(part, c);
        const int d = part->p->d;
        if (c > first || part->p->n_coded % SIZE == 0) memset(&to->count, 0, (1 + 2 * (size_t)d) * sizeof(float));
        for (int64_t t = c * SIZE > part->p->n_coded ? c * SIZE : part->p->n_coded; t < (c + 1) * SIZE && t < n; t++) {
            float *centroid = centroid_of(to), *value = centroid + d;
            to->count += 1;
            scored_key(part, t, row);
            for (int i = 0; i < d; i++) centroid[i] += (row[i] - centroid[i]) / to->count;
            scored_value(part, t, row);
            for (int i = 0; i < d; i++) value[i] += (row[i] - value[i]) / to->count;
        }
    }
    return true;
}

static void score_clusters(const scored_part *part, const float *q, int64_t n_clusters, float *scores)
{
    const int d = part->p->d;
    for (int h = 0; h < part->p->group; h++)
        for (int64_t c = 0; c < n_clusters; c++)
            scores[h * n_clusters + c] = part->p->base.kernels->vector->dot(q + h * d, centroid_of(place_at(part, c)), d);
}

/* Counted: centroids in 16 bits, and a number for every token. */
static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const int64_t n_clusters = (n + SIZE - 1) / SIZE;
    float *of_clusters = arena_alloc(scratch, (size_t)part->p->group * (size_t)n_clusters, sizeof *of_clusters, error);
    if (!of_clusters) return false;
    score_clusters(part, q, n_clusters, of_clusters);
    for (int h = 0; h < part->p->group; h++)
        for (int64_t t = 0; t < n; t++) scores[h * n + t] = of_clusters[h * n_clusters + place_at(part, t / SIZE)->cluster[t % SIZE]];
    cost->index_bytes += n_clusters * part->p->d * (int64_t)sizeof(uint16_t) + n * (int64_t)sizeof(uint16_t);
    return true;
}

/* The best clusters of which nothing was read, as many as the share `estimate` of all. */
static void estimate(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                     const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    const scored *p = (const scored *)policy;
    if (p->inner) {
        scored_tail(policy, layer, head, q, sel, scores, rows, scratch, state, cost);
        return;
    }
    const int64_t n_clusters = (p->n_coded + SIZE - 1) / SIZE, k = (int64_t)(p->options.own[OWN_ESTIMATE] * (double)n_clusters);
    const int g = p->group, d = p->d;
    if (sel->all || k == 0) return;
    scored_part part = scored_part_of(p, NULL, layer, head);
    float *of_clusters = arena_alloc(scratch, (size_t)g * (size_t)n_clusters, sizeof *of_clusters, NULL);
    float *scaled = arena_alloc(scratch, (size_t)(g * d), sizeof *scaled, NULL);
    bool *touched = arena_alloc(scratch, 2 * (size_t)n_clusters, sizeof *touched, NULL), *estimated = touched + n_clusters;
    uint16_t *keys = arena_alloc(scratch, (size_t)cut_padded(n_clusters), sizeof *keys, NULL);
    if (!of_clusters || !scaled || !touched || !keys) return; /* dropped, as the rest is */
    memset(touched, 0, 2 * (size_t)n_clusters * sizeof *touched);
    for (int64_t i = 0; i < sel->n; i++) {
        int64_t t = sel->ids[i] - ATTN_SINKS;
        if (t < p->n_coded) touched[place_at(&part, t / SIZE)->cluster[t % SIZE]] = true;
    }
    for (int i = 0; i < g * d; i++) scaled[i] = q[i] * p->base.shape.scale;
    score_clusters(&part, scaled, n_clusters, of_clusters);
    for (int h = 0; h < g; h++) {
        const float *s = of_clusters + h * n_clusters;
        float low = INFINITY, high = -INFINITY;
        for (int64_t c = 0; c < n_clusters; c++) {
            low = fminf(low, s[c]);
            high = fmaxf(high, s[c]);
        }
        memset(keys, 0, (size_t)cut_padded(n_clusters) * sizeof *keys);
        int64_t free = 0;
        for (int64_t c = 0; c < n_clusters; c++) {
            if (touched[c] || place_at(&part, c)->count == 0) continue;
            keys[c] = (uint16_t)(1 + (high > low ? (s[c] - low) / (high - low) * (UINT16_MAX - 1) : 0));
            free++;
        }
        if (free == 0) continue;
        cut to = cut_find(p->base.kernels->retrieval, keys, cut_padded(n_clusters), k < free ? k : free, 0, cut_padded(n_clusters),
                          CUT_BEYOND, 0);
        for (int64_t c = 0; c < n_clusters; c++) {
            if (keys[c] == 0 || keys[c] < to.threshold || (keys[c] == to.threshold && to.n_ties-- <= 0)) continue;
            place *from = place_at(&part, c);
            const float *value = centroid_of(from) + d, top = fmaxf(state->m[h], s[c]), before = expf(state->m[h] - top);
            const float mass = from->count * expf(s[c] - top);
            state->l[h] = state->l[h] * before + mass;
            state->m[h] = top;
            for (int i = 0; i < d; i++) state->o[h * d + i] = state->o[h * d + i] * before + mass * value[i];
            if (!estimated[c]) cost->tail_bytes += d * (int64_t)sizeof(uint16_t); /* heads of a group share what is read */
            estimated[c] = true;
        }
    }
}

static const scored_method method = {.type = &attn_clusters,
                                     .defaults = {.budget = 0.03, .min = 16, .max = 0.3, .own = {0.25}},
                                     .own = {"estimate"},
                                     .most = {1},
                                     .unit = SIZE,
                                     .unit_bytes = unit_bytes,
                                     .table_bytes = table_bytes,
                                     .learn = learn,
                                     .encode = encode,
                                     .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_clusters = {
    .name = "clusters",
    .summary = "reads the best clusters of keys, estimates the next ones, drops the rest (RetroInfer, arXiv 2505.02922)",
    .options = "estimate=0.25     share of the clusters that are estimated by centroid and mean value\n" SCORED_OPTIONS("0.03", "0"),
    .create = create,
    .select = scored_select,
    .tail = estimate,
    SCORED_KEEPING,
};
