/* Attention over K|V rows. A row holds one token's key and value of one KV head side by side: [K d][V d], f16 or f32; keys are post-RoPE.
 * Results are a running softmax state that can be merged in any order:
 *
 *     m[g]     largest scaled score so far (-INFINITY when nothing was seen)
 *     l[g]     sum of exp(score - m)
 *     o[g][d]  sum of exp(score - m) * v
 *
 * f32 accumulation throughout. */
#ifndef MATH_ATTENTION_H
#define MATH_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

typedef enum kv_type { KV_F16, KV_F32 } kv_type;

static inline size_t kv_row_bytes(kv_type type, int head_dim)
{
    return (size_t)head_dim * 2 * (type == KV_F16 ? 2 : 4);
}

typedef struct attention_state {
    float *m, *l; /* [g] */
    float *o;     /* [g][d] */
} attention_state;

typedef struct attention_kernels {
    /* The g query heads of one GQA group (q[g][d], already scaled by 1/sqrt(d)) over n rows given by pointer, added to *state. A row loaded once serves all
     * heads. scores, if not NULL, receives the scaled scores [g][n]. d is a multiple of 8, g <= 64; any n >= 0. Rows are prefetched ahead. */
    void (*rows)(const float *q, int g, int d, kv_type type, const void *const *rows, int64_t n, float *scores, attention_state *state);

    /* Dense tile: nq query vectors (q[nq][d], scaled) over n <= 64 contiguous rows, query i seeing the first limit[i] of them (0 <= limit[i] <= n); states are
     * m[nq], l[nq], o[nq][d], m being a score at most ATTENTION_LAG below the largest. scratch: attention_tile_scratch bytes, aligned to 64. */
    void (*tile)(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                 attention_state *state);

    /* The same for rows that read a document: may round f16 rows and their queries to bf16 (avx512bf16). A score then errs by at most
     * e = 1.01 2^-7 sum |q_i k_i|, o / l by at most (exp(2 e + 2^-6) - 1) max |v|. */
    void (*tile_coarse)(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                        attention_state *state);
} attention_kernels;

enum {
    ATTENTION_TILE = 64, /* rows per dense tile */
    ATTENTION_LAG = 8,   /* what m of a tile may lack to the largest score: sums are rescaled only when it is more */
};

size_t attention_tile_scratch(int nq, int d);

/* Adds state b to a (any order; exact to rounding). */
void attention_merge(attention_state *a, const attention_state *b, int g, int d);
/* Empty state: m = -INFINITY, l = 0, o = 0. */
void attention_clear(attention_state *s, int g, int d);

extern const attention_kernels attention_scalar, attention_avx2, attention_avx512, attention_avx512bf16;

#endif
