/* Questions about documents: the reader of their file, what counts as right, and the measurement on a tiny random model. */
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include "eval_fixture.h"

static char folder[] = "/tmp/quarry_doc_XXXXXX";

static int open_all(void **state)
{
    static fixture f;
    char path[512];
    const char *models = getenv("QUARRY_TINY_MODELS");
    if (!models) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    if (!mkdtemp(folder)) return -1;
    snprintf(path, sizeof path, "%s/llama-f32.gguf", models);
    *state = &f;
    return fixture_open(&f, path);
}

static void path_in(char out[64], const char *name)
{
    snprintf(out, 64, "%s/%s", folder, name);
}

static void write_text(const char *name, const char *text)
{
    char path[64];
    path_in(path, name);
    FILE *out = fopen(path, "w");
    assert_true(out && fputs(text, out) >= 0 && fclose(out) == 0);
}

static int close_all(void **state)
{
    static const char *const names[] = {"a.txt", "blank.txt", "journal"};
    char path[64];
    for (size_t i = 0; i < TEST_COUNT(names); i++) path_in(path, names[i]), unlink(path);
    return close_model(state) || rmdir(folder);
}

static quarry_code parse(doc_set *set, const char *text, quarry_error *error)
{
    char path[64];
    path_in(path, "q.jsonl");
    return doc_parse(set, path, text, strlen(text), error);
}

/* ---- the reader ---- */

