/* Extended sequences, and documents read in blocks: against attention written out in double with RoPE of its own, and as sessions over tiny random models. */
#include "test.h"

#include <math.h>
#include <stdatomic.h>

#include "attn/attn.h"
#include "gen/gen.h"

enum { HEADS_KV = 2, GROUP = 3, DIM = 16, N_HEAD = HEADS_KV * GROUP, N = 900, WINDOW = 256, DISTANCE = 300, N_TOKENS = 700, LONG_KEY = 77 };

static const attn_shape plain = {
    .kv = {.n_layer = 1, .n_head_kv = HEADS_KV, .head_dim = DIM, .type = KV_F32}, .n_head = N_HEAD, .scale = 0.25f};

/* ---- the driver ---- */

typedef struct setup {
    const math_kernels *kernels;
    thread_pool *pool;
    arena scratch[4], shared;
    attn_shape shape;
    kv_seq *kv;
    attn_policy *policy;
    double keys[N][HEADS_KV][DIM], values[N][HEADS_KV][DIM]; /* without RoPE */
    double queries[N][N_HEAD][DIM];
    float near[N][N_HEAD][DIM], far[N][N_HEAD][DIM];
} setup;

/* Pairs (2i, 2i + 1), base 1000. */
static void turn(const double *x, int64_t pos, double *y)
{
    for (int i = 0; i < DIM; i += 2) {
        const double angle = (double)pos * pow(1000, -(double)i / DIM), c = cos(angle), s = sin(angle);
        y[i] = x[i] * c - x[i + 1] * s;
        y[i + 1] = x[i] * s + x[i + 1] * c;
    }
}

static void to_floats(const double *x, float *y)
{
    for (int i = 0; i < DIM; i++) y[i] = (float)x[i];
}

static void fill(double *x, int64_t n, double scale, random_state *random)
{
    for (int64_t i = 0; i < n; i++) x[i] = scale * random_normal(random);
}

static void write_key(setup *s, int layer, int head, int64_t pos, const double *key)
{
    float k[DIM], v[DIM];
    to_floats(key, k);
    to_floats(s->values[pos][head], v);
    kv_write(s->kernels, kv_row(s->kv, layer, head, pos), &s->shape.kv, k, v);
}

static void turn_queries(setup *s, int64_t pos, int head)
{
    double turned[DIM];
    turn(s->queries[pos][head], pos, turned);
    to_floats(turned, s->near[pos][head]);
    turn(s->queries[pos][head], DISTANCE, turned);
    to_floats(turned, s->far[pos][head]);
}

/* N tokens whose last `ahead` the index does not know yet. extended: else positions are kept, and only reading is in blocks. */
static setup *setup_make(const char *spec, bool extended, int64_t ahead)
{
    setup *s = calloc(1, sizeof *s);
    random_state random;
    double turned[DIM];
    random_seed(&random, 11);
    s->kernels = math_kernels_get(cpu_detect());
    s->pool = thread_pool_create(2, NULL);
    s->shape = plain;
    s->shape.read_window = WINDOW;
    if (extended) attn_shape_extend(&s->shape, WINDOW, DISTANCE, DISTANCE);
    s->kv = kv_create(&s->shape.kv, NULL);
    s->policy = attn_policy_create(spec, &s->shape, s->kernels, NULL);
    assert_non_null(s->policy);
    assert_int_equal(kv_reserve(s->kv, N, NULL), QUARRY_OK);
    fill(&s->keys[0][0][0], N * HEADS_KV * DIM, 1, &random);
    for (int i = 0; i < HEADS_KV * DIM; i++) s->keys[LONG_KEY][i / DIM][i % DIM] *= 3;
    fill(&s->values[0][0][0], N * HEADS_KV * DIM, 1, &random);
    fill(&s->queries[0][0][0], N * N_HEAD * DIM, 2, &random);
    for (int64_t pos = 0; pos < N; pos++) {
        for (int h = 0; h < HEADS_KV; h++) {
            turn(s->keys[pos][h], pos, turned);
            write_key(s, extended ? 1 : 0, h, pos, turned);
            if (extended) write_key(s, 0, h, pos, s->keys[pos][h]);
        }
        for (int h = 0; h < N_HEAD; h++) turn_queries(s, pos, h);
    }
    for (int64_t pos = 100; pos <= N - ahead; pos += 100) {
        kv_commit(s->kv, pos);
        assert_int_equal(attn_index_trail(s->policy, s->kv, s->pool, s->scratch, NULL), QUARRY_OK);
    }
    kv_commit(s->kv, N);
    return s;
}

