#include "cli/eval_common.h"

typedef struct ppl_settings {
    eval_settings eval;
    int64_t window, n_scored, samples;
} ppl_settings;

static const cli_option ppl_table[] = {
    {"-c, --ctx-size", "N", CLI_INT, offsetof(ppl_settings, window), "4096", "tokens of a window", 3, 1e9},
    {"-n, --steps", "N", CLI_INT, offsetof(ppl_settings, n_scored), "0",
     "tokens scored, at the end of each window; 0: its second half, as llama-perplexity has it", 0, 1e9},
    {"--samples", "N", CLI_INT, offsetof(ppl_settings, samples), "4",
     "windows measured, spread over the texts; 0: all, one after the other, as llama-perplexity has them", 0, 1e6},
    {"--journal", "FILE", CLI_TEXT, offsetof(ppl_settings, eval.journal), NULL,
     "keep finished windows in FILE; the same command goes on from there when it was stopped", 0, 0},
    {0}};

static const cli_group ppl_groups[] = {{"Measurement", ppl_table, 0},
                                       {"Texts and policies", eval_options_table, offsetof(ppl_settings, eval.input)},
                                       {"Reading", eval_way_table, offsetof(ppl_settings, eval.input)},
                                       {"Model", cli_model_table, offsetof(ppl_settings, eval.model)},
                                       {"Output", cli_output_table, offsetof(ppl_settings, eval.output)},
                                       {0}};

static void ppl_print(const eval_input *in, const kld_params *params, const kld_result *results)
{
    const int width = eval_attn_width(&in->policies);
    eval_print_model(in);
    cli_print("perplexity of the last %lld tokens of %lld windows of %lld, fed one by one after the others were read%s\n\n",
              (long long)params->n_steps, (long long)results[0].n_samples, (long long)(params->depth + params->n_steps + 1),
              params->way.extend || params->way.read_window ? "" : " with full attention");
    cli_print("%-*s  %20s  %18s  %19s  %7s  %7s\n", width, "policy", "perplexity ± s.e.", "NLL ± s.e.", "dNLL ± s.e.", "rows", "bytes");
    for (int i = 0; i <= in->n_attn; i++) {
        const kld_result *r = &results[i];
        const double error = eval_best_error(&r->nll);
        cli_print("%-*s  %10.4f ± %7.4f  %8.5f ± %7.5f  %9.5f ± %7.5f  %5.1f %%  %5.1f %%\n", width, r->attn, r->perplexity,
                  r->perplexity * error, r->nll.steps.mean, error, r->dnll.steps.mean, eval_best_error(&r->dnll),
                  100 * r->reading.rows_share, 100 * r->reading.bytes_share);
    }
}

static int ppl_print_json(eval_input *in, const kld_result *results, int n)
{
    json_t *list = json_array();
    for (int i = 0; i < n; i++) {
        const kld_result *r = &results[i];
        json_array_append_new(list, json_pack("{s:s, s:I, s:I, s:f, s:f, s:f, s:o, s:o}", "attn", r->attn, "samples",
                                              (json_int_t)r->n_samples, "n", (json_int_t)r->nll.steps.n, "perplexity", r->perplexity, "nll",
                                              r->nll.steps.mean, "nll_error", eval_best_error(&r->nll), "dnll", eval_json_mean(&r->dnll),
                                              "reading", eval_json_reading(&r->reading)));
    }
    return eval_print_json(in, list);
}

static json_t *json_parameters(const eval_input *in, const ppl_settings *s, const kld_params *params)
{
    json_t *parameters =
        json_pack("{s:I, s:I, s:I, s:I, s:b, s:I, s:o}", "ctx_size", (json_int_t)s->window, "depth", (json_int_t)params->depth, "steps",
                  (json_int_t)params->n_steps, "samples", (json_int_t)params->samples, "consecutive", params->consecutive, "batch_size",
                  (json_int_t)s->eval.input.n_batch, "attn", eval_json_policies(in));
    eval_json_way(parameters, &s->eval.input);
    return parameters;
}

static int measure_print(eval_input *in, const ppl_settings *s, const kld_params *params)
{
    cli_progress progress;
    quarry_error error;
    kld_result *results = memory_zero((size_t)kld_n_results(params), sizeof *results, "results", &error);
    if (!results) return cli_fail_error(&error);
    const quarry_watch watch = eval_measure_begin(&progress, &s->eval);
    int code = eval_measure_end(&progress, kld_measure(in->model, params, &watch, results, &error), &error);
    if (!code && s->eval.output.json)
        code = ppl_print_json(in, results, kld_n_results(params));
    else if (!code)
        ppl_print(in, params, results);
    memory_free(results);
    return code;
}

static int ppl_run(const void *settings, const cli_list *arguments)
{
    const ppl_settings *s = settings;
    eval_input in = {0};
    quarry_error error;
    int code = eval_input_open(&in, &s->eval, arguments, &command_eval_ppl);
    kld_params params = {.texts = in.texts, .n_texts = in.n_texts};
    if (!code) params.way = eval_input_way(&in, &s->eval.input, s->window);
    params.attn = in.attn;
    params.n_attn = in.n_attn;
    if (!code && ppl_windows(&params, s->window, s->n_scored, (int)s->samples, &error) != QUARRY_OK) code = cli_fail_error(&error);
    if (!code) code = eval_input_record(&in, &command_eval_ppl, &s->eval, arguments, -1, json_parameters(&in, s, &params));
    params.journal = in.journal;
    if (!code) code = measure_print(&in, s, &params);
    eval_input_close(&in);
    return code;
}

const cli_command command_eval_ppl = {
    "eval ppl",
    "[options] -f FILE...",
    "measure how well a text is predicted under a policy: perplexity",
    "Cuts texts into windows, reads the first half of each with full attention, and feeds the second half one by one under each policy, "
    "scoring "
    "every token by the probability it was given. dNLL: the policy's mean negative log likelihood less full attention's, in nats.",
    ppl_groups,
    sizeof(ppl_settings),
    ppl_run,
};
