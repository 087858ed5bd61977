#include <math.h>
#include <string.h>

#include "gen/gen.h"

typedef struct candidate {
    float logit;
    int32_t id;
} candidate;

struct sampler {
    quarry_sampling params;
    int32_t *bias_tokens;
    float *bias_values;
    int64_t n_vocab;
    float *logits;         /* [n_vocab] after bias and penalty */
    uint8_t *seen;         /* [n_vocab], all 0 between calls */
    candidate *candidates; /* [n_vocab] */
    random_state random;
};

void quarry_sampling_default(quarry_sampling *sampling)
{
    *sampling = (quarry_sampling){.top_p = 1, .repeat_penalty = 1, .repeat_last_n = 64, .max_tokens = -1};
}

static quarry_code params_check(const quarry_sampling *p, int64_t n_vocab, quarry_error *error)
{
    if (!isfinite(p->temperature)) return error_set(error, QUARRY_ERROR_ARGUMENT, "temperature must be a finite number");
    if (!(p->top_p >= 0 && p->top_p <= 1))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "top_p is %g, it must be from 0 to 1", (double)p->top_p);
    if (!(p->min_p >= 0 && p->min_p <= 1))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "min_p is %g, it must be from 0 to 1", (double)p->min_p);
    if (!(p->repeat_penalty > 0) || !isfinite(p->repeat_penalty))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "repeat_penalty is %g, it must be above 0", (double)p->repeat_penalty);
    if (p->n_bias < 0 || (p->n_bias && (!p->bias_tokens || !p->bias_values)))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "n_bias is %d without bias_tokens and bias_values", p->n_bias);
    for (int i = 0; i < p->n_bias; i++) {
        if (p->bias_tokens[i] < 0 || p->bias_tokens[i] >= n_vocab)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "logit bias for token %d: the vocabulary has tokens 0 to %lld",
                             (int)p->bias_tokens[i], (long long)n_vocab - 1);
        if (isnan(p->bias_values[i]) || p->bias_values[i] == INFINITY)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "logit bias for token %d must be a number or minus infinity",
                             (int)p->bias_tokens[i]);
    }
    return QUARRY_OK;
}

sampler *sampler_create(const quarry_sampling *params, int64_t n_vocab, quarry_error *error)
{
    if (params_check(params, n_vocab, error)) return NULL;
    sampler *s = memory_zero(1, sizeof *s, "sampler", error);
    if (!s) return NULL;
    size_t n_bias = (size_t)params->n_bias, n = (size_t)n_vocab;
    s->params = *params;
    s->n_vocab = n_vocab;
    s->bias_tokens = memory_alloc(n_bias, sizeof *s->bias_tokens, "logit bias", error);
    s->bias_values = memory_alloc(n_bias, sizeof *s->bias_values, "logit bias", error);
    s->logits = memory_alloc(n, sizeof *s->logits, "sampler", error);
    s->seen = memory_zero(n, sizeof *s->seen, "sampler", error);
    s->candidates = memory_alloc(n, sizeof *s->candidates, "sampler", error);
    if (!s->bias_tokens || !s->bias_values || !s->logits || !s->seen || !s->candidates) {
        sampler_destroy(s);
        return NULL;
    }
    if (n_bias) {
        memcpy(s->bias_tokens, params->bias_tokens, n_bias * sizeof *s->bias_tokens);
        memcpy(s->bias_values, params->bias_values, n_bias * sizeof *s->bias_values);
    }
    random_seed(&s->random, params->seed);
    return s;
}

void sampler_destroy(sampler *s)
{
    if (!s) return;
    memory_free(s->bias_tokens);
    memory_free(s->bias_values);
    memory_free(s->logits);
    memory_free(s->seen);
    memory_free(s->candidates);
    memory_free(s);
}

/* ---- bias and penalty ---- */

/* Once per token however often it occurred, as Keskar et al., "CTRL" (2019), section 4.1, with negative logits multiplied. */
static void penalise(sampler *s, const int32_t *recent, int64_t n_recent)
{
    float penalty = s->params.repeat_penalty;
    int64_t n = s->params.repeat_last_n < 0 || s->params.repeat_last_n > n_recent ? n_recent : s->params.repeat_last_n;
    const int32_t *last = recent + n_recent - n;
    for (int64_t i = 0; i < n; i++) {
        int32_t id = last[i];
        if (id < 0 || id >= s->n_vocab || s->seen[id]) continue;
        s->seen[id] = 1;
        s->logits[id] = s->logits[id] > 0 ? s->logits[id] / penalty : s->logits[id] * penalty;
    }
    for (int64_t i = 0; i < n; i++)
        if (last[i] >= 0 && last[i] < s->n_vocab) s->seen[last[i]] = 0;
}

