#include "eval/common.h"

#include <math.h>
#include <time.h>

enum { WARM_READ = 512 }; /* tokens of the first, untimed run of SPEED_READ: a whole one would double the time and warm no more */

const char *const speed_kind_names[SPEED_KINDS] = {"pp", "tg", "read", "ttft"};

typedef struct speed_run {
    quarry_model *model;
    const speed_params *params;
    int n_sequences;
    int64_t n_ctx;          /* depth + longest test after it, or the longest document */
    int32_t *tokens;        /* [n_sequences][n_ctx] */
    quarry_session **read;  /* [n_sequences], the depth, indexed by every policy; NULL when all tests begin at nothing */
    quarry_session **forks; /* [n_sequences], of the run in progress */
    int32_t *step;          /* [n_sequences] */
    double *seconds;        /* [n_attn][repetitions] */
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

double speed_rate(const speed_test *test, double seconds)
{
    return (double)test->n * test->n_parallel / seconds;
}

/* ---- one run of a test on forks[n_parallel] ---- */

/* The i-th token after the depth, in every sequence. */
static quarry_code feed_step(const speed_run *r, int n_parallel, int64_t i, quarry_error *error)
{
    for (int s = 0; s < n_parallel; s++) r->step[s] = r->tokens[s * r->n_ctx + r->params->depth + i];
    if (n_parallel == 1) return (quarry_code)quarry_session_feed(r->forks[0], r->step, 1, NULL, error);
    return (quarry_code)quarry_sessions_feed(r->forks, r->step, n_parallel, error);
}

static quarry_code run_prompt(const speed_run *r, const speed_test *t, quarry_error *error)
{
    return (quarry_code)quarry_session_read(r->forks[0], r->tokens + r->params->depth, t->n, NULL, error);
}

static quarry_code run_gen(const speed_run *r, const speed_test *t, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; i < t->n && code == QUARRY_OK; i++) code = feed_step(r, t->n_parallel, i, error);
    return code;
}

static quarry_code run_read(const speed_run *r, const speed_test *t, quarry_error *error)
{
    return (quarry_code)quarry_session_read(r->forks[0], r->tokens, t->n, NULL, error);
}

static quarry_code run_ask(const speed_run *r, const speed_test *t, quarry_error *error)
{
    const quarry_code code = (quarry_code)quarry_session_feed(r->forks[0], r->tokens + r->params->depth, t->n, NULL, error);
    if (code == QUARRY_OK) r->step[0] = metric_argmax(quarry_session_logits(r->forks[0]), model_shape_of(r->model)->n_vocab);
    return code;
}

static const struct {
    quarry_code (*run)(const speed_run *r, const speed_test *t, quarry_error *error);
    bool from_nothing; /* on an empty session instead of a fork of the depth */
    bool owns_pages;   /* a token is fed before, and taken back: it makes the pages shared with the other forks the session's own */
} kinds[SPEED_KINDS] = {
    [SPEED_PROMPT] = {run_prompt, false, false},
    [SPEED_GEN] = {run_gen, false, true},
    [SPEED_READ] = {run_read, true, false},
    [SPEED_ASK] = {run_ask, false, true},
};

static quarry_session *session_open_one(const speed_run *r, const char *const *attn, int n_attn, quarry_error *error)
{
    const quarry_session_params params = {
        .n_ctx = r->n_ctx, .n_batch = r->params->n_batch, .read_window = r->params->read_window, .extend = r->params->extend};
    quarry_session *session = session_open_policies(r->model, &params, attn, n_attn, error);
    if (session) session_allow_beyond_training(session);
    return session;
}

static quarry_code forks_open(const speed_run *r, const speed_test *t, int policy, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int s = 0; s < t->n_parallel; s++) {
        r->forks[s] = kinds[t->kind].from_nothing ? session_open_one(r, r->params->attn + policy, 1, error)
                                                  : session_fork_policy(r->read[s], policy, error);
        if (!r->forks[s]) return eval_failed(error);
    }
    if (!kinds[t->kind].owns_pages) return QUARRY_OK;
    code = feed_step(r, t->n_parallel, 0, error);
    for (int s = 0; s < t->n_parallel && code == QUARRY_OK; s++)
        code = (quarry_code)quarry_session_truncate(r->forks[s], r->params->depth, error);
    return code;
}

