/* Citations: sentences, passages, and the weights that tokens received against a softmax in double. */
#include "test.h"

#include <math.h>

#include "gen/gen.h"
#include "gen/passages.h"

/* ---- sentences ---- */

/* Checks that the text is cut into exactly these. */
static void check_cut(const char *text, const char *const *parts, size_t n)
{
    size_t at = 0, n_bytes = strlen(text);
    for (size_t i = 0; i < n; i++) {
        assert_true(at < n_bytes);
        const size_t end = sentence_end(text, n_bytes, at);
        assert_int_equal(end - at, strlen(parts[i]));
        assert_memory_equal(text + at, parts[i], end - at);
        at = end;
    }
    assert_int_equal(at, n_bytes);
}

static void sentences_end_at_marks_before_white_space(void **state)
{
    (void)state;
    const char *const parts[] = {"Is it 3.5? ", "\"Yes!\" ", "said she.)\n", "“Go.” ", "The end"};
    check_cut("Is it 3.5? \"Yes!\" said she.)\n“Go.” The end", parts, TEST_COUNT(parts));
    const char *const wide[] = {"雨が降る。", "行こう！", "x"};
    check_cut("雨が降る。行こう！x", wide, TEST_COUNT(wide));
}

static void titles_and_initials_end_no_sentence(void **state)
{
    (void)state;
    const char *const parts[] = {"Mr. J. Knightley met Mrs. Weston, e.g. at home. ", "So did I. ", "Good."};
    check_cut("Mr. J. Knightley met Mrs. Weston, e.g. at home. So did I. Good.", parts, TEST_COUNT(parts));
}

static void blank_lines_lists_and_headings_cut(void **state)
{
    (void)state;
    const char *const parts[] = {"Title\r\n\r\n", "one\ntwo\n", "- item\n", "12. item\n", "# Heading\n", "rest -1 of it"};
    check_cut("Title\r\n\r\none\ntwo\n- item\n12. item\n# Heading\nrest -1 of it", parts, TEST_COUNT(parts));
}

static void endless_sentences_are_cut_between_characters(void **state)
{
    (void)state;
    char text[3001], words[3001];
    for (size_t i = 0; i < 3000; i += 3) memcpy(text + i, "語", 3);
    for (size_t i = 0; i < 3000; i++) words[i] = i % 7 == 6 ? ' ' : 'a';
    for (size_t at = 0, end; at < 3000; at = end) {
        end = sentence_end(text, 3000, at);
        assert_true(end - at <= 803 && end % 3 == 0);
    }
    for (size_t at = 0, end; at < 3000; at = end) {
        end = sentence_end(words, 3000, at);
        assert_true(end == 3000 || (end - at < 620 && words[end - 1] == ' '));
    }
    const char ends[] = " \n .";
    for (size_t n = 1; n < sizeof ends; n++) assert_int_equal(sentence_end(ends, n, 0), n);
}

/* ---- passages ---- */

static int64_t find(const passage_source *sources, int n, int64_t max, quarry_citation **out)
{
    quarry_error e = {0};
    const int64_t found = passages_find(sources, n, max, out, &e);
    if (found < 0) fail_msg("%s", e.message);
    return found;
}

static void passages_have_lines_and_bytes(void **state)
{
    (void)state;
    /*                  0         10          20   22              */
    const char *text = "First one.\r\nZwölf €.\r\n\r\n  Last\r\n words here.";
    const size_t starts[] = {0, 5, 12, 24, 36};
    const double weights[] = {0, 2, 3, 0, 13};
    const passage_source source = {text, strlen(text), starts, weights, 5};
    quarry_citation *c;
    assert_int_equal(find(&source, 1, 10, &c), 2);
    assert_int_equal(c[0].first_line, 4);
    assert_int_equal(c[0].last_line, 5);
    assert_memory_equal(text + c[0].first_byte, "Last\r\n words here.", c[0].end_byte - c[0].first_byte);
    assert_true(fabs(c[0].share - 13.0 / 18) < 1e-12);
    assert_int_equal(c[1].first_line, 1); /* 2 is a fair part of 3, but 3 none of 13 */
    assert_int_equal(c[1].last_line, 2);
    assert_memory_equal(text + c[1].first_byte, "First one.\r\nZwölf €.", c[1].end_byte - c[1].first_byte);
    assert_true(fabs(c[1].share - 5.0 / 18) < 1e-12);
    memory_free(c);
}

