/* One decode step: select, then the tail of what was not selected. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attn/ivfpq.h"

enum {
    FORCED = UINT16_MAX, /* key of tokens without a code */
    AHEAD = 24           /* selected tokens whose cluster is asked for before it is needed */
};

/* A segment as one search sees it. */
typedef struct view {
    ivfpq_part part;
    ivfpq_part tables;    /* the part itself, or of the open segment its predecessor */
    int64_t first, n;     /* positions */
    int64_t n_coded;      /* the first so many have codes; the others are read */
    int64_t key, cluster; /* where its keys and clusters begin */
} view;

typedef struct search {
    const ivfpq *p;
    const retrieval_kernels *kernels;
    int g, d, n_sub;
    view *views;
    int64_t n_views, n_tokens, n_forced;
    int64_t n_keys;     /* tokens, each view padded to SCAN_BLOCK */
    int64_t n_clusters; /* of all views */
    float *q;           /* [g][d], scaled */
    float *centre;      /* [n_views][g]: q·centre */
    uint16_t *keys;     /* [n_keys]: what decides; 0 is no token, FORCED one without a code */
    float step, floor;  /* key k means an estimated log weight of floor + k * step */
} search;

/* What select leaves for tail, just before the ids. */
typedef struct found {
    view *views;
    int64_t n_views, n_clusters;
    float *q, *centre;   /* [g][d], scaled; [n_views][g]: q·centre */
    float *unread;       /* [g][n_clusters], work */
    float *count, *left; /* [n_clusters]: tokens of a cluster, and those not selected; work */
    float *weights;      /* [g][n], work */
    int32_t *cluster;    /* [n]: of the selected tokens, -1: none (no code) */
    int32_t *touched;    /* [n], work */
} found;

enum { FOUND_BYTES = (sizeof(found) + 63) / 64 * 64 };

static int64_t padded(int64_t n)
{
    return (n + SCAN_BLOCK - 1) / SCAN_BLOCK * SCAN_BLOCK;
}

static bool views_make(search *s, int part, arena *scratch, quarry_error *error)
{
    const ivfpq *p = s->p;
    s->views = arena_alloc(scratch, (size_t)p->n_sealed + 1, sizeof *s->views, error);
    if (!s->views) return false;
    for (int64_t i = 0; i < p->n_sealed + (p->n_open > 0); i++) {
        bool open = i == p->n_sealed;
        const ivfpq_segment *segment = open ? p->open : p->sealed[i];
        view *v = &s->views[s->n_views++];
        *v = (view){
            .part = ivfpq_part_of(p, segment, part), .first = open ? p->open_first : segment->first, .n = open ? p->n_open : segment->n};
        v->tables = open && i > 0 ? s->views[i - 1].part : v->part;
        if (v->part.status->coded) v->n_coded = open ? p->n_coded : v->n;
        v->key = s->n_keys;
        v->cluster = s->n_clusters;
        s->n_tokens += v->n;
        s->n_forced += v->n - v->n_coded;
        s->n_keys += padded(v->n);
        s->n_clusters += v->n_coded ? v->part.status->n_clusters : 0;
    }
    return true;
}

static int64_t clusters_of(const view *v)
{
    return v->n_coded ? v->part.status->n_clusters : 0;
}

/* Tables of all views and heads, in scratch. */
typedef struct tables {
    float *lut;     /* [n_views][g][n_sub][16] */
    float *low;     /* [n_views][g][n_sub] */
    float *base;    /* [n_views][g]: score of a token whose table entries are all the lowest */
    uint8_t *bytes; /* [g][n_sub][16] */
    float *rotated; /* [g][d]: queries in the coordinates of a basis */
    float *zero;    /* [g] */
} tables;

static bool tables_make(const search *s, tables *t, arena *scratch, quarry_error *error)
{
    size_t n = (size_t)s->n_views * (size_t)s->g, g = (size_t)s->g, sub = (size_t)s->n_sub;
    t->lut = arena_alloc(scratch, n * sub * SCAN_CODES, sizeof *t->lut, error);
    t->low = arena_alloc(scratch, n * sub, sizeof *t->low, error);
    t->base = arena_alloc(scratch, n, sizeof *t->base, error);
    t->bytes = arena_alloc(scratch, g * sub * SCAN_CODES, 1, error);
    t->rotated = arena_alloc(scratch, g * (size_t)s->d, sizeof *t->rotated, error);
    t->zero = arena_alloc(scratch, g, sizeof *t->zero, error);
    if (t->zero) memset(t->zero, 0, g * sizeof *t->zero);
    return t->zero && t->lut && t->low && t->base && t->bytes && t->rotated;
}

