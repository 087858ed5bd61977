#include <stdio.h>

#include "cli/eval_common.h"

typedef struct doc_settings {
    eval_settings eval; /* its files stay empty */
    const char *file;
    int64_t n_answer;
} doc_settings;

static const cli_option doc_table[] = {
    {"-f, --file", "FILE", CLI_TEXT, offsetof(doc_settings, file), NULL,
     "questions, one JSON object a line: \"document\" (a path, relative to FILE) or \"text\", \"question\", \"answers\" (array) or "
     "\"answer\"",
     0, 0},
    {"-n, --predict", "N", CLI_INT, offsetof(doc_settings, n_answer), "64", "most tokens of an answer", 1, 65536},
    {"--journal", "FILE", CLI_TEXT, offsetof(doc_settings, eval.journal), NULL,
     "keep finished questions in FILE; the same command goes on from there when it was stopped", 0, 0},
    {0}};

static const cli_group doc_groups[] = {{"Measurement", doc_table, 0},
                                       {"Policies", eval_options_table + 1, offsetof(doc_settings, eval.input)},
                                       {"Model", cli_model_table, offsetof(doc_settings, eval.model)},
                                       {"Output", cli_output_table, offsetof(doc_settings, eval.output)},
                                       {0}};

static void on_answer(const doc_question *q, const char *attn, bool correct, const char *answer, void *data)
{
    fprintf(stderr, "%s: line %lld, %s: %s: %s\n", (const char *)data, (long long)q->line, attn, correct ? "right" : "wrong", answer);
}

static void doc_print(const eval_input *in, const doc_set *set, const doc_result *results)
{
    const int width = eval_attn_width(&in->policies);
    eval_print_model(in);
    cli_print(
        "%d questions about %d documents (%lld tokens read before a question, mean); full attention answers %lld\n"
        "kept: of these, those a policy answers; net loss: share that only full attention answers, less the reverse; 95 %% intervals\n\n",
        set->n_questions, set->n_documents, (long long)results[0].score.length, (long long)results[0].full_correct);
    cli_print("%-*s  %9s  %22s  %9s  %22s  %6s  %6s\n", width, "policy", "right", "share (interval)", "kept", "net loss (interval)", "rows",
              "bytes");
    for (int i = 0; i <= in->policies.n; i++) {
        const doc_result *r = &results[i];
        const score_result *s = &r->score;
        char right[48], kept[48];
        snprintf(right, sizeof right, "%lld/%lld", (long long)r->correct, (long long)s->n);
        snprintf(kept, sizeof kept, "%lld/%lld", (long long)r->kept, (long long)r->full_correct);
        cli_print("%-*s  %9s  %5.1f %% (%5.1f to %5.1f)  %9s  %5.1f %% (%5.1f to %5.1f)  %4.1f %%  %4.1f %%\n", width, s->attn, right,
                  100 * s->score, 100 * s->score_low, 100 * s->score_high, kept, 100 * s->loss, 100 * s->loss_low, 100 * s->loss_high,
                  100 * s->reading.rows_share, 100 * s->reading.bytes_share);
    }
}

static int doc_print_json(eval_input *in, const doc_result *results, int n)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++) {
        const doc_result *r = &results[i];
        json_t *item = eval_json_score(&r->score);
        json_object_update_new(item, json_pack("{s:I, s:I, s:I, s:f, s:f}", "correct", (json_int_t)r->correct, "full_correct",
                                               (json_int_t)r->full_correct, "kept", (json_int_t)r->kept, "kept_low", r->kept_low,
                                               "kept_high", r->kept_high));
        json_array_append_new(list, item);
    }
    return eval_print_json(in, list);
}

static json_t *json_parameters(const eval_input *in, const doc_settings *s, const doc_set *set)
{
    return json_pack("{s:i, s:i, s:I, s:I, s:o}", "documents", set->n_documents, "questions", set->n_questions, "predict",
                     (json_int_t)s->n_answer, "batch_size", (json_int_t)s->eval.input.n_batch, "attn", eval_json_policies(in));
}

static int measure_print(eval_input *in, const doc_settings *s, const doc_params *params)
{
    cli_progress progress;
    quarry_error error;
    doc_result *results = memory_zero((size_t)in->policies.n + 1, sizeof *results, "results", &error);
    if (!results) return cli_fail_error(&error);
    const doc_answer_fn tell = s->eval.output.verbose ? on_answer : NULL;
    const quarry_watch watch = eval_measure_begin(&progress, &s->eval);
    int code = eval_measure_end(&progress, doc_measure(in->model, params, &watch, tell, params->set->path, results, &error), &error);
    if (!code && s->eval.output.json)
        code = doc_print_json(in, results, in->policies.n + 1);
    else if (!code)
        doc_print(in, params->set, results);
    memory_free(results);
    return code;
}

/* The file of questions, its documents, and then the model: what is wrong with the former is said at once. An exit code. */
static int open_input(eval_input *in, doc_set *set, const doc_settings *s)
{
    char *text = NULL;
    size_t n_bytes;
    quarry_error error;
    int code = cli_read_file(&text, &n_bytes, s->file);
    if (!code && (doc_parse(set, s->file, text, n_bytes, &error) != QUARRY_OK || doc_load(set, &error) != QUARRY_OK))
        code = cli_fail_error(&error);
    if (!code) code = eval_input_begin(in, &s->eval, set->n_documents + 1);
    if (!code) code = eval_input_add(in, s->file, text, n_bytes);
    for (int i = 0; i < set->n_documents && !code; i++) {
        const doc_document *d = &set->documents[i];
        if (d->path) code = eval_input_add(in, d->path, d->text, d->n_bytes);
    }
    memory_free(text);
    return code;
}

static int doc_run(const void *settings, const cli_list *arguments)
{
    const doc_settings *s = settings;
    eval_input in = {0};
    doc_set set = {0};
    if (!s->file) return cli_fail_usage(&command_eval_doc, "no questions: name a file with -f FILE");
    if (arguments->n) return cli_fail_usage(&command_eval_doc, "'%s': one file of questions expected, with -f", arguments->items[0]);
    int code = open_input(&in, &set, s);
    if (!code) code = eval_input_record(&in, &command_eval_doc, &s->eval, arguments, -1, json_parameters(&in, s, &set));
    const doc_params params = {.attn = (const char *const *)in.policies.specs,
                               .n_attn = in.policies.n,
                               .set = &set,
                               .n_answer = (int)s->n_answer,
                               .n_batch = (int)s->eval.input.n_batch,
                               .journal = in.journal};
    if (!code) code = measure_print(&in, s, &params);
    eval_input_close(&in); /* its texts are named by the set */
    doc_set_free(&set);
    return code;
}

const cli_command command_eval_doc = {
    "eval doc",
    "[options] -f FILE",
    "measure what a policy loses on questions about your own documents",
    "Reads every document once with full attention; each question about it and the answer run under each policy, through the chat "
    "template. "
    "An answer is right when an accepted one is among its words; letter case, punctuation and articles do not count. -v prints every "
    "answer.",
    doc_groups,
    sizeof(doc_settings),
    doc_run,
};
