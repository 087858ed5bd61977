/* Metrics against values computed elsewhere (NumPy, SciPy), the needle builder, and lists from the command line. */
#include <math.h>

#include "eval/eval.h"
#include "test.h"

static void close_to(double got, double expected, double bound)
{
    if (!(fabs(got - expected) <= bound)) fail_msg("got %.17g, expected %.17g ± %g", got, expected, bound);
}

/* ---- metrics ---- */

static const float logits_p[5] = {0.5f, -1.25f, 3.0f, 2.0f, -80.0f}, logits_q[5] = {0.25f, -1.0f, 2.5f, 2.75f, -3.0f};

static void log_softmax_matches_numpy(void **state)
{
    (void)state;
    const double expected[5] = {-2.8813286, -4.6313286, -0.3813286, -1.3813286, -83.3813286};
    double got[5];
    metric_log_softmax(logits_p, 5, got);
    for (int i = 0; i < 5; i++) close_to(got[i], expected[i], 1e-7);
}

static void log_softmax_survives_large_logits(void **state)
{
    (void)state;
    const float logits[3] = {30000.0f, 29999.0f, -30000.0f};
    double got[3];
    metric_log_softmax(logits, 3, got);
    close_to(got[0], -0.31326168751822286, 1e-15); /* -log(1 + 1/e) */
    close_to(got[2], -60000.31326168751822, 1e-9);
}

static void kld_matches_numpy(void **state)
{
    (void)state;
    double p[5], q[5];
    metric_log_softmax(logits_p, 5, p);
    metric_log_softmax(logits_q, 5, q);
    close_to(metric_kld(p, q, 5), 0.1685932533079157, 1e-15);
}

static void kld_keeps_small_differences(void **state)
{
    (void)state;
    /* two outcomes 0.5 ± e: KLD = -log(1 - 4 e²) / 2, about 2 e² */
    const double e = 1e-5, p[2] = {log(0.5), log(0.5)}, q[2] = {log(0.5 + e), log(0.5 - e)};
    close_to(metric_kld(p, q, 2), 2 * e * e, 1e-15);
}

static void kld_of_itself_is_zero(void **state)
{
    (void)state;
    double p[5];
    metric_log_softmax(logits_p, 5, p);
    assert_true(metric_kld(p, p, 5) == 0);
}

static void kld_skips_impossible_tokens_but_keeps_nan(void **state)
{
    (void)state;
    const double p[2] = {0, -INFINITY}, q[2] = {log(0.25), log(0.75)}, bad[2] = {NAN, NAN};
    close_to(metric_kld(p, q, 2), log(4), 1e-15);
    assert_true(isnan(metric_kld(p, bad, 2)));
}

static void argmax_prefers_the_lower_of_equals(void **state)
{
    (void)state;
    const float logits[4] = {-1, 2, 2, 1};
    assert_int_equal(metric_argmax(logits, 4), 1);
}

static void summary_matches_numpy(void **state)
{
    (void)state;
    const double values[7] = {5, 1, 4, 2, 3, 9.5, 7.25};
    series s = {0};
    metric_summary m;
    for (int i = 0; i < 7; i++) assert_int_equal(series_push(&s, values[i], NULL), QUARRY_OK);
    series_summarise(&s, &m);
    assert_int_equal(m.n, 7);
    close_to(m.mean, 4.535714285714286, 1e-14);
    close_to(m.sd, 2.9945386797905793, 1e-14);
    close_to(m.standard_error, 1.1318292340127933, 1e-14);
    close_to(m.median, 4, 0);
    close_to(m.p99, 9.365, 1e-14);
    close_to(m.max, 9.5, 0);
    close_to(metric_quantile(s.values, s.n, 0.1), 1.6, 1e-14);
    series_free(&s);
}

static void summary_of_one_value_has_no_spread(void **state)
{
    (void)state;
    series s = {0};
    metric_summary m;
    assert_int_equal(series_push(&s, 3, NULL), QUARRY_OK);
    series_summarise(&s, &m);
    assert_true(m.mean == 3 && m.sd == 0 && m.standard_error == 0 && m.median == 3 && m.p99 == 3 && m.max == 3);
    series_free(&s);
    series_summarise(&s, &m);
    assert_true(m.n == 0 && m.mean == 0);
}

static void series_reports_lack_of_memory(void **state)
{
    (void)state;
    series s = {0};
    quarry_error error;
    memory_fail_after(0);
    const quarry_code code = series_push(&s, 1, &error);
    memory_fail_after(-1);
    assert_int_equal(code, QUARRY_ERROR_MEMORY);
    assert_int_equal(s.n, 0);
    series_free(&s);
}

