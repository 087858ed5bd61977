/* magicpig (Chen et al., arXiv 2410.16179): attention as an expectation, estimated from tokens that are sampled by locality-sensitive
 * hashing. Keys, centred by the mean of the prompt's, and queries are hashed by `tables` times `bits` random planes (SimHash); a token is
 * sampled if it meets the query in at least two tables, which at an angle a happens with probability
 *
 *     u = 1 - (1 - p^bits)^tables - tables p^bits (1 - p^bits)^(tables - 1),   p = 1 - a / pi
 *
 * and counts 1 / u times. As published each query head samples for itself; here the group reads the union, and a head gives weight to its
 * own. */
#include <math.h>
#include <string.h>

#include "attn/scored.h"

enum { OWN_BITS, OWN_TABLES };
enum { BLOCK = 64 };

static int bits_of(const scored *p)
{
    return (int)p->options.own[OWN_BITS];
}

static int tables_of(const scored *p)
{
    return (int)p->options.own[OWN_TABLES];
}

/* p->shared: the planes, [d][tables * bits]. */
static bool prepare(scored *p, quarry_error *error)
{
    size_t n = (size_t)p->d * (size_t)tables_of(p) * (size_t)bits_of(p);
    random_state r;
    p->shared = memory_alloc(n, sizeof *p->shared, "random planes", error);
    random_seed(&r, 1);
    for (size_t i = 0; p->shared && i < n; i++) p->shared[i] = (float)random_normal(&r);
    return p->shared != NULL;
}

/* Per token its length (of the centred key), then a code for each table. */
static size_t unit_bytes(const scored *p)
{
    return sizeof(float) + ((size_t)tables_of(p) * sizeof(uint16_t) + 3) / 4 * 4;
}

/* The mean key. */
static size_t table_bytes(const scored *p)
{
    return (size_t)p->d * sizeof(float);
}

static const uint16_t *codes_at(const scored_part *part, int64_t t)
{
    return (const uint16_t *)(part->units + (size_t)t * part->p->unit_bytes + sizeof(float));
}

/* Codes of the n <= BLOCK vectors x[n][d]; sums is [n][tables * bits], work. Those of vector i begin at out + i * stride bytes. */
static void hash(const scored *p, const float *x, int64_t n, float *sums, unsigned char *out, size_t stride)
{
    int64_t planes = (int64_t)tables_of(p) * bits_of(p);
    p->base.kernels->retrieval->product(x, p->d, 1, p->shared, planes, sums, planes, n, planes, p->d, false);
    for (int64_t i = 0; i < n; i++) {
        uint16_t *codes = (uint16_t *)(out + (size_t)i * stride);
        const float *sum = sums + i * planes;
        for (int t = 0; t < tables_of(p); t++) {
            unsigned code = 0;
            for (int b = 0; b < bits_of(p); b++) code = code << 1 | (*sum++ > 0);
            codes[t] = (uint16_t)code;
        }
    }
}

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    const scored *p = part->p;
    const float *mean = (const float *)part->tables;
    size_t planes = (size_t)tables_of(p) * (size_t)bits_of(p);
    float *x = arena_alloc(scratch, (size_t)BLOCK * (size_t)p->d, sizeof *x, NULL);
    float *sums = arena_alloc(scratch, (size_t)BLOCK * planes, sizeof *sums, NULL);
    (void)n; /* a unit is a token */
    if (!x || !sums) return false;
    for (int64_t t = first; t < end; t += BLOCK) {
        int64_t rows = end - t < BLOCK ? end - t : BLOCK;
        for (int64_t i = 0; i < rows; i++) {
            float *key = x + i * p->d;
            scored_key(part, t + i, key);
            for (int j = 0; j < p->d; j++) key[j] -= mean[j];
            *(float *)(part->units + (size_t)(t + i) * p->unit_bytes) = sqrtf(p->base.kernels->vector->dot(key, key, p->d));
        }
        hash(p, x, rows, sums, part->units + (size_t)t * p->unit_bytes + sizeof(float), p->unit_bytes);
    }
    return true;
}

static bool learn(const scored_part *part, int64_t n, arena *scratch)
{
    const scored *p = part->p;
    float *mean = (float *)part->tables, *key = arena_alloc(scratch, (size_t)p->d, sizeof *key, NULL);
    if (!key) return false;
    memset(mean, 0, (size_t)p->d * sizeof *mean);
    for (int64_t t = 0; t < n; t++) {
        scored_key(part, t, key);
        for (int i = 0; i < p->d; i++) mean[i] += key[i] / (float)n;
    }
    return encode(part, 0, n, n, scratch);
}

/* What select leaves for tail, just before the ids. */
typedef struct sampled {
    float *centre; /* [group]: q·mean, scaled */
    float *length; /* [group]: of the scaled query */
    bool *met;     /* [group][n] */
} sampled;

enum { SAMPLED_BYTES = (sizeof(sampled) + 63) / 64 * 64 };

