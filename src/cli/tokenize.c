#include "cli/cli.h"
#include "cli/json.h"

typedef struct tokenize_settings {
    cli_input_options input;
    const char *model;
    bool no_special, ids, json;
} tokenize_settings;

static const cli_option tokenize_table[] = {
    {"-m, --model", "FILE", CLI_TEXT, offsetof(tokenize_settings, model), NULL,
     "model in GGUF format; without it the environment variable QUARRY_MODEL names the file", 0, 0},
    {"--no-special", NULL, CLI_SWITCH, offsetof(tokenize_settings, no_special), NULL,
     "add no start token, and take special tokens in the text as plain text", 0, 0},
    {"--ids", NULL, CLI_SWITCH, offsetof(tokenize_settings, ids), NULL, "print only the ids, on one line", 0, 0},
    {"--json", NULL, CLI_SWITCH, offsetof(tokenize_settings, json), NULL,
     "print one JSON object; a piece that is not UTF-8 is an array of its bytes", 0, 0},
    {0}};

static const cli_group tokenize_groups[] = {
    {"Options", tokenize_table, 0}, {"Text", cli_input_table, offsetof(tokenize_settings, input)}, {0}};

static int print_json(const quarry_model *model, const int32_t *tokens, int64_t n)
{
    json_t *list = json_array();
    bool complete = list != NULL;
    for (int64_t i = 0; i < n && complete; i++) {
        size_t n_bytes;
        const char *text = quarry_token_text(model, tokens[i], &n_bytes);
        json_t *token = json_pack("{s:i, s:o}", "id", (int)tokens[i], "piece", json_piece(text, n_bytes));
        complete = !json_array_append_new(list, token);
    }
    if (complete) return json_print(json_pack("{s:I, s:o}", "n_tokens", (json_int_t)n, "tokens", list));
    json_decref(list);
    return cli_fail("out of memory");
}

/* One token a line, its text with line breaks and control characters written out. */
static void print_lines(const quarry_model *model, const int32_t *tokens, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        size_t n_bytes;
        const char *text = quarry_token_text(model, tokens[i], &n_bytes);
        if (!cli_print("%6d -> '", (int)tokens[i])) return;
        for (size_t k = 0; k < n_bytes; k++) {
            unsigned char c = (unsigned char)text[k];
            if (c == '\n')
                cli_print("\\n");
            else if (c == '\t')
                cli_print("\\t");
            else if (c < ' ' || c == 127)
                cli_print("\\x%02x", c);
            else
                cli_write(text + k, 1);
        }
        cli_print("'\n");
    }
}

static int tokenize_run(const void *settings, const cli_list *arguments)
{
    const tokenize_settings *s = settings;
    const cli_model_options model_options = {.path = s->model};
    quarry_model *model = NULL;
    char *text = NULL;
    size_t n_bytes;
    int32_t *tokens = NULL;
    quarry_error error;
    int code = cli_read_input(&text, &n_bytes, &s->input, arguments, &command_tokenize);
    if (code || (code = cli_model_open(&model, &model_options, NULL, NULL))) goto done;
    int64_t n = quarry_tokenize(model, text, n_bytes, !s->no_special, &tokens, &error);
    if (n < 0) {
        code = cli_fail_error(&error);
        goto done;
    }
    if (s->json) {
        code = print_json(model, tokens, n);
    } else if (s->ids) {
        for (int64_t i = 0; i < n; i++) cli_print("%s%d", i ? " " : "", (int)tokens[i]);
        cli_print("\n");
    } else {
        print_lines(model, tokens, n);
    }
done:
    quarry_free(tokens);
    quarry_model_close(model);
    memory_free(text);
    return code;
}

const cli_command command_tokenize = {
    "tokenize",
    "[options] [TEXT]",
    "show the tokens of a text",
    "The text is the argument, -p, -f, or standard input.",
    tokenize_groups,
    sizeof(tokenize_settings),
    tokenize_run,
};
