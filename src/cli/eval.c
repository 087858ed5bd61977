#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/json.h"
#include "eval/eval.h"

/* ---- what both commands share ---- */

typedef struct eval_options {
    cli_list files, attn;
    int64_t n_batch;
} eval_options;

static const cli_option eval_table[] = {
    {"-f, --file", "FILE", CLI_LIST, offsetof(eval_options, files), NULL, "text to read, long and plain; further ones may follow the flags",
     0, 0},
    {"--attn", "POLICY", CLI_LIST, offsetof(eval_options, attn), NULL,
     "policies to compare with full attention, separated by commas; may be repeated (default: ivfpq)", 0, 0},
    {"-b, --batch-size", "N", CLI_INT, offsetof(eval_options, n_batch), "512", "tokens per forward pass while reading", 1, 65536},
    {0}};

/* What a task needs: an open model, its texts as tokens, the policies. */
typedef struct eval_input {
    quarry_model *model;
    quarry_model_info info;
    policy_list policies;
    eval_text *texts;
    int n_texts;
} eval_input;

static int read_text(eval_input *in, const char *path)
{
    char *text = NULL;
    size_t n_bytes;
    int32_t *tokens = NULL;
    quarry_error error;
    int code = cli_read_file(&text, &n_bytes, path);
    if (code) return code;
    const int64_t n = quarry_tokenize(in->model, text, n_bytes, false, &tokens, &error);
    memory_free(text);
    if (n < 0) return cli_fail_error(&error);
    in->texts[in->n_texts++] = (eval_text){path, tokens, n};
    return CLI_OK;
}

/* Texts are the files of -f and what follows the flags, so that -f *.txt means what it looks like. */
static int input_open(eval_input *in, const cli_model_options *model, const eval_options *options, const cli_output_options *output,
                      const cli_list *arguments, const cli_command *command)
{
    quarry_error error;
    *in = (eval_input){0};
    if (options->files.n + arguments->n == 0) return cli_fail_usage(command, "no text: name one with -f FILE");
    for (int i = 0; i < options->attn.n; i++)
        if (policy_list_add(&in->policies, options->attn.items[i], &error) != QUARRY_OK) return cli_fail_error(&error);
    if (options->attn.n == 0 && policy_list_add(&in->policies, attn_policies[0]->name, &error) != QUARRY_OK) return cli_fail_error(&error);
    int code = cli_model_open(&in->model, model, output);
    if (code) return code;
    quarry_model_get_info(in->model, &in->info);
    in->texts = memory_zero((size_t)options->files.n + (size_t)arguments->n, sizeof *in->texts, "texts", &error);
    if (!in->texts) return cli_fail_error(&error);
    for (int i = 0; i < options->files.n && !code; i++) code = read_text(in, options->files.items[i]);
    for (int i = 0; i < arguments->n && !code; i++) code = read_text(in, arguments->items[i]);
    return code;
}

static void input_close(eval_input *in)
{
    for (int i = 0; i < in->n_texts; i++) quarry_free((void *)in->texts[i].tokens);
    memory_free(in->texts);
    policy_list_free(&in->policies);
    quarry_model_close(in->model);
}

static json_t *json_reading(const eval_reading *r)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "rows_share", r->rows_share, "index_share", r->index_share, "tables_share",
                     r->tables_share, "tail_share", r->tail_share, "bytes_share", r->bytes_share, "bytes_per_token", r->bytes_per_token);
}

static json_t *json_summary(const metric_summary *s)
{
    return json_pack("{s:I, s:f, s:f, s:f, s:f, s:f}", "n", (json_int_t)s->n, "mean", s->mean, "standard_error", s->standard_error,
                     "median", s->median, "p99", s->p99, "max", s->max);
}

static int attn_width(const policy_list *policies)
{
    size_t width = strlen("policy");
    for (int i = 0; i < policies->n; i++) width = strlen(policies->specs[i]) > width ? strlen(policies->specs[i]) : width;
    return (int)width;
}

static void print_model(const eval_input *in)
{
    cli_print("model: %s %s, kernels %s, %d threads\n", in->info.name, in->info.quantization, in->info.kernels, in->info.n_threads);
}

