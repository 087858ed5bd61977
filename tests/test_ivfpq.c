/* The default policy against attention written out in double precision: what it selects, what it estimates, and that cutting, sharing
 * and failing leave it whole. */
#include "test.h"

#include <math.h>

#include "attn/ivfpq.h"

typedef struct world {
    attn_shape shape;
    int group, d;
    int64_t n;
    float *k, *v; /* [n][n_layer][n_head_kv][d]: as kv holds them */
    kv_seq *kv;
    attn_policy *p;
    arena scratch;
    random_state random;
} world;

static const math_kernels *kernels; /* set by main: asking the processor costs a trap on a virtual machine */

static float *make(int64_t n)
{
    float *x = memory_zero((size_t)n, sizeof *x, "test", NULL);
    assert_non_null(x);
    return x;
}

static float *row_of(const world *w, float *rows, int64_t pos, int layer, int head)
{
    return rows + ((pos * w->shape.kv.n_layer + layer) * w->shape.kv.n_head_kv + head) * w->d;
}

/* Keys in drifting clusters with a common offset, as keys of a text are: 24 centres, noise that lives in a few dimensions. */
static void fill_rows(world *w)
{
    int parts = w->shape.kv.n_layer * w->shape.kv.n_head_kv, d = w->d;
    float *centres = make((int64_t)parts * 24 * d), *offset = make((int64_t)parts * d);
    for (int i = 0; i < parts * 24 * d; i++) centres[i] = (float)random_normal(&w->random);
    for (int i = 0; i < parts * d; i++) offset[i] = 2 * (float)random_normal(&w->random);
    for (int64_t pos = 0; pos < w->n; pos++)
        for (int part = 0; part < parts; part++) {
            float *k = w->k + (pos * parts + part) * d, *v = w->v + (pos * parts + part) * d;
            const float *centre = centres + (part * 24 + (int64_t)random_below(&w->random, 24)) * d;
            for (int i = 0; i < d; i++) {
                k[i] = offset[part * d + i] + centre[i] + expf(-4.0f * (float)i / (float)d) * (float)random_normal(&w->random);
                v[i] = centre[i] * 0.5f + (float)random_normal(&w->random);
            }
        }
    memory_free(centres);
    memory_free(offset);
}

static void write_rows(world *w, int64_t first, int64_t end)
{
    assert_int_equal(kv_reserve(w->kv, end, NULL), QUARRY_OK);
    for (int64_t pos = first; pos < end; pos++)
        for (int layer = 0; layer < w->shape.kv.n_layer; layer++)
            for (int head = 0; head < w->shape.kv.n_head_kv; head++) {
                float *k = row_of(w, w->k, pos, layer, head), *v = row_of(w, w->v, pos, layer, head);
                void *row = kv_row(w->kv, layer, head, pos);
                kv_write(kernels, row, &w->shape.kv, k, v);
                kv_read_key(kernels, row, &w->shape.kv, k); /* rounded as stored */
                kv_read_value(kernels, row, &w->shape.kv, v);
            }
    kv_commit(w->kv, end);
}

static world open_world(int64_t n, int d, int group, kv_type type, const char *spec, uint64_t seed)
{
    world w = {
        .shape = {.kv = {.n_layer = 2, .n_head_kv = 2, .head_dim = d, .type = type}, .n_head = 2 * group, .scale = 1 / sqrtf((float)d)},
        .group = group,
        .d = d,
        .n = n};
    random_seed(&w.random, seed);
    w.k = make(n * 4 * d);
    w.v = make(n * 4 * d);
    w.kv = kv_create(&w.shape.kv, NULL);
    assert_non_null(w.kv);
    quarry_error error = {0};
    w.p = attn_ivfpq.create(&w.shape, kernels, spec, &error);
    assert_non_null(w.p);
    fill_rows(&w);
    return w;
}

static void close_world(world *w)
{
    memory_free(w->k);
    memory_free(w->v);
    kv_destroy(w->kv);
    attn_policy_destroy(w->p);
    arena_free(&w->scratch);
}

static void query(world *w, float *q)
{
    for (int i = 0; i < w->group * w->d; i++) q[i] = (float)random_normal(&w->random) * (1 + (float)(i % 7) / 4);
}

static void append(world *w, attn_policy *p, const kv_seq *kv, int64_t n)
{
    if (n == 0) return;
    assert_int_equal(p->type->reserve(p, n, NULL), QUARRY_OK);
    for (int layer = 0; layer < 2; layer++)
        for (int head = 0; head < 2; head++) {
            arena_reset(&w->scratch);
            p->type->append(p, layer, head, kv, n, &w->scratch);
        }
    p->type->commit(p, n);
}

static void seal(world *w, attn_policy *p, const kv_seq *kv)
{
    assert_int_equal(p->type->reserve_seal(p, NULL), QUARRY_OK);
    for (int layer = 0; layer < 2; layer++)
        for (int head = 0; head < 2; head++) {
            arena_reset(&w->scratch);
            p->type->seal(p, layer, head, kv, &w->scratch);
        }
    p->type->commit_seal(p);
}

/* Queries of positions [0, n), with a few strong directions. */
static void observe(world *w, int64_t n)
{
    float *q = make(n * w->group * w->d);
    for (int layer = 0; layer < 2; layer++)
        for (int head = 0; head < 2; head++) {
            for (int64_t i = 0; i < n * w->group * w->d; i++) q[i] = (float)random_normal(&w->random) * (i % w->d < 8 ? 3 : 1);
            w->p->type->observe(w->p, layer, head, q, 0, n);
        }
    memory_free(q);
}

/* Reads n tokens in one go; seals or not. */
static void read_all(world *w, bool close)
{
    observe(w, 256); /* all in the first segment, so that every later one learns from the same */
    write_rows(w, 0, w->n);
    append(w, w->p, w->kv, (w->n - ATTN_WINDOW - ATTN_SINKS) / (close ? 1 : ATTN_BLOCK) * (close ? 1 : ATTN_BLOCK));
    if (close) seal(w, w->p, w->kv);
}

typedef struct outcome {
    attn_selection sel;
    bool *read; /* [n]: sinks, selected, local */
    float *out; /* [group][d] */
    attn_cost cost;
} outcome;

static void outcome_free(outcome *o)
{
    memory_free(o->read);
    memory_free(o->out);
}

