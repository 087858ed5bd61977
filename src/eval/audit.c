#include "eval/audit.h"

#include <math.h>
#include <string.h>

/* Hoare's selection with the median of three as pivot. */
float audit_kth_largest(float *values, int64_t n, int64_t k)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const float a = values[low], b = values[low + (high - low) / 2], c = values[high];
        const float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i > j) break;
            const float t = values[i];
            values[i++] = values[j];
            values[j--] = t;
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            break;
    }
    return values[k - 1];
}

/* scores[group][pos + 1] of all rows, or NULL. */
static float *exact_scores(const audit *a, const attn_reading *r, arena *scratch)
{
    float *scores = arena_alloc(scratch, (size_t)(r->pos + 1) * (size_t)r->group, sizeof *scores, NULL);
    return scores && attn_reading_scores(r, a->kernels, 0, r->pos + 1, scores, scratch) ? scores : NULL;
}

static double mass_of(const float *scores, int64_t first, int64_t end, double max)
{
    double mass = 0;
    for (int64_t i = first; i < end; i++) mass += exp(scores[i] - max);
    return mass;
}

/* One query head: scores[pos + 1], work[far tokens]. */
static void audit_head(const attn_reading *r, const float *scores, float *work, audit_sums *sums)
{
    const attn_selection *selected = r->selected;
    const int64_t n_far = r->far_end - r->n_sinks;
    double max = -INFINITY, read = 0;
    int64_t found = 0;
    sums->n_mass++;
    if (selected->all) {
        sums->mass += 1;
        return;
    }
    for (int64_t i = 0; i <= r->pos; i++) max = scores[i] > max ? scores[i] : max;
    read = mass_of(scores, 0, r->n_sinks, max) + mass_of(scores, r->far_end, r->pos + 1, max);
    for (int64_t i = 0; i < selected->n; i++) read += exp(scores[selected->ids[i]] - max);
    sums->mass += read / mass_of(scores, 0, r->pos + 1, max);
    if (selected->n == 0) return;
    memcpy(work, scores + r->n_sinks, (size_t)n_far * sizeof *work);
    const float least = audit_kth_largest(work, n_far, selected->n);
    for (int64_t i = 0; i < selected->n; i++) found += scores[selected->ids[i]] >= least;
    sums->recall += (double)found / (double)selected->n;
    sums->n_recall++;
}

static void on_reading(void *data, const attn_reading *r, arena *scratch)
{
    audit *a = data;
    const size_t n_far = (size_t)(r->far_end - r->n_sinks);
    const float *scores = exact_scores(a, r, scratch);
    float *work = arena_alloc(scratch, n_far, sizeof *work, NULL);
    if (!scores || !work) {
        atomic_store(&a->failed, true);
        return;
    }
    for (int h = 0; h < r->group; h++) audit_head(r, scores + h * (r->pos + 1), work, &a->sums[r->layer * a->n_head_kv + r->head]);
}

quarry_code audit_open(audit *a, const quarry_model *model, quarry_error *error)
{
    const model_shape *s = model_shape_of(model);
    *a = (audit){.observer = {on_reading, a}, .kernels = model_kernels(model), .n_layer = s->n_layer, .n_head_kv = s->n_head_kv};
    a->sums = memory_zero((size_t)s->n_layer * (size_t)s->n_head_kv, sizeof *a->sums, "audit", error);
    return a->sums ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

void audit_close(audit *a)
{
    memory_free(a->sums);
}

void audit_clear(audit *a)
{
    memset(a->sums, 0, (size_t)a->n_layer * (size_t)a->n_head_kv * sizeof *a->sums);
    atomic_store(&a->failed, false);
}

quarry_code audit_total(const audit *a, audit_sums *out, quarry_error *error)
{
    *out = (audit_sums){0};
    if (atomic_load(&a->failed)) return error_memory(error, "exact scores", 0);
    for (int i = 0; i < a->n_layer * a->n_head_kv; i++) {
        out->mass += a->sums[i].mass;
        out->recall += a->sums[i].recall;
        out->n_mass += a->sums[i].n_mass;
        out->n_recall += a->sums[i].n_recall;
    }
    return QUARRY_OK;
}
