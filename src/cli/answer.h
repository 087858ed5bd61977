/* What ask and run do once the context is read: stream the answer, then tell what it cost. */
#ifndef CLI_ANSWER_H
#define CLI_ANSWER_H

#include "cli/cite.h"

typedef struct answer_settings {
    cli_model_options model;
    cli_session_options session;
    cli_sampling_options sampling;
    cli_output_options output;
} answer_settings;

/* The groups of a settings struct that begins with answer_settings. */
#define ANSWER_GROUPS                                                                                                                      \
    {"Model", cli_model_table, offsetof(answer_settings, model)}, {"Context", cli_session_table, offsetof(answer_settings, session)},      \
        {"Sampling", cli_sampling_table, offsetof(answer_settings, sampling)},                                                             \
    {                                                                                                                                      \
        "Output", cli_output_table, offsetof(answer_settings, output)                                                                      \
    }

/* Fails, before any work, if n tokens leave no room for an answer; what: "the documents and the question take". */
int answer_check_room(const quarry_model *model, const answer_settings *settings, int64_t n_tokens, const char *what);

/* What is read before the answer. */
typedef struct answer_input {
    const int32_t *context, *question; /* question[0]: none */
    int64_t n_context, n_question;
    const int64_t *ends; /* [n_ends] of the documents in context */
    int n_ends;
    const char *names;   /* of the documents, a line each; NULL */
    quarry_store *store; /* NULL: nothing is taken from one or kept */
    bool cite;           /* what the question and the answer attend to is noted */
} answer_input;

/* Reads the context with dense attention, as far as it is not stored, and then feeds the question, with progress. *stored receives what the store gave and took. Returns an exit code. */
int answer_read(quarry_session *session, const answer_settings *settings, const answer_input *input, quarry_stored *stored);

/* Generates after the session's last token; stored: what answer_read got, NULL where there is no store. Prints the answer as it comes, the passages it was written from if citations are wanted (cite, else NULL), and the statistics at the
 * end, or all as JSON. Returns an exit code. */
int answer_run(const quarry_model *model, quarry_session *session, const answer_settings *settings, const quarry_sampling *sampling,
               const quarry_stored *stored, const cite_request *cite);

#endif
