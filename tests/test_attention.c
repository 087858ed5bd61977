/* Attention kernels of every instruction set against a naive softmax in double precision, and against themselves cut otherwise. Values
 * are normal, so that errors are stated against their largest. Tiles in bf16 are compared with the softmax of inputs rounded likewise, which leaves
 * the rounding of the weights; one test holds them to the bound that attention.h states. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/base.h"
#include "math/attention.h"
#include "math/blocks.h"

typedef void tile_function(const float *q, const int *limit, int nq, int d, kv_type type, const void *rows, int n, void *scratch,
                           attention_state *state);

typedef struct level {
    const char *name;
    const attention_kernels *kernels;
    tile_function *tile;
    bool bf16; /* tiles of f16 rows */
} level;

/* The levels this machine runs, scalar first. */
static int levels(level out[5])
{
    int n = 0;
    out[n++] = (level){"scalar", &attention_scalar, attention_scalar.tile, false};
#if defined(__x86_64__)
    if (cpu_detect() >= CPU_AVX2) out[n++] = (level){"avx2", &attention_avx2, attention_avx2.tile, false};
    if (cpu_detect() >= CPU_AVX512) out[n++] = (level){"avx512", &attention_avx512, attention_avx512.tile, false};
    if (cpu_detect() >= CPU_AVX512BF16) {
        out[n++] = (level){"avx512bf16", &attention_avx512bf16, attention_avx512bf16.tile, false};
        out[n++] = (level){"avx512bf16 coarse", &attention_avx512bf16, attention_avx512bf16.tile_coarse, true};
    }
#endif
    return n;
}

/* g queries over n rows. */
typedef struct sample {
    int g, d;
    kv_type type;
    int64_t n;
    float *q;          /* [g][d] */
    char *rows;        /* [n] rows */
    const void **list; /* [n] */
    double *k, *v;     /* [n][d], as stored */
} sample;

static void *get(size_t n, size_t size)
{
    void *p = memory_aligned(n ? n : 1, size, "test", NULL);
    assert_non_null(p);
    return p;
}

static sample sample_make(uint64_t seed, int g, int d, kv_type type, int64_t n)
{
    sample s = {.g = g, .d = d, .type = type, .n = n};
    random_state r;
    random_seed(&r, seed);
    s.q = get((size_t)(g * d), sizeof *s.q);
    s.rows = get((size_t)n, kv_row_bytes(type, d));
    s.list = get((size_t)n, sizeof *s.list);
    s.k = get((size_t)(n * d), sizeof *s.k);
    s.v = get((size_t)(n * d), sizeof *s.v);
    for (int i = 0; i < g * d; i++) s.q[i] = (float)(random_normal(&r) * 2 / sqrt(d));
    for (int64_t i = 0; i < n; i++) {
        char *row = s.rows + (size_t)i * kv_row_bytes(type, d);
        s.list[i] = row;
        for (int j = 0; j < 2 * d; j++) {
            float x = (float)random_normal(&r);
            uint16_t half = f32_to_f16(x);
            if (type == KV_F16)
                memcpy(row + 2 * j, &half, 2), x = f16_to_f32(half);
            else
                memcpy(row + 4 * j, &x, 4);
            (j < d ? s.k : s.v)[i * d + j % d] = x;
        }
    }
    return s;
}

static void sample_free(sample *s)
{
    memory_free(s->q), memory_free(s->rows), memory_free(s->list), memory_free(s->k), memory_free(s->v);
}

/* To 8 bits, ties to even. */
static float bf16_round(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, sizeof bits);
    return x;
}

/* The sample as a tile of this level sees it: q, k and v rounded. The rows stay. */
static sample sample_rounded(const level *l, const sample *s)
{
    sample out = *s;
    size_t n_q = (size_t)(s->g * s->d), n = (size_t)(s->n * s->d);
    out.q = get(n_q, sizeof *out.q), out.k = get(n, sizeof *out.k), out.v = get(n, sizeof *out.v);
    bool rounds = l->bf16 && s->type == KV_F16;
    for (size_t i = 0; i < n_q; i++) out.q[i] = rounds ? bf16_round(s->q[i]) : s->q[i];
    for (size_t i = 0; i < n; i++) {
        out.k[i] = rounds ? bf16_round((float)s->k[i]) : s->k[i];
        out.v[i] = rounds ? bf16_round((float)s->v[i]) : s->v[i];
    }
    return out;
}

