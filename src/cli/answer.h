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

/* Reads `context` with dense attention and then feeds `question` (n_question may be 0), with progress; cite: what the question and the answer attend to is noted. Returns an exit code. */
int answer_read(quarry_session *session, const answer_settings *settings, const int32_t *context, int64_t n_context,
                const int32_t *question, int64_t n_question, bool cite);

/* Generates after the session's last token; prints the answer as it comes, the passages it was written from if citations are wanted (cite, else NULL), and the statistics at the
 * end, or all as JSON. Returns an exit code. */
int answer_run(const quarry_model *model, quarry_session *session, const answer_settings *settings, const quarry_sampling *sampling,
               const cite_request *cite);

#endif
