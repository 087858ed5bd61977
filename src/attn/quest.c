/* quest (Tang et al., arXiv 2406.10774): pages of 16 tokens with the least and the largest of each dimension of their keys. A page's score is
 * what its keys can reach at most, sum over i of max(q_i least_i, q_i most_i); the best pages are read whole. */
#include <math.h>

#include "attn/pages.h"

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    int d = part->p->d;
    float *key = arena_alloc(scratch, (size_t)d, sizeof *key, NULL);
    for (int64_t page = first; key && page < end; page++) {
        float *least = pages_at(part, page), *most = least + d;
        for (int i = 0; i < d; i++) {
            least[i] = INFINITY;
            most[i] = -INFINITY;
        }
        for (int64_t t = page * PAGE_TOKENS; t < (page + 1) * PAGE_TOKENS && t < n; t++) {
            scored_key(part, t, key);
            for (int i = 0; i < d; i++) {
                least[i] = fminf(least[i], key[i]);
                most[i] = fmaxf(most[i], key[i]);
            }
        }
    }
    return key != NULL;
}

static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const scored *p = part->p;
    int d = p->d;
    int64_t n_pages = (n + PAGE_TOKENS - 1) / PAGE_TOKENS;
    float *of_pages = arena_alloc(scratch, (size_t)p->group * (size_t)n_pages, sizeof *of_pages, error);
    float *signs = arena_alloc(scratch, 2 * (size_t)d, sizeof *signs, error); /* the query's negative and positive parts */
    if (!of_pages || !signs) return false;
    for (int h = 0; h < p->group; h++) {
        for (int i = 0; i < d; i++) {
            signs[i] = fminf(q[h * d + i], 0);
            signs[d + i] = fmaxf(q[h * d + i], 0);
        }
        for (int64_t page = 0; page < n_pages; page++)
            of_pages[h * n_pages + page] = p->base.kernels->vector->dot(signs, pages_at(part, page), 2 * d);
    }
    scored_spread(part, of_pages, n, scores);
    pages_count(part, n_pages, cost);
    return true;
}

static const scored_method method = {.type = &attn_quest,
                                     .defaults = {.budget = 0.03, .min = 16, .max = 0.3},
                                     .unit = PAGE_TOKENS,
                                     .unit_bytes = pages_unit_bytes,
                                     .encode = encode,
                                     .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_quest = {
    .name = "quest",
    .summary = "reads the pages of 16 tokens whose keys could score highest (arXiv 2406.10774)",
    .options = SCORED_OPTIONS("0.03", "0"),
    .create = create,
    SCORED_FUNCTIONS,
};
