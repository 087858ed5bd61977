/* The tasks on the real model named by QUARRY_TEST_MODEL, at small depths. */
#include "eval_fixture.h"

#include <unistd.h>

#include "eval/journal.h"

static int open_model(void **state)
{
    static fixture f;
    const char *path = getenv("QUARRY_TEST_MODEL");
    *state = NULL;
    if (!path) return 0;
    *state = &f;
    return fixture_open(&f, path);
}

static const fixture *need_model(void **state)
{
    if (!*state) skip();
    return *state;
}

static void window_predicts_less_well_than_full(void **state)
{
    const fixture *f = need_model(state);
    const char *attn[] = {"ivfpq:budget=1", "window"};
    const kld_params params = {.attn = attn, .n_attn = 2, .texts = &f->text, .n_texts = 1, .depth = 300, .n_steps = 8, .samples = 2};
    kld_result r[3];
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_true(r[0].perplexity > 1 && r[0].perplexity < 100);
    assert_true(r[1].kld.steps.mean < 0.001 && r[1].agreement > 0.9);
    assert_true(r[2].kld.steps.mean > 10 * r[1].kld.steps.mean && r[2].perplexity > r[0].perplexity);
}

static void full_knows_the_digits_that_window_cannot_see(void **state)
{
    const fixture *f = need_model(state);
    const char *attn[] = {"ivfpq:budget=1", "window"};
    const kld_params params = {
        .attn = attn, .n_attn = 2, .texts = &f->text, .n_texts = 1, .depth = 600, .haystacks = 2, .needles = 2, .seed = 3};
    kld_result r[3];
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(r[0].n_samples, 4);
    assert_int_equal(r[0].kld.steps.n, 4 * NEEDLE_DIGITS);
    assert_true(r[0].full_correct >= 2 && r[0].perplexity < 1.5);
    assert_int_equal(r[1].kept, r[0].full_correct);
    assert_int_equal(r[2].correct, 0);
    assert_true(r[2].kld.steps.mean > 100 * r[1].kld.steps.mean && r[2].dnll.steps.mean > 0.5);
}

static void count_answers(const needle_answer *a, void *data)
{
    int *n = data;
    n[a->correct]++;
    assert_true(a->needle->at >= 0 && a->needle->at < a->n_tokens);
}

static void full_finds_needles_that_window_cannot_see(void **state)
{
    const fixture *f = need_model(state);
    const char *attn[] = {"full", "window"};
    const int64_t depth = 600;
    const needle_params params = {.attn = attn,
                                  .n_attn = 2,
                                  .texts = &f->text,
                                  .n_texts = 1,
                                  .depths = &depth,
                                  .n_depths = 1,
                                  .count = 2,
                                  .needles = 1,
                                  .n_answer = 32,
                                  .cite = true,
                                  .seed = 3};
    needle_result r[3];
    int n[2] = {0};
    quarry_error error = {0};
    if (needle_measure(f->model, &params, NULL, count_answers, n, r, NULL, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(n[0] + n[1], 6);
    assert_int_equal(r[0].asked, 2);
    assert_int_equal(r[0].full_correct, 2);
    assert_int_equal(r[1].kept, 2);
    assert_true(r[1].kld.max == 0);
    assert_int_equal(r[0].cited, 2);
    assert_int_equal(r[1].cited, 2);
    assert_int_equal(r[2].cited, 0);
    assert_int_equal(r[2].kept, 0);
    assert_true(r[2].kld.mean > 0.01 && r[2].reading.rows_share < 0.3);
}

static void ruler_scores_full_above_window_and_goes_on_from_a_journal(void **state)
{
    const fixture *f = need_model(state);
    const char *attn[] = {"ivfpq", "window"};
    const int64_t length = 900;
    char path[] = "/tmp/quarry_ruler_XXXXXX";
    const int file = mkstemp(path);
    assert_true(file >= 0);
    close(file);
    unlink(path);
    json_t *header = json_pack("{s:s}", "command", "eval ruler");
    ruler_params params = {.attn = attn, .n_attn = 2, .lengths = &length, .n_lengths = 1, .samples = 3, .seed = 1};
    params.tasks[ruler_task_find("niah_single_1", 13)] = params.tasks[ruler_task_find("vt", 2)] = true;
    score_result r[2][9];
    assert_int_equal(ruler_n_results(&params), 9);
    for (int round = 0; round < 2; round++) { /* the second reads what the first has kept */
        quarry_error error = {0};
        params.journal = journal_open(path, header, &error);
        if (!params.journal) fail_msg("%s", error.message);
        if (ruler_measure(f->model, &params, NULL, NULL, NULL, r[round], &error) != QUARRY_OK) fail_msg("%s", error.message);
        assert_int_equal(journal_count(params.journal), 6);
        journal_close(params.journal);
    }
    const score_result *found = r[0], *all = &r[0][6];
    assert_string_equal(found[0].task, "niah_single_1");
    assert_true(found[0].score == 1 && found[0].counted && found[1].score == 1);
    assert_true(found[2].score == 0 && found[2].loss == 1 && found[2].score_full == 1);
    assert_string_equal(all[0].task, "all");
    assert_true(all[2].loss > 0.9 && all[1].loss < 0.1 && all[1].n >= 3);
    assert_true(found[1].reading.bytes_share > 0.05 && found[1].reading.bytes_share < 1);
    for (int i = 0; i < 9; i++) {
        assert_true(r[0][i].score == r[1][i].score && r[0][i].loss_high == r[1][i].loss_high);
        assert_true(r[0][i].reading.bytes_share == r[1][i].reading.bytes_share);
    }
    json_decref(header);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(window_predicts_less_well_than_full),
        cmocka_unit_test(full_knows_the_digits_that_window_cannot_see),
        cmocka_unit_test(ruler_scores_full_above_window_and_goes_on_from_a_journal),
        cmocka_unit_test(full_finds_needles_that_window_cannot_see),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
