/* A2ATS (arXiv 2502.12665): one code per far token, out of a codebook that calibration made; a token's score is that of its centroid, as if it stood at one distance from
 * every query (windowed RoPE). Each query head takes its best tokens, the group reads their union, exactly and with exact RoPE; the rest is dropped.
 *
 * Lists of the tokens of a centroid are linked from the newest to the oldest, so that truncation only unlinks heads of lists. */
#include <math.h>
#include <string.h>

#include "attn/a2ats.h"
#include "attn/ivfpq.h"

/* How tokens are chosen; but for the budget as other policies have it (attn/scored.h), estimated weights being those of the tokens' centroids. */
typedef struct a2ats_options {
    double budget; /* share of the far tokens, of each head, rounded down as in the paper */
    double threshold, mass, max, shared, tail;
    double window; /* w of the windowed RoPE: tokens nearer than that are read, not scored */
} a2ats_options;

typedef struct a2ats {
    attn_policy base;
    a2ats_options options;
    attn_policy *inner; /* the ivfpq of the tail, or NULL */
    a2ats_tables *tables;
    int64_t capacity; /* far tokens that there is room for */
    int32_t *newest;  /* [layer][head][n_centroids] far token, -1: none */
    int32_t *count;   /* [layer][head][n_centroids] */
    uint16_t *code;   /* [layer][head][capacity], from token ATTN_SINKS on */
    int32_t *next;    /* [layer][head][capacity] the token before it in its list, -1: none */
} a2ats;

void attn_rotate(const attn_rope *rope, const math_kernels *kernels, int64_t by, float *x)
{
    float cs[1024];
    for (int i = 0; i < rope->n_rot / 2; i++) {
        const double angle = (double)by * rope->inverse[i];
        cs[2 * i] = (float)cos(angle);
        cs[2 * i + 1] = (float)sin(angle);
    }
    if (rope->n_rot) kernels->vector->rope(x, cs, rope->n_rot, rope->halves);
}

/* ---- the state ---- */

static size_t n_heads(const a2ats *p)
{
    return (size_t)p->base.shape.kv.n_layer * (size_t)p->base.shape.kv.n_head_kv;
}

static size_t head_index(const a2ats *p, int layer, int head)
{
    return (size_t)layer * (size_t)p->base.shape.kv.n_head_kv + (size_t)head;
}

static void a2ats_destroy(attn_policy *policy)
{
    a2ats *p = (a2ats *)policy;
    attn_policy_destroy(p->inner);
    a2ats_tables_release(p->tables);
    memory_free(p->newest);
    memory_free(p->count);
    memory_free(p->code);
    memory_free(p->next);
    memory_free(p);
}

/* Takes over tables, also when it fails. */
static a2ats *a2ats_new(const attn_shape *shape, const math_kernels *kernels, const a2ats_options *options, a2ats_tables *tables,
                        quarry_error *error)
{
    a2ats *p = memory_zero(1, sizeof *p, "retrieval policy", error);
    if (!p) {
        a2ats_tables_release(tables);
        return NULL;
    }
    p->base = (attn_policy){.type = &attn_a2ats, .shape = *shape, .kernels = kernels, .n_far = ATTN_SINKS};
    p->options = *options;
    p->tables = tables;
    const size_t cells = n_heads(p) * (size_t)tables->header.n_centroids;
    p->newest = memory_alloc(cells, sizeof *p->newest, "retrieval policy", error);
    p->count = p->newest ? memory_zero(cells, sizeof *p->count, "retrieval policy", error) : NULL;
    if (!p->count) {
        a2ats_destroy(&p->base);
        return NULL;
    }
    memset(p->newest, 0xff, cells * sizeof *p->newest);
    return p;
}

static attn_policy *a2ats_create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    a2ats_options o = {.budget = 0.03, .max = 0.3};
    char path[ATTN_OPTION_TEXT] = "";
    const attn_option table[] = {{"codebook", path, 0, 0}, {"budget", &o.budget, 0, 1},  {"threshold", &o.threshold, 0, 1},
                                 {"mass", &o.mass, 0, 1},  {"max", &o.max, 0, 1},        {"shared", &o.shared, 0, 1},
                                 {"tail", &o.tail, 0, 1},  {"window", &o.window, 0, 1e9}};
    if (attn_options_parse("a2ats", spec, table, sizeof table / sizeof *table, error) != QUARRY_OK) return NULL;
    if (!*path) {
        error_set(error, QUARRY_ERROR_ARGUMENT, "policy a2ats needs codebook=FILE, a file that 'quarry calibrate' makes");
        return NULL;
    }
    if (shape->n_head / shape->kv.n_head_kv > ATTN_MAX_GROUP || shape->rope.n_rot > 1024) {
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "policy a2ats: at most %d query heads share a KV head, of 1024 rotated dimensions",
                  ATTN_MAX_GROUP);
        return NULL;
    }
    a2ats_tables *tables = a2ats_tables_read(path, shape, kernels, error);
    a2ats *p = tables ? a2ats_new(shape, kernels, &o, tables, error) : NULL;
    if (!p || o.tail == 0) return p ? &p->base : NULL;
    p->inner = attn_ivfpq.create(shape, kernels, "", error);
    if (p->inner) return &p->base;
    a2ats_destroy(&p->base);
    return NULL;
}

