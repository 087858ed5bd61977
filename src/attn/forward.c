/* Attention of one layer. The rows of a forward pass fall into four kinds of task:
 *
 *   tile    a block of consecutive dense rows of one timeline x one KV head, over all keys in tiles (prefill; coarse when a document is read)
 *   block   the same where a document is not read with full attention: the local keys in tiles, then what is selected for the block (block.c)
 *   split   one row x one KV head x SPLIT keys, everything read (decode with `full`); partial states are merged in order
 *   search  one row x one KV head: find (local rows, select), then attend (gathered rows, tail) (decode with a policy, or with somebody
 *           who wants to be told)
 *
 * In a layer with a sliding window every row reads its window: as tiles where rows follow each other, else as a split.
 *
 * How the work is cut depends on the rows alone, never on the number of threads, so neither does the result. Whether find and attend are
 * two tasks does, for the few heads of one decoded token would leave threads idle; the second waits for the first. */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#include "attn/pass.h"

enum {
    SPLIT = 2048,  /* keys of a split task */
    TILE_FROM = 4, /* shortest run that is tiled; rows of a document always are: their rounding must not depend on the batch */
};

/* from[g][d] times scale, in scratch. */
static float *scaled(const attn_pass *p, const float *from, arena *scratch, quarry_error *error)
{
    int64_t n = (int64_t)p->group * p->d;
    float *q = arena_alloc(scratch, (size_t)n, sizeof *q, error);
    if (q)
        for (int64_t i = 0; i < n; i++) q[i] = from[i] * p->shape->scale;
    return q;
}

static bool is_local(const attn_pass *p)
{
    return p->layer >= p->shape->kv.n_layer;
}

/* The first of the keys that a row sees in memory and in order: behind the cold ones, before which only sinks are. */
static int64_t first_seen(const attn_pass *p, const attn_row *row)
{
    const int64_t window = attn_extended(p) ? p->shape->extend.sliding : p->shape->kv.window;
    if (!is_local(p)) return kv_cold_in(row->kv)->end;
    return row->pos < window ? 0 : row->pos - window + 1;
}

static int64_t count_seen(const attn_pass *p, const attn_row *row)
{
    return row->pos + 1 - (is_local(p) ? first_seen(p, row) : 0);
}

static void add_rows(const attn_pass *p, int64_t row, int head, int64_t n)
{
    attn_cost cost = {0};
    *(is_local(p) ? &cost.window_rows : &cost.rows) = n;
    attn_add_cost(p, row, head, &cost);
}

/* Pointers to rows [first, end) appended at list[n]; returns the new n. */
static int64_t list_range(const attn_pass *p, const attn_row *row, int layer, int head, int64_t first, int64_t end, const void **list,
                          int64_t n)
{
    size_t bytes = kv_row_bytes(p->shape->kv.type, p->d);
    while (first < end) {
        int64_t run = kv_run(first);
        if (run > end - first) run = end - first;
        const char *data = kv_row(row->kv, layer, head, first);
        for (int64_t i = 0; i < run; i++) list[n++] = data + (size_t)i * bytes;
        first += run;
    }
    return n;
}

static quarry_code run_range(attn_pass *p, const attn_row *row, int head, const float *q, int64_t first, int64_t end, arena *scratch,
                             attention_state *state, quarry_error *error)
{
    const void **list = arena_alloc(scratch, (size_t)(end - first), sizeof *list, error);
    if (!list) return QUARRY_ERROR_MEMORY;
    int64_t n = list_range(p, row, p->layer, head, first, end, list, 0);
    p->c->kernels->attention->rows(q, p->group, p->d, p->shape->kv.type, list, n, NULL, state);
    return QUARRY_OK;
}

/* First key of a row that is attended in tiles: tiles begin at multiples of ATTENTION_TILE, and what of a window lies before is attended row by row, so that the
 * rounding of a row does not depend on which others are beside it. */
static int64_t first_tiled(const attn_pass *p, const attn_row *row)
{
    return (first_seen(p, row) + ATTENTION_TILE - 1) / ATTENTION_TILE * ATTENTION_TILE;
}