/* ---- quarry eval kld ---- */

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
                                       {"Texts and policies", eval_table, offsetof(kld_settings, eval)},
                                       {"Model", cli_model_table, offsetof(kld_settings, model)},
                                       {"Output", cli_output_table, offsetof(kld_settings, output)},
                                       {0}};

static void kld_print(const eval_input *in, const kld_settings *s, const kld_result *results)
{
    const int width = attn_width(&in->policies);
    print_model(in);
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
        json_array_append_new(list, json_pack("{s:s, s:o, s:f, s:f, s:o}", "attn", results[i].attn, "kld", json_summary(&results[i].kld),
                                              "top1_agreement", results[i].agreement, "perplexity", results[i].perplexity, "reading",
                                              json_reading(&results[i].reading)));
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
    int code = input_open(&in, &s->model, &s->eval, &s->output, arguments, &command_eval_kld);
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
    input_close(&in);
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

/* ---- quarry eval needle ---- */

typedef struct needle_settings {
    cli_model_options model;
    eval_options eval;
    cli_output_options output;
    const char *depths;
    int64_t count, needles, n_answer, seed;
    bool cite;
} needle_settings;

static const cli_option needle_table[] = {
    {"-d, --depths", "N,...", CLI_TEXT, offsetof(needle_settings, depths), "2000,4000,7000", "tokens of each haystack", 0, 0},
    {"--count", "N", CLI_INT, offsetof(needle_settings, count), "3", "haystacks per depth and text", 1, 10000},
    {"--needles", "N", CLI_INT, offsetof(needle_settings, needles), "1", "needles in a haystack, each asked for (harder, and cheaper)", 1,
     NEEDLE_MAX},
    {"-n, --predict", "N", CLI_INT, offsetof(needle_settings, n_answer), "32", "most tokens of an answer", 1, 4096},
    {"-s, --seed", "N", CLI_INT, offsetof(needle_settings, seed), "1", "seed of places, keys and numbers", 0, 9e18},
    {"--cite", NULL, CLI_SWITCH, offsetof(needle_settings, cite), NULL,
     "count the right answers whose first citation (quarry ask --cite) holds the needle", 0, 0},
    {0}};

static const cli_group needle_groups[] = {{"Measurement", needle_table, 0},
                                          {"Texts and policies", eval_table, offsetof(needle_settings, eval)},
                                          {"Model", cli_model_table, offsetof(needle_settings, model)},
                                          {"Output", cli_output_table, offsetof(needle_settings, output)},
                                          {0}};

static void on_answer(const needle_answer *a, void *data)
{
    (void)data;
    fprintf(stderr, "%s, %lld tokens, %s is %s at %.2f: %s %s: %s\n", a->text_name, (long long)a->n_tokens, a->needle->key,
            a->needle->number, (double)a->needle->at / (double)a->n_tokens, a->attn, a->correct ? "right" : "wrong", a->answer);
}

static void needle_print(const eval_input *in, const needle_result *results)
{
    const int width = attn_width(&in->policies);
    print_model(in);
    cli_print("%lld needles asked for, full attention answers %lld; kept: of these, those a policy answers; KLD along full's answers\n\n",
              (long long)results[0].asked, (long long)results[0].full_correct);
    cli_print("%-*s  %9s  %22s  %18s  %6s  %6s\n", width, "policy", "kept", "share (95 % interval)", "mean KLD ± s.e.", "rows", "bytes");
    for (int i = 0; i <= in->policies.n; i++) {
        const needle_result *r = &results[i];
        const double share = r->full_correct ? 100.0 * (double)r->kept / (double)r->full_correct : 0;
        char kept[48];
        snprintf(kept, sizeof kept, "%lld/%lld", (long long)r->kept, (long long)r->full_correct);
        cli_print("%-*s  %9s  %5.1f %% (%5.1f to %5.1f)  %8.5f ± %7.5f  %4.1f %%  %4.1f %%\n", width, r->attn, kept, share,
                  100 * r->kept_low, 100 * r->kept_high, r->kld.mean, r->kld.standard_error, 100 * r->reading.rows_share,
                  100 * r->reading.bytes_share);
    }
}

static void needle_print_citations(const eval_input *in, const needle_result *results)
{
    const int width = attn_width(&in->policies);
    cli_print("\nof the right answers, those whose first citation holds the needle\n\n");
    cli_print("%-*s  %9s  %22s\n", width, "policy", "cited", "share (95 % interval)");
    for (int i = 0; i <= in->policies.n; i++) {
        const needle_result *r = &results[i];
        char cited[48];
        snprintf(cited, sizeof cited, "%lld/%lld", (long long)r->cited, (long long)r->correct);
        cli_print("%-*s  %9s  %5.1f %% (%5.1f to %5.1f)\n", width, r->attn, cited,
                  r->correct ? 100.0 * (double)r->cited / (double)r->correct : 0, 100 * r->cited_low, 100 * r->cited_high);
    }
}

static int needle_print_json(const eval_input *in, const needle_settings *s, const needle_result *results)
{
    json_t *list = json_array();
    for (int i = 0; i <= in->policies.n; i++) {
        const needle_result *r = &results[i];
        json_t *item = json_pack("{s:s, s:I, s:I, s:f, s:f, s:o, s:o}", "attn", r->attn, "correct", (json_int_t)r->correct, "kept",
                                 (json_int_t)r->kept, "kept_low", r->kept_low, "kept_high", r->kept_high, "kld", json_summary(&r->kld),
                                 "reading", json_reading(&r->reading));
        if (s->cite)
            json_object_update_new(
                item, json_pack("{s:I, s:f, s:f}", "cited", (json_int_t)r->cited, "cited_low", r->cited_low, "cited_high", r->cited_high));
        json_array_append_new(list, item);
    }
    return json_print(json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:o}", "model", in->info.name, "isa", in->info.kernels, "n_depths",
                                s->depths, "needles", (json_int_t)s->needles, "seed", (json_int_t)s->seed, "asked",
                                (json_int_t)results[0].asked, "full_correct", (json_int_t)results[0].full_correct, "results", list));
}

