#include <math.h>

#include "eval/common.h"

/* What detokenizer_push wants beyond the token's own bytes, and the end. */
enum { ANSWER_SPARE = 32 };

/* Appends a token (its visible text) to *text[*n], NUL-terminated. */
static quarry_code text_push(char **text, size_t *n, size_t *capacity, detokenizer *d, const tokenizer *t, int32_t token,
                             quarry_error *error)
{
    size_t n_token = 0;
    tokenizer_token_bytes(t, token, &n_token);
    if (*n + n_token + ANSWER_SPARE > *capacity) {
        const size_t more = 2 * *capacity + n_token + ANSWER_SPARE;
        const quarry_code code = memory_grow(text, more, 1, "answer", error);
        if (code != QUARRY_OK) return code;
        *capacity = more;
    }
    *n += detokenizer_push(d, t, token, *text + *n, *capacity - *n - 1);
    (*text)[*n] = '\0';
    return QUARRY_OK;
}

/* session was fed the question. *n_fed: tokens of the answer that were fed. */
static quarry_code answer_greedy(const quarry_model *model, quarry_session *session, int n_predict, answer_enough_fn enough,
                                 const void *data, char **text, int64_t *n_fed, quarry_error *error)
{
    const tokenizer *t = model_tokenizer(model);
    detokenizer d;
    size_t n = 0, capacity = 256;
    if (!(*text = memory_zero(capacity, 1, "answer", error))) return QUARRY_ERROR_MEMORY;
    detokenizer_start(&d);
    for (int i = 0; i < n_predict; i++) {
        const int32_t token = metric_argmax(quarry_session_logits(session), model_shape_of(model)->n_vocab);
        if (quarry_token_ends(model, token)) break;
        quarry_code code = text_push(text, &n, &capacity, &d, t, token, error);
        if (code != QUARRY_OK) return code;
        if (i + 1 == n_predict || (enough && enough(data, *text))) break;
        if ((code = (quarry_code)quarry_session_feed(session, &token, 1, NULL, error)) != QUARRY_OK) return code;
        ++*n_fed;
    }
    n += detokenizer_finish(&d, *text + n, capacity - n - 1);
    (*text)[n] = '\0';
    return QUARRY_OK;
}

quarry_code answer_ask(const quarry_model *model, const quarry_session *read, int policy, const int32_t *question, int64_t n_question,
                       int n_predict, answer_enough_fn enough, const void *data, char **text, reading_sum *reading, quarry_error *error)
{
    int64_t n_fed = 0;
    *text = NULL;
    quarry_session *session = session_fork_policy(read, policy, error);
    if (!session) return eval_failed(error);
    quarry_code code = (quarry_code)quarry_session_feed(session, question, n_question, NULL, error);
    if (code == QUARRY_OK) code = answer_greedy(model, session, n_predict, enough, data, text, &n_fed, error);
    if (code == QUARRY_OK) {
        reading_add(reading, session, n_question + n_fed);
    } else {
        memory_free(*text);
        *text = NULL;
    }
    quarry_session_close(session);
    return code;
}

json_t *score_record(double score, const reading_sum *reading)
{
    return json_pack("{s:f, s:o, s:I}", "score", score, "cost", record_cost(&reading->cost), "tokens", (json_int_t)reading->tokens);
}

quarry_code score_cells_add(score_cell *cells, int n_policies, const json_t *records, const char *key, const char *command,
                            quarry_error *error)
{
    double of_full = 0;
    for (int policy = 0; policy < n_policies; policy++) {
        double score;
        json_t *cost;
        json_int_t tokens;
        if (json_unpack(json_array_get(records, (size_t)policy), "{s:F, s:o, s:I}", "score", &score, "cost", &cost, "tokens", &tokens) ||
            !reading_add_record(&cells[policy].reading, cost, tokens))
            return error_set(error, QUARRY_ERROR_FORMAT, "the journal's record '%s' is not one of %s; remove the journal", key, command);
        if (policy == 0) of_full = score;
        quarry_code code = series_push(&cells[policy].scores, score, error);
        if (code == QUARRY_OK) code = series_push(&cells[policy].losses, of_full - score, error);
        if (code != QUARRY_OK) return code;
        cells[policy].kept += fmin(of_full, score);
    }
    return QUARRY_OK;
}

void score_cells_finish(score_cell *cells, int n_policies, const quarry_model *model, score_result *results)
{
    for (int policy = 0; policy < n_policies; policy++) {
        score_result *out = &results[policy];
        metric_summary score, loss;
        series_summarise(&cells[policy].scores, &score);
        series_summarise(&cells[policy].losses, &loss);
        out->n = score.n;
        out->score = score.mean;
        out->score_full = results[0].score;
        out->loss = loss.mean;
        metric_wilson(llround(score.mean * (double)score.n), score.n, 1.96, &out->score_low, &out->score_high);
        metric_loss_interval(loss.n, loss.mean, loss.sd, &out->loss_low, &out->loss_high);
        reading_relate(&cells[policy].reading, &cells[0].reading, model, &out->reading);
    }
}

void score_cells_free(score_cell *cells, int n)
{
    for (int i = 0; cells && i < n; i++) {
        series_free(&cells[i].scores);
        series_free(&cells[i].losses);
    }
    memory_free(cells);
}
