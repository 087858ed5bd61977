#include "gen/session.h"

/* Floats that a forward pass keeps per token of its batch: residual stream and its norm, queries and attended values, keys and values, gate and up, RoPE angles. */
static int64_t floats_per_token(const model_shape *s)
{
    int64_t q_width = (int64_t)s->n_head * s->head_dim, kv_width = (int64_t)s->n_head_kv * s->head_dim;
    return 2 * s->n_embd + 2 * q_width + 2 * kv_width + 2 * s->n_ff + s->n_rot;
}

quarry_code session_memory_estimate(quarry_model *model, const quarry_session_params *params, session_memory *need, quarry_error *error)
{
    const model_shape *s = model_shape_of(model);
    attn_shape shape = model_attn_shape(model, params->kv_f32 ? KV_F32 : KV_F16);
    int64_t n_ctx = params->n_ctx ? params->n_ctx : s->n_ctx_train, n_batch = params->n_batch ? params->n_batch : SESSION_DEFAULT_BATCH;
    int64_t n_pages = (n_ctx + KV_PAGE - 1) / KV_PAGE, n_far = n_ctx - ATTN_SINKS - ATTN_WINDOW;
    quarry_code code = QUARRY_OK;
    attn_policy *policy = attn_policy_create(params->attn ? params->attn : attn_policies[0]->name, &shape, model_kernels(model), error);
    if (!policy) return error ? error->code : QUARRY_ERROR_MEMORY;
    size_t row_bytes = kv_row_bytes(shape.kv.type, shape.kv.head_dim) * (size_t)shape.kv.n_layer * (size_t)shape.kv.n_head_kv;
    need->n_ctx = n_ctx;
    need->scratch_bytes = (size_t)(n_batch * floats_per_token(s)) * sizeof(float);
    if (!size_multiply((size_t)n_pages * KV_PAGE, row_bytes, &need->kv_bytes))
        code = error_set(error, QUARRY_ERROR_ARGUMENT, "a context of %lld tokens is out of reach", (long long)n_ctx);
    /* What a policy takes before it may be appended to is all but what sealing adds. */
    if (!code && n_far > 0) code = policy->type->reserve(policy, n_far, error);
    need->index_bytes = policy->type->bytes(policy);
    attn_policy_destroy(policy);
    return code;
}
