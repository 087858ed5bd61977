#include <stdio.h>
#include <string.h>

#include "cli/answer.h"
#include "cli/documents.h"

typedef struct ask_settings {
    answer_settings answer;
    cli_store_options store;
    cli_list documents;
    const char *system, *cite_html;
    int64_t cite; /* -1: as many as usual, 0: not asked for */
} ask_settings;

enum { USUAL_CITATIONS = 5 };

static const cli_option ask_table[] = {{"--doc", "FILE", CLI_LIST, offsetof(ask_settings, documents), NULL,
                                        "document to ask, plain text or Markdown; -: standard input; may be repeated", 0, 0},
                                       {"-sys, --system-prompt", "TEXT", CLI_TEXT, offsetof(ask_settings, system), NULL,
                                        "instructions for the model, ahead of the documents", 0, 0},
                                       {"--cite", "[=N]", CLI_COUNT, offsetof(ask_settings, cite), NULL,
                                        "list up to N passages (5) that the answer was written from", 1, 1000},
                                       {"--cite-html", "FILE", CLI_TEXT, offsetof(ask_settings, cite_html), NULL,
                                        "write a page with the answer and the documents, those passages marked", 0, 0},
                                       {"--no-store", NULL, CLI_SWITCH, offsetof(ask_settings, store.off), NULL,
                                        "read the documents anew: take nothing from the store, and keep nothing", 0, 0},
                                       CLI_KV_RAM(offsetof(ask_settings, answer.session)),
                                       {0}};

static const cli_group ask_groups[] = {
    {"Question", ask_table, 0}, ANSWER_GROUPS, {"Stored contexts", cli_store_table, offsetof(ask_settings, store)}, {0}};

/* ---- the command ---- */

static int ask_run(const void *settings, const cli_list *arguments)
{
    const ask_settings *s = settings;
    quarry_document *documents = NULL;
    quarry_model *model = NULL;
    quarry_session *session = NULL;
    quarry_store *store = NULL;
    quarry_stored stored;
    char *names = NULL;
    cli_sampling sampling = {0};
    quarry_prompt prompt = {0};
    quarry_error error;
    if (arguments->n == 0) return cli_fail_usage(&command_ask, "no question: quarry ask -m MODEL --doc FILE \"question\"");
    if (arguments->n > 1) return cli_fail_usage(&command_ask, "one question expected, got %d; put it in quotes", arguments->n);
    const char *question = arguments->items[0];
    if (cli_is_blank(question, strlen(question))) return cli_fail("the question is empty");

    if (s->answer.session.kv_ram && s->store.off)
        return cli_fail_usage(&command_ask, "--kv-ram keeps keys and values in the store: not with --no-store");

    const bool cite = s->cite || s->cite_html;
    if (cite && s->documents.n == 0) return cli_fail_usage(&command_ask, "nothing to cite: name a document with --doc FILE");
    int code = cli_documents_read(&documents, &s->documents, &command_ask);
    if (!code && s->documents.n) cli_store_open(&store, &s->store, &s->answer.output);
    if (!code) code = cli_model_open(&model, &s->answer.model, &s->answer.output, store);
    if (!code) code = cli_sampling_make(&sampling, &s->answer.sampling, model);
    if (code) goto done;
    if (quarry_prompt_build(model, documents, s->documents.n, s->system, question, &prompt, &error)) {
        code = cli_fail_error(&error);
        goto done;
    }
    const char *what = s->documents.n ? "the documents and the question take" : "the question takes";
    code = answer_check_room(model, &s->answer, prompt.n_context + prompt.n_question, what);
    if (!code) code = cli_session_open(&session, model, &s->answer.session);
    if (!code && s->documents.n && !(names = cli_documents_names(documents, s->documents.n))) code = cli_fail("out of memory");
    const answer_input input = {
        prompt.context, prompt.question, prompt.n_context, prompt.n_question, prompt.ends, s->documents.n, names, store, cite};
    if (!code) code = answer_read(session, &s->answer, &input, &stored);
    const cite_request request = {documents, s->documents.n, question, s->cite > 0 ? s->cite : USUAL_CITATIONS, s->cite != 0, s->cite_html};
    if (!code) code = answer_run(model, session, &s->answer, &sampling.params, store ? &stored : NULL, cite ? &request : NULL);
    if (code && store && session && quarry_store_remove_damaged(store, session))
        fprintf(stderr, "quarry: the damaged file is removed from the store: ask again, and its text is read anew\n");
done:
    quarry_session_close(session);
    quarry_store_close(store);
    memory_free(names);
    cli_sampling_free(&sampling);
    quarry_prompt_free(&prompt);
    quarry_model_close(model);
    cli_documents_free(documents, s->documents.n);
    return code;
}

const cli_command command_ask = {
    "ask",
    "[options] QUESTION",
    "answer a question about documents",
    "The documents are read once, in full, and kept: the next question about them, today or later, takes them from the store ('quarry "
    "context' lists what it holds). The answer is written while attention searches them. The answer goes to standard output, "
    "everything else to "
    "standard error.\n\nExample:\n  quarry ask -m model.gguf --doc book.txt \"Who is the narrator?\"",
    ask_groups,
    sizeof(ask_settings),
    ask_run,
};
