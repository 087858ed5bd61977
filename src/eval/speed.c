#include "eval/common.h"

#include <math.h>
#include <time.h>

typedef struct speed_run {
    quarry_model *model;
    const speed_params *params;
    quarry_session *read; /* the depth, indexed by every policy */
    int32_t *tokens;      /* [depth + longest test] */
    double *samples;      /* [n_attn][repetitions] tokens per second */
    eval_watch watch;
    speed_result_fn on_result;
    void *data;
} speed_run;

static double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One test on a fork: n tokens read at once or decoded one by one. The first decoded token is not timed: it makes the pages shared with
 * the other forks the session's own. */
static quarry_code speed_once(const speed_run *r, int policy, int64_t n, bool decode, double *tokens_per_second, quarry_error *error)
{
    const int64_t depth = r->params->depth;
    const int32_t *tokens = r->tokens + depth;
    quarry_code code = QUARRY_OK;
    quarry_session *session = session_fork_policy(r->read, policy, error);
    if (!session) return eval_failed(error);
    if (decode) {
        if ((code = (quarry_code)quarry_session_feed(session, tokens, 1, NULL, error)) != QUARRY_OK) goto done;
        if ((code = (quarry_code)quarry_session_truncate(session, depth, error)) != QUARRY_OK) goto done;
    }
    const double start = seconds_now();
    if (!decode) {
        code = (quarry_code)quarry_session_read(session, tokens, n, NULL, error);
    } else {
        for (int64_t i = 0; i < n && code == QUARRY_OK; i++) code = (quarry_code)quarry_session_feed(session, tokens + i, 1, NULL, error);
    }
    *tokens_per_second = (double)n / (seconds_now() - start);
done:
    quarry_session_close(session);
    return code;
}

static void speed_report(const speed_run *r, int policy, int64_t n, bool decode)
{
    const int repetitions = r->params->repetitions;
    const double *samples = r->samples + (size_t)policy * (size_t)repetitions;
    double sum = 0, squares = 0;
    for (int i = 0; i < repetitions; i++) sum += samples[i];
    const double mean = sum / repetitions;
    for (int i = 0; i < repetitions; i++) squares += (samples[i] - mean) * (samples[i] - mean);
    const speed_result result = {.attn = r->params->attn[policy],
                                 .n_prompt = decode ? 0 : n,
                                 .n_gen = decode ? n : 0,
                                 .n_depth = r->params->depth,
                                 .samples = samples,
                                 .n_samples = repetitions,
                                 .mean = mean,
                                 .sd = repetitions > 1 ? sqrt(squares / (repetitions - 1)) : 0};
    r->on_result(&result, r->data);
}

static quarry_code speed_test(speed_run *r, int64_t n, bool decode, quarry_error *error)
{
    const speed_params *p = r->params;
    quarry_code code;
    if (n == 0) return QUARRY_OK;
    for (int i = -1; i < p->repetitions; i++) /* -1: the first run of each, as a rule slower, does not count */
        for (int policy = 0; policy < p->n_attn; policy++) {
            double tokens_per_second = 0;
            const int64_t n_now = i < 0 && decode ? 1 : n;
            if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) return code;
            if ((code = speed_once(r, policy, n_now, decode, &tokens_per_second, error)) != QUARRY_OK) return code;
            if (i >= 0) r->samples[(size_t)policy * (size_t)p->repetitions + (size_t)i] = tokens_per_second;
        }
    for (int policy = 0; policy < p->n_attn; policy++) speed_report(r, policy, n, decode);
    return QUARRY_OK;
}

static int64_t numbers_max(const int64_t *numbers, int n)
{
    int64_t max = 0;
    for (int i = 0; i < n; i++) max = numbers[i] > max ? numbers[i] : max;
    return max;
}

/* Special tokens are not drawn: some models treat them unlike text. */
static void tokens_fill(const speed_run *r, int64_t n)
{
    const speed_params *p = r->params;
    const tokenizer *t = model_tokenizer(r->model);
    random_state random;
    random_seed(&random, 1);
    for (int64_t i = 0; i < n; i++) {
        if (p->tokens && p->n_tokens > 0) {
            r->tokens[i] = p->tokens[i % p->n_tokens];
            continue;
        }
        do r->tokens[i] = (int32_t)random_below(&random, (uint64_t)model_shape_of(r->model)->n_vocab);
        while (tokenizer_is_special(t, r->tokens[i]));
    }
}

quarry_code speed_measure(quarry_model *model, const speed_params *params, const quarry_watch *watch, speed_result_fn on_result, void *data,
                          quarry_error *error)
{
    const int64_t most_prompt = numbers_max(params->n_prompt, params->n_prompts), most_gen = numbers_max(params->n_gen, params->n_gens);
    const int64_t n = params->depth + (most_prompt > most_gen ? most_prompt : most_gen);
    const quarry_session_params session_params = {.n_ctx = n, .n_batch = params->n_batch};
    speed_run r = {.model = model, .params = params, .watch = {watch, 0, params->depth}, .on_result = on_result, .data = data};
    quarry_code code = QUARRY_OK;
    if (params->n_attn < 1 || params->repetitions < 1 || params->depth < 0)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "policies and repetitions must be at least 1, the depth at least 0");
    if (n == params->depth) return QUARRY_OK;
    if (!(r.tokens = memory_alloc((size_t)n, sizeof *r.tokens, "tokens", error)) ||
        !(r.samples = memory_alloc((size_t)params->n_attn * (size_t)params->repetitions, sizeof *r.samples, "samples", error)) ||
        !(r.read = session_open_policies(model, &session_params, params->attn, params->n_attn, error))) {
        code = eval_failed(error);
        goto done;
    }
    session_allow_beyond_training(r.read);
    tokens_fill(&r, n);
    if (params->depth > 0 && (code = eval_read(r.read, r.tokens, params->depth, &r.watch, error)) != QUARRY_OK) goto done;
    for (int i = 0; i < params->n_prompts; i++)
        if ((code = speed_test(&r, params->n_prompt[i], false, error)) != QUARRY_OK) goto done;
    for (int i = 0; i < params->n_gens; i++)
        if ((code = speed_test(&r, params->n_gen[i], true, error)) != QUARRY_OK) goto done;
done:
    quarry_session_close(r.read);
    memory_free(r.samples);
    memory_free(r.tokens);
    return code;
}
