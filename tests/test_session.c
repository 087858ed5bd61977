/* Sessions over tiny random models: what reading, feeding, forking and truncating must have in common, whatever the numbers are. */
#include "test.h"

#include <math.h>

#include "gen/gen.h"

enum { N = 400, QUESTION = 12 };

static int32_t tokens[N + QUESTION];
static int64_t n_vocab;

static quarry_model *open_model(const char *name, int n_threads)
{
    char path[1024];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", folder, name);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = n_threads}, &e);
    if (!m) fail_msg("%s", e.message);
    n_vocab = model_shape_of(m)->n_vocab;
    random_state r;
    random_seed(&r, 5);
    for (int i = 0; i < N + QUESTION; i++) tokens[i] = (int32_t)random_below(&r, (uint64_t)n_vocab);
    return m;
}

static quarry_session *open_session(quarry_model *m, const char *attn, int n_batch)
{
    quarry_error e = {0};
    quarry_session *s = quarry_session_open(m, &(quarry_session_params){.attn = attn, .n_batch = n_batch}, &e);
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

/* Largest difference of two sets of logits, as a share of the first one's spread. */
static double distance(const float *a, const float *b)
{
    double low = INFINITY, high = -INFINITY, worst = 0;
    assert_non_null(a);
    assert_non_null(b);
    for (int64_t i = 0; i < n_vocab; i++) {
        low = fmin(low, (double)a[i]);
        high = fmax(high, (double)a[i]);
        worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
    }
    assert_true(high - low > 1); /* flat logits would hide everything */
    return worst / (high - low);
}

static float *copy_logits(const quarry_session *s)
{
    float *copy = malloc((size_t)n_vocab * sizeof *copy);
    assert_non_null(quarry_session_logits(s));
    return memcpy(copy, quarry_session_logits(s), (size_t)n_vocab * sizeof *copy);
}

/* Logits after N read and QUESTION fed. */
static float *ask(quarry_model *m, const char *attn, int n_batch)
{
    quarry_session *s = open_session(m, attn, n_batch);
    read_tokens(s, 0, N);
    feed_tokens(s, N, QUESTION);
    float *logits = copy_logits(s);
    quarry_session_close(s);
    return logits;
}

static void chunk_size_changes_rounding_only(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 2);
    float *whole = ask(m, "full", 512);
    const int sizes[] = {1, 7, 64, 100};
    for (size_t i = 0; i < TEST_COUNT(sizes); i++) {
        float *parts = ask(m, "full", sizes[i]);
        assert_true(distance(whole, parts) < 1e-4);
        free(parts);
    }
    free(whole);
    quarry_model_close(m);
}

static void number_of_threads_changes_nothing(void **state)
{
    (void)state;
    const char *const specs[] = {"full", "ivfpq:budget=0.2"};
    for (size_t k = 0; k < TEST_COUNT(specs); k++) {
        float *first = NULL;
        for (int threads = 1; threads <= 3; threads++) {
            quarry_model *m = open_model("llama-q4_1.gguf", threads);
            float *logits = ask(m, specs[k], 128);
            if (first) {
                assert_memory_equal(first, logits, (size_t)n_vocab * sizeof *logits);
                free(logits);
            } else {
                first = logits;
            }
            quarry_model_close(m);
        }
        free(first);
    }
}

static void a_budget_of_everything_equals_full(void **state)
{
    (void)state;
    const char *const models[] = {"llama-f32.gguf", "qwen2-f32.gguf", "qwen3-f32.gguf"};
    for (size_t i = 0; i < TEST_COUNT(models); i++) {
        quarry_model *m = open_model(models[i], 2);
        float *full = ask(m, "full", 512), *all = ask(m, "ivfpq:budget=1", 512);
        assert_true(distance(full, all) < 1e-4);
        free(full);
        free(all);
        quarry_model_close(m);
    }
}

static void feeding_one_by_one_equals_feeding_at_once(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 2);
    quarry_session *s = open_session(m, "full", 512);
    float *at_once = ask(m, "full", 512);
    read_tokens(s, 0, N);
    for (int i = 0; i < QUESTION; i++) feed_tokens(s, N + i, 1);
    assert_true(distance(at_once, quarry_session_logits(s)) < 1e-4);
    assert_int_equal(quarry_session_length(s), N + QUESTION);
    assert_memory_equal(quarry_session_tokens(s), tokens, sizeof tokens);
    quarry_session_close(s);
    free(at_once);
    quarry_model_close(m);
}

