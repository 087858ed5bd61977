#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "cli/cli.h"

const cli_option cli_model_table[] = {
    {"-m, --model", "FILE", CLI_TEXT, offsetof(cli_model_options, path), NULL,
     "model in GGUF format; without it the environment variable QUARRY_MODEL names the file", 0, 0},
    {"-t, --threads", "N", CLI_INT, offsetof(cli_model_options, n_threads), "0", "threads; 0: one per core", 0, 1024},
    {"--no-mmap", NULL, CLI_SWITCH, offsetof(cli_model_options, no_mmap), NULL, "read the model file instead of mapping it", 0, 0},
    {"--mlock", NULL, CLI_SWITCH, offsetof(cli_model_options, mlock), NULL, "keep the weights in RAM: the system may not move them to swap",
     0, 0},
    {"--chat-template", "NAME", CLI_TEXT, offsetof(cli_model_options, chat_template), NULL,
     "chat template family, e.g. chatml, instead of the model's own; plain: none, for a model that only continues text", 0, 0},
    {0}};

const cli_option cli_session_table[] = {
    {"--attn", "POLICY", CLI_TEXT, offsetof(cli_session_options, attn), "ivfpq",
     "how attention finds what to read in a long context, NAME or NAME:OPTION=VALUE,...; 'quarry info --attn' lists them", 0, 0},
    {"-c, --ctx-size", "N", CLI_INT, offsetof(cli_session_options, n_ctx), "0", "tokens of context; 0: what the model was trained for", 0,
     1e12},
    {"-b, --batch-size", "N", CLI_INT, offsetof(cli_session_options, n_batch), "512", "tokens per forward pass while reading", 1, 65536},
    {"--extend", NULL, CLI_SWITCH, offsetof(cli_session_options, extend), NULL,
     "read texts longer than the model was trained for: what lies before the last --read-window tokens is searched, and seen alike "
     "whatever its distance",
     0, 0},
    {"--read-window", "N", CLI_INT, offsetof(cli_session_options, read_window), "0",
     "read documents in blocks that attend to their last N tokens, the first, and what the policy finds; 0: with full attention; with "
     "--extend: 2048, or an eighth of what the model was trained for",
     0, 1e9},
    {"--kv-f32", NULL, CLI_SWITCH, offsetof(cli_session_options, kv_f32), NULL, "keep keys and values in 32 bits instead of 16", 0, 0},
    {0}};

const cli_option cli_store_table[] = {
    {"--store", "DIR", CLI_TEXT, offsetof(cli_store_options, folder), NULL,
     "folder of contexts that were read; without it the environment variable QUARRY_STORE names it, else it is quarry/contexts in the "
     "user's "
     "cache folder",
     0, 0},
    {"--store-size", "GB", CLI_NUMBER, offsetof(cli_store_options, max_gb), "10",
     "what the store may take of the disk; what was not used for longest is removed first", 0.001, 1e9},
    {0}};

const cli_option cli_sampling_table[] = {
    {"-n, --predict", "N", CLI_INT, offsetof(cli_sampling_options, n_predict), "256",
     "most tokens to generate; -1: until the context is full", -1, 1e12},
    {"-s, --seed", "N", CLI_INT, offsetof(cli_sampling_options, seed), "-1", "seed of the random numbers; -1: another one each time", -1,
     9.3e18},
    {"--temp", "X", CLI_NUMBER, offsetof(cli_sampling_options, temperature), "0", "temperature; 0: always the likeliest token", 0, 1000},
    {"--top-k", "N", CLI_INT, offsetof(cli_sampling_options, top_k), "0", "draw from the N likeliest tokens; 0: off", 0, 1e9},
    {"--top-p", "P", CLI_NUMBER, offsetof(cli_sampling_options, top_p), "1",
     "draw from the likeliest tokens that together have probability P; 1: off", 0, 1},
    {"--min-p", "P", CLI_NUMBER, offsetof(cli_sampling_options, min_p), "0", "drop tokens less probable than P times the likeliest; 0: off",
     0, 1},
    {"--repeat-penalty", "X", CLI_NUMBER, offsetof(cli_sampling_options, repeat_penalty), "1", "make recent tokens less likely; 1: off",
     0.01, 100},
    {"--repeat-last-n", "N", CLI_INT, offsetof(cli_sampling_options, repeat_last_n), "64", "recent tokens that the penalty looks at", 0,
     1e9},
    {"--logit-bias", "TOKEN+BIAS", CLI_LIST, offsetof(cli_sampling_options, logit_bias), NULL,
     "add BIAS to a token's logit, e.g. 198+1.5 or 198-inf; may be repeated", 0, 0},
    {"-r, --stop, --reverse-prompt", "TEXT", CLI_LIST, offsetof(cli_sampling_options, stop), NULL,
     "stop before this text (\\n, \\t and \\\\ are understood); may be repeated", 0, 0},
    {"--ignore-eos", NULL, CLI_SWITCH, offsetof(cli_sampling_options, ignore_eos), NULL, "go on after the model's end of answer", 0, 0},
    {0}};

