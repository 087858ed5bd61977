#include <stdio.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/json.h"
#include "eval/eval.h"

typedef struct bench_settings {
    cli_list models, attn;
    const char *file, *prompts, *gens, *parallels, *reads, *questions, *depths, *threads, *batches, *format;
    int64_t repetitions, read_window;
    bool extend, no_mmap, mlock, quiet;
} bench_settings;

static const cli_option bench_table[] = {
    {"-m, --model", "FILE", CLI_LIST, offsetof(bench_settings, models), NULL,
     "model in GGUF format; may be repeated; without it the environment variable QUARRY_MODEL names the file", 0, 0},
    {"-p, --n-prompt", "N,...", CLI_TEXT, offsetof(bench_settings, prompts), "512", "tokens to read after the depth; 0: no such test", 0,
     0},
    {"-n, --n-gen", "N,...", CLI_TEXT, offsetof(bench_settings, gens), "64", "tokens to decode; 0: no such test", 0, 0},
    {"-np, --parallel", "N,...", CLI_TEXT, offsetof(bench_settings, parallels), "1", "sequences that -n decodes together", 0, 0},
    {"--read", "N,...", CLI_TEXT, offsetof(bench_settings, reads), "0", "tokens of a document to read from nothing; 0: no such test", 0, 0},
    {"--ttft", "N,...", CLI_TEXT, offsetof(bench_settings, questions), "0",
     "tokens of a question after the depth, timed until the first token of its answer; 0: no such test", 0, 0},
    {"-d, --n-depth", "N,...", CLI_TEXT, offsetof(bench_settings, depths), "0", "tokens in the cache before", 0, 0},
    {"-t, --threads", "N,...", CLI_TEXT, offsetof(bench_settings, threads), "0", "threads; 0: one per core", 0, 0},
    {"-b, --batch-size", "N,...", CLI_TEXT, offsetof(bench_settings, batches), "512", "tokens per forward pass while reading", 0, 0},
    {"--attn", "POLICY,...", CLI_LIST, offsetof(bench_settings, attn), NULL, "retrieval policies (default: ivfpq); may be repeated", 0, 0},
    {"-f, --file", "FILE", CLI_TEXT, offsetof(bench_settings, file), NULL, "read this text instead of pseudo-random tokens", 0, 0},
    {"-r, --repetitions", "N", CLI_INT, offsetof(bench_settings, repetitions), "5", "times each test is measured", 1, 10000},
    {"--read-window", "N", CLI_INT, offsetof(bench_settings, read_window), "0",
     "read in blocks that attend to their last N tokens, the first, and what the policy finds; 0: with full attention", 0, 1e9},
    {"--extend", NULL, CLI_SWITCH, offsetof(bench_settings, extend), NULL, "read and decode as quarry ask --extend", 0, 0},
    {"-o, --output", "FORMAT", CLI_TEXT, offsetof(bench_settings, format), "md", "form of the results: md, json or csv", 0, 0},
    {"--no-mmap", NULL, CLI_SWITCH, offsetof(bench_settings, no_mmap), NULL, "read the model file instead of mapping it", 0, 0},
    {"--mlock", NULL, CLI_SWITCH, offsetof(bench_settings, mlock), NULL, "keep the weights in RAM: the system may not move them to swap", 0,
     0},
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
    numbers prompts, gens, parallels, reads, questions, depths, threads, batches;
    policy_list policies;
    speed_test *tests; /* of one depth */
    int n_tests;
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
    const int widths[] = {model_width, 10, 10, 10, 7, 6, attn_width, 17, 9, 17};
    cli_print("| %-*s | %10s | %10s | %-10s | %7s | %6s | %-*s | %17s | %9s | %17s |\n", model_width, "model", "size", "params", "isa",
              "threads", "batch", attn_width, "attn", "test", "time", "t/s");
    for (int i = 0; i < 10; i++) print_dashes(widths[i], i != 0 && i != 3 && i != 6);
    cli_print("|\n");
}

/* "tg64 x 8 @ d4096" */
static const char *test_name(const speed_result *s, char buffer[96])
{
    int n = snprintf(buffer, 96, "%s%lld", speed_kind_names[s->test.kind], (long long)s->test.n);
    if (s->test.n_parallel > 1) n += snprintf(buffer + n, (size_t)(96 - n), " x %d", s->test.n_parallel);
    if (s->n_depth) snprintf(buffer + n, (size_t)(96 - n), " @ d%lld", (long long)s->n_depth);
    return buffer;
}