/* R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3. */
static void wilson_matches_published_intervals(void **state)
{
    (void)state;
    const struct {
        int64_t hits, n;
        double low, high;
    } rows[] = {{81, 263, 0.2553, 0.3662}, {15, 148, 0.0624, 0.1605}, {0, 20, 0, 0.1611}, {1, 29, 0.0061, 0.1718}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double low, high;
        metric_wilson(rows[i].hits, rows[i].n, 1.959964, &low, &high);
        close_to(low, rows[i].low, 5e-5);
        close_to(high, rows[i].high, 5e-5);
        metric_wilson(rows[i].n - rows[i].hits, rows[i].n, 1.959964, &low, &high);
        close_to(low, 1 - rows[i].high, 5e-5);
        close_to(high, 1 - rows[i].low, 5e-5);
    }
}

static void loss_interval_is_normal_or_the_rule_of_three(void **state)
{
    (void)state;
    double low, high, d[5] = {1, 0, -1, 1, 0}, mean = 0, squares = 0;
    for (int i = 0; i < 5; i++) mean += d[i] / 5;
    for (int i = 0; i < 5; i++) squares += (d[i] - mean) * (d[i] - mean);
    metric_loss_interval(5, mean, sqrt(squares / 4), &low, &high);
    assert_true(fabs(low - (0.2 - 1.96 * sqrt(squares / 20))) < 1e-12 && fabs(high - (0.2 + 1.96 * sqrt(squares / 20))) < 1e-12);
    metric_loss_interval(30, 0, 0, &low, &high);
    assert_true(fabs(low + 0.1) < 1e-12 && fabs(high - 0.1) < 1e-12);
    metric_loss_interval(2, 0.9, 0.1, &low, &high);
    assert_true(low < 0.9 && high == 1);
    metric_loss_interval(0, 0, 0, &low, &high);
    assert_true(low == -1 && high == 1);
}

static void wilson_of_nothing_says_nothing(void **state)
{
    (void)state;
    double low, high;
    metric_wilson(0, 0, 1.96, &low, &high);
    assert_true(low == 0 && high == 1);
}

/* ---- lists ---- */

static void numbers_are_parsed(void **state)
{
    (void)state;
    int64_t *numbers;
    assert_int_equal(list_parse_numbers("0,512,1024", "-p", 0, 4096, &numbers, NULL), 3);
    assert_int_equal(numbers[0], 0);
    assert_int_equal(numbers[2], 1024);
    memory_free(numbers);
}

static void bad_numbers_are_refused_by_name(void **state)
{
    (void)state;
    const char *const bad[] = {"", ",", "1,", ",1", "1,,2", "1 2", "x", "1x", "-1", "4097", "99999999999999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int64_t *numbers;
        quarry_error error;
        assert_int_equal(list_parse_numbers(bad[i], "-p", 0, 4096, &numbers, &error), QUARRY_ERROR_ARGUMENT);
        assert_non_null(strstr(error.message, "-p"));
    }
}

static void policies_keep_their_options(void **state)
{
    (void)state;
    policy_list list = {0};
    assert_int_equal(policy_list_add(&list, "ivfpq:budget=0.02,tail=1,window,quest:page=16", NULL), QUARRY_OK);
    assert_int_equal(policy_list_add(&list, "full", NULL), QUARRY_OK);
    assert_int_equal(list.n, 4);
    assert_string_equal(list.specs[0], "ivfpq:budget=0.02,tail=1");
    assert_string_equal(list.specs[1], "window");
    assert_string_equal(list.specs[2], "quest:page=16");
    assert_string_equal(list.specs[3], "full");
    policy_list_free(&list);
}

static void empty_policies_are_refused(void **state)
{
    (void)state;
    const char *const bad[] = {"", ",full", "full,", "full,,window"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        policy_list list = {0};
        assert_int_equal(policy_list_add(&list, bad[i], NULL), QUARRY_ERROR_ARGUMENT);
        policy_list_free(&list);
    }
}

/* ---- needles ---- */

/* A vocabulary of six words; sentences of `period` tokens. Tokens from 100 on are needles. */
enum { WORD = 0, STOP = 1, TITLE = 2, QUOTED_STOP = 3, BREAK = 4, GLUED = 5, N_TEXT = 1000, PERIOD = 10, NEEDLE = 100, N_SENTENCE = 7 };