const cli_option cli_output_table[] = {
    {"--json", NULL, CLI_SWITCH, offsetof(cli_output_options, json), NULL, "print one JSON object", 0, 0},
    {"-q, --quiet", NULL, CLI_SWITCH, offsetof(cli_output_options, quiet), NULL, "no progress and no statistics on standard error", 0, 0},
    {"-v, --verbose", NULL, CLI_SWITCH, offsetof(cli_output_options, verbose), NULL, "say what the library does", 0, 0},
    {0}};

const cli_option cli_input_table[] = {
    {"-p, --prompt", "TEXT", CLI_TEXT, offsetof(cli_input_options, prompt), NULL, "the text", 0, 0},
    {"-f, --file", "FILE", CLI_TEXT, offsetof(cli_input_options, file), NULL, "read the text from a file; -: standard input", 0, 0},
    {0}};

/* ---- model and session ---- */

static void print_log(quarry_log_level level, const char *line, void *data)
{
    const cli_output_options *output = data;
    if (level <= QUARRY_LOG_WARN || (output && output->verbose)) fprintf(stderr, "quarry: %s\n", line);
}

const char *cli_model_path(const cli_model_options *options)
{
    return options->path ? options->path : getenv("QUARRY_MODEL");
}

int cli_model_open(quarry_model **model, const cli_model_options *options, const cli_output_options *output, quarry_store *store)
{
    const char *path = cli_model_path(options);
    if (!path || !*path) return cli_fail_usage(NULL, "no model: give one with -m FILE or in the environment variable QUARRY_MODEL");
    const quarry_fingerprints known = store ? quarry_store_fingerprints(store) : (quarry_fingerprints){0};
    quarry_model_params params = {
        .fingerprints = store ? &known : NULL,
        .n_threads = (int)options->n_threads,
        .no_mmap = options->no_mmap,
        .mlock = options->mlock,
        .chat_template = options->chat_template,
        .log = print_log,
        .log_data = (void *)output,
    };
    quarry_error error;
    *model = quarry_model_open(path, &params, &error);
    return *model ? CLI_OK : cli_fail_error(&error);
}

quarry_session_params cli_session_params(const cli_session_options *options)
{
    return (quarry_session_params){.n_ctx = options->n_ctx,
                                   .attn = options->attn,
                                   .n_batch = (int)options->n_batch,
                                   .read_window = options->read_window,
                                   .extend = options->extend,
                                   .kv_ram = (size_t)options->kv_ram,
                                   .kv_f32 = options->kv_f32};
}

int cli_session_open(quarry_session **session, quarry_model *model, const cli_session_options *options)
{
    const quarry_session_params params = cli_session_params(options);
    quarry_error error;
    *session = quarry_session_open(model, &params, &error);
    return *session ? CLI_OK : cli_fail_error(&error);
}

/* ---- stored contexts ---- */

quarry_store_params cli_store_params(const cli_store_options *options, const cli_output_options *output)
{
    return (quarry_store_params){
        .folder = options->folder, .max_bytes = (uint64_t)(options->max_gb * 1e9), .log = print_log, .log_data = (void *)output};
}

void cli_store_open(quarry_store **store, const cli_store_options *options, const cli_output_options *output)
{
    const quarry_store_params params = cli_store_params(options, output);
    quarry_error error;
    *store = NULL;
    if (options->off) return;
    *store = quarry_store_open(&params, &error);
    if (!*store && !output->quiet) fprintf(stderr, "quarry: nothing is kept: %s\n", error.message);
}

/* ---- sampling ---- */

/* A copy with \n, \t and \\ replaced. */
static char *unescape(const char *text)
{
    char *copy = memory_string(text, strlen(text), NULL), *out = copy;
    if (!copy) return NULL;
    for (const char *p = copy; *p; p++) {
        char c = *p;
        if (c == '\\' && (p[1] == 'n' || p[1] == 't' || p[1] == '\\')) {
            p++;
            c = *p == 'n' ? '\n' : *p == 't' ? '\t' : '\\';
        }
        *out++ = c;
    }
    *out = 0;
    return copy;
}

