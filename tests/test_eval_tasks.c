/* The tasks on a tiny random model: what they count and report, whatever the numbers are. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "eval/common.h"
#include "eval_fixture.h"

static int open_model(void **state)
{
    static fixture f;
    char path[512];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/llama-f32.gguf", folder);
    *state = &f;
    return fixture_open(&f, path);
}

static void kld_of_full_is_zero_and_window_reads_less(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"full", "window"};
    const kld_params params = {.attn = attn, .n_attn = 2, .texts = &f->text, .n_texts = 1, .depth = 300, .n_steps = 8, .samples = 2};
    kld_result r[3];
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    for (int i = 0; i < 3; i++) assert_int_equal(r[i].kld.steps.n, 16);
    assert_true(r[0].kld.steps.max == 0 && r[1].kld.steps.max == 0);
    assert_true(r[1].agreement == 1 && r[1].perplexity == r[0].perplexity && r[1].reading.rows_share == 1);
    assert_true(r[2].kld.steps.mean > 0 && r[2].kld.steps.mean < 20);
    assert_true(r[2].reading.rows_share > 0.1 && r[2].reading.rows_share < 0.5);
}

static void kld_asks_for_enough_text(void **state)
{
    const fixture *f = *state;
    const kld_params params = {.texts = &f->text, .n_texts = 1, .depth = f->text.n_tokens - 8, .n_steps = 8, .samples = 1};
    kld_result r;
    quarry_error error;
    assert_int_equal(kld_measure(f->model, &params, NULL, &r, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "sentences"));
}

static void unknown_policy_is_an_error(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"nonesuch"};
    const kld_params params = {.attn = attn, .n_attn = 1, .texts = &f->text, .n_texts = 1, .depth = 10, .n_steps = 1, .samples = 1};
    kld_result r[2];
    quarry_error error;
    assert_int_equal(kld_measure(f->model, &params, NULL, r, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "nonesuch"));
}

static void too_deep_is_said_before_reading(void **state)
{
    const fixture *f = *state;
    quarry_model_info info;
    quarry_model_get_info(f->model, &info);
    const int64_t depth = info.n_ctx_train - 4;
    const eval_text text = {"claimed", f->tokens, info.n_ctx_train * 2}; /* never read */
    const kld_params params = {.texts = &text, .n_texts = 1, .depth = depth, .n_steps = 8, .samples = 1};
    const needle_params needles = {
        .texts = &f->text, .n_texts = 1, .depths = &depth, .n_depths = 1, .count = 1, .needles = 1, .n_answer = 32};
    kld_result k;
    needle_result n;
    quarry_error error;
    assert_int_equal(kld_measure(f->model, &params, NULL, &k, &error), QUARRY_ERROR_CONTEXT);
    assert_int_equal(needle_measure(f->model, &needles, NULL, NULL, NULL, &n, NULL, &error), QUARRY_ERROR_CONTEXT);
}

static bool stop_at_once(int64_t done, int64_t total, void *data)
{
    (void)done, (void)total, (void)data;
    return false;
}

static void a_watcher_can_stop_the_measurement(void **state)
{
    const fixture *f = *state;
    const kld_params params = {.texts = &f->text, .n_texts = 1, .depth = 200, .n_steps = 4, .samples = 1};
    const quarry_watch watch = {stop_at_once, NULL};
    kld_result r;
    assert_int_equal(kld_measure(f->model, &params, &watch, &r, NULL), QUARRY_ERROR_CANCELLED);
}

static void count_answers(const needle_answer *a, void *data)
{
    int *n = data;
    n[a->correct]++;
    assert_true(a->needle->at >= 0 && a->needle->at < a->n_tokens);
}

