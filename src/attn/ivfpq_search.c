/* One decode step: select, then the tail of what was not selected. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attn/ivfpq.h"

enum { FORCED = UINT16_MAX /* key of tokens without a code */ };

/* A segment as one search sees it. */
typedef struct view {
    ivfpq_part part;
    vq_codebook book;     /* of the open segment: its predecessor's */
    const float *query;   /* the basis' matrix */
    int64_t first, n;     /* positions */
    int64_t n_coded;      /* the first so many have codes; the others are read */
    int64_t key, cluster; /* where its keys and clusters begin */
    bool new_basis;       /* query differs from the view's before */
} view;

typedef struct search {
    const ivfpq *p;
    const retrieval_kernels *kernels;
    int g, d, n_sub;
    view *views;
    int64_t n_views, n_tokens, n_forced;
    int64_t n_keys;     /* tokens, each view padded to SCAN_BLOCK */
    int64_t n_clusters; /* of all views; also the stride of [g][n_clusters] arrays */
    float *q;           /* [g][d], scaled */
    float *scores;      /* [g][n_clusters]: q·mean key */
    float *unread;      /* [g][n_clusters], work */
    uint16_t *keys;     /* [n_keys] */
} search;

/* What select leaves for tail, just before the ids. */
typedef struct found {
    view *views;
    int64_t n_views, n_clusters;
    float *scores;       /* [g][n_clusters] */
    float *unread;       /* [g][n_clusters], work */
    float *count, *left; /* [n_clusters]: tokens of a cluster, and those not selected */
    float *weights;      /* [g][n], work */
    int32_t *cluster;    /* [n]: of the selected tokens, -1: none (no code) */
    int32_t *touched;    /* [n], work */
} found;

enum { FOUND_BYTES = (sizeof(found) + 63) / 64 * 64 };

static bool views_make(search *s, int part, arena *scratch, quarry_error *error)
{
    const ivfpq *p = s->p;
    s->views = arena_alloc(scratch, (size_t)p->n_sealed + 1, sizeof *s->views, error);
    if (!s->views) return false;
    const float *query = NULL;
    for (int64_t i = 0; i < p->n_sealed + (p->n_open > 0); i++) {
        bool open = i == p->n_sealed;
        const ivfpq_segment *segment = open ? p->open : p->sealed[i];
        view *v = &s->views[s->n_views++];
        *v = (view){
            .part = ivfpq_part_of(p, segment, part), .first = open ? p->open_first : segment->first, .n = open ? p->n_open : segment->n};
        v->book = open && i > 0 ? s->views[i - 1].book : v->part.book;
        if (!open && ivfpq_basis_owner(i) == i) {
            query = v->part.basis.query;
            v->new_basis = true;
        }
        v->query = query;
        if (v->part.status->coded) v->n_coded = open ? p->n_coded : v->n;
        v->key = s->n_keys;
        v->cluster = s->n_clusters;
        s->n_tokens += v->n;
        s->n_forced += v->n - v->n_coded;
        s->n_keys += (v->n + SCAN_BLOCK - 1) / SCAN_BLOCK * SCAN_BLOCK;
        s->n_clusters += v->n_coded ? v->part.status->n_clusters : 0;
    }
    return true;
}

static int64_t clusters_of(const view *v)
{
    return v->n_coded ? v->part.status->n_clusters : 0;
}

/* Per query head: log of the sum of exp(score) over the sinks and, by their clusters, the far tokens. */
static void log_masses(search *s, int part, float *mass)
{
    const float *sinks = s->p->sinks + (size_t)part * ATTN_SINKS * (size_t)s->d;
    const vector_kernels *vector = s->p->base.kernels->vector;
    for (const view *v = s->views; v < s->views + s->n_views; v++)
        s->kernels->dot_i8(s->q, s->g, s->d, v->part.keys, v->part.key_scale, clusters_of(v), s->scores + v->cluster, s->n_clusters);
    for (int h = 0; h < s->g; h++) {
        const float *scores = s->scores + h * s->n_clusters;
        float near[ATTN_SINKS], near_max, far_max = -INFINITY, far_sum = 0;
        for (int i = 0; i < ATTN_SINKS; i++) near[i] = vector->dot(s->q + h * s->d, sinks + i * s->d, s->d);
        float near_sum = vector->softmax_exp(near, ATTN_SINKS, &near_max);
        for (const view *v = s->views; v < s->views + s->n_views; v++)
            for (int64_t c = 0; c < clusters_of(v); c++) s->unread[v->cluster + c] = scores[v->cluster + c] + v->part.log_count[c];
        if (s->n_clusters) far_sum = vector->softmax_exp(s->unread, s->n_clusters, &far_max);
        float max = near_max > far_max ? near_max : far_max;
        mass[h] = max + logf(near_sum * expf(near_max - max) + far_sum * expf(far_max - max));
    }
}