static void lines_with_one_document_share_it(void **state)
{
    (void)state;
    static const char lines[] =
        "{\"document\": \"a.txt\", \"question\": \"Who?\", \"answers\": [\"The Miller\", \"miller's son\"], \"id\": 7}\r\n"
        "\n"
        "{\"text\": \"a.txt\", \"question\": \"What?\", \"answer\": \"It.\"}\n"
        "{\"document\": \"/a.txt\", \"question\": \"Who?\", \"answer\": \"x\"}\n"
        "{\"document\": \"a.txt\", \"question\": \"Where?\", \"answer\": \"x\"}\n"
        "{\"text\": \"a.txt\", \"question\": \"When?\", \"answer\": \"x\"}"; /* no newline */
    doc_set set;
    quarry_error error = {0};
    char path[64];
    if (parse(&set, lines, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(set.n_questions, 5);
    assert_int_equal(set.n_documents, 3);
    const int documents[] = {0, 1, 2, 0, 1}, numbers[] = {1, 3, 4, 5, 6};
    for (int i = 0; i < 5; i++) {
        assert_int_equal(set.questions[i].document, documents[i]);
        assert_int_equal(set.questions[i].line, numbers[i]);
    }
    path_in(path, "a.txt");
    assert_string_equal(set.documents[0].path, path); /* relative to the file */
    assert_string_equal(set.documents[1].text, "a.txt");
    assert_null(set.documents[1].path);
    assert_string_equal(set.documents[2].path, "/a.txt");
    assert_int_equal(set.questions[0].n_answers, 2);
    assert_string_equal(set.questions[0].answers[0], " miller ");
    assert_string_equal(set.questions[0].answers[1], " millers son ");
    assert_string_equal(set.questions[0].question, "Who?");
    doc_set_free(&set);
    assert_int_equal(doc_parse(&set, "q.jsonl", lines, sizeof lines - 1, &error), QUARRY_OK);
    assert_string_equal(set.documents[0].path, "a.txt");
    doc_set_free(&set);
}

static void what_is_wrong_is_said_with_file_and_line(void **state)
{
    (void)state;
    static const char good[] = "{\"text\": \"t\", \"question\": \"q\", \"answer\": \"x\"}\n";
    static const struct {
        const char *line, *says;
    } bad[] = {
        {"{\"text\": \"t\"", "not JSON"},
        {"nonsense", "not JSON"},
        {"{\"text\": \"t\", \"text\": \"t\"}", "not JSON: duplicate"},
        {"{\"text\": \"\\u0000\"}", "not JSON"},
        {"[1]", "not an object"},
        {"7", "not an object"},
        {"{\"text\": \"t\", \"answer\": \"x\"}", "no \"question\""},
        {"{\"text\": \"t\", \"question\": null, \"answer\": \"x\"}", "\"question\" is not a string"},
        {"{\"text\": \"t\", \"question\": \" \\n\", \"answer\": \"x\"}", "\"question\" is empty"},
        {"{\"question\": \"q\", \"answer\": \"x\"}", "neither \"document\""},
        {"{\"text\": \"t\", \"document\": \"d\", \"question\": \"q\", \"answer\": \"x\"}", "both \"document\" and \"text\""},
        {"{\"document\": [\"d\"], \"question\": \"q\", \"answer\": \"x\"}", "\"document\" is not a string"},
        {"{\"document\": \"-\", \"question\": \"q\", \"answer\": \"x\"}", "not a file"},
        {"{\"text\": \"\", \"question\": \"q\", \"answer\": \"x\"}", "\"text\" is empty"},
        {"{\"text\": \"t\", \"question\": \"q\"}", "no \"answers\""},
        {"{\"text\": \"t\", \"question\": \"q\", \"answer\": [\"x\"]}", "\"answer\" is not a string"},
        {"{\"text\": \"t\", \"question\": \"q\", \"answers\": \"x\"}", "not an array"},
        {"{\"text\": \"t\", \"question\": \"q\", \"answers\": []}", "not an array of at least one"},
        {"{\"text\": \"t\", \"question\": \"q\", \"answers\": [\"x\", 2]}", "answer 2 is not a string"},
        {"{\"text\": \"t\", \"question\": \"q\", \"answers\": [\"x\"], \"answer\": \"x\"}", "both \"answer\""},
        {"{\"text\": \"t\", \"question\": \"q\", \"answers\": [\"x\", \"The...\"]}", "'The...' has no word"},
    };
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        char text[512];
        doc_set set;
        quarry_error error = {0};
        snprintf(text, sizeof text, "%s\n%s\n%s", good, bad[i].line, good);
        assert_int_equal(parse(&set, text, &error), QUARRY_ERROR_FORMAT);
        doc_set_free(&set);
        if (!strstr(error.message, "q.jsonl: line 3: ") || !strstr(error.message, bad[i].says)) fail_msg("%zu: %s", i, error.message);
    }
    static const char *const empty[] = {"", "\n \n"};
    for (int i = 0; i < 2; i++) {
        doc_set set;
        quarry_error error = {0};
        assert_int_equal(parse(&set, empty[i], &error), QUARRY_ERROR_FORMAT);
        doc_set_free(&set);
        assert_non_null(strstr(error.message, "q.jsonl: has no question"));
    }
}

static void documents_that_are_missing_empty_or_folders_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *line, *says;
        quarry_code code;
    } cases[] = {{"\n{\"document\": \"none.txt\", \"question\": \"q\", \"answer\": \"x\"}", "none.txt", QUARRY_ERROR_IO},
                 {"\n{\"document\": \"blank.txt\", \"question\": \"q\", \"answer\": \"x\"}", "blank.txt is empty", QUARRY_ERROR_FORMAT},
                 {"\n{\"document\": \"/\", \"question\": \"q\", \"answer\": \"x\"}", "/: cannot read: Is a directory", QUARRY_ERROR_IO}};
    write_text("blank.txt", " \n");
    write_text("a.txt", "Here it is.");
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        doc_set set;
        quarry_error error = {0};
        assert_int_equal(parse(&set, cases[i].line, &error), QUARRY_OK);
        assert_int_equal(doc_load(&set, &error), cases[i].code);
        doc_set_free(&set);
        if (!strstr(error.message, "q.jsonl: line 2: ") || !strstr(error.message, cases[i].says)) fail_msg("%s", error.message);
    }
    doc_set set;
    quarry_error error = {0};
    assert_int_equal(parse(&set, "{\"document\": \"a.txt\", \"question\": \"q\", \"answer\": \"x\"}", &error), QUARRY_OK);
    assert_int_equal(doc_load(&set, &error), QUARRY_OK);
    assert_string_equal(set.documents[0].text, "Here it is.");
    assert_int_equal(set.documents[0].n_bytes, 11);
    doc_set_free(&set);
}

static void lack_of_memory_while_reading_is_an_error(void **state)
{
    (void)state;
    quarry_code code = QUARRY_ERROR_MEMORY;
    int64_t fail = 0;
    write_text("a.txt", "Here it is.");
    for (; code != QUARRY_OK && fail < 100; fail++) {
        doc_set set;
        quarry_error error = {0};
        memory_fail_after(fail);
        code = parse(&set,
                     "{\"document\": \"a.txt\", \"question\": \"q\", \"answers\": [\"x\", \"y\"]}\n"
                     "{\"text\": \"t\", \"question\": \"q\", \"answer\": \"x\"}",
                     &error);
        if (code == QUARRY_OK) code = doc_load(&set, &error);
        memory_fail_after(-1);
        doc_set_free(&set);
        assert_true(code == QUARRY_OK || (code == QUARRY_ERROR_MEMORY && error.code == QUARRY_ERROR_MEMORY));
    }
    assert_true(code == QUARRY_OK && fail > 15);
}