static const float *adjust(sampler *s, const float *logits, const int32_t *recent, int64_t n_recent)
{
    bool penalty = s->params.repeat_penalty != 1 && s->params.repeat_last_n != 0 && n_recent > 0;
    if (!penalty && !s->params.n_bias) return logits;
    memcpy(s->logits, logits, (size_t)s->n_vocab * sizeof *logits);
    for (int i = 0; i < s->params.n_bias; i++) s->logits[s->bias_tokens[i]] += s->bias_values[i];
    if (penalty) penalise(s, recent, n_recent);
    return s->logits;
}

/* ---- choice ---- */

/* NaN never wins: the first token if there is nothing else. */
static int32_t argmax(const float *logits, int64_t n)
{
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (logits[i] > (best < 0 ? -INFINITY : logits[best])) best = i;
    return best < 0 ? 0 : (int32_t)best;
}

/* a comes before b: likelier, or as likely with the lower id */
static bool before(candidate a, candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void heap_sink(candidate *heap, int64_t n, int64_t i)
{
    candidate moving = heap[i];
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

/* Moves the first of heap c[n] to c[n-1]; c[n-1) is a heap afterwards. */
static void heap_pop(candidate *c, int64_t n)
{
    candidate first = c[0];
    c[0] = c[n - 1];
    c[n - 1] = first;
    heap_sink(c, n - 1, 0);
}

static double likelihood(const candidate *c, float max, double scale)
{
    return exp((double)(c->logit - max) * scale);
}

/* Applies top-k and then top-p: the kept ones move to the end of c[n], the likeliest last; returns how many. A heap, because few of a large vocabulary
 * are wanted, and with top-p it is not known beforehand how few. */
static int64_t take_top(candidate *c, int64_t n, int64_t top_k, double top_p)
{
    int64_t n_popped = 0, n_kept = 0, n_eligible = top_k > 0 && top_k < n ? top_k : n;
    float max;
    double mass = 0, total = 0;
    for (int64_t i = n / 2 - 1; i >= 0; i--) heap_sink(c, n, i);
    max = c[0].logit;
    if (n_eligible < n)
        while (n_popped < n_eligible) heap_pop(c, n - n_popped++);
    if (top_p >= 1) return n_eligible;

    const candidate *eligible = n_popped ? c + n - n_popped : c;
    for (int64_t i = 0; i < n_eligible; i++) total += likelihood(&eligible[i], max, 1);
    do {
        if (n_kept == n_popped) heap_pop(c, n - n_popped++);
        mass += likelihood(&c[n - ++n_kept], max, 1);
    } while (n_kept < n_eligible && mass < top_p * total);
    return n_kept;
}

/* One of c[n] with probability in proportion to exp(logit / temperature). */
static int32_t draw(sampler *s, const candidate *c, int64_t n, float max)
{
    double scale = 1 / (double)s->params.temperature, total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += likelihood(&c[i], max, scale);
    double target = random_unit(&s->random) * total;
    int32_t chosen = c[n - 1].id;
    for (int64_t i = 0; i < n && sum <= target; i++) {
        double w = likelihood(&c[i], max, scale);
        sum += w;
        if (w > 0) chosen = c[i].id;
    }
    return chosen;
}

int32_t sampler_next(sampler *s, const float *logits, const int32_t *recent, int64_t n_recent)
{
    logits = adjust(s, logits, recent, n_recent);
    int32_t best = argmax(logits, s->n_vocab);
    float max = logits[best];
    if (s->params.temperature <= 0 || !isfinite(max)) return best;

    float floor = s->params.min_p > 0 ? max + logf(s->params.min_p) : -INFINITY;
    bool top = (s->params.top_k > 0 && s->params.top_k < s->n_vocab) || s->params.top_p < 1;
    candidate *c = s->candidates;
    int64_t n = 0;
    for (int64_t i = 0; i < s->n_vocab; i++) {
        /* Top-p shares out the probability of everything it is given, so min-p waits until it is done. */
        if (logits[i] > -INFINITY && (top || logits[i] >= floor)) c[n++] = (candidate){logits[i], (int32_t)i};
    }
    if (top) {
        int64_t n_kept = take_top(c, n, s->params.top_k, (double)s->params.top_p);
        c += n - n_kept;
        for (n = n_kept; n > 1 && c->logit < floor; n--) c++;
    }
    return draw(s, c, n, max);
}
