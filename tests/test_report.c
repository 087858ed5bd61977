/* The report of evaluations: what is in the page, and what is refused. */
#include <unistd.h>

#include "eval/eval.h"
#include "test.h"

/* What eval kld prints of n policies, the i-th with a KLD of 0.1 / (i + 1) at 0.1 (i + 1) of the bytes. */
static json_t *make_kld(const char *const *attn, int n, const char *name)
{
    json_t *results = json_array();
    for (int t = 0; t < 2; t++)
        for (int i = 0; i < n; i++)
            json_array_append_new(results, json_pack("{s:s, s:s, s:{s:f, s:f, s:n}, s:{s:f}, s:f, s:n, s:{s:f}, s:i, s:i}", "task",
                                                     t ? "needle" : "prose", "attn", attn[i], "kld", "mean", 0.1 / (i + 1),
                                                     "standard_error", 0.001, "clustered_error", "dnll", "mean", 0.25 + i, "top1_agreement",
                                                     0.9, "mass", "reading", "bytes_share", 0.1 * (i + 1), "kept", 3, "full_correct", 4));
    return json_pack("{s:s, s:s, s:{s:s, s:s}, s:i, s:[{s:s, s:s}], s:o}", "command", "eval kld", "line", "quarry eval kld -f a.txt",
                     "model", "name", name, "digest", "0123abcd", "seed", 7, "texts", "name", "a.txt", "digest", "4567cdef", "results",
                     results);
}

/* The page of one envelope (taken over), for the test to free; fails the test on an error. */
static char *render(json_t *envelope)
{
    char *page = NULL;
    size_t n;
    const char *name = "in.json";
    quarry_error error = {0};
    FILE *out = open_memstream(&page, &n);
    if (report_render(out, &name, &envelope, 1, &error) != QUARRY_OK) fail_msg("%s", error.message);
    fclose(out);
    json_decref(envelope);
    return page;
}

static int count(const char *text, const char *word)
{
    int n = 0;
    for (; (text = strstr(text, word)); text += strlen(word)) n++;
    return n;
}

static void a_page_has_plots_tables_and_origin(void **state)
{
    (void)state;
    static const char *const attn[] = {"ivfpq:budget=0.02,tail=0", "ivfpq:budget=0.05,tail=0", "window"};
    char *page = render(make_kld(attn, 3, "tiny"));
    assert_int_equal(count(page, "<svg "), 3); /* prose, needle, kept */
    assert_int_equal(count(page, "role=\"img\"><title>"), 3);
    assert_int_equal(count(page, "<table>"), 2);
    assert_int_equal(count(page, "<path fill=\"none\""), 3);   /* one curve each: the budgets of one policy */
    assert_int_equal(count(page, "</i>ivfpq:tail=0</li>"), 3); /* which has one name */
    assert_int_equal(count(page, ": 10 % of the bytes, "), 3); /* and every point its title */
    assert_int_equal(count(page, "<th scope=\"row\">window</th>"), 2);
    assert_non_null(strstr(page, "<td>0.05000</td>"));
    assert_non_null(strstr(page, "<td>1.25000</td>"));
    assert_null(strstr(page, ">mass %<")); /* nobody measured it */
    assert_non_null(strstr(page, "quarry eval kld -f a.txt"));
    assert_non_null(strstr(page, "0123abcd"));
    assert_non_null(strstr(page, "4567cdef"));
    assert_non_null(strstr(page, "<dt>seed</dt><dd>7</dd>"));
    assert_non_null(strstr(page, "prefers-color-scheme:dark"));
    assert_null(strstr(page, "//")); /* no address */
    assert_null(strstr(page, "<script"));
    assert_null(strstr(page, "nan"));
    free(page);
}

static void a_policy_has_one_colour_in_all_panels(void **state)
{
    (void)state;
    static const char *const attn[] = {"full", "window"};
    json_t *envelope = make_kld(attn, 2, "tiny");
    for (size_t i = 0; i < 4; i += 2) /* full diverges from itself by nothing, which no logarithmic axis shows */
        json_object_set_new(json_object_get(json_array_get(json_object_get(envelope, "results"), i), "kld"), "mean", json_real(0));
    char *page = render(envelope);
    assert_int_equal(count(page, "<i style=\"background:var(--c1)\"></i>window</li>"), 3);
    assert_int_equal(count(page, "</i>full</li>"), 1);
    free(page);
}

static void text_of_the_input_is_no_markup(void **state)
{
    (void)state;
    static const char *const attn[] = {"<script>alert(1)</script>", "a\"onload='x&amp;"};
    char *page = render(make_kld(attn, 2, "<img src=x>\x01"));
    assert_null(strstr(page, "<script"));
    assert_null(strstr(page, "<img"));
    assert_null(strstr(page, "\"onload"));
    assert_null(strchr(page, 1));
    assert_non_null(strstr(page, "&lt;script&gt;alert(1)"));
    assert_non_null(strstr(page, "a&quot;onload=&#39;x&amp;amp;"));
    free(page);
}

static void points_lie_where_their_values_are(void **state)
{
    (void)state;
    static const char *const attn[] = {"a", "b"};
    char *page = render(make_kld(attn, 2, "tiny"));
    double x[2], y[2];
    const char *mark = strstr(page, "<circle cx=");
    assert_int_equal(sscanf(mark, "<circle cx=\"%lf\" cy=\"%lf\"", &x[0], &y[0]), 2);
    mark = strstr(mark, "</circle>");
    mark = strstr(mark, "<path d=\"M"); /* the error bar, then the square */
    mark = strstr(mark + 1, "<path d=\"M");
    assert_int_equal(sscanf(mark, "<path d=\"M%lf %lf h7", &x[1], &y[1]), 2);
    assert_true(x[0] < x[1] && y[0] < y[1]); /* more bytes, less divergence */
    free(page);
}