static void setup_free(setup *s)
{
    attn_policy_destroy(s->policy);
    kv_destroy(s->kv);
    thread_pool_destroy(s->pool);
    for (int i = 0; i < 4; i++) arena_free(&s->scratch[i]);
    arena_free(&s->shared);
    free(s);
}

static float *run(setup *s, int64_t first, int64_t n, bool dense, const attn_observer *observer)
{
    attn_row *rows = calloc((size_t)n, sizeof *rows);
    float *out = calloc((size_t)n * N_HEAD * DIM, sizeof *out);
    attn_context c = {s->kernels, s->pool, s->scratch, &s->shared};
    quarry_error e = {0};
    for (int64_t i = 0; i < n; i++)
        rows[i] = (attn_row){.kv = s->kv,
                             .policy = s->policy,
                             .pos = first + i,
                             .dense = dense,
                             .observer = observer,
                             .q_far = s->shape.extend.window ? s->far[first + i][0] : NULL};
    assert_int_equal(attn_forward(&c, &s->shape, 0, rows, n, s->near[first][0], out, NULL, &e), QUARRY_OK);
    free(rows);
    return out;
}

/* Attention of one query head at pos over all but [hole_first, hole_end), in double: what lies before `near` is at one distance. */
static void naive(const setup *s, int head, int64_t pos, int64_t near, int64_t hole_first, int64_t hole_end, double *out)
{
    double score[N], turned_q[DIM], turned_k[DIM], max = -INFINITY, sum = 0;
    memset(out, 0, DIM * sizeof *out);
    for (int64_t t = 0; t <= pos; t++) {
        turn(s->queries[pos][head], t < near ? DISTANCE : pos, turned_q);
        turn(s->keys[t][head / GROUP], t < near ? 0 : t, turned_k);
        score[t] = t >= hole_first && t < hole_end ? -INFINITY : 0;
        for (int i = 0; i < DIM; i++) score[t] += 0.25 * turned_q[i] * turned_k[i];
        max = fmax(max, score[t]);
    }
    for (int64_t t = 0; t <= pos; t++) {
        const double w = exp(score[t] - max);
        sum += w;
        for (int i = 0; i < DIM; i++) out[i] += w * s->values[t][head / GROUP][i];
    }
    for (int i = 0; i < DIM; i++) out[i] /= sum;
}

/* extended: the local tokens of a row begin where attn.h says; spelled out here for WINDOW: blocks of 64. */
static void check(const setup *s, const float *out, int64_t first, int64_t n, int64_t hole_first, int64_t hole_end, double bound)
{
    for (int64_t r = 0; r < n; r++)
        for (int h = 0; h < N_HEAD; h++) {
            double want[DIM];
            const int64_t pos = first + r, near = !s->shape.extend.window || pos < WINDOW ? 0 : (pos - WINDOW) / 64 * 64;
            naive(s, h, pos, near, hole_first, hole_end, want);
            for (int i = 0; i < DIM; i++) assert_true(fabs((double)out[(r * N_HEAD + h) * DIM + i] - want[i]) < bound);
        }
}

static void check_rows(const char *spec, bool extended, bool dense, bool hole)
{
    const int64_t firsts[] = {0, 200, 511, 640, N - 150}, n = dense ? 150 : 3;
    for (size_t i = 0; i < TEST_COUNT(firsts); i++) {
        setup *s = setup_make(spec, extended, N - firsts[i]);
        float *out = run(s, firsts[i], n, dense, NULL);
        check(s, out, firsts[i], n, ATTN_SINKS, hole ? s->policy->n_far : 0, 2e-5);
        free(out);
        setup_free(s);
    }
}

static void rows_see_near_tokens_where_they_are_and_all_others_at_one_distance(void **state)
{
    (void)state;
    check_rows("full", true, false, false);
    check_rows("oracle:budget=1", true, false, false);
}

typedef struct told {
    const math_kernels *kernels;
    atomic_int n;
} told;

/* Where everything is read, the scores of all rows add up to the state's mass. */
static void listen(void *data, const attn_reading *r, arena *scratch)
{
    told *t = data;
    float scores[GROUP * N], some[GROUP * N];
    const int64_t n = r->pos + 1, from = r->near_first - 20, end = r->near_first + 20;
    assert_true(r->selected->all && r->near_first > r->far_end - 1 && r->near_layer == 1);
    assert_true(attn_reading_scores(r, t->kernels, 0, n, scores, scratch));
    assert_true(attn_reading_scores(r, t->kernels, from, end, some, scratch));
    for (int g = 0; g < GROUP; g++) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += exp((double)scores[g * n + i] - (double)r->state->m[g]);
        assert_true(fabs(sum / (double)r->state->l[g] - 1) < 1e-4);
        for (int64_t i = from; i < end; i++) assert_true(fabsf(some[g * (end - from) + i - from] - scores[g * n + i]) < 1e-5F);
    }
    atomic_fetch_add(&t->n, 1);
}

