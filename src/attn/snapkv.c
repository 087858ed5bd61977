/* snapkv (Li et al., arXiv 2404.14469): at the end of the prompt the tokens that its last queries attend to most stay, all others are
 * dropped for good. Weights of the last WINDOW queries, added up over them and the group and smoothed by the largest of POOL neighbours,
 * decide. Tokens that come later all stay. The prompt is the document: a question that follows it is not among those queries, as it is in the paper. */
#include <math.h>
#include <string.h>

#include "attn/choose.h"
#include "attn/scored.h"

enum { WINDOW = 32, POOL = 7 };

/* Tables: the last queries, [WINDOW][group][d] by position modulo WINDOW, and how many were seen. Units: whether a token stays. */
typedef struct seen {
    int64_t n; /* positions up to n - 1 */
} seen;

static size_t table_bytes(const scored *p)
{
    return sizeof(seen) + (size_t)WINDOW * (size_t)p->group * (size_t)p->d * sizeof(float);
}

static size_t unit_bytes(const scored *p)
{
    (void)p;
    return 1;
}

static float *query_at(const scored_part *part, int64_t position)
{
    return (float *)(part->tables + sizeof(seen)) + (position % WINDOW) * part->p->group * part->p->d;
}

static void observe(const scored_part *part, const float *q, int64_t first, int64_t n)
{
    int64_t width = (int64_t)part->p->group * part->p->d;
    for (int64_t i = n > WINDOW ? n - WINDOW : 0; i < n; i++) memcpy(query_at(part, first + i), q + i * width, (size_t)width * sizeof *q);
    ((seen *)part->tables)->n = first + n;
}

/* Adds the weights of one head's query at `position` to sum[n]; e[position + 1] is work. */
static void add_weights(const scored_part *part, const float *q, int64_t position, float *key, float *e, int64_t n, float *sum)
{
    const scored *p = part->p;
    float max;
    for (int64_t t = 0; t <= position; t++) {
        scored_key(part, t - ATTN_SINKS, key);
        e[t] = p->base.kernels->vector->dot(q, key, p->d) * p->base.shape.scale;
    }
    float all = p->base.kernels->vector->softmax_exp(e, position + 1, &max);
    for (int64_t t = 0; t < n && ATTN_SINKS + t <= position; t++) sum[t] += e[ATTN_SINKS + t] / all;
}

static bool learn(const scored_part *part, int64_t n, arena *scratch)
{
    const scored *p = part->p;
    const int64_t end = ((seen *)part->tables)->n, first = end > WINDOW ? end - WINDOW : 0;
    float *key = arena_alloc(scratch, (size_t)p->d, sizeof *key, NULL), *e = arena_alloc(scratch, (size_t)end + 1, sizeof *e, NULL);
    float *sum = arena_alloc(scratch, (size_t)n, sizeof *sum, NULL);
    uint16_t *keys = arena_alloc(scratch, (size_t)cut_padded(n), sizeof *keys, NULL);
    int32_t *stay = arena_alloc(scratch, (size_t)n + SCAN_BLOCK, sizeof *stay, NULL);
    if (!key || !e || !sum || !keys || !stay) return false;
    memset(sum, 0, (size_t)n * sizeof *sum);
    for (int64_t position = first; position < end; position++)
        for (int h = 0; h < p->group; h++) add_weights(part, query_at(part, position) + h * p->d, position, key, e, n, sum);
    float most = 0;
    for (int64_t t = 0; t < n; t++) most = fmaxf(most, sum[t]);
    memset(keys, 0, (size_t)cut_padded(n) * sizeof *keys);
    for (int64_t t = 0; t < n; t++) {
        float pooled = 0;
        for (int64_t i = t < POOL / 2 ? 0 : t - POOL / 2; i <= t + POOL / 2 && i < n; i++) pooled = fmaxf(pooled, sum[i]);
        keys[t] = (uint16_t)(1 + (most > 0 ? pooled / most * (UINT16_MAX - 1) : 0));
    }
    int64_t k = (int64_t)ceil(p->options.budget * (double)n), least = (int64_t)p->options.min;
    k = k < least ? least : k;
    cut to = cut_find(p->base.kernels->retrieval, keys, cut_padded(n), k < n ? k : n, 0, cut_padded(n), CUT_BEYOND, 0);
    k = p->base.kernels->retrieval->collect(keys, cut_padded(n), to.threshold, &to.n_ties, 0, stay);
    memset(part->units, 0, (size_t)n);
    for (int64_t i = 0; i < k; i++) part->units[stay[i]] = 1;
    return true;
}

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    (void)n, (void)scratch;
    memset(part->units + first, 1, (size_t)(end - first));
    return true;
}

static quarry_code select_kept(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                               const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)q, (void)pos, (void)near, (void)cost;
    const scored *p = (const scored *)policy;
    scored_part part = scored_part_of(p, kv, layer, head);
    *out = (attn_selection){.all = !p->learned || p->broken[layer * p->base.shape.kv.n_head_kv + head]};
    if (out->all) return QUARRY_OK;
    out->ids = arena_alloc(scratch, (size_t)(p->base.n_far - ATTN_SINKS), sizeof *out->ids, error);
    if (!out->ids) return QUARRY_ERROR_MEMORY;
    for (int64_t t = 0; t < p->n_coded; t++)
        if (part.units[t]) out->ids[out->n++] = (int32_t)(ATTN_SINKS + t);
    out->n = scored_rest(p, out->ids, out->n);
    return QUARRY_OK;
}

static const scored_method method = {.choice = SCORED_SHARE,
                                     .type = &attn_snapkv,
                                     .defaults = {.budget = 0.1, .min = 64},
                                     .unit = 1,
                                     .unit_bytes = unit_bytes,
                                     .table_bytes = table_bytes,
                                     .observe = observe,
                                     .learn = learn,
                                     .encode = encode};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_snapkv = {
    .name = "snapkv",
    .summary = "keeps the tokens that the end of the prompt attends to, drops the rest for good (arXiv 2404.14469)",
    .options = "budget=0.1        share of the far tokens that stays\n"
               "min=64            but at least so many\n",
    .create = create,
    .select = select_kept,
    SCORED_KEEPING,
};
