#include <math.h>
#include <stdio.h>
#include <string.h>

#include "cli/eval_common.h"

typedef struct kld_settings {
    eval_settings eval;
    const char *task;
    int64_t depth, n_steps, samples, needles, seed;
    bool audit;
} kld_settings;

static const cli_option kld_table[] = {
    {"--task", "TASK", CLI_TEXT, offsetof(kld_settings, task), "prose",
     "what follows the text read: prose, the text's own next tokens; needle, questions about sentences hidden in it, with the right "
     "answer; both",
     0, 0},
    {"-d, --depth", "N", CLI_INT, offsetof(kld_settings, depth), "6000", "tokens of the text read before", 1, 1e9},
    {"-n, --steps", "N", CLI_INT, offsetof(kld_settings, n_steps), "96", "prose: tokens of the text that follow, fed one by one", 1, 1e6},
    {"--samples", "N", CLI_INT, offsetof(kld_settings, samples), "2", "places measured, spread over the texts, and as many haystacks", 1,
     1e6},
    {"--needles", "N", CLI_INT, offsetof(kld_settings, needles), "8", "needle: hidden in each haystack, every one asked for", 1,
     NEEDLE_MAX},
    {"-s, --seed", "N", CLI_INT, offsetof(kld_settings, seed), "1", "needle: seed of places, keys and numbers", 0, 9e18},
    {"--audit", NULL, CLI_SWITCH, offsetof(kld_settings, audit), NULL,
     "also compare what was read with exact scores: attention mass covered, recall of the top k (slower)", 0, 0},
    {"--journal", "FILE", CLI_TEXT, offsetof(kld_settings, eval.journal), NULL,
     "keep finished samples in FILE; the same command goes on from there when it was stopped", 0, 0},
    {0}};

static const cli_group kld_groups[] = {{"Measurement", kld_table, 0},
                                       {"Texts and policies", eval_options_table, offsetof(kld_settings, eval.input)},
                                       {"Reading", eval_way_table, offsetof(kld_settings, eval.input)},
                                       {"Model", cli_model_table, offsetof(kld_settings, eval.model)},
                                       {"Output", cli_output_table, offsetof(kld_settings, eval.output)},
                                       {0}};

static void print_share(double share)
{
    if (isnan(share))
        cli_print("  %7s", "-");
    else
        cli_print("  %5.1f %%", 100 * share);
}

static void kld_print_task(const eval_input *in, const kld_settings *s, const kld_result *results)
{
    const int width = eval_attn_width(&in->policies);
    const bool asked = results->task == KLD_NEEDLE;
    if (asked)
        cli_print("\nneedle: %lld questions about %lld haystacks of %lld tokens, the digits of the right answer; %s has %lld "
                  "right\n\n",
                  (long long)results->n_samples, (long long)s->samples, (long long)s->depth, results->attn,
                  (long long)results->full_correct);
    else
        cli_print("\nprose: %lld x %lld tokens after %lld read\n\n", (long long)results->n_samples, (long long)s->n_steps,
                  (long long)s->depth);
    cli_print("%-*s  %18s  %8s  %8s  %19s  %7s  %10s", width, "policy", "mean KLD ± s.e.", "99 %", "max", "dNLL ± s.e.", "top-1",
              "perplexity");
    if (asked) cli_print("  %9s", "kept");
    if (s->audit) cli_print("  %7s  %7s", "mass", "recall");
    cli_print("  %7s  %7s  %7s  %7s  %7s\n", "rows", "index", "tables", "tail", "bytes");
    for (int i = 0; i <= in->n_attn; i++) {
        const kld_result *r = &results[i];
        cli_print("%-*s  %8.5f ± %7.5f  %8.4f  %8.4f  %9.5f ± %7.5f  %5.1f %%  %10.3f", width, r->attn, r->kld.steps.mean,
                  eval_best_error(&r->kld), r->kld.steps.p99, r->kld.steps.max, r->dnll.steps.mean, eval_best_error(&r->dnll),
                  100 * r->agreement, r->perplexity);
        if (asked) {
            char kept[48];
            snprintf(kept, sizeof kept, "%lld/%lld", (long long)r->kept, (long long)r->full_correct);
            cli_print("  %9s", kept);
        }
        if (s->audit) {
            print_share(r->mass);
            print_share(r->recall);
        }
        print_share(r->reading.rows_share);
        print_share(r->reading.index_share);
        print_share(r->reading.tables_share);
        print_share(r->reading.tail_share);
        print_share(r->reading.bytes_share);
        cli_print("\n");
    }
}

static void kld_print(const eval_input *in, const kld_settings *s, const kld_result *results, int n_results)
{
    eval_print_model(in);
    cli_print("KL divergence of next-token distributions to those of %s, in nats\n", results->attn);
    for (int i = 0; i < n_results; i += in->n_attn + 1) kld_print_task(in, s, &results[i]);
}

