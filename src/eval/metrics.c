#include "eval/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void metric_log_softmax(const float *logits, int64_t n, double *out)
{
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) max = logits[i] > max ? logits[i] : max;
    for (int64_t i = 0; i < n; i++) sum += exp(logits[i] - max);
    const double log_sum = log(sum); /* subtracted after max, or large logits would cost digits */
    for (int64_t i = 0; i < n; i++) out[i] = (logits[i] - max) - log_sum;
}

double metric_kld(const double *log_p, const double *log_q, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const double p = exp(log_p[i]);
        if (p > 0) sum += p * (log_p[i] - log_q[i]);
    }
    return sum < 0 ? 0 : sum; /* rounding of equal distributions; a NaN stays one */
}

int32_t metric_argmax(const float *logits, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return (int32_t)best;
}

quarry_code series_push(series *s, double value, quarry_error *error)
{
    if (s->n == s->capacity) {
        const int64_t capacity = s->capacity ? s->capacity * 2 : 64;
        const quarry_code code = memory_grow(&s->values, (size_t)capacity, sizeof *s->values, "measurements", error);
        if (code != QUARRY_OK) return code;
        s->capacity = capacity;
    }
    s->values[s->n++] = value;
    return QUARRY_OK;
}

void series_free(series *s)
{
    memory_free(s->values);
    *s = (series){0};
}

double metric_quantile(const double *sorted, int64_t n, double q)
{
    const double at = q * (double)(n - 1);
    const int64_t below = (int64_t)at;
    if (below + 1 >= n) return sorted[n - 1];
    return sorted[below] + (at - (double)below) * (sorted[below + 1] - sorted[below]);
}

static int double_compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void series_summarise(series *s, metric_summary *out)
{
    *out = (metric_summary){.n = s->n};
    if (s->n == 0) return;
    const double n = (double)s->n;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < s->n; i++) sum += s->values[i];
    out->mean = sum / n;
    for (int64_t i = 0; i < s->n; i++) squares += (s->values[i] - out->mean) * (s->values[i] - out->mean);
    out->sd = s->n > 1 ? sqrt(squares / (n - 1)) : 0;
    out->standard_error = out->sd / sqrt(n);
    qsort(s->values, (size_t)s->n, sizeof *s->values, double_compare);
    out->median = metric_quantile(s->values, s->n, 0.5);
    out->p99 = metric_quantile(s->values, s->n, 0.99);
    out->max = s->values[s->n - 1];
}

void metric_wilson(int64_t hits, int64_t n, double z, double *low, double *high)
{
    *low = 0;
    *high = 1;
    if (n <= 0) return;
    const double count = (double)n, p = (double)hits / count, zz = z * z / count;
    const double centre = (p + zz / 2) / (1 + zz);
    const double half = z / (1 + zz) * sqrt(p * (1 - p) / count + zz / (4 * count));
    *low = hits == 0 ? 0 : centre - half;
    *high = hits == n ? 1 : centre + half;
}

void metric_loss_interval(int64_t n, double mean, double sd, double *low, double *high)
{
    const double half = n > 1 && sd > 0 ? 1.96 * sd / sqrt((double)n) : n > 0 ? fmin(1, 3 / (double)n) : 1;
    *low = fmax(-1, mean - half);
    *high = fmin(1, mean + half);
}
