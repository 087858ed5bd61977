/* What the tasks share. */
#ifndef EVAL_COMMON_H
#define EVAL_COMMON_H

#include "eval/eval.h"

/* Progress over several reads: positions of one read become positions of all. */
typedef struct eval_watch {
    const quarry_watch *outer; /* may be NULL */
    int64_t done, total;
} eval_watch;

/* Reads tokens, dense, and counts them as done. */
quarry_code eval_read(quarry_session *session, const int32_t *tokens, int64_t n, eval_watch *watch, quarry_error *error);
/* CANCELLED if the watcher wants to stop. */
quarry_code eval_watch_ask(const eval_watch *watch, quarry_error *error);

/* The code of an error that a function returning NULL filled. */
static inline quarry_code eval_failed(const quarry_error *error)
{
    return error ? error->code : QUARRY_ERROR_MEMORY;
}

/* *n_bos is 1 and *bos the token if the model wants one in front of plain text, else 0. */
quarry_code eval_bos(const quarry_model *model, int32_t *bos, int *n_bos, quarry_error *error);

/* CONTEXT if the model was not trained for so many tokens: better said before than after minutes of reading. */
quarry_code eval_check_length(const quarry_model *model, int64_t n_tokens, const char *what, quarry_error *error);
/* The same unless every policy reads in the extended way. */
quarry_code eval_check_way(const quarry_model *model, const eval_way *way, int64_t n_tokens, const char *what, quarry_error *error);

/* The reference (NULL: "full") and then attn[n_attn], in a new array (memory_free); the strings stay the caller's. */
const char **eval_policies(const char *reference, const char *const *attn, int n_attn, quarry_error *error);

/* Sessions that have read the same tokens: one for all policies, or one for each where reading depends on the policy. */
typedef struct eval_sessions {
    quarry_session **read; /* [n_policies], or [1] */
    int n;
    bool apart;
} eval_sessions;
/* Reads tokens[n] for specs[n_policies]; free also after a failure. */
quarry_code eval_sessions_read(eval_sessions *s, quarry_model *model, const eval_way *way, const char *const *specs, int n_policies,
                               const int32_t *tokens, int64_t n, eval_watch *watch, quarry_error *error);
quarry_session *eval_sessions_fork(const eval_sessions *s, int policy, quarry_error *error);
void eval_sessions_free(eval_sessions *s);
/* How often a document is read. */
static inline int eval_readings(const eval_way *way, int n_policies)
{
    return way->extend || way->read_window > 0 ? n_policies : 1;
}

/* ---- question.c ---- */

/* Texts as haystacks of one model; open, then close also after a failure. */
typedef struct haystack_source {
    const quarry_model *model;
    const eval_text *texts; /* [n_texts] */
    int n_texts;
    bool **starts; /* [n_texts][n_tokens] where a sentence begins */
} haystack_source;
quarry_code haystack_source_open(haystack_source *s, const quarry_model *model, const eval_text *texts, int n_texts, quarry_error *error);
void haystack_source_close(haystack_source *s);
/* Draws where in the text the haystack begins and fills tokens[n_tokens] with it; before[] lies in front of the text and counts. Sets needles' `at`
 * relative to the text. */
quarry_code haystack_draw(const haystack_source *s, int text_index, needle *needles, int n_needles, const token_list *before,
                          random_state *random, int32_t *tokens, int64_t n_tokens, quarry_error *error);
/* The chat template around a text and the question about a needle: before[] precedes the text, question[] follows it. */
quarry_code question_encode(const quarry_model *model, const needle *s, token_list *before, token_list *question, quarry_error *error);
/* The right answer, as a sentence that ends with the number, whose tokens begin at *first_digit. */
quarry_code answer_encode(const quarry_model *model, const needle *s, token_list *answer, int64_t *first_digit, quarry_error *error);

/* ---- common.c ---- */

/* Sums over the sessions of one policy. */
typedef struct reading_sum {
    attn_cost cost;
    int64_t tokens;
} reading_sum;
/* Adds what a fork read for the n_tokens it was fed. */
void reading_add(reading_sum *sum, const quarry_session *session, int64_t n_tokens);
/* The same from what record_cost made; false if cost (which may be NULL) is not that. */
bool reading_add_record(reading_sum *sum, const json_t *cost, int64_t n_tokens);
/* Per token: the two may have answered at different length. */
void reading_relate(const reading_sum *sum, const reading_sum *full, const quarry_model *model, eval_reading *out);

/* For journals; NULL out of memory. */
json_t *record_cost(const attn_cost *cost);
json_t *record_numbers(const double *values, int64_t n);

/* ---- score.c: answers that are texts, and what their scores add up to ---- */

/* True if what the text says is enough: more of it would not change its score. */
typedef bool (*answer_enough_fn)(const void *data, const char *text);
/* Asks a fork of a session under one of its policies: question[n_question], then greedy until the model ends its answer, n_predict tokens are there, or enough (NULL: never) says so.
 * *text, what a user would see of it, is the caller's (memory_free). */
quarry_code answer_ask(const quarry_model *model, const quarry_session *read, int policy, const int32_t *question, int64_t n_question,
                       int n_predict, answer_enough_fn enough, const void *data, char **text, reading_sum *reading, quarry_error *error);

/* For the journal; NULL out of memory. */
json_t *score_record(double score, const reading_sum *reading);

/* Sums over the samples of one policy. */
typedef struct score_cell {
    series scores, losses;
    double kept; /* sum of the lesser of full's score and its own */
    reading_sum reading;
} score_cell;
/* records: one of score_record for each policy, "full" first. Returns QUARRY_ERROR_FORMAT, naming key and command, if they are not. */
quarry_code score_cells_add(score_cell *cells, int n_policies, const json_t *records, const char *key, const char *command,
                            quarry_error *error);
/* Fills what follows from the cells in results[n_policies]. */
void score_cells_finish(score_cell *cells, int n_policies, const quarry_model *model, score_result *results);
void score_cells_free(score_cell *cells, int n); /* the cells themselves too; NULL allowed */

#endif