/* "198+1.5", "198-inf" */
static bool parse_bias(const char *text, int64_t n_vocab, int32_t *token, float *value)
{
    char *end;
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    long long id = strtoll(text, &end, 10);
    if (errno || id >= n_vocab || (*end != '+' && *end != '-')) return false;
    char *number_end;
    float bias = strtof(end, &number_end);
    if (number_end == end || *number_end || isnan(bias)) return false;
    *token = (int32_t)id;
    *value = bias;
    return true;
}

int cli_sampling_make(cli_sampling *sampling, const cli_sampling_options *options, const quarry_model *model)
{
    quarry_model_info info;
    quarry_model_get_info(model, &info);
    quarry_sampling *p = &sampling->params;
    const cli_list *bias = &options->logit_bias, *stop = &options->stop;
    *sampling = (cli_sampling){0};
    quarry_sampling_default(p);
    p->temperature = (float)options->temperature;
    p->top_k = (int)options->top_k;
    p->top_p = (float)options->top_p;
    p->min_p = (float)options->min_p;
    p->repeat_penalty = (float)options->repeat_penalty;
    p->repeat_last_n = (int)options->repeat_last_n;
    p->max_tokens = options->n_predict;
    p->ignore_eos = options->ignore_eos;
    p->seed = (uint64_t)options->seed;
    if (options->seed < 0 && getrandom(&p->seed, sizeof p->seed, 0) != sizeof p->seed) p->seed = (uint64_t)(cli_seconds() * 1e9);
    sampling->bias_tokens = memory_zero((size_t)bias->n, sizeof *sampling->bias_tokens, "logit bias", NULL);
    sampling->bias_values = memory_zero((size_t)bias->n, sizeof *sampling->bias_values, "logit bias", NULL);
    sampling->stop = memory_zero((size_t)stop->n, sizeof *sampling->stop, "stop strings", NULL);
    if (!sampling->bias_tokens || !sampling->bias_values || !sampling->stop) return cli_fail("out of memory");
    for (int i = 0; i < bias->n; i++)
        if (!parse_bias(bias->items[i], info.n_vocab, &sampling->bias_tokens[i], &sampling->bias_values[i]))
            return cli_fail_usage(NULL, "--logit-bias: '%s' is not TOKEN+BIAS or TOKEN-BIAS with a token from 0 to %d", bias->items[i],
                                  info.n_vocab - 1);
    for (int i = 0; i < stop->n; i++) {
        if (!*stop->items[i]) return cli_fail_usage(NULL, "--stop: the text is empty");
        if (!(sampling->stop[i] = unescape(stop->items[i]))) return cli_fail("out of memory");
        p->n_stop++;
    }
    p->stop = (const char *const *)sampling->stop;
    p->bias_tokens = sampling->bias_tokens;
    p->bias_values = sampling->bias_values;
    p->n_bias = bias->n;
    return CLI_OK;
}

void cli_sampling_free(cli_sampling *sampling)
{
    for (int i = 0; i < sampling->params.n_stop; i++) memory_free(sampling->stop[i]);
    memory_free(sampling->stop);
    memory_free(sampling->bias_tokens);
    memory_free(sampling->bias_values);
    *sampling = (cli_sampling){0};
}

/* ---- input ---- */

int cli_read_file(char **text, size_t *n_bytes, const char *path)
{
    quarry_error error;
    if (!strcmp(path, "-") && isatty(STDIN_FILENO))
        return cli_fail_usage(NULL, "standard input is a terminal: pipe or redirect text into it, or name a file");
    *text = file_read_all(path, n_bytes, &error);
    return *text ? CLI_OK : cli_fail_error(&error);
}

int cli_read_input(char **text, size_t *n_bytes, const cli_input_options *options, const cli_list *arguments, const cli_command *command)
{
    if (arguments->n > 1) return cli_fail_usage(command, "one text expected, got %d; put it in quotes", arguments->n);
    const char *given = arguments->n ? arguments->items[0] : options->prompt;
    if ((arguments->n > 0) + (options->prompt != NULL) + (options->file != NULL) > 1)
        return cli_fail_usage(command, "the text is given twice: use the argument, -p or -f");
    if (!given) return cli_read_file(text, n_bytes, options->file ? options->file : "-");
    *n_bytes = strlen(given);
    *text = memory_string(given, *n_bytes, NULL);
    return *text ? CLI_OK : cli_fail("out of memory");
}
