#include "attn/scored.h"

#include <math.h>
#include <string.h>

#include "attn/choose.h"
#include "attn/ivfpq.h"

static scored *of(attn_policy *p)
{
    return (scored *)p;
}

static int64_t units_of(const scored *p, int64_t n)
{
    return (n + p->method->unit - 1) / p->method->unit;
}

scored_part scored_part_of(const scored *p, const kv_seq *kv, int layer, int head)
{
    size_t i = (size_t)layer * (size_t)p->base.shape.kv.n_head_kv + (size_t)head;
    return (scored_part){.p = p,
                         .kv = kv,
                         .layer = layer,
                         .head = head,
                         .tables = p->tables + i * p->table_bytes,
                         .units = p->units + i * (size_t)p->capacity * p->unit_bytes};
}

/* ---- making and closing ---- */

static scored *scored_new(const scored_method *method, const attn_shape *shape, const math_kernels *kernels, const scored_options *options,
                          quarry_error *error)
{
    scored *p = memory_zero(1, sizeof *p, "retrieval policy", error);
    if (!p) return NULL;
    p->base = (attn_policy){.type = method->type, .shape = *shape, .kernels = kernels, .n_far = ATTN_SINKS};
    p->method = method;
    p->options = *options;
    p->d = shape->kv.head_dim;
    p->group = shape->n_head / shape->kv.n_head_kv;
    p->n_parts = shape->kv.n_layer * shape->kv.n_head_kv;
    p->unit_bytes = method->unit_bytes ? method->unit_bytes(p) : 0;
    p->table_bytes = method->table_bytes ? method->table_bytes(p) : 0;
    p->learned = !method->learn;
    p->broken = memory_zero((size_t)p->n_parts, sizeof *p->broken, "retrieval policy", error);
    p->tables = memory_zero((size_t)p->n_parts, p->table_bytes + 1, "retrieval policy", error);
    if (p->broken && p->tables && (!method->prepare || method->prepare(p, error))) return p;
    scored_destroy(&p->base);
    return NULL;
}

attn_policy *scored_create(const scored_method *method, const attn_shape *shape, const math_kernels *kernels, const char *spec,
                           quarry_error *error)
{
    scored_options o = method->defaults;
    attn_option table[11] = {{"budget", &o.budget, 0, 1}, {"min", &o.min, 0, 1e9}, {"threshold", &o.threshold, 0, 1},
                             {"mass", &o.mass, 0, 1},     {"max", &o.max, 0, 1},   {"shared", &o.shared, 0, 1},
                             {"tail", &o.tail, 0, 1}};
    int n = method->choice == SCORED_ALL ? 7 : method->choice == SCORED_SHARE ? 2 : 0;
    for (int i = 0; i < 4 && method->own[i]; i++) table[n++] = (attn_option){method->own[i], &o.own[i], method->least[i], method->most[i]};
    if (attn_options_parse(method->type->name, spec, table, n, error) != QUARRY_OK) return NULL;
    if (shape->n_head / shape->kv.n_head_kv > ATTN_MAX_GROUP) {
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "policy %s: %d query heads for %d KV heads; at most %d share one", method->type->name,
                  shape->n_head, shape->kv.n_head_kv, ATTN_MAX_GROUP);
        return NULL;
    }
    scored *p = scored_new(method, shape, kernels, &o, error);
    if (!p || o.tail == 0) return p ? &p->base : NULL;
    p->inner = attn_ivfpq.create(shape, kernels, "", error);
    if (p->inner) return &p->base;
    scored_destroy(&p->base);
    return NULL;
}

void scored_destroy(attn_policy *policy)
{
    scored *p = of(policy);
    attn_policy_destroy(p->inner);
    memory_free(p->broken);
    memory_free(p->tables);
    memory_free(p->units);
    memory_free(p->shared);
    memory_free(p);
}

attn_policy *scored_fork(const attn_policy *policy, quarry_error *error)
{
    const scored *from = (const scored *)policy;
    scored *p = scored_new(from->method, &from->base.shape, from->base.kernels, &from->options, error);
    if (!p) return NULL;
    size_t n_bytes = (size_t)from->n_parts * (size_t)from->capacity * from->unit_bytes;
    if (from->inner) p->inner = from->inner->type->fork(from->inner, error);
    p->units = memory_alloc(n_bytes + 1, 1, "retrieval policy", error);
    if (!p->units || (from->inner && !p->inner)) {
        scored_destroy(&p->base);
        return NULL;
    }
    if (n_bytes) memcpy(p->units, from->units, n_bytes);
    memcpy(p->tables, from->tables, (size_t)p->n_parts * p->table_bytes);
    memcpy(p->broken, from->broken, (size_t)p->n_parts * sizeof *p->broken);
    p->base.n_far = from->base.n_far;
    p->capacity = from->capacity;
    p->learned = from->learned;
    p->n_learned = from->n_learned;
    p->n_coded = from->n_coded;
    return &p->base;
}