static void rounded_free(sample *s)
{
    memory_free(s->q), memory_free(s->k), memory_free(s->v);
}

static attention_state state_make(int g, int d)
{
    attention_state s = {get((size_t)g, sizeof(float)), get((size_t)g, sizeof(float)), get((size_t)(g * d), sizeof(float))};
    attention_clear(&s, g, d);
    return s;
}

static void state_free(attention_state *s)
{
    memory_free(s->m), memory_free(s->l), memory_free(s->o);
}

static double score_of(const sample *s, int h, int64_t row)
{
    double sum = 0;
    for (int i = 0; i < s->d; i++) sum += s->q[h * s->d + i] * s->k[row * s->d + i];
    return sum;
}

/* What a result may differ by. */
typedef struct tolerance {
    double lag, sum, mean; /* m below the largest score; l, relative; o / l, relative to the largest value */
} tolerance;

static const tolerance exact = {0, 1e-5, 2e-6};

/* Of a tile, against the rounded sample: weights are rounded to 2^-8 and have 8e-5 of exp; o / l divides weights by their sum. */
static tolerance tile_tolerance(const level *l, kv_type type)
{
    return l->bf16 && type == KV_F16 ? (tolerance){ATTENTION_LAG, 0x1p-8 + 1e-4, 0x1p-7 + 2e-4}
                                     : (tolerance){ATTENTION_LAG, exact.sum, exact.mean};
}

/* State of query h against naive attention over the first n rows. */
static void expect_attention(const char *name, const sample *s, const attention_state *state, int h, int64_t n, tolerance t)
{
    const float *o = state->o + h * s->d;
    if (n == 0) {
        assert_true(state->m[h] == -INFINITY && state->l[h] == 0);
        for (int i = 0; i < s->d; i++) assert_true(o[i] == 0);
        return;
    }
    double score[256], top = -INFINITY, sum = 0, mean[256] = {0}, size = 0;
    assert_true(n <= 256 && s->d <= 256);
    for (int64_t r = 0; r < n; r++) score[r] = score_of(s, h, r), top = fmax(top, score[r]);
    for (int64_t r = 0; r < n; r++) {
        double p = exp(score[r] - top);
        sum += p;
        for (int i = 0; i < s->d; i++) mean[i] += p * s->v[r * s->d + i], size = fmax(size, fabs(s->v[r * s->d + i]));
    }
    double expected_sum = sum * exp(top - state->m[h]);
    if (!(state->m[h] <= top + 1e-5 && state->m[h] >= top - t.lag - 1e-5) || !(fabs(state->l[h] - expected_sum) <= t.sum * expected_sum))
        fail_msg("%s: g %d d %d n %ld query %d: max %.9g, expected %.9g; sum %.9g, expected %.9g", name, s->g, s->d, (long)n, h,
                 state->m[h], top, state->l[h], expected_sum);
    for (int i = 0; i < s->d; i++)
        if (!(fabs(o[i] / state->l[h] - mean[i] / sum) <= t.mean * size))
            fail_msg("%s: g %d d %d n %ld query %d element %d: %.9g, expected %.9g", name, s->g, s->d, (long)n, h, i, o[i] / state->l[h],
                     mean[i] / sum);
}

/* Equal to rounding; the maxima within lag. */
static void expect_same(const sample *s, const attention_state *a, const attention_state *b, double lag)
{
    for (int h = 0; h < s->g; h++) {
        assert_true(fabs(a->m[h] - b->m[h]) < lag + 1e-5);
        double shift = exp((double)b->m[h] - a->m[h]);
        assert_true(fabs(a->l[h] - b->l[h] * shift) <= 1e-5 * a->l[h]);
        for (int i = 0; i < s->d; i++) assert_true(fabs(a->o[h * s->d + i] - b->o[h * s->d + i] * shift) <= 1e-5 * a->l[h]);
    }
}

