#include "eval/kld.h"

#include <stdio.h>
#include <string.h>

enum { ANSWER_STEPS = 16, NEEDLE_COST = 64 }; /* most steps of a number; what a question counts in the progress, in tokens */

typedef struct kld_run {
    quarry_model *model;
    const kld_params *params;
    const char **specs; /* [n_policies], "full" first */
    int n_policies;
    int64_t n_vocab;
    kld_tally *tallies[KLD_TASKS]; /* [n_policies] */
    haystack_source source;        /* needle */
    int32_t *document;             /* [depth] */
    int32_t bos;
    int n_bos;                 /* 1 if the model wants its BOS in front, else 0 */
    int64_t capacity;          /* steps of a sample, at most */
    quarry_session **sessions; /* [n_policies] forks that follow one path together */
    int32_t *row;              /* [n_policies] the token that all are fed */
    double *log_p;             /* [n_vocab], and so log_q */
    double *log_q;
    kld_steps *steps; /* [n_policies], arrays of `values` */
    double *values;   /* [n_policies][2][capacity] */
    audit *audits;    /* [n_policies] */
    eval_watch watch;
} kld_run;

/* Tokens to follow after a document: prefix[n_prefix] in one piece, then tokens[0 … n-1] one by one, after which tokens[1 … n] are right. */
typedef struct kld_path {
    const int32_t *prefix;
    int64_t n_prefix;
    const int32_t *tokens;
    int64_t n;
} kld_path;

/* ---- all policies along one path, step by step together: the weights are read once for all ---- */

/* What each policy makes of step i, after which target follows. */
static void kld_step(kld_run *r, int64_t i, int32_t target)
{
    const float *reference = quarry_session_logits(r->sessions[0]);
    const int32_t reference_likeliest = metric_argmax(reference, r->n_vocab);
    metric_log_softmax(reference, r->n_vocab, r->log_p);
    for (int p = 0; p < r->n_policies; p++) {
        const float *logits = quarry_session_logits(r->sessions[p]);
        const int32_t likeliest = metric_argmax(logits, r->n_vocab);
        kld_steps *steps = &r->steps[p];
        if (p > 0) metric_log_softmax(logits, r->n_vocab, r->log_q);
        steps->kld[i] = p > 0 ? metric_kld(r->log_p, r->log_q, r->n_vocab) : 0;
        steps->nll[i] = -(p > 0 ? r->log_q : r->log_p)[target];
        steps->agreed += likeliest == reference_likeliest;
        steps->correct = steps->correct && likeliest == target;
    }
}

/* Forks that were fed the path's prefix, and empty steps. */
static quarry_code kld_begin(kld_run *r, const eval_sessions *read, const kld_path *path, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int p = 0; p < r->n_policies && code == QUARRY_OK; p++) {
        double *values = r->values + 2 * p * r->capacity;
        quarry_session *session = r->sessions[p] = eval_sessions_fork(read, p, error);
        if (!session) return eval_failed(error);
        if (path->n_prefix > 0) code = (quarry_code)quarry_session_feed(session, path->prefix, path->n_prefix, NULL, error);
        r->steps[p] = (kld_steps){.n = path->n, .kld = values, .nll = values + r->capacity, .correct = true, .cost = session_cost(session)};
        if (!r->params->audit || p == 0) continue;
        audit_clear(&r->audits[p]);
        session_set_observer(session, &r->audits[p].observer);
    }
    return code;
}

/* One more array in samples, of what every policy did. */
static quarry_code kld_end(kld_run *r, json_t *samples, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    json_t *policies = json_array();
    if (json_array_append_new(samples, policies)) return error_memory(error, "journal record", 0);
    for (int p = 0; p < r->n_policies; p++) {
        kld_steps *steps = &r->steps[p];
        const attn_cost after = session_cost(r->sessions[p]), before = steps->cost;
        steps->cost = (attn_cost){.index_bytes = after.index_bytes - before.index_bytes,
                                  .table_bytes = after.table_bytes - before.table_bytes,
                                  .tail_bytes = after.tail_bytes - before.tail_bytes,
                                  .rows = after.rows - before.rows};
        if (r->params->audit && p > 0 && (code = audit_total(&r->audits[p], &steps->audit, error)) != QUARRY_OK) return code;
        if (json_array_append_new(policies, kld_steps_json(steps))) return error_memory(error, "journal record", 0);
    }
    return QUARRY_OK;
}