/* Fills the tables; returns the step that serves them all. */
static float tables_fill(const search *s, const tables *t, attn_cost *cost)
{
    int g = s->g, d = s->d, n_sub = s->n_sub;
    float widest = 0;
    for (int64_t i = 0; i < s->n_views; i++) {
        const view *v = &s->views[i];
        if (!v->n_coded) continue;
        s->kernels->dot_i8(s->q, g, d, v->tables.query, v->tables.query_scale, t->zero, d, t->rotated, d);
        for (int64_t h = 0, at = i * g; h < g; h++, at++) {
            float *low = t->low + at * n_sub;
            float range =
                s->kernels->lut(t->rotated + h * d, v->tables.book.centroids, n_sub, d / n_sub, t->lut + at * n_sub * SCAN_CODES, low);
            float sum = s->centre[at] = s->p->base.kernels->vector->dot(s->q + h * d, v->tables.centre, d);
            for (int j = 0; j < n_sub; j++) sum += low[j];
            t->base[at] = sum;
            if (range > widest) widest = range;
        }
        cost->index_bytes += (int64_t)vq_code_bytes(n_sub, v->n_coded);
        if (i < s->p->n_sealed) cost->table_bytes += (int64_t)d * (d + (SCAN_CODES + 2) * (int64_t)sizeof(float));
    }
    return widest > 0 ? widest / SCAN_TOP : 1;
}

/* Keys of each head, [g][n_keys]: 0 for what has no code, else 1 + (score - floor of the head) / step. Views that lie too far below the
 * best one are lifted to what a key can hold. */
static void scan_views(const search *s, const tables *t, uint16_t *keys, float *floor)
{
    int g = s->g;
    uint16_t offset[ATTN_MAX_GROUP];
    float span = (float)(UINT16_MAX - 1 - s->n_sub * SCAN_TOP);
    for (int h = 0; h < g; h++) {
        float least = INFINITY, most = -INFINITY;
        for (int64_t i = 0; i < s->n_views; i++) {
            if (!s->views[i].n_coded) continue;
            least = fminf(least, t->base[i * g + h]);
            most = fmaxf(most, t->base[i * g + h]);
        }
        floor[h] = fmaxf(least, most - span * s->step);
    }
    for (int64_t i = 0; i < s->n_views; i++) {
        const view *v = &s->views[i];
        for (int64_t h = 0, at = i * g; h < g && v->n_coded; h++, at++) {
            size_t cells = (size_t)s->n_sub * SCAN_CODES;
            s->kernels->lut_quantise(t->lut + (size_t)at * cells, t->low + at * s->n_sub, 1 / s->step, s->n_sub,
                                     t->bytes + (size_t)h * cells);
            offset[h] = (uint16_t)(1 + lrintf(fmaxf(0, fminf((t->base[at] - floor[h]) / s->step, span))));
        }
        s->kernels->scan(v->part.codes, s->n_sub, padded(v->n_coded) / SCAN_BLOCK, t->bytes, g, offset, keys + v->key, s->n_keys);
        for (int h = 0; h < g; h++)
            memset(keys + h * s->n_keys + v->key + v->n_coded, 0, (size_t)(padded(v->n) - v->n_coded) * sizeof *keys);
    }
}

/* One key per token: the largest estimated weight over the heads, each normalised by what its near rows and its far tokens add up to. Of
 * the far ones the codes tell: by the means of clusters alone a head's few sharp tokens would be overlooked, and the head be taken for a
 * flat one whose weights are all large. */
static void merge_heads(search *s, uint16_t *keys, float *floor, const attention_state *near)
{
    uint16_t up[ATTN_MAX_GROUP], down[ATTN_MAX_GROUP], top[ATTN_MAX_GROUP];
    float least = INFINITY, most = -INFINITY;
    for (int h = 0; h < s->g; h++) {
        float sum = s->kernels->exp_sum(keys + h * s->n_keys, s->n_keys, s->step, &top[h]);
        float far_max = floor[h] + s->step * (float)top[h], max = fmaxf(near->m[h], far_max);
        floor[h] -= max + logf(near->l[h] * expf(near->m[h] - max) + sum * expf(far_max - max));
        least = fminf(least, floor[h]);
        most = fmaxf(most, floor[h] + s->step * (float)top[h]);
    }
    s->floor = fmaxf(least, most - s->step * (FORCED - 1));
    for (int h = 0; h < s->g; h++) {
        float above = (floor[h] - s->floor) / s->step;
        up[h] = (uint16_t)lrintf(fmaxf(0, fminf(above, FORCED)));
        down[h] = (uint16_t)lrintf(fmaxf(0, fminf(-above, FORCED)));
    }
    s->kernels->merge(keys, s->n_keys, s->g, up, down, s->n_keys, s->keys);
    for (const view *v = s->views; v < s->views + s->n_views; v++) {
        for (int64_t t = v->n_coded; t < padded(v->n); t++) s->keys[v->key + t] = t < v->n ? FORCED : 0;
    }
}