static void every_needle_is_asked_for_under_every_policy(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"full", "ivfpq", "window"};
    const int64_t depths[] = {300, 400};
    const needle_params params = {.attn = attn,
                                  .n_attn = 3,
                                  .texts = &f->text,
                                  .n_texts = 1,
                                  .depths = depths,
                                  .n_depths = 2,
                                  .count = 2,
                                  .needles = 2,
                                  .n_answer = 4,
                                  .seed = 3};
    needle_result r[4];
    int n[2] = {0};
    quarry_error error = {0};
    if (needle_measure(f->model, &params, NULL, count_answers, n, r, NULL, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(n[0] + n[1], 8 * 4);
    for (int i = 0; i < 4; i++) assert_int_equal(r[i].asked, 8);
    assert_true(r[0].kld.n > 0 && r[3].kld.n == r[0].kld.n);
    assert_true(r[1].kld.max == 0 && r[1].reading.bytes_share == 1);
    assert_true(r[3].kld.mean > 0 && r[3].reading.rows_share < 0.5);
}

static void a_citation_holds_the_needle_if_its_number_is_in_it(void **state)
{
    const fixture *f = *state;
    const char text[] = "The number is 1234567 here. The number is 1234567 here. The number is 1234567 here.";
    const needle there = {.number = "1234567"}, absent = {.number = "7654321"};
    int32_t *tokens;
    quarry_error error = {0};
    bool holds = true;
    const int64_t n = quarry_tokenize(f->model, text, sizeof text - 1, false, &tokens, &error);
    quarry_session *s = quarry_session_open(f->model, NULL, &error);
    assert_true(n > 0 && s);
    assert_int_equal(quarry_session_read(s, tokens, n, NULL, &error), 0);
    assert_int_equal(cite_first_holds(f->model, s, tokens, n, &there, &holds, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(quarry_session_cite(s, &error), 0);
    assert_int_equal(cite_first_holds(f->model, s, tokens, n, &there, &holds, &error), 0);
    assert_false(holds); /* nothing was asked */
    for (int i = 0; i < 4; i++) assert_int_equal(quarry_session_feed(s, tokens + i, 1, NULL, &error), 0);
    assert_int_equal(cite_first_holds(f->model, s, tokens, n, &there, &holds, &error), 0);
    assert_true(holds);
    assert_int_equal(cite_first_holds(f->model, s, tokens, n, &absent, &holds, &error), 0);
    assert_false(holds);
    quarry_session_close(s);
    quarry_free(tokens);
}

typedef struct grid_seen {
    int n, off;                                           /* answers; needles that lie nearer to another third's middle */
    int asked[2][3], correct[3][2][3], differences[3][3]; /* [length][third], [policy][length][third], [policy][1 + loss] */
} grid_seen;

static void see_grid(const needle_answer *a, void *data)
{
    grid_seen *s = data;
    const int policy = s->n++ % 3, length = a->n_tokens == 400, third = (int)(3 * a->needle->depth);
    assert_true(fabs(a->needle->depth - (third + 0.5) / 3) < 1e-12);
    s->off += fabs((double)a->needle->at / (double)a->n_tokens - a->needle->depth) > 0.25; /* a sentence is a tenth of this text */
    s->asked[length][third] += policy == 0;
    s->correct[policy][length][third] += a->correct;
    s->differences[policy][1 + a->full_correct - a->correct]++;
}

static void needles_take_every_position_in_turn(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"full", "window"};
    const int64_t depths[] = {300, 400};
    needle_params params = {.attn = attn,
                            .n_attn = 2,
                            .texts = &f->text,
                            .n_texts = 1,
                            .depths = depths,
                            .n_depths = 2,
                            .count = 2,
                            .needles = 1,
                            .positions = 3,
                            .n_answer = 3,
                            .seed = 5};
    needle_result r[3];
    needle_cell cells[3][2][3];
    quarry_error error = {0};
    for (params.needles = 1; params.needles <= 3; params.needles += 2) {
        grid_seen s = {0};
        if (needle_measure(f->model, &params, NULL, see_grid, &s, r, &cells[0][0][0], &error) != QUARRY_OK) fail_msg("%s", error.message);
        assert_int_equal(s.n, 2 * 3 * 2 * 3);
        assert_int_equal(s.off, 0);
        for (int p = 0; p < 3; p++) {
            assert_int_equal(r[p].asked, 12);
            assert_true(fabs(r[p].loss - (s.differences[p][2] - s.differences[p][0]) / 12.0) < 1e-12);
            assert_true(r[p].loss_low < r[p].loss && r[p].loss < r[p].loss_high);
            for (int d = 0; d < 2; d++)
                for (int i = 0; i < 3; i++) {
                    assert_int_equal(cells[p][d][i].length, depths[d]);
                    assert_true(fabs(cells[p][d][i].depth - (i + 0.5) / 3) < 1e-12);
                    assert_int_equal(cells[p][d][i].asked, 2);
                    assert_int_equal(s.asked[d][i], 2);
                    assert_int_equal(cells[p][d][i].correct, s.correct[p][d][i]);
                }
        }
    }
    params.needles = 2;
    assert_int_equal(needle_measure(f->model, &params, NULL, NULL, NULL, r, &cells[0][0][0], &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "--positions"));
}

static bool stop_after(int64_t done, int64_t total, void *data)
{
    assert_true(done <= total);
    return done < *(const int64_t *)data;
}

static journal *open_journal(const char *path)
{
    quarry_error error = {0};
    json_t *header = json_pack("{s:i}", "x", 1);
    journal *j = journal_open(path, header, &error);
    json_decref(header);
    if (!j) fail_msg("%s", error.message);
    return j;
}

static void needles_go_on_from_a_journal_to_the_same_result(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"ivfpq", "window"};
    const int64_t depths[] = {300, 300, 400}; /* equal ones draw other needles */
    needle_params params = {.attn = attn,
                            .n_attn = 2,
                            .texts = &f->text,
                            .n_texts = 1,
                            .depths = depths,
                            .n_depths = 3,
                            .count = 1,
                            .needles = 2,
                            .positions = 4,
                            .n_answer = 4,
                            .cite = true,
                            .seed = 3};
    needle_result whole[3], resumed[3];
    needle_cell cells[2][3][3][4];
    quarry_error error = {0};
    char path[] = "/tmp/quarry_needle_XXXXXX";
    assert_true(close(mkstemp(path)) == 0);
    if (needle_measure(f->model, &params, NULL, NULL, NULL, whole, &cells[0][0][0][0], &error) != QUARRY_OK) fail_msg("%s", error.message);
    const int64_t after = 1000; /* while the fourth of six is read */
    const quarry_watch watch = {stop_after, (void *)&after};
    params.journal = open_journal(path);
    assert_int_equal(needle_measure(f->model, &params, &watch, NULL, NULL, resumed, NULL, &error), QUARRY_ERROR_CANCELLED);
    assert_int_equal(journal_count(params.journal), 3);
    journal_close(params.journal);
    params.journal = open_journal(path);
    int n[2] = {0};
    if (needle_measure(f->model, &params, NULL, count_answers, n, resumed, &cells[1][0][0][0], &error) != QUARRY_OK)
        fail_msg("%s", error.message);
    assert_int_equal(n[0] + n[1], 3 * 2 * 3); /* three haystacks of two needles under three policies */
    assert_int_equal(journal_count(params.journal), 6);
    journal_close(params.journal);
    assert_memory_equal(cells[0], cells[1], sizeof cells[0]);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(whole[i].asked, 12);
        assert_true(whole[i].correct == resumed[i].correct && whole[i].kept == resumed[i].kept && whole[i].cited == resumed[i].cited);
        assert_memory_equal(&whole[i].kld, &resumed[i].kld, sizeof whole[i].kld);
        assert_memory_equal(&whole[i].reading, &resumed[i].reading, sizeof whole[i].reading);
        assert_true(whole[i].loss == resumed[i].loss && whole[i].loss_high == resumed[i].loss_high);
    }
    unlink(path);
}

