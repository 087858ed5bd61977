/* oracle: the exact best. It reads all keys to find them, so it is no method but a bound for those that drop what they do not read. */
#include "attn/scored.h"

/* Counted: every far key. */
static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const scored *p = part->p;
    const kv_shape *shape = &p->base.shape.kv;
    const void **rows = arena_alloc(scratch, (size_t)n, sizeof *rows, error);
    float *state = arena_alloc(scratch, (size_t)p->group * (size_t)(p->d + 2), sizeof *state, error);
    if (!rows || !state) return false;
    attention_state unused = {state, state + p->group, state + 2 * p->group};
    attention_clear(&unused, p->group, p->d);
    for (int64_t t = 0; t < n; t++) rows[t] = kv_row(part->kv, part->layer, part->head, ATTN_SINKS + t);
    p->base.kernels->attention->rows(q, p->group, p->d, shape->type, rows, n, scores, &unused);
    cost->index_bytes += n * (int64_t)kv_row_bytes(shape->type, p->d) / 2;
    return true;
}

static const scored_method method = {.type = &attn_oracle, .defaults = {.budget = 0.03, .min = 16, .max = 0.3}, .unit = 1, .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_oracle = {
    .name = "oracle",
    .summary = "reads the exact best of each query head and drops the rest: a bound, for it looks at every key",
    .options = SCORED_OPTIONS("0.03", "0"),
    .create = create,
    SCORED_FUNCTIONS,
};
