/* One decode step: select, then the tail of what was not selected. */
#include <math.h>
#include <string.h>

#include "attn/choose.h"
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
    kv_cold *cold; /* of the first n_cold views; NULL: of none */
    int64_t n_cold;
    int number; /* of the part */
    int g, d, n_sub;
    view *views;
    int64_t n_views, n_tokens, n_forced;
    int64_t n_keys;                                    /* slots, each view padded to SCAN_BLOCK */
    int64_t n_clusters;                                /* of all views */
    float *q;                                          /* [g][d], scaled */
    float *centre;                                     /* [n_views][g]: q·centre */
    uint16_t *scores;                                  /* [g][n_keys]: of each head, in steps; 0 for what has no code */
    float base[ATTN_MAX_GROUP];                        /* score k of head h means base[h] + k * step */
    float margin[ATTN_MAX_GROUP];                      /* how far scores may be wrong and their tokens still looked at again */
    uint16_t top[ATTN_MAX_GROUP];                      /* the largest */
    uint16_t up[ATTN_MAX_GROUP], down[ATTN_MAX_GROUP]; /* what makes a key of a score */
    uint16_t *keys;                                    /* [n_keys]: what decides; 0 is no token, FORCED one without a code */
    float step, floor;                                 /* key k means an estimated log weight of floor + k * step */
} search;

/* Slots that are looked at again or read, by their keys' index. */
typedef struct candidates {
    int32_t *at;       /* [n] */
    uint16_t *keys;    /* [n], padded with 0 to SCAN_BLOCK */
    const void **rows; /* [n] the rows that were fetched already, or NULL; where nothing is cold NULL */
    int64_t n;
} candidates;

/* What select leaves for tail, just before the ids. */
typedef struct found {
    view *views;
    int64_t n_views, n_clusters, n_keys;
    uint16_t *scores; /* [g][n_keys]: 0 for what is read */
    float step;
    float base[ATTN_MAX_GROUP];
    uint16_t top[ATTN_MAX_GROUP];
    float *unread;    /* [g][n_clusters], work */
    float *left;      /* [n_clusters]: tokens that are not read; work */
    float *weights;   /* [g][n], work */
    int32_t *cluster; /* [n]: of the selected tokens, -1: none (no code) */
    /* Where rows are cold, of the first n_cold views: the selected slots [n], by their keys' index, and the rows that were read already. */
    int64_t n_cold;
    const int32_t *at;
    const void **rows;
} found;

enum { FOUND_BYTES = (sizeof(found) + 63) / 64 * 64 };

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
        s->n_keys += cut_padded(v->n);
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

/* Standard error of the scores that codes give for a query, in the coordinates of the basis: of a sharp query they tell little. */
static float code_error(const ivfpq_part *part, const float *rotated, int d, int n_sub)
{
    const int d_sub = d / n_sub;
    float variance = 0;
    for (int s = 0; s < n_sub; s++, rotated += d_sub)
        for (int i = 0; i < d_sub; i++) variance += rotated[i] * rotated[i] * part->errors[s];
    return sqrtf(variance);
}

/* Fills the tables; returns the step that serves them all. */
static float tables_fill(search *s, const tables *t, attn_cost *cost)
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
            s->margin[h] = fmaxf(s->margin[h], (float)s->p->options.margin * code_error(&v->tables, t->rotated + h * d, d, n_sub));
        }
        cost->index_bytes += (int64_t)vq_code_bytes(n_sub, v->n_coded);
        if (i < s->p->n_sealed) cost->table_bytes += (int64_t)d * (d + (SCAN_CODES + 2) * (int64_t)sizeof(float));
    }
    return widest > 0 ? widest / SCAN_TOP : 1;
}

/* Scores of each head: 0 for what has no code, else 1 + (score - floor of the head) / step. Views that lie too far below the best one are
 * lifted to what a score can hold. */