static double score(const world *w, const float *q, int64_t pos, int layer, int head, int h)
{
    double sum = 0;
    const float *k = row_of(w, w->k, pos, layer, head);
    for (int i = 0; i < w->d; i++) sum += (double)q[h * w->d + i] * k[i];
    return sum * w->shape.scale;
}

static void add_rows(const world *w, int layer, int head, const float *q, int64_t first, int64_t end, attention_state *state)
{
    for (int h = 0; h < w->group; h++)
        for (int64_t pos = first; pos < end; pos++) {
            float s = (float)score(w, q, pos, layer, head, h), top = s > state->m[h] ? s : state->m[h];
            float before = expf(state->m[h] - top), now = expf(s - top), *o = state->o + h * w->d;
            const float *v = row_of(w, w->v, pos, layer, head);
            for (int i = 0; i < w->d; i++) o[i] = o[i] * before + now * v[i];
            state->l[h] = state->l[h] * before + now;
            state->m[h] = top;
        }
}

/* One decode step as the driver does it, for the query that follows the last row. */
static outcome step(world *w, attn_policy *p, const kv_seq *kv, int layer, int head, const float *q)
{
    int64_t n = kv_length(kv);
    outcome o = {.read = memory_zero((size_t)n, sizeof *o.read, "test", NULL), .out = make(w->group * w->d)};
    float m[16], l[16];
    attention_state state = {m, l, o.out};
    for (int h = 0; h < w->group; h++) {
        m[h] = -INFINITY;
        l[h] = 0;
    }
    arena_reset(&w->scratch);
    add_rows(w, layer, head, q, 0, ATTN_SINKS, &state);
    add_rows(w, layer, head, q, p->n_far, n, &state);
    assert_int_equal(p->type->select(p, layer, head, w->kv, q, n, &state, &w->scratch, &o.sel, &o.cost, NULL), QUARRY_OK);
    if (o.sel.all) add_rows(w, layer, head, q, ATTN_SINKS, p->n_far, &state);
    for (int64_t pos = 0; pos < n; pos++) o.read[pos] = o.sel.all || pos < ATTN_SINKS || pos >= p->n_far;
    int64_t n_sel = o.sel.all ? 0 : o.sel.n;
    for (int64_t i = 0; i < n_sel; i++) {
        assert_true(o.sel.ids[i] >= ATTN_SINKS && o.sel.ids[i] < p->n_far && !o.read[o.sel.ids[i]]);
        o.read[o.sel.ids[i]] = true;
    }
    float *scores = make(w->group * n_sel + 1);
    const void **rows = memory_zero((size_t)n_sel + 1, sizeof *rows, "test", NULL);
    for (int64_t i = 0; i < n_sel; i++) {
        rows[i] = kv_row(kv, layer, head, o.sel.ids[i]);
        for (int h = 0; h < w->group; h++) scores[h * n_sel + i] = (float)score(w, q, o.sel.ids[i], layer, head, h);
    }
    for (int64_t i = 0; i < n_sel; i++) add_rows(w, layer, head, q, o.sel.ids[i], o.sel.ids[i] + 1, &state);
    p->type->tail(p, layer, head, q, &o.sel, scores, rows, &w->scratch, &state, &o.cost);
    for (int h = 0; h < w->group; h++) {
        assert_true(isfinite(l[h]) && l[h] > 0);
        for (int i = 0; i < w->d; i++) o.out[h * w->d + i] /= l[h];
    }
    memory_free(scores);
    memory_free(rows);
    return o;
}

/* Attention over the rows that were read and, for each unread far token, its estimated weight times the mean value of what is unread of its
 * group: of_group[pos] in [0, n_groups) or -1. sums [n_groups][d], if not NULL, are the index's own of the values, from which those of the
 * read are subtracted, and estimates [group][n] its scores; otherwise the true ones are taken. */
static void reference(const world *w, const outcome *o, int layer, int head, const float *q, const int32_t *of_group, int n_groups,
                      const double *sums, const double *estimates, double *out)
{
    int d = w->d;
    int64_t n = kv_length(w->kv);
    double *value = calloc((size_t)(n_groups + 1) * (size_t)d, sizeof *value), *left = calloc((size_t)n_groups + 1, sizeof *left);
    for (int i = 0; sums && i < n_groups * d; i++) value[i] = sums[i];
    for (int64_t pos = 0; pos < n; pos++) {
        int32_t c = of_group[pos];
        if (c < 0) continue;
        if (!o->read[pos]) left[c]++;
        if ((sums == NULL) == o->read[pos]) continue;
        for (int i = 0; i < d; i++) value[c * d + i] += (sums ? -1 : 1) * (double)row_of(w, w->v, pos, layer, head)[i];
    }
    for (int h = 0; h < w->group; h++) {
        double l = 0, shift = -INFINITY;
        for (int64_t pos = 0; pos < n; pos++) shift = fmax(shift, score(w, q, pos, layer, head, h));
        for (int i = 0; i < d; i++) out[h * d + i] = 0;
        for (int64_t pos = 0; pos < n; pos++) {
            int32_t c = of_group[pos];
            if (!o->read[pos] && c < 0) continue;
            double s = o->read[pos] || !estimates ? score(w, q, pos, layer, head, h) : estimates[h * w->n + pos], e = exp(s - shift);
            l += e;
            for (int i = 0; i < d; i++)
                out[h * d + i] += e * (o->read[pos] ? (double)row_of(w, w->v, pos, layer, head)[i] : value[c * d + i] / left[c]);
        }
        for (int i = 0; i < d; i++) out[h * d + i] /= l;
    }
    free(value);
    free(left);
}

/* The key of a slot as its product code says, or its 4 bits a dimension. */
static void decode(const world *w, const ivfpq_part *part, const ivfpq_part *tables, int64_t slot, bool in_4_bits, const double *rotated,
                   const float *q, double *sum)
{
    int d = w->d;
    *sum = 0;
    for (int i = 0; i < d; i++) *sum += (double)tables->centre[i] * q[i];
    for (int i = 0; i < d && in_4_bits; i++) {
        int byte = part->keys[slot * (d / 2) + i % (d / 2)], nibble = i < d / 2 ? byte & 15 : byte >> 4;
        *sum += (double)part->key_scale[slot] * (nibble - 8) * q[i];
    }
    for (int sub = 0; sub < d / 4 && !in_4_bits; sub++) {
        int byte = part->codes[((slot / 32) * (d / 4) + sub) * 16 + slot % 16], code = byte >> (slot % 32 / 16 * 4) & 15;
        for (int j = 0; j < 4; j++) *sum += rotated[sub * 4 + j] * (double)tables->book.centroids[(sub * 4 + j) * 16 + code];
    }
}