/* Room for n far tokens in every head; on failure nothing changed. */
static quarry_code grow(a2ats *p, int64_t n, quarry_error *error)
{
    if (n <= p->capacity) return QUARRY_OK;
    const int64_t capacity = n + n / 2 + 64, used = p->base.n_far - ATTN_SINKS;
    uint16_t *code = memory_alloc(n_heads(p) * (size_t)capacity, sizeof *code, "codes of keys", error);
    int32_t *next = code ? memory_alloc(n_heads(p) * (size_t)capacity, sizeof *next, "codes of keys", error) : NULL;
    if (!next) {
        memory_free(code);
        return QUARRY_ERROR_MEMORY;
    }
    for (size_t i = 0; i < n_heads(p) && used; i++) {
        memcpy(code + i * (size_t)capacity, p->code + i * (size_t)p->capacity, (size_t)used * sizeof *code);
        memcpy(next + i * (size_t)capacity, p->next + i * (size_t)p->capacity, (size_t)used * sizeof *next);
    }
    memory_free(p->code);
    memory_free(p->next);
    p->code = code;
    p->next = next;
    p->capacity = capacity;
    return QUARRY_OK;
}

static attn_policy *a2ats_fork(const attn_policy *policy, quarry_error *error)
{
    const a2ats *from = (const a2ats *)policy;
    atomic_fetch_add(&from->tables->references, 1);
    a2ats *p = a2ats_new(&from->base.shape, from->base.kernels, &from->options, from->tables, error);
    if (!p) return NULL;
    if (from->inner && !(p->inner = from->inner->type->fork(from->inner, error))) {
        a2ats_destroy(&p->base);
        return NULL;
    }
    const size_t cells = n_heads(p) * (size_t)p->tables->header.n_centroids;
    if (from->capacity) {
        p->code = memory_alloc(n_heads(p) * (size_t)from->capacity, sizeof *p->code, "codes of keys", error);
        p->next = p->code ? memory_alloc(n_heads(p) * (size_t)from->capacity, sizeof *p->next, "codes of keys", error) : NULL;
        if (!p->next) {
            a2ats_destroy(&p->base);
            return NULL;
        }
        const size_t used = (size_t)(from->base.n_far - ATTN_SINKS), capacity = (size_t)from->capacity;
        for (size_t i = 0; i < n_heads(p); i++) {
            memcpy(p->code + i * capacity, from->code + i * capacity, used * sizeof *p->code);
            memcpy(p->next + i * capacity, from->next + i * capacity, used * sizeof *p->next);
        }
        p->capacity = from->capacity;
    }
    memcpy(p->newest, from->newest, cells * sizeof *p->newest);
    memcpy(p->count, from->count, cells * sizeof *p->count);
    p->base.n_far = from->base.n_far;
    return &p->base;
}

static void a2ats_observe(attn_policy *policy, int layer, int head, const float *q, int64_t first, int64_t n)
{
    attn_policy *inner = ((a2ats *)policy)->inner;
    if (inner) inner->type->observe(inner, layer, head, q, first, n);
}

static quarry_code a2ats_reserve(attn_policy *policy, int64_t n, quarry_error *error)
{
    a2ats *p = (a2ats *)policy;
    const quarry_code code = grow(p, policy->n_far - ATTN_SINKS + n, error);
    return code == QUARRY_OK && p->inner ? p->inner->type->reserve(p->inner, n, error) : code;
}

