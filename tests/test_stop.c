#include <stdlib.h>
#include <string.h>

#include "gen/gen.h"
#include "test.h"

enum { MAX_TEXT = 64 };

/* What a reader sees: the text up to the stop string that is complete first (of several at once, the longest). */
static bool shown_by_search(const char *text, const char *const *stop, int n_stop, char *shown)
{
    size_t n = strlen(text);
    for (size_t end = 1; end <= n; end++) {
        size_t longest = 0;
        for (int k = 0; k < n_stop; k++) {
            size_t length = strlen(stop[k]);
            if (length <= end && length > longest && !memcmp(text + end - length, stop[k], length)) longest = length;
        }
        if (longest) {
            memcpy(shown, text, end - longest);
            shown[end - longest] = 0;
            return true;
        }
    }
    strcpy(shown, text);
    return false;
}

/* Pushes text cut after every character whose bit in cuts is set. */
static bool shown_by_matcher(const char *text, const char *const *stop, int n_stop, uint32_t cuts, char *shown)
{
    stop_matcher *m = stop_matcher_create(stop, n_stop, NULL);
    assert_non_null(m);
    size_t n = strlen(text), n_shown = 0, from = 0, n_out;
    const char *out;
    bool stopped = false;
    for (size_t i = 0; i < n && !stopped; i++) {
        if (i + 1 < n && !(cuts >> i & 1)) continue;
        stopped = stop_matcher_push(m, text + from, i + 1 - from, &out, &n_out, NULL);
        memcpy(shown + n_shown, out, n_out);
        n_shown += n_out;
        from = i + 1;
    }
    if (!stopped) {
        stop_matcher_flush(m, &out, &n_out);
        memcpy(shown + n_shown, out, n_out);
        n_shown += n_out;
    }
    shown[n_shown] = 0;
    stop_matcher_destroy(m);
    return stopped;
}

static void check_all_splits(const char *text, const char *const *stop, int n_stop)
{
    char expected[MAX_TEXT], got[MAX_TEXT];
    bool stops = shown_by_search(text, stop, n_stop, expected);
    uint32_t n_cuts = 1u << (strlen(text) ? strlen(text) - 1 : 0);
    for (uint32_t cuts = 0; cuts < n_cuts; cuts++) {
        assert_int_equal(shown_by_matcher(text, stop, n_stop, cuts, got), stops);
        assert_string_equal(got, expected);
    }
}

static void every_split_of_a_text_shows_the_same(void **state)
{
    (void)state;
    static const char *const stops[] = {"</s>", "\n\nUser:", "aab"};
    check_all_splits("x </s> y", stops, 3);
    check_all_splits("a < </s", stops, 3);
    check_all_splits("\n\n\nUser: b", stops, 3);
    check_all_splits("aaaabc", stops, 3);
    check_all_splits("", stops, 3);
}

static void overlapping_stop_strings_end_at_the_first_complete_one(void **state)
{
    (void)state;
    static const char *const inside[] = {"abcd", "bc"}, *const same_end[] = {"c", "abc", "bc"}, *const periodic[] = {"aba", "babab"};
    check_all_splits("xabcdx", inside, 2);
    check_all_splits("xabc", same_end, 3);
    check_all_splits("bababa", periodic, 2);
    check_all_splits("abbabb", periodic, 2);
}

/* All texts of 7 letters over {a, b} against all pairs of stop strings of up to 3 letters. */
static void all_short_texts_and_pairs_agree_with_a_search(void **state)
{
    (void)state;
    char words[14][4], text[8];
    int n_words = 0;
    for (int length = 1; length <= 3; length++)
        for (int bits = 0; bits < 1 << length; bits++, n_words++) {
            for (int i = 0; i < length; i++) words[n_words][i] = bits >> i & 1 ? 'b' : 'a';
            words[n_words][length] = 0;
        }
    for (int bits = 0; bits < 128; bits++) {
        for (int i = 0; i < 7; i++) text[i] = bits >> i & 1 ? 'b' : 'a';
        text[7] = 0;
        for (int a = 0; a < n_words; a++)
            for (int b = a; b < n_words; b++) {
                const char *const stop[] = {words[a], words[b]};
                check_all_splits(text, stop, 2);
            }
    }
}

static void text_that_cannot_begin_a_stop_string_is_shown_at_once(void **state)
{
    (void)state;
    static const char *const stop[] = {"STOP"};
    stop_matcher *m = stop_matcher_create(stop, 1, NULL);
    const char *out;
    size_t n_out;
    assert_false(stop_matcher_push(m, "hello", 5, &out, &n_out, NULL));
    assert_int_equal(n_out, 5);
    assert_false(stop_matcher_push(m, "xST", 3, &out, &n_out, NULL));
    assert_int_equal(n_out, 1);
    assert_false(stop_matcher_push(m, "ART", 3, &out, &n_out, NULL));
    assert_memory_equal(out, "START", n_out);
    assert_int_equal(n_out, 5);
    stop_matcher_destroy(m);
}

static void no_stop_strings_pass_everything(void **state)
{
    (void)state;
    check_all_splits("all of it", NULL, 0);
}

static void an_empty_stop_string_is_refused(void **state)
{
    (void)state;
    static const char *const stop[] = {"a", ""};
    quarry_error error;
    assert_null(stop_matcher_create(stop, 2, &error));
    assert_int_equal(error.code, QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "stop string 2"));
}

static void running_out_of_memory_is_reported(void **state)
{
    (void)state;
    static const char *const stop[] = {"abc"};
    quarry_error error;
    for (int64_t after = 0;; after++) {
        memory_fail_after(after);
        stop_matcher *m = stop_matcher_create(stop, 1, &error);
        const char *out = NULL;
        size_t n_out;
        if (m) stop_matcher_push(m, "text", 4, &out, &n_out, &error);
        memory_fail_after(-1);
        stop_matcher_destroy(m);
        if (out) {
            assert_true(after >= 4);
            return;
        }
        assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_split_of_a_text_shows_the_same),
        cmocka_unit_test(overlapping_stop_strings_end_at_the_first_complete_one),
        cmocka_unit_test(all_short_texts_and_pairs_agree_with_a_search),
        cmocka_unit_test(text_that_cannot_begin_a_stop_string_is_shown_at_once),
        cmocka_unit_test(no_stop_strings_pass_everything),
        cmocka_unit_test(an_empty_stop_string_is_refused),
        cmocka_unit_test(running_out_of_memory_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