/* Queries [nq][d] of rows that see all cold keys: these in the order of their files, and the sinks before them. */
static quarry_code attend_cold(const attn_pass *p, const attn_task *t, const float *q, int *limit, int nq, void *kernel_scratch,
                               attention_state *state, arena *scratch, quarry_error *error)
{
    const attn_row *row = &p->rows[t->row];
    kv_cold *cold = kv_cold_of(row->kv);
    const int part = p->layer * p->shape->kv.n_head_kv + t->head;
    const int64_t per = kv_cold_block_rows(cold), step = per > ATTENTION_TILE ? per : ATTENTION_TILE;
    const size_t row_bytes = kv_row_bytes(p->shape->kv.type, p->d);
    uint8_t *rows = arena_alloc(scratch, (size_t)(step / per), kv_cold_block_bytes(cold), error);
    if (!rows) return QUARRY_ERROR_MEMORY;
    for (int64_t segment = 0; segment < kv_cold_in(row->kv)->n_segments; segment++) {
        const int64_t length = kv_cold_length(cold, segment);
        for (int64_t first = 0; first < length; first += step) {
            const int64_t n = length - first < step ? length - first : step;
            const quarry_code code = kv_cold_read(cold, part, segment, first, n, rows, error);
            if (code != QUARRY_OK) return code;
            for (int64_t at = 0; at < n; at += ATTENTION_TILE) {
                const int m = n - at < ATTENTION_TILE ? (int)(n - at) : ATTENTION_TILE;
                for (int i = 0; i < nq; i++) limit[i] = m;
                p->c->kernels->attention->tile_coarse(q, limit, nq, p->d, p->shape->kv.type, rows + (size_t)at * row_bytes, m,
                                                      kernel_scratch, state);
            }
        }
    }
    return QUARRY_OK;
}

static quarry_code run_tile(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error)
{
    int g = p->group, d = p->d, nq = (int)t->n_rows * g;
    const attn_row *rows = p->rows + t->row;
    const attention_kernels *kernels = p->c->kernels->attention;
    float *q = arena_alloc(scratch, (size_t)nq * (size_t)d, sizeof *q, error);
    int *limit = arena_alloc(scratch, (size_t)nq, sizeof *limit, error);
    void *kernel_scratch = arena_alloc(scratch, attention_tile_scratch(nq, d), 1, error);
    attention_state state;
    if (!q || !limit || !kernel_scratch || !attn_state_alloc(&state, nq, d, scratch, error)) return QUARRY_ERROR_MEMORY;
    for (int64_t r = 0; r < t->n_rows; r++) {
        const float *from = attn_query_of(p, t->row + r, t->head);
        for (int64_t i = 0; i < (int64_t)g * d; i++) q[r * g * d + i] = from[i] * p->shape->scale;
        int64_t seen = first_seen(p, &rows[r]), tiled = first_tiled(p, &rows[r]);
        if (tiled > rows[r].pos + 1) tiled = rows[r].pos + 1;
        attention_state part = {state.m + r * g, state.l + r * g, state.o + r * g * d};
        quarry_code code = QUARRY_OK;
        if (!is_local(p) && seen > 0) code = run_range(p, &rows[r], t->head, q + r * g * d, 0, ATTN_SINKS, scratch, &part, error);
        if (code == QUARRY_OK && seen < tiled) code = run_range(p, &rows[r], t->head, q + r * g * d, seen, tiled, scratch, &part, error);
        if (code != QUARRY_OK) return code;
    }
    if (!is_local(p) && first_seen(p, rows) > 0) {
        quarry_code code = attend_cold(p, t, q, limit, nq, kernel_scratch, &state, scratch, error);
        if (code != QUARRY_OK) return code;
    }
    int64_t end = rows[t->n_rows - 1].pos + 1;
    for (int64_t first = first_tiled(p, rows); first < end; first += ATTENTION_TILE) {
        int n = end - first < ATTENTION_TILE ? (int)(end - first) : ATTENTION_TILE;
        for (int i = 0; i < nq; i++) {
            int64_t seen = first < first_tiled(p, &rows[i / g]) ? 0 : rows[i / g].pos + 1 - first;
            limit[i] = seen < 0 ? 0 : seen > n ? n : (int)seen;
        }
        const void *keys = kv_row(rows->kv, p->layer, t->head, first);
        (rows->dense ? kernels->tile_coarse : kernels->tile)(q, limit, nq, d, p->shape->kv.type, keys, n, kernel_scratch, &state);
    }
    for (int64_t r = 0; r < t->n_rows; r++) {
        attention_state part = {state.m + r * g, state.l + r * g, state.o + r * g * d};
        attn_write_out(&part, g, d, attn_out_of(p, t->row + r, t->head));
        add_rows(p, t->row + r, t->head, count_seen(p, &rows[r]));
    }
    return QUARRY_OK;
}

