/* What a session will take, before it does. */
#include <stdio.h>
#include <string.h>

#include "gen/session.h"

/* What a policy takes for n_far tokens: it is made as large as a session would make it, but not filled, and destroyed. Past SAMPLE tokens, in proportion. */
static quarry_code index_estimate(const quarry_model *model, attn_policy *p, int64_t n_far, session_memory *need, quarry_error *error)
{
    enum { SAMPLE = 32768 };
    const int64_t n = n_far < SAMPLE ? n_far : SAMPLE;
    const double share = n_far > n ? (double)n_far / (double)n : 1;
    attn_memory memory = {{.held_only = true}, {.held_only = true}};
    quarry_code code = QUARRY_OK;
    if (n > 0 && (code = p->type->reserve(p, n, error)) == QUARRY_OK) {
        p->type->commit(p, n);
        if (p->type->reserve_seal && (code = p->type->reserve_seal(p, error)) == QUARRY_OK) p->type->commit_seal(p);
    }
    p->type->tally(p, &memory);
    need->bytes[MEMORY_INDEX] += (size_t)(share * (double)memory.index.held);
    need->bytes[MEMORY_CODEBOOKS] += (size_t)(share * (double)memory.codebooks.held);
    const size_t threads = (size_t)thread_pool_size(model_pool(model)) * attn_policy_scratch(p, n_far);
    if (threads > need->bytes[MEMORY_SCRATCH]) need->bytes[MEMORY_SCRATCH] = threads; /* policies of a session take it in turn */
    const attn_saving *saving = p->type->saving;
    for (int64_t i = 0; saving && i < saving->n_segments(p); i++) {
        const attn_saved_segment s = saving->segment(p, i);
        const size_t parts = (size_t)p->shape.kv.n_layer * (size_t)p->shape.kv.n_head_kv;
        need->stored += (uint64_t)(share * (double)(parts * (s.part_bytes + (size_t)s.n * sizeof(uint16_t))));
    }
    if (saving) need->stored += saving->state_bytes(p);
    attn_policy_destroy(p);
    return code;
}

/* All parts but those of the model and the program. Takes over the policies, as they were made, [n_policies]. */
static quarry_code session_estimate(quarry_model *model, const quarry_session_params *params, attn_policy **policies, int n_policies,
                                    int64_t n_tokens, session_memory *need, quarry_error *error)
{
    const attn_shape shape = session_attn_shape(model, params);
    const size_t row = kv_row_bytes(shape.kv.type, shape.kv.head_dim) * (size_t)shape.kv.n_head_kv;
    const int64_t far_end = attn_far_end(&shape, n_tokens);
    quarry_code code = QUARRY_OK;
    *need = (session_memory){.n_tokens = n_tokens};
    for (int i = 0; i < n_policies; i++) {
        if (code == QUARRY_OK)
            code = index_estimate(model, policies[i], far_end - ATTN_SINKS, need, error);
        else
            attn_policy_destroy(policies[i]);
    }
    if (need->stored) need->stored += (uint64_t)n_tokens * (row * (size_t)shape.kv.n_layer + sizeof(int32_t));
    size_t pass = 0;
    if (code == QUARRY_OK) code = forward_scratch_estimate(model, &shape, params->n_batch, &pass, error);
    if (code == QUARRY_OK && !kv_bytes_for(&shape.kv, n_tokens, params->n_batch, &need->bytes[MEMORY_KV]))
        code = error_set(error, QUARRY_ERROR_ARGUMENT, "a context of %lld tokens is out of reach", (long long)n_tokens);
    need->bytes[MEMORY_SCRATCH] += pass + (size_t)model_shape_of(model)->n_vocab * sizeof(float) + (size_t)n_tokens * sizeof(int32_t);
    return code;
}

quarry_code session_memory_estimate(quarry_model *model, const quarry_session_params *params, int64_t n_tokens, session_memory *need,
                                    quarry_error *error)
{
    quarry_session_params checked = *params;
    quarry_code code = session_check_params(model, &checked, error);
    if (code != QUARRY_OK) return code;
    const attn_shape shape = session_attn_shape(model, &checked);
    if (n_tokens == 0) n_tokens = params->n_ctx ? params->n_ctx : model_shape_of(model)->n_ctx_train;
    attn_policy *policy =
        attn_policy_create(checked.attn && *checked.attn ? checked.attn : attn_policies[0]->name, &shape, model_kernels(model), error);
    if (!policy) return error ? error->code : QUARRY_ERROR_ARGUMENT;
    code = session_estimate(model, &checked, &policy, 1, n_tokens, need, error);
    if (code != QUARRY_OK) return code;
    model_memory held;
    process_memory process;
    model_tally(model, &held);
    need->bytes[MEMORY_WEIGHTS] = held.weights.held;
    need->bytes[MEMORY_VOCABULARY] = held.vocabulary.held;
    if (process_memory_get(&process) && process.file > held.mapped) need->bytes[MEMORY_PROGRAM] = process.file - held.mapped;
    need->model_file = held.file_bytes;
    return QUARRY_OK;
}