static void a_record_that_is_not_of_needles_is_refused(void **state)
{
    const fixture *f = *state;
    static const char *const records[] = {"{}",
                                          "{\"needles\":[]}",
                                          "{\"needles\":[[]]}",
                                          "{\"needles\":[[{}]]}",
                                          "{\"needles\":[[{\"correct\":true,\"cited\":false,\"kld\":1,\"cost\":[0,0,0,0],\"tokens\":3}]]}",
                                          "{\"needles\":[[{\"correct\":true,\"cited\":false,\"kld\":[0],\"cost\":[0,0,0],\"tokens\":3}]]}",
                                          "{\"needles\":7}"};
    const int64_t depth = 200;
    quarry_error error = {0};
    for (size_t i = 0; i < TEST_COUNT(records); i++) {
        char path[] = "/tmp/quarry_needle_XXXXXX";
        assert_true(close(mkstemp(path)) == 0);
        needle_params params = {.texts = &f->text, .n_texts = 1, .depths = &depth, .n_depths = 1, .count = 1, .needles = 1, .n_answer = 2};
        needle_result r;
        params.journal = open_journal(path);
        assert_int_equal(journal_add(params.journal, "haystack 0 0 0", json_loads(records[i], 0, NULL), &error), QUARRY_OK);
        assert_int_equal(needle_measure(f->model, &params, NULL, NULL, NULL, &r, NULL, &error), QUARRY_ERROR_FORMAT);
        journal_close(params.journal);
        unlink(path);
    }
}