static quarry_code speed_once(const speed_run *r, const speed_test *t, int policy, double *seconds, quarry_error *error)
{
    quarry_code code = forks_open(r, t, policy, error);
    if (code == QUARRY_OK) {
        const double start = seconds_now();
        code = kinds[t->kind].run(r, t, error);
        *seconds = seconds_now() - start;
    }
    for (int s = 0; s < t->n_parallel; s++) {
        quarry_session_close(r->forks[s]);
        r->forks[s] = NULL;
    }
    return code;
}

/* ---- a test: its runs and their summary ---- */

/* A rate is that of each run, so its mean is not n over the mean of the seconds. */
static void summarise(const speed_run *r, speed_result *s, bool rate, double *mean, double *sd)
{
    const int n = r->params->repetitions;
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += rate ? speed_rate(&s->test, s->seconds[i]) : s->seconds[i];
    *mean = sum / n;
    for (int i = 0; i < n; i++) {
        const double away = (rate ? speed_rate(&s->test, s->seconds[i]) : s->seconds[i]) - *mean;
        squares += away * away;
    }
    *sd = n > 1 ? sqrt(squares / (n - 1)) : 0;
}

static void speed_report(const speed_run *r, const speed_test *t, int policy)
{
    const int n = r->params->repetitions;
    speed_result s = {.attn = r->params->attn[policy],
                      .test = *t,
                      .n_depth = kinds[t->kind].from_nothing ? 0 : r->params->depth,
                      .seconds = r->seconds + (size_t)policy * (size_t)n,
                      .n_samples = n};
    summarise(r, &s, false, &s.seconds_mean, &s.seconds_sd);
    summarise(r, &s, true, &s.rate_mean, &s.rate_sd);
    r->on_result(&s, r->data);
}

/* The first run of each, as a rule slower, does not count. */
static quarry_code warm_up(const speed_run *r, const speed_test *t, int policy, quarry_error *error)
{
    speed_test warm = *t;
    double seconds;
    if (t->kind == SPEED_GEN) warm.n = 1;
    if (t->kind == SPEED_READ && t->n > WARM_READ) warm.n = WARM_READ;
    return speed_once(r, &warm, policy, &seconds, error);
}

static quarry_code speed_run_test(speed_run *r, const speed_test *t, quarry_error *error)
{
    const speed_params *p = r->params;
    quarry_code code;
    for (int policy = 0; policy < p->n_attn; policy++)
        if ((code = warm_up(r, t, policy, error)) != QUARRY_OK) return code;
    for (int i = 0; i < p->repetitions; i++)
        for (int policy = 0; policy < p->n_attn; policy++) {
            double *seconds = r->seconds + (size_t)policy * (size_t)p->repetitions + (size_t)i;
            if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) return code;
            if ((code = speed_once(r, t, policy, seconds, error)) != QUARRY_OK) return code;
        }
    for (int policy = 0; policy < p->n_attn; policy++) speed_report(r, t, policy);
    return QUARRY_OK;
}

/* ---- what all tests share ---- */

/* Special tokens are not drawn: some models treat them unlike text. Sequences that read a given text begin at different places of it. */
static void tokens_fill(const speed_run *r)
{
    const speed_params *p = r->params;
    const tokenizer *t = model_tokenizer(r->model);
    random_state random;
    random_seed(&random, 1);
    for (int64_t i = 0; i < r->n_sequences * r->n_ctx; i++) {
        if (p->tokens && p->n_tokens > 0) {
            r->tokens[i] = p->tokens[i % p->n_tokens];
            continue;
        }
        do r->tokens[i] = (int32_t)random_below(&random, (uint64_t)model_shape_of(r->model)->n_vocab);
        while (tokenizer_is_special(t, r->tokens[i]));
    }
}

