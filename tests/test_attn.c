/* The attention driver against softmax written out in double, and the option strings of policies. */
#include "test.h"

#include <math.h>
#include <stdatomic.h>

#include "attn/attn.h"

enum { HEADS_KV = 2, GROUP = 3, DIM = 16, N_HEAD = HEADS_KV * GROUP };

static const attn_shape shape = {
    .kv = {.n_layer = 1, .n_head_kv = HEADS_KV, .head_dim = DIM, .type = KV_F32}, .n_head = N_HEAD, .scale = 0.25f};

typedef struct setup {
    const math_kernels *kernels;
    thread_pool *pool;
    arena scratch[4], shared;
    kv_seq *kv;
    random_state random;
} setup;

static float noise(random_state *r)
{
    return (float)random_normal(r);
}

static void setup_make(setup *s, int n_threads, int64_t n)
{
    *s = (setup){.kernels = math_kernels_get(cpu_detect()), .pool = thread_pool_create(n_threads, NULL)};
    random_seed(&s->random, 11);
    s->kv = kv_create(&shape.kv, NULL);
    assert_int_equal(kv_reserve(s->kv, n, NULL), QUARRY_OK);
    for (int64_t pos = 0; pos < n; pos++)
        for (int h = 0; h < HEADS_KV; h++) {
            float k[DIM], v[DIM];
            for (int i = 0; i < DIM; i++) {
                k[i] = noise(&s->random);
                v[i] = noise(&s->random);
            }
            kv_write(s->kernels, kv_row(s->kv, 0, h, pos), &shape.kv, k, v);
        }
    kv_commit(s->kv, n);
}

static void setup_free(setup *s)
{
    kv_destroy(s->kv);
    thread_pool_destroy(s->pool);
    for (int i = 0; i < 4; i++) arena_free(&s->scratch[i]);
    arena_free(&s->shared);
}

/* Softmax attention of one query head over the positions that `seen` accepts, in double. */
static void naive(const setup *s, const float *q, int head, int64_t pos, int64_t hole_first, int64_t hole_end, double *out)
{
    double max = -INFINITY, sum = 0;
    double *score = malloc((size_t)(pos + 1) * sizeof *score);
    memset(out, 0, DIM * sizeof *out);
    for (int64_t t = 0; t <= pos; t++) {
        const float *row = kv_row(s->kv, 0, head / GROUP, t);
        score[t] = 0;
        for (int i = 0; i < DIM; i++) score[t] += (double)q[i] * (double)row[i];
        score[t] *= (double)shape.scale;
        if (t >= hole_first && t < hole_end) score[t] = -INFINITY;
        if (score[t] > max) max = score[t];
    }
    for (int64_t t = 0; t <= pos; t++) {
        const float *row = kv_row(s->kv, 0, head / GROUP, t);
        double w = exp(score[t] - max);
        sum += w;
        for (int i = 0; i < DIM; i++) out[i] += w * (double)row[DIM + i];
    }
    for (int i = 0; i < DIM; i++) out[i] /= sum;
    free(score);
}

static float *run(setup *s, const attn_row *rows, int64_t n, const float *q, attn_cost *cost)
{
    float *out = calloc((size_t)n * N_HEAD * DIM, sizeof *out);
    attn_context c = {s->kernels, s->pool, s->scratch, &s->shared};
    quarry_error e = {0};
    assert_int_equal(attn_forward(&c, &shape, 0, rows, n, q, out, cost, &e), QUARRY_OK);
    return out;
}

static float *queries(setup *s, int64_t n)
{
    float *q = malloc((size_t)n * N_HEAD * DIM * sizeof *q);
    for (int64_t i = 0; i < n * N_HEAD * DIM; i++) q[i] = 2 * noise(&s->random);
    return q;
}

static void check(const setup *s, const attn_row *rows, int64_t n, const float *q, const float *out, int64_t hole_first, int64_t hole_end)
{
    for (int64_t r = 0; r < n; r++)
        for (int h = 0; h < N_HEAD; h++) {
            double want[DIM];
            naive(s, q + (r * N_HEAD + h) * DIM, h, rows[r].pos, hole_first, hole_end, want);
            for (int i = 0; i < DIM; i++) assert_true(fabs((double)out[(r * N_HEAD + h) * DIM + i] - want[i]) < 2e-5);
        }
}

