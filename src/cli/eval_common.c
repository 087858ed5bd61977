#include "cli/eval_common.h"

#include <math.h>
#include <string.h>

const cli_option eval_options_table[] = {
    {"-f, --file", "FILE", CLI_LIST, offsetof(eval_options, files), NULL, "text to read, long and plain; further ones may follow the flags",
     0, 0},
    {"--attn", "POLICY", CLI_LIST, offsetof(eval_options, attn), NULL,
     "policies to compare with full attention, separated by commas; may be repeated (default: ivfpq)", 0, 0},
    {"-b, --batch-size", "N", CLI_INT, offsetof(eval_options, n_batch), "512", "tokens per forward pass while reading", 1, 65536},
    {0}};

const cli_option eval_way_table[] = {{"--extend", NULL, CLI_SWITCH, offsetof(eval_options, extend), NULL,
                                      "policies read, and answer, as beyond what the model was trained for (quarry ask --extend); if a "
                                      "text is longer than that, they are compared with the first of them",
                                      0, 0},
                                     {"--read-window", "N", CLI_INT, offsetof(eval_options, read_window), "0",
                                      "policies read documents in blocks that attend to their last N tokens, the first, and what they "
                                      "find; 0: with full attention; with --extend: 2048, or an eighth of what the model was trained for",
                                      0, 1e9},
                                     {0}};

eval_way eval_input_way(eval_input *in, const eval_options *options, int64_t longest)
{
    eval_way way = {.n_batch = (int)options->n_batch, .read_window = options->read_window, .extend = options->extend};
    in->attn = (const char *const *)in->policies.specs;
    in->n_attn = in->policies.n;
    if (way.extend && longest > in->info.n_ctx_train) {
        way.reference = *in->attn++;
        in->n_attn--;
    }
    return way;
}

int eval_input_begin(eval_input *in, const eval_settings *settings, int n_texts)
{
    const eval_options *options = &settings->input;
    quarry_error error;
    for (int i = 0; i < options->attn.n; i++)
        if (policy_list_add(&in->policies, options->attn.items[i], &error) != QUARRY_OK) return cli_fail_error(&error);
    if (options->attn.n == 0 && policy_list_add(&in->policies, attn_policies[0]->name, &error) != QUARRY_OK) return cli_fail_error(&error);
    const int code = cli_model_open(&in->model, &settings->model, &settings->output, NULL);
    if (code) return code;
    quarry_model_get_info(in->model, &in->info);
    in->texts = memory_zero((size_t)n_texts, sizeof *in->texts, "texts", &error);
    if (!in->texts) return cli_fail_error(&error);
    in->digests = memory_zero((size_t)n_texts, sizeof *in->digests, "digests", &error);
    return in->digests ? CLI_OK : cli_fail_error(&error);
}

int eval_input_add(eval_input *in, const char *path, const char *text, size_t n_bytes)
{
    int32_t *tokens = NULL;
    quarry_error error;
    digest_bytes(text, n_bytes, in->digests[in->n_texts]);
    const int64_t n = quarry_tokenize(in->model, text, n_bytes, false, &tokens, &error);
    if (n < 0) return cli_fail_error(&error);
    in->texts[in->n_texts++] = (eval_text){path, tokens, n};
    return CLI_OK;
}

static int keep_bytes(eval_input *in, const char *text, size_t n_bytes)
{
    quarry_error error;
    if (memory_grow(&in->bytes, in->n_bytes + n_bytes + 1, 1, "text", &error) != QUARRY_OK) return cli_fail_error(&error);
    memcpy(in->bytes + in->n_bytes, text, n_bytes);
    in->n_bytes += n_bytes + 1;
    in->bytes[in->n_bytes - 1] = '\n';
    return CLI_OK;
}

static int read_text(eval_input *in, const char *path)
{
    char *text = NULL;
    size_t n_bytes;
    int code = cli_read_file(&text, &n_bytes, path);
    if (!code) code = eval_input_add(in, path, text, n_bytes);
    if (!code && in->keep_bytes) code = keep_bytes(in, text, n_bytes);
    memory_free(text);
    return code;
}

/* Texts are the files of -f and what follows the flags, so that -f *.txt means what it looks like. */
int eval_input_open(eval_input *in, const eval_settings *settings, const cli_list *arguments, const cli_command *command)
{
    const cli_list *files = &settings->input.files;
    if (files->n + arguments->n == 0) return cli_fail_usage(command, "no text: name one with -f FILE");
    int code = eval_input_begin(in, settings, files->n + arguments->n);
    for (int i = 0; i < files->n && !code; i++) code = read_text(in, files->items[i]);
    for (int i = 0; i < arguments->n && !code; i++) code = read_text(in, arguments->items[i]);
    return code;
}

void eval_input_close(eval_input *in)
{
    for (int i = 0; i < in->n_texts; i++) quarry_free((void *)in->texts[i].tokens);
    journal_close(in->journal);
    json_decref(in->envelope);
    memory_free(in->texts);
    memory_free(in->digests);
    memory_free(in->bytes);
    policy_list_free(&in->policies);
    quarry_model_close(in->model);
}