/* One step of all; together where they were read together. */
static quarry_code kld_feed(kld_run *r, const eval_sessions *read, int32_t token, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int p = 0; p < r->n_policies; p++) r->row[p] = token;
    if (!read->apart) return (quarry_code)quarry_sessions_feed(r->sessions, r->row, r->n_policies, error);
    for (int p = 0; p < r->n_policies && code == QUARRY_OK; p++)
        code = (quarry_code)quarry_session_feed(r->sessions[p], &token, 1, NULL, error);
    return code;
}

/* progress: what the path counts under one policy. */
static quarry_code kld_follow(kld_run *r, const eval_sessions *read, const kld_path *path, int64_t progress, json_t *samples,
                              quarry_error *error)
{
    const int64_t done = r->watch.done;
    quarry_code code = kld_begin(r, read, path, error);
    for (int64_t i = 0; i < path->n && code == QUARRY_OK; i++) {
        if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) break;
        if ((code = kld_feed(r, read, path->tokens[i], error)) != QUARRY_OK) break;
        kld_step(r, i, path->tokens[i + 1]);
        r->watch.done = done + progress * r->n_policies * (i + 1) / path->n;
    }
    if (code == QUARRY_OK) code = kld_end(r, samples, error);
    for (int p = 0; p < r->n_policies; p++) {
        quarry_session_close(r->sessions[p]);
        r->sessions[p] = NULL;
    }
    return code;
}

static quarry_code kld_read(kld_run *r, eval_sessions *sessions, quarry_error *error)
{
    return eval_sessions_read(sessions, r->model, &r->params->way, r->specs, r->n_policies, r->document, r->params->depth, &r->watch,
                              error);
}

/* ---- a document and all that is asked after it ---- */

/* Where sample i begins: one window after the other, or from each text in turn, spread evenly over it. */
static const int32_t *sample_tokens(const kld_params *p, int i)
{
    const int64_t window = p->depth + p->n_steps + 1;
    int64_t at = i;
    for (int t = 0; p->consecutive && t < p->n_texts; at -= p->texts[t++].n_tokens / window)
        if (at < p->texts[t].n_tokens / window) return p->texts[t].tokens + at * window;
    const eval_text *text = &p->texts[i % p->n_texts];
    const int64_t spare = text->n_tokens - window, in_text = i / p->n_texts;
    const int64_t of_text = (p->samples - 1 - i % p->n_texts) / p->n_texts + 1;
    return text->tokens + (of_text > 1 ? spare * in_text / (of_text - 1) : 0);
}

/* samples[] of the record receives what every policy did. */
static quarry_code prose_sample(kld_run *r, int i, json_t *samples, quarry_error *error)
{
    const kld_params *p = r->params;
    const int32_t *tokens = sample_tokens(p, i);
    const kld_path path = {.tokens = tokens + p->depth, .n = p->n_steps};
    memcpy(r->document, tokens, (size_t)p->depth * sizeof *tokens);
    if (r->n_bos) r->document[0] = r->bos; /* in the place of the first token, so that the depth is as stated */
    eval_sessions sessions;
    quarry_code code = kld_read(r, &sessions, error);
    if (code == QUARRY_OK) code = kld_follow(r, &sessions, &path, p->n_steps, samples, error);
    eval_sessions_free(&sessions);
    return code;
}

/* The question about one needle and the right answer to it, whose digits are the steps. */
static quarry_code needle_ask(kld_run *r, const eval_sessions *read, const needle *s, json_t *samples, quarry_error *error)
{
    token_list before = {0}, fed = {0}, answer = {0};
    int64_t first_digit = 0;
    quarry_code code = question_encode(r->model, s, &before, &fed, error);
    if (code == QUARRY_OK) code = answer_encode(r->model, s, &answer, &first_digit, error);
    for (int64_t i = 0; code == QUARRY_OK && i < answer.n; i++) code = token_list_push(&fed, answer.ids[i], error);
    if (code != QUARRY_OK) goto done;
    const int64_t n = answer.n - first_digit; /* the token in front of the first digit is the first that is fed alone */
    if (n > ANSWER_STEPS || first_digit < 1) {
        code = error_set(error, QUARRY_ERROR_UNSUPPORTED, "the tokenizer needs %lld tokens for a number of %d digits", (long long)n,
                         NEEDLE_DIGITS);
        goto done;
    }
    const kld_path path = {.prefix = fed.ids, .n_prefix = fed.n - n - 1, .tokens = fed.ids + fed.n - n - 1, .n = n};
    code = kld_follow(r, read, &path, NEEDLE_COST, samples, error);
done:
    token_list_free(&before);
    token_list_free(&fed);
    token_list_free(&answer);
    return code;
}

