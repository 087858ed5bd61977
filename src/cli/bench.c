#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/json.h"
#include "eval/eval.h"

typedef struct bench_settings {
    cli_list models, attn;
    const char *file, *prompts, *gens, *depths, *threads, *batches, *format;
    int64_t repetitions;
    bool no_mmap, quiet;
} bench_settings;

static const cli_option bench_table[] = {
    {"-m, --model", "FILE", CLI_LIST, offsetof(bench_settings, models), NULL,
     "model in GGUF format; may be repeated; without it the environment variable QUARRY_MODEL names the file", 0, 0},
    {"-p, --n-prompt", "N,...", CLI_TEXT, offsetof(bench_settings, prompts), "512", "tokens to read; 0: no such test", 0, 0},
    {"-n, --n-gen", "N,...", CLI_TEXT, offsetof(bench_settings, gens), "64", "tokens to decode; 0: no such test", 0, 0},
    {"-d, --n-depth", "N,...", CLI_TEXT, offsetof(bench_settings, depths), "0", "tokens in the cache before", 0, 0},
    {"-t, --threads", "N,...", CLI_TEXT, offsetof(bench_settings, threads), "0", "threads; 0: one per core", 0, 0},
    {"-b, --batch-size", "N,...", CLI_TEXT, offsetof(bench_settings, batches), "512", "tokens per forward pass while reading", 0, 0},
    {"--attn", "POLICY,...", CLI_LIST, offsetof(bench_settings, attn), NULL, "retrieval policies (default: ivfpq); may be repeated", 0, 0},
    {"-f, --file", "FILE", CLI_TEXT, offsetof(bench_settings, file), NULL, "read this text instead of pseudo-random tokens", 0, 0},
    {"-r, --repetitions", "N", CLI_INT, offsetof(bench_settings, repetitions), "5", "times each test is measured", 1, 10000},
    {"-o, --output", "FORMAT", CLI_TEXT, offsetof(bench_settings, format), "md", "form of the results: md, json or csv", 0, 0},
    {"--no-mmap", NULL, CLI_SWITCH, offsetof(bench_settings, no_mmap), NULL, "read the model file instead of mapping it", 0, 0},
    {"-q, --quiet", NULL, CLI_SWITCH, offsetof(bench_settings, quiet), NULL, "no progress on standard error", 0, 0},
    {0}};

static const cli_group bench_groups[] = {{"Options", bench_table, 0}, {0}};

typedef enum bench_format { BENCH_MD, BENCH_JSON, BENCH_CSV, BENCH_UNKNOWN } bench_format;

typedef struct numbers {
    int64_t *values;
    int64_t n;
} numbers;

typedef struct bench_run {
    const bench_settings *settings;
    bench_format format;
    numbers prompts, gens, depths, threads, batches;
    policy_list policies;
    quarry_model_info info;
    int64_t n_batch;
    bool header_printed;
    cli_progress progress;
    json_t *list;
} bench_run;

/* ---- output ---- */

static void print_dashes(int width, bool right)
{
    cli_print("| %s", right ? "" : ":");
    for (int i = 1; i < width; i++) cli_print("-");
    cli_print(right ? ": " : " ");
}

/* A Markdown table; rows are printed as they come, so the widths are those of the model and the policies, known before. */
static void header_md(int model_width, int attn_width)
{
    const int widths[] = {model_width, 10, 10, 10, 7, 6, attn_width, 16, 17};
    cli_print("| %-*s | %10s | %10s | %-10s | %7s | %6s | %-*s | %16s | %17s |\n", model_width, "model", "size", "params", "isa", "threads",
              "batch", attn_width, "attn", "test", "t/s");
    for (int i = 0; i < 9; i++) print_dashes(widths[i], i != 0 && i != 3 && i != 6);
    cli_print("|\n");
}