/* The last part of a path: results go into reports, and folders are the user's own. */
static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static json_t *json_texts(const eval_input *in)
{
    json_t *list = json_array();
    for (int i = 0; i < in->n_texts; i++)
        json_array_append_new(list, json_pack("{s:s, s:s, s:I}", "name", file_name(in->texts[i].name), "digest", in->digests[i], "n_tokens",
                                              (json_int_t)in->texts[i].n_tokens));
    return list;
}

json_t *eval_json_policies(const eval_input *in)
{
    json_t *list = json_array();
    for (int i = 0; i < in->policies.n; i++) json_array_append_new(list, json_string(in->policies.specs[i]));
    return list;
}

void eval_json_way(json_t *parameters, const eval_options *options)
{
    if (options->extend) json_object_set_new(parameters, "extend", json_true());
    if (options->read_window) json_object_set_new(parameters, "read_window", json_integer(options->read_window));
}

int eval_input_record(eval_input *in, const cli_command *command, const eval_settings *settings, const cli_list *arguments, int64_t seed,
                      json_t *parameters)
{
    quarry_error error;
    char digest[DIGEST_CHARS];
    const char *path = cli_model_path(&settings->model);
    char *line = NULL;
    int code = CLI_OK;
    if (!settings->output.json && !settings->journal) goto done;
    if (digest_file(path, digest, &error) != QUARRY_OK) {
        code = cli_fail_error(&error);
        goto done;
    }
    line = cli_command_line(command, settings, arguments);
    in->envelope =
        json_pack("{s:s, s:s, s:s, s:{s:s, s:s, s:s, s:s, s:I}, s:s, s:o, s:o, s:O}", "command", command->name, "line", line ? line : "",
                  "version", quarry_version(), "model", "name", in->info.name, "file", file_name(path), "digest", digest, "quantization",
                  in->info.quantization, "n_ctx_train", (json_int_t)in->info.n_ctx_train, "isa", in->info.kernels, "seed",
                  seed < 0 ? json_null() : json_integer(seed), "texts", json_texts(in), "parameters", parameters);
    if (!line || !in->envelope)
        code = cli_fail("out of memory");
    else if (settings->journal && !(in->journal = journal_open(settings->journal, in->envelope, &error)))
        code = cli_fail_error(&error);
done:
    memory_free(line);
    json_decref(parameters);
    return code;
}

quarry_watch eval_measure_begin(cli_progress *progress, const eval_settings *settings)
{
    cli_work_begin();
    return cli_progress_start(progress, "measuring", settings->output.quiet);
}

int eval_measure_end(cli_progress *progress, quarry_code measured, const quarry_error *error)
{
    cli_work_end();
    cli_progress_end(progress);
    return measured == QUARRY_OK ? CLI_OK : cli_fail_error(error);
}

int eval_print_json(eval_input *in, json_t *results)
{
    json_object_set_new(in->envelope, "results", results);
    return json_print(json_incref(in->envelope));
}

json_t *eval_json_number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *eval_json_reading(const eval_reading *r)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f}", "rows_share", r->rows_share, "index_share", r->index_share, "tables_share",
                     r->tables_share, "tail_share", r->tail_share, "bytes_share", r->bytes_share, "bytes_per_token", r->bytes_per_token);
}

json_t *eval_json_summary(const metric_summary *s)
{
    return json_pack("{s:I, s:f, s:f, s:f, s:f, s:f}", "n", (json_int_t)s->n, "mean", s->mean, "standard_error", s->standard_error,
                     "median", s->median, "p99", s->p99, "max", s->max);
}

json_t *eval_json_mean(const kld_summary *s)
{
    json_t *value = eval_json_summary(&s->steps);
    json_object_set_new(value, "clustered_error", eval_json_number(s->clustered_error));
    return value;
}

double eval_best_error(const kld_summary *s)
{
    return isnan(s->clustered_error) ? s->steps.standard_error : s->clustered_error;
}

json_t *eval_json_score(const score_result *r)
{
    return json_pack("{s:s, s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:o}", "attn", r->attn, "task", r->task, "length",
                     (json_int_t)r->length, "n", (json_int_t)r->n, "score", r->score, "score_low", r->score_low, "score_high",
                     r->score_high, "score_full", r->score_full, "loss", r->loss, "loss_low", r->loss_low, "loss_high", r->loss_high,
                     "reading", eval_json_reading(&r->reading));
}

int eval_attn_width(const policy_list *policies)
{
    size_t width = strlen("policy");
    for (int i = 0; i < policies->n; i++) width = strlen(policies->specs[i]) > width ? strlen(policies->specs[i]) : width;
    return (int)width;
}

void eval_print_model(const eval_input *in)
{
    cli_print("model: %s %s, kernels %s, %d threads\n", in->info.name, in->info.quantization, in->info.kernels, in->info.n_threads);
}