/* Clusters and scores as the index holds them: from 4-bit keys where it estimates all a second time, else from the codes. Returns how many
 * clusters. */
static int clusters_of(const world *w, attn_policy *policy, int part, const float *q, int32_t *of_group, double *sums, double *estimates)
{
    const ivfpq *p = (const ivfpq *)policy;
    int n = 0, d = w->d;
    for (int64_t pos = 0; pos < w->n; pos++) of_group[pos] = -1;
    for (int64_t i = 0; i <= p->n_sealed; i++) {
        if (i == p->n_sealed && p->n_coded == 0) continue;
        const ivfpq_segment *s = i < p->n_sealed ? p->sealed[i] : p->open;
        ivfpq_part segment = ivfpq_part_of(p, s, part), tables = i < p->n_sealed ? segment : ivfpq_part_of(p, p->sealed[i - 1], part);
        assert_true(segment.status->coded);
        int64_t first = i < p->n_sealed ? s->first : p->open_first, coded = i < p->n_sealed ? s->n : p->n_coded;
        assert_int_equal(segment.begin[0], 0);
        assert_int_equal(segment.begin[segment.status->n_clusters], coded);
        for (int h = 0; h < w->group; h++) {
            float scaled[256];
            double rotated[256] = {0};
            for (int j = 0; j < d; j++) scaled[j] = q[h * d + j] * w->shape.scale;
            for (int j = 0; j < d * d; j++) rotated[j / d] += (double)tables.query_scale[j / d] * tables.query[j] * scaled[j % d];
            for (int64_t slot = 0; slot < coded; slot++) {
                int64_t pos = first + segment.order[slot];
                assert_true(segment.begin[segment.cluster[slot]] <= slot && slot < segment.begin[segment.cluster[slot] + 1]);
                assert_true(h > 0 || of_group[pos] < 0);
                of_group[pos] = n + segment.cluster[slot];
                decode(w, &segment, &tables, slot, p->options.refine > 0, rotated, scaled, &estimates[h * w->n + pos]);
            }
        }
        for (int c = 0; c < segment.status->n_clusters; c++, n++)
            for (int j = 0; j < d; j++) sums[n * d + j] = (double)segment.value_scale[c] * segment.values[c * d + j];
    }
    return n;
}

static double difference(const world *w, const float *out, const double *want)
{
    double e = 0, size = 0;
    for (int i = 0; i < w->group * w->d; i++) {
        e += pow(out[i] - want[i], 2);
        size += pow(want[i], 2);
    }
    return sqrt(e / size);
}

/* Scores are in steps of a 63rd of the widest table, and powers of two are linear between octaves. */
#define TAIL_ROUNDING 0.05

/* Steps for every part against both references; returns the larger error against the true scores and means. */
static double check_tail(world *w)
{
    float q[16 * 256];
    double *want = calloc(16 * 256, sizeof *want), worst = 0;
    int32_t *of_group = calloc((size_t)w->n, sizeof *of_group);
    double *sums = calloc((size_t)w->n * (size_t)w->d, sizeof *sums), *estimates = calloc((size_t)w->n * 16, sizeof *estimates);
    for (int part = 0; part < 4; part++) {
        query(w, q);
        outcome o = step(w, w->p, w->kv, part / 2, part % 2, q);
        assert_false(o.sel.all);
        int n_groups = clusters_of(w, w->p, part, q, of_group, sums, estimates);
        reference(w, &o, part / 2, part % 2, q, of_group, n_groups, sums, estimates, want);
        double e = difference(w, o.out, want);
        if (e > TAIL_ROUNDING) print_error("part %d: relative error %g against the naive tail\n", part, e);
        assert_true(e <= TAIL_ROUNDING);
        reference(w, &o, part / 2, part % 2, q, of_group, n_groups, NULL, NULL, want);
        e = difference(w, o.out, want);
        worst = e > worst ? e : worst;
        outcome_free(&o);
    }
    free(want), free(of_group), free(sums), free(estimates);
    return worst;
}

static void tail_equals_the_naive_formula(void **state)
{
    (void)state;
    const struct {
        int d, group;
        kv_type type;
        const char *spec;
    } cases[] = {{64, 3, KV_F16, "segment=512"},         {64, 1, KV_F32, "segment=512,size=32"},
                 {128, 8, KV_F16, "segment=512"},        {80, 2, KV_F32, "segment=512,size=4,budget=0.5"},
                 {96, 5, KV_F16, "segment=512,alpha=1"}, {256, 4, KV_F32, "segment=512"},
                 {8, 7, KV_F32, "segment=512"}};
    for (size_t i = 0; i < TEST_COUNT(cases); i++)
        for (int close = 0; close < 2; close++)
            for (int again = 0; again < 2; again++) { /* scores of the codes, or all from 4-bit keys */
                char spec[128];
                snprintf(spec, sizeof spec, "%s,threshold=0,refine=%d", cases[i].spec, again);
                world w = open_world(1500, cases[i].d, cases[i].group, cases[i].type, spec, 10 + i);
                read_all(&w, close);
                double e = check_tail(&w);
                if (again && e > 0.1) print_error("case %zu: %g from the tail of exact scores and means\n", i, e);
                assert_true(!again || e <= 0.1);
                close_world(&w);
            }
}

static void budget_of_everything_equals_full_attention(void **state)
{
    (void)state;
    for (int large_floor = 0; large_floor < 2; large_floor++) {
        world w = open_world(900, 64, 3, KV_F16, large_floor ? "min=900,segment=256" : "budget=1,segment=256", 20);
        read_all(&w, true);
        float q[3 * 64];
        double want[3 * 64];
        int32_t of_group[900];
        for (int i = 0; i < 900; i++) of_group[i] = -1;
        query(&w, q);
        outcome o = step(&w, w.p, w.kv, 1, 0, q);
        assert_true(o.sel.all);
        reference(&w, &o, 1, 0, q, of_group, 0, NULL, NULL, want);
        assert_true(difference(&w, o.out, want) < 1e-5);
        outcome_free(&o);
        close_world(&w);
    }
}