static void observers_are_told_how_to_score_near_and_far_rows(void **state)
{
    (void)state;
    setup *s = setup_make("full", true, 1);
    told heard = {.kernels = s->kernels};
    const attn_observer observer = {listen, &heard};
    free(run(s, N - 1, 1, false, &observer));
    assert_int_equal(atomic_load(&heard.n), HEADS_KV);
    setup_free(s);
}

static void blocks_see_the_same(void **state)
{
    (void)state;
    check_rows("full", true, true, false);
    check_rows("ivfpq:budget=1", true, true, false);
}

static void what_is_not_selected_is_not_read(void **state)
{
    (void)state;
    check_rows("window", true, false, true);
    check_rows("window", true, true, true);
    check_rows("window", false, true, true);
}

static void blocks_that_read_everything_equal_full_attention(void **state)
{
    (void)state;
    check_rows("ivfpq:budget=1", false, true, false);
    check_rows("oracle:budget=1", false, true, false);
}

/* One key that every row of the block looks for, among what the index knows. */
static void a_block_reads_what_weighs_most_for_its_rows(void **state)
{
    (void)state;
    const int64_t first = N - 150;
    setup *s = setup_make("ivfpq:segment=128,threshold=0.02,max=1", true, 150);
    assert_true(s->policy->n_far > LONG_KEY);
    for (int64_t pos = first; pos < N; pos++)
        for (int h = 0; h < N_HEAD; h++) {
            double wanted[DIM];
            for (int i = 0; i < DIM; i++) wanted[i] = 0.3 * s->queries[pos][h][i] + s->keys[LONG_KEY][h / GROUP][i];
            turn(wanted, -DISTANCE, s->queries[pos][h]);
            turn_queries(s, pos, h);
        }
    float *out = run(s, first, 150, true, NULL);
    check(s, out, first, 150, 0, 0, 0.02);
    free(out);
    setup_free(s);
}

static void near_a_million_angles_still_tell_neighbours_apart(void **state)
{
    (void)state;
    double inverse[DIM / 2];
    const attn_rope rope = {.n_rot = DIM, .inverse = inverse};
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    random_state random;
    random_seed(&random, 3);
    for (int i = 0; i < DIM / 2; i++) inverse[i] = pow(1000, -2.0 * i / DIM);
    for (int by = 0; by < 100; by++) {
        float q[2][DIM], k[2][DIM];
        double score[2] = {0, 0};
        for (int i = 0; i < DIM; i++) {
            q[0][i] = q[1][i] = (float)random_normal(&random);
            k[0][i] = k[1][i] = (float)random_normal(&random);
        }
        for (int far = 0; far < 2; far++) {
            attn_rotate(&rope, kernels, far * 1000000 + by, q[far]);
            attn_rotate(&rope, kernels, far * 1000000, k[far]);
            for (int i = 0; i < DIM; i++) score[far] += (double)q[far][i] * (double)k[far][i];
        }
        assert_true(fabs(score[0] - score[1]) < 1e-5);
    }
}

static void the_far_query_gives_the_mean_score_of_all_distances(void **state)
{
    (void)state;
    const attn_extend ranges[] = {{.nearest = 256, .farthest = 1024}, {.nearest = 300, .farthest = 300}, {.nearest = 0, .farthest = 1}};
    double inverse[DIM / 2];
    for (int i = 0; i < DIM / 2; i++) inverse[i] = pow(1000, -2.0 * i / DIM);
    for (size_t r = 0; r < TEST_COUNT(ranges); r++) {
        float cs[DIM];
        attn_extend_angles(&ranges[r], inverse, DIM / 2, cs);
        for (int i = 0; i < DIM / 2; i++) {
            double mean[2] = {0, 0};
            for (int64_t t = ranges[r].nearest; t <= ranges[r].farthest; t++) {
                mean[0] += cos((double)t * inverse[i]) / (double)(ranges[r].farthest - ranges[r].nearest + 1);
                mean[1] += sin((double)t * inverse[i]) / (double)(ranges[r].farthest - ranges[r].nearest + 1);
            }
            for (int j = 0; j < 2; j++) assert_true(fabs((double)cs[2 * i + j] - mean[j]) < 1e-6);
        }
    }
}