static void a2ats_append(attn_policy *policy, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch)
{
    a2ats *p = (a2ats *)policy;
    const a2ats_tables *t = p->tables;
    const int64_t d = t->header.head_dim;
    const size_t at = head_index(p, layer, head), k = (size_t)t->header.n_centroids;
    uint16_t *code = p->code + at * (size_t)p->capacity;
    int32_t *next = p->next + at * (size_t)p->capacity, *newest = p->newest + at * k, *count = p->count + at * k;
    for (int64_t first = policy->n_far, end = first + n; first < end; first += A2ATS_ROWS) {
        const int64_t rows = end - first < A2ATS_ROWS ? end - first : A2ATS_ROWS;
        float keys[A2ATS_ROWS * 1024];
        int32_t nearest[A2ATS_ROWS];
        for (int64_t i = 0; i < rows; i++) {
            kv_read_key(p->base.kernels, kv_row(kv, layer, head, first + i), &policy->shape.kv, keys + i * d);
            if (!t->header.exact_rope) attn_rotate(&policy->shape.rope, p->base.kernels, -(first + i), keys + i * d);
        }
        a2ats_tables_code(t, p->base.kernels, at, keys, rows, nearest);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t far = first + i - ATTN_SINKS;
            code[far] = (uint16_t)nearest[i];
            next[far] = newest[nearest[i]];
            newest[nearest[i]] = (int32_t)(first + i);
            count[nearest[i]]++;
        }
    }
    if (p->inner) p->inner->type->append(p->inner, layer, head, kv, n, scratch);
}

static void a2ats_commit(attn_policy *policy, int64_t n)
{
    attn_policy *inner = ((a2ats *)policy)->inner;
    policy->n_far += n;
    if (inner) inner->type->commit(inner, n);
}

static quarry_code a2ats_reserve_seal(attn_policy *policy, quarry_error *error)
{
    attn_policy *inner = ((a2ats *)policy)->inner;
    return inner ? inner->type->reserve_seal(inner, error) : QUARRY_OK;
}

static void a2ats_seal(attn_policy *policy, int layer, int head, const kv_seq *kv, arena *scratch)
{
    attn_policy *inner = ((a2ats *)policy)->inner;
    if (inner) inner->type->seal(inner, layer, head, kv, scratch);
}

static void a2ats_commit_seal(attn_policy *policy)
{
    attn_policy *inner = ((a2ats *)policy)->inner;
    if (inner) inner->type->commit_seal(inner);
}

static void a2ats_truncate(attn_policy *policy, int64_t n)
{
    a2ats *p = (a2ats *)policy;
    const size_t k = (size_t)p->tables->header.n_centroids;
    const int64_t end = n > ATTN_SINKS ? n : ATTN_SINKS;
    for (size_t at = 0; at < n_heads(p); at++)
        for (int64_t i = policy->n_far - ATTN_SINKS - 1; i >= end - ATTN_SINKS; i--) {
            const size_t cell = at * k + p->code[at * (size_t)p->capacity + (size_t)i];
            p->newest[cell] = p->next[at * (size_t)p->capacity + (size_t)i];
            p->count[cell]--;
        }
    if (end < policy->n_far) policy->n_far = end;
    if (p->inner) p->inner->type->truncate(p->inner, end);
}

static void a2ats_tally(const attn_policy *policy, attn_memory *memory)
{
    const a2ats *p = (const a2ats *)policy;
    const size_t cells = n_heads(p) * (size_t)p->tables->header.n_centroids, tokens = n_heads(p) * (size_t)p->capacity;
    memory_tally_add(&memory->index, p, sizeof *p);
    memory_tally_add(&memory->index, p->newest, cells * sizeof *p->newest);
    memory_tally_add(&memory->index, p->count, cells * sizeof *p->count);
    memory_tally_add(&memory->index, p->code, tokens * sizeof *p->code);
    memory_tally_add(&memory->index, p->next, tokens * sizeof *p->next);
    a2ats_tables_tally(p->tables, &memory->codebooks);
    memory->codebook_file = p->tables->file_bytes;
    if (p->inner) p->inner->type->tally(p->inner, memory);
}

static size_t a2ats_scratch(const attn_policy *policy, int64_t n_far)
{
    const attn_policy *inner = ((const a2ats *)policy)->inner;
    return inner ? inner->type->scratch(inner, n_far) : 0;
}

/* ---- select ---- */

static bool ranks_before(const float *score, int32_t a, int32_t b)
{
    return score[a] > score[b] || (score[a] == score[b] && a < b);
}

static void sift(const float *score, int32_t *heap, int64_t n, int64_t i)
{
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && ranks_before(score, heap[child + 1], heap[child])) child++;
        if (!ranks_before(score, heap[child], heap[i])) return;
        const int32_t held = heap[i];
        heap[i] = heap[child];
        heap[child] = held;
    }
}