void scored_tally(const attn_policy *policy, attn_memory *memory)
{
    const scored *p = (const scored *)policy;
    const size_t parts = (size_t)p->n_parts;
    memory_tally_add(&memory->index, p, sizeof *p);
    memory_tally_add(&memory->codebooks, p->tables, parts * p->table_bytes);
    memory_tally_add(&memory->index, p->units, parts * (size_t)p->capacity * p->unit_bytes);
    if (p->inner) p->inner->type->tally(p->inner, memory);
}

/* Learning takes all keys, in one order or two. */
size_t scored_scratch(const attn_policy *policy, int64_t n_far)
{
    const scored *p = (const scored *)policy;
    const size_t keys = p->method->learn ? (size_t)n_far * (size_t)p->d * 4 * sizeof(float) : 0;
    const size_t inner = p->inner ? p->inner->type->scratch(p->inner, n_far) : 0;
    return keys > inner ? keys : inner;
}

/* ---- keeping up ---- */

void scored_observe(attn_policy *policy, int layer, int head, const float *q, int64_t first, int64_t n)
{
    scored *p = of(policy);
    scored_part part = scored_part_of(p, NULL, layer, head);
    if (p->method->observe) p->method->observe(&part, q, first, n);
    if (p->inner) p->inner->type->observe(p->inner, layer, head, q, first, n);
}

/* Room for the units of n far tokens. */
static quarry_code grow(scored *p, int64_t n, quarry_error *error)
{
    int64_t needed = units_of(p, n);
    if (p->unit_bytes == 0 || needed <= p->capacity) return QUARRY_OK;
    int64_t capacity = needed + needed / 2 + 16;
    size_t before = (size_t)p->capacity * p->unit_bytes, after = (size_t)capacity * p->unit_bytes;
    unsigned char *units = memory_alloc((size_t)p->n_parts, after, "retrieval policy", error);
    if (!units) return QUARRY_ERROR_MEMORY;
    for (size_t i = 0; i < (size_t)p->n_parts && before; i++) memcpy(units + i * after, p->units + i * before, before);
    memory_free(p->units);
    p->units = units;
    p->capacity = capacity;
    return QUARRY_OK;
}

quarry_code scored_reserve(attn_policy *policy, int64_t n, quarry_error *error)
{
    scored *p = of(policy);
    quarry_code code = grow(p, p->base.n_far - ATTN_SINKS + n, error);
    if (code == QUARRY_OK && p->inner) code = p->inner->type->reserve(p->inner, n, error);
    return code;
}

/* Units of the first n far tokens, from the one on that was not complete. */
static void encode(scored *p, const kv_seq *kv, int layer, int head, int64_t n, arena *scratch)
{
    if (!p->method->encode || n <= p->n_coded) return;
    scored_part part = scored_part_of(p, kv, layer, head);
    if (!p->method->encode(&part, p->n_coded / p->method->unit, units_of(p, n), n, scratch))
        p->broken[layer * p->base.shape.kv.n_head_kv + head] = true;
}

void scored_append(attn_policy *policy, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch)
{
    scored *p = of(policy);
    if (p->learned) encode(p, kv, layer, head, p->base.n_far - ATTN_SINKS + n, scratch);
    arena_reset(scratch);
    if (p->inner) p->inner->type->append(p->inner, layer, head, kv, n, scratch);
}

void scored_commit(attn_policy *policy, int64_t n)
{
    scored *p = of(policy);
    p->base.n_far += n;
    if (p->learned) p->n_coded = p->base.n_far - ATTN_SINKS;
    if (p->inner) p->inner->type->commit(p->inner, n);
}

quarry_code scored_reserve_seal(attn_policy *policy, quarry_error *error)
{
    scored *p = of(policy);
    return p->inner ? p->inner->type->reserve_seal(p->inner, error) : QUARRY_OK;
}

static bool learns_now(const scored *p)
{
    enum { LEAST = 64 };
    return !p->learned && p->base.n_far - ATTN_SINKS >= LEAST;
}