static void needles_need_room(void **state)
{
    const fixture *f = *state;
    const int64_t depth = 120;
    const needle_params params = {
        .texts = &f->text, .n_texts = 1, .depths = &depth, .n_depths = 1, .count = 1, .needles = NEEDLE_MAX, .n_answer = 4};
    needle_result r;
    quarry_error error;
    assert_int_equal(needle_measure(f->model, &params, NULL, NULL, NULL, &r, NULL, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "sentences"));
}

static void lack_of_memory_is_an_error_anywhere(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"window"};
    const int64_t depth = 200;
    const kld_params kld = {.attn = attn,
                            .n_attn = 1,
                            .texts = &f->text,
                            .n_texts = 1,
                            .depth = 200,
                            .n_steps = 2,
                            .samples = 1,
                            .haystacks = 1,
                            .needles = 1,
                            .audit = true};
    const needle_params needles = {.attn = attn,
                                   .n_attn = 1,
                                   .texts = &f->text,
                                   .n_texts = 1,
                                   .depths = &depth,
                                   .n_depths = 1,
                                   .count = 1,
                                   .needles = 1,
                                   .n_answer = 2,
                                   .cite = true};
    kld_result k[4];
    needle_result n[2];
    quarry_error error;
    bool kld_done = false, needle_done = false;
    int64_t failures = 0;
    for (int64_t i = 0; i < 20000 && !(kld_done && needle_done); i = i < 60 ? i + 1 : i + i / 8) {
        memory_fail_after(i);
        const quarry_code kld_code = kld_done ? QUARRY_OK : kld_measure(f->model, &kld, NULL, k, &error);
        memory_fail_after(i);
        const quarry_code needle_code = needle_done ? QUARRY_OK : needle_measure(f->model, &needles, NULL, NULL, NULL, n, NULL, &error);
        memory_fail_after(-1);
        assert_true(kld_code == QUARRY_OK || kld_code == QUARRY_ERROR_MEMORY);
        assert_true(needle_code == QUARRY_OK || needle_code == QUARRY_ERROR_MEMORY);
        kld_done = kld_code == QUARRY_OK;
        needle_done = needle_code == QUARRY_OK;
        failures += kld_code != QUARRY_OK;
    }
    assert_true(kld_done && needle_done && failures > 20);
}

