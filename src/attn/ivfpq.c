#include "attn/ivfpq.h"

#include <stdatomic.h>
#include <string.h>

static ivfpq *of(attn_policy *p)
{
    return (ivfpq *)p;
}

static void ivfpq_destroy(attn_policy *policy)
{
    ivfpq *p = of(policy);
    ivfpq_drop_pending(p);
    for (int64_t i = 0; i < p->n_sealed; i++) ivfpq_segment_release(p->sealed[i]);
    ivfpq_segment_release(p->open);
    memory_free(p->sealed);
    memory_free(p->moments);
    memory_free(p->n_queries);
    memory_free(p->ahead);
    memory_free(p->n_ahead);
    memory_free(p);
}

static ivfpq *ivfpq_new(const attn_shape *shape, const math_kernels *kernels, const ivfpq_options *options, quarry_error *error)
{
    ivfpq *p = memory_zero(1, sizeof *p, "key index", error);
    if (!p) return NULL;
    p->base = (attn_policy){.type = &attn_ivfpq, .shape = *shape, .kernels = kernels, .n_far = ATTN_SINKS};
    p->options = *options;
    p->d = shape->kv.head_dim;
    p->group = shape->n_head / shape->kv.n_head_kv;
    p->n_sub = p->d / 4;
    p->n_parts = shape->kv.n_layer * shape->kv.n_head_kv;
    p->segment = (int64_t)options->segment / ATTN_BLOCK * ATTN_BLOCK;
    p->open_first = ATTN_SINKS;
    size_t parts = (size_t)p->n_parts, d = (size_t)p->d;
    p->moments = memory_zero(parts * d * d, sizeof *p->moments, "query statistics", error);
    p->n_queries = memory_zero(parts, sizeof *p->n_queries, "query statistics", error);
    p->ahead = memory_zero(parts * d * d, sizeof *p->ahead, "query statistics", error);
    p->n_ahead = memory_zero(parts, sizeof *p->n_ahead, "query statistics", error);
    if (p->moments && p->n_queries && p->ahead && p->n_ahead) return p;
    ivfpq_destroy(&p->base);
    return NULL;
}

static attn_policy *ivfpq_create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    ivfpq_options o = {.budget = 0.005,
                       .min = 16,
                       .threshold = 0.001,
                       .max = 0.08,
                       .refine = 0.3,
                       .margin = 2,
                       .outliers = 0.02,
                       .size = 64,
                       .values = 0.8,
                       .alpha = 0.5,
                       .shrink = 0.05,
                       .segment = shape->kv.head_dim > 128 ? 8192 : 4096,
                       .tail = 1};
    const attn_option table[] = {
        {"budget", &o.budget, 0, 1},
        {"min", &o.min, 1, 1e9},
        {"threshold", &o.threshold, 0, 1},
        {"mass", &o.mass, 0, 1},
        {"max", &o.max, 0, 1},
        {"refine", &o.refine, 0, 1},
        {"outliers", &o.outliers, 0, 1},
        {"margin", &o.margin, 0, 100},
        {"size", &o.size, 1, 1024},
        {"values", &o.values, 0, 1},
        {"alpha", &o.alpha, 0, 2},
        {"shrink", &o.shrink, 1e-6, 1},
        {"segment", &o.segment, 128, IVFPQ_LARGEST},
        {"tail", &o.tail, 0, 1},
    };
    if (attn_options_parse("ivfpq", spec, table, (int)(sizeof table / sizeof *table), error) != QUARRY_OK) return NULL;
    if (shape->n_head / shape->kv.n_head_kv > ATTN_MAX_GROUP) {
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "policy ivfpq: %d query heads for %d KV heads; at most %d share one", shape->n_head,
                  shape->kv.n_head_kv, ATTN_MAX_GROUP);
        return NULL;
    }
    ivfpq *p = ivfpq_new(shape, kernels, &o, error);
    return p ? &p->base : NULL;
}

