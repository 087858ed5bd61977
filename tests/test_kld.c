/* Every figure of eval kld against a naive computation of it, on a tiny random model; and journals of it. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "eval_fixture.h"

enum { DEPTH = 500, STEPS = 8 };

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

/* ---- the same by hand ---- */

typedef struct sums {
    double mass, recall;
    int64_t n_mass, n_recall;
} sums;

typedef struct by_hand {
    double nll[STEPS], kld[STEPS];
    int agreed;
    sums layer[64];
} by_hand;

static int descending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

/* Scores of all rows by a double loop, the top k by sorting all of them. */
static void audit_naively(void *data, const attn_reading *r, arena *scratch)
{
    (void)scratch;
    const kv_shape *shape = kv_shape_of(r->kv);
    sums *s = &((by_hand *)data)->layer[r->layer * shape->n_head_kv + r->head];
    double *scores = calloc((size_t)r->pos + 1, sizeof *scores), *sorted = calloc((size_t)r->pos + 1, sizeof *sorted);
    bool *read = calloc((size_t)r->pos + 1, sizeof *read);
    float key[256];
    for (int64_t i = 0; i <= r->pos; i++) read[i] = r->selected->all || i < r->n_sinks || i >= r->far_end;
    for (int64_t i = 0; i < r->selected->n && !r->selected->all; i++) read[r->selected->ids[i]] = true;
    for (int h = 0; h < r->group; h++) {
        double all = 0, seen = 0;
        int64_t hits = 0;
        for (int64_t i = 0; i <= r->pos; i++) {
            scores[i] = 0;
            kv_read_key(math_kernels_get(CPU_SCALAR), kv_row(r->kv, r->layer, r->head, i), shape, key);
            for (int c = 0; c < r->d; c++) scores[i] += (double)r->q[h * r->d + c] * key[c];
            all += exp(scores[i]);
            seen += read[i] ? exp(scores[i]) : 0;
        }
        s->mass += seen / all;
        s->n_mass++;
        if (r->selected->all || r->selected->n == 0) continue;
        memcpy(sorted, scores + r->n_sinks, (size_t)(r->far_end - r->n_sinks) * sizeof *sorted);
        qsort(sorted, (size_t)(r->far_end - r->n_sinks), sizeof *sorted, descending);
        for (int64_t i = 0; i < r->selected->n; i++) hits += scores[r->selected->ids[i]] >= sorted[r->selected->n - 1] - 1e-6;
        s->recall += (double)hits / (double)r->selected->n;
        s->n_recall++;
    }
    free(scores);
    free(sorted);
    free(read);
}

static double probability(const float *logits, int64_t n, int64_t i)
{
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += exp((double)logits[j] - logits[i]);
    return 1 / sum;
}

static int likeliest(const float *logits, int64_t n)
{
    int best = 0;
    for (int i = 1; i < n; i++) best = logits[i] > logits[best] ? i : best;
    return best;
}

static void follow_by_hand(const fixture *f, const char *attn, by_hand *out)
{
    quarry_error error = {0};
    quarry_model_info info;
    quarry_model_get_info(f->model, &info);
    const attn_observer observer = {audit_naively, out};
    int32_t document[DEPTH], *empty = NULL;
    *out = (by_hand){0};
    memcpy(document, f->tokens, sizeof document);
    if (quarry_tokenize(f->model, "", 0, true, &empty, &error) > 0) document[0] = empty[0];
    quarry_free(empty);
    quarry_session *s[2];
    for (int i = 0; i < 2; i++) {
        s[i] = quarry_session_open(f->model, &(quarry_session_params){.attn = i ? attn : "full"}, &error);
        if (!s[i] || quarry_session_read(s[i], document, DEPTH, NULL, &error)) fail_msg("%s", error.message);
    }
    session_set_observer(s[1], &observer);
    for (int t = 0; t < STEPS; t++) {
        for (int i = 0; i < 2; i++)
            if (quarry_session_feed(s[i], &f->tokens[DEPTH + t], 1, NULL, &error)) fail_msg("%s", error.message);
        const float *p = quarry_session_logits(s[0]), *q = quarry_session_logits(s[1]);
        for (int64_t i = 0; i < info.n_vocab; i++) {
            const double pi = probability(p, info.n_vocab, i);
            out->kld[t] += pi * log(pi / probability(q, info.n_vocab, i));
        }
        out->nll[t] = -log(probability(q, info.n_vocab, f->tokens[DEPTH + t + 1]));
        out->agreed += likeliest(p, info.n_vocab) == likeliest(q, info.n_vocab);
    }
    for (int i = 0; i < 2; i++) quarry_session_close(s[i]);
}