static void scan_views(search *s, const tables *t)
{
    int g = s->g;
    float floor[ATTN_MAX_GROUP];
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
        s->base[h] = floor[h] - s->step;
    }
    for (int64_t i = 0; i < s->n_views; i++) {
        const view *v = &s->views[i];
        for (int64_t h = 0, at = i * g; h < g && v->n_coded; h++, at++) {
            size_t cells = (size_t)s->n_sub * SCAN_CODES;
            s->kernels->lut_quantise(t->lut + (size_t)at * cells, t->low + at * s->n_sub, 1 / s->step, s->n_sub,
                                     t->bytes + (size_t)h * cells);
            offset[h] = (uint16_t)(1 + lrintf(fmaxf(0, fminf((t->base[at] - floor[h]) / s->step, span))));
        }
        s->kernels->scan(v->part.codes, s->n_sub, cut_padded(v->n_coded) / SCAN_BLOCK, t->bytes, g, offset, s->scores + v->key, s->n_keys);
        for (int h = 0; h < g; h++)
            memset(s->scores + h * s->n_keys + v->key + v->n_coded, 0, (size_t)(cut_padded(v->n) - v->n_coded) * sizeof *s->scores);
    }
}

/* The score above which a head's tokens hold `mass` of exp(step * (score - top)) in scores[n]; top + 1 if nothing is wanted. */
static bool score_of_mass(const uint16_t *scores, int64_t n, float step, int top, float mass, arena *scratch, int *score,
                          quarry_error *error)
{
    uint32_t *count = arena_alloc(scratch, (size_t)top + 1, sizeof *count, error);
    if (!count) return false;
    memset(count, 0, ((size_t)top + 1) * sizeof *count);
    for (int64_t t = 0; t < n; t++) count[scores[t]]++;
    float sum = 0;
    for (*score = top + 1; *score > 1 && sum < mass; sum += (float)count[*score] * expf(step * (float)(*score - top))) --*score;
    return true;
}

/* Shifts that make scores keys, where a score of 0 means a log weight of base[h]. */
static void shifts_make(search *s, const float *base)
{
    for (int h = 0; h < s->g; h++) {
        float above = (base[h] - s->floor) / s->step;
        s->up[h] = (uint16_t)lrintf(fmaxf(0, fminf(above, FORCED)));
        s->down[h] = (uint16_t)lrintf(fmaxf(0, fminf(-above, FORCED)));
    }
}

/* One key per token: the largest estimated weight over the heads, each normalised by what its near rows and its far tokens add up to. Of
 * the far ones the codes tell: by the means of clusters alone a head's few sharp tokens would be overlooked, and the head be taken for a
 * flat one whose weights are all large. With a budget by mass a weight is told in terms of that of the head's last token to be read. */
static bool merge_heads(search *s, const attention_state *near, arena *scratch, quarry_error *error)
{
    float least = INFINITY, most = -INFINITY, base[ATTN_MAX_GROUP], lenient[ATTN_MAX_GROUP];
    const float share = (float)s->p->options.mass;
    for (int h = 0; h < s->g; h++) {
        const uint16_t *scores = s->scores + h * s->n_keys;
        float sum = s->kernels->exp_sum(scores, s->n_keys, s->step, &s->top[h]);
        float far_max = s->base[h] + s->step * (float)s->top[h], max = fmaxf(near->m[h], far_max);
        float of_near = near->l[h] * expf(near->m[h] - max), of_far = sum * expf(far_max - max);
        if (share > 0) {
            int score;
            float wanted = (share * (of_near + of_far) - of_near) * expf(max - far_max);
            if (!score_of_mass(scores, s->n_keys, s->step, s->top[h], wanted, scratch, &score, error)) return false;
            base[h] = -s->step * (float)score;
        } else {
            base[h] = s->base[h] - max - logf(of_near + of_far);
        }
        least = fminf(least, base[h]);
        most = fmaxf(most, base[h] + s->margin[h] + s->step * (float)s->top[h]);
    }
    s->floor = fmaxf(least, most - s->step * (FORCED - 1));
    for (int h = 0; h < s->g; h++) lenient[h] = base[h] + (s->p->options.refine > 0 ? s->margin[h] : 0);
    shifts_make(s, lenient);
    s->kernels->merge(s->scores, s->n_keys, s->g, s->up, s->down, s->n_keys, s->keys);
    shifts_make(s, base); /* for scores of keys */
    for (const view *v = s->views; v < s->views + s->n_views; v++) {
        for (int64_t t = v->n_coded; t < cut_padded(v->n); t++) s->keys[v->key + t] = t < v->n ? FORCED : 0;
        if (s->p->options.refine > 0 && v - s->views < s->p->n_sealed && v->n_coded)
            for (int64_t i = 0; i < ivfpq_outliers(s->p, v->n); i++) s->keys[v->key + v->part.outliers[i]] = FORCED - 1;
    }
    return true;
}