static const int shapes[][2] = {{3, 64}, {1, 64}, {2, 8}, {4, 128}, {8, 24}, {7, 80}, {5, 96}, {3, 72}, {1, 256}, {6, 40}, {13, 120}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };
static const int64_t counts[] = {0, 1, 2, 3, 5, 15, 16, 31, 32, 33, 67, 200};
enum { N_COUNTS = sizeof counts / sizeof *counts };

static void test_rows_match_naive_softmax(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    for (int t = 0; t < N_SHAPES * N_COUNTS * 2; t++) {
        kv_type type = t % 2 ? KV_F32 : KV_F16;
        sample s = sample_make((uint64_t)t, shapes[t / 2 % N_SHAPES][0], shapes[t / 2 % N_SHAPES][1], type, counts[t / 2 / N_SHAPES]);
        float *scores = get((size_t)(s.g * s.n + 1), sizeof *scores);
        for (int l = 0; l < n_levels; l++) {
            attention_state state = state_make(s.g, s.d);
            scores[s.g * s.n] = 42;
            list[l].kernels->rows(s.q, s.g, s.d, type, s.list, s.n, scores, &state);
            for (int h = 0; h < s.g; h++) {
                expect_attention(list[l].name, &s, &state, h, s.n, exact);
                for (int64_t r = 0; r < s.n; r++) assert_true(fabs(scores[h * s.n + r] - score_of(&s, h, r)) <= 1e-5);
            }
            assert_true(scores[s.g * s.n] == 42);
            state_free(&state);
        }
        memory_free(scores);
        sample_free(&s);
    }
}

static void test_rows_repeat_exactly_with_and_without_scores(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    sample s = sample_make(7, 3, 64, KV_F16, 333);
    float *scores = get((size_t)(s.g * s.n), sizeof *scores);
    for (int l = 0; l < n_levels; l++) {
        attention_state a = state_make(s.g, s.d), b = state_make(s.g, s.d);
        list[l].kernels->rows(s.q, s.g, s.d, s.type, s.list, s.n, NULL, &a);
        list[l].kernels->rows(s.q, s.g, s.d, s.type, s.list, s.n, scores, &b);
        assert_memory_equal(a.o, b.o, (size_t)(s.g * s.d) * sizeof *a.o);
        assert_memory_equal(a.m, b.m, (size_t)s.g * sizeof *a.m);
        assert_memory_equal(a.l, b.l, (size_t)s.g * sizeof *a.l);
        state_free(&a), state_free(&b);
    }
    memory_free(scores);
    sample_free(&s);
}

static void test_rows_may_lie_anywhere(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    sample s = sample_make(8, 4, 64, KV_F16, 99);
    const void *scattered[99];
    for (int i = 0; i < 99; i++) scattered[i] = s.list[i * 37 % 99];
    for (int l = 0; l < n_levels; l++) {
        attention_state state = state_make(s.g, s.d);
        list[l].kernels->rows(s.q, s.g, s.d, s.type, scattered, s.n, NULL, &state);
        for (int h = 0; h < s.g; h++) expect_attention(list[l].name, &s, &state, h, s.n, exact);
        state_free(&state);
    }
    sample_free(&s);
}

