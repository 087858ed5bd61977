/* RULER's generators against the definitions of the paper: counts, places, frequencies, and that a seed draws the same again. */
#include "test.h"

#include <ctype.h>
#include <math.h>

#include "eval/ruler.h"

static ruler_source source;

/* 400 sentences of words that are all different. */
static int make_source(void **state)
{
    (void)state;
    static char text[64 * 1024];
    size_t n = 0;
    for (int i = 0; i < 400; i++) {
        for (int j = 0; j < 5; j++) {
            int word = i * 5 + j;
            n += (size_t)snprintf(text + n, sizeof text - n, "%sw%c%c%c%c", j ? " " : "", 'a' + word % 26, 'a' + word / 26 % 26,
                                  'a' + word / 676 % 26, 'b' + j);
        }
        n += (size_t)snprintf(text + n, sizeof text - n, ".%c", i % 7 == 6 ? '\n' : ' ');
    }
    quarry_error error = {0};
    return ruler_source_make(&source, text, n, &error) == QUARRY_OK ? 0 : -1;
}

static int free_source(void **state)
{
    (void)state;
    ruler_source_free(&source);
    return 0;
}

static ruler_sample make(const char *task, int64_t units, int64_t tokens, uint64_t seed)
{
    ruler_sample s;
    int64_t used;
    quarry_error error = {0};
    int t = ruler_task_find(task, strlen(task));
    assert_true(t >= 0);
    if (ruler_generate(t, &source, units, tokens, seed, &s, &used, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(used, units);
    return s;
}

static int count(const char *text, const char *what)
{
    int n = 0;
    for (const char *at = text; (at = strstr(at, what)); at += strlen(what)) n++;
    return n;
}

static void sources_are_sentences_and_distinct_words(void **state)
{
    (void)state;
    assert_int_equal(source.n_sentences, 400);
    for (int64_t i = 1; i < source.n_words; i++) assert_true(strcmp(source.words[i - 1], source.words[i]) < 0);
    assert_int_equal(source.n_words, 1600); /* the last of each sentence ends with its full stop */
}

/* How often each task says its needle, what it asks for, and that the answer stands in the context. */
static void needles_are_as_many_as_defined(void **state)
{
    (void)state;
    const struct {
        const char *task, *kind;
        int needles, answers, of_unit; /* needles in each unit */
    } cases[] = {{"niah_single_1", "numbers", 1, 1, 0},   {"niah_single_2", "numbers", 1, 1, 0},   {"niah_single_3", "uuids", 1, 1, 0},
                 {"niah_multikey_1", "numbers", 4, 1, 0}, {"niah_multikey_2", "numbers", 1, 1, 1}, {"niah_multikey_3", "uuids", 1, 1, 1},
                 {"niah_multivalue", "numbers", 4, 4, 0}, {"niah_multiquery", "numbers", 4, 4, 0}};
    for (size_t i = 0; i < TEST_COUNT(cases); i++)
        for (uint64_t seed = 1; seed < 20; seed++) {
            char marker[64];
            ruler_sample s = make(cases[i].task, 50, 8000, seed);
            snprintf(marker, sizeof marker, "One of the special magic %s for ", cases[i].kind);
            assert_int_equal(count(s.context, marker), cases[i].needles + 50 * cases[i].of_unit);
            assert_int_equal(s.n_answers, cases[i].answers);
            for (int a = 0; a < s.n_answers; a++) {
                assert_int_equal(count(s.context, s.answers[a]), 1); /* once: no distractor has the same */
                assert_int_equal(strlen(s.answers[a]), cases[i].kind[0] == 'u' ? 36 : 7);
                assert_null(strstr(s.question, s.answers[a]));
            }
            if (s.n_answers == 1) assert_int_equal(ruler_score(&s, s.context), 1);
            ruler_sample_free(&s);
        }
}

/* The key that is asked for is the answer's, and those of distractors are others. */
static void the_question_names_the_answers_key(void **state)
{
    (void)state;
    const char *const tasks[] = {"niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue"};
    for (size_t i = 0; i < TEST_COUNT(tasks); i++)
        for (uint64_t seed = 1; seed < 10; seed++) {
            ruler_sample s = make(tasks[i], 300, 8000, seed);
            char key[64], sentence[256];
            const char *from = strstr(s.question, " for ") + 5, *to = strstr(from, " mentioned");
            snprintf(key, sizeof key, "%.*s", (int)(to - from), from);
            for (int a = 0; a < s.n_answers; a++) {
                snprintf(sentence, sizeof sentence, "for %s is: %s.", key, s.answers[a]);
                assert_int_equal(count(s.context, sentence), 1);
            }
            snprintf(sentence, sizeof sentence, "for %s is: ", key);
            assert_int_equal(count(s.context, sentence), s.n_answers);
            assert_non_null(strstr(s.prefix, key));
            ruler_sample_free(&s);
        }
}

static void depths_are_spread_over_the_haystack(void **state)
{
    (void)state;
    double least = 1, most = 0;
    for (uint64_t seed = 0; seed < 200; seed++) {
        ruler_sample s = make("niah_single_1", 100, 8000, seed);
        double depth = (double)(strstr(s.context, "One of the") - s.context) / (double)strlen(s.context);
        least = depth < least ? depth : least;
        most = depth > most ? depth : most;
        ruler_sample_free(&s);
    }
    assert_true(least < 0.06 && most > 0.94);
}

static void variables_are_one_chain_of_four_hops(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed < 50; seed++) {
        ruler_sample s = make("vt", 30, 4000, seed);
        const char *text = strstr(strstr(s.context, "they are: "), "Memorize"); /* after the example */
        unsigned value;
        char line[64], *before = s.answers[0];
        assert_int_equal(s.n_answers, 5);
        assert_int_equal(sscanf(strstr(s.question, "value "), "value %u", &value), 1);
        snprintf(line, sizeof line, "VAR %s = %u\n", before, value);
        const char *at = strstr(text, line);
        for (int i = 1; i < 5; i++) { /* each in the text after the one that it takes */
            assert_non_null(at);
            snprintf(line, sizeof line, "VAR %s = VAR %s\n", s.answers[i], s.answers[i - 1]);
            at = strstr(at, line);
        }
        assert_non_null(at);
        assert_int_equal(count(text, "VAR "), 9);
        assert_int_equal(count(text, "The grass is green."), 30);
        ruler_sample_free(&s);
    }
}

static int words_in(const char *text, const char *word)
{
    int n = 0;
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length) n += at[-1] == ' ' && !isalpha((unsigned char)at[length]);
    return n;
}