static bool score_tokens(search *s, const attention_state *near, arena *scratch, attn_cost *cost, quarry_error *error)
{
    tables t;
    if (!tables_make(s, &t, scratch, error)) return false;
    s->step = tables_fill(s, &t, cost);
    scan_views(s, &t);
    return merge_heads(s, near, scratch, error);
}

/* How many tokens to read: those without a code, and of the others a share, at least a floor. */
static int64_t least_wanted(const search *s)
{
    int64_t rest = s->n_tokens - s->n_forced, k = (int64_t)ceil(s->p->options.budget * (double)rest);
    if (k < (int64_t)s->p->options.min) k = (int64_t)s->p->options.min;
    return s->n_forced + ivfpq_min64(k, rest);
}

/* The key of an estimated log weight. */
static int key_of(const search *s, float log_weight)
{
    float key = ceilf((log_weight - s->floor) / s->step);
    return key < FORCED ? (int)fmaxf(key, 1) : FORCED;
}

/* Whether weights are chosen by what they are, not by how many are to be read. */
static bool by_weight(const ivfpq_options *o)
{
    return o->threshold > 0 || o->mass > 0;
}

/* The key of what weighs so much that it is to be read. The threshold falls with the square root of what is beyond
 * IVFPQ_FLAT tokens: of a longer text more is unread, so that less of it may be estimated, but not so much less that rows grow with the text. */
static int heavy_key(const search *s)
{
    const ivfpq_options *o = &s->p->options;
    float longer = fmaxf(1, (float)s->n_tokens / IVFPQ_FLAT);
    return key_of(s, (o->mass > 0 ? 0 : logf((float)o->threshold) - 0.5f * logf(longer)));
}

static int64_t share_of(const search *s, double share)
{
    return s->n_forced + (int64_t)ceil(share * (double)(s->n_tokens - s->n_forced));
}

/* What is read of keys[n]: a share, and, chosen by weight, what is heavy, up to another share. */
static cut cut_to_read(const search *s, const uint16_t *keys, int64_t n)
{
    const ivfpq_options *o = &s->p->options;
    int64_t least = least_wanted(s), most = share_of(s, o->max);
    if (!by_weight(o) || most <= least) return cut_find(s->kernels, keys, n, least, 0, n, CUT_BEYOND, 0);
    return cut_between(s->kernels, keys, n, least, most, heavy_key(s));
}

/* What is estimated again. */
static cut cut_to_refine(const search *s)
{
    enum { SPARE = 32 };
    const ivfpq_options *o = &s->p->options;
    int64_t least = ivfpq_min64(s->n_tokens, 2 * least_wanted(s) + SPARE), most = share_of(s, o->refine);
    if (most < least) most = least;
    if (!by_weight(o)) return cut_find(s->kernels, s->keys, s->n_keys, most, 0, s->n_keys, CUT_BEYOND, 0);
    return cut_between(s->kernels, s->keys, s->n_keys, least, most, heavy_key(s));
}

static bool candidates_make(const search *s, candidates *c, int64_t n, arena *scratch, quarry_error *error)
{
    c->at = arena_alloc(scratch, (size_t)n + SCAN_BLOCK, sizeof *c->at, error);
    c->keys = arena_alloc(scratch, (size_t)cut_padded(n), sizeof *c->keys, error);
    c->rows = s->cold ? arena_alloc(scratch, (size_t)n, sizeof *c->rows, error) : NULL;
    if (c->rows) memset(c->rows, 0, (size_t)n * sizeof *c->rows);
    return c->at && c->keys && (c->rows || !s->cold);
}

static quarry_code gather(const search *s, cut from, candidates *c, arena *scratch, quarry_error *error)
{
    if (!candidates_make(s, c, from.k, scratch, error)) return QUARRY_ERROR_MEMORY;
    c->n = s->kernels->collect(s->keys, s->n_keys, from.threshold, &from.n_ties, 0, c->at);
    return QUARRY_OK;
}

