/* Keeping the key index in step with the cache: what a session calls after rows were committed. */
#include <string.h>

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

/* ---- extended sequences ---- */

void attn_shape_extend(attn_shape *shape, int64_t window, int64_t distance)
{
    enum { LEAST = ATTENTION_TILE, MOST = 512 };
    int64_t block = window / 4 / LEAST * LEAST;
    block = block < LEAST ? LEAST : block > MOST ? MOST : block;
    shape->extend = (attn_extend){.window = window,
                                  .block = block,
                                  .distance = distance,
                                  .near_layer = shape->kv.n_layer + shape->kv.n_local,
                                  .sliding = shape->kv.window};
    shape->kv.n_local += shape->kv.n_layer;
    if (shape->kv.window < window + block) shape->kv.window = (int)(window + block);
    shape->read_window = window;
    shape->rope.n_rot = 0;
}

int64_t attn_extend_first(const attn_extend *e, int64_t pos)
{
    return pos < e->window ? 0 : (pos - e->window) / e->block * e->block;
}

int64_t attn_far_end(const attn_shape *shape, int64_t n)
{
    return shape->extend.window > 0 ? attn_extend_first(&shape->extend, n) : n - ATTN_WINDOW;
}

bool attn_reading_scores(const attn_reading *r, const math_kernels *kernels, int64_t first, int64_t end, float *scores, arena *scratch)
{
    const size_t n = (size_t)(end - first), g = (size_t)r->group;
    const int64_t far_end = r->near_first < first ? first : r->near_first < end ? r->near_first : end, n_far = far_end - first;
    const kv_type type = kv_shape_of(r->kv)->type;
    const void **rows = arena_alloc(scratch, n, sizeof *rows, NULL);
    float *part = arena_alloc(scratch, n * g, sizeof *part, NULL);
    attention_state unused = {.m = arena_alloc(scratch, g, sizeof(float), NULL),
                              .l = arena_alloc(scratch, g, sizeof(float), NULL),
                              .o = arena_alloc(scratch, g * (size_t)r->d, sizeof(float), NULL)};
    if (!rows || !part || !unused.m || !unused.l || !unused.o) return false;
    attention_clear(&unused, r->group, r->d);
    for (size_t i = 0; i < n; i++) {
        const int64_t pos = first + (int64_t)i;
        rows[i] = kv_row(r->kv, pos < far_end ? r->layer : r->near_layer, r->head, pos);
    }
    if (n_far) kernels->attention->rows(r->q_far, r->group, r->d, type, rows, n_far, part, &unused);
    for (size_t h = 0; h < g && n_far; h++) memcpy(scores + h * n, part + h * (size_t)n_far, (size_t)n_far * sizeof *scores);
    const size_t n_near = n - (size_t)n_far;
    if (n_near) kernels->attention->rows(r->q, r->group, r->d, type, rows + n_far, (int64_t)n_near, part, &unused);
    for (size_t h = 0; h < g && n_near; h++) memcpy(scores + h * n + n_far, part + h * n_near, n_near * sizeof *scores);
    return true;
}
