#include "eval/common.h"

#include <math.h>

/* What is measured of one policy while its steps go by. */
typedef struct kld_tally {
    series kld;
    reading_sum reading;
    int64_t agreed, steps;
    double log_likelihood;
} kld_tally;

typedef struct kld_run {
    quarry_model *model;
    const kld_params *params;
    const char **specs; /* [n_policies], "full" first */
    int n_policies;
    int64_t n_vocab;
    kld_tally *tallies; /* [n_policies] */
    int32_t *document;  /* [depth] */
    int32_t bos;
    int n_bos;             /* 1 if the model wants its BOS in front, else 0 */
    float *reference;      /* [n_steps][n_vocab] logits of full */
    float *logits;         /* [n_vocab] */
    double *log_p, *log_q; /* [n_vocab] */
    eval_watch watch;
} kld_run;

/* Where sample i of a text begins: the samples of each text lie evenly over it. */
static const int32_t *sample_tokens(const kld_params *p, int i)
{
    const eval_text *text = &p->texts[i % p->n_texts];
    const int64_t spare = text->n_tokens - (p->depth + p->n_steps + 1), in_text = i / p->n_texts;
    const int64_t of_text = (p->samples - 1 - i % p->n_texts) / p->n_texts + 1;
    return text->tokens + (of_text > 1 ? spare * in_text / (of_text - 1) : 0);
}

static quarry_code kld_step(kld_run *r, kld_tally *t, const float *reference, const float *logits, int32_t target, quarry_error *error)
{
    metric_log_softmax(reference, r->n_vocab, r->log_p);
    metric_log_softmax(logits, r->n_vocab, r->log_q);
    t->agreed += metric_argmax(reference, r->n_vocab) == metric_argmax(logits, r->n_vocab);
    t->log_likelihood += r->log_q[target];
    t->steps++;
    return series_push(&t->kld, metric_kld(r->log_p, r->log_q, r->n_vocab), error);
}

/* tokens[n_steps + 1] one by one under one policy; those of full (policy 0) become the reference. */
static quarry_code kld_policy(kld_run *r, const quarry_session *read, int policy, const int32_t *tokens, quarry_error *error)
{
    const int64_t n = r->params->n_steps;
    quarry_code code = QUARRY_OK;
    quarry_session *session = session_fork_policy(read, policy, error);
    if (!session) return eval_failed(error);
    for (int64_t i = 0; i < n; i++) {
        float *reference = r->reference + i * r->n_vocab, *logits = policy == 0 ? reference : r->logits;
        if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) goto done;
        if ((code = session_feed_logits(session, &tokens[i], 1, logits, error)) != QUARRY_OK) goto done;
        if ((code = kld_step(r, &r->tallies[policy], reference, logits, tokens[i + 1], error)) != QUARRY_OK) goto done;
    }
    reading_add(&r->tallies[policy].reading, session, n);
done:
    quarry_session_close(session);
    return code;
}

static quarry_code kld_sample(kld_run *r, int i, quarry_error *error)
{
    const kld_params *p = r->params;
    const int32_t *tokens = sample_tokens(p, i);
    const quarry_session_params session_params = {.n_batch = p->n_batch};
    quarry_session *session = session_open_policies(r->model, &session_params, r->specs, r->n_policies, error);
    if (!session) return eval_failed(error);
    for (int64_t t = 0; t < p->depth; t++) r->document[t] = tokens[t];
    if (r->n_bos) r->document[0] = r->bos; /* in the place of the first token, so that the depth is as stated */
    quarry_code code = eval_read(session, r->document, p->depth, &r->watch, error);
    for (int policy = 0; policy < r->n_policies && code == QUARRY_OK; policy++)
        code = kld_policy(r, session, policy, tokens + p->depth, error);
    quarry_session_close(session);
    return code;
}

static quarry_code kld_check(const quarry_model *model, const kld_params *p, quarry_error *error)
{
    if (p->depth < 1 || p->n_steps < 1 || p->samples < 1 || p->n_texts < 1)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "depth, steps, samples and texts must be at least 1");
    for (int i = 0; i < p->n_texts; i++)
        if (p->texts[i].n_tokens < p->depth + p->n_steps + 1)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has %lld tokens, but a depth of %lld and %lld steps need %lld",
                             p->texts[i].name, (long long)p->texts[i].n_tokens, (long long)p->depth, (long long)p->n_steps,
                             (long long)(p->depth + p->n_steps + 1));
    return eval_check_length(model, p->depth + p->n_steps, "depth and steps", error);
}

static quarry_code kld_alloc(kld_run *r, quarry_error *error)
{
    const size_t n_vocab = (size_t)r->n_vocab;
    size_t n_reference;
    if (!size_multiply((size_t)r->params->n_steps, n_vocab, &n_reference)) return error_memory(error, "reference logits", SIZE_MAX);
    if (!(r->specs = eval_policies(r->params->attn, r->params->n_attn, error))) return QUARRY_ERROR_MEMORY;
    if (!(r->tallies = memory_zero((size_t)r->n_policies, sizeof *r->tallies, "tallies", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->document = memory_alloc((size_t)r->params->depth, sizeof *r->document, "document", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->reference = memory_alloc(n_reference, sizeof *r->reference, "reference logits", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->logits = memory_alloc(n_vocab, sizeof *r->logits, "logits", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->log_p = memory_alloc(n_vocab, sizeof *r->log_p, "probabilities", error))) return QUARRY_ERROR_MEMORY;
    if (!(r->log_q = memory_alloc(n_vocab, sizeof *r->log_q, "probabilities", error))) return QUARRY_ERROR_MEMORY;
    return eval_bos(r->model, &r->bos, &r->n_bos, error);
}

static void kld_free(kld_run *r)
{
    for (int i = 0; r->tallies && i < r->n_policies; i++) series_free(&r->tallies[i].kld);
    memory_free(r->specs);
    memory_free(r->tallies);
    memory_free(r->document);
    memory_free(r->reference);
    memory_free(r->logits);
    memory_free(r->log_p);
    memory_free(r->log_q);
}

quarry_code kld_measure(quarry_model *model, const kld_params *params, const quarry_watch *watch, kld_result *results, quarry_error *error)
{
    kld_run r = {.model = model,
                 .params = params,
                 .n_policies = params->n_attn + 1,
                 .n_vocab = model_shape_of(model)->n_vocab,
                 .watch = {watch, 0, params->samples * params->depth}};
    quarry_code code = kld_check(model, params, error);
    if (code != QUARRY_OK) return code;
    if ((code = kld_alloc(&r, error)) != QUARRY_OK) goto done;
    for (int i = 0; i < params->samples; i++)
        if ((code = kld_sample(&r, i, error)) != QUARRY_OK) goto done;
    for (int i = 0; i < r.n_policies; i++) {
        kld_tally *t = &r.tallies[i];
        results[i] = (kld_result){.attn = i ? params->attn[i - 1] : "full",
                                  .agreement = (double)t->agreed / (double)t->steps,
                                  .perplexity = exp(-t->log_likelihood / (double)t->steps)};
        series_summarise(&t->kld, &results[i].kld);
        reading_relate(&t->reading, &r.tallies[0].reading, model, &results[i].reading);
    }
done:
    kld_free(&r);
    return code;
}