static void forks_answer_alike_and_independently(void **state)
{
    (void)state;
    const char *const specs[] = {"full", "ivfpq:budget=0.1", "window"};
    quarry_model *m = open_model("llama-f32.gguf", 2);
    for (size_t k = 0; k < TEST_COUNT(specs); k++) {
        quarry_session *s = open_session(m, specs[k], 128);
        read_tokens(s, 0, N);
        float *read = copy_logits(s);
        quarry_session *a = quarry_session_fork(s, NULL), *b = quarry_session_fork(s, NULL);
        assert_memory_equal(quarry_session_logits(a), read, (size_t)n_vocab * sizeof *read);
        feed_tokens(a, 0, 100); /* another continuation */
        feed_tokens(s, N, QUESTION);
        feed_tokens(b, N, QUESTION);
        assert_memory_equal(quarry_session_logits(b), quarry_session_logits(s), (size_t)n_vocab * sizeof *read);
        quarry_session_close(s);
        feed_tokens(b, 0, 1); /* still whole without its parent */
        quarry_session_close(a);
        quarry_session_close(b);
        free(read);
    }
    quarry_model_close(m);
}

static void truncating_and_going_on_equals_never_having_read(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 2);
    const int64_t cuts[] = {0, 1, 70, 255, 256, 257, 300};
    for (size_t i = 0; i < TEST_COUNT(cuts); i++) {
        quarry_session *s = open_session(m, "full", 128), *fresh = open_session(m, "full", 128);
        read_tokens(s, 0, N);
        assert_int_equal(quarry_session_truncate(s, cuts[i], NULL), 0);
        assert_null(quarry_session_logits(s));
        assert_int_equal(quarry_session_common_prefix(s, tokens, N), cuts[i]);
        if (cuts[i]) read_tokens(fresh, 0, cuts[i]);
        feed_tokens(s, N, QUESTION);
        feed_tokens(fresh, N, QUESTION);
        assert_true(distance(quarry_session_logits(s), quarry_session_logits(fresh)) < 1e-4);
        quarry_session_close(s);
        quarry_session_close(fresh);
    }
    quarry_session *s = open_session(m, "ivfpq:budget=0.1", 128);
    read_tokens(s, 0, N);
    for (int64_t n = N; n >= 0; n -= 37) { /* an index that shrinks under its segments */
        assert_int_equal(quarry_session_truncate(s, n, NULL), 0);
        feed_tokens(s, N, QUESTION);
        for (int64_t j = 0; j < n_vocab; j++) assert_true(isfinite(quarry_session_logits(s)[j]));
        assert_int_equal(quarry_session_truncate(s, n, NULL), 0);
    }
    quarry_error e = {0};
    assert_int_equal(quarry_session_truncate(s, N, &e), QUARRY_ERROR_ARGUMENT);
    quarry_session_close(s);
    quarry_model_close(m);
}

/* Gemma 3's layers with a window: what was read, taken back and fed again equals what a session without that past gives. */
static void windows_survive_forks_and_truncation(void **state)
{
    (void)state;
    enum { LONG = 2000, BACK = LONG - 300 };
    quarry_model *m = open_model("gemma3-f32.gguf", 2);
    quarry_session *s = open_session(m, "full", 64), *fresh = open_session(m, "full", 100);
    quarry_error e = {0};
    for (int64_t i = 0; i < LONG; i += N) read_tokens(s, 0, N);
    for (int64_t i = 0; i < BACK; i += 100) read_tokens(fresh, i % N, 100);
    quarry_session *fork = quarry_session_fork(s, &e);
    assert_int_equal(quarry_session_truncate(fork, BACK, NULL), 0);
    feed_tokens(fork, N, QUESTION);
    feed_tokens(fresh, N, QUESTION);
    assert_true(distance(quarry_session_logits(fork), quarry_session_logits(fresh)) < 1e-4);
    assert_int_equal(quarry_session_truncate(s, 100, &e), QUARRY_ERROR_ARGUMENT); /* windows there are forgotten */
    assert_non_null(strstr(e.message, "sliding window of 16"));
    assert_int_equal(quarry_session_length(s), LONG);
    assert_int_equal(quarry_session_truncate(s, 0, NULL), 0);
    read_tokens(s, 0, N);
    quarry_session_close(fresh);
    fresh = open_session(m, "full", 64);
    read_tokens(fresh, 0, N);
    assert_memory_equal(quarry_session_logits(s), quarry_session_logits(fresh), (size_t)n_vocab * sizeof(float));
    quarry_session_close(s);
    quarry_session_close(fork);
    quarry_session_close(fresh);
    quarry_model_close(m);
}