/* ---- right and wrong ---- */

/* The first eight: as normalize_answer of SQuAD's evaluate-v2.0.py has them, with a space at both ends. */
static void answers_are_normalised_as_squad_does(void **state)
{
    (void)state;
    static const struct {
        const char *text, *words;
    } cases[] = {{"The Eiffel Tower", " eiffel tower "},
                 {"an  apple\ta day,\nthe  doctor", " apple day doctor "},
                 {"U.S.A. (1,200 km)", " usa 1200 km "},
                 {"well-known; it's", " wellknown its "},
                 {"theatre, another, banana", " theatre another banana "},
                 {"A", " "},
                 {"\"The...\"", " "},
                 {"\xc3\x89mile Z\xc3\xb6LA", " \xc3\xa9mile z\xc3\xb6la "},
                 {"", " "},
                 {"the\xc2\xa0\xe2\x80\x9cmill\xe2\x80\x9d\xe2\x80\x94house", " millhouse "},
                 {"\xe5\x8c\x97\xe4\xba\xac\xe3\x80\x82", " \xe5\x8c\x97 \xe4\xba\xac "},
                 {"a\xff\xc0z", " a\xef\xbf\xbd\xef\xbf\xbdz "},
                 {"\xf0\x90\x90\x80", " \xf0\x90\x90\xa8 "}}; /* Deseret long I, upper and lower case */
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        char *words = doc_normalise(cases[i].text, NULL);
        assert_string_equal(words, cases[i].words);
        memory_free(words);
    }
}

static void an_answer_is_right_when_it_has_the_words(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        bool right;
    } cases[] = {{"It was the Old Miller, I think.", true},
                 {"old miller", true},
                 {"an old, old miller's", false},
                 {"The old and the miller", false},
                 {"7", true},
                 {"It is 17.", false},
                 {"number 7-8", false},
                 {"7.", true},
                 {"", false}};
    char *answers[] = {doc_normalise("the old miller", NULL), doc_normalise("7", NULL)};
    const doc_question q = {.answers = answers, .n_answers = 2};
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        bool right;
        assert_int_equal(doc_answered(&q, cases[i].text, &right, NULL), QUARRY_OK);
        if (right != cases[i].right) fail_msg("'%s' is %s", cases[i].text, right ? "right" : "wrong");
    }
    memory_free(answers[0]);
    memory_free(answers[1]);
}

/* ---- the measurement ---- */

/* Two documents, asked in turn; the model is random, so one question takes any letter. */
static void make_set(doc_set *set, const fixture *f)
{
    char document[4096] = "", lines[16384];
    quarry_error error = {0};
    for (int64_t i = 0; i < 300; i++) {
        size_t n, used = strlen(document);
        const char *piece = quarry_token_text(f->model, f->tokens[i], &n);
        snprintf(document + used, sizeof document - used, "%.*s", (int)n, piece);
    }
    for (char *c = document; *c; c++)
        if (*c == '\n') *c = ' ';
    write_text("a.txt", document);
    int n = snprintf(lines, sizeof lines, "{\"document\": \"a.txt\", \"question\": \"Who walked down?\", \"answer\": \"miller\"}\n");
    n += snprintf(lines + n, sizeof lines - (size_t)n, "{\"text\": \"%s\", \"question\": \"Who wrote?\", \"answer\": \"sister\"}\n",
                  document + 200);
    snprintf(lines + n, sizeof lines - (size_t)n, "{\"document\": \"a.txt\", \"question\": \"Where to?\", \"answer\": \"river\"}\n");
    if (parse(set, lines, &error) != QUARRY_OK || doc_load(set, &error) != QUARRY_OK) fail_msg("%s", error.message);
}

typedef struct seen {
    int n, of_line[8], right[3];
} seen;

static void see(const doc_question *q, const char *attn, bool correct, const char *answer, void *data)
{
    seen *s = data;
    bool again;
    assert_int_equal(doc_answered(q, answer, &again, NULL), QUARRY_OK);
    assert_true(again == correct);
    s->right[s->n % 3] += correct;
    assert_string_equal(attn, s->n % 3 == 2 ? "window" : s->n % 3 ? attn : "full");
    s->of_line[q->line]++;
    s->n++;
}