static void near(double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance * fmax(1, fabs(b)))) fail_msg("%.17g is not %.17g to %g", a, b, tolerance);
}

static void every_figure_equals_a_naive_computation(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"ivfpq:budget=0.1", "window", "full"};
    const kld_params params = {
        .attn = attn, .n_attn = 3, .texts = &f->text, .n_texts = 1, .depth = DEPTH, .n_steps = STEPS, .samples = 1, .audit = true};
    kld_result r[4];
    static by_hand full, h;
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    follow_by_hand(f, "full", &full);
    for (int i = 0; i < 3; i++) {
        double kld = 0, dnll = 0, nll = 0;
        sums all = {0};
        follow_by_hand(f, attn[i], &h);
        for (int t = 0; t < STEPS; t++) kld += h.kld[t] / STEPS, nll += h.nll[t] / STEPS, dnll += (h.nll[t] - full.nll[t]) / STEPS;
        for (int c = 0; c < 64; c++) {
            all.mass += h.layer[c].mass, all.n_mass += h.layer[c].n_mass;
            all.recall += h.layer[c].recall, all.n_recall += h.layer[c].n_recall;
        }
        near(r[i + 1].kld.steps.mean, kld, 1e-5);
        near(r[i + 1].dnll.steps.mean, dnll, 1e-5);
        near(log(r[i + 1].perplexity), nll, 1e-5);
        near(r[i + 1].nll.steps.mean, nll, 1e-5);
        near(r[i + 1].agreement, (double)h.agreed / STEPS, 1e-12);
        near(r[i + 1].mass, all.mass / (double)all.n_mass, 1e-4);
        if (all.n_recall)
            near(r[i + 1].recall, all.recall / (double)all.n_recall, 0.01);
        else
            assert_true(isnan(r[i + 1].recall));
        assert_true(isnan(r[i + 1].kld.clustered_error)); /* one sample */
    }
    assert_true(r[1].recall > 0.1 && r[1].mass > r[2].mass && r[2].mass < 0.9 && r[3].mass > 1 - 1e-5);
    assert_true(isnan(r[0].mass) && isnan(r[0].recall));
}

static void what_is_read_adds_up(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"ivfpq"};
    const kld_params params = {.attn = attn,
                               .n_attn = 1,
                               .texts = &f->text,
                               .n_texts = 1,
                               .depth = DEPTH,
                               .n_steps = 2,
                               .samples = 1,
                               .haystacks = 1,
                               .needles = 2};
    kld_result r[4];
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(kld_n_results(&params), 4);
    for (int i = 1; i < 4; i += 2) {
        const eval_reading *a = &r[i].reading;
        assert_true(a->index_share > 0 && a->tables_share > 0 && a->tail_share > 0 && a->rows_share < 1);
        near(a->rows_share + a->index_share + a->tables_share + a->tail_share, a->bytes_share, 1e-12);
    }
}

static void needles_are_the_digits_of_the_right_answer(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"full", "window"};
    const kld_params params = {.attn = attn, .n_attn = 2, .texts = &f->text, .n_texts = 1, .depth = 400, .haystacks = 3, .needles = 2};
    kld_result r[3];
    quarry_error error = {0};
    if (kld_measure(f->model, &params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(r[i].task, KLD_NEEDLE);
        assert_int_equal(r[i].n_samples, 6);
        assert_true(r[i].kld.steps.n >= 6 && r[i].kld.steps.n <= 6 * NEEDLE_DIGITS);
        assert_true(isfinite(r[i].kld.clustered_error));
        assert_true(r[i].kept <= r[i].full_correct && r[i].kept <= r[i].correct);
    }
    assert_true(r[1].kld.steps.max == 0 && r[1].dnll.steps.max == 0 && r[1].agreement == 1 && r[1].kept == r[1].full_correct);
    assert_true(r[2].kld.steps.mean > 0);
}

