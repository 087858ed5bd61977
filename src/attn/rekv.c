/* rekv (Di et al., arXiv 2503.00540; InfLLM, arXiv 2402.04617, chooses alike): blocks of 128 tokens with the mean of their keys. A block's score is that mean's with the query, and the
 * best blocks are read whole; while a document is read in blocks of rows, with the mean query of theirs. Made for keys without position, that is for `--extend`; within the trained length the keys are those after
 * RoPE. The papers choose for all heads of a layer together, and ReKV once for a question; here every KV head and token chooses. */
#include <string.h>

#include "attn/scored.h"

enum { BLOCK_TOKENS = 128 };

static size_t unit_bytes(const scored *p)
{
    return (size_t)p->d * sizeof(float);
}

static float *mean_of(const scored_part *part, int64_t block)
{
    return (float *)(part->units + (size_t)block * part->p->unit_bytes);
}

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    const int d = part->p->d;
    float *key = arena_alloc(scratch, (size_t)d, sizeof *key, NULL);
    for (int64_t block = first; key && block < end; block++) {
        float *mean = mean_of(part, block);
        const int64_t from = block * BLOCK_TOKENS, to = from + BLOCK_TOKENS < n ? from + BLOCK_TOKENS : n;
        memset(mean, 0, (size_t)d * sizeof *mean);
        for (int64_t t = from; t < to; t++) {
            scored_key(part, t, key);
            for (int i = 0; i < d; i++) mean[i] += key[i] / (float)(to - from);
        }
    }
    return key != NULL;
}

/* Counted: the means, in 16 bits. */
static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const scored *p = part->p;
    const int64_t n_blocks = (n + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    float *of_blocks = arena_alloc(scratch, (size_t)p->group * (size_t)n_blocks, sizeof *of_blocks, error);
    if (!of_blocks) return false;
    for (int h = 0; h < p->group; h++)
        for (int64_t block = 0; block < n_blocks; block++)
            of_blocks[h * n_blocks + block] = p->base.kernels->vector->dot(q + h * p->d, mean_of(part, block), p->d);
    scored_spread(part, of_blocks, n, scores);
    cost->index_bytes += n_blocks * p->d * (int64_t)sizeof(uint16_t);
    return true;
}

static const scored_method method = {.type = &attn_rekv,
                                     .defaults = {.budget = 0.03, .min = 16, .max = 0.3, .shared = 1},
                                     .unit = BLOCK_TOKENS,
                                     .unit_bytes = unit_bytes,
                                     .encode = encode,
                                     .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_rekv = {
    .name = "rekv",
    .summary = "reads the blocks of 128 tokens whose mean key scores highest (arXiv 2503.00540)",
    .options = SCORED_OPTIONS("0.03", "1"),
    .create = create,
    SCORED_FUNCTIONS,
};