/* Of the tokens that are heaviest for some head by exact normalised mass_of, most must be found; a random choice of 5 % would find 5 %. */
static void selection_finds_most_of_the_heaviest_tokens(void **state)
{
    (void)state;
    world w = open_world(3000, 64, 3, KV_F16, "budget=0.05,threshold=0,segment=1024", 30);
    read_all(&w, true);
    float q[3 * 64];
    double *mass_of = calloc(3000, sizeof *mass_of), mass = 0, got = 0;
    for (int round = 0; round < 8; round++) {
        query(&w, q);
        memset(mass_of, 0, 3000 * sizeof *mass_of);
        for (int h = 0; h < 3; h++) {
            double l = 0;
            for (int64_t pos = 0; pos < w.n; pos++) l += exp(score(&w, q, pos, 0, 1, h));
            for (int64_t pos = 0; pos < w.n; pos++) mass_of[pos] = fmax(mass_of[pos], exp(score(&w, q, pos, 0, 1, h)) / l);
        }
        outcome o = step(&w, w.p, w.kv, 0, 1, q);
        for (int64_t i = 0; i < o.sel.n; i++) got += mass_of[o.sel.ids[i]];
        for (int64_t i = 0; i < o.sel.n; i++) { /* the mass of the exact best of the same number */
            int64_t best = ATTN_SINKS;
            for (int64_t pos = ATTN_SINKS; pos < w.p->n_far; pos++)
                if (mass_of[pos] > mass_of[best]) best = pos;
            mass += mass_of[best];
            mass_of[best] = 0;
        }
        assert_int_equal(o.sel.n, (int64_t)ceil(0.05 * (double)(w.p->n_far - ATTN_SINKS)));
        outcome_free(&o);
    }
    if (got < 0.75 * mass) print_error("%g of the mass\n", got / mass);
    assert_true(got >= 0.75 * mass);
    free(mass_of);
    close_world(&w);
}

static void a_needle_is_always_selected(void **state)
{
    (void)state;
    world w = open_world(2500, 64, 3, KV_F16, "budget=0.01,threshold=0,min=16,segment=512", 40);
    float q[3 * 64];
    query(&w, q);
    const int64_t needles[] = {8, 300, 519, 520, 1777, 2300, 2434, 2435};
    for (size_t i = 0; i < TEST_COUNT(needles); i++)
        for (int j = 0; j < 64; j++) /* aligned with one of the heads, not larger than its neighbours */
            row_of(&w, w.k, needles[i], 0, 0)[j] += 1.2f * q[(i % 3) * 64 + (size_t)j];
    read_all(&w, true);
    outcome o = step(&w, w.p, w.kv, 0, 0, q);
    assert_false(o.sel.all);
    assert_true(o.sel.n < 30);
    for (size_t i = 0; i < TEST_COUNT(needles); i++) assert_true(o.read[needles[i]]);
    outcome_free(&o);
    close_world(&w);
}

static void assert_same_steps(world *w, attn_policy *a, const kv_seq *kv_a, attn_policy *b, const kv_seq *kv_b)
{
    float q[16 * 256];
    for (int part = 0; part < 4; part++) {
        query(w, q);
        outcome x = step(w, a, kv_a, part / 2, part % 2, q), y = step(w, b, kv_b, part / 2, part % 2, q);
        assert_int_equal(x.sel.all, y.sel.all);
        assert_memory_equal(x.read, y.read, (size_t)kv_length(kv_a) * sizeof *x.read);
        assert_memory_equal(x.out, y.out, (size_t)(w->group * w->d) * sizeof *x.out);
        outcome_free(&x);
        outcome_free(&y);
    }
}

static void appending_in_blocks_equals_appending_at_once(void **state)
{
    (void)state;
    world w = open_world(1400, 64, 2, KV_F16, "segment=256", 50);
    observe(&w, 600);
    write_rows(&w, 0, w.n);
    attn_policy *blocks = attn_ivfpq.fork(w.p, NULL);
    int64_t n = (w.n - ATTN_WINDOW - ATTN_SINKS) / ATTN_BLOCK * ATTN_BLOCK;
    append(&w, w.p, w.kv, n);
    for (int64_t i = 0; i < n; i += ATTN_BLOCK) append(&w, blocks, w.kv, ATTN_BLOCK);
    assert_int_equal(blocks->n_far, w.p->n_far);
    assert_same_steps(&w, w.p, w.kv, blocks, w.kv);
    append(&w, w.p, w.kv, 24); /* and an odd rest, before a seal that leaves it open */
    for (int i = 0; i < 3; i++) append(&w, blocks, w.kv, 8);
    seal(&w, w.p, w.kv);
    seal(&w, blocks, w.kv);
    assert_same_steps(&w, w.p, w.kv, blocks, w.kv);
    attn_policy_destroy(blocks);
    close_world(&w);
}

static void full_segments_grow_with_what_lies_before_them(void **state)
{
    (void)state;
    world w = open_world(4000, 64, 2, KV_F16, "segment=256", 51);
    observe(&w, 600);
    write_rows(&w, 0, w.n);
    append(&w, w.p, w.kv, (w.n - ATTN_WINDOW - ATTN_SINKS) / ATTN_BLOCK * ATTN_BLOCK);
    const ivfpq *p = (const ivfpq *)w.p;
    const int64_t expected[] = {256, 256, 512, 512, 512, 512, 512, 512};
    assert_int_equal(p->n_sealed, TEST_COUNT(expected));
    for (int64_t i = 0, first = ATTN_SINKS; i < p->n_sealed; first += expected[i++]) {
        assert_int_equal(p->sealed[i]->n, expected[i]);
        assert_int_equal(p->sealed[i]->first, first);
    }
    assert_true(p->n_open < ivfpq_full_segment(p, p->open_first));
    close_world(&w);
}