static void passages_are_ranked_over_documents(void **state)
{
    (void)state;
    const size_t starts[] = {0, 5, 10};
    const double a[] = {1, 0.1, 5}, b[] = {1, 0, 0.05}, none[] = {0, 0, 0};
    const char *text = "Aaaa Bbbb. Cccc.";
    passage_source sources[] = {{text, 16, starts, none, 3}, {text, 16, starts, b, 3}, {text, 16, starts, a, 3}};
    quarry_citation *c;
    assert_int_equal(find(sources, 3, 9, &c), 3);
    assert_int_equal(c[0].document, 2);
    assert_int_equal(c[0].first_byte, 11); /* a token that begins with the space before the word */
    assert_int_equal(c[1].document, 2);
    assert_int_equal(c[1].first_byte, 0);
    assert_int_equal(c[2].document, 1);
    assert_true(c[0].share + c[1].share + c[2].share < 1); /* 0.05 of 7.15 is less than a hundredth */
    memory_free(c);
    assert_int_equal(find(sources, 3, 1, &c), 1);
    assert_int_equal(c[0].document, 2);
    memory_free(c);
    assert_int_equal(find(sources, 1, 9, &c), 0);
    memory_free(c);
    assert_int_equal(find(sources, 3, 0, &c), 0);
    memory_free(c);
    assert_int_equal(find(NULL, 0, 9, &c), 0);
    memory_free(c);
}

/* ---- sessions ---- */

enum { N_DOCUMENTS = 2, MOST = 50 };

static const char report[] =
    "The miller's daughter, Zoë, kept bees.\r\nShe sold honey at 12 € a jar. Nobody bought it.\r\n\r\nLater she moved to "
    "the coast. There she built a boat of oak! It sank.";
static const char notes[] = "\n\n- The boat was found in 1923.\n- It held nine jars.\n\nHer brother wrote of it twice. Was it true?";
static const quarry_document documents[N_DOCUMENTS] = {{"report.txt", report, sizeof report - 1}, {NULL, notes, sizeof notes - 1}};

static quarry_model *open_model(int n_threads)
{
    char path[1024];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/llama-q4_1.gguf", folder);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = n_threads}, &e);
    if (!m) fail_msg("%s", e.message);
    return m;
}

typedef struct asked {
    quarry_session *session;
    quarry_prompt prompt;
} asked;

/* A session that has read the documents, and the question to feed. */
static asked open_asked(quarry_model *m, const char *attn, int n_documents)
{
    asked a;
    quarry_error e = {0};
    if (quarry_prompt_build(m, documents, n_documents, NULL, "What became of the boat?", &a.prompt, &e)) fail_msg("%s", e.message);
    a.session = quarry_session_open(m, &(quarry_session_params){.attn = attn}, &e);
    if (!a.session) fail_msg("%s", e.message);
    if (quarry_session_read(a.session, a.prompt.context, a.prompt.n_context, NULL, &e)) fail_msg("%s", e.message);
    return a;
}

static void close_asked(asked *a)
{
    quarry_session_close(a->session);
    quarry_prompt_free(&a->prompt);
}

static void answer(asked *a)
{
    quarry_error e = {0};
    quarry_sampling p;
    quarry_sampling_default(&p);
    p.max_tokens = 10;
    p.ignore_eos = true;
    if (quarry_session_feed(a->session, a->prompt.question, a->prompt.n_question, NULL, &e)) fail_msg("%s", e.message);
    if (quarry_session_generate(a->session, &p, NULL, NULL, NULL, &e)) fail_msg("%s", e.message);
}

static int64_t cite(quarry_model *m, const char *attn, int n_documents, quarry_citation **c)
{
    asked a = open_asked(m, attn, n_documents);
    quarry_error e = {0};
    if (quarry_session_cite(a.session, &e)) fail_msg("%s", e.message);
    answer(&a);
    const int64_t n = quarry_session_citations(a.session, documents, n_documents, MOST, c, &e);
    if (n < 0) fail_msg("%s", e.message);
    close_asked(&a);
    return n;
}

/* The squares of all weights, by a softmax in double over every row. */
typedef struct naive {
    double *squares[2];
    int64_t n_context, n_question_end;
    const math_kernels *kernels;
} naive;

