/* What a session will take, before it does. */
#include <stdio.h>
#include <string.h>

#include "gen/session.h"

typedef struct index_size {
    double index, codebooks, stored; /* bytes; stored: on disk */
    double large;                    /* blocks of at least a huge page */
    uint64_t codebook_file;
} index_size;

static index_size index_size_of(const attn_policy *p)
{
    attn_memory memory = {.index.held_only = true, .codebooks.held_only = true};
    p->type->tally(p, &memory);
    index_size size = {(double)memory.index.held, (double)memory.codebooks.held, 0, (double)memory.index.n_large, memory.codebook_file};
    const attn_saving *saving = p->type->saving;
    const double parts = (double)p->shape.kv.n_layer * p->shape.kv.n_head_kv;
    for (int64_t i = 0; saving && i < saving->n_segments(p); i++) {
        const attn_saved_segment s = saving->segment(p, i);
        size.stored += parts * ((double)s.part_bytes + (double)s.n * sizeof(uint16_t));
    }
    if (saving) size.stored += (double)saving->state_bytes(p);
    return size;
}

static quarry_code index_grow(attn_policy *p, int64_t n, bool last, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    if (n > 0 && (code = p->type->reserve(p, n, error)) == QUARRY_OK) p->type->commit(p, n);
    if (code == QUARRY_OK && last && p->type->reserve_seal && (code = p->type->reserve_seal(p, error)) == QUARRY_OK)
        p->type->commit_seal(p);
    return code;
}

/* What a policy takes for n_far tokens: it is made as large as a session would make it, but not filled. Of more than 2 SAMPLE tokens it is as much again for
 * each as for those of the second SAMPLE. */
static quarry_code index_estimate(attn_policy *p, int64_t n_far, index_size *size, quarry_error *error)
{
    enum { SAMPLE = 32768 };
    const bool whole = n_far <= 2 * SAMPLE;
    quarry_code code = index_grow(p, whole ? n_far : SAMPLE, whole, error);
    if (code == QUARRY_OK) *size = index_size_of(p);
    if (whole || code != QUARRY_OK) return code;
    const index_size half = *size;
    if ((code = index_grow(p, SAMPLE, false, error)) != QUARRY_OK) return code;
    const index_size both = index_size_of(p);
    const double more = (double)(n_far - SAMPLE) / SAMPLE;
    *size =
        (index_size){half.index + more * (both.index - half.index), half.codebooks + more * (both.codebooks - half.codebooks),
                     half.stored + more * (both.stored - half.stored), half.large + more * (both.large - half.large), half.codebook_file};
    return QUARRY_OK;
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
        index_size size = {0};
        if (code == QUARRY_OK) code = index_estimate(policies[i], far_end - ATTN_SINKS, &size, error);
        const size_t threads = (size_t)thread_pool_size(model_pool(model)) * attn_policy_scratch(policies[i], far_end - ATTN_SINKS);
        if (threads > need->bytes[MEMORY_SCRATCH]) need->bytes[MEMORY_SCRATCH] = threads; /* policies of a session take it in turn */
        need->bytes[MEMORY_INDEX] += (size_t)size.index;
        need->bytes[MEMORY_CODEBOOKS] += (size_t)size.codebooks;
        need->stored_index += (uint64_t)size.stored;
        need->large_blocks += size.large;
        need->codebook_file += size.codebook_file;
        attn_policy_destroy(policies[i]);
    }
    if (need->stored_index) need->stored_kv = (uint64_t)n_tokens * row * (size_t)shape.kv.n_layer;
    size_t pass = 0;
    if (code == QUARRY_OK) code = forward_scratch_estimate(model, &shape, params->n_batch, &pass, error);
    if (code == QUARRY_OK && !kv_bytes_for(&shape.kv, n_tokens, params->n_batch, &need->bytes[MEMORY_KV]))
        code = error_set(error, QUARRY_ERROR_ARGUMENT, "a context of %lld tokens is out of reach", (long long)n_tokens);
    if (params->kv_ram && need->bytes[MEMORY_KV] > params->kv_ram) need->bytes[MEMORY_KV] = params->kv_ram;
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

/* A session's need and what there is for it. */
typedef struct verdict {
    session_memory need; /* but for the model and the program, and what the session holds already */
    memory_available available;
    bool by_limit;           /* address space is what is shortest */
    double all, index, left; /* bytes */
} verdict;

/* Allocated and never in RAM: large blocks begin at a multiple of a huge page, for which address space is spoilt before them, one block for every page of the cache,
 * and those of the index; and arenas grow in blocks, of which the last is up to as large as the others together, before they become one. */
static double spoilt_address(const session_memory *need)
{
    const double pages = (double)(need->n_tokens / KV_PAGE + 1), huge = 2 << 20;
    const double spoilt = ((double)need->bytes[MEMORY_KV] / pages >= huge ? pages : 0) + need->large_blocks;
    return spoilt * huge + (double)need->bytes[MEMORY_SCRATCH];
}