static int needle_run(const void *settings, const cli_list *arguments)
{
    const needle_settings *s = settings;
    eval_input in = {0};
    cli_progress progress;
    quarry_error error;
    needle_result *results = NULL;
    int64_t *depths = NULL;
    int code;
    const int64_t n_depths = list_parse_numbers(s->depths, "--depths", 64, 1000000000, &depths, &error);
    if (n_depths < 0) return cli_fail_error(&error);
    if ((code = input_open(&in, &s->model, &s->eval, &s->output, arguments, &command_eval_needle))) goto done;
    if (!(results = memory_zero((size_t)in.policies.n + 1, sizeof *results, "results", &error))) {
        code = cli_fail_error(&error);
        goto done;
    }
    const needle_params params = {.attn = (const char *const *)in.policies.specs,
                                  .n_attn = in.policies.n,
                                  .texts = in.texts,
                                  .n_texts = in.n_texts,
                                  .depths = depths,
                                  .n_depths = (int)n_depths,
                                  .count = (int)s->count,
                                  .needles = (int)s->needles,
                                  .n_answer = (int)s->n_answer,
                                  .cite = s->cite,
                                  .seed = (uint64_t)s->seed,
                                  .n_batch = (int)s->eval.n_batch};
    const quarry_watch watch = cli_progress_start(&progress, "reading", s->output.quiet);
    cli_work_begin();
    const quarry_code measured = needle_measure(in.model, &params, &watch, s->output.verbose ? on_answer : NULL, NULL, results, &error);
    cli_work_end();
    cli_progress_end(&progress);
    if (measured != QUARRY_OK)
        code = cli_fail_error(&error);
    else if (s->output.json)
        code = needle_print_json(&in, s, results);
    else
        needle_print(&in, results);
    if (measured == QUARRY_OK && s->cite && !s->output.json) needle_print_citations(&in, results);
done:
    memory_free(results);
    memory_free(depths);
    input_close(&in);
    return code;
}

const cli_command command_eval_needle = {
    "eval needle",
    "[options] -f FILE...",
    "measure whether a policy still finds a sentence in a long text",
    "Puts a sentence with a number into a text, reads it with full attention, and asks for the number under each policy through the chat "
    "template. -v prints every answer.",
    needle_groups,
    sizeof(needle_settings),
    needle_run,
};