/* A walk along the ranked tokens before the position `end`. It ends after `least`, or later, before `most`, as long as tokens have the score `light` or those walked hold
 * less than `mass`, scores then being log weights. */
typedef struct walk {
    int64_t end, least, most;
    float light;
    double mass;
} walk;

/* Far tokens in order of score, then centroid, then from the newest; those not marked yet are marked and added to out. Returns how many list
 * entries it walked. */
static int64_t take_best(const a2ats *p, size_t at, const float *score, const walk *w, int32_t *heap, uint64_t *marks, attn_selection *out)
{
    const int32_t k = p->tables->header.n_centroids;
    const int32_t *newest = p->newest + at * (size_t)k, *next = p->next + at * (size_t)p->capacity;
    int64_t n = 0, walked = 0;
    double held = 0;
    for (int32_t j = 0; j < k; j++)
        if (newest[j] >= 0) heap[n++] = j;
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift(score, heap, n, i);
    for (; n > 0; heap[0] = heap[--n], sift(score, heap, n, 0)) {
        const float best = score[heap[0]];
        const double share = w->mass > 0 ? exp((double)best) : 0;
        int32_t token = newest[heap[0]];
        while (token >= w->end) token = next[token - ATTN_SINKS];
        for (; token >= 0; token = next[token - ATTN_SINKS], walked++, held += share) {
            if (walked >= w->least && (walked >= w->most || (best < w->light && held >= w->mass))) return walked;
            const uint64_t bit = 1ULL << (token & 63);
            if (marks[token >> 6] & bit) continue;
            marks[token >> 6] |= bit;
            out->ids[out->n++] = token;
        }
    }
    return walked;
}

/* A head's scores of centroids become log weights of their tokens: of all, the near rows included, whose share it returns. */
static double weigh(const a2ats *p, size_t at, float *score, float near_max, float near_sum)
{
    const size_t k = (size_t)p->tables->header.n_centroids;
    const int32_t *count = p->count + at * k;
    float top = near_max;
    for (size_t j = 0; j < k; j++) {
        score[j] *= p->base.shape.scale;
        if (count[j] && score[j] > top) top = score[j];
    }
    const double near = (double)near_sum * exp((double)(near_max - top));
    double all = near;
    for (size_t j = 0; j < k; j++)
        if (count[j]) all += count[j] * exp((double)(score[j] - top));
    const float log_all = top + (float)log(all);
    for (size_t j = 0; j < k; j++) score[j] -= log_all;
    return near / all;
}

/* scores[group][stride] of the query, as if every far token stood at one distance from it. */
static bool score_centroids(const a2ats *p, size_t at, const float *q, int64_t pos, int64_t group, float *scores, arena *scratch,
                            quarry_error *error)
{
    const a2ats_tables *t = p->tables;
    const int64_t d = t->header.head_dim;
    float *turned = arena_alloc(scratch, (size_t)(group * d), sizeof *turned, error);
    if (!turned) return false;
    memcpy(turned, q, (size_t)(group * d) * sizeof *q);
    for (int64_t g = 0; g < group && !t->header.exact_rope; g++)
        attn_rotate(&p->base.shape.rope, p->base.kernels, t->header.distance - pos, turned + g * d);
    a2ats_tables_score(t, p->base.kernels, at, turned, group, scores);
    return true;
}

/* Walks for each head, or one for all. Returns how many list entries were walked. */
static int64_t choose(const a2ats *p, size_t at, int64_t group, float *scores, const attention_state *near, const walk *budget,
                      int32_t *heap, uint64_t *marks, attn_selection *out)
{
    const a2ats_options *o = &p->options;
    const int64_t stride = p->tables->tiles * A2ATS_TILE, k = p->tables->header.n_centroids;
    const bool by_mass = o->mass > 0, shared = o->shared != 0 && !by_mass, weighed = by_mass || shared || o->threshold > 0;
    int64_t walked = 0;
    for (int64_t g = 0; g < group; g++) {
        float *score = scores + g * stride;
        walk w = *budget;
        const double near_mass = weighed ? weigh(p, at, score, near->m[g], near->l[g]) : 0;
        if (by_mass) w.mass = o->mass - near_mass;
        if (!shared)
            walked += take_best(p, at, score, &w, heap, marks, out);
        else
            for (int64_t j = 0; j < k; j++) scores[j] = fmaxf(scores[j], score[j]);
    }
    return shared ? take_best(p, at, scores, budget, heap, marks, out) : walked;
}

