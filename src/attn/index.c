/* Keeping the key index in step with the cache: what a session calls after rows were committed. */
#include "attn/attn.h"

typedef struct index_job {
    attn_policy *policy;
    const kv_seq *kv;
    int64_t n; /* tokens to append; 0: seal */
    arena *scratch;
} index_job;

static void index_task(void *context, int64_t task, int thread)
{
    const index_job *job = context;
    attn_policy *p = job->policy;
    int layer = (int)(task / p->shape.kv.n_head_kv), head = (int)(task % p->shape.kv.n_head_kv);
    arena_reset(&job->scratch[thread]);
    if (job->n)
        p->type->append(p, layer, head, job->kv, job->n, &job->scratch[thread]);
    else
        p->type->seal(p, layer, head, job->kv, &job->scratch[thread]);
}

static quarry_code append(attn_policy *p, const kv_seq *kv, int64_t n, thread_pool *pool, arena *scratch, quarry_error *error)
{
    if (n <= 0) return QUARRY_OK;
    quarry_code code = p->type->reserve(p, n, error);
    if (code != QUARRY_OK) return code;
    index_job job = {p, kv, n, scratch};
    thread_pool_run(pool, (int64_t)p->shape.kv.n_layer * p->shape.kv.n_head_kv, index_task, &job);
    p->type->commit(p, n);
    return QUARRY_OK;
}

static quarry_code advance(attn_policy *p, const kv_seq *kv, int64_t end, thread_pool *pool, arena *scratch, quarry_error *error)
{
    for (; p; p = p->also) {
        int64_t n = end - p->n_far;
        quarry_code code = append(p, kv, n > 0 ? n / ATTN_BLOCK * ATTN_BLOCK : 0, pool, scratch, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

quarry_code attn_index_advance(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch, quarry_error *error)
{
    return advance(p, kv, attn_far_end(&p->shape, kv_length(kv)), pool, scratch, error);
}

quarry_code attn_index_trail(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch, quarry_error *error)
{
    int64_t end = attn_far_end(&p->shape, kv_length(kv)), before = kv_length(kv) - p->shape.read_window;
    return advance(p, kv, before < end ? before : end, pool, scratch, error);
}

quarry_code attn_index_seal(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch, quarry_error *error)
{
    for (; p; p = p->also) {
        quarry_code code = append(p, kv, attn_far_end(&p->shape, kv_length(kv)) - p->n_far, pool, scratch, error);
        if (code != QUARRY_OK) return code;
        if (!p->type->seal) continue;
        if ((code = p->type->reserve_seal(p, error)) != QUARRY_OK) return code;
        index_job job = {p, kv, 0, scratch};
        thread_pool_run(pool, (int64_t)p->shape.kv.n_layer * p->shape.kv.n_head_kv, index_task, &job);
        p->type->commit_seal(p);
    }
    return QUARRY_OK;
}
