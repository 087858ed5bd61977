#include <math.h>

#include "math/attention.h"
#include "math/blocks.h"

static float row_value(kv_type type, const void *row, int i)
{
    return type == KV_F16 ? f16_to_f32(((const uint16_t *)row)[i]) : ((const float *)row)[i];
}

/* Adds one row to the state of one query; returns the score. */
static float attend(const float *q, int d, kv_type type, const void *row, float *m, float *l, float *o)
{
    float score = 0;
    for (int i = 0; i < d; i++) score += q[i] * row_value(type, row, i);
    if (score > *m) {
        float shrink = expf(*m - score);
        for (int i = 0; i < d; i++) o[i] *= shrink;
        *l *= shrink;
        *m = score;
    }
    float p = expf(score - *m);
    for (int i = 0; i < d; i++) o[i] += p * row_value(type, row, d + i);
    *l += p;
    return score;
}

static void attend_rows(const float *q, int g, int d, kv_type type, const void *const *rows, int64_t n, float *scores,
                        attention_state *state)
{
    for (int h = 0; h < g; h++)
        for (int64_t r = 0; r < n; r++) {
            float score = attend(q + h * d, d, type, rows[r], state->m + h, state->l + h, state->o + h * d);
            if (scores) scores[h * n + r] = score;
        }
}

static void attend_tile(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                        attention_state *state)
{
    size_t bytes = kv_row_bytes(type, d);
    (void)n, (void)scratch; /* the limits say which rows are read; nothing is converted ahead */
    for (int64_t i = 0; i < nq; i++)
        for (int r = 0; r < limit[i]; r++)
            attend(q + i * d, d, type, (const char *)rows + (size_t)r * bytes, state->m + i, state->l + i, state->o + i * d);
}

const attention_kernels attention_scalar = {attend_rows, attend_tile, attend_tile};