static json_t *json_result(const kld_result *r)
{
    json_t *item = json_pack("{s:s, s:s, s:I, s:o, s:o, s:f, s:f, s:o, s:o, s:o}", "task", kld_task_names[r->task], "attn", r->attn,
                             "samples", (json_int_t)r->n_samples, "kld", eval_json_mean(&r->kld), "dnll", eval_json_mean(&r->dnll),
                             "top1_agreement", r->agreement, "perplexity", r->perplexity, "mass", eval_json_number(r->mass), "recall",
                             eval_json_number(r->recall), "reading", eval_json_reading(&r->reading));
    if (r->task == KLD_NEEDLE)
        json_object_update_new(item, json_pack("{s:I, s:I, s:I, s:f, s:f}", "full_correct", (json_int_t)r->full_correct, "correct",
                                               (json_int_t)r->correct, "kept", (json_int_t)r->kept, "kept_low", r->kept_low, "kept_high",
                                               r->kept_high));
    return item;
}

static int kld_print_json(eval_input *in, const kld_result *results, int n_results)
{
    json_t *list = json_array();
    for (int i = 0; i < n_results; i++) json_array_append_new(list, json_result(&results[i]));
    return eval_print_json(in, list);
}

/* samples and haystacks of the task; an exit code. */
static int set_task(kld_params *params, const kld_settings *s)
{
    const bool both = !strcmp(s->task, "both"), prose = both || !strcmp(s->task, kld_task_names[KLD_PROSE]);
    const bool needles = both || !strcmp(s->task, kld_task_names[KLD_NEEDLE]);
    if (!prose && !needles) return cli_fail_usage(&command_eval_kld, "--task %s: should be prose, needle or both", s->task);
    params->samples = prose ? (int)s->samples : 0;
    params->haystacks = needles ? (int)s->samples : 0;
    return CLI_OK;
}

static json_t *json_parameters(const eval_input *in, const kld_settings *s)
{
    json_t *parameters = json_pack("{s:s, s:I, s:I, s:I, s:I, s:b, s:I, s:o}", "task", s->task, "depth", (json_int_t)s->depth, "steps",
                                   (json_int_t)s->n_steps, "samples", (json_int_t)s->samples, "needles", (json_int_t)s->needles, "audit",
                                   s->audit, "batch_size", (json_int_t)s->eval.input.n_batch, "attn", eval_json_policies(in));
    eval_json_way(parameters, &s->eval.input);
    return parameters;
}

/* Measures and prints. */
static int measure_print(eval_input *in, const kld_settings *s, const kld_params *params)
{
    cli_progress progress;
    quarry_error error;
    kld_result *results = memory_zero((size_t)kld_n_results(params), sizeof *results, "results", &error);
    if (!results) return cli_fail_error(&error);
    const quarry_watch watch = eval_measure_begin(&progress, &s->eval);
    int code = eval_measure_end(&progress, kld_measure(in->model, params, &watch, results, &error), &error);
    if (!code && s->eval.output.json)
        code = kld_print_json(in, results, kld_n_results(params));
    else if (!code)
        kld_print(in, s, results, kld_n_results(params));
    memory_free(results);
    return code;
}

static int kld_run(const void *settings, const cli_list *arguments)
{
    const kld_settings *s = settings;
    eval_input in = {0};
    kld_params params = {0};
    int code = set_task(&params, s);
    if (!code) code = eval_input_open(&in, &s->eval, arguments, &command_eval_kld);
    if (!code)
        code = eval_input_record(&in, &command_eval_kld, &s->eval, arguments, params.haystacks ? s->seed : -1, json_parameters(&in, s));
    if (!code) params.way = eval_input_way(&in, &s->eval.input, s->depth + s->n_steps);
    params.attn = in.attn;
    params.n_attn = in.n_attn;
    params.texts = in.texts;
    params.n_texts = in.n_texts;
    params.depth = s->depth;
    params.n_steps = s->n_steps;
    params.needles = (int)s->needles;
    params.seed = (uint64_t)s->seed;
    params.audit = s->audit;
    params.journal = in.journal;
    if (!code) code = measure_print(&in, s, &params);
    eval_input_close(&in);
    return code;
}

const cli_command command_eval_kld = {
    "eval kld",
    "[options] -f FILE...",
    "measure how far a policy's predictions are from full attention's",
    "Reads part of a text with full attention, then feeds the tokens that follow one by one under each policy and compares the "
    "distributions of the next token with those of full attention. rows and bytes: K|V rows, and bytes of rows, index, tables and tail, "
    "read per token, "
    "relative to full.",
    kld_groups,
    sizeof(kld_settings),
    kld_run,
};