typedef struct enough_seen {
    int n, most;
    size_t length;
} enough_seen;

static bool enough_after(const void *data, const char *text)
{
    enough_seen *s = (enough_seen *)data;
    assert_true(strlen(text) >= s->length);
    s->length = strlen(text);
    return ++s->n == s->most;
}

static void an_answer_ends_where_no_more_of_it_matters(void **state)
{
    const fixture *f = *state;
    quarry_error error = {0};
    const char *specs[] = {"full"};
    quarry_session *session = session_open_policies(f->model, &(quarry_session_params){0}, specs, 1, &error);
    assert_int_equal(quarry_session_read(session, f->tokens, 100, NULL, &error), 0);
    char *whole;
    reading_sum all = {0};
    assert_int_equal(answer_ask(f->model, session, 0, f->tokens, 5, 10, NULL, NULL, &whole, &all, &error), QUARRY_OK);
    assert_in_range(all.tokens, 7, 14); /* the question and all of the answer but its last */
    for (int most = 1; most < 4; most++) {
        enough_seen s = {.most = most};
        char *text;
        reading_sum reading = {0};
        assert_int_equal(answer_ask(f->model, session, 0, f->tokens, 5, 10, enough_after, &s, &text, &reading, &error), QUARRY_OK);
        assert_int_equal(reading.tokens, 5 + most - 1);
        assert_int_equal(strncmp(text, whole, s.length), 0);
        memory_free(text);
    }
    memory_free(whole);
    quarry_session_close(session);
}

static void reading_is_compared_per_token(void **state)
{
    const fixture *f = *state;
    const reading_sum full = {{.rows = 1000}, 10}, half = {{.index_bytes = 100, .table_bytes = 20, .tail_bytes = 4, .rows = 250}, 5};
    eval_reading r;
    reading_relate(&half, &full, f->model, &r);
    assert_true(fabs(r.rows_share - 0.5) < 1e-12);
    assert_true(fabs(r.rows_share + r.index_share + r.tables_share + r.tail_share - r.bytes_share) < 1e-12);
    reading_relate(&full, &full, f->model, &r);
    assert_true(r.rows_share == 1 && r.bytes_share == 1);
}

typedef struct speeds {
    int n;
    speed_result results[8];
} speeds;

static void keep_speed(const speed_result *result, void *data)
{
    speeds *s = data;
    double slowest = 0, fastest = 0;
    s->results[s->n++] = *result;
    for (int i = 0; i < result->n_samples; i++) {
        const double rate = speed_rate(&result->test, result->seconds[i]);
        assert_true(result->seconds[i] > 0 && rate > 0 && isfinite(rate));
        slowest = i == 0 || rate < slowest ? rate : slowest;
        fastest = rate > fastest ? rate : fastest;
    }
    assert_true(result->seconds_mean > 0 && result->seconds_sd >= 0 && result->rate_sd >= 0);
    assert_true(result->rate_mean >= slowest * (1 - 1e-9) && result->rate_mean <= fastest * (1 + 1e-9));
}