static void every_question_is_asked_under_every_policy(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"full", "window"};
    doc_set set;
    doc_result r[3];
    seen s = {0};
    quarry_error error = {0};
    make_set(&set, f);
    const doc_params params = {.attn = attn, .n_attn = 2, .set = &set, .n_answer = 12};
    if (doc_measure(f->model, &params, NULL, see, &s, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(s.n, 9);
    for (int i = 1; i <= 3; i++) assert_int_equal(s.of_line[i], 3);
    for (int i = 0; i < 3; i++) {
        assert_string_equal(r[i].score.task, "all");
        assert_int_equal(r[i].score.n, 3);
        assert_int_equal(r[i].correct, s.right[i]);
        assert_int_equal(r[i].full_correct, s.right[0]);
        assert_true(fabs(r[i].score.loss - (s.right[0] - s.right[i]) / 3.0) < 1e-12);
        assert_true(r[i].score.score_full == r[0].score.score && r[i].kept <= r[i].correct);
        assert_in_range(r[i].score.length, 200, 400);
    }
    assert_true(r[1].score.loss == 0 && r[1].kept == r[1].full_correct && r[1].score.reading.bytes_share == 1);
    assert_true(r[2].score.reading.rows_share > 0.1 && r[2].score.reading.rows_share < 0.7);
    doc_set_free(&set);
}

static void what_a_model_says_is_right_when_it_is_accepted(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"full"};
    doc_set set;
    doc_result r[2];
    quarry_error error = {0};
    make_set(&set, f);
    char *said[3];
    const doc_params params = {.attn = attn, .n_attn = 1, .set = &set, .n_answer = 12};
    for (int i = 0; i < 3; i++) { /* greedily, by hand */
        quarry_prompt prompt;
        quarry_sampling sampling;
        const doc_document *d = &set.documents[set.questions[i].document];
        const quarry_document document = {.text = d->text, .n_bytes = d->n_bytes};
        char text[2048];
        size_t n = 0;
        quarry_session *session = quarry_session_open(f->model, &(quarry_session_params){.attn = "full"}, &error);
        assert_int_equal(quarry_prompt_build(f->model, &document, 1, NULL, set.questions[i].question, &prompt, &error), 0);
        assert_int_equal(quarry_session_read(session, prompt.context, prompt.n_context, NULL, &error), 0);
        assert_int_equal(quarry_session_feed(session, prompt.question, prompt.n_question, NULL, &error), 0);
        const int64_t before = quarry_session_length(session);
        quarry_sampling_default(&sampling);
        sampling.max_tokens = 12;
        assert_int_equal(quarry_session_generate(session, &sampling, NULL, NULL, NULL, &error), 0);
        for (int64_t t = before; t < quarry_session_length(session); t++) {
            size_t length;
            const char *piece = quarry_token_text(f->model, quarry_session_tokens(session)[t], &length);
            if (quarry_token_ends(f->model, quarry_session_tokens(session)[t])) break;
            memcpy(text + n, piece, length);
            n += length;
        }
        text[n] = '\0';
        said[i] = doc_normalise(text, NULL);
        memory_free(set.questions[i].answers[0]);
        set.questions[i].answers[0] = memory_string(i == 1 ? " never said " : said[i], strlen(i == 1 ? " never said " : said[i]), NULL);
        quarry_session_close(session);
        quarry_prompt_free(&prompt);
    }
    if (doc_measure(f->model, &params, NULL, NULL, NULL, r, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(r[0].correct, 2);
    assert_int_equal(r[1].kept, 2);
    for (int i = 0; i < 3; i++) memory_free(said[i]);
    doc_set_free(&set);
}

static bool stop_after(int64_t done, int64_t total, void *data)
{
    assert_true(done <= total);
    return done < *(const int64_t *)data;
}

static journal *open_journal(quarry_error *error)
{
    char path[64];
    path_in(path, "journal");
    json_t *header = json_pack("{s:i}", "x", 1);
    journal *j = journal_open(path, header, error);
    json_decref(header);
    if (!j) fail_msg("%s", error->message);
    return j;
}

static void a_stopped_measurement_goes_on_to_the_same_result(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"ivfpq", "window"};
    doc_set set;
    doc_result whole[3], resumed[3];
    quarry_error error = {0};
    char path[64];
    make_set(&set, f);
    doc_params params = {.attn = attn, .n_attn = 2, .set = &set, .n_answer = 6};
    if (doc_measure(f->model, &params, NULL, NULL, NULL, whole, &error) != QUARRY_OK) fail_msg("%s", error.message);
    path_in(path, "journal");
    unlink(path);
    int64_t after = 500; /* in the second question about the first document */
    const quarry_watch watch = {stop_after, &after};
    params.journal = open_journal(&error);
    assert_int_equal(doc_measure(f->model, &params, &watch, NULL, NULL, resumed, &error), QUARRY_ERROR_CANCELLED);
    const int64_t n_before = journal_count(params.journal);
    assert_true(n_before >= 1 && n_before < 3);
    journal_close(params.journal);
    params.journal = open_journal(&error);
    seen s = {0};
    if (doc_measure(f->model, &params, NULL, see, &s, resumed, &error) != QUARRY_OK) fail_msg("%s", error.message);
    assert_int_equal(s.n, 3 * (3 - n_before));
    for (int i = 0; i < 3; i++) {
        assert_true(whole[i].score.score == resumed[i].score.score && whole[i].score.loss_high == resumed[i].score.loss_high);
        assert_memory_equal(&whole[i].score.reading, &resumed[i].score.reading, sizeof whole[i].score.reading);
        assert_true(whole[i].kept == resumed[i].kept && whole[i].score.length == resumed[i].score.length);
    }
    journal_close(params.journal);
    unlink(path);
    static const char *const records[] = {"{}", "{\"policies\":[]}", "{\"policies\":[{},{},{}]}", "{\"policies\":7}"};
    for (size_t i = 0; i < TEST_COUNT(records); i++) {
        params.journal = open_journal(&error);
        assert_int_equal(journal_add(params.journal, "line 1", json_loads(records[i], 0, NULL), &error), QUARRY_OK);
        assert_int_equal(doc_measure(f->model, &params, NULL, NULL, NULL, resumed, &error), QUARRY_ERROR_FORMAT);
        assert_non_null(strstr(error.message, "line 1"));
        journal_close(params.journal);
        unlink(path);
    }
    doc_set_free(&set);
}

static void what_does_not_fit_is_said_before_reading(void **state)
{
    const fixture *f = *state;
    doc_set set;
    doc_result r;
    quarry_model_info info;
    quarry_error error = {0};
    make_set(&set, f);
    quarry_model_get_info(f->model, &info);
    const int64_t none = 0;
    const quarry_watch watch = {stop_after, (void *)&none};
    const doc_params params = {.set = &set, .n_answer = (int)info.n_ctx_train - 150};
    assert_int_equal(doc_measure(f->model, &params, &watch, NULL, NULL, &r, &error), QUARRY_ERROR_CONTEXT);
    assert_non_null(strstr(error.message, "q.jsonl: line 1: "));
    const doc_params unknown = {.attn = (const char *const[]){"nonesuch"}, .n_attn = 1, .set = &set, .n_answer = 1};
    assert_int_equal(doc_measure(f->model, &unknown, NULL, NULL, NULL, &r, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "nonesuch"));
    doc_set_free(&set);
}

static void lack_of_memory_is_an_error_anywhere(void **state)
{
    const fixture *f = *state;
    static const char *const attn[] = {"window"};
    doc_set set;
    doc_result r[2];
    quarry_code code = QUARRY_ERROR_MEMORY;
    int64_t failures = 0;
    make_set(&set, f);
    const doc_params params = {.attn = attn, .n_attn = 1, .set = &set, .n_answer = 2};
    for (int64_t i = 0; i < 20000 && code != QUARRY_OK; i = i < 40 ? i + 1 : i + i / 8, failures++) {
        quarry_error error = {0};
        memory_fail_after(i);
        code = doc_measure(f->model, &params, NULL, NULL, NULL, r, &error);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || (code == QUARRY_ERROR_MEMORY && error.code == QUARRY_ERROR_MEMORY));
    }
    assert_true(code == QUARRY_OK && failures > 20);
    doc_set_free(&set);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_with_one_document_share_it),
        cmocka_unit_test(what_is_wrong_is_said_with_file_and_line),
        cmocka_unit_test(documents_that_are_missing_empty_or_folders_are_named),
        cmocka_unit_test(lack_of_memory_while_reading_is_an_error),
        cmocka_unit_test(answers_are_normalised_as_squad_does),
        cmocka_unit_test(an_answer_is_right_when_it_has_the_words),
        cmocka_unit_test(every_question_is_asked_under_every_policy),
        cmocka_unit_test(what_a_model_says_is_right_when_it_is_accepted),
        cmocka_unit_test(a_stopped_measurement_goes_on_to_the_same_result),
        cmocka_unit_test(what_does_not_fit_is_said_before_reading),
        cmocka_unit_test(lack_of_memory_is_an_error_anywhere),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}