static void dense_rows_equal_naive_attention(void **state)
{
    (void)state;
    const int64_t n = 150, first = 400;
    setup s;
    setup_make(&s, 2, first + n);
    attn_row rows[150];
    attn_cost cost[150] = {{0}};
    for (int64_t i = 0; i < n; i++) rows[i] = (attn_row){.kv = s.kv, .policy = NULL, .pos = first + i, .dense = true};
    float *q = queries(&s, n), *out = run(&s, rows, n, q, cost);
    check(&s, rows, n, q, out, 0, 0);
    for (int64_t i = 0; i < n; i++) assert_int_equal(cost[i].rows, HEADS_KV * (first + i + 1));
    free(q);
    free(out);
    setup_free(&s);
}

static void one_row_over_many_splits_equals_naive_attention(void **state)
{
    (void)state;
    const int64_t n = 5000;
    setup s;
    setup_make(&s, 3, n);
    attn_policy *full = attn_policy_create("full", &shape, s.kernels, NULL);
    attn_row rows[] = {{.kv = s.kv, .policy = full, .pos = n - 1, .dense = false},
                       {.kv = s.kv, .policy = full, .pos = 17, .dense = false},
                       {.kv = s.kv, .policy = full, .pos = 0, .dense = false}};
    float *q = queries(&s, 3), *out = run(&s, rows, 3, q, NULL);
    check(&s, rows, 3, q, out, 0, 0);
    attn_policy_destroy(full);
    free(q);
    free(out);
    setup_free(&s);
}

typedef struct told {
    atomic_int n;
    int64_t n_sinks, far_end;
    bool all;
    double log_mass[N_HEAD];
} told;

static void listen(void *data, const attn_reading *r, arena *scratch)
{
    told *t = data;
    (void)scratch;
    atomic_fetch_add(&t->n, 1);
    if (r->head == 0) {
        t->n_sinks = r->n_sinks;
        t->far_end = r->far_end;
        t->all = r->selected->all;
    }
    for (int g = 0; g < r->group; g++) t->log_mass[r->head * r->group + g] = (double)r->state->m[g] + log((double)r->state->l[g]);
}

/* Layer 0 of what follows has a window, and no layer sees everything: the same rows, and a hole up to where the window begins. */
static attn_shape windowed(int window)
{
    attn_shape local = shape;
    local.kv.n_layer = 0;
    local.kv.n_local = 1;
    local.kv.window = window;
    return local;
}

static float *run_windowed(setup *s, int window, const attn_row *rows, int64_t n, const float *q, attn_cost *cost)
{
    const attn_shape local = windowed(window);
    float *out = calloc((size_t)n * N_HEAD * DIM, sizeof *out);
    attn_context c = {s->kernels, s->pool, s->scratch, &s->shared};
    assert_int_equal(attn_forward(&c, &local, 0, rows, n, q, out, cost, NULL), QUARRY_OK);
    return out;
}

static void a_local_layer_reads_its_window(void **state)
{
    (void)state;
    enum { ROWS = 150 };
    const int windows[] = {1, 2, 63, 64, 65, 100, 300, 1000};
    const int64_t firsts[] = {0, 1, 400};
    setup s;
    setup_make(&s, 2, 400 + ROWS);
    attn_policy *policy = attn_policy_create("window", &shape, s.kernels, NULL);
    assert_int_equal(attn_index_advance(policy, s.kv, s.pool, s.scratch, NULL), QUARRY_OK);
    told heard = {0};
    const attn_observer observer = {listen, &heard};
    float *q = queries(&s, ROWS);
    for (size_t i = 0; i < TEST_COUNT(windows) * TEST_COUNT(firsts) * 3; i++) {
        const int window = windows[i / 3 % TEST_COUNT(windows)];
        const int64_t first = firsts[i / 3 / TEST_COUNT(windows)], n = i % 3 == 2 ? 3 : ROWS; /* a document, a question, a few rows */
        attn_row rows[ROWS];
        attn_cost cost[ROWS] = {{0}};
        for (int64_t r = 0; r < n; r++)
            rows[r] = (attn_row){.kv = s.kv, .policy = policy, .pos = first + r, .dense = i % 3 == 0, .observer = &observer};
        float *out = run_windowed(&s, window, rows, n, q, cost);
        for (int64_t r = 0; r < n; r++) {
            const int64_t begin = rows[r].pos - window + 1;
            check(&s, &rows[r], 1, q + r * N_HEAD * DIM, out + r * N_HEAD * DIM, 0, begin > 0 ? begin : 0);
            assert_int_equal(cost[r].window_rows, HEADS_KV * (begin > 0 ? window : rows[r].pos + 1));
            assert_int_equal(cost[r].rows, 0);
        }
        free(out);
    }
    assert_int_equal(atomic_load(&heard.n), 0);
    attn_policy_destroy(policy);
    free(q);
    setup_free(&s);
}