static quarry_code select_met(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                              const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)pos, (void)near;
    const scored *p = (const scored *)policy;
    const int tables = tables_of(p), g = p->group;
    const int64_t n = p->n_coded, n_far = p->base.n_far - ATTN_SINKS;
    scored_part part = scored_part_of(p, kv, layer, head);
    *out = (attn_selection){.all = !p->learned || p->broken[layer * p->base.shape.kv.n_head_kv + head]};
    if (out->all) return QUARRY_OK;
    char *memory = arena_alloc(scratch, SAMPLED_BYTES + (size_t)n_far * sizeof(int32_t) + 1, 1, error);
    uint16_t *codes = arena_alloc(scratch, (size_t)g * (size_t)tables, sizeof *codes, error);
    float *sums = arena_alloc(scratch, (size_t)g * (size_t)tables * (size_t)bits_of(p), sizeof *sums, error);
    bool *met = arena_alloc(scratch, (size_t)g * (size_t)n_far + 1, sizeof *met, error);
    float *per_head = arena_alloc(scratch, 2 * (size_t)g, sizeof *per_head, error);
    if (!memory || !codes || !sums || !met || !per_head) return QUARRY_ERROR_MEMORY;
    sampled *s = (sampled *)memory;
    *s = (sampled){per_head, per_head + g, met};
    out->ids = (int32_t *)(memory + SAMPLED_BYTES);
    hash(p, q, g, sums, (unsigned char *)codes, (size_t)tables * sizeof *codes);
    for (int h = 0; h < g; h++) {
        const vector_kernels *v = p->base.kernels->vector;
        s->centre[h] = p->base.shape.scale * v->dot(q + h * p->d, (const float *)part.tables, p->d);
        s->length[h] = p->base.shape.scale * sqrtf(v->dot(q + h * p->d, q + h * p->d, p->d));
    }
    bool hit[ATTN_MAX_GROUP];
    for (int64_t t = 0; t < n; t++) {
        const uint16_t *of_token = codes_at(&part, t);
        bool any = false;
        for (int h = 0; h < g; h++) {
            int n_met = 0;
            for (int i = 0; i < tables; i++) n_met += of_token[i] == codes[h * tables + i];
            hit[h] = n_met >= 2;
            any |= hit[h];
            cost->index_bytes += n_met * (int64_t)sizeof(int32_t); /* entries of the buckets that are read */
        }
        if (!any) continue;
        for (int h = 0; h < g; h++) met[h * n_far + out->n] = hit[h];
        out->ids[out->n++] = (int32_t)(ATTN_SINKS + t);
    }
    out->n = scored_rest(p, out->ids, out->n);
    return QUARRY_OK;
}

/* Each sampled token's weight becomes 1 / u of what it was, or 0 in a head that has not sampled it. */
static void reweigh(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                    const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    (void)q, (void)cost;
    const scored *p = (const scored *)policy;
    if (sel->all || sel->n == 0) return;
    const sampled *s = (const sampled *)((const char *)sel->ids - SAMPLED_BYTES);
    const int64_t n = sel->n, n_far = p->base.n_far - ATTN_SINKS;
    const double tables = tables_of(p);
    scored_part part = scored_part_of(p, NULL, layer, head);
    float *extra = arena_alloc(scratch, (size_t)p->group * (size_t)n, sizeof *extra, NULL);
    if (!extra) return; /* the sampled tokens count once: an estimate too */
    for (int h = 0; h < p->group; h++) {
        double added = 0;
        for (int64_t i = 0; i < n; i++) {
            int64_t t = sel->ids[i] - ATTN_SINKS;
            double factor = 1; /* not sampled but read */
            if (t < p->n_coded && !s->met[h * n_far + i]) factor = 0;
            if (t < p->n_coded && s->met[h * n_far + i]) {
                float length = *(const float *)(part.units + (size_t)t * p->unit_bytes);
                double cosine = (double)((scores[h * n + i] - s->centre[h]) / (length * s->length[h] + 1e-20f));
                double same = pow(1 - acos(fmin(fmax(cosine, -1), 1)) / 3.14159265358979323846, bits_of(p));
                double u = 1 - pow(1 - same, tables) - tables * same * pow(1 - same, tables - 1);
                factor = 1 / fmax(u, 1e-6);
            }
            double change = (factor - 1) * exp((double)(scores[h * n + i] - state->m[h]));
            extra[h * n + i] = (float)change;
            added += change;
        }
        state->l[h] += (float)added;
    }
    p->base.kernels->retrieval->accumulate_rows(extra, p->group, p->d, p->base.shape.kv.type, rows, n, state->o);
}

static const scored_method method = {.choice = SCORED_NONE,
                                     .type = &attn_magicpig,
                                     .defaults = {.own = {10, 150}},
                                     .own = {"bits", "tables"},
                                     .least = {1, 2},
                                     .most = {16, 1024},
                                     .unit = 1,
                                     .prepare = prepare,
                                     .unit_bytes = unit_bytes,
                                     .table_bytes = table_bytes,
                                     .learn = learn,
                                     .encode = encode};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_magicpig = {
    .name = "magicpig",
    .summary = "samples tokens by locality-sensitive hashing and weighs them by importance (arXiv 2410.16179)",
    .options = "bits=10           random planes of a hash table\n"
               "tables=150        hash tables; a token is read that meets the query in two\n",
    .create = create,
    .select = select_met,
    .tail = reweigh,
    SCORED_KEEPING,
};
