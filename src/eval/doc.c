#include <math.h>
#include <stdio.h>
#include <string.h>

#include "eval/common.h"

enum { QUESTION_COST = 64 }; /* what a question counts in the progress, in tokens, under one policy */

typedef struct doc_run {
    quarry_model *model;
    const doc_params *params;
    const char **specs; /* [n_policies], "full" first */
    int n_policies;
    quarry_prompt *documents; /* [n_documents] of each its context, what the model reads before a question */
    quarry_prompt *questions; /* [n_questions] of each its question */
    score_cell *cells;        /* [n_policies] */
    eval_watch watch;
    doc_answer_fn on_answer;
    void *data;
} doc_run;

/* All prompts, before anything is read: what does not fit is said at once. A document is tokenised for its first question only: parts of a message are tokenised apart, so
 * that a question's tokens are the same after any other text. */
static quarry_code prompts_make(doc_run *r, quarry_error *error)
{
    const doc_set *set = r->params->set;
    const int64_t trained = model_shape_of(r->model)->n_ctx_train;
    if (!(r->documents = memory_zero((size_t)set->n_documents, sizeof *r->documents, "documents", error)) ||
        !(r->questions = memory_zero((size_t)set->n_questions, sizeof *r->questions, "questions", error)))
        return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < set->n_questions; i++) {
        const doc_question *q = &set->questions[i];
        const doc_document *d = &set->documents[q->document];
        quarry_prompt prompt, *read = &r->documents[q->document];
        const quarry_document document =
            read->context ? (quarry_document){.text = "x", .n_bytes = 1} : (quarry_document){.text = d->text, .n_bytes = d->n_bytes};
        const quarry_code code = (quarry_code)quarry_prompt_build(r->model, &document, 1, NULL, q->question, &prompt, error);
        if (code != QUARRY_OK) return code;
        r->questions[i] = (quarry_prompt){.question = prompt.question, .n_question = prompt.n_question};
        prompt.question = NULL;
        if (!read->context)
            *read = prompt;
        else
            quarry_prompt_free(&prompt);
        const int64_t n = read->n_context + r->questions[i].n_question + r->params->n_answer;
        if (n > trained)
            return error_set(
                error, QUARRY_ERROR_CONTEXT,
                "%s: line %lld: document, question and an answer of %d tokens take %lld, but the model was trained for a context of %lld",
                set->path, (long long)q->line, r->params->n_answer, (long long)n, (long long)trained);
    }
    return QUARRY_OK;
}

static void question_key(const doc_question *q, char out[32])
{
    snprintf(out, 32, "line %lld", (long long)q->line);
}

static const json_t *question_find(const doc_run *r, const doc_question *q)
{
    char key[32];
    question_key(q, key);
    return journal_find(r->params->journal, key);
}

/* Under every policy; into the journal. The record is *record, for the caller to release. */
static quarry_code question_ask(doc_run *r, const quarry_session *read, int index, json_t **record, quarry_error *error)
{
    const doc_question *q = &r->params->set->questions[index];
    const quarry_prompt *prompt = &r->questions[index];
    quarry_code code = QUARRY_OK;
    char key[32];
    json_t *policies = json_array();
    *record = json_pack("{s:o}", "policies", policies);
    if (!*record) return error_memory(error, "journal record", 0);
    for (int policy = 0; policy < r->n_policies; policy++) {
        reading_sum reading = {0};
        bool right = false;
        char *text;
        if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) return code;
        code = answer_ask(r->model, read, policy, prompt->question, prompt->n_question, r->params->n_answer, NULL, NULL, &text, &reading,
                          error);
        if (code == QUARRY_OK) code = doc_answered(q, text, &right, error);
        if (code == QUARRY_OK && r->on_answer) r->on_answer(q, r->specs[policy], right, text, r->data);
        memory_free(text);
        if (code == QUARRY_OK && json_array_append_new(policies, score_record(right, &reading)))
            code = error_memory(error, "journal record", 0);
        if (code != QUARRY_OK) return code;
        r->watch.done += QUESTION_COST;
    }
    question_key(q, key);
    return journal_add(r->params->journal, key, json_incref(*record), error);
}