/* Reads 1,400 tokens in batches as a session does; returns the codes of all sealed segments of the first part. */
static uint8_t *read_in_batches(int64_t batch, const float *q, size_t *n_bytes)
{
    world w = open_world(1400, 64, 2, KV_F16, "segment=256", 55);
    for (int64_t first = 0; first < w.n; first += batch) {
        int64_t end = first + batch < w.n ? first + batch : w.n, n = end - ATTN_WINDOW - w.p->n_far;
        w.p->type->observe(w.p, 0, 0, q + first * 2 * 64, first, end - first);
        write_rows(&w, first, end);
        append(&w, w.p, w.kv, n > 0 ? n / ATTN_BLOCK * ATTN_BLOCK : 0);
    }
    append(&w, w.p, w.kv, w.n - ATTN_WINDOW - w.p->n_far);
    seal(&w, w.p, w.kv);
    const ivfpq *p = (const ivfpq *)w.p;
    uint8_t *codes = memory_zero((size_t)w.n, 8, "test", NULL);
    *n_bytes = 0;
    for (int64_t i = 0; i < p->n_sealed; i++) {
        size_t n = vq_code_bytes(16, p->sealed[i]->n);
        memcpy(codes + *n_bytes, ivfpq_part_of(p, p->sealed[i], 0).codes, n);
        *n_bytes += n;
    }
    close_world(&w);
    return codes;
}

static void the_index_does_not_depend_on_the_size_of_batches(void **state)
{
    (void)state;
    random_state r;
    random_seed(&r, 56);
    float *q = make(1400 * 2 * 64);
    for (int i = 0; i < 1400 * 2 * 64; i++) /* ever more concentrated: the statistics depend on how far they reach */
        q[i] = (float)random_normal(&r) * (i % 64 < 8 ? (float)i / 1e4f : 1);
    size_t n[2], same = 0;
    uint8_t *small = read_in_batches(64, q, &n[0]), *large = read_in_batches(200, q, &n[1]);
    assert_int_equal(n[0], n[1]);
    for (size_t i = 0; i < n[0]; i++) same += small[i] == large[i];
    assert_true(same >= n[0] * 99 / 100); /* sums are rounded differently */
    memory_free(small), memory_free(large), memory_free(q);
}

static void few_tokens_train_no_tables_and_are_read_exactly(void **state)
{
    (void)state;
    world w = open_world(700, 64, 3, KV_F16, "segment=512,min=8,refine=0", 60);
    float q[3 * 64];
    write_rows(&w, 0, 180);
    append(&w, w.p, w.kv, 180 - ATTN_WINDOW - ATTN_SINKS);
    seal(&w, w.p, w.kv);
    query(&w, q);
    outcome o = step(&w, w.p, w.kv, 0, 0, q);
    assert_true(o.sel.all); /* 108 far tokens */
    outcome_free(&o);
    write_rows(&w, 180, 260);
    append(&w, w.p, w.kv, 64);
    o = step(&w, w.p, w.kv, 0, 0, q);
    assert_true(o.sel.all); /* still no tables */
    outcome_free(&o);
    seal(&w, w.p, w.kv);
    o = step(&w, w.p, w.kv, 0, 0, q);
    assert_false(o.sel.all);
    outcome_free(&o);
    check_tail(&w);
    close_world(&w);
}

static void a_fork_shares_segments_and_then_goes_its_own_way(void **state)
{
    (void)state;
    world w = open_world(1200, 64, 3, KV_F16, "segment=256", 70);
    observe(&w, 600);
    write_rows(&w, 0, 900);
    append(&w, w.p, w.kv, 800);
    kv_seq *kv = kv_fork(w.kv, NULL);
    attn_policy *fork = attn_ivfpq.fork(w.p, NULL);
    assert_int_equal(fork->n_far, w.p->n_far);
    assert_same_steps(&w, w.p, w.kv, fork, kv);
    float q[3 * 64];
    query(&w, q);
    outcome before = step(&w, fork, kv, 1, 1, q);
    write_rows(&w, 900, 1200);
    append(&w, w.p, w.kv, 288);
    w.p->type->truncate(w.p, 100);
    outcome after = step(&w, fork, kv, 1, 1, q);
    assert_memory_equal(before.out, after.out, sizeof(float) * 3 * 64);
    outcome_free(&before);
    outcome_free(&after);
    attn_policy_destroy(w.p); /* the fork keeps what they shared */
    w.p = fork;
    assert_same_steps(&w, fork, kv, fork, kv);
    kv_destroy(kv);
    close_world(&w);
}

/* After a cut and other tokens in their place, everything is as if only the tokens that live had been read. */
static void truncation_leaves_only_live_tokens(void **state)
{
    (void)state;
    const int64_t cuts[] = {8, 20, 263, 264, 265, 500, 776, 777, 1000, 1031, 1040, 1047, 1300};
    for (size_t i = 0; i < TEST_COUNT(cuts); i++) {
        world w = open_world(1400, 64, 3, KV_F16, "segment=256,min=8,refine=0", 80);
        read_all(&w, false);
        w.p->type->truncate(w.p, cuts[i]);
        kv_truncate(w.kv, cuts[i] + ATTN_WINDOW);
        assert_int_equal(w.p->n_far, cuts[i]);
        for (int part = 0; part < 4; part++) { /* no dead token is selected (step asserts it); the estimate holds none either */
            float q[3 * 64];
            double want[3 * 64];
            int32_t of_group[1400];
            double *sums = calloc(1400 * 64, sizeof *sums), *estimates = calloc(1400 * 3, sizeof *estimates);
            query(&w, q);
            outcome o = step(&w, w.p, w.kv, part / 2, part % 2, q);
            int n_groups = clusters_of(&w, w.p, part, q, of_group, sums, estimates);
            for (int64_t pos = 0; pos < w.n; pos++) assert_true(of_group[pos] < 0 || pos < w.p->n_far);
            for (int64_t pos = 0; pos < kv_length(w.kv); pos++) assert_true(o.read[pos] || of_group[pos] >= 0);
            reference(&w, &o, part / 2, part % 2, q, of_group, n_groups, sums, estimates, want);
            assert_true(difference(&w, o.out, want) < TAIL_ROUNDING);
            outcome_free(&o);
            free(sums), free(estimates);
        }
        /* other tokens follow */
        fill_rows(&w);
        for (int64_t pos = 0; pos < cuts[i] + ATTN_WINDOW; pos++)
            for (int part = 0; part < 4; part++) {
                kv_read_key(kernels, kv_row(w.kv, part / 2, part % 2, pos), &w.shape.kv, row_of(&w, w.k, pos, part / 2, part % 2));
                kv_read_value(kernels, kv_row(w.kv, part / 2, part % 2, pos), &w.shape.kv, row_of(&w, w.v, pos, part / 2, part % 2));
            }
        write_rows(&w, cuts[i] + ATTN_WINDOW, 1400);
        attn_policy *fresh = attn_ivfpq.create(&w.shape, kernels, "segment=256,min=8,refine=0", NULL);
        ivfpq *from = (ivfpq *)w.p, *to = (ivfpq *)fresh;
        memcpy(to->moments, from->moments, 4 * 64 * 64 * sizeof(float));
        memcpy(to->n_queries, from->n_queries, 4 * sizeof(int64_t));
        append(&w, fresh, w.kv, 1320);
        append(&w, w.p, w.kv, 1320 - (cuts[i] - ATTN_SINKS));
        assert_same_steps(&w, w.p, w.kv, fresh, w.kv);
        attn_policy_destroy(fresh);
        close_world(&w);
    }
}