static void speed_reports_every_test_of_every_policy(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"full", "window"};
    const speed_test tests[] = {{SPEED_READ, 120, 1}, {SPEED_PROMPT, 16, 1}, {SPEED_ASK, 5, 1}, {SPEED_GEN, 2, 3}};
    const speed_params params = {.attn = attn, .n_attn = 2, .tests = tests, .n_tests = 4, .depth = 100, .repetitions = 2};
    speeds s = {0};
    quarry_error error = {0};
    if (speed_measure(f->model, &params, NULL, keep_speed, &s, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(s.n, 8);
    for (int i = 0; i < s.n; i++) {
        assert_memory_equal(&s.results[i].test, &tests[i / 2], sizeof *tests);
        assert_string_equal(s.results[i].attn, attn[i % 2]);
        assert_int_equal(s.results[i].n_samples, 2);
        assert_int_equal(s.results[i].n_depth, tests[i / 2].kind == SPEED_READ ? 0 : 100);
    }
}

static void speed_counts_the_tokens_of_all_sequences(void **state)
{
    (void)state;
    assert_true(fabs(speed_rate(&(speed_test){SPEED_GEN, 32, 8}, 2) - 128) < 1e-9);
    assert_true(fabs(speed_rate(&(speed_test){SPEED_READ, 7700, 1}, 5) - 1540) < 1e-9);
}

typedef struct fill {
    int64_t total, calls;
} fill;

static bool note_fill(int64_t done, int64_t total, void *data)
{
    fill *f = data;
    assert_true(done <= total);
    f->total = total;
    f->calls++;
    return true;
}

static int64_t tokens_to_fill(const fixture *f, const speed_test *tests, int n_tests)
{
    const char *attn[] = {"window"};
    const speed_params params = {.attn = attn, .n_attn = 1, .tests = tests, .n_tests = n_tests, .depth = 40, .repetitions = 1};
    fill filled = {0};
    const quarry_watch watch = {note_fill, &filled};
    speeds s = {0};
    quarry_error error = {0};
    if (speed_measure(f->model, &params, &watch, keep_speed, &s, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_true(filled.calls > 0);
    return filled.total;
}

static void the_depth_is_filled_once_for_each_sequence(void **state)
{
    const speed_test alone[] = {{SPEED_PROMPT, 8, 1}, {SPEED_GEN, 2, 1}, {SPEED_GEN, 1, 1}},
                     batch[] = {{SPEED_GEN, 2, 1}, {SPEED_GEN, 2, 3}}, nothing[] = {{SPEED_READ, 8, 1}};
    assert_int_equal(tokens_to_fill(*state, alone, 3), 40);
    assert_int_equal(tokens_to_fill(*state, batch, 2), 120);
    assert_int_equal(tokens_to_fill(*state, nothing, 1), 0);
}

static void only_decoding_takes_several_sequences(void **state)
{
    const fixture *f = *state;
    const char *attn[] = {"full"};
    const speed_test wrong[] = {{SPEED_PROMPT, 8, 2}, {SPEED_GEN, 0, 1}, {SPEED_GEN, 1, 0}};
    for (int i = 0; i < 3; i++) {
        const speed_params params = {.attn = attn, .n_attn = 1, .tests = wrong + i, .n_tests = 1, .repetitions = 1};
        quarry_error error = {0};
        assert_int_equal(speed_measure(f->model, &params, NULL, keep_speed, NULL, &error), QUARRY_ERROR_ARGUMENT);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kld_of_full_is_zero_and_window_reads_less),
        cmocka_unit_test(kld_asks_for_enough_text),
        cmocka_unit_test(unknown_policy_is_an_error),
        cmocka_unit_test(too_deep_is_said_before_reading),
        cmocka_unit_test(a_watcher_can_stop_the_measurement),
        cmocka_unit_test(every_needle_is_asked_for_under_every_policy),
        cmocka_unit_test(a_citation_holds_the_needle_if_its_number_is_in_it),
        cmocka_unit_test(needles_take_every_position_in_turn),
        cmocka_unit_test(needles_go_on_from_a_journal_to_the_same_result),
        cmocka_unit_test(a_record_that_is_not_of_needles_is_refused),
        cmocka_unit_test(needles_need_room),
        cmocka_unit_test(lack_of_memory_is_an_error_anywhere),
        cmocka_unit_test(an_answer_ends_where_no_more_of_it_matters),
        cmocka_unit_test(reading_is_compared_per_token),
        cmocka_unit_test(speed_reports_every_test_of_every_policy),
        cmocka_unit_test(speed_counts_the_tokens_of_all_sequences),
        cmocka_unit_test(the_depth_is_filled_once_for_each_sequence),
        cmocka_unit_test(only_decoding_takes_several_sequences),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