static quarry_code a2ats_select(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                                const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)kv;
    const a2ats *p = (const a2ats *)policy;
    const a2ats_options *o = &p->options;
    const a2ats_tables *t = p->tables;
    const int64_t k = t->header.n_centroids, stride = t->tiles * A2ATS_TILE, group = policy->shape.n_head / policy->shape.kv.n_head_kv;
    const int64_t nearer = pos + 1 - (int64_t)o->window, end = nearer < policy->n_far ? nearer : policy->n_far, far = end - ATTN_SINKS;
    const bool by_mass = o->mass > 0, by_weight = !by_mass && o->threshold > 0;
    const size_t at = head_index(p, layer, head), words = (size_t)(policy->n_far + 63) / 64;
    const walk budget = {.end = end,
                         .least = by_mass ? 0 : (int64_t)(o->budget * (double)far),
                         .most = by_mass || by_weight ? (int64_t)(o->max * (double)far) : 0,
                         .light = by_weight ? logf((float)o->threshold) : INFINITY};
    *out = (attn_selection){.all = far <= 0};
    if (far <= 0 || (budget.least == 0 && budget.most == 0 && end == policy->n_far && !p->inner)) return QUARRY_OK;
    out->ids = arena_alloc(scratch, (size_t)(policy->n_far - ATTN_SINKS), sizeof *out->ids, error);
    float *scores = arena_alloc(scratch, (size_t)(group * stride), sizeof *scores, error);
    int32_t *heap = arena_alloc(scratch, (size_t)k, sizeof *heap, error);
    uint64_t *marks = arena_alloc(scratch, words, sizeof *marks, error);
    if (!out->ids || !scores || !heap || !marks) return QUARRY_ERROR_MEMORY;
    memset(marks, 0, words * sizeof *marks);
    if (!score_centroids(p, at, q, pos, group, scores, scratch, error)) return QUARRY_ERROR_MEMORY;
    cost->index_bytes += choose(p, at, group, scores, near, &budget, heap, marks, out) * (int64_t)sizeof *p->next;
    cost->table_bytes += (int64_t)codebook_centroid_bytes(&t->header) + k * (int64_t)sizeof *p->newest;
    if (by_mass || by_weight || o->shared != 0) cost->table_bytes += k * (int64_t)sizeof *p->count;
    for (int64_t token = end; token < policy->n_far; token++) {
        marks[token >> 6] |= 1ULL << (token & 63);
        out->ids[out->n++] = (int32_t)token;
    }
    if (!p->inner) return QUARRY_OK;
    int32_t *ids = out->ids; /* ascending, as the tail wants them */
    int64_t n = 0;
    for (int64_t token = ATTN_SINKS; token < policy->n_far; token++)
        if (marks[token >> 6] >> (token & 63) & 1) ids[n++] = (int32_t)token;
    return ivfpq_cover(p->inner, layer, head, q, near, ids, n, scratch, out, cost, error);
}

static void a2ats_tail(const attn_policy *policy, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                       const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost)
{
    const a2ats *p = (const a2ats *)policy;
    if (p->inner) ivfpq_tail(p->inner, layer, head, q, sel, scores, rows, scratch, state, cost);
}

const attn_policy_type attn_a2ats = {
    .name = "a2ats",
    .summary = "reads the best far tokens of each query head by calibrated codes of keys before RoPE, drops the rest (arXiv 2502.12665)",
    .options = "codebook=FILE    what 'quarry calibrate' made for this model; needed\n"
               "budget=0.03      share of the far tokens that is read\n"
               "window=0         tokens nearer than this are read as well, and not scored\n"
               "threshold=0      and all of at least this estimated attention weight (0: off)\n"
               "mass=0           instead of a budget: as many as this share of each head's estimated mass needs (0: off)\n"
               "max=0.3          with either, not more than this share\n"
               "shared=0         1: one choice for the group, by the largest weight over its heads; 0: each head's own, together\n"
               "tail=0           1: estimate the unread, as ivfpq does\n",
    .create = a2ats_create,
    .destroy = a2ats_destroy,
    .fork = a2ats_fork,
    .observe = a2ats_observe,
    .reserve = a2ats_reserve,
    .append = a2ats_append,
    .commit = a2ats_commit,
    .reserve_seal = a2ats_reserve_seal,
    .seal = a2ats_seal,
    .commit_seal = a2ats_commit_seal,
    .select = a2ats_select,
    .tail = a2ats_tail,
    .truncate = a2ats_truncate,
    .tally = a2ats_tally,
    .scratch = a2ats_scratch,
};