static bool score_tokens(search *s, const attention_state *near, arena *scratch, attn_cost *cost, quarry_error *error)
{
    tables t;
    float floor[ATTN_MAX_GROUP];
    uint16_t *keys = arena_alloc(scratch, (size_t)s->g * (size_t)s->n_keys, sizeof *keys, error);
    if (!keys || !tables_make(s, &t, scratch, error)) return false;
    s->step = tables_fill(s, &t, cost);
    scan_views(s, &t, keys, floor);
    merge_heads(s, keys, floor, near);
    return true;
}

/* Which keys are selected: those above the threshold and n_ties of those that equal it, k in all. */
typedef struct cut {
    int64_t k, n_ties;
    uint16_t threshold;
} cut;

/* The largest threshold that at least k keys reach. It lies in [low, high), which `reach` and `above` keys reach: reach >= k > above. */
static cut find_cut(const search *s, int64_t k, int low, int64_t reach, int high, int64_t above)
{
    while (high - low > 1) {
        /* counts fall about exponentially with the key, so their logarithms are interpolated, away from the ends so that the range
         * always shrinks by an eighth */
        float share = logf((float)reach / (float)k) / logf((float)reach / ((float)above + 0.5f));
        share = fminf(0.875f, fmaxf(0.125f, share));
        int middle = low + (int)(share * (float)(high - low));
        middle = middle <= low ? low + 1 : middle;
        int64_t count = s->kernels->count(s->keys, s->n_keys, (uint16_t)middle);
        if (count >= k) {
            low = middle;
            reach = count;
        } else {
            high = middle;
            above = count;
        }
    }
    return (cut){k, k - above, (uint16_t)low};
}

/* How many tokens to read: those without a code, and of the others a share, at least a floor. */
static int64_t least_wanted(const search *s)
{
    int64_t rest = s->n_tokens - s->n_forced, k = (int64_t)ceil(s->p->options.budget * (double)rest);
    if (k < (int64_t)s->p->options.min) k = (int64_t)s->p->options.min;
    return s->n_forced + ivfpq_min64(k, rest);
}

/* With a threshold on the estimated weight, also those above it, up to a share. */
static cut make_cut(const search *s)
{
    const ivfpq_options *o = &s->p->options;
    int64_t least = least_wanted(s), most = s->n_forced + (int64_t)ceil(o->max * (double)(s->n_tokens - s->n_forced));
    const int beyond = UINT16_MAX + 1;
    if (o->threshold == 0 || most <= least) return find_cut(s, least, 0, s->n_keys, beyond, 0);
    float key = ceilf((logf((float)o->threshold) - s->floor) / s->step);
    int heavy = key < FORCED ? (int)fmaxf(key, 1) : FORCED;
    int64_t n_heavy = s->kernels->count(s->keys, s->n_keys, (uint16_t)heavy);
    if (n_heavy < least) return find_cut(s, least, 0, s->n_keys, heavy, n_heavy);
    if (n_heavy > most) return find_cut(s, most, heavy, n_heavy, beyond, 0);
    return (cut){n_heavy, n_heavy, (uint16_t)heavy};
}

/* Room for k ids with what tail needs before them. */
static found *found_make(const search *s, int64_t k, arena *scratch, quarry_error *error)
{
    size_t n = (size_t)k, c = (size_t)s->n_clusters;
    char *memory = arena_alloc(scratch, FOUND_BYTES + (n + SCAN_BLOCK) * sizeof(int32_t), 1, error);
    if (!memory) return NULL;
    found *f = (found *)memory;
    *f = (found){.views = s->views, .n_views = s->n_views, .n_clusters = s->n_clusters, .q = s->q, .centre = s->centre};
    f->unread = arena_alloc(scratch, c * (size_t)s->g, sizeof *f->unread, error);
    f->count = arena_alloc(scratch, c, sizeof *f->count, error);
    f->left = arena_alloc(scratch, c, sizeof *f->left, error);
    f->weights = arena_alloc(scratch, n * (size_t)s->g, sizeof *f->weights, error);
    f->cluster = arena_alloc(scratch, n, sizeof *f->cluster, error);
    f->touched = arena_alloc(scratch, n, sizeof *f->touched, error);
    return f->unread && f->count && f->left && f->weights && f->cluster && f->touched ? f : NULL;
}

