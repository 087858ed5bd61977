#include "cli/answer.h"

typedef struct run_settings {
    answer_settings answer;
    cli_input_options input;
} run_settings;

static const cli_group run_groups[] = {{"Text", cli_input_table, offsetof(run_settings, input)}, ANSWER_GROUPS, {0}};

static int run_run(const void *settings, const cli_list *arguments)
{
    const run_settings *s = settings;
    quarry_model *model = NULL;
    quarry_session *session = NULL;
    cli_sampling sampling = {0};
    char *text = NULL;
    size_t n_bytes;
    int32_t *tokens = NULL;
    quarry_error error;
    int code = cli_read_input(&text, &n_bytes, &s->input, arguments, &command_run);
    if (!code && !n_bytes) code = cli_fail("the text is empty");
    if (!code) code = cli_model_open(&model, &s->answer.model, &s->answer.output, NULL);
    if (!code) code = cli_sampling_make(&sampling, &s->answer.sampling, model);
    if (code) goto done;
    int64_t n = quarry_tokenize(model, text, n_bytes, true, &tokens, &error);
    if (n < 0) {
        code = cli_fail_error(&error);
        goto done;
    }
    code = answer_check_room(model, &s->answer, n, "the text takes");
    if (!code) code = cli_session_open(&session, model, &s->answer.session);
    quarry_stored stored;
    if (!code) code = answer_read(session, &s->answer, &(answer_input){.context = tokens, .n_context = n}, &stored);
    if (!code) code = answer_run(model, session, &s->answer, &sampling.params, NULL, NULL);
done:
    quarry_session_close(session);
    cli_sampling_free(&sampling);
    quarry_free(tokens);
    quarry_model_close(model);
    memory_free(text);
    return code;
}

const cli_command command_run = {
    "run",
    "[options] [TEXT]",
    "continue a text, without a chat template",
    "The text is the argument, -p, -f, or standard input; only its continuation is printed, to standard output.",
    run_groups,
    sizeof(run_settings),
    run_run,
};