static attn_policy *ivfpq_fork(const attn_policy *policy, quarry_error *error)
{
    const ivfpq *from = (const ivfpq *)policy;
    ivfpq *p = ivfpq_new(&from->base.shape, from->base.kernels, &from->options, error);
    if (!p) return NULL;
    if (from->open) {
        p->open = ivfpq_segment_create(p, from->open->n, false, false, error);
        if (!p->open) goto fail;
        memcpy(p->open->memory, from->open->memory, from->open->bytes);
        memcpy(p->open->keys, from->open->keys, from->open->key_bytes);
        memcpy(p->open->status, from->open->status, (size_t)p->n_parts * sizeof *p->open->status);
    }
    if (memory_grow(&p->sealed, (size_t)from->n_sealed, sizeof *p->sealed, "key index", error) != QUARRY_OK) goto fail;
    p->n_sealed = p->capacity = from->n_sealed;
    for (int64_t i = 0; i < p->n_sealed; i++) {
        p->sealed[i] = from->sealed[i];
        atomic_fetch_add(&p->sealed[i]->n_refs, 1);
    }
    size_t parts = (size_t)p->n_parts, d = (size_t)p->d;
    memcpy(p->moments, from->moments, parts * d * d * sizeof *p->moments);
    memcpy(p->n_queries, from->n_queries, parts * sizeof *p->n_queries);
    memcpy(p->ahead, from->ahead, parts * d * d * sizeof *p->ahead);
    memcpy(p->n_ahead, from->n_ahead, parts * sizeof *p->n_ahead);
    p->base.n_far = from->base.n_far;
    p->open_first = from->open_first;
    p->n_open = from->n_open;
    p->n_coded = from->n_coded;
    return &p->base;
fail:
    ivfpq_destroy(&p->base);
    return NULL;
}

/* Every fourth of the positions [first, first + n), all heads of the group pooled. */
static void add_queries(const ivfpq *p, float *sum, int64_t *count, const float *q, int64_t first, int64_t n)
{
    enum { EVERY = 4 };
    int64_t skip = (EVERY - first % EVERY) % EVERY, width = (int64_t)p->group * p->d;
    if (skip >= n) return;
    vq_moments h = {p->d, *count, sum};
    for (int g = 0; g < p->group; g++)
        vq_moments_add(&h, p->base.kernels, q + skip * width + (int64_t)g * p->d, (n - skip + EVERY - 1) / EVERY, EVERY * width);
    *count = h.n;
}

static void ivfpq_observe(attn_policy *policy, int layer, int head, const float *q, int64_t first, int64_t n)
{
    ivfpq *p = of(policy);
    int part = layer * p->base.shape.kv.n_head_kv + head;
    size_t at = (size_t)part * (size_t)p->d * (size_t)p->d;
    int64_t now = p->open_first + ivfpq_full_segment(p, p->open_first) - first;
    now = now < 0 ? 0 : ivfpq_min64(now, n);
    add_queries(p, p->moments + at, p->n_queries + part, q, first, now);
    add_queries(p, p->ahead + at, p->n_ahead + part, q + now * p->group * p->d, first + now, n - now);
}

void ivfpq_catch_up(ivfpq *p)
{
    size_t parts = (size_t)p->n_parts, cells = parts * (size_t)p->d * (size_t)p->d;
    for (size_t i = 0; i < cells; i++) p->moments[i] += p->ahead[i];
    for (size_t i = 0; i < parts; i++) p->n_queries[i] += p->n_ahead[i];
    memset(p->ahead, 0, cells * sizeof *p->ahead);
    memset(p->n_ahead, 0, parts * sizeof *p->n_ahead);
}

/* A cut inside a sealed segment reopens it: what remains of it is read exactly until the next append or seal, which have the rows to
 * make codes and clusters of again. So selection and tail never see a token that is gone. */
static void ivfpq_truncate(attn_policy *policy, int64_t n)
{
    ivfpq *p = of(policy);
    if (n < ATTN_SINKS) n = ATTN_SINKS;
    if (n >= p->base.n_far) return;
    p->base.n_far = n;
    ivfpq_drop_pending(p);
    if (n < p->open_first) {
        while (p->n_sealed > 0 && n < p->sealed[p->n_sealed - 1]->first + p->sealed[p->n_sealed - 1]->n) {
            ivfpq_segment *s = p->sealed[--p->n_sealed];
            p->open_first = s->first;
            ivfpq_segment_release(s);
        }
        p->n_coded = 0;
    }
    p->n_open = n - p->open_first;
    if (p->n_coded > p->n_open) p->n_coded = p->n_open / IVFPQ_RUN * IVFPQ_RUN; /* whole runs only: the last one's mean holds dead tokens */
    for (int i = 0; p->open && i < p->n_parts; i++) ivfpq_part_of(p, p->open, i).status->n_clusters = (int32_t)(p->n_coded / IVFPQ_RUN);
}