static void test_parts_merge_to_the_whole_in_any_order(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 8);
    for (int t = 0; t < 12 * n_levels; t++) {
        const attention_kernels *k = list[t % n_levels].kernels;
        sample s = sample_make(100 + (uint64_t)t, shapes[t % N_SHAPES][0], shapes[t % N_SHAPES][1], KV_F16, 250);
        attention_state merged = state_make(s.g, s.d), whole = state_make(s.g, s.d), running = state_make(s.g, s.d);
        k->rows(s.q, s.g, s.d, s.type, s.list, s.n, NULL, &whole);
        for (int64_t end = s.n, n; end > 0; end -= n) {
            n = (int64_t)random_below(&r, 90); /* empty parts happen */
            n = n < end ? n : end;
            attention_state part = state_make(s.g, s.d);
            k->rows(s.q, s.g, s.d, s.type, s.list + end - n, n, NULL, &part);
            k->rows(s.q, s.g, s.d, s.type, s.list + end - n, n, NULL, &running);
            bool into_part = random_below(&r, 2) == 0;
            attention_merge(into_part ? &part : &merged, into_part ? &merged : &part, s.g, s.d);
            state_free(into_part ? &merged : &part);
            if (into_part) merged = part;
        }
        expect_same(&s, &whole, &merged, 0);
        expect_same(&s, &whole, &running, 0);
        state_free(&merged), state_free(&whole), state_free(&running);
        sample_free(&s);
    }
}

static void test_merging_empty_states_gives_an_empty_state(void **unused)
{
    (void)unused;
    attention_state a = state_make(2, 8), b = state_make(2, 8);
    attention_merge(&a, &b, 2, 8);
    for (int h = 0; h < 2; h++) assert_true(a.m[h] == -INFINITY && a.l[h] == 0);
    for (int i = 0; i < 16; i++) assert_true(a.o[i] == 0);
    state_free(&a), state_free(&b);
}

/* Distant maxima: what came before must shrink to nothing, what comes after adds nothing. */
static void test_large_scores_do_not_overflow(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list), limit[3] = {40, 64, 1};
    sample s = sample_make(9, 3, 64, KV_F16, 150);
    for (int i = 0; i < s.g * s.d; i++) s.q[i] *= 500;
    void *scratch = get(attention_tile_scratch(3, 64), 1);
    for (int l = 0; l < n_levels; l++) {
        attention_state a = state_make(s.g, s.d), b = state_make(s.g, s.d);
        list[l].kernels->rows(s.q, s.g, s.d, s.type, s.list, s.n, NULL, &a);
        list[l].tile(s.q, limit, 3, 64, s.type, s.rows, 64, scratch, &b);
        sample seen = sample_rounded(&list[l], &s);
        for (int h = 0; h < s.g; h++) {
            int64_t best = 0, best_b = 0;
            for (int64_t i = 1; i < s.n; i++) {
                if (score_of(&s, h, i) > score_of(&s, h, best)) best = i;
                if (i < limit[h] && score_of(&seen, h, i) > score_of(&seen, h, best_b)) best_b = i;
            }
            assert_true(fabs(a.m[h] / score_of(&s, h, best) - 1) < 1e-5 && fabs(a.l[h] - 1) < 0.01);
            assert_true(fabs(b.m[h] / score_of(&seen, h, best_b) - 1) < 1e-5 && fabs(b.l[h] - 1) < 0.01);
            for (int i = 0; i < s.d; i++) {
                assert_true(fabs(a.o[h * s.d + i] - s.v[best * s.d + i]) < 0.05);
                assert_true(fabs(b.o[h * s.d + i] - s.v[best_b * s.d + i]) < 0.05);
            }
        }
        rounded_free(&seen);
        state_free(&a), state_free(&b);
    }
    memory_free(scratch);
    sample_free(&s);
}

/* Query i of a group of `group` stands at first_position + i / group; tiles over all rows, the last one short. */
static void check_tiles(const level *l, const sample *s, int group, int64_t first_position)
{
    int nq = s->g, limit[256];
    attention_state state = state_make(nq, s->d);
    size_t bytes = attention_tile_scratch(nq, s->d);
    unsigned char *scratch = get(bytes + 64, 1);
    memset(scratch, 0xff, bytes + 64); /* NaNs: nothing may depend on what is there */
    for (int64_t first = 0; first < s->n; first += ATTENTION_TILE) {
        int n = s->n - first < ATTENTION_TILE ? (int)(s->n - first) : ATTENTION_TILE;
        for (int i = 0; i < nq; i++) {
            int64_t seen = first_position + i / group + 1 - first;
            limit[i] = seen < 0 ? 0 : seen > n ? n : (int)seen;
        }
        l->tile(s->q, limit, nq, s->d, s->type, s->list[first], n, scratch, &state);
    }
    sample rounded = sample_rounded(l, s);
    for (int i = 0; i < nq; i++) {
        int64_t seen = first_position + i / group + 1;
        expect_attention(l->name, &rounded, &state, i, seen < s->n ? seen : s->n, tile_tolerance(l, s->type));
    }
    rounded_free(&rounded);
    for (size_t i = 0; i < 64; i++) assert_int_equal(scratch[bytes + i], 0xff);
    state_free(&state);
    memory_free(scratch);
}