/* The query as dot_i4 takes it. */
typedef struct query_i8 {
    int8_t *q;                                          /* [g][d] */
    float factor[ATTN_MAX_GROUP], bias[ATTN_MAX_GROUP]; /* to steps above the heads' bases; the bias is of one view */
} query_i8;

static bool query_make(query_i8 *to, const search *s, arena *scratch, quarry_error *error)
{
    to->q = arena_alloc(scratch, (size_t)s->g * (size_t)s->d, 1, error);
    for (int h = 0; to->q && h < s->g; h++) to->factor[h] = vq_quantise_i8(s->q + h * s->d, s->d, to->q + h * s->d) / s->step;
    return to->q != NULL;
}

/* 4-bit keys [n][d / 2] with their scales. */
typedef struct fine_keys {
    const uint8_t *keys;
    const float *scale;
    const int32_t *at; /* [n] which */
} fine_keys;

/* What is kept beside a cold row: its 4-bit key, then the scale. */
typedef struct cold_key {
    const ivfpq *p;
    ivfpq_part part;
    float *x; /* [d] */
} cold_key;

static void derive_key(const void *data, const void *row, uint8_t *derived)
{
    const cold_key *k = data;
    const int d = k->p->d;
    float scale = 0;
    memset(derived, 0, (size_t)d / 2);
    if (k->part.status->coded) {
        kv_read_key(k->p->base.kernels, row, &k->p->base.shape.kv, k->x);
        for (int i = 0; i < d; i++) k->x[i] -= k->part.centre[i];
        scale = vq_quantise_i4(k->x, d, derived);
    }
    memcpy(derived + d / 2, &scale, sizeof scale);
}

size_t ivfpq_derived_bytes(const attn_policy *policy)
{
    return (size_t)((const ivfpq *)policy)->d / 2 + sizeof(float);
}

static bool cold_key_make(const search *s, int64_t index, cold_key *k, arena *scratch, quarry_error *error)
{
    *k = (cold_key){s->p, s->views[index].part, arena_alloc(scratch, (size_t)s->d, sizeof *k->x, error)};
    return k->x != NULL;
}

/* The keys of slots[n] of a cold view: the outliers' are in memory, others' come with their rows. */
static quarry_code fetch_keys(const search *s, int64_t index, const int32_t *slots, int64_t n, const void **rows, fine_keys *out,
                              arena *scratch, quarry_error *error)
{
    const size_t half = (size_t)s->d / 2, width = half + sizeof(float), count = (size_t)n;
    const ivfpq_part *part = &s->views[index].part;
    const int64_t n_outliers = ivfpq_outliers(s->p, s->views[index].n);
    uint8_t *keys = arena_alloc(scratch, count, half, error), *derived = arena_alloc(scratch, count, width, error);
    float *scale = arena_alloc(scratch, count, sizeof *scale, error);
    int32_t *at = arena_alloc(scratch, count, sizeof *at, error), *wanted = arena_alloc(scratch, count, sizeof *wanted, error);
    int32_t *place = arena_alloc(scratch, count, sizeof *place, error);
    const void **fetched = arena_alloc(scratch, count, sizeof *fetched, error);
    cold_key key;
    if (!keys || !derived || !scale || !at || !wanted || !place || !fetched || !cold_key_make(s, index, &key, scratch, error))
        return QUARRY_ERROR_MEMORY;
    int64_t m = 0;
    for (int64_t i = 0, o = 0; i < n; i++) {
        at[i] = (int32_t)i;
        while (o < n_outliers && part->outliers[o] < slots[i]) o++;
        if (o < n_outliers && part->outliers[o] == slots[i]) {
            memcpy(keys + (size_t)i * half, part->outlier_keys + (size_t)o * half, half);
            scale[i] = part->outlier_scale[o];
        } else {
            place[m] = (int32_t)i;
            wanted[m++] = slots[i];
        }
    }
    const kv_derive derive = {derive_key, &key};
    quarry_code code = kv_cold_find(s->cold, s->number, index, wanted, m, &derive, derived, fetched, scratch, error);
    for (int64_t i = 0; i < m && code == QUARRY_OK; i++) {
        const size_t to = (size_t)place[i];
        memcpy(keys + to * half, derived + (size_t)i * width, half);
        memcpy(&scale[to], derived + (size_t)i * width + half, sizeof *scale);
        rows[to] = fetched[i];
    }
    *out = (fine_keys){keys, scale, at};
    return code;
}