/* A cut, then a seal with nothing appended between: what was reopened gets codes again. */
static void a_seal_recodes_what_a_cut_reopened(void **state)
{
    (void)state;
    const int64_t cuts[] = {400, 300};
    for (size_t i = 0; i < TEST_COUNT(cuts); i++) { /* 400: enough for a segment of its own; 300: coded with the tables before */
        world w = open_world(900, 64, 3, KV_F16, "segment=256,min=8,refine=0", 90);
        read_all(&w, true);
        w.p->type->truncate(w.p, cuts[i]);
        kv_truncate(w.kv, cuts[i] + ATTN_WINDOW);
        seal(&w, w.p, w.kv);
        const ivfpq *p = (const ivfpq *)w.p;
        assert_int_equal(p->n_open, i == 0 ? 0 : 300 - 264);
        assert_int_equal(p->n_coded, p->n_open);
        check_tail(&w);
        close_world(&w);
    }
}

static void threshold_reads_the_heavy_tokens_up_to_a_share(void **state)
{
    (void)state;
    world w = open_world(1500, 64, 3, KV_F16, "segment=512,budget=0,min=1,threshold=0.002,max=0.2", 100);
    read_all(&w, true);
    float q[3 * 64];
    for (int strength = 1; strength <= 2; strength++) {
        query(&w, q);
        for (int i = 0; i < 3 * 64; i++) q[i] *= (float)strength;
        outcome o = step(&w, w.p, w.kv, 0, 0, q);
        int64_t heavy = 0, found = 0, light = 0;
        for (int64_t pos = ATTN_SINKS; pos < w.p->n_far; pos++) {
            double mass_of = 0;
            for (int h = 0; h < 3; h++) {
                double l = 0;
                for (int64_t t = 0; t < w.n; t++) l += exp(score(&w, q, t, 0, 0, h));
                mass_of = fmax(mass_of, exp(score(&w, q, pos, 0, 0, h)) / l);
            }
            heavy += mass_of > 0.006;
            found += mass_of > 0.006 && o.read[pos];
            light += mass_of < 0.0005 && o.read[pos];
        }
        assert_true(heavy > 0 && (double)found >= 0.7 * (double)heavy);
        assert_true(light <= o.sel.n / 4);
        assert_true(o.sel.n <= (int64_t)ceil(0.2 * (double)(w.p->n_far - ATTN_SINKS)));
        outcome_free(&o);
    }
    close_world(&w);
}

/* The sharper a query, the more its codes err in nats, and the margin grows with that. */
static void a_margin_in_standard_errors_serves_sharp_queries(void **state)
{
    (void)state;
    const char *const specs[] = {"segment=512,budget=0,min=1,max=1,refine=1,threshold=0.001,outliers=0,margin=0",
                                 "segment=512,budget=0,min=1,max=1,refine=1,threshold=0.001,outliers=0,margin=3"};
    int64_t found[2] = {0}, heavy[2] = {0};
    for (int i = 0; i < 2; i++) {
        world w = open_world(1500, 64, 2, KV_F16, specs[i], 108);
        read_all(&w, true);
        for (int round = 0; round < 16; round++) {
            float q[2 * 64];
            query(&w, q);
            for (int j = 0; j < 2 * 64; j++) q[j] *= 3;
            outcome o = step(&w, w.p, w.kv, 0, 0, q);
            for (int h = 0; h < 2; h++) {
                double all = 0;
                for (int64_t pos = 0; pos < w.n; pos++) all += exp(score(&w, q, pos, 0, 0, h));
                for (int64_t pos = ATTN_SINKS; pos < w.p->n_far; pos++) {
                    const bool is_heavy = exp(score(&w, q, pos, 0, 0, h)) > 0.01 * all;
                    heavy[i] += is_heavy;
                    found[i] += is_heavy && o.read[pos];
                }
            }
            outcome_free(&o);
        }
        close_world(&w);
    }
    print_message("%lld of %lld without, %lld of %lld with a margin\n", (long long)found[0], (long long)heavy[0], (long long)found[1],
                  (long long)heavy[1]);
    assert_true(heavy[1] > 100 && found[1] > heavy[1] * 98 / 100 && found[0] < found[1]);
}

/* Of four times as many tokens as those up to which it holds, what weighs half of the threshold is read. */
static void the_threshold_falls_with_a_long_text(void **state)
{
    (void)state;
    enum { N = 4 * IVFPQ_FLAT + ATTN_SINKS + 100 };
    world w = open_world(N, 16, 1, KV_F16, "segment=16384,budget=0,min=1,max=1,threshold=0.0002,margin=4", 107);
    read_all(&w, true);
    float q[16];
    int64_t between = 0, found = 0, below = 0, wrong = 0;
    for (int round = 0; round < 4; round++) {
        double all = 0;
        query(&w, q);
        outcome o = step(&w, w.p, w.kv, 0, 0, q);
        for (int64_t pos = 0; pos < w.n; pos++) all += exp(score(&w, q, pos, 0, 0, 0));
        for (int64_t pos = ATTN_SINKS; pos < w.p->n_far; pos++) {
            const double of_all = exp(score(&w, q, pos, 0, 0, 0)) / all;
            between += of_all > 0.00013 && of_all < 0.00017;
            found += of_all > 0.00013 && of_all < 0.00017 && o.read[pos];
            below += of_all > 0.00002 && of_all < 0.00003;
            wrong += of_all > 0.00002 && of_all < 0.00003 && o.read[pos];
        }
        outcome_free(&o);
    }
    assert_true(between > 100 && below > 100);
    print_message("%lld of %lld above, %lld of %lld below\n", (long long)found, (long long)between, (long long)wrong, (long long)below);
    assert_true(found > between * 9 / 10);
    assert_true(wrong < below / 10);
    close_world(&w);
}