/* One layer of seven is searched; the others read their 16 rows under any policy, which is counted apart. */
static void costs_tell_windows_apart(void **state)
{
    (void)state;
    quarry_model *m = open_model("gemma3-f32.gguf", 2);
    const char *const specs[] = {"full", "window"};
    for (int i = 0; i < 2; i++) {
        quarry_session *s = open_session(m, specs[i], 64);
        read_tokens(s, 0, N);
        feed_tokens(s, N, 1);
        assert_int_equal(session_cost(s).rows, i == 0 ? N + 1 : ATTN_SINKS + ATTN_WINDOW + 1);
        assert_int_equal(session_cost(s).window_rows, 6 * 16);
        quarry_session_close(s);
    }
    quarry_model_close(m);
}

static void too_many_tokens_are_refused_before_any_work(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 2);
    quarry_error e = {0};
    quarry_session *s = quarry_session_open(m, &(quarry_session_params){.n_ctx = 100}, &e);
    assert_int_equal(quarry_session_read(s, tokens, 101, NULL, &e), QUARRY_ERROR_CONTEXT);
    assert_non_null(strstr(e.message, "101"));
    assert_non_null(strstr(e.message, "100"));
    assert_int_equal(quarry_session_length(s), 0);
    read_tokens(s, 0, 100);
    assert_int_equal(quarry_session_feed(s, tokens, 1, NULL, &e), QUARRY_ERROR_CONTEXT);
    tokens[0] = (int32_t)n_vocab;
    assert_int_equal(quarry_session_truncate(s, 0, NULL), 0);
    assert_int_equal(quarry_session_read(s, tokens, 1, NULL, &e), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(quarry_session_length(s), 0);
    quarry_session_close(s);
    quarry_model_close(m);
}

typedef struct countdown {
    int calls, until;
    int64_t done;
} countdown;

static bool count_down(int64_t done, int64_t total, void *data)
{
    countdown *c = data;
    assert_true(done >= 0 && done <= total);
    c->done = done;
    return ++c->calls != c->until;
}

static void cancelling_leaves_a_session_that_can_go_on(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 2);
    float *whole = ask(m, "full", 64);
    for (int until = 1; until < 12; until++) {
        quarry_session *s = open_session(m, "full", 64);
        countdown c = {.until = until};
        quarry_error e = {0};
        assert_int_equal(quarry_session_read(s, tokens, N, &(quarry_watch){count_down, &c}, &e), QUARRY_ERROR_CANCELLED);
        int64_t held = quarry_session_length(s);
        assert_int_equal(held % 64, 0);
        read_tokens(s, held, N - held);
        feed_tokens(s, N, QUESTION);
        assert_true(distance(whole, quarry_session_logits(s)) < 1e-4);
        quarry_session_close(s);
    }
    free(whole);
    quarry_model_close(m);
}

static void failed_allocations_leave_the_session_usable(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 1);
    float *whole = ask(m, "ivfpq:budget=0.2", 128);
    int64_t n = 0;
    for (quarry_code code = QUARRY_ERROR_MEMORY; code != QUARRY_OK; n += 1 + n / 8) {
        quarry_error e = {0};
        quarry_session *s = open_session(m, "ivfpq:budget=0.2", 128);
        memory_fail_after(n);
        code = (quarry_code)quarry_session_read(s, tokens, N, NULL, &e);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || code == QUARRY_ERROR_MEMORY);
        int64_t held = quarry_session_length(s);
        if (code == QUARRY_ERROR_MEMORY) {
            assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
            read_tokens(s, held, N - held);
            feed_tokens(s, N, QUESTION);
            for (int64_t j = 0; j < n_vocab; j++) assert_true(isfinite(quarry_session_logits(s)[j]));
        }
        quarry_session_close(s);
        assert_true(n < 1000000);
    }
    assert_true(n > 3);
    free(whole);
    quarry_model_close(m);
}