/* Better scores for those of the candidates that have codes, and keys for all. */
static quarry_code refine(search *s, candidates *c, arena *scratch, attn_cost *cost, quarry_error *error)
{
    int g = s->g;
    const int64_t stride = cut_padded(c->n);
    query_i8 query;
    uint16_t *scores = arena_alloc(scratch, (size_t)g * (size_t)stride, sizeof *scores, error);
    int32_t *slots = arena_alloc(scratch, (size_t)c->n, sizeof *slots, error);
    if (!scores || !slots || !query_make(&query, s, scratch, error)) return QUARRY_ERROR_MEMORY;
    memset(scores, 0, (size_t)g * (size_t)stride * sizeof *scores);
    int64_t i = 0;
    for (int64_t j = 0; j < s->n_views; j++) {
        const view *v = &s->views[j];
        int64_t first = i, n = 0;
        if (j < s->p->n_sealed) cost->index_bytes += ivfpq_outliers(s->p, v->n) * (int64_t)sizeof(uint16_t);
        for (; i < c->n && c->at[i] < v->key + v->n_coded; i++) slots[n++] = (int32_t)(c->at[i] - v->key);
        while (i < c->n && c->at[i] < v->key + cut_padded(v->n)) i++; /* those without a code */
        for (int h = 0; h < g; h++) query.bias[h] = (s->centre[j * g + h] - s->base[h]) / s->step;
        fine_keys fine = {v->part.keys, v->part.key_scale, slots};
        if (!fine.keys) {
            const quarry_code code = fetch_keys(s, j, slots, n, c->rows + first, &fine, scratch, error);
            if (code != QUARRY_OK) return code;
        }
        s->kernels->dot_i4(query.q, query.factor, query.bias, g, s->d, fine.keys, fine.scale, fine.at, n, scores + first, stride, s->top);
        for (int h = 0; h < g; h++) {
            uint16_t *to = s->scores + h * s->n_keys + v->key;
            const uint16_t *from = scores + h * stride + first;
            for (int64_t t = 0; t < n; t++) to[slots[t]] = from[t];
        }
        cost->index_bytes += n * (s->d / 2 + (int64_t)sizeof(float));
    }
    s->kernels->merge(scores, stride, g, s->up, s->down, stride, c->keys);
    for (int64_t j = 0, t = 0; j < s->n_views; j++) {
        const view *v = &s->views[j];
        while (t < c->n && c->at[t] < v->key + v->n_coded) t++;
        for (; t < c->n && c->at[t] < v->key + cut_padded(v->n); t++) c->keys[t] = FORCED;
    }
    memset(c->keys + c->n, 0, (size_t)(stride - c->n) * sizeof *c->keys);
    return QUARRY_OK;
}

/* Keeps the candidates that the cut selects. */
static quarry_code keep(const search *s, candidates *c, cut to, arena *scratch, quarry_error *error)
{
    int32_t *chosen = arena_alloc(scratch, (size_t)to.k + SCAN_BLOCK, sizeof *chosen, error);
    if (!chosen) return QUARRY_ERROR_MEMORY;
    c->n = s->kernels->collect(c->keys, cut_padded(c->n), to.threshold, &to.n_ties, 0, chosen);
    for (int64_t i = 0; i < c->n; i++) c->at[i] = c->at[chosen[i]];
    for (int64_t i = 0; c->rows && i < c->n; i++) c->rows[i] = c->rows[chosen[i]];
    return QUARRY_OK;
}

/* Runs of the selected slots that lie in one view each. */
typedef struct run {
    const view *v;
    int64_t first, n; /* of the selected ones */
} run;

