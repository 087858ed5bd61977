#include "eval/needle.h"

#include <stdio.h>
#include <string.h>

enum { QUESTION_TOKENS = 64 };

typedef struct needle_run {
    quarry_model *model;
    const needle_params *params;
    const char **specs; /* [n_policies], "full" first */
    int n_policies;
    int64_t n_vocab;
    needle_tally *tallies; /* [n_policies] */
    needle_cell *cells;    /* [n_policies][n_depths][positions]; may be NULL */
    haystack_source source;
    float *reference;      /* [n_answer][n_vocab] logits of full along its answer */
    double *log_p, *log_q; /* [n_vocab] */
    double *kld;           /* [n_answer] of one policy along full's answer */
    eval_watch watch;
    random_state random;
    needle_answer_fn on_answer;
    void *data;
} needle_run;

/* One haystack, read, and the question about one of its needles. */
typedef struct needle_case {
    const char *text_name;
    const needle *needle;
    int64_t n_tokens;
    const eval_sessions *read;
    int64_t first; /* token where the text begins, after the template's */
    const token_list *question;
    token_list answer; /* of full, its end included */
    bool full_correct;
} needle_case;

/* Greedy answer of a session that was fed the question; reference[n_answer][n_vocab], if not NULL, receives the logits each token was chosen from. */
static quarry_code answer_greedy(needle_run *r, quarry_session *session, token_list *answer, float *reference, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; i < r->params->n_answer; i++) {
        const float *logits = quarry_session_logits(session);
        const int32_t token = metric_argmax(logits, r->n_vocab);
        if (reference) memcpy(reference + i * r->n_vocab, logits, (size_t)r->n_vocab * sizeof *reference);
        if ((code = token_list_push(answer, token, error)) != QUARRY_OK) return code;
        if (quarry_token_ends(r->model, token) || i + 1 == r->params->n_answer) break;
        if ((code = (quarry_code)quarry_session_feed(session, &token, 1, NULL, error)) != QUARRY_OK) return code;
    }
    return code;
}