/* The tables of a sealed segment lie among its parts, whose pages are all in use: counted apart by their sizes. */
static void segment_tally(const ivfpq *p, const ivfpq_segment *s, bool sealed, attn_memory *memory)
{
    const size_t tables = sealed ? s->layout.begin * (size_t)p->n_parts : 0;
    memory_tally all = {.held_only = memory->index.held_only};
    memory_tally_add(&all, s->memory, memory_aligned_bytes(s->bytes));
    memory_tally_add(&all, s->keys, memory_aligned_bytes(s->key_bytes));
    memory_tally_add(&all, s->status, (size_t)p->n_parts * sizeof *s->status);
    const size_t in_ram = tables < all.resident ? tables : all.resident;
    memory->codebooks.held += tables;
    memory->codebooks.resident += in_ram;
    memory->index.n_large += all.n_large;
    memory->index.held += all.held - tables;
    memory->index.resident += all.resident - in_ram;
}

static void ivfpq_tally(const attn_policy *policy, attn_memory *memory)
{
    const ivfpq *p = (const ivfpq *)policy;
    const size_t parts = (size_t)p->n_parts, moments = parts * (size_t)p->d * (size_t)p->d * sizeof *p->moments;
    memory_tally_add(&memory->index, p, sizeof *p);
    memory_tally_add(&memory->codebooks, p->moments, moments);
    memory_tally_add(&memory->codebooks, p->ahead, moments);
    memory_tally_add(&memory->codebooks, p->n_queries, parts * sizeof *p->n_queries);
    memory_tally_add(&memory->codebooks, p->n_ahead, parts * sizeof *p->n_ahead);
    for (int64_t i = 0; i < p->n_sealed; i++) segment_tally(p, p->sealed[i], true, memory);
    if (p->open) segment_tally(p, p->open, false, memory);
}

/* Of a builder of the largest segment: floats of keys and values in both orders, and again by groups of clusters; codes; and square matrices for the basis. */
static size_t ivfpq_scratch(const attn_policy *policy, int64_t n_far)
{
    const ivfpq *p = (const ivfpq *)policy;
    int64_t most = 0;
    for (int64_t first = ATTN_SINKS, rest = n_far; rest > 0;) {
        const int64_t full = ivfpq_full_segment(p, first), n = ivfpq_min64(rest, full);
        most = n > most ? n : most;
        first += n;
        rest -= n;
    }
    const size_t d = (size_t)p->d, floats = 9 * d + d / 2 + d / 8 + 12;
    return (size_t)most * floats * sizeof(float) + 13 * d * d * sizeof(float);
}

const attn_policy_type attn_ivfpq = {
    .name = "ivfpq",
    .summary = "reads the tokens that product codes of the keys find, estimates the rest from clusters",
    .options = "budget=0.005      share of the far tokens that is read\n"
               "min=16            but at least so many\n"
               "threshold=0.001   and all of at least this estimated attention weight; beyond 16384 tokens it falls as 1 / sqrt (0: off)\n"
               "mass=0            instead of a threshold: as many as this share of each head's estimated mass needs (0: off)\n"
               "max=0.08          with either, not more than this share\n"
               "refine=0.3        largest share of the far tokens whose weights are estimated again, from 4-bit keys (0: off)\n"
               "margin=2          they are those within so many standard errors of their codes of the threshold\n"
               "outliers=0.02     share of the far tokens that always are: those whose codes are farthest from their keys\n"
               "size=64           tokens per cluster\n"
               "values=0.8        share of the values, beside the keys, in what makes tokens of a cluster alike\n"
               "alpha=0.5         power of the query statistics in the metric of the codes\n"
               "shrink=0.05       what is added to their eigenvalues\n"
               "segment=4096      tokens per segment of the index; twice as many where so many lie before it; 8192 for heads of over 128 "
               "dimensions\n"
               "tail=1            0: drop the unread tokens instead of estimating them\n",
    .create = ivfpq_create,
    .destroy = ivfpq_destroy,
    .fork = ivfpq_fork,
    .observe = ivfpq_observe,
    .reserve = ivfpq_reserve,
    .append = ivfpq_append,
    .commit = ivfpq_commit,
    .reserve_seal = ivfpq_reserve_seal,
    .seal = ivfpq_seal,
    .commit_seal = ivfpq_commit_seal,
    .select = ivfpq_select,
    .select_block = ivfpq_select_block,
    .fetch = ivfpq_fetch,
    .tail = ivfpq_tail,
    .truncate = ivfpq_truncate,
    .tally = ivfpq_tally,
    .scratch = ivfpq_scratch,
    .saving = &ivfpq_saving,
};