/* ---- sessions ---- */

static int32_t tokens[N_TOKENS];

static quarry_model *open_model(const char *name)
{
    char path[1024];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", folder, name);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = 2}, &e);
    if (!m) fail_msg("%s", e.message);
    random_state r;
    random_seed(&r, 5);
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = (int32_t)random_below(&r, (uint64_t)model_shape_of(m)->n_vocab);
    return m;
}

static quarry_session *open_session(quarry_model *m, const char *attn, bool extend, int64_t window, int n_batch)
{
    quarry_error e = {0};
    quarry_session *s =
        quarry_session_open(m, &(quarry_session_params){.attn = attn, .extend = extend, .read_window = window, .n_batch = n_batch}, &e);
    if (!s) fail_msg("%s", e.message);
    return s;
}

static void read_tokens(quarry_session *s, int64_t first, int64_t n)
{
    quarry_error e = {0};
    if (quarry_session_read(s, tokens + first, n, NULL, &e) != 0) fail_msg("%s", e.message);
}

static void feed_tokens(quarry_session *s, int64_t first, int64_t n)
{
    quarry_error e = {0};
    if (quarry_session_feed(s, tokens + first, n, NULL, &e) != 0) fail_msg("%s", e.message);
}

static double difference(const quarry_model *m, const quarry_session *a, const quarry_session *b)
{
    const float *x = quarry_session_logits(a), *y = quarry_session_logits(b);
    double low = INFINITY, high = -INFINITY, worst = 0;
    for (int64_t i = 0; i < model_shape_of(m)->n_vocab; i++) {
        low = fmin(low, (double)x[i]);
        high = fmax(high, (double)x[i]);
        worst = fmax(worst, fabs((double)x[i] - (double)y[i]));
    }
    assert_true(high - low > 1); /* flat logits would hide everything */
    return worst / (high - low);
}

static const char *const models[] = {"llama-f32.gguf", "gemma3-f32.gguf"};

/* What fits the window is read as it always is. */
static void within_the_window_nothing_changes(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(models); i++) {
        quarry_model *m = open_model(models[i]);
        quarry_session *a = open_session(m, "full", false, 0, 64), *b = open_session(m, "full", true, 256, 64);
        quarry_session *c = open_session(m, "ivfpq", false, 256, 64);
        read_tokens(a, 0, 250);
        read_tokens(b, 0, 250);
        read_tokens(c, 0, 250);
        assert_memory_equal(quarry_session_logits(a), quarry_session_logits(b), (size_t)model_shape_of(m)->n_vocab * sizeof(float));
        assert_memory_equal(quarry_session_logits(a), quarry_session_logits(c), (size_t)model_shape_of(m)->n_vocab * sizeof(float));
        feed_tokens(a, 250, 3);
        feed_tokens(b, 250, 3);
        assert_true(difference(m, a, b) < 1e-5);
        quarry_session_close(a);
        quarry_session_close(b);
        quarry_session_close(c);
        quarry_model_close(m);
    }
}

/* Reading in blocks with everything selected is full attention; extended, it is what `full` gives. */
static void a_budget_of_everything_equals_full(void **state)
{
    (void)state;
    for (int extend = 0; extend < 2; extend++)
        for (size_t i = 0; i < TEST_COUNT(models); i++) {
            quarry_model *m = open_model(models[i]);
            quarry_session *a = open_session(m, "full", extend, extend ? 128 : 0, 64);
            quarry_session *b = open_session(m, "ivfpq:budget=1", extend, 128, 100), *c = open_session(m, "window", extend, 128, 100);
            read_tokens(a, 0, 600);
            read_tokens(b, 0, 600);
            read_tokens(c, 0, 600);
            feed_tokens(a, 600, 20);
            feed_tokens(b, 600, 20);
            feed_tokens(c, 600, 20);
            assert_true(difference(m, a, b) < 2e-3);
            assert_true(difference(m, a, c) > 2e-2); /* and that is no accident */
            quarry_session_close(a);
            quarry_session_close(b);
            quarry_session_close(c);
            quarry_model_close(m);
        }
}

static void taking_tokens_back_equals_never_having_read_them(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(models); i++) {
        quarry_model *m = open_model(models[i]);
        quarry_session *a = open_session(m, "full", true, 128, 64), *b = open_session(m, "full", true, 128, 64);
        read_tokens(a, 0, 640);
        quarry_session *fork = quarry_session_fork(a, NULL);
        assert_int_equal(quarry_session_truncate(a, 448, NULL), 0);
        read_tokens(a, 448, 64);
        read_tokens(b, 0, 512);
        assert_true(difference(m, b, a) < 1e-6);
        feed_tokens(fork, 640, 5); /* whose rows the truncated one has not touched */
        feed_tokens(b, 512, 128);
        assert_int_equal(quarry_session_length(fork), 645);
        quarry_session_close(fork);
        quarry_session_close(a);
        quarry_session_close(b);
        quarry_model_close(m);
    }
}