static void naive_reading(void *data, const attn_reading *r, arena *scratch)
{
    naive *v = data;
    (void)scratch;
    const int64_t n = r->pos + 1;
    double *scores = malloc((size_t)n * sizeof *scores);
    float key[256];
    for (int h = 0; h < r->group; h++) {
        double most = -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            kv_read_key(v->kernels, kv_row(r->kv, r->layer, r->head, i), kv_shape_of(r->kv), key);
            scores[i] = 0;
            for (int k = 0; k < r->d; k++) scores[i] += (double)r->q[h * r->d + k] * (double)key[k];
            most = fmax(most, scores[i]);
        }
        for (int64_t i = 0; i < n; i++) sum += exp(scores[i] - most);
        for (int64_t i = ATTN_SINKS; i < v->n_context; i++) {
            const double w = exp(scores[i] - most) / sum;
            v->squares[r->pos >= v->n_question_end][i] += w * w;
        }
    }
    free(scores);
}

static void weights_are_those_of_a_naive_softmax(void **state)
{
    (void)state;
    const char *const specs[] = {"full", "ivfpq:budget=1,threshold=0"};
    for (size_t k = 0; k < TEST_COUNT(specs); k++) {
        quarry_model *m = open_model(1); /* the naive observer adds without locks */
        quarry_citation *found, *expected;
        const int64_t n = cite(m, specs[k], 1, &found);
        asked a = open_asked(m, "full", 1);
        const int64_t n_context = a.prompt.n_context;
        naive v = {.n_context = n_context, .n_question_end = n_context + a.prompt.n_question, .kernels = model_kernels(m)};
        for (int i = 0; i < 2; i++) v.squares[i] = calloc((size_t)n_context, sizeof(double));
        const attn_observer observer = {naive_reading, &v};
        session_set_observer(a.session, &observer);
        answer(&a);
        /* The context ends with the document. */
        size_t *starts = calloc((size_t)n_context, sizeof *starts), rest = documents[0].n_bytes, n_bytes;
        int64_t first = n_context;
        while (rest > 0) {
            quarry_token_text(m, a.prompt.context[--first], &n_bytes);
            starts[first] = rest -= n_bytes;
        }
        double *weights = calloc((size_t)n_context, sizeof *weights);
        for (int64_t i = first; i < n_context; i++)
            weights[i] = fmax(0, v.squares[1][i] / 10 - v.squares[0][i] / (double)a.prompt.n_question);
        const passage_source source = {report, sizeof report - 1, starts + first, weights + first, n_context - first};
        assert_int_equal(find(&source, 1, MOST, &expected), n);
        assert_true(n >= 2);
        for (int64_t i = 0; i < n; i++) {
            assert_int_equal(found[i].first_byte, expected[i].first_byte);
            assert_int_equal(found[i].end_byte, expected[i].end_byte);
            assert_true(fabs(found[i].share - expected[i].share) < 2e-3);
        }
        for (int i = 0; i < 2; i++) free(v.squares[i]);
        free(starts);
        free(weights);
        quarry_free(found);
        memory_free(expected);
        close_asked(&a);
        quarry_model_close(m);
    }
}

static void threads_change_no_citation(void **state)
{
    (void)state;
    const char *const specs[] = {"full", "ivfpq:budget=0.3"};
    for (size_t k = 0; k < TEST_COUNT(specs); k++) {
        quarry_citation *first = NULL, *c;
        int64_t n_first = 0;
        for (int threads = 1; threads <= 3; threads++) {
            quarry_model *m = open_model(threads);
            const int64_t n = cite(m, specs[k], N_DOCUMENTS, &c);
            assert_true(n > 1 && (!first || n == n_first));
            for (int64_t i = 0; first && i < n; i++) {
                assert_int_equal(c[i].document, first[i].document);
                assert_int_equal(c[i].first_byte, first[i].first_byte);
                assert_int_equal(c[i].end_byte, first[i].end_byte);
                assert_true(c[i].share == first[i].share);
            }
            if (first) quarry_free(first);
            first = c;
            n_first = n;
            quarry_model_close(m);
        }
        quarry_free(first);
    }
}