static quarry_code run_split(attn_pass *p, attn_task *t, arena *scratch, quarry_error *error)
{
    const float *q = scaled(p, attn_query_of(p, t->row, t->head), scratch, error);
    if (!q) return QUARRY_ERROR_MEMORY;
    if (t->begins) add_rows(p, t->row, t->head, p->rows[t->row].pos + 1 - t->first);
    return run_range(p, &p->rows[t->row], t->head, q, t->first, t->end, scratch, &t->part, error);
}

/* What is read anyway: sinks, and what is behind the far tokens, of which an extended sequence sees the last as local. */
static quarry_code read_near(const attn_pass *p, const attn_task *t, arena *scratch, attn_found *f, quarry_error *error)
{
    const attn_row *row = &p->rows[t->row];
    const attention_kernels *kernels = p->c->kernels->attention;
    const attn_near near = attn_near_of(p, row);
    const kv_type type = p->shape->kv.type;
    f->far_end = row->policy->n_far < near.first ? row->policy->n_far : near.first;
    f->sinks = f->far_end < ATTN_SINKS ? f->far_end : ATTN_SINKS;
    f->n_near = f->sinks + row->pos + 1 - f->far_end;
    const void **list = arena_alloc(scratch, (size_t)f->n_near, sizeof *list, error);
    if (!list) return QUARRY_ERROR_MEMORY;
    int64_t n = list_range(p, row, p->layer, t->head, 0, f->sinks, list, 0);
    n = list_range(p, row, p->layer, t->head, f->far_end, near.first, list, n);
    if (attn_extended(p)) {
        kernels->rows(f->q_far, p->group, p->d, type, list, n, NULL, &f->state);
        n = 0;
    }
    n = list_range(p, row, near.layer, t->head, near.first, row->pos + 1, list, n);
    kernels->rows(f->q, p->group, p->d, type, list, n, NULL, &f->state);
    return QUARRY_OK;
}

static quarry_code find(attn_pass *p, const attn_task *t, arena *scratch, attn_found *f, quarry_error *error)
{
    const attn_row *row = &p->rows[t->row];
    attn_policy *policy = row->policy;
    f->q = f->q_far = scaled(p, attn_query_of(p, t->row, t->head), scratch, error);
    if (row->q_far) f->q_far = scaled(p, attn_far_query_of(p, t->row, t->head), scratch, error);
    if (!f->q || !f->q_far || !attn_state_alloc(&f->state, p->group, p->d, scratch, error)) return QUARRY_ERROR_MEMORY;
    quarry_code code = read_near(p, t, scratch, f, error);
    if (code != QUARRY_OK) return code;
    if (!policy->type->select) {
        f->selected = (attn_selection){.all = true};
        return QUARRY_OK;
    }
    return policy->type->select(policy, p->layer, t->head, row->kv, attn_far_query_of(p, t->row, t->head), row->pos, &f->state, scratch,
                                &f->selected, &f->cost, error);
}

static void tell(const attn_pass *p, const attn_task *t, const attn_found *f, const float *scores, arena *scratch)
{
    const attn_row *row = &p->rows[t->row];
    const attn_near near = attn_near_of(p, row);
    const attn_reading reading = {.layer = p->layer,
                                  .head = t->head,
                                  .group = p->group,
                                  .d = p->d,
                                  .pos = row->pos,
                                  .kv = row->kv,
                                  .q = f->q,
                                  .q_far = f->q_far,
                                  .n_sinks = f->sinks,
                                  .far_end = f->far_end,
                                  .near_first = near.first,
                                  .near_layer = near.layer,
                                  .selected = &f->selected,
                                  .scores = scores,
                                  .state = &f->state};
    if (row->observer) row->observer->reading(row->observer->data, &reading, scratch);
}

