/* Shared by forward.c and block.c: one layer's attention while it runs. */
#ifndef ATTN_PASS_H
#define ATTN_PASS_H

#include <stdatomic.h>

#include "attn/attn.h"

enum { TILE_VECTORS = 192 /* query vectors of a tile task: converting a key tile is then 1 to 3 % of the work */ };

/* What find leaves for attend; what it points to is in the scratch of the thread that ran find. */
typedef struct attn_found {
    const float *q, *q_far; /* [group][d], scaled; the same one unless extended */
    attention_state state;
    attn_selection selected;
    attn_cost cost;
    int64_t sinks, far_end, n_near;
    atomic_int done; /* 1: found, -1: failed */
} attn_found;

typedef struct attn_task {
    enum { TASK_TILE, TASK_BLOCK, TASK_SPLIT, TASK_SEARCH, TASK_FIND, TASK_ATTEND } kind;
    int head;
    int64_t row, n_rows;  /* rows of the batch */
    int64_t first, end;   /* split: keys */
    bool begins;          /* split: the first of its row */
    attention_state part; /* split: state of this part, in shared scratch */
    attn_found *found;    /* find and attend: in shared scratch */
} attn_task;

typedef struct attn_pass {
    const attn_context *c;
    const attn_shape *shape;
    int layer, group, d;
    const attn_row *rows;
    const float *q;   /* [n][n_head][d] */
    float *out;       /* [n][n_head][d] */
    attn_cost *costs; /* [n][n_head_kv] or NULL */
    attn_task *tasks;
    int64_t n_tasks, capacity;
    atomic_bool failed;
    quarry_error error; /* of the first task that failed */
} attn_pass;

/* The local rows of a query: from `first` on, in `layer` of the cache. */
typedef struct attn_near {
    int layer;
    int64_t first;
} attn_near;

static inline bool attn_extended(const attn_pass *p)
{
    return p->shape->extend.window > 0;
}

static inline attn_near attn_near_of(const attn_pass *p, const attn_row *row)
{
    if (attn_extended(p)) return (attn_near){p->shape->extend.near_layer + p->layer, attn_extend_first(&p->shape->extend, row->pos)};
    return (attn_near){p->layer, row->policy->n_far < row->pos + 1 ? row->policy->n_far : row->pos + 1};
}

static inline const float *attn_query_of(const attn_pass *p, int64_t row, int head)
{
    return p->q + ((row * p->shape->n_head) + (int64_t)head * p->group) * p->d;
}

/* The query as far rows see it. */
static inline const float *attn_far_query_of(const attn_pass *p, int64_t row, int head)
{
    const float *far = p->rows[row].q_far;
    return far ? far + (int64_t)head * p->group * p->d : attn_query_of(p, row, head);
}

static inline float *attn_out_of(const attn_pass *p, int64_t row, int head)
{
    return p->out + ((row * p->shape->n_head) + (int64_t)head * p->group) * p->d;
}

static inline bool attn_state_alloc(attention_state *s, int g, int d, arena *scratch, quarry_error *error)
{
    s->m = arena_alloc(scratch, (size_t)g, sizeof(float), error);
    s->l = arena_alloc(scratch, (size_t)g, sizeof(float), error);
    s->o = arena_alloc(scratch, (size_t)g * (size_t)d, sizeof(float), error);
    if (!s->m || !s->l || !s->o) return false;
    attention_clear(s, g, d);
    return true;
}

/* out[g][d] = o / l */
static inline void attn_write_out(const attention_state *s, int g, int d, float *out)
{
    for (int h = 0; h < g; h++) {
        float inverse = s->l[h] > 0 ? 1 / s->l[h] : 0;
        for (int i = 0; i < d; i++) out[h * d + i] = s->o[h * d + i] * inverse;
    }
}

static inline void attn_add_cost(const attn_pass *p, int64_t row, int head, const attn_cost *cost)
{
    if (p->costs) attn_cost_add(&p->costs[row * p->shape->kv.n_head_kv + head], cost);
}

/* ---- block.c ---- */

/* How many of the rows from `row` on, n there are, make the next block: their local tokens begin at the same one. */
int64_t attn_block_rows(const attn_pass *p, int64_t row, int64_t n);
quarry_code attn_run_block(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error);

#endif
