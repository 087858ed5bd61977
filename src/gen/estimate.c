#include "gen/session.h"

/* Floats that a forward pass keeps per token of its batch: residual stream and its norm, queries and attended values, keys and values, gate and up, RoPE angles. */
static int64_t floats_per_token(const model_shape *s)
{
    int64_t q_width = (int64_t)s->n_head * s->head_dim, kv_width = (int64_t)s->n_head_kv * s->head_dim;
    return 2 * s->n_embd + 2 * q_width + 2 * kv_width + 2 * s->n_ff + s->n_rot;
}

/* What a policy takes for n_far tokens: one that is made as large as a session would make it, but not filled. Past SAMPLE tokens, in proportion. */
static quarry_code index_estimate(const quarry_model *model, const char *spec, const attn_shape *shape, int64_t n_far, size_t *n_bytes,
                                  quarry_error *error)
{
    enum { SAMPLE = 32768 };
    int64_t n = n_far < SAMPLE ? n_far : SAMPLE;
    quarry_error failure = {0};
    attn_policy *p = attn_policy_create(spec, shape, model_kernels(model), &failure);
    if (!p) return error_set(error, failure.code, "%s", failure.message);
    quarry_code code = QUARRY_OK;
    if (n > 0 && (code = p->type->reserve(p, n, error)) == QUARRY_OK) {
        p->type->commit(p, n);
        if (p->type->reserve_seal && (code = p->type->reserve_seal(p, error)) == QUARRY_OK) p->type->commit_seal(p);
    }
    *n_bytes = p->type->bytes(p);
    if (n_far > n) *n_bytes = (size_t)((double)*n_bytes * (double)n_far / (double)n);
    attn_policy_destroy(p);
    return code;
}

quarry_code session_memory_estimate(quarry_model *model, const quarry_session_params *params, session_memory *need, quarry_error *error)
{
    const model_shape *s = model_shape_of(model);
    quarry_session_params checked = *params;
    quarry_code code = session_check_params(model, &checked, error);
    if (code != QUARRY_OK) return code;
    params = &checked;
    attn_shape shape = session_attn_shape(model, params);
    int64_t n_ctx = params->n_ctx, n_batch = params->n_batch;
    need->n_ctx = n_ctx;
    need->scratch_bytes = (size_t)(n_batch * floats_per_token(s)) * sizeof(float);
    if (!kv_bytes_for(&shape.kv, n_ctx, n_batch, &need->kv_bytes))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "a context of %lld tokens is out of reach", (long long)n_ctx);
    const char *spec = params->attn ? params->attn : attn_policies[0]->name;
    return index_estimate(model, spec, &shape, n_ctx - ATTN_SINKS - ATTN_WINDOW, &need->index_bytes, error);
}