/* A row of a document gives the same bits, whatever rows are read with it. */
static void neighbours_do_not_change_a_local_row(void **state)
{
    (void)state;
    enum { ROWS = 130, FIRST = 350 };
    setup s;
    setup_make(&s, 2, FIRST + ROWS);
    attn_row rows[ROWS];
    for (int64_t r = 0; r < ROWS; r++) rows[r] = (attn_row){.kv = s.kv, .pos = FIRST + r, .dense = true};
    float *q = queries(&s, ROWS), *all = run_windowed(&s, 100, rows, ROWS, q, NULL);
    for (int64_t r = 0, n; r < ROWS; r += n) {
        n = 1 + r % 7 * 5 < ROWS - r ? 1 + r % 7 * 5 : ROWS - r;
        float *some = run_windowed(&s, 100, rows + r, n, q + r * N_HEAD * DIM, NULL);
        assert_memory_equal(some, all + r * N_HEAD * DIM, (size_t)n * N_HEAD * DIM * sizeof *some);
        free(some);
    }
    free(q);
    free(all);
    setup_free(&s);
}

static void window_reads_sinks_and_local_rows_only(void **state)
{
    (void)state;
    const int64_t n = 1000;
    setup s;
    setup_make(&s, 2, n);
    quarry_error e = {0};
    attn_policy *window = attn_policy_create("window", &shape, s.kernels, &e);
    assert_int_equal(attn_index_advance(window, s.kv, s.pool, s.scratch, &e), QUARRY_OK);
    assert_true(window->n_far <= n - ATTN_WINDOW && window->n_far > n - ATTN_WINDOW - ATTN_BLOCK);
    assert_int_equal(attn_index_seal(window, s.kv, s.pool, s.scratch, &e), QUARRY_OK);
    assert_int_equal(window->n_far, n - ATTN_WINDOW);
    attn_row row = {.kv = s.kv, .policy = window, .pos = n - 1, .dense = false};
    attn_cost cost = {0};
    float *q = queries(&s, 1), *out = run(&s, &row, 1, q, &cost);
    check(&s, &row, 1, q, out, ATTN_SINKS, n - ATTN_WINDOW);
    assert_int_equal(cost.rows, HEADS_KV * (ATTN_SINKS + ATTN_WINDOW));
    row.dense = true; /* a document is read whole, whatever the policy */
    float *dense = run(&s, &row, 1, q, NULL);
    check(&s, &row, 1, q, dense, 0, 0);
    attn_policy_destroy(window);
    free(q);
    free(out);
    free(dense);
    setup_free(&s);
}

/* Also where everything is read, which is otherwise not a search. */
static void observer_is_told_what_each_head_read(void **state)
{
    (void)state;
    const int64_t n = 1000;
    setup s;
    setup_make(&s, 2, n);
    float *q = queries(&s, 1);
    const char *const names[] = {"full", "window"};
    for (int i = 0; i < 2; i++) {
        quarry_error e = {0};
        attn_policy *policy = attn_policy_create(names[i], &shape, s.kernels, &e);
        assert_int_equal(attn_index_advance(policy, s.kv, s.pool, s.scratch, &e), QUARRY_OK);
        told heard = {0};
        const attn_observer observer = {listen, &heard};
        attn_row row = {.kv = s.kv, .policy = policy, .pos = n - 1, .observer = &observer};
        attn_cost cost = {0};
        float *out = run(&s, &row, 1, q, &cost);
        check(&s, &row, 1, q, out, ATTN_SINKS, i == 0 ? ATTN_SINKS : policy->n_far);
        assert_int_equal(atomic_load(&heard.n), HEADS_KV);
        assert_int_equal(heard.n_sinks, ATTN_SINKS);
        assert_int_equal(heard.far_end, policy->n_far);
        assert_int_equal(heard.all, i == 0);
        for (int h = 0; h < N_HEAD; h++) {
            double sum = 0;
            for (int64_t t = 0; t < n; t++) {
                const float *key = kv_row(s.kv, 0, h / GROUP, t);
                double score = 0;
                for (int j = 0; j < DIM; j++) score += (double)q[h * DIM + j] * (double)key[j];
                if (i == 0 || t < ATTN_SINKS || t >= policy->n_far) sum += exp(score * (double)shape.scale);
            }
            assert_true(fabs(heard.log_mass[h] - log(sum)) < 1e-5);
        }
        row.dense = true; /* nobody is told of a document that is read */
        free(out);
        out = run(&s, &row, 1, q, NULL);
        assert_int_equal(atomic_load(&heard.n), HEADS_KV);
        free(out);
        attn_policy_destroy(policy);
    }
    free(q);
    setup_free(&s);
}

