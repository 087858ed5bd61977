/* meanstd: pages of 16 tokens with mean and variance of each dimension of their keys. A page's score is q·mean + deviations *
 * sqrt(sum over i of q_i² variance_i); the best pages are read whole. */
#include <math.h>
#include <string.h>

#include "attn/pages.h"

enum { OWN_DEVIATIONS };

static bool encode(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch)
{
    int d = part->p->d;
    float *key = arena_alloc(scratch, (size_t)d, sizeof *key, NULL);
    for (int64_t page = first; key && page < end; page++) {
        float *mean = pages_at(part, page), *variance = mean + d;
        int64_t from = page * PAGE_TOKENS, to = from + PAGE_TOKENS < n ? from + PAGE_TOKENS : n;
        memset(mean, 0, 2 * (size_t)d * sizeof *mean);
        for (int64_t t = from; t < to; t++) {
            scored_key(part, t, key);
            for (int i = 0; i < d; i++) mean[i] += key[i] / (float)(to - from);
        }
        for (int64_t t = from; t < to; t++) {
            scored_key(part, t, key);
            for (int i = 0; i < d; i++) variance[i] += (key[i] - mean[i]) * (key[i] - mean[i]) / (float)(to - from);
        }
    }
    return key != NULL;
}

static bool score(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error)
{
    const scored *p = part->p;
    const float deviations = (float)p->options.own[OWN_DEVIATIONS];
    int d = p->d;
    int64_t n_pages = (n + PAGE_TOKENS - 1) / PAGE_TOKENS;
    float *of_pages = arena_alloc(scratch, (size_t)p->group * (size_t)n_pages, sizeof *of_pages, error);
    float *squares = arena_alloc(scratch, (size_t)d, sizeof *squares, error);
    if (!of_pages || !squares) return false;
    for (int h = 0; h < p->group; h++) {
        for (int i = 0; i < d; i++) squares[i] = q[h * d + i] * q[h * d + i];
        for (int64_t page = 0; page < n_pages; page++) {
            const float *mean = pages_at(part, page);
            float spread = p->base.kernels->vector->dot(squares, mean + d, d);
            of_pages[h * n_pages + page] = p->base.kernels->vector->dot(q + h * d, mean, d) + deviations * sqrtf(fmaxf(spread, 0));
        }
    }
    scored_spread(part, of_pages, n, scores);
    pages_count(part, n_pages, cost);
    return true;
}

static const scored_method method = {.type = &attn_meanstd,
                                     .defaults = {.budget = 0.03, .min = 16, .max = 0.3, .own = {1}},
                                     .own = {"deviations"},
                                     .most = {100},
                                     .unit = PAGE_TOKENS,
                                     .unit_bytes = pages_unit_bytes,
                                     .encode = encode,
                                     .score = score};

static attn_policy *create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    return scored_create(&method, shape, kernels, spec, error);
}

const attn_policy_type attn_meanstd = {
    .name = "meanstd",
    .summary = "reads the pages of 16 tokens with the highest mean plus standard deviation of scores",
    .options = "deviations=1      standard deviations that are added to the mean\n" SCORED_OPTIONS("0.03", "0"),
    .create = create,
    SCORED_FUNCTIONS,
};