static void result_md(bench_run *r, const speed_result *s)
{
    char test[96], model[96], size[32], took[32];
    const bool ms = s->seconds_mean < 1;
    snprintf(took, sizeof took, ms ? "%.1f ms" : "%.2f s", ms ? 1000 * s->seconds_mean : s->seconds_mean);
    const int model_width = snprintf(model, sizeof model, "%s %s", r->info.name, r->info.quantization);
    int attn_width = 6;
    for (int i = 0; i < r->policies.n; i++)
        if ((int)strlen(r->policies.specs[i]) > attn_width) attn_width = (int)strlen(r->policies.specs[i]);
    if (!r->header_printed) header_md(model_width, attn_width);
    r->header_printed = true;
    cli_print("| %-*s | %10s | %8.2f M | %-10s | %7d | %6lld | %-*s | %17s | %9s | %8.2f ± %6.2f |\n", model_width, model,
              cli_bytes((double)r->info.weight_bytes, size), (double)r->info.n_params / 1e6, r->info.kernels, r->info.n_threads,
              (long long)r->n_batch, attn_width, s->attn, test_name(s, test), took, s->rate_mean, s->rate_sd);
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

/* The counts under llama-bench's names. */
static int64_t count_prompt(const speed_test *t)
{
    return t->kind == SPEED_GEN ? 0 : t->n;
}

static int64_t count_gen(const speed_test *t)
{
    return t->kind == SPEED_GEN ? t->n : 0;
}

static void result_csv(bench_run *r, const speed_result *s)
{
    if (!r->header_printed)
        cli_print(
            "model,quantization,isa,attn,n_threads,n_batch,test,n_prompt,n_gen,n_depth,n_parallel,avg_ns,stddev_ns,avg_ts,stddev_ts\n");
    r->header_printed = true;
    print_quoted(r->info.name);
    cli_print(",%s,%s,", r->info.quantization, r->info.kernels);
    print_quoted(s->attn);
    cli_print(",%d,%lld,%s,%lld,%lld,%lld,%d,%.0f,%.0f,%.6f,%.6f\n", r->info.n_threads, (long long)r->n_batch,
              speed_kind_names[s->test.kind], (long long)count_prompt(&s->test), (long long)count_gen(&s->test), (long long)s->n_depth,
              s->test.n_parallel, 1e9 * s->seconds_mean, 1e9 * s->seconds_sd, s->rate_mean, s->rate_sd);
}

static void result_json(bench_run *r, const speed_result *s)
{
    json_t *samples_ns = json_array(), *samples_ts = json_array();
    for (int i = 0; i < s->n_samples; i++) {
        json_array_append_new(samples_ns, json_integer((json_int_t)(1e9 * s->seconds[i])));
        json_array_append_new(samples_ts, json_real(speed_rate(&s->test, s->seconds[i])));
    }
    json_t *object =
        json_pack("{s:s, s:s, s:s, s:I, s:I, s:s, s:i, s:I}", "model", r->info.name, "quantization", r->info.quantization, "isa",
                  r->info.kernels, "model_size", (json_int_t)r->info.weight_bytes, "model_n_params", (json_int_t)r->info.n_params, "attn",
                  s->attn, "n_threads", r->info.n_threads, "n_batch", (json_int_t)r->n_batch);
    json_t *measured = json_pack("{s:s, s:I, s:I, s:I, s:i, s:I, s:I, s:f, s:f, s:o, s:o}", "test", speed_kind_names[s->test.kind],
                                 "n_prompt", (json_int_t)count_prompt(&s->test), "n_gen", (json_int_t)count_gen(&s->test), "n_depth",
                                 (json_int_t)s->n_depth, "n_parallel", s->test.n_parallel, "avg_ns", (json_int_t)(1e9 * s->seconds_mean),
                                 "stddev_ns", (json_int_t)(1e9 * s->seconds_sd), "avg_ts", s->rate_mean, "stddev_ts", s->rate_sd,
                                 "samples_ns", samples_ns, "samples_ts", samples_ts);
    json_object_update(object, measured);
    json_decref(measured);
    json_array_append_new(r->list, object);
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
                 {s->parallels, "-np", 1, 1024, &r->parallels},
                 {s->reads, "--read", 0, 1000000000, &r->reads},
                 {s->questions, "--ttft", 0, 1000000000, &r->questions},
                 {s->depths, "-d", 0, 1000000000, &r->depths},
                 {s->threads, "-t", 0, 1024, &r->threads},
                 {s->batches, "-b", 1, 65536, &r->batches}};
    quarry_error error;
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
        lists[i].out->n = list_parse_numbers(lists[i].text, lists[i].flag, lists[i].min, lists[i].max, &lists[i].out->values, &error);
        if (lists[i].out->n < 0) return cli_fail_usage(&command_bench, "%s", error.message);
    }
    for (int i = 0; i < s->attn.n; i++)
        if (policy_list_add(&r->policies, s->attn.items[i], &error) != QUARRY_OK) return cli_fail_error(&error);
    if (s->attn.n == 0 && policy_list_add(&r->policies, attn_policies[0]->name, &error) != QUARRY_OK) return cli_fail_error(&error);
    r->format = BENCH_MD;
    while (r->format < BENCH_UNKNOWN && strcmp(s->format, formats[r->format]) != 0) r->format++;
    if (r->format == BENCH_UNKNOWN) return cli_fail_usage(&command_bench, "-o: '%s' should be md, json or csv", s->format);
    return CLI_OK;
}