static void failed_allocations_while_opening_are_clean(void **state)
{
    (void)state;
    char path[1024];
    snprintf(path, sizeof path, "%s/llama-f32.gguf", getenv("QUARRY_TINY_MODELS"));
    quarry_model *m = NULL;
    for (int64_t n = 0; !m; n++) {
        quarry_error e = {0};
        memory_fail_after(n);
        m = quarry_model_open(path, &(quarry_model_params){.n_threads = 1}, &e);
        memory_fail_after(-1);
        if (!m) assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
        assert_true(n < 100000);
    }
    quarry_model_close(m);
}

static void mapped_and_read_models_agree(void **state)
{
    (void)state;
    char path[1024];
    const char *const names[] = {"llama-f32.gguf", "llama-f16.gguf", "llama-q8_0.gguf"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        quarry_model *mapped = open_model(names[i], 2);
        snprintf(path, sizeof path, "%s/%s", getenv("QUARRY_TINY_MODELS"), names[i]);
        quarry_model *read = quarry_model_open(path, &(quarry_model_params){.n_threads = 2, .no_mmap = true}, NULL);
        float *a = ask(mapped, "full", 512), *b = ask(read, "full", 512);
        assert_memory_equal(a, b, (size_t)n_vocab * sizeof *a);
        free(a);
        free(b);
        quarry_model_close(mapped);
        quarry_model_close(read);
    }
}

enum { IN_BATCH = 4 };

/* Sessions over beginnings of the same tokens, of several lengths, under several policies. */
static void open_batch(quarry_model *m, quarry_session **sessions)
{
    const char *const attn[IN_BATCH] = {"ivfpq:budget=0.1", "full", "ivfpq:budget=0.1", "window"};
    for (int i = 0; i < IN_BATCH; i++) {
        sessions[i] = open_session(m, attn[i], 128);
        read_tokens(sessions[i], 0, N - 37 * i);
    }
}

static void close_all(quarry_session **sessions)
{
    for (int i = 0; i < IN_BATCH; i++) quarry_session_close(sessions[i]);
}

static void a_batch_of_sessions_equals_feeding_each(void **state)
{
    (void)state;
    enum { STEPS = 40 }; /* tokens leave the window on the way */
    const char *const names[] = {"llama-f32.gguf", "llama-q8_0.gguf"};
    for (size_t k = 0; k < TEST_COUNT(names); k++) {
        quarry_model *m = open_model(names[k], 2);
        quarry_session *together[IN_BATCH], *alone[IN_BATCH];
        open_batch(m, together);
        open_batch(m, alone);
        for (int step = 0; step < STEPS; step++) {
            int32_t next[IN_BATCH];
            quarry_error e = {0};
            for (int i = 0; i < IN_BATCH; i++) next[i] = tokens[(step * IN_BATCH + i) % N];
            if (quarry_sessions_feed(together, next, IN_BATCH, &e) != 0) fail_msg("%s", e.message);
            for (int i = 0; i < IN_BATCH; i++)
                if (quarry_session_feed(alone[i], &next[i], 1, NULL, &e) != 0) fail_msg("%s", e.message);
        }
        for (int i = 0; i < IN_BATCH; i++) {
            quarry_stats a, b;
            assert_int_equal(quarry_session_length(together[i]), N - 37 * i + STEPS);
            assert_memory_equal(quarry_session_logits(together[i]), quarry_session_logits(alone[i]), (size_t)n_vocab * sizeof(float));
            quarry_session_get_stats(together[i], &a);
            quarry_session_get_stats(alone[i], &b);
            assert_int_equal(a.n_fed, b.n_fed);
            assert_int_equal(session_cost(together[i]).rows, session_cost(alone[i]).rows);
        }
        close_all(together);
        close_all(alone);
        quarry_model_close(m);
    }
}

