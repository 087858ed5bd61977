/* The two policies without an index. `full` reads everything, exactly. `window` reads sinks and the local window and drops the rest
 * (StreamingLLM, arXiv 2309.17453, without its re-positioning). */
#include "attn/policies.h"

static attn_policy *create(const attn_policy_type *type, const attn_shape *shape, const math_kernels *kernels, const char *spec,
                           quarry_error *error)
{
    if (attn_options_parse(type->name, spec, NULL, 0, error) != QUARRY_OK) return NULL;
    attn_policy *p = memory_zero(1, sizeof *p, "retrieval policy", error);
    if (p) *p = (attn_policy){.type = type, .shape = *shape, .kernels = kernels, .n_far = ATTN_SINKS};
    return p;
}

static attn_policy *full_create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return create(&attn_full, shape, kernels, spec, error);
}

static attn_policy *window_create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return create(&attn_window, shape, kernels, spec, error);
}

static void destroy(attn_policy *p)
{
    memory_free(p);
}

static attn_policy *fork(const attn_policy *p, quarry_error *error)
{
    return create(p->type, &p->shape, p->kernels, "", error);
}

static quarry_code nothing_to_reserve(attn_policy *p, int64_t n, quarry_error *error)
{
    (void)p, (void)n, (void)error;
    return QUARRY_OK;
}

static void nothing_to_append(attn_policy *p, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch)
{
    (void)p, (void)layer, (void)head, (void)kv, (void)n, (void)scratch;
}

static void commit(attn_policy *p, int64_t n)
{
    p->n_far += n;
}

static quarry_code select_nothing(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                                  const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)p, (void)layer, (void)head, (void)kv, (void)q, (void)pos, (void)near, (void)scratch, (void)cost, (void)error;
    *out = (attn_selection){0};
    return QUARRY_OK;
}

static void truncate_far(attn_policy *p, int64_t n)
{
    if (n < p->n_far) p->n_far = n > ATTN_SINKS ? n : ATTN_SINKS;
}

static void tally(const attn_policy *p, attn_memory *memory)
{
    memory_tally_add(&memory->index, p, sizeof *p);
}

const attn_policy_type attn_full = {
    .name = "full",
    .summary = "reads every row, exactly",
    .options = "",
    .create = full_create,
    .destroy = destroy,
    .fork = fork,
    .reserve = nothing_to_reserve,
    .append = nothing_to_append,
    .commit = commit,
    .truncate = truncate_far,
    .tally = tally,
};

const attn_policy_type attn_window = {
    .name = "window",
    .summary = "reads the first 8 and the last 64 tokens, drops the rest",
    .options = "",
    .create = window_create,
    .destroy = destroy,
    .fork = fork,
    .reserve = nothing_to_reserve,
    .append = nothing_to_append,
    .commit = commit,
    .select = select_nothing,
    .truncate = truncate_far,
    .tally = tally,
};