/* Fills the u16 keys of all tokens: the largest over the heads of the estimated log weight, in steps above a common floor. Returns false without memory. */
static bool score_tokens(search *s, const float *mass, float *step, float *floor, arena *scratch, attn_cost *cost, quarry_error *error)
{
    int g = s->g, d = s->d, cells = s->n_sub * SCAN_CODES;
    size_t tables = (size_t)s->n_views * (size_t)g;
    float *lut = arena_alloc(scratch, tables * (size_t)cells, sizeof *lut, error);
    float *low = arena_alloc(scratch, tables * (size_t)s->n_sub, sizeof *low, error);
    float *base = arena_alloc(scratch, tables, sizeof *base, error);
    float *rotated = arena_alloc(scratch, (size_t)g * (size_t)d, sizeof *rotated, error);
    uint8_t *bytes = arena_alloc(scratch, (size_t)g * (size_t)cells, 1, error);
    uint16_t *offset = arena_alloc(scratch, (size_t)g, sizeof *offset, error);
    if (!lut || !low || !base || !rotated || !bytes || !offset) return false;
    float widest = 0, least = INFINITY, most = -INFINITY;
    for (int64_t i = 0; i < s->n_views; i++) {
        const view *v = &s->views[i];
        if (v->new_basis) {
            s->kernels->product(s->q, d, 1, v->query, d, rotated, d, g, d, d, false);
            cost->index_bytes += (int64_t)d * d * (int64_t)sizeof(float);
        }
        if (!v->n_coded) continue;
        for (int h = 0; h < g; h++) {
            int64_t at = i * g + h;
            float range =
                s->kernels->lut(rotated + h * d, v->book.centroids, s->n_sub, d / s->n_sub, lut + at * cells, low + at * s->n_sub);
            float sum = s->p->base.kernels->vector->dot(rotated + h * d, v->book.mean, d) - mass[h];
            for (int j = 0; j < s->n_sub; j++) sum += low[at * s->n_sub + j];
            base[at] = sum;
            if (range > widest) widest = range;
            if (sum < least) least = sum;
            if (sum > most) most = sum;
        }
        cost->index_bytes += (int64_t)vq_code_bytes(s->n_sub, v->n_coded) + (int64_t)d * (SCAN_CODES + 1) * (int64_t)sizeof(float);
    }
    /* keys lie in [1, 65534]: 0 is no token, 65535 a forced one; when the span is wider, what falls below is clipped */
    *step = widest > 0 ? widest / 255 : 1;
    float span = (float)(FORCED - 2 - s->n_sub * 255);
    *floor = (most - least) / *step <= span ? least : most - span * *step;
    for (int64_t i = 0; i < s->n_views; i++) {
        const view *v = &s->views[i];
        uint16_t *keys = s->keys + v->key;
        int64_t padded = (v->n + SCAN_BLOCK - 1) / SCAN_BLOCK * SCAN_BLOCK;
        if (v->n_coded) {
            for (int h = 0; h < g; h++) {
                int64_t at = i * g + h;
                s->kernels->lut_quantise(lut + at * cells, low + at * s->n_sub, 1 / *step, s->n_sub, bytes + (size_t)h * (size_t)cells);
                float above = (base[at] - *floor) / *step;
                offset[h] = (uint16_t)(1 + (above > 0 ? (int)lrintf(above) : 0));
            }
            s->kernels->scan(v->part.codes, s->n_sub, (v->n_coded + SCAN_BLOCK - 1) / SCAN_BLOCK, bytes, g, offset, keys);
        }
        for (int64_t t = v->n_coded; t < padded; t++) keys[t] = t < v->n ? FORCED : 0;
    }
    return true;
}

/* The largest threshold that at least k keys reach, and how many of those that equal it are wanted. */
static uint16_t find_threshold(const search *s, int64_t k, int64_t *n_ties)
{
    int low = 0, high = UINT16_MAX + 1; /* count(low) >= k > count(high) */
    int64_t above = 0;                  /* count(high) */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        int64_t count = s->kernels->count(s->keys, s->n_keys, (uint16_t)middle);
        if (count >= k) {
            low = middle;
        } else {
            high = middle;
            above = count;
        }
    }
    *n_ties = k - above;
    return (uint16_t)low;
}