static void the_answer_ends_with_its_digits(void **state)
{
    (void)state;
    char text[160];
    const needle s = {.key = "copper-lantern", .number = "7316402"};
    const int n = needle_answer_sentence(&s, text, sizeof text);
    assert_int_equal(n, strlen(text));
    assert_string_equal(text + n - NEEDLE_DIGITS, "7316402");
    assert_non_null(strstr(text, "copper-lantern"));
}

/* ---- perplexity ---- */

static kld_result measure_one(const fixture *f, const kld_params *params)
{
    kld_result r[2];
    quarry_error error = {0};
    if (kld_measure(f->model, params, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    return r[1];
}

static void windows_follow_each_other_through_every_text(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"window"};
    const eval_text texts[] = {{"first", f->tokens, 330}, {"second", f->tokens + 400, 210}}; /* three windows and one, and what is left */
    kld_params params = {.attn = attn, .n_attn = 1, .texts = texts, .n_texts = 2};
    quarry_error error = {0};
    assert_int_equal(ppl_windows(&params, 110, 0, 0, &error), QUARRY_OK);
    assert_int_equal(params.depth, 55); /* llama-perplexity: of a window of n, tokens n / 2 + 1 to n - 1 are scored */
    assert_int_equal(params.n_steps, 54);
    assert_int_equal(params.samples, 4);
    const kld_result all = measure_one(f, &params);
    assert_int_equal(all.n_samples, 4);
    assert_int_equal(all.nll.steps.n, 4 * 54);
    const int32_t *const begins[] = {f->tokens, f->tokens + 110, f->tokens + 220, f->tokens + 400};
    double nll = 0;
    for (int i = 0; i < 4; i++) {
        const eval_text window = {"window", begins[i], 110};
        kld_params one = {.attn = attn, .n_attn = 1, .texts = &window, .n_texts = 1};
        assert_int_equal(ppl_windows(&one, 110, 0, 0, &error), QUARRY_OK);
        nll += measure_one(f, &one).nll.steps.mean / 4;
    }
    near(all.nll.steps.mean, nll, 1e-12);
    near(all.perplexity, exp(nll), 1e-9);
}

static void scored_tokens_are_the_last_of_a_window(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"full"};
    kld_params params = {.attn = attn, .n_attn = 1, .texts = &f->text, .n_texts = 1}, direct = params;
    quarry_error error = {0};
    assert_int_equal(ppl_windows(&params, 120, 8, 3, &error), QUARRY_OK);
    direct.depth = 111;
    direct.n_steps = 8;
    direct.samples = 3;
    const kld_result a = measure_one(f, &params), b = measure_one(f, &direct);
    assert_int_equal(a.nll.steps.n, 24);
    assert_true(a.nll.steps.mean == b.nll.steps.mean && a.dnll.steps.max == 0);
}

