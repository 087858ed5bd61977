/* Reading in blocks: what a long document's rows attend to when full attention would be too much, or when it is longer than the model was trained for.
 *
 * A block of consecutive rows reads its local tokens densely, each row up to itself; then sinks, and of the far tokens those that the policy selects for the block: one
 * selection, from a few of its queries (InfLLM, arXiv 2402.04617, and ReKV, arXiv 2503.00540, choose blocks of tokens for a block of queries; here it is tokens).
 * Every row reads all of them, gathered into tiles, so that the work of a row does not grow with the document. */
#include <string.h>

#include "attn/pass.h"

enum { READ_QUERIES = 8 /* rows of a block whose queries choose */ };

typedef struct block {
    attn_pass *p;
    const attn_task *t;
    const attn_row *rows; /* [t->n_rows] */
    arena *scratch;
    attention_state state; /* [nq] */
    float *q;              /* [nq][d], scaled, of the rows being attended */
    int *limit;            /* [nq] */
    void *kernel_scratch;
    unsigned char *gathered; /* [ATTENTION_TILE] rows */
    int nq, n_gathered;
    attn_near near;
    int64_t far_end, n_sinks;
    int64_t tiled; /* the first local row that is attended where it lies; those before are gathered */
} block;

int64_t attn_block_rows(const attn_pass *p, int64_t row, int64_t n)
{
    const int64_t first = attn_near_of(p, &p->rows[row]).first, most = TILE_VECTORS / p->group > 0 ? TILE_VECTORS / p->group : 1;
    int64_t end = 1;
    while (end < n && end < most && attn_near_of(p, &p->rows[row + end]).first == first) end++;
    return end;
}

static bool block_make(block *b, quarry_error *error)
{
    const attn_pass *p = b->p;
    const size_t nq = (size_t)b->nq, d = (size_t)p->d;
    b->q = arena_alloc(b->scratch, nq * d, sizeof *b->q, error);
    b->limit = arena_alloc(b->scratch, nq, sizeof *b->limit, error);
    b->kernel_scratch = arena_alloc(b->scratch, attention_tile_scratch(b->nq, p->d), 1, error);
    b->gathered = arena_alloc(b->scratch, ATTENTION_TILE, kv_row_bytes(p->shape->kv.type, p->d), error);
    return b->q && b->limit && b->kernel_scratch && b->gathered && attn_state_alloc(&b->state, b->nq, p->d, b->scratch, error);
}

/* The rows' queries as near or far rows see them. */
static void take_queries(block *b, bool far)
{
    const attn_pass *p = b->p;
    const int64_t width = (int64_t)p->group * p->d;
    for (int64_t r = 0; r < b->t->n_rows; r++) {
        const float *from = (far ? attn_far_query_of : attn_query_of)(p, b->t->row + r, b->t->head);
        for (int64_t i = 0; i < width; i++) b->q[r * width + i] = from[i] * p->shape->scale;
    }
}

/* n rows that lie side by side, of which every query sees those up to its own position: first is the first row's. */
static void attend_tile(block *b, const void *rows, int n, int64_t first)
{
    const attn_pass *p = b->p;
    for (int i = 0; i < b->nq; i++) {
        const int64_t seen = b->rows[i / p->group].pos + 1 - first;
        b->limit[i] = seen < 0 ? 0 : seen > n ? n : (int)seen;
    }
    p->c->kernels->attention->tile_coarse(b->q, b->limit, b->nq, p->d, p->shape->kv.type, rows, n, b->kernel_scratch, &b->state);
}

static void attend_tiles(block *b, int layer, int64_t first, int64_t end)
{
    for (; first < end; first += ATTENTION_TILE)
        attend_tile(b, kv_row(b->rows->kv, layer, b->t->head, first), end - first < ATTENTION_TILE ? (int)(end - first) : ATTENTION_TILE,
                    first);
}

/* Rows from all over, which lie before every query. */
static void flush(block *b)
{
    if (b->n_gathered) attend_tile(b, b->gathered, b->n_gathered, -ATTENTION_TILE);
    b->n_gathered = 0;
}

static void gather_row(block *b, const void *row)
{
    const size_t bytes = kv_row_bytes(b->p->shape->kv.type, b->p->d);
    memcpy(b->gathered + (size_t)b->n_gathered++ * bytes, row, bytes);
    if (b->n_gathered == ATTENTION_TILE) flush(b);
}

static void gather(block *b, int64_t pos)
{
    gather_row(b, kv_row(b->rows->kv, b->p->layer, b->t->head, pos));
}