static const char *fake_text(const void *data, int32_t token, size_t *n_bytes)
{
    static const char *const words[] = {" word", ".", " Mr", ".\"", "\n", "glued"};
    (void)data;
    *n_bytes = strlen(words[token]);
    return words[token];
}

static void sentences_start_after_full_stops(void **state)
{
    (void)state;
    const int32_t tokens[] = {WORD, STOP, WORD, TITLE, STOP, WORD, QUOTED_STOP, BREAK, WORD, STOP, GLUED, STOP};
    const bool expected[] = {false, false, true, false, false, false, false, true, false, false, false, false};
    bool starts[12];
    sentence_starts(tokens, 12, fake_text, NULL, starts);
    for (int i = 0; i < 12; i++) assert_int_equal(starts[i], expected[i]);
}

typedef struct fake_hay {
    int32_t text[N_TEXT];
    bool starts[N_TEXT];
    int32_t ids[NEEDLE_MAX][N_SENTENCE];
    token_list sentences[NEEDLE_MAX];
    needle needles[NEEDLE_MAX];
} fake_hay;

static void hay_make(fake_hay *h)
{
    for (int i = 0; i < N_TEXT; i++) h->text[i] = i % PERIOD == PERIOD - 1 ? STOP : WORD;
    sentence_starts(h->text, N_TEXT, fake_text, NULL, h->starts);
    for (int i = 0; i < NEEDLE_MAX; i++) {
        for (int j = 0; j < N_SENTENCE; j++) h->ids[i][j] = NEEDLE + i * N_SENTENCE + j;
        h->sentences[i] = (token_list){h->ids[i], N_SENTENCE, N_SENTENCE};
    }
}

/* The haystack without its needles must be the text again. */
static void hay_check(const fake_hay *h, const int32_t *out, int64_t n_tokens, int64_t first, int n_needles)
{
    int64_t text = first;
    int found[NEEDLE_MAX] = {0};
    for (int64_t i = 0; i < n_tokens;) {
        if (out[i] < NEEDLE) {
            assert_int_equal(out[i++], h->text[text++]);
            continue;
        }
        const int which = (out[i] - NEEDLE) / N_SENTENCE;
        assert_in_range(which, 0, n_needles - 1);
        assert_int_equal(h->needles[which].at, i);
        assert_memory_equal(out + i, h->ids[which], sizeof h->ids[which]);
        found[which]++;
        i += N_SENTENCE;
    }
    assert_int_equal(text - first, n_tokens - n_needles * N_SENTENCE);
    for (int i = 0; i < n_needles; i++) assert_int_equal(found[i], 1);
}

static void needle_lies_once_at_its_depth_in_exactly_n_tokens(void **state)
{
    (void)state;
    fake_hay h;
    int32_t out[N_TEXT];
    const double depths[] = {0, 0.013, 0.5, 0.77, 0.999};
    hay_make(&h);
    for (size_t d = 0; d < sizeof depths / sizeof *depths; d++) {
        const int64_t n_tokens = 400, first = 200;
        h.needles[0].depth = depths[d];
        assert_true(haystack_build(h.text, h.starts, N_TEXT, first, h.needles, h.sentences, 1, out, n_tokens));
        hay_check(&h, out, n_tokens, first, 1);
        const double target = depths[d] * (double)(n_tokens - N_SENTENCE);
        assert_true(fabs((double)h.needles[0].at - target) <= PERIOD);
        const int64_t next = h.needles[0].at + first;
        assert_true(h.starts[next]);
    }
}

static void several_needles_lie_in_any_order(void **state)
{
    (void)state;
    fake_hay h;
    int32_t out[N_TEXT];
    hay_make(&h);
    const double depths[4] = {0.9, 0.1, 0.1, 0.4};
    for (int i = 0; i < 4; i++) h.needles[i].depth = depths[i];
    assert_true(haystack_build(h.text, h.starts, N_TEXT, 35, h.needles, h.sentences, 4, out, 500));
    hay_check(&h, out, 500, 35, 4);
    assert_true(h.needles[1].at < h.needles[2].at && h.needles[2].at < h.needles[3].at && h.needles[3].at < h.needles[0].at);
}

static void text_without_sentences_takes_a_needle_anywhere(void **state)
{
    (void)state;
    fake_hay h;
    int32_t out[N_TEXT];
    hay_make(&h);
    memset(h.starts, 0, sizeof h.starts);
    h.needles[0].depth = 0.5;
    assert_true(haystack_build(h.text, h.starts, N_TEXT, 0, h.needles, h.sentences, 1, out, 107));
    hay_check(&h, out, 107, 0, 1);
    assert_int_equal(h.needles[0].at, 50);
}