static quarry_code attend(attn_pass *p, const attn_task *t, arena *scratch, attn_found *f, quarry_error *error)
{
    const attn_row *row = &p->rows[t->row];
    attn_policy *policy = row->policy;
    attn_selection *selected = &f->selected;
    if (selected->all) {
        quarry_code code = run_range(p, row, t->head, f->q_far, f->sinks, f->far_end, scratch, &f->state, error);
        if (code != QUARRY_OK) return code;
        f->cost.rows = row->pos + 1;
        tell(p, t, f, NULL, scratch);
    } else {
        const void **far = arena_alloc(scratch, (size_t)selected->n, sizeof *far, error);
        float *scores = arena_alloc(scratch, (size_t)(selected->n * p->group), sizeof *scores, error);
        if (!far || !scores) return QUARRY_ERROR_MEMORY;
        if (kv_cold_of(row->kv)) {
            const quarry_code code = policy->type->fetch(policy, p->layer, t->head, row->kv, selected, scratch, error);
            if (code != QUARRY_OK) return code;
        }
        for (int64_t i = 0; i < selected->n; i++)
            far[i] = selected->rows ? selected->rows[i] : kv_row(row->kv, p->layer, t->head, selected->ids[i]);
        p->c->kernels->attention->rows(f->q_far, p->group, p->d, p->shape->kv.type, far, selected->n, scores, &f->state);
        if (policy->type->tail)
            policy->type->tail(policy, p->layer, t->head, attn_far_query_of(p, t->row, t->head), selected, scores, far, scratch, &f->state,
                               &f->cost);
        f->cost.rows = f->n_near + selected->n;
        tell(p, t, f, scores, scratch);
    }
    attn_write_out(&f->state, p->group, p->d, attn_out_of(p, t->row, t->head));
    attn_add_cost(p, t->row, t->head, &f->cost);
    return QUARRY_OK;
}

static quarry_code run_search(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error)
{
    attn_found f = {0};
    quarry_code code = find(p, t, scratch, &f, error);
    return code == QUARRY_OK ? attend(p, t, scratch, &f, error) : code;
}

static quarry_code run_find(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error)
{
    quarry_code code = find(p, t, scratch, t->found, error);
    atomic_store_explicit(&t->found->done, code == QUARRY_OK ? 1 : -1, memory_order_release);
    return code;
}

/* Tasks are claimed in order, so the find task is running or done. */
static quarry_code run_attend(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error)
{
    enum { SPINS_BEFORE_YIELD = 20000 };
    int done;
    for (int i = 0; (done = atomic_load_explicit(&t->found->done, memory_order_acquire)) == 0; i++)
        if (i >= SPINS_BEFORE_YIELD) sched_yield();
    return done > 0 ? attend(p, t, scratch, t->found, error) : QUARRY_OK; /* find has reported */
}

static void run_task(void *context, int64_t index, int thread)
{
    attn_pass *p = context;
    attn_task *t = &p->tasks[index];
    arena *scratch = &p->c->scratch[thread];
    quarry_error error = {0};
    quarry_code code;
    if (t->kind != TASK_FIND && t->kind != TASK_ATTEND) arena_reset(scratch);
    switch (t->kind) {
    case TASK_TILE: code = run_tile(p, t, scratch, &error); break;
    case TASK_BLOCK: code = attn_run_block(p, t, scratch, &error); break;
    case TASK_SPLIT: code = run_split(p, t, scratch, &error); break;
    case TASK_SEARCH: code = run_search(p, t, scratch, &error); break;
    case TASK_FIND: code = run_find(p, t, scratch, &error); break;
    default: code = run_attend(p, t, scratch, &error);
    }
    if (code == QUARRY_OK || atomic_exchange(&p->failed, true)) return;
    p->error = error;
    p->error.code = code;
}

static attn_task *push_task(attn_pass *p)
{
    return p->n_tasks < p->capacity ? &p->tasks[p->n_tasks++] : NULL;
}

/* Does the row belong to a document and read all that the layer lets it see, or as its block does? Or to no document, and reads all? */
static bool is_dense(const attn_pass *p, const attn_row *row)
{
    return is_local(p) || row->dense || !row->policy || (!row->policy->type->select && !row->observer && !attn_extended(p));
}

static bool in_blocks(const attn_pass *p, const attn_row *row)
{
    return !is_local(p) && row->dense && row->policy && p->shape->read_window > 0 && (attn_extended(p) || row->policy->type->select);
}