/* Near rows and selection hold about the wanted share of the head's exact weights, on average over queries: codes err. */
static void a_budget_by_mass_reads_about_so_much(void **state)
{
    (void)state;
    enum { ROUNDS = 16 };
    const char *const specs[] = {"segment=512,budget=0,min=1,max=1,mass=0.6", "segment=512,budget=0,min=1,max=1,mass=0.9"};
    int64_t before = 0;
    for (int i = 0; i < 2; i++) {
        const double wanted = i == 0 ? 0.6 : 0.9;
        world w = open_world(1500, 64, 1, KV_F16, specs[i], 105);
        read_all(&w, true);
        double share = 0;
        int64_t n_read = 0;
        for (int round = 0; round < ROUNDS; round++) {
            float q[64];
            double held = 0, all = 0;
            query(&w, q);
            outcome o = step(&w, w.p, w.kv, 0, 0, q);
            for (int64_t pos = 0; pos < w.n; pos++) {
                const double mass = exp(score(&w, q, pos, 0, 0, 0));
                all += mass;
                held += o.read[pos] ? mass : 0;
            }
            assert_true(held > (wanted - 0.15) * all);
            share += held / all / ROUNDS;
            n_read += o.sel.n;
            outcome_free(&o);
        }
        print_message("%g of the mass for %g\n", share, wanted);
        assert_true(share > wanted - 0.03 && share < wanted + 0.08); /* the last token, which may be heavy, goes beyond */
        assert_true(n_read > before && n_read < ROUNDS * (w.p->n_far - ATTN_SINKS) * 3 / 4);
        before = n_read;
        close_world(&w);
    }
}

/* Without the second look a budget by mass goes by the scores of the codes: each head's near rows and what is read of its far tokens hold the wanted share of its estimated mass,
 * and a head alone reads its heaviest, and none that is not needed. exp_sum has the far tokens' sum up to 6 % too large, and scores are rounded to steps. */
static void a_budget_by_mass_goes_by_codes_alone_without_a_second_look(void **state)
{
    (void)state;
    enum { N = 1500, D = 64, ROUNDS = 8 };
    const double wanted[] = {0.5, 0.8, 0.9}, steps = 0.4; /* rounded scores may be in another order */
    const int groups[] = {1, 3};
    double *sums = calloc(N * D, sizeof *sums), *estimates = calloc(N * 3, sizeof *estimates);
    int32_t of_group[N];
    for (int i = 0; i < 6; i++) {
        const int group = groups[i / 3];
        const double share = wanted[i % 3];
        char spec[96];
        snprintf(spec, sizeof spec, "segment=512,budget=0,min=1,max=1,refine=0,mass=%g", share);
        world w = open_world(N, D, group, KV_F16, spec, 106);
        read_all(&w, true);
        for (int round = 0; round < ROUNDS; round++) {
            float q[3 * D];
            query(&w, q);
            outcome o = step(&w, w.p, w.kv, 0, 0, q);
            clusters_of(&w, w.p, 0, q, of_group, sums, estimates);
            for (int h = 0; h < group; h++) {
                double held = 0, all = 0, lightest = INFINITY, heaviest_left = -INFINITY;
                for (int64_t pos = 0; pos < N; pos++) {
                    const bool far = of_group[pos] >= 0;
                    const double s = far ? estimates[h * N + pos] : score(&w, q, pos, 0, 0, h);
                    all += exp(s);
                    held += o.read[pos] ? exp(s) : 0;
                    if (far && o.read[pos]) lightest = fmin(lightest, s);
                    if (!o.read[pos]) heaviest_left = fmax(heaviest_left, s);
                }
                assert_true(held > 0.99 * share * all);
                if (group > 1) continue;
                assert_true(held - exp(lightest) < 1.09 * share * all);
                assert_true(lightest > heaviest_left - steps);
            }
            outcome_free(&o);
        }
        close_world(&w);
    }
    free(sums), free(estimates);
}

/* Scores of all magnitudes leave numbers finite and the selection full. */
static void extreme_queries_stay_finite(void **state)
{
    (void)state;
    world w = open_world(900, 64, 2, KV_F32, "segment=256", 110);
    read_all(&w, true);
    const float sizes[] = {0, 1e-20f, 1e-3f, 100, 1e4f, 1e8f};
    float q[2 * 64];
    for (size_t i = 0; i < TEST_COUNT(sizes); i++) {
        query(&w, q);
        for (int j = 0; j < 2 * 64; j++) q[j] *= j < 64 ? sizes[i] : 1; /* one head unlike the other */
        outcome o = step(&w, w.p, w.kv, 1, 1, q);
        assert_true(o.sel.n >= 16);
        for (int j = 0; j < 2 * 64; j++) assert_true(isfinite(o.out[j]));
        outcome_free(&o);
    }
    close_world(&w);
}

static void without_a_tail_the_rest_is_dropped(void **state)
{
    (void)state;
    world w = open_world(900, 64, 2, KV_F32, "segment=256,tail=0", 120);
    read_all(&w, true);
    float q[2 * 64];
    double want[2 * 64];
    int32_t none[900];
    for (int i = 0; i < 900; i++) none[i] = -1;
    query(&w, q);
    outcome o = step(&w, w.p, w.kv, 0, 1, q);
    reference(&w, &o, 0, 1, q, none, 0, NULL, NULL, want);
    assert_true(difference(&w, o.out, want) < 1e-5);
    outcome_free(&o);
    close_world(&w);
}

static void what_was_read_is_counted(void **state)
{
    (void)state;
    world w = open_world(2200, 64, 3, KV_F16, "segment=512", 130);
    read_all(&w, true);
    float q[3 * 64];
    query(&w, q);
    outcome o = step(&w, w.p, w.kv, 0, 0, q);
    int64_t all = (w.p->n_far - ATTN_SINKS) * 256;
    assert_true(attn_cost_bytes(&o.cost, 0) > all / 32); /* the codes alone */
    assert_true(attn_cost_bytes(&o.cost, 0) < all / 4);
    size_t bytes = attn_policy_bytes(w.p);
    assert_true(bytes > 4 * 2100 * 8 && bytes < 8 << 20);
    outcome_free(&o);
    close_world(&w);
}