static void result_does_not_depend_on_threads(void **state)
{
    (void)state;
    const int64_t n = 300;
    float *first = NULL;
    for (int threads = 1; threads <= 4; threads++) {
        setup s;
        setup_make(&s, threads, 2500 + n);
        attn_row rows[301];
        for (int64_t i = 0; i < n; i++) rows[i] = (attn_row){.kv = s.kv, .policy = NULL, .pos = 2500 + i, .dense = true};
        rows[n] = (attn_row){.kv = s.kv, .policy = NULL, .pos = 2499, .dense = true};
        float *q = queries(&s, n + 1), *out = run(&s, rows, n + 1, q, NULL);
        if (!first)
            first = out;
        else {
            assert_memory_equal(out, first, (size_t)(n + 1) * N_HEAD * DIM * sizeof *out);
            free(out);
        }
        free(q);
        setup_free(&s);
    }
    free(first);
}

static void failing_scratch_is_an_error_not_a_wrong_result(void **state)
{
    (void)state;
    setup s;
    setup_make(&s, 1, 200); /* one thread: failures are injected per thread */
    attn_policy *full = attn_policy_create("full", &shape, s.kernels, NULL);
    attn_row row = {.kv = s.kv, .policy = full, .pos = 199, .dense = false};
    float *q = queries(&s, 1), out[N_HEAD * DIM];
    attn_context c = {s.kernels, s.pool, s.scratch, &s.shared};
    quarry_code code = QUARRY_ERROR_MEMORY;
    for (int64_t n = 0; code != QUARRY_OK; n++) {
        quarry_error e = {0};
        arena_free(&s.scratch[0]);
        arena_free(&s.shared);
        memory_fail_after(n);
        code = attn_forward(&c, &shape, 0, &row, 1, q, out, NULL, &e);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || (code == QUARRY_ERROR_MEMORY && e.code == QUARRY_ERROR_MEMORY));
        assert_true(n < 50);
    }
    check(&s, &row, 1, q, out, 0, 0);
    attn_policy_destroy(full);
    free(q);
    setup_free(&s);
}

static void policy_specs_are_checked(void **state)
{
    (void)state;
    const math_kernels *kernels = math_kernels_get(CPU_SCALAR);
    const struct {
        const char *spec, *said;
    } wrong[] = {
        {"fulll", "known are ivfpq, full"}, {"full:budget=1", "no option 'budget'"},
        {"ivfpq:budget", "needs a value"},  {"ivfpq:budget=x", "must be a number"},
        {"ivfpq:budget=-1", "from"},        {"ivfpq:budgett=1", "it has budget"},
        {"", "unknown retrieval policy"},
    };
    for (size_t i = 0; i < TEST_COUNT(wrong); i++) {
        quarry_error e = {0};
        assert_null(attn_policy_create(wrong[i].spec, &shape, kernels, &e));
        assert_int_equal(e.code, QUARRY_ERROR_ARGUMENT);
        if (!strstr(e.message, wrong[i].said)) fail_msg("'%s' said: %s", wrong[i].spec, e.message);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense_rows_equal_naive_attention),
        cmocka_unit_test(one_row_over_many_splits_equals_naive_attention),
        cmocka_unit_test(window_reads_sinks_and_local_rows_only),
        cmocka_unit_test(a_local_layer_reads_its_window),
        cmocka_unit_test(neighbours_do_not_change_a_local_row),
        cmocka_unit_test(observer_is_told_what_each_head_read),
        cmocka_unit_test(result_does_not_depend_on_threads),
        cmocka_unit_test(failing_scratch_is_an_error_not_a_wrong_result),
        cmocka_unit_test(policy_specs_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