static void result_md(bench_run *r, const speed_result *s)
{
    char test[64], model[96], size[32];
    const int n = snprintf(test, sizeof test, "%s%lld", s->n_prompt ? "pp" : "tg", (long long)(s->n_prompt ? s->n_prompt : s->n_gen));
    if (s->n_depth) snprintf(test + n, sizeof test - (size_t)n, " @ d%lld", (long long)s->n_depth);
    const int model_width = snprintf(model, sizeof model, "%s %s", r->info.name, r->info.quantization);
    int attn_width = 6;
    for (int i = 0; i < r->policies.n; i++)
        if ((int)strlen(r->policies.specs[i]) > attn_width) attn_width = (int)strlen(r->policies.specs[i]);
    if (!r->header_printed) header_md(model_width, attn_width);
    r->header_printed = true;
    cli_print("| %-*s | %10s | %8.2f M | %-10s | %7d | %6lld | %-*s | %16s | %8.2f ± %6.2f |\n", model_width, model,
              cli_bytes((double)r->info.weight_bytes, size), (double)r->info.n_params / 1e6, r->info.kernels, r->info.n_threads,
              (long long)r->n_batch, attn_width, s->attn, test, s->mean, s->sd);
}

/* A text in quotes, its own quotes doubled. */
static void print_quoted(const char *text)
{
    cli_print("\"");
    for (const char *c = text; *c; c++) {
        if (*c == '"') cli_write(c, 1);
        cli_write(c, 1);
    }
    cli_print("\"");
}

static void result_csv(bench_run *r, const speed_result *s)
{
    if (!r->header_printed) cli_print("model,quantization,isa,attn,n_threads,n_batch,n_prompt,n_gen,n_depth,avg_ts,stddev_ts\n");
    r->header_printed = true;
    print_quoted(r->info.name);
    cli_print(",%s,%s,", r->info.quantization, r->info.kernels);
    print_quoted(s->attn);
    cli_print(",%d,%lld,%lld,%lld,%lld,%.6f,%.6f\n", r->info.n_threads, (long long)r->n_batch, (long long)s->n_prompt, (long long)s->n_gen,
              (long long)s->n_depth, s->mean, s->sd);
}

static void result_json(bench_run *r, const speed_result *s)
{
    json_t *samples = json_array();
    for (int i = 0; i < s->n_samples; i++) json_array_append_new(samples, json_real(s->samples[i]));
    json_array_append_new(r->list, json_pack("{s:s, s:s, s:s, s:I, s:I, s:s, s:i, s:I, s:I, s:I, s:I, s:f, s:f, s:o}", "model",
                                             r->info.name, "quantization", r->info.quantization, "isa", r->info.kernels, "model_size",
                                             (json_int_t)r->info.weight_bytes, "model_n_params", (json_int_t)r->info.n_params, "attn",
                                             s->attn, "n_threads", r->info.n_threads, "n_batch", (json_int_t)r->n_batch, "n_prompt",
                                             (json_int_t)s->n_prompt, "n_gen", (json_int_t)s->n_gen, "n_depth", (json_int_t)s->n_depth,
                                             "avg_ts", s->mean, "stddev_ts", s->sd, "samples_ts", samples));
}

static void on_result(const speed_result *s, void *data)
{
    bench_run *r = data;
    cli_progress_end(&r->progress);
    if (r->format == BENCH_JSON)
        result_json(r, s);
    else if (r->format == BENCH_CSV)
        result_csv(r, s);
    else
        result_md(r, s);
    cli_flush();
}

/* ---- runs ---- */

static int bench_parse(bench_run *r)
{
    const bench_settings *s = r->settings;
    static const char *const formats[] = {"md", "json", "csv"};
    const struct {
        const char *text, *flag;
        int64_t min, max;
        numbers *out;
    } lists[] = {{s->prompts, "-p", 0, 1000000000, &r->prompts},
                 {s->gens, "-n", 0, 1000000000, &r->gens},
                 {s->depths, "-d", 0, 1000000000, &r->depths},
                 {s->threads, "-t", 0, 1024, &r->threads},
                 {s->batches, "-b", 1, 65536, &r->batches}};
    quarry_error error;
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        lists[i].out->n = list_parse_numbers(lists[i].text, lists[i].flag, lists[i].min, lists[i].max, &lists[i].out->values, &error);
        if (lists[i].out->n < 0) return cli_fail_error(&error);
    }
    for (int i = 0; i < s->attn.n; i++)
        if (policy_list_add(&r->policies, s->attn.items[i], &error) != QUARRY_OK) return cli_fail_error(&error);
    if (s->attn.n == 0 && policy_list_add(&r->policies, attn_policies[0]->name, &error) != QUARRY_OK) return cli_fail_error(&error);
    r->format = BENCH_MD;
    while (r->format < BENCH_UNKNOWN && strcmp(s->format, formats[r->format]) != 0) r->format++;
    if (r->format == BENCH_UNKNOWN) return cli_fail_usage(&command_bench, "-o: '%s' should be md, json or csv", s->format);
    return CLI_OK;
}

