/* Texts longer than the model was trained for: which tokens are local to a query, and at what distance it sees all others (docs/extend.md). */
#include <math.h>
#include <string.h>

#include "attn/attn.h"

void attn_shape_extend(attn_shape *shape, int64_t window, int64_t nearest, int64_t farthest)
{
    enum { LEAST = ATTENTION_TILE, MOST = 512 };
    int64_t block = window / 4 / LEAST * LEAST;
    block = block < LEAST ? LEAST : block > MOST ? MOST : block;
    shape->extend = (attn_extend){.window = window,
                                  .block = block,
                                  .nearest = nearest,
                                  .farthest = farthest,
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

/* exp(i angle) at the middle, times sin(n angle / 2) / (n sin(angle / 2)) for n distances. */
void attn_extend_angles(const attn_extend *e, const double *inverse, int n_pairs, float *cs)
{
    const double n = (double)(e->farthest - e->nearest + 1), middle = 0.5 * (double)(e->nearest + e->farthest);
    for (int i = 0; i < n_pairs; i++) {
        const double half = 0.5 * inverse[i], below = n * sin(half), length = fabs(below) > 1e-12 ? sin(n * half) / below : 1;
        cs[2 * i] = (float)(length * cos(middle * inverse[i]));
        cs[2 * i + 1] = (float)(length * sin(middle * inverse[i]));
    }
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