/* Length of the run of dense rows from `row` on that can be tiled together: all of them read a document, or none. */
static int64_t dense_run(const attn_pass *p, int64_t row, int64_t n)
{
    const attn_row *rows = p->rows;
    int64_t end = row + 1;
    while (end < n && is_dense(p, &rows[end]) && rows[end].dense == rows[row].dense && rows[end].kv == rows[row].kv &&
           rows[end].pos == rows[end - 1].pos + 1)
        end++;
    return end - row;
}

static int64_t split_count(int64_t n_keys)
{
    return (n_keys + SPLIT - 1) / SPLIT;
}

/* Few searches and nothing else: find tasks for all, then attend tasks. So cold rows of all heads are on their way before the first is waited for. */
static quarry_code plan_in_halves(attn_pass *p, int64_t n, quarry_error *error)
{
    int heads = p->shape->kv.n_head_kv;
    p->capacity = 2 * n * heads;
    p->tasks = arena_alloc(p->c->shared, (size_t)p->capacity, sizeof *p->tasks, error);
    attn_found *found = arena_alloc(p->c->shared, (size_t)(n * heads), sizeof *found, error);
    if (!p->tasks || !found) return QUARRY_ERROR_MEMORY;
    memset(found, 0, (size_t)(n * heads) * sizeof *found);
    for (int attending = 0; attending < 2; attending++)
        for (int64_t i = 0; i < n * heads; i++)
            *push_task(p) = (attn_task){
                .kind = attending ? TASK_ATTEND : TASK_FIND, .head = (int)(i % heads), .row = i / heads, .n_rows = 1, .found = &found[i]};
    for (int i = 0; i < thread_pool_size(p->c->pool); i++) arena_reset(&p->c->scratch[i]);
    return QUARRY_OK;
}

static bool in_halves(const attn_pass *p, int64_t n)
{
    enum { ENOUGH = 4 }; /* whole searches per thread */
    int threads = thread_pool_size(p->c->pool);
    bool cold = false;
    if (n * p->shape->kv.n_head_kv >= ENOUGH * threads) return false;
    for (int64_t i = 0; i < n; i++) {
        if (is_dense(p, &p->rows[i])) return false;
        cold |= kv_cold_of(p->rows[i].kv) != NULL;
    }
    return threads > 1 || cold;
}

static quarry_code plan(attn_pass *p, int64_t n, quarry_error *error)
{
    if (in_halves(p, n)) return plan_in_halves(p, n, error);
    int heads = p->shape->kv.n_head_kv;
    int64_t block = TILE_VECTORS / p->group > 0 ? TILE_VECTORS / p->group : 1;
    for (int64_t i = 0; i < n; i++) p->capacity += heads * (is_dense(p, &p->rows[i]) ? split_count(p->rows[i].pos + 1) : 1);
    p->tasks = arena_alloc(p->c->shared, (size_t)p->capacity, sizeof *p->tasks, error);
    if (!p->tasks) return QUARRY_ERROR_MEMORY;
    for (int64_t row = 0, run; row < n; row += run) {
        run = is_dense(p, &p->rows[row]) ? dense_run(p, row, n) : 1;
        if (!is_dense(p, &p->rows[row])) {
            for (int h = 0; h < heads; h++) *push_task(p) = (attn_task){.kind = TASK_SEARCH, .head = h, .row = row, .n_rows = 1};
        } else if (in_blocks(p, &p->rows[row])) {
            for (int64_t b = 0, n_rows; b < run; b += n_rows) {
                n_rows = attn_block_rows(p, row + b, run - b);
                for (int h = 0; h < heads; h++)
                    *push_task(p) = (attn_task){.kind = TASK_BLOCK, .head = h, .row = row + b, .n_rows = n_rows};
            }
        } else if (run >= TILE_FROM || p->rows[row].dense) {
            /* The last rows see the most keys: the long tasks are claimed first, so that threads finish together. */
            for (int64_t b = (run - 1) / block * block; b >= 0; b -= block)
                for (int h = 0; h < heads; h++)
                    *push_task(p) = (attn_task){.kind = TASK_TILE, .head = h, .row = row + b, .n_rows = run - b < block ? run - b : block};
        } else {
            run = 1;
            int64_t keys = p->rows[row].pos + 1, begin = first_seen(p, &p->rows[row]);
            for (int h = 0; h < heads; h++)
                for (int64_t first = begin; first < keys; first += SPLIT) {
                    attn_task *t = push_task(p);
                    *t = (attn_task){.kind = TASK_SPLIT, .head = h, .row = row, .n_rows = 1, .first = first, .begins = first == begin};
                    t->end = keys - first < SPLIT ? keys : first + SPLIT;
                    if (!attn_state_alloc(&t->part, p->group, p->d, p->c->shared, error)) return QUARRY_ERROR_MEMORY;
                }
        }
    }
    return QUARRY_OK;
}