/* How many tokens to read: a share, at least a floor; with a threshold on the estimated weight, also those above it up to a share. */
static int64_t wanted(const search *s, float step, float floor)
{
    const ivfpq_options *o = &s->p->options;
    int64_t rest = s->n_tokens - s->n_forced, k = (int64_t)ceil(o->budget * (double)rest);
    if (k < (int64_t)o->min) k = (int64_t)o->min;
    if (o->threshold > 0 && s->n_keys) {
        float key = ceilf((logf((float)o->threshold) - floor) / step) + 1;
        int64_t heavy = key < FORCED ? s->kernels->count(s->keys, s->n_keys, (uint16_t)fmaxf(key, 1)) - s->n_forced : 0;
        int64_t most = (int64_t)ceil(o->max * (double)rest);
        if (heavy > most) heavy = most;
        if (heavy > k) k = heavy;
    }
    return s->n_forced + ivfpq_min64(k, rest);
}

/* Room for k ids with what tail needs before them. */
static found *found_make(const search *s, int64_t k, arena *scratch, quarry_error *error)
{
    size_t n = (size_t)k, c = (size_t)s->n_clusters;
    char *memory = arena_alloc(scratch, FOUND_BYTES + n * sizeof(int32_t), 1, error);
    if (!memory) return NULL;
    found *f = (found *)memory;
    *f = (found){.views = s->views, .n_views = s->n_views, .n_clusters = s->n_clusters, .scores = s->scores, .unread = s->unread};
    f->count = arena_alloc(scratch, c, sizeof *f->count, error);
    f->left = arena_alloc(scratch, c, sizeof *f->left, error);
    f->weights = arena_alloc(scratch, n * (size_t)s->g, sizeof *f->weights, error);
    f->cluster = arena_alloc(scratch, n, sizeof *f->cluster, error);
    f->touched = arena_alloc(scratch, n, sizeof *f->touched, error);
    return f->count && f->left && f->weights && f->cluster && f->touched ? f : NULL;
}

static int64_t collect(const search *s, uint16_t threshold, int64_t n_ties, const found *f, int32_t *ids)
{
    int64_t n = 0;
    for (const view *v = s->views; v < s->views + s->n_views; v++) {
        int64_t before = n;
        n += s->kernels->collect(s->keys + v->key, (v->n + SCAN_BLOCK - 1) / SCAN_BLOCK * SCAN_BLOCK, threshold, &n_ties, (int32_t)v->first,
                                 ids + n);
        for (int64_t i = before; i < n; i++) {
            int64_t t = ids[i] - v->first;
            f->cluster[i] = t < v->n_coded ? (int32_t)(v->cluster + v->part.cluster[t]) : -1;
        }
    }
    return n;
}

quarry_code ivfpq_select(const attn_policy *policy, int layer, int head, const float *q, int64_t pos, arena *scratch, attn_selection *out,
                         attn_cost *cost, quarry_error *error)
{
    (void)pos; /* n_far <= pos */
    const ivfpq *p = (const ivfpq *)policy;
    int part = layer * p->base.shape.kv.n_head_kv + head;
    search s = {.p = p, .kernels = p->base.kernels->retrieval, .g = p->group, .d = p->d, .n_sub = p->n_sub};
    float mass[64], step = 1, floor = 0;
    if (!views_make(&s, part, scratch, error)) return QUARRY_ERROR_MEMORY;
    *out = (attn_selection){.all = s.n_tokens == s.n_forced ||
                                   wanted(&(search){.p = p, .n_tokens = s.n_tokens, .n_forced = s.n_forced}, 1, 0) >= s.n_tokens};
    if (out->all) return QUARRY_OK;
    size_t g = (size_t)s.g, clusters = (size_t)s.n_clusters;
    s.q = arena_alloc(scratch, g * (size_t)s.d, sizeof *s.q, error);
    s.scores = arena_alloc(scratch, g * clusters, sizeof *s.scores, error);
    s.unread = arena_alloc(scratch, g * clusters, sizeof *s.unread, error);
    s.keys = arena_alloc(scratch, (size_t)s.n_keys, sizeof *s.keys, error);
    if (!s.q || !s.scores || !s.unread || !s.keys) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < s.g * s.d; i++) s.q[i] = q[i] * p->base.shape.scale;
    log_masses(&s, part, mass);
    if (!score_tokens(&s, mass, &step, &floor, scratch, cost, error)) return QUARRY_ERROR_MEMORY;
    cost->index_bytes += s.n_clusters * (s.d + 2 * (int64_t)sizeof(float));
    int64_t k = wanted(&s, step, floor), n_ties;
    found *f = found_make(&s, k, scratch, error);
    if (!f) return QUARRY_ERROR_MEMORY;
    uint16_t threshold = find_threshold(&s, k, &n_ties);
    out->ids = (int32_t *)((char *)f + FOUND_BYTES);
    out->n = collect(&s, threshold, n_ties, f, out->ids);
    return QUARRY_OK;
}

