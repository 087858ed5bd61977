#include "cli/eval_common.h"

#include <string.h>

const cli_option eval_options_table[] = {
    {"-f, --file", "FILE", CLI_LIST, offsetof(eval_options, files), NULL, "text to read, long and plain; further ones may follow the flags",
     0, 0},
    {"--attn", "POLICY", CLI_LIST, offsetof(eval_options, attn), NULL,
     "policies to compare with full attention, separated by commas; may be repeated (default: ivfpq)", 0, 0},
    {"-b, --batch-size", "N", CLI_INT, offsetof(eval_options, n_batch), "512", "tokens per forward pass while reading", 1, 65536},
    {0}};

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
int eval_input_open(eval_input *in, const cli_model_options *model, const eval_options *options, const cli_output_options *output,
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

void eval_input_close(eval_input *in)
{
    for (int i = 0; i < in->n_texts; i++) quarry_free((void *)in->texts[i].tokens);
    memory_free(in->texts);
    policy_list_free(&in->policies);
    quarry_model_close(in->model);
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