/* The questions about one document; it is read if one of them is not in the journal. */
static quarry_code document_run(doc_run *r, int document, quarry_error *error)
{
    const doc_set *set = r->params->set;
    const quarry_prompt *read = &r->documents[document];
    const quarry_session_params params = {.n_batch = r->params->n_batch};
    quarry_session *session = NULL;
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < set->n_questions && code == QUARRY_OK; i++) {
        const doc_question *q = &set->questions[i];
        char key[32];
        if (q->document != document) continue;
        json_t *record = json_incref((json_t *)question_find(r, q));
        if (!record && !session) {
            if (!(session = session_open_policies(r->model, &params, r->specs, r->n_policies, error))) return eval_failed(error);
            code = eval_read(session, read->context, read->n_context, &r->watch, error);
        }
        if (!record && code == QUARRY_OK) code = question_ask(r, session, i, &record, error);
        question_key(q, key);
        if (code == QUARRY_OK) code = score_cells_add(r->cells, r->n_policies, json_object_get(record, "policies"), key, "eval doc", error);
        json_decref(record);
    }
    quarry_session_close(session);
    return code;
}

static int64_t total_cost(const doc_run *r)
{
    const doc_set *set = r->params->set;
    int64_t total = 0;
    for (int d = 0; d < set->n_documents; d++) {
        int64_t n = 0;
        for (int i = 0; i < set->n_questions; i++) n += set->questions[i].document == d && !question_find(r, &set->questions[i]);
        total += n * r->n_policies * QUESTION_COST + (n > 0 ? r->documents[d].n_context : 0);
    }
    return total;
}

static void results_fill(doc_run *r, doc_result *results, score_result *scores)
{
    const doc_set *set = r->params->set;
    double tokens = 0;
    for (int i = 0; i < set->n_questions; i++)
        tokens += (double)r->documents[set->questions[i].document].n_context / (double)set->n_questions;
    const int64_t full_correct = llround(r->cells[0].kept);
    score_cells_finish(r->cells, r->n_policies, r->model, scores);
    for (int i = 0; i < r->n_policies; i++) {
        doc_result *out = &results[i];
        *out = (doc_result){.score = scores[i], .full_correct = full_correct, .kept = llround(r->cells[i].kept)};
        out->score.attn = r->specs[i];
        out->score.task = "all";
        out->score.length = llround(tokens);
        out->correct = llround(out->score.score * (double)out->score.n);
        metric_wilson(out->kept, full_correct, 1.96, &out->kept_low, &out->kept_high);
    }
}

quarry_code doc_measure(quarry_model *model, const doc_params *params, const quarry_watch *watch, doc_answer_fn on_answer, void *data,
                        doc_result *results, quarry_error *error)
{
    doc_run r = {
        .model = model, .params = params, .n_policies = params->n_attn + 1, .watch = {watch, 0, 0}, .on_answer = on_answer, .data = data};
    const doc_set *set = params->set;
    score_result *scores = NULL;
    quarry_code code = QUARRY_ERROR_MEMORY;
    if (params->n_answer < 1) return error_set(error, QUARRY_ERROR_ARGUMENT, "the tokens of an answer must be at least 1");
    if (!(r.specs = eval_policies(NULL, params->attn, params->n_attn, error)) ||
        !(r.cells = memory_zero((size_t)r.n_policies, sizeof *r.cells, "scores", error)) ||
        !(scores = memory_zero((size_t)r.n_policies, sizeof *scores, "scores", error)))
        goto done;
    if ((code = prompts_make(&r, error)) != QUARRY_OK) goto done;
    r.watch.total = total_cost(&r);
    for (int i = 0; i < set->n_documents && code == QUARRY_OK; i++) code = document_run(&r, i, error);
    if (code == QUARRY_OK) results_fill(&r, results, scores);
done:
    for (int i = 0; r.documents && i < set->n_documents; i++) quarry_prompt_free(&r.documents[i]);
    for (int i = 0; r.questions && i < set->n_questions; i++) quarry_prompt_free(&r.questions[i]);
    memory_free(r.documents);
    memory_free(r.questions);
    memory_free(r.specs);
    score_cells_free(r.cells, r.n_policies);
    memory_free(scores);
    return code;
}