/* unread[h][c] = mean score of the tokens of cluster c that were not selected, left[c] = how many. A cluster with none left gets a score without weight. */
static void correct(const found *f, int g, int64_t n, const float *scores)
{
    int64_t c = f->n_clusters, n_touched = 0;
    memcpy(f->unread, f->scores, (size_t)(g * c) * sizeof *f->unread);
    for (const view *v = f->views; v < f->views + f->n_views; v++)
        memcpy(f->count + v->cluster, v->part.count, (size_t)clusters_of(v) * sizeof *f->count);
    memcpy(f->left, f->count, (size_t)c * sizeof *f->left);
    for (int64_t i = 0; i < n; i++) {
        int32_t at = f->cluster[i];
        if (at < 0) continue;
        bool first = f->left[at] == f->count[at];
        if (first) f->touched[n_touched++] = at;
        f->left[at] -= 1;
        for (int h = 0; h < g; h++) {
            float *sum = &f->unread[h * c + at];
            *sum = (first ? *sum * f->count[at] : *sum) - scores[h * n + i];
        }
    }
    for (int64_t i = 0; i < n_touched; i++) {
        int32_t at = f->touched[i];
        for (int h = 0; h < g; h++) f->unread[h * c + at] = f->left[at] > 0 ? f->unread[h * c + at] / f->left[at] : -FLT_MAX / 2;
    }
}

/* Per cluster with n tokens of which s were selected (point 3 of the method: correct the tail with what was read): unread mean score u = (n q·mean - sum of their scores) / (n - s), mass
 * (n - s) exp(u), value exp(u) (n mean value - sum of their values). The last sum is taken over the rows again, weighted by their cluster's exp(u). */
void ivfpq_tail(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    (void)layer, (void)head, (void)q, (void)scratch;
    const ivfpq *p = (const ivfpq *)policy;
    if (sel->all || p->options.tail == 0) return;
    const found *f = (const found *)((const char *)sel->ids - FOUND_BYTES);
    int64_t n_clusters = f->n_clusters, n = sel->n;
    int d = p->d;
    if (n_clusters == 0) return;
    correct(f, p->group, n, scores);
    for (int h = 0; h < p->group; h++) {
        float *e = f->unread + h * n_clusters, max, mass = 0;
        p->base.kernels->vector->softmax_exp(e, n_clusters, &max);
        float top = max > state->m[h] ? max : state->m[h], before = expf(state->m[h] - top), now = expf(max - top);
        for (int64_t c = 0; c < n_clusters; c++) {
            e[c] *= f->left[c] > 0 ? now : 0;
            mass += e[c] * f->left[c];
        }
        for (int64_t i = 0; i < n; i++) f->weights[h * n + i] = f->cluster[i] < 0 ? 0 : -e[f->cluster[i]];
        for (int64_t c = 0; c < n_clusters; c++) e[c] *= f->count[c];
        state->l[h] = state->l[h] * before + mass;
        state->m[h] = top;
        for (int i = 0; i < d; i++) state->o[h * d + i] *= before;
    }
    const retrieval_kernels *kernels = p->base.kernels->retrieval;
    for (const view *v = f->views; v < f->views + f->n_views; v++)
        kernels->accumulate_i8(f->unread + v->cluster, n_clusters, p->group, d, v->part.values, v->part.value_scale, clusters_of(v),
                               state->o);
    kernels->accumulate_rows(f->weights, p->group, d, p->base.shape.kv.type, rows, n, state->o);
    cost->index_bytes += n_clusters * (d + 2 * (int64_t)sizeof(float));
}