static quarry_code needle_sample(kld_run *r, int i, json_t *samples, quarry_error *error)
{
    const kld_params *p = r->params;
    needle needles[NEEDLE_MAX];
    token_list before = {0}, question = {0};
    random_state random;
    eval_sessions sessions = {0};
    random_seed(&random,
                p->seed ^ (UINT64_C(0x9e3779b97f4a7c15) * (uint64_t)(i + 1))); /* apart, so that a haystack does not depend on others */
    needle_draw(needles, p->needles, &random);
    quarry_code code = question_encode(r->model, &needles[0], &before, &question, error);
    if (code == QUARRY_OK)
        code = haystack_draw(&r->source, i % p->n_texts, needles, p->needles, &before, &random, r->document, p->depth, error);
    if (code == QUARRY_OK) code = kld_read(r, &sessions, error);
    for (int s = 0; s < p->needles && code == QUARRY_OK; s++) code = needle_ask(r, &sessions, &needles[s], samples, error);
    eval_sessions_free(&sessions);
    token_list_free(&before);
    token_list_free(&question);
    return code;
}

/* ---- all samples ---- */

static int n_samples(const kld_params *p, kld_task task)
{
    return task == KLD_PROSE ? p->samples : p->haystacks;
}

static int64_t sample_cost(const kld_run *r, kld_task task)
{
    const kld_params *p = r->params;
    return p->depth * eval_readings(&p->way, r->n_policies) +
           r->n_policies * (task == KLD_PROSE ? p->n_steps : (int64_t)p->needles * NEEDLE_COST);
}

static void sample_key(kld_task task, int i, char out[32])
{
    snprintf(out, 32, "%s %d", kld_task_names[task], i);
}

/* One sample from the journal, or measured and written to it; then added to the tallies. */
static quarry_code kld_sample(kld_run *r, kld_task task, int i, quarry_error *error)
{
    char key[32];
    quarry_code code = QUARRY_OK;
    const json_t *policies;
    size_t at;
    sample_key(task, i, key);
    json_t *samples = json_incref(json_object_get(journal_find(r->params->journal, key), "samples"));
    if (!journal_find(r->params->journal, key)) {
        if (!(samples = json_array())) return error_memory(error, "journal record", 0);
        code = (task == KLD_PROSE ? prose_sample : needle_sample)(r, i, samples, error);
        if (code == QUARRY_OK) code = journal_add(r->params->journal, key, json_pack("{s:O}", "samples", samples), error);
    }
    if (code == QUARRY_OK && json_array_size(samples) != (size_t)(task == KLD_PROSE ? 1 : r->params->needles))
        code = error_set(error, QUARRY_ERROR_FORMAT, "the journal's record '%s' is not one of this measurement; remove the journal", key);
    json_array_foreach(samples, at, policies) if (code == QUARRY_OK) code = kld_tally_add(r->tallies[task], r->n_policies, policies, error);
    json_decref(samples);
    return code;
}

static quarry_code kld_check(const quarry_model *model, const kld_params *p, quarry_error *error)
{
    if (p->depth < 1 || p->n_steps < (p->samples > 0) || p->samples < 0 || p->haystacks < 0 || p->samples + p->haystacks < 1 ||
        p->n_texts < 1)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "depth, steps, samples and texts must be at least 1");
    if (p->haystacks > 0 && (p->needles < 1 || p->needles > NEEDLE_MAX))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "--needles: %d, should be 1 to %d", p->needles, NEEDLE_MAX);
    for (int i = 0; i < p->n_texts && p->samples > 0; i++)
        if (p->texts[i].n_tokens < p->depth + p->n_steps + 1)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has %lld tokens, but a depth of %lld and %lld steps need %lld",
                             p->texts[i].name, (long long)p->texts[i].n_tokens, (long long)p->depth, (long long)p->n_steps,
                             (long long)(p->depth + p->n_steps + 1));
    const quarry_code code = eval_check_way(model, &p->way, p->depth + (p->samples > 0 ? p->n_steps : 0), "depth and steps", error);
    if (code != QUARRY_OK || p->haystacks == 0) return code;
    return eval_check_way(model, &p->way, p->depth + NEEDLE_COST, "haystack and question", error);
}