/* ---- does it fit? ---- */

static double mib(double n_bytes)
{
    return n_bytes / (1 << 20);
}

/* What would fit, as the end of a message. A context of need->n_tokens takes `all`, of which `index` would go without one; `left` is less. */
static void advise(const quarry_session *s, const session_memory *need, double all, double index, double left, char *text, size_t size)
{
    const double fixed = (double)need->bytes[MEMORY_SCRATCH], share = all > fixed ? (left - fixed) / (all - fixed) : 0;
    const int64_t fitting = share > 0 ? (int64_t)(share * (double)need->n_tokens) / 100 * 100 : 0;
    size_t n = 0;
    text[0] = 0;
    if (s->params.kv_f32) n += (size_t)snprintf(text + n, size - n, "leave out --kv-f32, ");
    if (all - index <= left)
        n += (size_t)snprintf(text + n, size - n, "take --attn full, which has no index (%.0f MiB), ", mib(all - index));
    if (fitting > 0) n += (size_t)snprintf(text + n, size - n, "give a text of at most %lld tokens, ", (long long)fitting);
    snprintf(text + n, size - n, "%suse a smaller model", n ? "or " : "");
}

/* Blocks begin at a multiple of a huge page, for which address space is spoilt before them: one block for every page of the cache. */
static double spoilt_address(const session_memory *need)
{
    const double pages = (double)(need->n_tokens / KV_PAGE + 1), huge = 2 << 20;
    return (double)need->bytes[MEMORY_KV] / pages >= huge ? pages * huge : 0;
}

/* What a session of n tokens will hold, but for the model and the program. */
static quarry_code session_need(const quarry_session *s, int64_t n, session_memory *need, quarry_error *error)
{
    attn_policy *policies[SESSION_MAX_POLICIES];
    for (int i = 0; i < s->n_policies; i++) {
        if ((policies[i] = s->policies[i]->type->fork(s->policies[i], error))) continue;
        while (i-- > 0) attn_policy_destroy(policies[i]);
        return QUARRY_ERROR_MEMORY;
    }
    return session_estimate(s->model, &s->params, policies, s->n_policies, n, need, error);
}

quarry_code session_memory_check(const quarry_session *s, int64_t n, quarry_error *error)
{
    memory_available available;
    session_memory need;
    char advice[256];
    if (s->tokens.n) return QUARRY_OK; /* what is added to a text was not known when it was begun */
    quarry_code code = session_need(s, n, &need, error);
    if (code != QUARRY_OK) return code;
    memory_available_get("", &available);
    const bool by_limit = available.address < available.bytes;
    const double left = (double)(by_limit ? available.address : available.bytes);
    const double index = (double)need.bytes[MEMORY_INDEX] + (double)need.bytes[MEMORY_CODEBOOKS];
    /* weights that are read from the mapped file are in what the system calls available, and are needed all the time */
    const double all = (double)session_memory_sum(&need) + (by_limit ? spoilt_address(&need) : (double)model_mapped_weights(s->model));
    if (all <= left) {
        if (!by_limit && all > left - (double)available.swap)
            log_line(model_logger(s->model), QUARRY_LOG_WARN, "%lld tokens take %.0f MiB of memory, of which %.0f will be in swap: slowly",
                     (long long)n, mib(all), mib(all - left + (double)available.swap));
        return QUARRY_OK;
    }
    advise(s, &need, all, index, left, advice, sizeof advice);
    return error_set(error, QUARRY_ERROR_MEMORY,
                     "%lld tokens take %.0f MiB of memory (keys and values %.0f, index %.0f), and %s leaves %.0f: %s", (long long)n,
                     mib(all), mib((double)need.bytes[MEMORY_KV]), mib(index), by_limit ? "ulimit" : available.limit, mib(left), advice);
}