static void haystack_uses_all_of_the_text_but_no_more(void **state)
{
    (void)state;
    fake_hay h;
    int32_t out[N_TEXT + N_SENTENCE];
    hay_make(&h);
    h.needles[0].depth = 0.3;
    assert_true(haystack_build(h.text, h.starts, N_TEXT, 0, h.needles, h.sentences, 1, out, N_TEXT + N_SENTENCE));
    hay_check(&h, out, N_TEXT + N_SENTENCE, 0, 1);
    assert_false(haystack_build(h.text, h.starts, N_TEXT, 1, h.needles, h.sentences, 1, out, N_TEXT + N_SENTENCE));
    assert_false(haystack_build(h.text, h.starts, N_TEXT, 0, h.needles, h.sentences, 1, out, N_SENTENCE));
}

static void drawn_needles_are_distinct_and_repeatable(void **state)
{
    (void)state;
    random_state random;
    needle a[NEEDLE_MAX], b[NEEDLE_MAX];
    random_seed(&random, 7);
    needle_draw(a, NEEDLE_MAX, &random);
    random_seed(&random, 7);
    needle_draw(b, NEEDLE_MAX, &random);
    for (int i = 0; i < NEEDLE_MAX; i++) {
        assert_string_equal(a[i].key, b[i].key);
        assert_string_equal(a[i].number, b[i].number);
        assert_int_equal(strlen(a[i].number), NEEDLE_DIGITS);
        assert_non_null(strchr(a[i].key, '-'));
        assert_true(a[i].depth >= (double)i / NEEDLE_MAX && a[i].depth < (i + 1.0) / NEEDLE_MAX);
        for (int j = 0; j < i; j++) assert_true(strcmp(a[i].key, a[j].key) != 0 && strcmp(a[i].number, a[j].number) != 0);
    }
}

static void sentence_and_question_name_the_needle(void **state)
{
    (void)state;
    const needle s = {.key = "copper-lantern", .number = "7316402"};
    char text[160];
    needle_sentence(&s, text, sizeof text);
    assert_string_equal(text, " One of the special magic numbers for copper-lantern is: 7316402.");
    needle_question(&s, text, sizeof text);
    assert_non_null(strstr(text, "copper-lantern"));
    assert_null(strstr(text, "7316402"));
}

static void answers_are_found_as_whole_numbers(void **state)
{
    (void)state;
    const needle s = {.number = "7316402"};
    const char *const right[] = {"7316402", "It is 7316402.", "It is 7,316,402!", "not 1 but 7316402"};
    const char *const wrong[] = {"", "731640", "73164021", "17316402", "7316403", "7 316 402", "7,316,40"};
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) assert_true(needle_answered(&s, right[i], strlen(right[i])));
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) assert_false(needle_answered(&s, wrong[i], strlen(wrong[i])));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_softmax_matches_numpy),
        cmocka_unit_test(log_softmax_survives_large_logits),
        cmocka_unit_test(kld_matches_numpy),
        cmocka_unit_test(kld_keeps_small_differences),
        cmocka_unit_test(kld_of_itself_is_zero),
        cmocka_unit_test(kld_skips_impossible_tokens_but_keeps_nan),
        cmocka_unit_test(argmax_prefers_the_lower_of_equals),
        cmocka_unit_test(summary_matches_numpy),
        cmocka_unit_test(summary_of_one_value_has_no_spread),
        cmocka_unit_test(series_reports_lack_of_memory),
        cmocka_unit_test(wilson_matches_published_intervals),
        cmocka_unit_test(wilson_of_nothing_says_nothing),
        cmocka_unit_test(loss_interval_is_normal_or_the_rule_of_three),
        cmocka_unit_test(numbers_are_parsed),
        cmocka_unit_test(bad_numbers_are_refused_by_name),
        cmocka_unit_test(policies_keep_their_options),
        cmocka_unit_test(empty_policies_are_refused),
        cmocka_unit_test(sentences_start_after_full_stops),
        cmocka_unit_test(needle_lies_once_at_its_depth_in_exactly_n_tokens),
        cmocka_unit_test(several_needles_lie_in_any_order),
        cmocka_unit_test(text_without_sentences_takes_a_needle_anywhere),
        cmocka_unit_test(haystack_uses_all_of_the_text_but_no_more),
        cmocka_unit_test(drawn_needles_are_distinct_and_repeatable),
        cmocka_unit_test(sentence_and_question_name_the_needle),
        cmocka_unit_test(answers_are_found_as_whole_numbers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