static quarry_code kld_alloc(kld_run *r, quarry_error *error)
{
    const kld_params *p = r->params;
    const size_t n_vocab = (size_t)r->n_vocab, n_policies = (size_t)r->n_policies;
    quarry_code code;
    r->capacity = p->haystacks > 0 && p->n_steps < ANSWER_STEPS ? ANSWER_STEPS : p->n_steps;
    if (!(r->specs = eval_policies(p->way.reference, p->attn, p->n_attn, error))) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < KLD_TASKS; i++)
        if (!(r->tallies[i] = memory_zero(n_policies, sizeof **r->tallies, "tallies", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->document = memory_alloc((size_t)p->depth, sizeof *r->document, "document", error)) ||
        !(r->sessions = memory_zero(n_policies, sizeof *r->sessions, "sessions", error)) ||
        !(r->row = memory_alloc(n_policies, sizeof *r->row, "tokens", error)) ||
        !(r->log_p = memory_alloc(2 * n_vocab, sizeof *r->log_p, "probabilities", error)) ||
        !(r->steps = memory_zero(n_policies, sizeof *r->steps, "steps", error)) ||
        !(r->values = memory_alloc(2 * n_policies, (size_t)r->capacity * sizeof *r->values, "steps", error)) ||
        !(r->audits = memory_zero(n_policies, sizeof *r->audits, "audit", error)))
        return QUARRY_ERROR_MEMORY;
    r->log_q = r->log_p + n_vocab;
    for (int i = 1; i < r->n_policies && p->audit; i++)
        if ((code = audit_open(&r->audits[i], r->model, error)) != QUARRY_OK) return code;
    if (p->haystacks > 0 && (code = haystack_source_open(&r->source, r->model, p->texts, p->n_texts, error)) != QUARRY_OK) return code;
    return eval_bos(r->model, &r->bos, &r->n_bos, error);
}

static void kld_free(kld_run *r)
{
    for (int task = 0; task < KLD_TASKS; task++) {
        for (int i = 0; r->tallies[task] && i < r->n_policies; i++) kld_tally_free(&r->tallies[task][i]);
        memory_free(r->tallies[task]);
    }
    haystack_source_close(&r->source);
    for (int i = 0; r->audits && i < r->n_policies; i++) audit_close(&r->audits[i]);
    memory_free(r->audits);
    memory_free(r->specs);
    memory_free(r->document);
    memory_free(r->sessions);
    memory_free(r->row);
    memory_free(r->log_p);
    memory_free(r->steps);
    memory_free(r->values);
}

int kld_n_results(const kld_params *p)
{
    return ((p->samples > 0) + (p->haystacks > 0)) * (1 + p->n_attn);
}

quarry_code kld_measure(quarry_model *model, const kld_params *params, const quarry_watch *watch, kld_result *results, quarry_error *error)
{
    kld_run r = {.model = model,
                 .params = params,
                 .n_policies = params->n_attn + 1,
                 .n_vocab = model_shape_of(model)->n_vocab,
                 .watch = {.outer = watch}};
    quarry_code code = kld_check(model, params, error);
    if (code != QUARRY_OK) return code;
    if ((code = kld_alloc(&r, error)) != QUARRY_OK) goto done;
    for (kld_task task = 0; task < KLD_TASKS; task++)
        for (int i = 0; i < n_samples(params, task); i++) {
            char key[32];
            sample_key(task, i, key);
            if (!journal_find(params->journal, key)) r.watch.total += sample_cost(&r, task);
        }
    for (kld_task task = 0; task < KLD_TASKS; task++)
        for (int i = 0; i < n_samples(params, task); i++)
            if ((code = kld_sample(&r, task, i, error)) != QUARRY_OK) goto done;
    for (kld_task task = 0; task < KLD_TASKS; task++)
        for (int i = 0; i < r.n_policies && n_samples(params, task) > 0; i++) {
            *results = (kld_result){.attn = r.specs[i], .task = task};
            kld_tally_finish(&r.tallies[task][i], &r.tallies[task][0], model, results);
            results++;
        }
done:
    kld_free(&r);
    return code;
}