static void windows_that_cannot_be_are_refused(void **state)
{
    const fixture *f = *state;
    const eval_text text = {"short.txt", f->tokens, 100};
    kld_params params = {.texts = &text, .n_texts = 1};
    quarry_error error = {0};
    assert_int_equal(ppl_windows(&params, 101, 0, 0, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "short.txt"));
    assert_int_equal(ppl_windows(&params, 100, 99, 0, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(ppl_windows(&params, 2, 0, 0, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(ppl_windows(&params, 100, 98, 0, &error), QUARRY_OK);
    assert_int_equal(params.depth, 1);
}

/* ---- journals ---- */

typedef struct stop {
    int64_t after;
} stop;

static bool stop_after(int64_t done, int64_t total, void *data)
{
    (void)total;
    return done < ((stop *)data)->after;
}

static void a_stopped_measurement_goes_on_to_the_same_result(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"ivfpq", "window"};
    kld_params params = {.attn = attn,
                         .n_attn = 2,
                         .texts = &f->text,
                         .n_texts = 1,
                         .depth = 300,
                         .n_steps = 3,
                         .samples = 2,
                         .haystacks = 2,
                         .needles = 1,
                         .audit = true};
    kld_result whole[6], resumed[6];
    quarry_error error = {0};
    char path[] = "/tmp/quarry_kld_XXXXXX";
    assert_true(close(mkstemp(path)) == 0);
    json_t *header = json_pack("{s:i}", "x", 1);
    if (kld_measure(f->model, &params, NULL, whole, &error) != QUARRY_OK) fail_msg("%s", error.message);
    stop at = {700};
    const quarry_watch watch = {stop_after, &at};
    params.journal = journal_open(path, header, &error);
    assert_non_null(params.journal);
    assert_int_equal(kld_measure(f->model, &params, &watch, resumed, &error), QUARRY_ERROR_CANCELLED);
    const int64_t n_before = journal_count(params.journal);
    assert_true(n_before >= 1 && n_before < 4);
    journal_close(params.journal);
    params.journal = journal_open(path, header, &error);
    assert_int_equal(journal_count(params.journal), n_before);
    if (kld_measure(f->model, &params, NULL, resumed, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(journal_count(params.journal), 4);
    for (int i = 0; i < 6; i++) {
        assert_memory_equal(&whole[i].kld.steps, &resumed[i].kld.steps, sizeof whole[i].kld.steps);
        assert_memory_equal(&whole[i].dnll.steps, &resumed[i].dnll.steps, sizeof whole[i].dnll.steps);
        assert_memory_equal(&whole[i].reading, &resumed[i].reading, sizeof whole[i].reading);
        assert_true(whole[i].perplexity == resumed[i].perplexity && whole[i].kept == resumed[i].kept);
        assert_true(i % 3 == 0 || whole[i].mass == resumed[i].mass);
    }
    journal_close(params.journal);
    json_decref(header);
    unlink(path);
}

static void a_record_of_something_else_is_refused(void **state)
{
    const fixture *f = *state;
    static const char *const records[] = {
        "{}",
        "{\"samples\":[]}",
        "{\"samples\":[[]]}",
        "{\"samples\":[[{}]]}",
        "{\"samples\":[[{\"kld\":[],\"nll\":[],\"agreed\":0,\"correct\":false,\"cost\":[0,0,0,0],\"audit\":[0,0,0,0]}]]}",
        "{\"samples\":[[{\"kld\":[0],\"nll\":[0,1],\"agreed\":0,\"correct\":false,\"cost\":[0,0,0,0],\"audit\":[0,0,0,0]}]]}",
        "{\"samples\":7}"};
    quarry_error error = {0};
    for (size_t i = 0; i < sizeof records / sizeof *records; i++) {
        char path[] = "/tmp/quarry_kld_XXXXXX";
        assert_true(close(mkstemp(path)) == 0);
        json_t *header = json_pack("{s:i}", "x", 1);
        kld_params params = {.texts = &f->text, .n_texts = 1, .depth = 100, .n_steps = 1, .samples = 1};
        kld_result r;
        params.journal = journal_open(path, header, &error);
        assert_int_equal(journal_add(params.journal, "prose 0", json_loads(records[i], 0, NULL), &error), QUARRY_OK);
        assert_int_equal(kld_measure(f->model, &params, NULL, &r, &error), QUARRY_ERROR_FORMAT);
        journal_close(params.journal);
        json_decref(header);
        unlink(path);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_figure_equals_a_naive_computation),      cmocka_unit_test(what_is_read_adds_up),
        cmocka_unit_test(needles_are_the_digits_of_the_right_answer),   cmocka_unit_test(the_answer_ends_with_its_digits),
        cmocka_unit_test(windows_follow_each_other_through_every_text), cmocka_unit_test(scored_tokens_are_the_last_of_a_window),
        cmocka_unit_test(windows_that_cannot_be_are_refused),           cmocka_unit_test(a_stopped_measurement_goes_on_to_the_same_result),
        cmocka_unit_test(a_record_of_something_else_is_refused),
    };
    return cmocka_run_group_tests(tests, open_model, close_model);
}