static void common_words_are_ten_times_as_common(void **state)
{
    (void)state;
    const struct {
        int64_t tokens;
        int often, seldom;
    } cases[] = {{2000, 6, 1}, {8000, 30, 3}};
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        ruler_sample s = make("cwe", 120, cases[i].tokens, 5);
        const char *list = strstr(strstr(s.context, "list are:"), "Below is");
        assert_int_equal(s.n_answers, 10);
        for (int a = 0; a < 10; a++) assert_int_equal(words_in(list, s.answers[a]), cases[i].often);
        int entries = 10 * cases[i].often + 110 * cases[i].seldom, seldom = 0;
        char last[16];
        snprintf(last, sizeof last, " %d. ", entries);
        assert_non_null(strstr(list, last));
        snprintf(last, sizeof last, " %d. ", entries + 1);
        assert_null(strstr(list, last));
        for (int64_t w = 0; w < source.n_words; w++) seldom += words_in(list, source.words[w]) == cases[i].seldom;
        assert_int_equal(seldom, 110);
        for (int a = 0; a < 10; a++) assert_int_equal(words_in(s.context, s.answers[a]), cases[i].often); /* none in the example */
        ruler_sample_free(&s);
    }
}

/* The k-th word n k^-2 / zeta(2) times, dots first. */
static void coded_words_follow_zetas_law(void **state)
{
    (void)state;
    ruler_sample s = make("fwe", 1000, 4000, 6);
    assert_int_equal(s.n_answers, 3);
    const double zeta = 3.14159265358979 * 3.14159265358979 / 6;
    for (int a = 0; a < 3; a++) {
        assert_int_equal(strlen(s.answers[a]), 6);
        assert_int_equal(words_in(s.context, s.answers[a]), (int)(1000 / zeta / ((a + 2) * (a + 2))));
    }
    int dots = count(s.context, " ... ") + 2;
    assert_in_range(dots, 350, 609); /* neighbours share a space */
    ruler_sample_free(&s);
}