static bool next_run(const view *views, int64_t n_views, const int32_t *at, int64_t n, run *r)
{
    r->v = r->v ? r->v + 1 : views;
    r->first += r->n;
    r->n = 0;
    if (r->v == views + n_views) return false;
    while (r->first + r->n < n && at[r->first + r->n] < r->v->key + cut_padded(r->v->n)) r->n++;
    return true;
}

/* The selected slots of a run. */
static int32_t *slots_of(const run *r, const int32_t *at, arena *scratch, quarry_error *error)
{
    int32_t *slots = arena_alloc(scratch, (size_t)r->n, sizeof *slots, error);
    for (int64_t i = 0; slots && i < r->n; i++) slots[i] = (int32_t)(at[r->first + i] - r->v->key);
    return slots;
}

/* Whoever has the cold rows is told which will be fetched. */
static void expect_rows(const search *s, const candidates *c, arena *scratch)
{
    for (run r = {0}; next_run(s->views, s->n_cold, c->at, c->n, &r);) {
        const int32_t *slots = slots_of(&r, c->at, scratch, NULL);
        if (slots) kv_cold_expect(s->cold, s->number, r.v - s->views, slots, r.n, c->rows + r.first, scratch);
    }
}

quarry_code ivfpq_fetch(const attn_policy *policy, int layer, int head, const kv_seq *kv, attn_selection *sel, arena *scratch,
                        quarry_error *error)
{
    const found *f = (const found *)((const char *)sel->ids - FOUND_BYTES);
    const int part = layer * policy->shape.kv.n_head_kv + head;
    for (run r = {0}; next_run(f->views, f->n_views, f->at, sel->n, &r);) {
        const int64_t i = r.v - f->views;
        if (i >= f->n_cold) {
            for (int64_t k = r.first; k < r.first + r.n; k++) f->rows[k] = kv_row(kv, layer, head, sel->ids[k]);
            continue;
        }
        const int32_t *slots = slots_of(&r, f->at, scratch, error);
        if (!slots) return QUARRY_ERROR_MEMORY;
        const quarry_code code = kv_cold_take(kv_cold_of(kv), part, i, slots, r.n, f->rows + r.first, scratch, error);
        if (code != QUARRY_OK) return code;
    }
    sel->rows = f->rows;
    return QUARRY_OK;
}

/* Ids of the chosen slots, with what tail and fetch need before them. */
static quarry_code find(const search *s, const candidates *c, attn_selection *out, arena *scratch, attn_cost *cost, quarry_error *error)
{
    size_t n = (size_t)c->n, n_clusters = (size_t)s->n_clusters;
    char *memory = arena_alloc(scratch, FOUND_BYTES + n * sizeof(int32_t), 1, error);
    if (!memory) return QUARRY_ERROR_MEMORY;
    found *f = (found *)memory;
    *f = (found){
        .views = s->views, .n_views = s->n_views, .n_clusters = s->n_clusters, .n_keys = s->n_keys, .scores = s->scores, .step = s->step};
    memcpy(f->base, s->base, sizeof f->base);
    memcpy(f->top, s->top, sizeof f->top);
    f->unread = arena_alloc(scratch, n_clusters * (size_t)s->g, sizeof *f->unread, error);
    f->left = arena_alloc(scratch, n_clusters, sizeof *f->left, error);
    f->weights = arena_alloc(scratch, n * (size_t)s->g, sizeof *f->weights, error);
    f->cluster = arena_alloc(scratch, n, sizeof *f->cluster, error);
    if (!f->unread || !f->left || !f->weights || !f->cluster) return QUARRY_ERROR_MEMORY;
    *out = (attn_selection){.ids = (int32_t *)(memory + FOUND_BYTES), .n = c->n};
    const view *v = s->views;
    for (int64_t i = 0; i < c->n; i++) {
        while (c->at[i] >= v->key + cut_padded(v->n)) v++;
        int64_t slot = c->at[i] - v->key, ahead = i + AHEAD < c->n ? c->at[i + AHEAD] - v->key : v->n;
        if (ahead < v->n_coded) {
            __builtin_prefetch(&v->part.order[ahead]);
            __builtin_prefetch(&v->part.cluster[ahead]);
        }
        bool coded = slot < v->n_coded;
        out->ids[i] = (int32_t)(v->first + (coded ? v->part.order[slot] : slot));
        f->cluster[i] = coded ? (int32_t)(v->cluster + v->part.cluster[slot]) : -1;
        for (int h = 0; h < s->g; h++) s->scores[h * s->n_keys + c->at[i]] = 0;
    }
    cost->index_bytes += c->n * 2 * (int64_t)sizeof(uint16_t);
    if (!s->cold) return QUARRY_OK;
    f->n_cold = s->n_cold;
    f->at = c->at;
    f->rows = c->rows;
    expect_rows(s, c, scratch);
    return QUARRY_OK;
}