void scored_seal(attn_policy *policy, int layer, int head, const kv_seq *kv, arena *scratch)
{
    scored *p = of(policy);
    int64_t n = p->base.n_far - ATTN_SINKS;
    if (learns_now(p)) {
        scored_part part = scored_part_of(p, kv, layer, head);
        if (!p->method->learn(&part, n, scratch)) p->broken[layer * p->base.shape.kv.n_head_kv + head] = true;
        arena_reset(scratch);
    }
    if (p->inner) p->inner->type->seal(p->inner, layer, head, kv, scratch);
}

void scored_commit_seal(attn_policy *policy)
{
    scored *p = of(policy);
    if (learns_now(p)) {
        p->learned = true;
        p->n_coded = p->n_learned = p->base.n_far - ATTN_SINKS;
    }
    if (p->inner) p->inner->type->commit_seal(p->inner);
}

/* The last unit that remains may hold tokens that are gone: it is made anew by the next append, and its tokens are read until then. What was
 * learned from tokens that are gone is learned again at the next seal, and everything read until then. */
void scored_truncate(attn_policy *policy, int64_t n)
{
    scored *p = of(policy);
    if (n < ATTN_SINKS) n = ATTN_SINKS;
    if (n >= p->base.n_far) return;
    p->base.n_far = n;
    n -= ATTN_SINKS;
    if (n < p->n_coded) p->n_coded = n / p->method->unit * p->method->unit;
    if (p->method->learn && n < p->n_learned) {
        p->learned = false;
        p->n_coded = p->n_learned = 0;
    }
    if (p->inner) p->inner->type->truncate(p->inner, n + ATTN_SINKS);
}

/* ---- a step ---- */

void scored_spread(const scored_part *part, const float *unit_scores, int64_t n, float *scores)
{
    int64_t unit = part->p->method->unit, n_units = units_of(part->p, n);
    for (int h = 0; h < part->p->group; h++)
        for (int64_t t = 0; t < n; t++) scores[h * n + t] = unit_scores[h * n_units + t / unit];
}

/* What is chosen among n tokens with log weights. */
typedef struct choice {
    const scored *p;
    int64_t n, least, most;
    uint16_t *keys;  /* [cut_padded(n)], work */
    int32_t *chosen; /* [n + SCAN_BLOCK], work */
    bool *read;      /* [n] */
} choice;

/* Log weights as keys: 16 bits for the NATS below the largest; whatever is below is 1. */
enum { NATS = 40, KEY_TOP = UINT16_MAX - 1 };

static float keys_make(const choice *c, const float *log_weights)
{
    const float step = (float)NATS / KEY_TOP;
    float top = -INFINITY;
    for (int64_t t = 0; t < c->n; t++) top = fmaxf(top, log_weights[t]);
    for (int64_t t = 0; t < c->n; t++) {
        float key = KEY_TOP + (log_weights[t] - top) / step;
        c->keys[t] = key > 1 ? (uint16_t)key : 1;
    }
    memset(c->keys + c->n, 0, (size_t)(cut_padded(c->n) - c->n) * sizeof *c->keys);
    return top;
}