static quarry_code params_check(const speed_params *p, quarry_error *error)
{
    if (p->n_attn < 1 || p->repetitions < 1 || p->depth < 0)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "policies and repetitions must be at least 1, the depth at least 0");
    for (int i = 0; i < p->n_tests; i++)
        if (p->tests[i].n < 1 || p->tests[i].n_parallel < 1 || (p->tests[i].n_parallel > 1 && p->tests[i].kind != SPEED_GEN))
            return error_set(error, QUARRY_ERROR_ARGUMENT, "test %d: tokens must be at least 1, and only decoding takes several sequences",
                             i);
    return QUARRY_OK;
}

/* Sets n_ctx and n_sequences; returns whether any test needs the depth. */
static bool params_measure(speed_run *r)
{
    bool deep = false;
    r->n_sequences = 1;
    for (int i = 0; i < r->params->n_tests; i++) {
        const speed_test *t = r->params->tests + i;
        const int64_t n_ctx = t->n + (kinds[t->kind].from_nothing ? 0 : r->params->depth);
        if (n_ctx > r->n_ctx) r->n_ctx = n_ctx;
        if (t->n_parallel > r->n_sequences) r->n_sequences = t->n_parallel;
        deep |= !kinds[t->kind].from_nothing;
    }
    return deep;
}

static quarry_code run_alloc(speed_run *r, quarry_error *error)
{
    const speed_params *p = r->params;
    const size_t n = (size_t)r->n_sequences;
    if (r->n_ctx > INT32_MAX) /* the session's own limit, asked here because the products below rely on it */
        return error_set(error, QUARRY_ERROR_CONTEXT, "%lld tokens are more than a session holds", (long long)r->n_ctx);
    r->tokens = memory_alloc(n * (size_t)r->n_ctx, sizeof *r->tokens, "tokens", error);
    r->read = r->tokens ? memory_zero(n, sizeof *r->read, "sessions", error) : NULL;
    r->forks = r->read ? memory_zero(n, sizeof *r->forks, "sessions", error) : NULL;
    r->step = r->forks ? memory_alloc(n, sizeof *r->step, "tokens", error) : NULL;
    r->seconds = r->step ? memory_alloc((size_t)p->n_attn * (size_t)p->repetitions, sizeof *r->seconds, "samples", error) : NULL;
    return r->seconds ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

static quarry_code depth_fill(speed_run *r, quarry_error *error)
{
    const speed_params *p = r->params;
    quarry_code code = QUARRY_OK;
    for (int s = 0; s < r->n_sequences && code == QUARRY_OK; s++) {
        if (!(r->read[s] = session_open_one(r, p->attn, p->n_attn, error))) return eval_failed(error);
        /* all that follow are as long as the first: they fit together or none is read */
        if (s == 0) code = session_memory_check(r->read[0], p->depth * r->n_sequences, error);
        if (p->depth > 0 && code == QUARRY_OK) code = eval_read(r->read[s], r->tokens + s * r->n_ctx, p->depth, &r->watch, error);
    }
    return code;
}

quarry_code speed_measure(quarry_model *model, const speed_params *params, const quarry_watch *watch, speed_result_fn on_result, void *data,
                          quarry_error *error)
{
    speed_run r = {.model = model, .params = params, .on_result = on_result, .data = data};
    quarry_code code = params_check(params, error);
    if (code != QUARRY_OK || params->n_tests == 0) return code;
    const bool deep = params_measure(&r);
    r.watch = (eval_watch){watch, 0, deep ? params->depth * r.n_sequences : 0};
    if ((code = run_alloc(&r, error)) != QUARRY_OK) goto done;
    tokens_fill(&r);
    if (deep) code = depth_fill(&r, error);
    for (int i = 0; i < params->n_tests && code == QUARRY_OK; i++) code = speed_run_test(&r, params->tests + i, error);
done:
    for (int s = 0; s < r.n_sequences && r.read; s++) quarry_session_close(r.read[s]);
    memory_free(r.seconds);
    memory_free(r.step);
    memory_free(r.forks);
    memory_free(r.read);
    memory_free(r.tokens);
    return code;
}