/* q[g][d]; kv: NULL if rows are not wanted */
static bool search_make(search *s, const ivfpq *p, int layer, int head, const kv_seq *kv, const float *q, int g, arena *scratch,
                        quarry_error *error)
{
    *s = (search){.p = p, .kernels = p->base.kernels->retrieval, .g = g, .d = p->d, .n_sub = p->n_sub};
    s->number = layer * p->base.shape.kv.n_head_kv + head;
    s->cold = kv ? kv_cold_of(kv) : NULL;
    s->n_cold = s->cold ? kv_cold_in(kv)->n_segments : 0;
    if (!views_make(s, s->number, scratch, error)) return false;
    s->q = arena_alloc(scratch, (size_t)s->g * (size_t)s->d, sizeof *s->q, error);
    s->scores = arena_alloc(scratch, (size_t)s->g * (size_t)s->n_keys + SCAN_BLOCK, sizeof *s->scores, error);
    s->keys = arena_alloc(scratch, (size_t)s->n_keys, sizeof *s->keys, error);
    s->centre = arena_alloc(scratch, (size_t)s->n_views * (size_t)s->g, sizeof *s->centre, error);
    if (!s->q || !s->scores || !s->keys || !s->centre) return false;
    for (int i = 0; i < s->g * s->d; i++) s->q[i] = q[i] * p->base.shape.scale;
    return true;
}

quarry_code ivfpq_select_block(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int g,
                               const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    const ivfpq *p = (const ivfpq *)policy;
    search s;
    if (!search_make(&s, p, layer, head, kv, q, g, scratch, error)) return QUARRY_ERROR_MEMORY;
    *out = (attn_selection){.all = least_wanted(&s) >= s.n_tokens && !s.cold};
    if (out->all) return QUARRY_OK;
    if (!score_tokens(&s, near, scratch, cost, error)) return QUARRY_ERROR_MEMORY;
    candidates c;
    bool twice = p->options.refine > 0;
    quarry_code code = gather(&s, twice ? cut_to_refine(&s) : cut_to_read(&s, s.keys, s.n_keys), &c, scratch, error);
    if (code == QUARRY_OK && twice) code = refine(&s, &c, scratch, cost, error);
    if (code == QUARRY_OK && twice) code = keep(&s, &c, cut_to_read(&s, c.keys, cut_padded(c.n)), scratch, error);
    return code == QUARRY_OK ? find(&s, &c, out, scratch, cost, error) : code;
}

quarry_code ivfpq_select(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                         const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)pos; /* n_far <= pos */
    return ivfpq_select_block(policy, layer, head, kv, q, ((const ivfpq *)policy)->group, near, scratch, out, cost, error);
}

/* Where the keys of the far tokens are: place[position - ATTN_SINKS]. */
static int32_t *places(const search *s, arena *scratch, quarry_error *error)
{
    int32_t *place = arena_alloc(scratch, (size_t)s->n_tokens, sizeof *place, error);
    for (const view *v = s->views; place && v < s->views + s->n_views; v++)
        for (int64_t slot = 0; slot < v->n_coded; slot++) place[v->first - ATTN_SINKS + v->part.order[slot]] = (int32_t)(v->key + slot);
    return place;
}