/* 16,384 is what the tiny models claim to be trained for. */
static void more_than_the_model_was_trained_for_fits(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf");
    quarry_session *a = open_session(m, "window", true, 64, 512), *b = open_session(m, "window", false, 64, 512);
    quarry_session *limited =
        quarry_session_open(m, &(quarry_session_params){.attn = "window", .extend = true, .n_ctx = N_TOKENS + 1, .n_batch = 512}, NULL);
    for (int i = 0; i < 24; i++) read_tokens(a, 0, N_TOKENS);
    feed_tokens(a, 0, 2);
    assert_true(quarry_session_length(a) > model_shape_of(m)->n_ctx_train);
    assert_non_null(quarry_session_logits(a));
    quarry_error e = {0};
    read_tokens(limited, 0, N_TOKENS);
    assert_int_equal(quarry_session_feed(limited, tokens, 2, NULL, &e), QUARRY_ERROR_CONTEXT);
    assert_non_null(strstr(e.message, "-c"));
    int code = 0;
    for (int i = 0; i < 24 && !code; i++) code = quarry_session_read(b, tokens, N_TOKENS, NULL, &e);
    assert_int_equal(code, QUARRY_ERROR_CONTEXT);
    assert_non_null(strstr(e.message, "--extend"));
    quarry_session_close(a);
    quarry_session_close(b);
    quarry_session_close(limited);
    quarry_model_close(m);
}

static void windows_that_make_no_sense_are_refused(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf");
    const quarry_session_params bad[] = {
        {.read_window = -1}, {.read_window = ATTN_WINDOW - 1}, {.read_window = INT64_MAX}, {.extend = true, .read_window = 4097}};
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        quarry_error e = {0};
        assert_null(quarry_session_open(m, &bad[i], &e));
        assert_int_equal(e.code, QUARRY_ERROR_ARGUMENT);
        assert_non_null(strstr(e.message, "window"));
    }
    quarry_session *a = open_session(m, "full", true, 128, 64), *b = open_session(m, "full", false, 0, 64);
    assert_int_equal(quarry_sessions_feed((quarry_session *[]){a, b}, (int32_t[]){1, 2}, 2, NULL), QUARRY_ERROR_ARGUMENT);
    quarry_session_close(a);
    quarry_session_close(b);
    quarry_model_close(m);
}

static void failed_allocations_leave_the_session_usable(void **state)
{
    (void)state;
    quarry_model *m = open_model("gemma3-f32.gguf");
    int64_t n = 0;
    for (int code = QUARRY_ERROR_MEMORY; code != QUARRY_OK; n += 3) {
        quarry_session *s = open_session(m, "ivfpq:segment=128", true, 64, 100);
        read_tokens(s, 0, 300);
        quarry_error e = {0};
        memory_fail_after(n);
        code = quarry_session_read(s, tokens + 300, 100, NULL, &e);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || code == QUARRY_ERROR_MEMORY);
        read_tokens(s, quarry_session_length(s), 100);
        feed_tokens(s, 500, 1);
        quarry_session_close(s);
    }
    assert_true(n > 10);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_see_near_tokens_where_they_are_and_all_others_at_one_distance),
        cmocka_unit_test(observers_are_told_how_to_score_near_and_far_rows),
        cmocka_unit_test(blocks_see_the_same),
        cmocka_unit_test(what_is_not_selected_is_not_read),
        cmocka_unit_test(blocks_that_read_everything_equal_full_attention),
        cmocka_unit_test(a_block_reads_what_weighs_most_for_its_rows),
        cmocka_unit_test(near_a_million_angles_still_tell_neighbours_apart),
        cmocka_unit_test(the_far_query_gives_the_mean_score_of_all_distances),
        cmocka_unit_test(within_the_window_nothing_changes),
        cmocka_unit_test(a_budget_of_everything_equals_full),
        cmocka_unit_test(taking_tokens_back_equals_never_having_read_them),
        cmocka_unit_test(more_than_the_model_was_trained_for_fits),
        cmocka_unit_test(windows_that_make_no_sense_are_refused),
        cmocka_unit_test(failed_allocations_leave_the_session_usable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