static int64_t collect(const search *s, cut c, const found *f, int32_t *ids)
{
    int64_t n = 0;
    for (const view *v = s->views; v < s->views + s->n_views; v++) {
        int64_t before = n;
        n += s->kernels->collect(s->keys + v->key, padded(v->n), c.threshold, &c.n_ties, (int32_t)v->first, ids + n);
        for (int64_t i = before; i < n; i++) {
            int64_t t = ids[i] - v->first;
            if (i + AHEAD < n) __builtin_prefetch(&v->part.cluster[ids[i + AHEAD] - v->first]);
            f->cluster[i] = t < v->n_coded ? (int32_t)(v->cluster + v->part.cluster[t]) : -1;
        }
    }
    return n;
}

quarry_code ivfpq_select(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                         const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)kv, (void)pos; /* n_far <= pos */
    const ivfpq *p = (const ivfpq *)policy;
    search s = {.p = p, .kernels = p->base.kernels->retrieval, .g = p->group, .d = p->d, .n_sub = p->n_sub};
    if (!views_make(&s, layer * p->base.shape.kv.n_head_kv + head, scratch, error)) return QUARRY_ERROR_MEMORY;
    *out = (attn_selection){.all = least_wanted(&s) >= s.n_tokens};
    if (out->all) return QUARRY_OK;
    s.q = arena_alloc(scratch, (size_t)s.g * (size_t)s.d, sizeof *s.q, error);
    s.keys = arena_alloc(scratch, (size_t)s.n_keys, sizeof *s.keys, error);
    s.centre = arena_alloc(scratch, (size_t)s.n_views * (size_t)s.g, sizeof *s.centre, error);
    if (!s.q || !s.keys || !s.centre) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < s.g * s.d; i++) s.q[i] = q[i] * p->base.shape.scale;
    if (!score_tokens(&s, near, scratch, cost, error)) return QUARRY_ERROR_MEMORY;
    cut c = make_cut(&s);
    found *f = found_make(&s, c.k, scratch, error);
    if (!f) return QUARRY_ERROR_MEMORY;
    out->ids = (int32_t *)((char *)f + FOUND_BYTES);
    out->n = collect(&s, c, f, out->ids);
    return QUARRY_OK;
}

/* unread[h][c] = mean score of the tokens of cluster c that were not selected, left[c] = how many. A cluster with none left gets a score
 * without weight. */
static void correct(const ivfpq *p, const found *f, int64_t n, const float *scores)
{
    int64_t c = f->n_clusters, n_touched = 0;
    int g = p->group;
    for (const view *v = f->views; v < f->views + f->n_views; v++) {
        p->base.kernels->retrieval->dot_i8(f->q, g, p->d, v->part.keys, v->part.key_scale, f->centre + (v - f->views) * g, clusters_of(v),
                                           f->unread + v->cluster, c);
        memcpy(f->count + v->cluster, v->part.count, (size_t)clusters_of(v) * sizeof *f->count);
    }
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

/* Per cluster with n tokens of which s were selected (point 3 of the method: correct the tail with what was read): unread mean score u =
 * (n q·mean - sum of their scores) / (n - s), mass (n - s) exp(u), value exp(u) (n mean value - sum of their values). The last sum is
 * taken over the rows again, weighted by their cluster's exp(u). */
void ivfpq_tail(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    (void)layer, (void)head, (void)q, (void)scratch;
    const ivfpq *p = (const ivfpq *)policy;
    if (sel->all || p->options.tail == 0) return;
    const found *f = (const found *)((const char *)sel->ids - FOUND_BYTES);
    const retrieval_kernels *kernels = p->base.kernels->retrieval;
    int64_t n_clusters = f->n_clusters, n = sel->n;
    int d = p->d;
    if (n_clusters == 0) return;
    correct(p, f, n, scores);
    for (int h = 0; h < p->group; h++) {
        float *e = f->unread + h * n_clusters, max;
        p->base.kernels->vector->softmax_exp(e, n_clusters, &max);
        float top = max > state->m[h] ? max : state->m[h], before = expf(state->m[h] - top);
        float mass = kernels->weigh(e, f->left, expf(max - top), n_clusters);
        for (int64_t i = 0; i < n; i++) f->weights[h * n + i] = f->cluster[i] < 0 ? 0 : -e[f->cluster[i]];
        state->l[h] = state->l[h] * before + mass;
        state->m[h] = top;
        for (int i = 0; i < d; i++) state->o[h * d + i] *= before;
    }
    for (const view *v = f->views; v < f->views + f->n_views; v++)
        kernels->accumulate_i8(f->unread + v->cluster, n_clusters, p->group, d, v->part.values, v->part.value_scale, clusters_of(v),
                               state->o);
    kernels->accumulate_rows(f->weights, p->group, d, p->base.shape.kv.type, rows, n, state->o);
    cost->tail_bytes += 2 * n_clusters * (d + 2 * (int64_t)sizeof(float));
}