quarry_code ivfpq_cover(const attn_policy *policy, int layer, int head, const float *q, const attention_state *near, const int32_t *ids,
                        int64_t n, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    const ivfpq *p = (const ivfpq *)policy;
    search s;
    attn_cost own = {0};
    candidates c;
    if (!search_make(&s, p, layer, head, NULL, q, p->group, scratch, error)) return QUARRY_ERROR_MEMORY;
    *out = (attn_selection){.all = s.n_forced == s.n_tokens};
    if (out->all) return QUARRY_OK;
    if (!score_tokens(&s, near, scratch, &own, error)) return QUARRY_ERROR_MEMORY;
    if (p->options.refine > 0) {
        quarry_code code = gather(&s, cut_to_refine(&s), &c, scratch, error);
        if (code == QUARRY_OK) code = refine(&s, &c, scratch, &own, error);
        if (code != QUARRY_OK) return code;
    }
    const int32_t *place = places(&s, scratch, error);
    if (!place || !candidates_make(&s, &c, n + s.n_forced, scratch, error)) return QUARRY_ERROR_MEMORY;
    c.n = 0;
    for (const view *v = s.views; v < s.views + s.n_views; v++) {
        for (; n > 0 && *ids < v->first + v->n; ids++, n--)
            if (*ids < v->first + v->n_coded) c.at[c.n++] = place[*ids - ATTN_SINKS];
        for (int64_t t = v->n_coded; t < v->n; t++) c.at[c.n++] = (int32_t)(v->key + t);
    }
    const quarry_code code = find(&s, &c, out, scratch, &own, error);
    if (code != QUARRY_OK) return code;
    cost->tail_bytes += attn_cost_bytes(&own, 0);
    return QUARRY_OK;
}

/* left[c] = how many tokens of cluster c are not read. */
static void count_left(const found *f, int64_t n)
{
    for (const view *v = f->views; v < f->views + f->n_views; v++)
        for (int64_t c = 0; c < clusters_of(v); c++) f->left[v->cluster + c] = (float)(v->part.begin[c + 1] - v->part.begin[c]);
    for (int64_t i = 0; i < n; i++)
        if (f->cluster[i] >= 0) f->left[f->cluster[i]] -= 1;
}

/* A cluster's unread tokens have mass m, the sum of their estimated weights, and the mean value (sum of its values - those of the tokens
 * read) / how many are left. The sum over the tokens read is taken over their rows again, each weighted by its cluster's m / left. */
void ivfpq_tail(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    (void)layer, (void)head, (void)q, (void)scores, (void)scratch;
    const ivfpq *p = (const ivfpq *)policy;
    if (sel->all || p->options.tail == 0) return;
    const found *f = (const found *)((const char *)sel->ids - FOUND_BYTES);
    const retrieval_kernels *kernels = p->base.kernels->retrieval;
    int64_t n_clusters = f->n_clusters, n = sel->n;
    int d = p->d;
    if (n_clusters == 0) return;
    count_left(f, n);
    for (int h = 0; h < p->group; h++) {
        float *e = f->unread + h * n_clusters, far_top = f->base[h] + f->step * (float)f->top[h], mass = 0;
        float top = fmaxf(far_top, state->m[h]), before = expf(state->m[h] - top), factor = expf(far_top - top);
        for (const view *v = f->views; v < f->views + f->n_views; v++)
            kernels->cell_sums(f->scores + h * f->n_keys + v->key, v->part.begin, clusters_of(v), f->step, f->top[h], e + v->cluster);
        for (int64_t c = 0; c < n_clusters; c++) {
            e[c] *= factor;
            mass += e[c];
            e[c] = f->left[c] > 0 ? e[c] / f->left[c] : 0;
        }
        for (int64_t i = 0; i < n; i++) f->weights[h * n + i] = f->cluster[i] < 0 ? 0 : -e[f->cluster[i]];
        if (mass == 0) continue; /* all that might weigh anything is read */
        state->l[h] = state->l[h] * before + mass;
        state->m[h] = top;
        for (int i = 0; i < d; i++) state->o[h * d + i] *= before;
    }
    for (const view *v = f->views; v < f->views + f->n_views; v++)
        kernels->accumulate_i8(f->unread + v->cluster, n_clusters, p->group, d, v->part.values, v->part.value_scale, clusters_of(v),
                               state->o);
    kernels->accumulate_rows(f->weights, p->group, d, p->base.shape.kv.type, rows, n, state->o);
    cost->tail_bytes += n_clusters * (d + (int64_t)sizeof(float) + (int64_t)sizeof(uint32_t));
}