static void test_tiles_match_naive_softmax_under_causal_limits(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    static const int widths[] = {8, 24, 40, 64, 72, 80, 96, 128, 256};
    for (int t = 0; t < 36; t++) {
        int group = t % 4 + 1, nq = group * (t % 7 * 5 + 1);
        int64_t n = 1 + t * 37 % 150, last = n - nq / group;
        sample s = sample_make(200 + (uint64_t)t, nq, widths[t % 9], t % 5 == 4 ? KV_F32 : KV_F16, n);
        for (int l = 0; l < n_levels; l++) check_tiles(&list[l], &s, group, t % 3 == 0 || last < 0 ? 0 : last);
        sample_free(&s);
    }
}

static void test_tile_takes_any_limits_and_repeats_exactly(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 10);
    for (int t = 0; t < 30; t++) {
        int nq = (int)random_below(&r, 60) + 1, n = (int)random_below(&r, 64) + 1, limit[60];
        sample s = sample_make(300 + (uint64_t)t, nq, t % 2 ? 64 : 88, KV_F16, n);
        for (int i = 0; i < nq; i++) limit[i] = t == 0 || random_below(&r, 3) == 0 ? 0 : (int)random_below(&r, (uint64_t)n + 1);
        void *scratch = get(attention_tile_scratch(nq, s.d), 1);
        for (int l = 0; l < n_levels; l++) {
            attention_state state = state_make(nq, s.d), again = state_make(nq, s.d);
            list[l].tile(s.q, limit, nq, s.d, s.type, s.rows, n, scratch, &state);
            list[l].tile(s.q, limit, nq, s.d, s.type, s.rows, n, scratch, &again);
            assert_memory_equal(state.o, again.o, (size_t)(nq * s.d) * sizeof(float));
            sample rounded = sample_rounded(&list[l], &s);
            for (int i = 0; i < nq; i++) expect_attention(list[l].name, &rounded, &state, i, limit[i], tile_tolerance(&list[l], s.type));
            rounded_free(&rounded);
            state_free(&state), state_free(&again);
        }
        memory_free(scratch);
        sample_free(&s);
    }
}

static void test_tile_equals_rows(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list), limit[37];
    sample s = sample_make(11, 37, 64, KV_F16, 64);
    void *scratch = get(attention_tile_scratch(37, 64), 1);
    for (int i = 0; i < 37; i++) limit[i] = i + 20;
    for (int l = 0; l < n_levels; l++) {
        if (list[l].bf16) continue;
        attention_state a = state_make(37, 64), b = state_make(37, 64);
        list[l].tile(s.q, limit, 37, 64, s.type, s.rows, 64, scratch, &a);
        for (int i = 0; i < 37; i++) {
            attention_state one = {b.m + i, b.l + i, b.o + i * 64};
            list[l].kernels->rows(s.q + i * 64, 1, 64, s.type, s.list, limit[i], NULL, &one);
        }
        expect_same(&s, &a, &b, ATTENTION_LAG);
        state_free(&a), state_free(&b);
    }
    memory_free(scratch);
    sample_free(&s);
}

