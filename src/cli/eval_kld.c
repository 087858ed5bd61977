#include "cli/eval_common.h"

typedef struct kld_settings {
    cli_model_options model;
    eval_options eval;
    cli_output_options output;
    int64_t depth, n_steps, samples;
} kld_settings;

static const cli_option kld_table[] = {
    {"-d, --depth", "N", CLI_INT, offsetof(kld_settings, depth), "6000", "tokens of the text read before", 1, 1e9},
    {"-n, --steps", "N", CLI_INT, offsetof(kld_settings, n_steps), "96", "tokens of the text that follow, fed one by one", 1, 1e6},
    {"--samples", "N", CLI_INT, offsetof(kld_settings, samples), "2", "places measured, spread over the texts", 1, 1e6},
    {0}};

static const cli_group kld_groups[] = {{"Measurement", kld_table, 0},
                                       {"Texts and policies", eval_options_table, offsetof(kld_settings, eval)},
                                       {"Model", cli_model_table, offsetof(kld_settings, model)},
                                       {"Output", cli_output_table, offsetof(kld_settings, output)},
                                       {0}};

static void kld_print(const eval_input *in, const kld_settings *s, const kld_result *results)
{
    const int width = eval_attn_width(&in->policies);
    eval_print_model(in);
    cli_print("%lld x %lld tokens after %lld read; KL divergence of next-token distributions to full attention, in nats\n\n",
              (long long)s->samples, (long long)s->n_steps, (long long)s->depth);
    cli_print("%-*s  %18s  %8s  %8s  %6s  %10s  %6s  %6s  %10s\n", width, "policy", "mean KLD ± s.e.", "99 %", "max", "top-1", "perplexity",
              "rows", "bytes", "KiB/token");
    for (int i = 0; i <= in->policies.n; i++) {
        const kld_result *r = &results[i];
        cli_print("%-*s  %8.5f ± %7.5f  %8.4f  %8.4f  %4.1f %%  %10.3f  %4.1f %%  %4.1f %%  %10.0f\n", width, r->attn, r->kld.mean,
                  r->kld.standard_error, r->kld.p99, r->kld.max, 100 * r->agreement, r->perplexity, 100 * r->reading.rows_share,
                  100 * r->reading.bytes_share, r->reading.bytes_per_token / 1024);
    }
}

static int kld_print_json(const eval_input *in, const kld_settings *s, const kld_result *results)
{
    json_t *list = json_array();
    for (int i = 0; i <= in->policies.n; i++)
        json_array_append_new(list, json_pack("{s:s, s:o, s:f, s:f, s:o}", "attn", results[i].attn, "kld",
                                              eval_json_summary(&results[i].kld), "top1_agreement", results[i].agreement, "perplexity",
                                              results[i].perplexity, "reading", eval_json_reading(&results[i].reading)));
    return json_print(json_pack("{s:s, s:s, s:I, s:I, s:I, s:o}", "model", in->info.name, "isa", in->info.kernels, "n_depth",
                                (json_int_t)s->depth, "n_steps", (json_int_t)s->n_steps, "samples", (json_int_t)s->samples, "results",
                                list));
}

static int kld_run(const void *settings, const cli_list *arguments)
{
    const kld_settings *s = settings;
    eval_input in;
    cli_progress progress;
    quarry_error error;
    kld_result *results = NULL;
    int code = eval_input_open(&in, &s->model, &s->eval, &s->output, arguments, &command_eval_kld);
    if (code) goto done;
    if (!(results = memory_zero((size_t)in.policies.n + 1, sizeof *results, "results", &error))) {
        code = cli_fail_error(&error);
        goto done;
    }
    const kld_params params = {.attn = (const char *const *)in.policies.specs,
                               .n_attn = in.policies.n,
                               .texts = in.texts,
                               .n_texts = in.n_texts,
                               .depth = s->depth,
                               .n_steps = s->n_steps,
                               .samples = (int)s->samples,
                               .n_batch = (int)s->eval.n_batch};
    const quarry_watch watch = cli_progress_start(&progress, "reading", s->output.quiet);
    cli_work_begin();
    const quarry_code measured = kld_measure(in.model, &params, &watch, results, &error);
    cli_work_end();
    cli_progress_end(&progress);
    if (measured != QUARRY_OK)
        code = cli_fail_error(&error);
    else if (s->output.json)
        code = kld_print_json(&in, s, results);
    else
        kld_print(&in, s, results);
done:
    memory_free(results);
    eval_input_close(&in);
    return code;
}

const cli_command command_eval_kld = {
    "eval kld",
    "[options] -f FILE...",
    "measure how far a policy's predictions are from full attention's",
    "Reads part of a text with full attention, then feeds the tokens that follow one by one under each policy and compares the "
    "distributions of the next token with those of full attention. rows and bytes: K|V rows, and bytes of rows and index, read per token, "
    "relative to full.",
    kld_groups,
    sizeof(kld_settings),
    kld_run,
};
