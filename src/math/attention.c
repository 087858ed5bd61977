#include "math/attention.h"

#include <math.h>

/* Keys and values of one tile in f32, padded to vectors of 16, and the scores of a chunk of at most 32 queries. */
size_t attention_tile_scratch(int nq, int d)
{
    size_t padded = ((size_t)d + 15) / 16 * 16;
    (void)nq; /* queries are taken in chunks */
    return (2 * padded + 32) * ATTENTION_TILE * sizeof(float);
}

void attention_clear(attention_state *s, int g, int d)
{
    for (int h = 0; h < g; h++) {
        s->m[h] = -INFINITY;
        s->l[h] = 0;
    }
    for (int64_t i = 0; i < (int64_t)g * d; i++) s->o[i] = 0;
}

void attention_merge(attention_state *a, const attention_state *b, int g, int d)
{
    for (int h = 0; h < g; h++) {
        float top = a->m[h] > b->m[h] ? a->m[h] : b->m[h];
        if (top == -INFINITY) continue; /* both empty */
        float x = expf(a->m[h] - top), y = expf(b->m[h] - top);
        float *o = a->o + (int64_t)h * d;
        const float *p = b->o + (int64_t)h * d;
        for (int i = 0; i < d; i++) o[i] = o[i] * x + p[i] * y;
        a->l[h] = a->l[h] * x + b->l[h] * y;
        a->m[h] = top;
    }
}