/* All depths and batch sizes on one opened model. */
static int bench_model(bench_run *r, quarry_model *model)
{
    int32_t *tokens = NULL;
    int64_t n_tokens = 0;
    quarry_error error;
    int code = CLI_OK;
    quarry_model_get_info(model, &r->info);
    if (r->settings->file) {
        char *text = NULL;
        size_t n_bytes;
        if ((code = cli_read_file(&text, &n_bytes, r->settings->file))) return code;
        n_tokens = quarry_tokenize(model, text, n_bytes, false, &tokens, &error);
        memory_free(text);
        if (n_tokens < 0) return cli_fail_error(&error);
        if (n_tokens == 0) code = cli_fail("%s: no text in it", r->settings->file);
    }
    for (int64_t i = 0; i < r->batches.n * r->depths.n && !code; i++) {
        r->n_batch = r->batches.values[i / r->depths.n];
        const speed_params params = {.attn = (const char *const *)r->policies.specs,
                                     .n_attn = r->policies.n,
                                     .n_prompt = r->prompts.values,
                                     .n_prompts = (int)r->prompts.n,
                                     .n_gen = r->gens.values,
                                     .n_gens = (int)r->gens.n,
                                     .depth = r->depths.values[i % r->depths.n],
                                     .repetitions = (int)r->settings->repetitions,
                                     .n_batch = (int)r->n_batch,
                                     .tokens = tokens,
                                     .n_tokens = n_tokens};
        const quarry_watch watch = cli_progress_start(&r->progress, "filling", r->settings->quiet);
        cli_work_begin();
        const quarry_code measured = speed_measure(model, &params, &watch, on_result, r, &error);
        cli_work_end();
        cli_progress_end(&r->progress);
        if (measured != QUARRY_OK) code = cli_fail_error(&error);
    }
    quarry_free(tokens);
    return code;
}

static int bench_all(bench_run *r)
{
    const bench_settings *s = r->settings;
    const cli_output_options output = {.quiet = s->quiet};
    const int n_models = s->models.n ? s->models.n : 1; /* none named: the environment's */
    int code = CLI_OK;
    for (int64_t i = 0; i < n_models * r->threads.n && !code; i++) {
        const cli_model_options options = {.path = s->models.n ? s->models.items[i / r->threads.n] : NULL,
                                           .n_threads = r->threads.values[i % r->threads.n],
                                           .no_mmap = s->no_mmap};
        quarry_model *model = NULL;
        if ((code = cli_model_open(&model, &options, &output))) break;
        code = bench_model(r, model);
        quarry_model_close(model);
    }
    return code;
}

static int bench_main(const void *settings, const cli_list *arguments)
{
    bench_run r = {.settings = settings};
    if (arguments->n) return cli_fail_usage(&command_bench, "unexpected argument '%s'", arguments->items[0]);
    int code = bench_parse(&r);
    if (!code && r.format == BENCH_JSON && !(r.list = json_array())) code = cli_fail("out of memory");
    if (!code) code = bench_all(&r);
    if (r.format == BENCH_JSON && !code)
        code = json_print(r.list);
    else
        json_decref(r.list);
    memory_free(r.prompts.values);
    memory_free(r.gens.values);
    memory_free(r.depths.values);
    memory_free(r.threads.values);
    memory_free(r.batches.values);
    policy_list_free(&r.policies);
    return code;
}

const cli_command command_bench = {
    "bench",
    "[options]",
    "measure speed",
    "Tests as llama-bench names them: ppN reads N tokens at once, tgN decodes N tokens one by one, @ dN with N tokens in the cache, which "
    "are "
    "read once for all policies and repetitions. Not timed: tokenising, sampling, filling the cache, and a first run of each test. Every "
    "list takes several values: -d 0,4096,7600. A depth past the length the model was trained for is allowed.",
    bench_groups,
    sizeof(bench_settings),
    bench_main,
};