/* As many of the heaviest as hold `mass`: the key that they reach. */
static int key_of_mass(const choice *c, const float *log_weights, double mass)
{
    int low = 1, high = KEY_TOP;
    while (low < high) { /* the largest key whose tokens hold as much */
        int middle = low + (high - low + 1) / 2;
        double sum = 0;
        for (int64_t t = 0; t < c->n; t++)
            if (c->keys[t] >= middle) sum += exp((double)log_weights[t]);
        if (sum >= mass)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* near_mass: what the rows read anyway hold of all. */
static void choose(const choice *c, const float *log_weights, double near_mass)
{
    const scored_options *o = &c->p->options;
    const retrieval_kernels *kernels = c->p->base.kernels->retrieval;
    int64_t n = cut_padded(c->n);
    float top = keys_make(c, log_weights);
    int heavy = CUT_BEYOND - 1;
    if (o->mass > 0)
        heavy = o->mass > near_mass ? key_of_mass(c, log_weights, o->mass - near_mass) : heavy;
    else if (o->threshold > 0)
        heavy = (int)fminf(fmaxf(KEY_TOP + (logf((float)o->threshold) - top) * KEY_TOP / NATS, 1), CUT_BEYOND - 1);
    cut to = heavy < CUT_BEYOND - 1 && c->most > c->least ? cut_between(kernels, c->keys, n, c->least, c->most, heavy)
                                                          : cut_find(kernels, c->keys, n, c->least, 0, n, CUT_BEYOND, 0);
    int64_t k = kernels->collect(c->keys, n, to.threshold, &to.n_ties, 0, c->chosen);
    for (int64_t i = 0; i < k; i++) c->read[c->chosen[i]] = true;
}

/* scores[group][n] become log weights: less the log of all mass of their head. Returns the near rows' share in near_mass[group]. */
static bool normalise(const scored *p, float *scores, int64_t n, const attention_state *near, double *near_mass, arena *scratch,
                      quarry_error *error)
{
    float *e = arena_alloc(scratch, (size_t)n, sizeof *e, error);
    for (int h = 0; e && h < p->group; h++) {
        float max, *s = scores + h * n;
        memcpy(e, s, (size_t)n * sizeof *e);
        float sum = p->base.kernels->vector->softmax_exp(e, n, &max), top = fmaxf(max, near->m[h]);
        float of_near = near->l[h] * expf(near->m[h] - top), all = of_near + sum * expf(max - top), log_all = top + logf(all);
        near_mass[h] = (double)(of_near / all);
        for (int64_t t = 0; t < n; t++) s[t] -= log_all;
    }
    return e != NULL;
}

static bool choose_all(const choice *c, float *scores, const attention_state *near, arena *scratch, quarry_error *error)
{
    const scored *p = c->p;
    double near_mass[ATTN_MAX_GROUP];
    if (!normalise(p, scores, c->n, near, near_mass, scratch, error)) return false;
    bool shared = p->options.shared != 0 && p->options.mass == 0;
    for (int h = 0; h < p->group; h++) {
        float *s = scores + h * c->n;
        if (!shared)
            choose(c, s, near_mass[h]);
        else
            for (int64_t t = 0; t < c->n; t++) scores[t] = fmaxf(scores[t], s[t]);
    }
    if (shared) choose(c, scores, 0);
    return true;
}

static int64_t share_of(int64_t n, double share)
{
    return (int64_t)ceil(share * (double)n);
}

/* Pages are read whole, the last one beyond the budget. */
static void read_whole_units(const choice *c, int64_t unit)
{
    for (int64_t first = 0; unit > 1 && first < c->n; first += unit) {
        int64_t end = first + unit < c->n ? first + unit : c->n;
        bool any = false;
        for (int64_t t = first; t < end; t++) any |= c->read[t];
        for (int64_t t = first; t < end; t++) c->read[t] = any;
    }
}

quarry_code scored_select(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                          const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)pos;
    const scored *p = (const scored *)policy;
    int64_t n_far = p->base.n_far - ATTN_SINKS, n = p->n_coded, min = (int64_t)p->options.min;
    int64_t least = p->options.mass > 0 ? 0 : share_of(n, p->options.budget);
    least = least < min ? min : least;
    *out = (attn_selection){.all = least >= n || p->broken[layer * p->base.shape.kv.n_head_kv + head]};
    if (out->all || n_far == 0) return QUARRY_OK;
    scored_part part = scored_part_of(p, kv, layer, head);
    choice c = {.p = p, .n = n, .least = least, .most = share_of(n, p->options.max)};
    float *scaled = arena_alloc(scratch, (size_t)(p->group * p->d), sizeof *scaled, error);
    float *scores = arena_alloc(scratch, (size_t)p->group * (size_t)n, sizeof *scores, error);
    int32_t *ids = arena_alloc(scratch, (size_t)n_far, sizeof *ids, error);
    c.keys = arena_alloc(scratch, (size_t)cut_padded(n), sizeof *c.keys, error);
    c.chosen = arena_alloc(scratch, (size_t)n + SCAN_BLOCK, sizeof *c.chosen, error);
    c.read = arena_alloc(scratch, (size_t)n_far, sizeof *c.read, error);
    if (!scaled || !scores || !ids || !c.keys || !c.chosen || !c.read) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < p->group * p->d; i++) scaled[i] = q[i] * p->base.shape.scale;
    for (int64_t t = 0; t < n_far; t++) c.read[t] = t >= n;
    if (!p->method->score(&part, scaled, n, scores, scratch, cost, error)) return QUARRY_ERROR_MEMORY;
    if (!choose_all(&c, scores, near, scratch, error)) return QUARRY_ERROR_MEMORY;
    if (!p->method->learn) read_whole_units(&c, p->method->unit);
    int64_t k = 0;
    for (int64_t t = 0; t < n_far; t++)
        if (c.read[t]) ids[k++] = (int32_t)(ATTN_SINKS + t);
    if (p->inner) return ivfpq_cover(p->inner, layer, head, q, near, ids, k, scratch, out, cost, error);
    *out = (attn_selection){.ids = ids, .n = k};
    return QUARRY_OK;
}

void scored_tail(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                 const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    const scored *p = (const scored *)policy;
    if (p->inner) ivfpq_tail(p->inner, layer, head, q, sel, scores, rows, scratch, state, cost);
}