static void batches_that_cannot_be_are_refused(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 1), *other = open_model("llama-f16.gguf", 1);
    quarry_session *s = open_session(m, "full", 128), *foreign = open_session(other, "full", 128);
    quarry_session *small = quarry_session_open(m, &(quarry_session_params){.n_ctx = 8}, NULL);
    quarry_session *wide = quarry_session_open(m, &(quarry_session_params){.kv_f32 = true}, NULL);
    read_tokens(s, 0, 100);
    read_tokens(small, 0, 8);
    float *before = copy_logits(s);
    quarry_session *const bad[] = {s, foreign, small, wide};
    const quarry_code expected[] = {QUARRY_ERROR_ARGUMENT, QUARRY_ERROR_ARGUMENT, QUARRY_ERROR_CONTEXT, QUARRY_ERROR_ARGUMENT};
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        quarry_error e = {0};
        assert_int_equal(quarry_sessions_feed((quarry_session *[]){s, bad[i]}, (int32_t[]){1, 2}, 2, &e), expected[i]);
        assert_int_equal(e.code, expected[i]);
        assert_int_equal(quarry_session_length(s), 100);
        assert_memory_equal(quarry_session_logits(s), before, (size_t)n_vocab * sizeof(float));
    }
    assert_int_equal(quarry_sessions_feed(&s, (int32_t[]){(int32_t)n_vocab}, 1, NULL), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(quarry_session_length(s), 100);
    assert_int_equal(quarry_sessions_feed(&s, NULL, 0, NULL), QUARRY_OK);
    assert_int_equal(quarry_sessions_feed(&s, NULL, -1, NULL), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(quarry_sessions_feed((quarry_session *[]){s, s}, (int32_t[]){1, 2}, 2, NULL), QUARRY_ERROR_ARGUMENT);
    free(before);
    quarry_session_close(s);
    quarry_session_close(foreign);
    quarry_session_close(small);
    quarry_session_close(wide);
    quarry_model_close(m);
    quarry_model_close(other);
}

static void failed_allocations_leave_a_batch_usable(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf", 1);
    const int32_t next[IN_BATCH] = {1, 2, 3, 4};
    quarry_code code = QUARRY_ERROR_MEMORY;
    int64_t n = 0;
    for (; code != QUARRY_OK; n++) {
        quarry_session *s[IN_BATCH];
        quarry_error e = {0};
        open_batch(m, s);
        memory_fail_after(n);
        code = (quarry_code)quarry_sessions_feed(s, next, IN_BATCH, &e);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || code == QUARRY_ERROR_MEMORY);
        for (int i = 0; i < IN_BATCH; i++) assert_int_equal(quarry_session_length(s[i]), N - 37 * i + (code == QUARRY_OK));
        if (code != QUARRY_OK) assert_int_equal(quarry_sessions_feed(s, next, IN_BATCH, &e), QUARRY_OK);
        close_all(s);
    }
    assert_true(n > 2);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunk_size_changes_rounding_only),
        cmocka_unit_test(number_of_threads_changes_nothing),
        cmocka_unit_test(a_budget_of_everything_equals_full),
        cmocka_unit_test(feeding_one_by_one_equals_feeding_at_once),
        cmocka_unit_test(forks_answer_alike_and_independently),
        cmocka_unit_test(truncating_and_going_on_equals_never_having_read),
        cmocka_unit_test(windows_survive_forks_and_truncation),
        cmocka_unit_test(costs_tell_windows_apart),
        cmocka_unit_test(too_many_tokens_are_refused_before_any_work),
        cmocka_unit_test(cancelling_leaves_a_session_that_can_go_on),
        cmocka_unit_test(failed_allocations_leave_the_session_usable),
        cmocka_unit_test(failed_allocations_while_opening_are_clean),
        cmocka_unit_test(mapped_and_read_models_agree),
        cmocka_unit_test(a_batch_of_sessions_equals_feeding_each),
        cmocka_unit_test(batches_that_cannot_be_are_refused),
        cmocka_unit_test(failed_allocations_leave_a_batch_usable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