static json_t *make_needle(int correct)
{
    json_t *grid = json_pack("[{s:i,s:f,s:i,s:i},{s:i,s:f,s:i,s:i}]", "length", 2000, "depth", 0.5, "asked", 3, "correct", correct,
                             "length", 4000, "depth", 0.5, "asked", 3, "correct", 3);
    return json_pack("{s:s, s:[{s:s, s:i, s:i, s:{s:f}, s:o}]}", "command", "eval needle", "results", "attn", "ivfpq", "kept", 5,
                     "full_correct", 6, "reading", "bytes_share", 0.1, "grid", grid);
}

static void needles_have_a_heat_map(void **state)
{
    (void)state;
    char *page = render(make_needle(2));
    assert_int_equal(count(page, "<rect "), 2);
    assert_non_null(strstr(page, ">2/3</text>"));
    assert_non_null(strstr(page, ">4000</text>"));
    assert_non_null(strstr(page, ">50 %</text>"));
    free(page);
}

static void what_is_no_evaluation_is_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "",
        "{",
        "[]",
        "{}",
        "{\"command\":\"eval kld\"}",
        "{\"command\":\"eval kld\",\"results\":[]}",
        "{\"command\":\"eval kld\",\"results\":[3]}",
        "{\"command\":1,\"results\":[{}]}",
        "{\"command\":\"eval kld\",\"results\":[{}],\"results\":[{}]}",
        "{\"command\":\"eval other\",\"results\":[{}]}",
        "{\"command\":\"eval kld\",\"results\":[{}]}",
        "{\"command\":\"eval kld\",\"results\":[{\"attn\":\"x\",\"kld\":{\"mean\":\"1\"}}]}",
        "{\"command\":\"eval "
        "needle\",\"results\":[{\"attn\":\"x\",\"kept\":1,\"full_correct\":1,\"reading\":{\"bytes_share\":1},\"grid\":[{}]}]}",
        "{\"command\":\"eval needle\",\"results\":[{\"attn\":\"x\",\"kept\":1,\"full_correct\":1,\"reading\":{\"bytes_share\":1},\"grid\":"
        "[{\"length\":1,\"depth\":0,\"asked\":1,\"correct\":2}]}]}",
    };
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        json_t *envelope = NULL;
        quarry_error error = {0};
        const char *name = "in.json";
        quarry_code code = report_check(name, bad[i], strlen(bad[i]), &envelope, &error);
        if (code == QUARRY_OK) {
            FILE *out = fopen("/dev/null", "w");
            code = report_render(out, &name, &envelope, 1, &error);
            fclose(out);
        }
        if (code != QUARRY_ERROR_FORMAT) fail_msg("%s", bad[i]);
        assert_non_null(strstr(error.message, "in.json"));
        json_decref(envelope);
    }
}

static void a_report_is_written_whole_or_not_at_all(void **state)
{
    (void)state;
    char folder[] = "/tmp/quarry_report_XXXXXX", good[64], bad[64], out[64];
    assert_non_null(mkdtemp(folder));
    snprintf(good, sizeof good, "%s/good.json", folder);
    snprintf(bad, sizeof bad, "%s/bad.json", folder);
    snprintf(out, sizeof out, "%s/out.html", folder);
    static const char *const attn[] = {"window"};
    json_t *envelope = make_kld(attn, 1, "tiny");
    assert_int_equal(json_dump_file(envelope, good, 0), 0);
    json_object_set_new(envelope, "command", json_string("nonesuch"));
    assert_int_equal(json_dump_file(envelope, bad, 0), 0);
    json_decref(envelope);
    const char *paths[] = {good, bad}, *missing = "/nonexistent.json";
    quarry_error error = {0};
    assert_int_equal(report_write(paths, 1, out, &error), QUARRY_OK);
    size_t n_before, n_after;
    char *before = file_read_all(out, &n_before, &error);
    assert_true(n_before > 1000 && strstr(before, "</html>"));
    assert_int_equal(report_write(paths, 2, out, &error), QUARRY_ERROR_FORMAT);
    assert_non_null(strstr(error.message, bad));
    char *after = file_read_all(out, &n_after, &error);
    assert_string_equal(before, after);
    assert_int_equal(report_write(&missing, 1, out, &error), QUARRY_ERROR_IO);
    assert_non_null(strstr(error.message, missing));
    assert_int_equal(report_write(paths, 1, "/nonexistent/out.html", &error), QUARRY_ERROR_IO);
    assert_int_equal(report_write(paths, 1, folder, &error), QUARRY_ERROR_IO); /* a folder cannot be replaced */
    bool done = false;
    int failures = 0;
    for (int i = 0; i < 100 && !done; i++) {
        memory_fail_after(i);
        const quarry_code code = report_write(paths, 1, out, &error);
        memory_fail_after(-1);
        done = code == QUARRY_OK;
        failures += !done;
        if (!done) assert_int_equal(code, QUARRY_ERROR_MEMORY);
    }
    assert_true(done && failures > 5);
    assert_true(!unlink(good) && !unlink(bad) && !unlink(out));
    assert_int_equal(rmdir(folder), 0); /* no temporary file was left */
    memory_free(before);
    memory_free(after);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_page_has_plots_tables_and_origin),
        cmocka_unit_test(a_policy_has_one_colour_in_all_panels),
        cmocka_unit_test(text_of_the_input_is_no_markup),
        cmocka_unit_test(points_lie_where_their_values_are),
        cmocka_unit_test(needles_have_a_heat_map),
        cmocka_unit_test(what_is_no_evaluation_is_refused),
        cmocka_unit_test(a_report_is_written_whole_or_not_at_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
