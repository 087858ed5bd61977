/* The tasks on the real model named by QUARRY_TEST_MODEL, at small depths. */
#include "eval/eval.h"
#include "test.h"

typedef struct fixture {
    quarry_model *model;
    int32_t *tokens;
    eval_text text;
} fixture;

/* Sentences that are all different, about 1,500 tokens. */
static int64_t make_text(const quarry_model *model, int32_t **tokens)
{
    static const char *const who[] = {"The miller",  "Her sister",  "An old sailor", "The gardener",
                                      "Our teacher", "A traveller", "The captain"};
    static const char *const did[] = {"walked down to", "wrote a letter about", "had long forgotten", "could not stop talking of",
                                      "sat quietly near"};
    static const char *const what[] = {"the river", "the church on the hill", "the winter market", "a house with green doors"};
    char text[8192];
    size_t n = 0;
    for (int i = 0; i < 120; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s %s %s.%s", who[i % 7], did[i % 5], what[i / 5 % 4], i % 6 == 5 ? "\n" : " ");
    return quarry_tokenize(model, text, n, false, tokens, NULL);
}

static int open_model(void **state)
{
    static fixture f;
    const char *path = getenv("QUARRY_TEST_MODEL");
    *state = NULL;
    if (!path) return 0;
    quarry_error error;
    if (!(f.model = quarry_model_open(path, NULL, &error))) {
        fprintf(stderr, "%s\n", error.message);
        return -1;
    }
    const int64_t n = make_text(f.model, &f.tokens);
    f.text = (eval_text){"sentences", f.tokens, n};
    *state = &f;
    return n > 0 ? 0 : -1;
}

static int close_model(void **state)
{
    const fixture *f = *state;
    if (f) {
        quarry_free(f->tokens);
        quarry_model_close(f->model);
    }
    return 0;
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
    assert_true(r[1].kld.mean < 0.001 && r[1].agreement > 0.9);
    assert_true(r[2].kld.mean > 10 * r[1].kld.mean && r[2].perplexity > r[0].perplexity);
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
                                  .seed = 3};
    needle_result r[3];
    int n[2] = {0};
    quarry_error error = {0};
    if (needle_measure(f->model, &params, NULL, count_answers, n, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(n[0] + n[1], 6);
    assert_int_equal(r[0].asked, 2);
    assert_int_equal(r[0].full_correct, 2);
    assert_int_equal(r[1].kept, 2);
    assert_true(r[1].kld.max == 0);
    assert_int_equal(r[2].kept, 0);
    assert_true(r[2].kld.mean > 0.01 && r[2].reading.rows_share < 0.3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(window_predicts_less_well_than_full),
        cmocka_unit_test(full_finds_needles_that_window_cannot_see),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