static void a_seed_draws_the_same_again(void **state)
{
    (void)state;
    for (int t = 0; t < RULER_TASKS; t++) {
        ruler_sample a = make(ruler_tasks[t].name, 60, 8000, 7), b = make(ruler_tasks[t].name, 60, 8000, 7),
                     c = make(ruler_tasks[t].name, 60, 8000, 8), longer = make(ruler_tasks[t].name, 90, 8000, 7);
        assert_string_equal(a.context, b.context);
        assert_string_not_equal(a.context, c.context);
        assert_true(strlen(longer.context) > strlen(a.context));
        for (int i = 0; i < a.n_answers; i++) assert_string_equal(a.answers[i], longer.answers[i]);
        ruler_sample_free(&a), ruler_sample_free(&b), ruler_sample_free(&c), ruler_sample_free(&longer);
    }
}

static void scores_are_the_share_of_answers_found(void **state)
{
    (void)state;
    ruler_sample s = {.answers = {"AbC", "1234567", "x-y"}, .n_answers = 3};
    assert_true(ruler_score(&s, "") == 0);
    assert_true(fabs(ruler_score(&s, "it is ABC, or xy") - 1.0 / 3) < 1e-12);
    assert_true(ruler_score(&s, "abc 1234567x-y") == 1);
}

static void a_source_that_is_too_small_is_refused(void **state)
{
    (void)state;
    ruler_source small;
    ruler_sample s;
    int64_t used;
    quarry_error error = {0};
    assert_int_equal(ruler_source_make(&small, "One short sentence here.", 24, &error), QUARRY_OK);
    for (int t = 0; t < RULER_TASKS; t++) {
        quarry_code code = ruler_generate(t, &small, 20, 4000, 1, &s, &used, &error);
        assert_int_equal(code, ruler_tasks[t].needs_text ? QUARRY_ERROR_ARGUMENT : QUARRY_OK);
        if (code == QUARRY_OK) ruler_sample_free(&s);
    }
    ruler_source_free(&small);
    assert_int_equal(ruler_task_find("niah_single", 11), -1);
}

static void failed_allocations_are_reported(void **state)
{
    (void)state;
    for (int t = 0; t < RULER_TASKS; t++) {
        quarry_code code = QUARRY_ERROR_MEMORY;
        for (int64_t fail = 0; code != QUARRY_OK; fail++) {
            ruler_sample s;
            int64_t used;
            quarry_error error = {0};
            memory_fail_after(fail);
            code = ruler_generate(t, &source, 30, 4000, 1, &s, &used, &error);
            memory_fail_after(-1);
            if (code == QUARRY_OK)
                ruler_sample_free(&s);
            else
                assert_int_equal(code, QUARRY_ERROR_MEMORY);
            assert_true(fail < 200);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sources_are_sentences_and_distinct_words),
        cmocka_unit_test(needles_are_as_many_as_defined),
        cmocka_unit_test(the_question_names_the_answers_key),
        cmocka_unit_test(depths_are_spread_over_the_haystack),
        cmocka_unit_test(variables_are_one_chain_of_four_hops),
        cmocka_unit_test(common_words_are_ten_times_as_common),
        cmocka_unit_test(coded_words_follow_zetas_law),
        cmocka_unit_test(a_seed_draws_the_same_again),
        cmocka_unit_test(scores_are_the_share_of_answers_found),
        cmocka_unit_test(a_source_that_is_too_small_is_refused),
        cmocka_unit_test(failed_allocations_are_reported),
    };
    return cmocka_run_group_tests(tests, make_source, free_source);
}
