#include <stdio.h>
#include <string.h>

#include "cli/eval_common.h"

typedef struct ruler_settings {
    eval_settings eval;
    const char *tasks, *lengths;
    int64_t samples, seed;
} ruler_settings;

static const cli_option ruler_table[] = {
    {"--tasks", "TASK,...", CLI_TEXT, offsetof(ruler_settings, tasks), "all",
     "of niah_single_1, _2, _3, niah_multikey_1, _2, _3, niah_multivalue, niah_multiquery, vt, cwe, fwe", 0, 0},
    {"--lengths", "N,...", CLI_TEXT, offsetof(ruler_settings, lengths), "2000,4000,8000",
     "tokens, question and room for the answer included", 0, 0},
    {"--samples", "N", CLI_INT, offsetof(ruler_settings, samples), "10", "per task and length", 1, 1e6},
    {"-s, --seed", "N", CLI_INT, offsetof(ruler_settings, seed), "1", "seed of everything drawn", 0, 9e18},
    {"--journal", "FILE", CLI_TEXT, offsetof(ruler_settings, eval.journal), NULL,
     "keep finished samples in FILE; the same command goes on from there when it was stopped", 0, 0},
    {0}};

static const cli_group ruler_groups[] = {{"Measurement", ruler_table, 0},
                                         {"Texts and policies", eval_options_table, offsetof(ruler_settings, eval.input)},
                                         {"Model", cli_model_table, offsetof(ruler_settings, eval.model)},
                                         {"Output", cli_output_table, offsetof(ruler_settings, eval.output)},
                                         {0}};

static void on_answer(const char *task, int64_t length, const char *attn, double score, const char *text, void *data)
{
    (void)data;
    fprintf(stderr, "%s, %lld tokens, %s: %.2f: %s\n", task, (long long)length, attn, score, text);
}

static void ruler_print(const eval_input *in, const ruler_settings *s, const score_result *results, int n)
{
    const int width = eval_attn_width(&in->policies);
    eval_print_model(in);
    cli_print("RULER, %lld samples a task and length; scores in %%, loss: full attention's less the policy's on the same samples, with 95 "
              "%% intervals.\n"
              "A task counts (*) where the lower end of full attention's interval is above %.0f %%.\n\n",
              (long long)s->samples, 100 * RULER_GATE);
    cli_print("%-16s  %7s  %-*s  %24s  %24s  %6s  %6s\n", "task", "length", width, "policy", "score", "loss", "rows", "bytes");
    for (int i = 0; i < n; i++) {
        const score_result *r = &results[i];
        char length[24] = "";
        if (r->length) snprintf(length, sizeof length, "%lld", (long long)r->length);
        cli_print("%-16s%s %7s  %-*s  %6.1f (%6.1f to %6.1f)  %6.1f (%6.1f to %6.1f)  %4.1f %%  %4.1f %%\n", r->task,
                  r->counted ? "*" : " ", length, width, r->attn, 100 * r->score, 100 * r->score_low, 100 * r->score_high, 100 * r->loss,
                  100 * r->loss_low, 100 * r->loss_high, 100 * r->reading.rows_share, 100 * r->reading.bytes_share);
    }
}

static int ruler_print_json(eval_input *in, const score_result *results, int n)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++) {
        json_t *item = eval_json_score(&results[i]);
        json_object_set_new(item, "counted", json_boolean(results[i].counted));
        json_array_append_new(list, item);
    }
    return eval_print_json(in, list);
}

/* An exit code. */
static int parse_tasks(ruler_params *params, const char *text)
{
    for (int i = 0; i < RULER_N_TASKS && strcmp(text, "all") == 0; i++) params->tasks[i] = true;
    if (params->tasks[0]) return CLI_OK;
    for (const char *at = text; *at;) {
        const size_t n = strcspn(at, ",");
        const int task = ruler_task_find(at, n);
        if (task < 0) return cli_fail_usage(&command_eval_ruler, "--tasks: '%.*s' is not one of RULER's", (int)n, at);
        params->tasks[task] = true;
        at += n + (at[n] == ',');
    }
    return CLI_OK;
}

static json_t *json_parameters(const eval_input *in, const ruler_settings *s)
{
    return json_pack("{s:s, s:s, s:I, s:I, s:o}", "tasks", s->tasks, "lengths", s->lengths, "samples", (json_int_t)s->samples, "batch_size",
                     (json_int_t)s->eval.input.n_batch, "attn", eval_json_policies(in));
}

static int measure_print(eval_input *in, const ruler_settings *s, const ruler_params *params)
{
    cli_progress progress;
    quarry_error error;
    const int n = ruler_n_results(params);
    score_result *results = memory_zero((size_t)n, sizeof *results, "results", &error);
    if (!results) return cli_fail_error(&error);
    const ruler_answer_fn tell = s->eval.output.verbose ? on_answer : NULL;
    const quarry_watch watch = eval_measure_begin(&progress, &s->eval);
    int code = eval_measure_end(&progress, ruler_measure(in->model, params, &watch, tell, NULL, results, &error), &error);
    if (!code && s->eval.output.json)
        code = ruler_print_json(in, results, n);
    else if (!code)
        ruler_print(in, s, results, n);
    memory_free(results);
    return code;
}

static int ruler_run_command(const void *settings, const cli_list *arguments)
{
    const ruler_settings *s = settings;
    eval_input in = {.keep_bytes = true};
    int64_t *lengths = NULL;
    quarry_error error;
    ruler_params params = {.samples = (int)s->samples, .seed = (uint64_t)s->seed, .n_batch = (int)s->eval.input.n_batch};
    int code = parse_tasks(&params, s->tasks);
    if (!code && (params.n_lengths = (int)list_parse_numbers(s->lengths, "--lengths", 256, 1000000000, &lengths, &error)) < 0)
        code = cli_fail_usage(&command_eval_ruler, "%s", error.message);
    if (!code) code = eval_input_open(&in, &s->eval, arguments, &command_eval_ruler);
    params.text = in.bytes;
    params.n_bytes = in.n_bytes;
    params.lengths = lengths;
    params.attn = (const char *const *)in.policies.specs;
    params.n_attn = in.policies.n;
    if (!code) code = eval_input_record(&in, &command_eval_ruler, &s->eval, arguments, s->seed, json_parameters(&in, s));
    params.journal = in.journal;
    if (!code) code = measure_print(&in, s, &params);
    memory_free(lengths);
    eval_input_close(&in);
    return code;
}

const cli_command command_eval_ruler = {
    "eval ruler",
    "[options] -f FILE...",
    "measure what a policy loses on RULER's synthetic tasks",
    "Generates the eleven tasks of RULER (arXiv 2404.06654) that need no data set: needles in noise, in the text, and among other needles; "
    "variables to track; common and frequent words. "
    "Every context is read once with full attention; the question and the answer run under each policy. -v prints every answer.",
    ruler_groups,
    sizeof(ruler_settings),
    ruler_run_command,
};