/* Every allocation fails once: either the step reports it and nothing has changed, or the part that had no memory to build with is read
 * exactly. */
static void failed_allocations_leave_the_index_usable(void **state)
{
    (void)state;
    world w = open_world(700, 16, 2, KV_F32, "segment=128,min=8", 140);
    write_rows(&w, 0, w.n);
    int64_t n = w.n - ATTN_WINDOW - ATTN_SINKS;
    bool worked = false;
    for (int64_t fail = 0; !worked; fail++) {
        attn_policy *p = NULL;
        quarry_error error;
        memory_fail_after(fail);
        p = attn_ivfpq.create(&w.shape, kernels, "segment=128,min=8", &error);
        bool reserved = p && p->type->reserve(p, n, &error) == QUARRY_OK;
        if (reserved) {
            for (int part = 0; part < 4; part++) {
                arena_free(&w.scratch);
                p->type->append(p, part / 2, part % 2, w.kv, n, &w.scratch);
            }
            p->type->commit(p, n);
            worked = p->type->reserve_seal(p, &error) == QUARRY_OK;
            for (int part = 0; worked && part < 4; part++) p->type->seal(p, part / 2, part % 2, w.kv, &w.scratch);
            if (worked) p->type->commit_seal(p);
        }
        attn_policy *fork = p ? attn_ivfpq.fork(p, &error) : NULL;
        memory_fail_after(-1);
        if (reserved) {
            float q[2 * 16];
            for (int part = 0; part < 4; part++) {
                query(&w, q);
                outcome o = step(&w, p, w.kv, part / 2, part % 2, q);
                outcome_free(&o);
            }
        }
        if (fork) attn_policy_destroy(fork);
        attn_policy_destroy(p);
        assert_true(fail < 2000);
    }
    close_world(&w);
}

static void select_without_scratch_memory_is_an_error(void **state)
{
    (void)state;
    world w = open_world(900, 64, 2, KV_F32, "segment=256", 150);
    read_all(&w, true);
    float q[2 * 64];
    query(&w, q);
    arena_free(&w.scratch);
    attn_selection sel;
    float m[2] = {0}, l[2] = {1, 1};
    attention_state near = {m, l, NULL};
    attn_cost cost = {0};
    quarry_error error;
    memory_fail_after(0);
    assert_int_equal(w.p->type->select(w.p, 0, 0, w.kv, q, w.n, &near, &w.scratch, &sel, &cost, &error), QUARRY_ERROR_MEMORY);
    memory_fail_after(-1);
    close_world(&w);
}

/* All tokens as outliers are all looked at again, as with a margin that all are within. */
static void outliers_are_looked_at_whatever_their_codes_say(void **state)
{
    (void)state;
    world w = open_world(1500, 64, 3, KV_F16, "segment=512,refine=1,margin=100,outliers=0", 160);
    quarry_error error = {0};
    attn_policy *marked = attn_ivfpq.create(&w.shape, kernels, "segment=512,refine=1,margin=0,outliers=1", &error);
    assert_non_null(marked);
    write_rows(&w, 0, w.n);
    append(&w, w.p, w.kv, 1400);
    seal(&w, w.p, w.kv);
    append(&w, marked, w.kv, 1400);
    seal(&w, marked, w.kv);
    const ivfpq *p = (const ivfpq *)marked;
    for (int64_t i = 0; i < p->n_sealed; i++) { /* every slot is listed once */
        ivfpq_part part = ivfpq_part_of(p, p->sealed[i], 0);
        bool seen[1024] = {false};
        for (int64_t j = 0; j < p->sealed[i]->n; j++) {
            assert_true(part.outliers[j] < p->sealed[i]->n && !seen[part.outliers[j]]);
            seen[part.outliers[j]] = true;
        }
    }
    assert_same_steps(&w, w.p, w.kv, marked, w.kv);
    attn_policy_destroy(marked);
    close_world(&w);
}

static void options_are_checked(void **state)
{
    (void)state;
    attn_shape shape = {.kv = {.n_layer = 1, .n_head_kv = 1, .head_dim = 64, .type = KV_F16}, .n_head = 1, .scale = 0.125f};
    quarry_error error;
    const char *const bad[] = {"budget=2", "budget", "size=0", "segment=1", "nothing=1", "min=x", "refine=2", "values=-1"};
    for (size_t i = 0; i < TEST_COUNT(bad); i++) assert_null(attn_ivfpq.create(&shape, kernels, bad[i], &error));
}

int main(void)
{
    cpu_isa isa;
    if (cpu_choose(&isa, NULL) != QUARRY_OK) return 1;
    kernels = math_kernels_get(isa);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tail_equals_the_naive_formula),
        cmocka_unit_test(budget_of_everything_equals_full_attention),
        cmocka_unit_test(selection_finds_most_of_the_heaviest_tokens),
        cmocka_unit_test(a_needle_is_always_selected),
        cmocka_unit_test(appending_in_blocks_equals_appending_at_once),
        cmocka_unit_test(full_segments_grow_with_what_lies_before_them),
        cmocka_unit_test(the_index_does_not_depend_on_the_size_of_batches),
        cmocka_unit_test(few_tokens_train_no_tables_and_are_read_exactly),
        cmocka_unit_test(a_fork_shares_segments_and_then_goes_its_own_way),
        cmocka_unit_test(truncation_leaves_only_live_tokens),
        cmocka_unit_test(a_seal_recodes_what_a_cut_reopened),
        cmocka_unit_test(threshold_reads_the_heavy_tokens_up_to_a_share),
        cmocka_unit_test(a_budget_by_mass_reads_about_so_much),
        cmocka_unit_test(a_budget_by_mass_goes_by_codes_alone_without_a_second_look),
        cmocka_unit_test(the_threshold_falls_with_a_long_text),
        cmocka_unit_test(a_margin_in_standard_errors_serves_sharp_queries),
        cmocka_unit_test(extreme_queries_stay_finite),
        cmocka_unit_test(without_a_tail_the_rest_is_dropped),
        cmocka_unit_test(what_was_read_is_counted),
        cmocka_unit_test(failed_allocations_leave_the_index_usable),
        cmocka_unit_test(select_without_scratch_memory_is_an_error),
        cmocka_unit_test(outliers_are_looked_at_whatever_their_codes_say),
        cmocka_unit_test(options_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