/* Under any limits, with scores up to about 20. */
static void test_tile_in_bf16_stays_within_its_bound(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list), limit[23];
    static const int widths[] = {8, 56, 64, 136, 200, 256};
    for (int t = 0; t < 12; t++) {
        int d = widths[t % 6], n = t * 5 + 5;
        sample s = sample_make(400 + (uint64_t)t, 23, d, KV_F16, n);
        for (int i = 0; i < 23; i++) limit[i] = i < n ? n - i : 1;
        void *scratch = get(attention_tile_scratch(23, d), 1);
        for (int l = 0; l < n_levels; l++) {
            if (!list[l].bf16) continue;
            attention_state state = state_make(23, d);
            list[l].tile(s.q, limit, 23, d, s.type, s.rows, n, scratch, &state);
            for (int i = 0; i < 23; i++) {
                double error = 0; /* of a score */
                for (int64_t r = 0; r < limit[i]; r++) {
                    double size = 0;
                    for (int j = 0; j < d; j++) size += fabs(s.q[i * d + j] * s.k[r * d + j]);
                    error = fmax(error, size * 0x1.02p-7);
                }
                tolerance bound = {error, exp(2 * error + 0x1p-7) - 1, exp(2 * error + 0x1p-6) - 1};
                double top = -INFINITY;
                for (int64_t r = 0; r < limit[i]; r++) top = fmax(top, score_of(&s, i, r));
                assert_true(fabs(state.m[i] - top) <= error);
                state.m[i] = (float)fmin(state.m[i], top); /* expect_attention wants it below */
                expect_attention(list[l].name, &s, &state, i, limit[i], bound);
            }
            state_free(&state);
        }
        memory_free(scratch);
        sample_free(&s);
    }
}

/* The maximum lags by less than ATTENTION_LAG while scores rise slowly, and follows a leap. */
static void test_tile_follows_rising_scores(void **unused)
{
    (void)unused;
    level list[5];
    int n_levels = levels(list), limit[7] = {64, 64, 64, 64, 64, 64, 64};
    for (int step = 1; step <= 64; step *= 4)
        for (int l = 0; l < n_levels; l++) {
            sample s = sample_make(500, 7, 64, KV_F16, 256);
            for (int64_t r = 0; r < s.n; r++) { /* score: step x number of the tile, and 1 / 8 for each row of it */
                uint16_t *row = (uint16_t *)(void *)(s.rows + (size_t)r * kv_row_bytes(KV_F16, 64));
                for (int i = 0; i < 64; i++) s.k[r * 64 + i] = i == 0 ? (double)(r / 64 * step) : i == 1 ? (double)(r % 64) / 8 : 0;
                for (int i = 0; i < 64; i++) row[i] = f32_to_f16((float)s.k[r * 64 + i]);
            }
            for (int i = 0; i < 7 * 64; i++) s.q[i] = i % 64 < 2 ? 1 : 0;
            void *scratch = get(attention_tile_scratch(7, 64), 1);
            attention_state state = state_make(7, 64);
            for (int tile = 0; tile < 4; tile++) list[l].tile(s.q, limit, 7, 64, s.type, s.list[tile * 64], 64, scratch, &state);
            sample rounded = sample_rounded(&list[l], &s);
            for (int i = 0; i < 7; i++) expect_attention(list[l].name, &rounded, &state, i, s.n, tile_tolerance(&list[l], s.type));
            rounded_free(&rounded);
            state_free(&state);
            memory_free(scratch);
            sample_free(&s);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_match_naive_softmax),
        cmocka_unit_test(test_rows_repeat_exactly_with_and_without_scores),
        cmocka_unit_test(test_rows_may_lie_anywhere),
        cmocka_unit_test(test_parts_merge_to_the_whole_in_any_order),
        cmocka_unit_test(test_merging_empty_states_gives_an_empty_state),
        cmocka_unit_test(test_large_scores_do_not_overflow),
        cmocka_unit_test(test_tiles_match_naive_softmax_under_causal_limits),
        cmocka_unit_test(test_tile_takes_any_limits_and_repeats_exactly),
        cmocka_unit_test(test_tile_equals_rows),
        cmocka_unit_test(test_tile_in_bf16_stays_within_its_bound),
        cmocka_unit_test(test_tile_follows_rising_scores),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