static int tests_add(bench_run *r, speed_kind kind, const numbers *n, const numbers *parallels)
{
    quarry_error error;
    for (int64_t i = 0; i < n->n * parallels->n; i++) {
        const speed_test test = {kind, n->values[i / parallels->n], (int)parallels->values[i % parallels->n]};
        if (test.n == 0) continue;
        if (memory_grow(&r->tests, (size_t)r->n_tests + 1, sizeof *r->tests, "tests", &error) != QUARRY_OK) return cli_fail_error(&error);
        r->tests[r->n_tests++] = test;
    }
    return CLI_OK;
}

/* What is measured at one depth. Reading from nothing knows none, so the first has it. */
static int tests_make(bench_run *r, bool first_depth)
{
    int64_t one = 1;
    const numbers alone = {&one, 1};
    int code;
    r->n_tests = 0;
    if (first_depth && (code = tests_add(r, SPEED_READ, &r->reads, &alone))) return code;
    if ((code = tests_add(r, SPEED_PROMPT, &r->prompts, &alone))) return code;
    if ((code = tests_add(r, SPEED_ASK, &r->questions, &alone))) return code;
    return tests_add(r, SPEED_GEN, &r->gens, &r->parallels);
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
        if ((code = tests_make(r, i % r->depths.n == 0))) break;
        const speed_params params = {.attn = (const char *const *)r->policies.specs,
                                     .n_attn = r->policies.n,
                                     .tests = r->tests,
                                     .n_tests = r->n_tests,
                                     .depth = r->depths.values[i % r->depths.n],
                                     .repetitions = (int)r->settings->repetitions,
                                     .read_window = r->settings->read_window,
                                     .extend = r->settings->extend,
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
                                           .no_mmap = s->no_mmap,
                                           .mlock = s->mlock};
        quarry_model *model = NULL;
        if ((code = cli_model_open(&model, &options, &output, NULL))) break;
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
    memory_free(r.parallels.values);
    memory_free(r.reads.values);
    memory_free(r.questions.values);
    memory_free(r.tests);
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
    "Tests as llama-bench names them: ppN reads N tokens at once, tgN decodes N tokens one by one, tgN x S does so in each of S sequences "
    "in one "
    "pass per step (t/s is the sum over them), @ dN with N tokens in the cache before. And two more: readN reads a document of N tokens "
    "from "
    "nothing, ttftN feeds a question of N tokens about what is in the cache and takes the likeliest next token: its time is the time to "
    "first "
    "token.\n\n"
    "The index is part of it: pp and read end with all keys indexed and the index sealed.\n\n"
    "A depth is filled once for all tests, policies and repetitions; the sequences of -np each read other tokens, so that they share no "
    "memory. Not timed: tokenising, sampling (but for the one token of ttft), filling the cache, and a first run of each test. Every list "
    "takes "
    "several values: -d 0,4096,7600. A depth past the length the model was trained for is allowed. The time of a test is that of one "
    "repetition; in JSON it is avg_ns and samples_ns, in nanoseconds.",
    bench_groups,
    sizeof(bench_settings),
    bench_main,
};