/* One selection from the queries of rows spread over the block. */
static quarry_code select_together(const block *b, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    const attn_pass *p = b->p;
    const int g = p->group;
    const int64_t fit = ATTN_MAX_GROUP / g, most = fit < READ_QUERIES ? fit : READ_QUERIES, m = b->t->n_rows < most ? b->t->n_rows : most;
    const size_t n = (size_t)(m * g), d = (size_t)p->d;
    float *q = arena_alloc(b->scratch, n * d, sizeof *q, error);
    attention_state near = {.m = arena_alloc(b->scratch, n, sizeof(float), error), .l = arena_alloc(b->scratch, n, sizeof(float), error)};
    if (!q || !near.m || !near.l) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < m; i++) {
        const int64_t r = (2 * i + 1) * b->t->n_rows / (2 * m);
        memcpy(q + i * g * p->d, attn_far_query_of(p, b->t->row + r, b->t->head), (size_t)g * d * sizeof *q);
        memcpy(near.m + i * g, b->state.m + r * g, (size_t)g * sizeof *near.m);
        memcpy(near.l + i * g, b->state.l + r * g, (size_t)g * sizeof *near.l);
    }
    return b->rows->policy->type->select_block(b->rows->policy, p->layer, b->t->head, b->rows->kv, q, (int)n, &near, b->scratch, out, cost,
                                               error);
}

/* The selection of the mean query, for policies that know one query at a time. */
static quarry_code select_by_mean(const block *b, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    const attn_pass *p = b->p;
    const int64_t n = b->t->n_rows, width = (int64_t)p->group * p->d, middle = n / 2 * p->group;
    float *q = arena_alloc(b->scratch, (size_t)width, sizeof *q, error);
    if (!q) return QUARRY_ERROR_MEMORY;
    memset(q, 0, (size_t)width * sizeof *q);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < width; i++) q[i] += attn_far_query_of(p, b->t->row + r, b->t->head)[i] / (float)n;
    const attention_state near = {b->state.m + middle, b->state.l + middle, b->state.o + middle * p->d};
    return b->rows->policy->type->select(b->rows->policy, p->layer, b->t->head, b->rows->kv, q, b->rows[n - 1].pos, &near, b->scratch, out,
                                         cost, error);
}

/* The local rows, and then all before them. */
static quarry_code attend(block *b, attn_cost *cost, quarry_error *error)
{
    const attn_policy_type *type = b->rows->policy->type;
    const bool searched = type->select && b->far_end > ATTN_SINKS;
    attn_selection selected = {.all = true};
    attend_tiles(b, b->near.layer, b->tiled, b->rows[b->t->n_rows - 1].pos + 1);
    if (attn_extended(b->p)) take_queries(b, true);
    if (searched) {
        for (int64_t pos = 0; pos < b->n_sinks; pos++) gather(b, pos);
        for (int64_t pos = b->far_end; pos < b->tiled; pos++) gather(b, pos);
        flush(b);
        quarry_code code = type->select_block ? select_together(b, &selected, cost, error) : select_by_mean(b, &selected, cost, error);
        if (code == QUARRY_OK && kv_cold_of(b->rows->kv))
            code = type->fetch(b->rows->policy, b->p->layer, b->t->head, b->rows->kv, &selected, b->scratch, error);
        if (code != QUARRY_OK) return code;
    }
    if (!selected.all) {
        for (int64_t i = 0; i < selected.n; i++)
            if (selected.rows)
                gather_row(b, selected.rows[i]);
            else
                gather(b, selected.ids[i]);
    } else if (searched) {
        for (int64_t pos = b->n_sinks; pos < b->far_end; pos++) gather(b, pos);
    } else {
        attend_tiles(b, b->p->layer, 0, b->tiled);
    }
    flush(b);
    cost->rows = selected.all ? 0 : selected.n - (b->far_end - b->n_sinks); /* beside those of a row that reads everything */
    return QUARRY_OK;
}

quarry_code attn_run_block(attn_pass *p, const attn_task *t, arena *scratch, quarry_error *error)
{
    const int g = p->group;
    block b = {.p = p, .t = t, .rows = p->rows + t->row, .scratch = scratch, .nq = (int)t->n_rows * g};
    if (!block_make(&b, error)) return QUARRY_ERROR_MEMORY;
    b.near = attn_near_of(p, b.rows);
    b.far_end = b.rows->policy->n_far < b.near.first ? b.rows->policy->n_far : b.near.first;
    b.n_sinks = b.far_end < ATTN_SINKS ? b.far_end : ATTN_SINKS;
    /* Tiles begin at multiples of their size. If nothing is far, all is local. */
    if (attn_extended(p))
        b.tiled = b.near.first;
    else
        b.tiled = b.far_end <= ATTN_SINKS ? 0 : (b.far_end + ATTENTION_TILE - 1) / ATTENTION_TILE * ATTENTION_TILE;
    attn_cost cost = {0};
    take_queries(&b, false);
    quarry_code code = attend(&b, &cost, error);
    if (code != QUARRY_OK) return code;
    for (int64_t r = 0; r < t->n_rows; r++) {
        attn_cost own = r == 0 ? cost : (attn_cost){0};
        const attention_state part = {b.state.m + r * g, b.state.l + r * g, b.state.o + r * g * p->d};
        own.rows = cost.rows + b.rows[r].pos + 1;
        attn_write_out(&part, g, p->d, attn_out_of(p, t->row + r, t->head));
        attn_add_cost(p, t->row + r, t->head, &own);
    }
    return QUARRY_OK;
}