/* Of an empty session that reads n tokens; of another one, as much for each as those that it holds have taken. */
static quarry_code session_need(const quarry_session *s, int64_t n, session_memory *need, quarry_error *error)
{
    attn_policy *policies[SESSION_MAX_POLICIES];
    if (s->tokens.n) {
        const double share = (double)n / (double)s->tokens.n;
        *need = (session_memory){.n_tokens = n, .bytes = {[MEMORY_KV] = (size_t)(share * (double)kv_bytes(s->kv))}};
        for (int i = 0; i < s->n_policies; i++) need->bytes[MEMORY_INDEX] += (size_t)(share * (double)attn_policy_bytes(s->policies[i]));
        return QUARRY_OK;
    }
    for (int i = 0; i < s->n_policies; i++) {
        if ((policies[i] = s->policies[i]->type->fork(s->policies[i], error))) continue;
        while (i-- > 0) attn_policy_destroy(policies[i]);
        return QUARRY_ERROR_MEMORY;
    }
    return session_estimate(s->model, &s->params, policies, s->n_policies, n, need, error);
}

static quarry_code judge(const quarry_session *s, int64_t n, verdict *v, quarry_error *error)
{
    const quarry_code code = session_need(s, n, &v->need, error);
    if (code != QUARRY_OK) return code;
    v->index = (double)v->need.bytes[MEMORY_INDEX] + (double)v->need.bytes[MEMORY_CODEBOOKS];
    /* weights that are read from the mapped file are in what the system calls available, and are needed all the time */
    v->all = (double)session_memory_sum(&v->need) + (v->by_limit ? spoilt_address(&v->need) : (double)model_mapped_weights(s->model));
    return QUARRY_OK;
}

/* The most tokens, in hundreds, that would fit where v->need.n_tokens do not. */
static int64_t fitting_tokens(const quarry_session *s, const verdict *v)
{
    verdict other = *v;
    int64_t fits = 0, not = v->need.n_tokens;
    while (not -fits > 100 + not / 64) {
        const int64_t n = fits + (not -fits) / 2;
        if (judge(s, n, &other, NULL) == QUARRY_OK && other.all <= v->left)
            fits = n;
        else
            not = n;
    }
    return fits / 100 * 100;
}

/* What would fit, as the end of a message: whatever makes a context smaller is named here. */
static void advise(const quarry_session *s, const verdict *v, char *text, size_t size)
{
    const int64_t fitting = fitting_tokens(s, v);
    const int n_threads = thread_pool_size(model_pool(s->model));
    size_t n = 0;
    text[0] = 0;
    if (s->params.kv_f32) n += (size_t)snprintf(text + n, size - n, "leave out --kv-f32, ");
    if (v->all - v->index <= v->left)
        n += (size_t)snprintf(text + n, size - n, "take --attn full, which has no index (%.0f MiB), ", mib(v->all - v->index));
    if (!s->params.kv_ram && session_can_save(s) && v->all - (double)v->need.bytes[MEMORY_KV] < v->left)
        n += (size_t)snprintf(text + n, size - n, "keep keys and values on disk but for --kv-ram %.0fM, ",
                              mib(v->left - v->all + (double)v->need.bytes[MEMORY_KV]) / 2);
    if (n_threads > 1 && v->all - v->left < (double)v->need.bytes[MEMORY_SCRATCH] / 2)
        n += (size_t)snprintf(text + n, size - n, "use fewer threads than %d (-t), ", n_threads);
    if (fitting > 0) n += (size_t)snprintf(text + n, size - n, "give a text of at most %lld tokens, ", (long long)fitting);
    snprintf(text + n, size - n, "%suse a smaller model", n ? "or " : "");
}

quarry_code session_memory_check(const quarry_session *s, int64_t n, quarry_error *error)
{
    verdict v;
    char advice[320];
    memory_available_get("", &v.available);
    v.by_limit = v.available.address < v.available.bytes;
    v.left = (double)(v.by_limit ? v.available.address : v.available.bytes);
    const quarry_code code = judge(s, n, &v, error);
    if (code != QUARRY_OK) return code;
    if (v.all <= v.left) {
        const double swapped = v.all - v.left + (double)v.available.swap;
        if (!v.by_limit && swapped > 0)
            log_line(model_logger(s->model), QUARRY_LOG_WARN, "%lld tokens take %.0f MiB of memory, of which %.0f will be in swap: slowly",
                     (long long)n, mib(v.all), mib(swapped));
        return QUARRY_OK;
    }
    advise(s, &v, advice, sizeof advice);
    return error_set(error, QUARRY_ERROR_MEMORY,
                     "%lld tokens take %.0f MiB of memory (keys and values %.0f, index %.0f), and %s leaves %.0f: %s", (long long)n,
                     mib(v.all), mib((double)v.need.bytes[MEMORY_KV]), mib(v.index),
                     v.by_limit ? v.available.address_limit : v.available.limit, mib(v.left), advice);
}