static void citations_lie_in_their_documents(void **state)
{
    (void)state;
    quarry_model *m = open_model(2);
    quarry_citation *c;
    const int64_t n = cite(m, "ivfpq", N_DOCUMENTS, &c);
    double sum = 0;
    int seen[N_DOCUMENTS] = {0};
    for (int64_t i = 0; i < n; i++) {
        assert_in_range(c[i].document, 0, N_DOCUMENTS - 1);
        const quarry_document *d = &documents[c[i].document];
        assert_true(c[i].first_byte < c[i].end_byte && c[i].end_byte <= d->n_bytes);
        int64_t line = 1;
        for (size_t k = 0; k < c[i].first_byte; k++) line += d->text[k] == '\n';
        assert_int_equal(c[i].first_line, line);
        assert_true(i == 0 || c[i].share <= c[i - 1].share);
        for (int64_t k = 0; k < i; k++)
            assert_true(c[k].document != c[i].document || c[k].end_byte <= c[i].first_byte || c[i].end_byte <= c[k].first_byte);
        sum += c[i].share;
        seen[c[i].document]++;
    }
    assert_true(sum > 0.5 && sum <= 1 + 1e-9);
    assert_true(seen[0] && seen[1]);
    quarry_free(c);
    quarry_model_close(m);
}

static void without_documents_there_is_nothing_to_cite(void **state)
{
    (void)state;
    quarry_model *m = open_model(1);
    quarry_citation *c;
    assert_int_equal(cite(m, "ivfpq", 0, &c), 0);
    quarry_free(c);
    quarry_model_close(m);
}

static void wrong_calls_are_told(void **state)
{
    (void)state;
    quarry_model *m = open_model(1);
    asked a = open_asked(m, "ivfpq", N_DOCUMENTS);
    quarry_citation *c = NULL;
    quarry_error e = {0};
    assert_int_equal(quarry_session_citations(a.session, documents, N_DOCUMENTS, 5, &c, &e), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(e.message, "quarry_session_cite"));
    assert_int_equal(quarry_session_cite(a.session, &e), 0);
    /* Nothing was asked yet. */
    assert_int_equal(quarry_session_citations(a.session, documents, N_DOCUMENTS, 5, &c, &e), 0);
    quarry_free(c);
    const quarry_document swapped[] = {documents[1], documents[0]};
    assert_int_equal(quarry_session_citations(a.session, swapped, N_DOCUMENTS, 5, &c, &e), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(e.message, "document 2"));
    assert_int_equal(quarry_session_citations(a.session, documents, -1, 5, &c, &e), QUARRY_ERROR_ARGUMENT);
    close_asked(&a);
    quarry_model_close(m);
}

static void allocation_failures_are_errors(void **state)
{
    (void)state;
    quarry_model *m = open_model(1);
    asked a = open_asked(m, "full", N_DOCUMENTS);
    quarry_citation *c;
    int64_t n = 0;
    for (int code = QUARRY_ERROR_MEMORY; code; n++) {
        quarry_error e = {0};
        memory_fail_after(n);
        code = quarry_session_cite(a.session, &e);
        memory_fail_after(-1);
        assert_int_equal(code, e.code);
        assert_true(code == 0 || code == QUARRY_ERROR_MEMORY);
    }
    assert_int_equal(n, 4);
    answer(&a);
    for (int64_t found = n = 0; found <= 0; n++) {
        quarry_error e = {0};
        memory_fail_after(n);
        found = quarry_session_citations(a.session, documents, N_DOCUMENTS, MOST, &c, &e);
        memory_fail_after(-1);
        assert_int_equal(found > 0 ? 0 : found, e.code);
        assert_true(found > 0 || found == QUARRY_ERROR_MEMORY);
    }
    assert_true(n > 5);
    quarry_free(c);
    close_asked(&a);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sentences_end_at_marks_before_white_space),
        cmocka_unit_test(titles_and_initials_end_no_sentence),
        cmocka_unit_test(blank_lines_lists_and_headings_cut),
        cmocka_unit_test(endless_sentences_are_cut_between_characters),
        cmocka_unit_test(passages_have_lines_and_bytes),
        cmocka_unit_test(passages_are_ranked_over_documents),
        cmocka_unit_test(weights_are_those_of_a_naive_softmax),
        cmocka_unit_test(threads_change_no_citation),
        cmocka_unit_test(citations_lie_in_their_documents),
        cmocka_unit_test(without_documents_there_is_nothing_to_cite),
        cmocka_unit_test(wrong_calls_are_told),
        cmocka_unit_test(allocation_failures_are_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