/* Joins the parts of split rows, in order of keys. */
static void merge_splits(attn_pass *p)
{
    for (int64_t i = 0; i < p->n_tasks; i++) {
        attn_task *t = &p->tasks[i];
        if (t->kind != TASK_SPLIT || !t->begins) continue;
        for (int64_t j = i + 1; j < p->n_tasks && p->tasks[j].kind == TASK_SPLIT && !p->tasks[j].begins; j++)
            attention_merge(&t->part, &p->tasks[j].part, p->group, p->d);
        attn_write_out(&t->part, p->group, p->d, attn_out_of(p, t->row, t->head));
    }
}

typedef struct observe_job {
    const attn_pass *pass;
    int64_t row, n;
} observe_job;

/* One KV head of a run of dense rows: gives its queries [n][group][d] to every policy that wants them. */
static void observe_task(void *context, int64_t head, int thread)
{
    const observe_job *job = context;
    const attn_pass *p = job->pass;
    int64_t width = (int64_t)p->group * p->d;
    arena *scratch = &p->c->scratch[thread];
    arena_reset(scratch);
    float *q = arena_alloc(scratch, (size_t)(job->n * width), sizeof *q, NULL);
    if (!q) return; /* the index learns from fewer queries */
    for (int64_t i = 0; i < job->n; i++) memcpy(q + i * width, attn_far_query_of(p, job->row + i, (int)head), (size_t)width * sizeof *q);
    for (attn_policy *policy = p->rows[job->row].policy; policy; policy = policy->also)
        if (policy->type->observe) policy->type->observe(policy, p->layer, (int)head, q, p->rows[job->row].pos, job->n);
}

static void observe(attn_pass *p, int64_t n)
{
    for (int64_t row = 0, run; row < n; row += run) {
        run = dense_run(p, row, n);
        bool wanted = false;
        if (p->rows[row].dense)
            for (attn_policy *policy = p->rows[row].policy; policy; policy = policy->also) wanted |= policy->type->observe != NULL;
        observe_job job = {p, row, run};
        if (wanted)
            thread_pool_run(p->c->pool, p->shape->kv.n_head_kv, observe_task, &job);
        else
            run = 1;
    }
}

quarry_code attn_forward(const attn_context *c, const attn_shape *shape, int layer, const attn_row *rows, int64_t n, const float *q,
                         float *out, attn_cost *cost, quarry_error *error)
{
    attn_pass pass = {.c = c, .shape = shape, .layer = layer, .rows = rows, .q = q, .out = out};
    pass.group = shape->n_head / shape->kv.n_head_kv;
    pass.d = shape->kv.head_dim;
    arena_reset(c->shared);
    if (cost) {
        size_t cells = (size_t)n * (size_t)shape->kv.n_head_kv;
        pass.costs = arena_alloc(c->shared, cells, sizeof *pass.costs, error);
        if (!pass.costs) return QUARRY_ERROR_MEMORY;
        memset(pass.costs, 0, cells * sizeof *pass.costs);
    }
    quarry_code code = plan(&pass, n, error);
    if (code != QUARRY_OK) return code;
    if (!is_local(&pass)) observe(&pass, n);
    thread_pool_run(c->pool, pass.n_tasks, run_task, &pass);
    if (pass.failed) {
        if (error) *error = pass.error;
        return pass.error.code;
    }
    merge_splits(&pass);
    for (int64_t i = 0; cost && i < n; i++)
        for (int h = 0; h < shape->kv.n_head_kv; h++) attn_cost_add(&cost[i], &pass.costs[i * shape->kv.n_head_kv + h]);
    return QUARRY_OK;
}