/* Feeds full's answer and measures the distance at each of its tokens; *same: the policy would have said the same. */
static quarry_code answer_forced(needle_run *r, quarry_session *session, const token_list *answer, bool *same, quarry_error *error)
{
    *same = true;
    for (int64_t i = 0; i < answer->n; i++) {
        const float *logits = quarry_session_logits(session);
        metric_log_softmax(r->reference + i * r->n_vocab, r->n_vocab, r->log_p);
        metric_log_softmax(logits, r->n_vocab, r->log_q);
        r->kld[i] = metric_kld(r->log_p, r->log_q, r->n_vocab);
        *same = *same && metric_argmax(logits, r->n_vocab) == answer->ids[i];
        if (i + 1 == answer->n) break;
        const quarry_code code = (quarry_code)quarry_session_feed(session, &answer->ids[i], 1, NULL, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

static quarry_session *session_asked(const needle_run *r, const needle_case *c, int policy, quarry_error *error)
{
    quarry_session *session = eval_sessions_fork(c->read, policy, error);
    if (!session) return NULL;
    int code = r->params->cite ? quarry_session_cite(session, error) : QUARRY_OK;
    if (!code) code = quarry_session_feed(session, c->question->ids, c->question->n, NULL, error);
    if (!code) return session;
    quarry_session_close(session);
    return NULL;
}

/* The text of an answer, NUL-terminated; free with memory_free. */
static char *answer_text(const needle_run *r, const token_list *answer, size_t *n_bytes, quarry_error *error)
{
    size_t n, total = 0;
    for (int64_t i = 0; i < answer->n; i++) quarry_token_text(r->model, answer->ids[i], &n), total += n;
    char *text = memory_alloc(total + 1, 1, "answer", error);
    if (!text) return NULL;
    *n_bytes = 0;
    for (int64_t i = 0; i < answer->n; i++) {
        if (quarry_token_ends(r->model, answer->ids[i])) break;
        const char *piece = quarry_token_text(r->model, answer->ids[i], &n);
        memcpy(text + *n_bytes, piece, n);
        *n_bytes += n;
    }
    text[*n_bytes] = '\0';
    return text;
}

/* session: the one that gave the answer. */
static quarry_code answer_judge(const needle_run *r, needle_case *c, int policy, const token_list *answer, const quarry_session *session,
                                needle_said *said, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    size_t n_bytes;
    char *text = answer_text(r, answer, &n_bytes, error);
    if (!text) return QUARRY_ERROR_MEMORY;
    said->correct = needle_answered(c->needle, text, n_bytes);
    if (policy == 0) c->full_correct = said->correct;
    if (said->correct && r->params->cite)
        code = cite_first_holds(r->model, session, quarry_session_tokens(c->read->read[0]) + c->first, c->n_tokens - c->first, c->needle,
                                &said->cited, error);
    if (r->on_answer) {
        const needle_answer a = {c->text_name, r->specs[policy], text, c->needle, c->n_tokens, said->correct, c->full_correct};
        r->on_answer(&a, r->data);
    }
    memory_free(text);
    return code;
}

/* Policy 0 (full) answers freely and leaves the reference; the others follow its answer, and answer freely where they would have left it. */
static quarry_code needle_ask(needle_run *r, needle_case *c, int policy, needle_said *said, quarry_error *error)
{
    token_list own = {0};
    bool same = true;
    quarry_code code;
    quarry_session *free_session = NULL, *session = session_asked(r, c, policy, error);
    if (!session) return eval_failed(error);
    if (policy == 0) {
        c->answer.n = 0;
        code = answer_greedy(r, session, &c->answer, r->reference, error);
        for (int64_t i = 0; i < c->answer.n; i++) r->kld[i] = 0;
    } else {
        code = answer_forced(r, session, &c->answer, &same, error);
    }
    if (code != QUARRY_OK) goto done;
    *said = (needle_said){.kld = r->kld, .n_kld = c->answer.n};
    reading_add(&said->reading, session, c->question->n + c->answer.n - 1);
    if (!same) {
        if (!(free_session = session_asked(r, c, policy, error))) {
            code = eval_failed(error);
            goto done;
        }
        if ((code = answer_greedy(r, free_session, &own, NULL, error)) != QUARRY_OK) goto done;
    }
    code = answer_judge(r, c, policy, same ? &c->answer : &own, same ? session : free_session, said, error);
done:
    quarry_session_close(free_session);
    quarry_session_close(session);
    token_list_free(&own);
    return code;
}

/* One more array in needles, of what every policy said. */
static quarry_code needle_ask_all(needle_run *r, needle_case *c, json_t *needles, quarry_error *error)
{
    quarry_code code;
    json_t *policies = json_array();
    if (json_array_append_new(needles, policies)) return error_memory(error, "journal record", 0);
    for (int policy = 0; policy < r->n_policies; policy++) {
        needle_said said;
        if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) return code;
        if ((code = needle_ask(r, c, policy, &said, error)) != QUARRY_OK) return code;
        if (json_array_append_new(policies, needle_said_json(&said))) return error_memory(error, "journal record", 0);
    }
    return QUARRY_OK;
}

/* How many haystacks one depth and text have. */
static int haystacks_of(const needle_params *p)
{
    return p->positions > 0 ? p->count * (p->positions / p->needles) : p->count;
}

/* Position of needle i of haystack `index`: those of one haystack lie as far apart as they can, and each position has its turn. */
static int position_of(const needle_params *p, int index, int i)
{
    const int turns = p->positions / p->needles;
    return i * turns + index % turns;
}

/* A haystack as it is read: tokens[n_tokens] with all needles in it, `before` being the template's. */
typedef struct haystack {
    needle needles[NEEDLE_MAX];
    token_list before;
    int32_t *tokens;
    int64_t n_tokens;
} haystack;

static quarry_code haystack_make(needle_run *r, haystack *h, int text_index, int index, quarry_error *error)
{
    const needle_params *p = r->params;
    token_list question = {0};
    needle_draw(h->needles, p->needles, &r->random);
    for (int i = 0; i < p->needles && p->positions > 0; i++) h->needles[i].depth = (position_of(p, index, i) + 0.5) / p->positions;
    quarry_code code = question_encode(r->model, &h->needles[0], &h->before, &question, error);
    if (code == QUARRY_OK)
        code = haystack_draw(&r->source, text_index, h->needles, p->needles, &h->before, &r->random, h->tokens, h->n_tokens, error);
    token_list_free(&question);
    return code;
}

/* Reads a haystack once and asks for every needle under every policy: arrays in needles. */
static quarry_code haystack_measure(needle_run *r, const haystack *h, int text_index, json_t *needles, quarry_error *error)
{
    token_list before = {0}, question = {0};
    eval_sessions sessions;
    needle_case c = {.text_name = r->params->texts[text_index].name,
                     .n_tokens = h->n_tokens,
                     .read = &sessions,
                     .first = h->before.n,
                     .question = &question};
    quarry_code code =
        eval_sessions_read(&sessions, r->model, &r->params->way, r->specs, r->n_policies, h->tokens, h->n_tokens, &r->watch, error);
    for (int i = 0; i < r->params->needles && code == QUARRY_OK; i++) {
        c.needle = &h->needles[i];
        if ((code = question_encode(r->model, c.needle, &before, &question, error)) != QUARRY_OK) break;
        code = needle_ask_all(r, &c, needles, error);
    }
    eval_sessions_free(&sessions);
    token_list_free(&c.answer);
    token_list_free(&before);
    token_list_free(&question);
    return code;
}

static const json_t *haystack_find(const needle_run *r, int depth, int text_index, int index, char key[48])
{
    snprintf(key, 48, "haystack %d %d %d", depth, text_index, index);
    return journal_find(r->params->journal, key);
}

static quarry_code haystack_add(needle_run *r, int depth, int index, const json_t *needles, quarry_error *error)
{
    const needle_params *p = r->params;
    quarry_code code = QUARRY_OK;
    if (json_array_size(needles) != (size_t)p->needles)
        return error_set(error, QUARRY_ERROR_FORMAT, "a record of the journal is not one of eval needle; remove the journal");
    for (int i = 0; i < p->needles && code == QUARRY_OK; i++) {
        needle_cell *cells = r->cells ? r->cells + (int64_t)depth * p->positions + position_of(p, index, i) : NULL;
        code = needle_tally_add(r->tallies, r->n_policies, json_array_get(needles, (size_t)i), cells, (int64_t)p->n_depths * p->positions,
                                error);
    }
    return code;
}

/* The index-th haystack of one depth and text, from the journal or measured. It is drawn in either case, for those after it depend on what was drawn before. */
static quarry_code haystack_run(needle_run *r, int depth, int text_index, int index, quarry_error *error)
{
    haystack h = {.n_tokens = r->params->depths[depth]};
    char key[48];
    const json_t *kept = haystack_find(r, depth, text_index, index, key);
    json_t *needles = kept ? json_incref(json_object_get(kept, "needles")) : json_array();
    quarry_code code = needles || kept ? QUARRY_OK : error_memory(error, "journal record", 0);
    if (code == QUARRY_OK && !(h.tokens = memory_alloc((size_t)h.n_tokens, sizeof *h.tokens, "haystack", error)))
        code = QUARRY_ERROR_MEMORY;
    if (code == QUARRY_OK) code = haystack_make(r, &h, text_index, index, error);
    if (code == QUARRY_OK && !kept) code = haystack_measure(r, &h, text_index, needles, error);
    if (code == QUARRY_OK && !kept) code = journal_add(r->params->journal, key, json_pack("{s:O}", "needles", needles), error);
    if (code == QUARRY_OK) code = haystack_add(r, depth, index, needles, error);
    token_list_free(&h.before);
    memory_free(h.tokens);
    json_decref(needles);
    return code;
}

static quarry_code needle_check(const quarry_model *model, const needle_params *p, quarry_error *error)
{
    if (p->n_texts < 1 || p->n_depths < 1 || p->count < 1 || p->n_answer < 1)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "texts, depths, count and answer tokens must be at least 1");
    if (p->needles < 1 || p->needles > NEEDLE_MAX)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "--needles: %d, should be 1 to %d", p->needles, NEEDLE_MAX);
    if (p->positions < 0 || p->positions > NEEDLE_POSITIONS || p->positions % p->needles != 0)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "--positions: %d, should be a multiple of the %d needles, and at most %d",
                         p->positions, p->needles, NEEDLE_POSITIONS);
    for (int i = 0; i < p->n_depths; i++) { /* a question has about 30 tokens */
        const quarry_code code =
            eval_check_way(model, &p->way, p->depths[i] + QUESTION_TOKENS + p->n_answer, "haystack, question and answer", error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

static quarry_code needle_alloc(needle_run *r, quarry_error *error)
{
    const needle_params *p = r->params;
    const size_t n_vocab = (size_t)r->n_vocab;
    if (!(r->specs = eval_policies(p->way.reference, p->attn, p->n_attn, error))) return QUARRY_ERROR_MEMORY;
    if (!(r->tallies = memory_zero((size_t)r->n_policies, sizeof *r->tallies, "tallies", error))) return QUARRY_ERROR_MEMORY;
    const quarry_code code = haystack_source_open(&r->source, r->model, p->texts, p->n_texts, error);
    if (code != QUARRY_OK) return code;
    if (!(r->reference = memory_alloc((size_t)p->n_answer, n_vocab * sizeof *r->reference, "reference logits", error)))
        return QUARRY_ERROR_MEMORY;
    if (!(r->log_p = memory_alloc(n_vocab, sizeof *r->log_p, "probabilities", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->log_q = memory_alloc(n_vocab, sizeof *r->log_q, "probabilities", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->kld = memory_alloc((size_t)p->n_answer, sizeof *r->kld, "divergences", error))) return QUARRY_ERROR_MEMORY;
    return QUARRY_OK;
}

static void needle_free(needle_run *r)
{
    for (int i = 0; r->tallies && i < r->n_policies; i++) series_free(&r->tallies[i].kld);
    memory_free(r->specs);
    memory_free(r->tallies);
    haystack_source_close(&r->source);
    memory_free(r->reference);
    memory_free(r->log_p);
    memory_free(r->log_q);
    memory_free(r->kld);
}

static void cells_clear(needle_run *r)
{
    const needle_params *p = r->params;
    needle_cell *cell = r->cells;
    for (int policy = 0; policy < r->n_policies; policy++)
        for (int d = 0; d < p->n_depths; d++)
            for (int i = 0; i < p->positions; i++) *cell++ = (needle_cell){p->depths[d], (i + 0.5) / p->positions, 0, 0};
}

quarry_code needle_measure(quarry_model *model, const needle_params *params, const quarry_watch *watch, needle_answer_fn on_answer,
                           void *data, needle_result *results, needle_cell *cells, quarry_error *error)
{
    needle_run r = {.model = model,
                    .params = params,
                    .n_policies = params->n_attn + 1,
                    .n_vocab = model_shape_of(model)->n_vocab,
                    .watch = {.outer = watch},
                    .cells = params->positions > 0 ? cells : NULL,
                    .on_answer = on_answer,
                    .data = data};
    char key[48];
    quarry_code code = needle_check(model, params, error);
    if (code != QUARRY_OK) return code;
    random_seed(&r.random, params->seed);
    for (int d = 0; d < params->n_depths; d++)
        for (int t = 0; t < params->n_texts; t++)
            for (int i = 0; i < haystacks_of(params); i++)
                if (!haystack_find(&r, d, t, i, key)) r.watch.total += params->depths[d] * eval_readings(&params->way, r.n_policies);
    if ((code = needle_alloc(&r, error)) != QUARRY_OK) goto done;
    if (r.cells) cells_clear(&r);
    for (int d = 0; d < params->n_depths; d++)
        for (int t = 0; t < params->n_texts; t++)
            for (int i = 0; i < haystacks_of(params); i++)
                if ((code = haystack_run(&r, d, t, i, error)) != QUARRY_OK) goto done;
    for (int i = 0; i < r.n_policies; i++) {
        results[i] = (needle_result){.attn = r.specs[i]};
        needle_tally_finish(&r.tallies[i], &r.tallies[0], model, &results[i]);
    }
done:
    needle_free(&r);
    return code;
}
