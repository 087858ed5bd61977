#include "gen/session.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { FARTHEST = 4 };

double session_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- making and closing ---- */

static void link_policies(quarry_session *s)
{
    for (int i = 0; i < s->n_policies; i++) s->policies[i]->also = i + 1 < s->n_policies ? s->policies[i + 1] : NULL;
}

static quarry_session *session_new(quarry_model *model, const quarry_session_params *params, quarry_error *error)
{
    quarry_session *s = memory_zero(1, sizeof *s, "session", error);
    if (!s) return NULL;
    s->model = model;
    s->params = *params;
    s->scratch = forward_scratch_create(model, error);
    s->logits = memory_alloc((size_t)model_shape_of(model)->n_vocab, sizeof *s->logits, "logits", error);
    if (s->scratch && s->logits) return s;
    quarry_session_close(s);
    return NULL;
}

/* What is not local is seen as from window to FARTHEST windows away, on average: a model must have been trained for so much. */
static quarry_code check_extend(int64_t trained, quarry_session_params *params, quarry_error *error)
{
    if (params->read_window == 0) params->read_window = trained >= 8 * EXTEND_WINDOW ? EXTEND_WINDOW : trained / 8;
    if (params->read_window >= ATTN_WINDOW && params->read_window <= trained / FARTHEST) return QUARRY_OK;
    return error_set(error, QUARRY_ERROR_ARGUMENT,
                     "a window of %lld tokens does not extend a model that was trained for %lld: should be %d to %lld",
                     (long long)params->read_window, (long long)trained, ATTN_WINDOW, (long long)trained / FARTHEST);
}

quarry_code session_check_params(const quarry_model *model, quarry_session_params *params, quarry_error *error)
{
    const int64_t trained = model_shape_of(model)->n_ctx_train;
    if (params->n_ctx == 0) params->n_ctx = params->extend ? INT32_MAX : trained;
    if (params->read_window < 0 || (params->read_window > 0 && params->read_window < ATTN_WINDOW) || params->read_window > INT32_MAX / 4)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "a window of %lld tokens is out of range (%d or more)",
                         (long long)params->read_window, ATTN_WINDOW);
    if (params->extend) {
        const quarry_code code = check_extend(trained, params, error);
        if (code != QUARRY_OK) return code;
    }
    if (params->n_batch == 0) params->n_batch = SESSION_DEFAULT_BATCH;
    if (params->n_ctx < 0 || params->n_ctx > INT32_MAX)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "context size %lld is out of range", (long long)params->n_ctx);
    if (params->n_batch < 1 || params->n_batch > 65536)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "batch size %d is out of range (1 to 65536)", params->n_batch);
    return QUARRY_OK;
}

attn_shape session_attn_shape(const quarry_model *model, const quarry_session_params *params)
{
    attn_shape shape = model_attn_shape(model, params->kv_f32 ? KV_F32 : KV_F16);
    shape.read_window = params->read_window;
    if (params->extend) attn_shape_extend(&shape, params->read_window, params->read_window, FARTHEST * params->read_window);
    return shape;
}

quarry_session *session_open_policies(quarry_model *model, const quarry_session_params *params, const char *const *specs, int n_policies,
                                      quarry_error *error)
{
    quarry_session_params p = params ? *params : (quarry_session_params){0};
    if (session_check_params(model, &p, error) != QUARRY_OK) return NULL;
    if (n_policies < 1 || n_policies > SESSION_MAX_POLICIES) {
        error_set(error, QUARRY_ERROR_ARGUMENT, "1 to %d retrieval policies at once, not %d", SESSION_MAX_POLICIES, n_policies);
        return NULL;
    }
    quarry_session *s = session_new(model, &p, error);
    if (!s) return NULL;
    const attn_shape shape = session_attn_shape(model, &p);
    s->kv = kv_create(&shape.kv, error);
    for (int i = 0; s->kv && i < n_policies; i++) {
        s->policies[i] = attn_policy_create(specs[i], &shape, model_kernels(model), error);
        if (!s->policies[i]) break;
        s->n_policies = i + 1;
    }
    if (s->n_policies < n_policies) {
        quarry_session_close(s);
        return NULL;
    }
    link_policies(s);
    if (p.kv_ram && !session_can_save(s)) {
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s keeps all keys and values in memory: no bound on it (--kv-ram)",
                  n_policies > 1 ? "a session of several policies" : s->policies[0]->type->name);
        quarry_session_close(s);
        return NULL;
    }
    return s;
}

quarry_session *quarry_session_open(quarry_model *model, const quarry_session_params *params, quarry_error *error)
{
    const char *spec = params && params->attn && *params->attn ? params->attn : attn_policies[0]->name;
    return session_open_policies(model, params, &spec, 1, error);
}

void quarry_session_close(quarry_session *s)
{
    if (!s) return;
    for (int i = 0; i < s->n_policies; i++) attn_policy_destroy(s->policies[i]);
    kv_destroy(s->kv);
    token_list_free(&s->tokens);
    forward_scratch_destroy(s->scratch);
    cite_destroy(s->cite);
    memory_free(s->logits);
    memory_free(s);
}

static quarry_session *fork_some(const quarry_session *s, int first, int n_policies, quarry_error *error)
{
    quarry_session *f = session_new(s->model, &s->params, error);
    if (!f) return NULL;
    f->beyond_training = s->beyond_training;
    f->has_logits = s->has_logits;
    memcpy(f->logits, s->logits, (size_t)model_shape_of(s->model)->n_vocab * sizeof *f->logits);
    if (memory_grow(&f->tokens.ids, (size_t)s->tokens.n, sizeof *f->tokens.ids, "tokens", error) != QUARRY_OK) goto fail;
    if (s->tokens.n) memcpy(f->tokens.ids, s->tokens.ids, (size_t)s->tokens.n * sizeof *f->tokens.ids);
    f->tokens.n = f->tokens.capacity = s->tokens.n;
    if (!(f->kv = kv_fork(s->kv, error))) goto fail;
    for (int i = 0; i < n_policies; i++) {
        const attn_policy *from = s->policies[first + i];
        f->policies[i] = from->type->fork(from, error);
        if (!f->policies[i]) goto fail;
        f->policies[i]->n_far = from->n_far;
        f->n_policies = i + 1;
    }
    link_policies(f);
    return f;
fail:
    quarry_session_close(f);
    return NULL;
}

quarry_session *quarry_session_fork(const quarry_session *s, quarry_error *error)
{
    return fork_some(s, 0, s->n_policies, error);
}

quarry_session *session_fork_policy(const quarry_session *s, int i, quarry_error *error)
{
    return fork_some(s, i, 1, error);
}

void session_allow_beyond_training(quarry_session *s)
{
    s->beyond_training = true;
}

/* ---- tokens in ---- */

int64_t session_room(const quarry_session *s)
{
    int64_t limit = s->params.n_ctx, trained = model_shape_of(s->model)->n_ctx_train;
    if (!s->beyond_training && !s->params.extend && limit > trained) limit = trained;
    return limit - s->tokens.n;
}

quarry_code session_check_room(const quarry_session *s, int64_t n, quarry_error *error)
{
    int64_t room = session_room(s), trained = model_shape_of(s->model)->n_ctx_train, needed = s->tokens.n + n;
    if (n <= room) return QUARRY_OK;
    if (!s->beyond_training && !s->params.extend && needed > trained)
        return error_set(error, QUARRY_ERROR_CONTEXT,
                         "%lld tokens do not fit: the model was trained for a context of %lld; use a shorter document, a model with a "
                         "longer context, or --extend",
                         (long long)needed, (long long)trained);
    return error_set(error, QUARRY_ERROR_CONTEXT,
                     "%lld tokens do not fit the context of %lld; enlarge it with -c (the model was trained for %lld)", (long long)needed,
                     (long long)s->params.n_ctx, (long long)trained);
}

typedef struct step {
    bool dense;
    int64_t done, total; /* for progress */
    const quarry_watch *watch;
    float *all_logits; /* [n][n_vocab], or NULL: only the last row's, into the session */
    attn_cost cost;    /* of these rows */
} step;

static bool cancelled(void *data)
{
    const step *st = data;
    return st->watch && st->watch->progress && !st->watch->progress(st->done, st->total, st->watch->data);
}

void session_forget_from(quarry_session *s, int64_t n)
{
    s->tokens.n = n;
    if (n < s->saved.n_tokens) s->saved = (saved_part){0};
    kv_truncate(s->kv, n);
    const int64_t far_end = attn_far_end(&s->policies[0]->shape, n);
    for (int i = 0; i < s->n_policies; i++) s->policies[i]->type->truncate(s->policies[i], far_end > 0 ? far_end : 0);
    s->has_logits = false;
}

/* Bytes of one token's rows, of all layers that keep them. */
static size_t token_bytes(const quarry_session *s)
{
    const kv_shape *shape = kv_shape_of(s->kv);
    return kv_row_bytes(shape->type, shape->head_dim) * (size_t)shape->n_layer * (size_t)shape->n_head_kv;
}

/* Bytes of rows that are in memory and not in the cache of cold ones. */
static size_t hot_bytes(const quarry_session *s)
{
    const kv_cold *cold = kv_cold_of(s->kv);
    return kv_bytes(s->kv) - (cold ? kv_cold_row_bytes(cold) : 0);
}

static quarry_code too_little(const quarry_session *s, size_t needed, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_MEMORY,
                     "keys and values do not fit in the %.0f MB that they may take: %.0f MB are needed now; raise --kv-ram",
                     (double)s->params.kv_ram / 1e6, (double)needed / 1e6 + 1);
}

quarry_code session_fit_kv(quarry_session *s, int64_t coming, quarry_error *error)
{
    /* Tokens until this is asked again; cold rows of a part; times kv_ram that the index may take for keys of cold rows. */
    enum { AHEAD = 64, LEAST_CACHE = 64, KEYS = 4 };
    kv_cold *cold = kv_cold_of(s->kv);
    const size_t limit = s->params.kv_ram,
                 needed = hot_bytes(s) + (size_t)coming * token_bytes(s) + kv_local_coming(s->kv, coming, s->params.n_batch);
    if (limit == 0) return cold && kv_cold_row_bytes(cold) == 0 ? kv_cold_set_cache(cold, SIZE_MAX, SIZE_MAX, error) : QUARRY_OK;
    if (needed > limit) return too_little(s, needed, error);
    if (!cold) return QUARRY_OK;
    if (needed + LEAST_CACHE * token_bytes(s) > limit) return too_little(s, needed + LEAST_CACHE * token_bytes(s), error);
    const size_t rest = limit - needed, ahead = AHEAD * token_bytes(s);
    return kv_cold_set_cache(cold, rest > 2 * ahead ? rest - ahead : rest / 2, KEYS * limit, error);
}

quarry_code session_fit_grown(quarry_session *s, quarry_error *error)
{
    return s->params.kv_ram && kv_bytes(s->kv) > s->params.kv_ram ? session_fit_kv(s, 0, error) : QUARRY_OK;
}

/* Tokens behind the last sealed segment once n more were read. */
static int64_t loose_after(const quarry_session *s, int64_t n)
{
    const attn_policy *p = s->policies[0];
    const int64_t length = s->tokens.n + n, end = attn_far_end(&p->shape, length), before = length - p->shape.read_window;
    const int64_t more = (before < end ? before : end) - p->n_far, n_far = p->n_far + (more > 0 ? more / ATTN_BLOCK * ATTN_BLOCK : 0);
    return length - n_far + p->type->saving->n_open(p, n_far);
}

quarry_code session_stretch(const quarry_session *s, int64_t *n, quarry_error *error)
{
    if (s->params.kv_ram == 0) {
        *n = INT64_MAX;
        return QUARRY_OK;
    }
    const size_t most = s->params.kv_ram / 4 * 3, hot = hot_bytes(s) + kv_local_coming(s->kv, INT32_MAX, s->params.n_batch),
                 least = (size_t)s->params.n_batch * token_bytes(s); /* a quarter is the cache's */
    if (hot + least > most) return too_little(s, (hot + least) / 3 * 4, error);
    const int64_t batch = s->params.n_batch,
                  longest = (int64_t)((most - hot) / token_bytes(s)) / batch * batch; /* blocks of a text are cut where batches are */
    *n = longest;
    for (int64_t shorter = longest - batch; shorter > longest / 2; shorter -= batch) /* what is loose then is kept, and stays in memory */
        if (loose_after(s, shorter) < loose_after(s, *n)) *n = shorter;
    return QUARRY_OK;
}

/* Forward of up to n_batch tokens, then the index follows. On error the session is as before. */
static quarry_code run_chunk(quarry_session *s, const int32_t *tokens, int64_t n, bool last, step *st, quarry_error *error)
{
    int64_t first = s->tokens.n, vocab = model_shape_of(s->model)->n_vocab;
    quarry_code code = QUARRY_OK;
    forward_row *rows = memory_alloc((size_t)n, sizeof *rows, "batch", error);
    attn_cost *cost = memory_zero((size_t)n, sizeof *cost, "batch", error);
    if (!rows || !cost) {
        code = QUARRY_ERROR_MEMORY;
        goto done;
    }
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++) code = token_list_push(&s->tokens, tokens[i], error);
    if (code != QUARRY_OK) goto done;
    for (int64_t i = 0; i < n; i++)
        rows[i] = (forward_row){
            .kv = s->kv,
            .policy = s->policies[0],
            .pos = first + i,
            .token = tokens[i],
            .dense = st->dense,
            .observer = s->observer,
            .logits = st->all_logits       ? st->all_logits + i * vocab
                      : last && i + 1 == n ? s->logits
                                           : NULL,
        };
    arena *threads = forward_scratch_threads(s->scratch);
    model_lock(s->model);
    code = model_forward(s->model, s->scratch, rows, n, cost, cancelled, st, error);
    if (code == QUARRY_OK)
        code = (st->dense ? attn_index_trail : attn_index_advance)(s->policies[0], s->kv, model_pool(s->model), threads, error);
    if (code == QUARRY_OK) code = session_fit_grown(s, error);
    model_unlock(s->model);
    for (int64_t i = 0; i < n; i++) attn_cost_add(&st->cost, &cost[i]);
done:
    if (code != QUARRY_OK) session_forget_from(s, first);
    memory_free(rows);
    memory_free(cost);
    return code;
}

static quarry_code run_tokens(quarry_session *s, const int32_t *tokens, int64_t n, step *st, quarry_error *error)
{
    quarry_code code = session_check_room(s, n, error);
    int64_t vocab = model_shape_of(s->model)->n_vocab;
    st->total = n;
    for (int64_t i = 0, chunk; i < n && code == QUARRY_OK; i += chunk) {
        chunk = n - i < s->params.n_batch ? n - i : s->params.n_batch;
        st->done = i;
        code = run_chunk(s, tokens + i, chunk, i + chunk == n, st, error);
        if (st->all_logits) st->all_logits += chunk * vocab;
    }
    if (code == QUARRY_OK && n > 0 && !st->all_logits) s->has_logits = true;
    st->done = n;
    if (code == QUARRY_OK && st->watch && st->watch->progress)
        st->watch->progress(n, n, st->watch->data); /* all is read: too late to cancel */
    return code;
}

int session_read(quarry_session *s, const int32_t *tokens, int64_t n, bool seal, const quarry_watch *watch, quarry_error *error)
{
    double start = session_now();
    step st = {.dense = true, .watch = watch};
    int64_t before = s->tokens.n;
    quarry_code code = run_tokens(s, tokens, n, &st, error);
    if (code == QUARRY_OK && seal) {
        model_lock(s->model);
        code = attn_index_seal(s->policies[0], s->kv, model_pool(s->model), forward_scratch_threads(s->scratch), error);
        model_unlock(s->model);
    }
    s->stats.n_read += s->tokens.n - before;
    s->stats.read_seconds += session_now() - start;
    return code;
}

int quarry_session_read(quarry_session *s, const int32_t *tokens, int64_t n, const quarry_watch *watch, quarry_error *error)
{
    quarry_code code = session_check_room(s, n, error);
    if (code == QUARRY_OK) code = session_memory_check(s, n, error);
    if (code != QUARRY_OK) return code;
    return session_read(s, tokens, n, true, watch, error);
}

int quarry_session_feed(quarry_session *s, const int32_t *tokens, int64_t n, const quarry_watch *watch, quarry_error *error)
{
    double start = session_now();
    step st = {.watch = watch};
    int64_t before = s->tokens.n;
    quarry_code code = run_tokens(s, tokens, n, &st, error);
    cite_question_ends(s->cite);
    attn_cost_add(&s->sparse_cost, &st.cost);
    s->stats.n_fed += s->tokens.n - before;
    s->stats.feed_seconds += session_now() - start;
    return code;
}

quarry_code session_feed_generated(quarry_session *s, int32_t token, const quarry_watch *watch, quarry_error *error)
{
    double start = session_now();
    step st = {.watch = watch};
    quarry_code code = run_tokens(s, &token, 1, &st, error);
    s->stats.generate_seconds += session_now() - start;
    if (code != QUARRY_OK) return code;
    attn_cost_add(&s->sparse_cost, &st.cost);
    s->stats.n_generated++;
    const kv_shape k = model_attn_shape(s->model, kv_shape_of(s->kv)->type).kv; /* not what an extended session adds */
    const int64_t row = (int64_t)kv_row_bytes(k.type, k.head_dim);
    s->kv_bytes_sum += (double)(attn_cost_bytes(&st.cost, row) + st.cost.window_rows * row);
    s->kv_full_sum += kv_bytes_seen(&k, s->tokens.n);
    s->n_steps++;
    return code;
}

quarry_code session_feed_logits(quarry_session *s, const int32_t *tokens, int64_t n, float *logits, quarry_error *error)
{
    step st = {.all_logits = logits};
    quarry_code code = run_tokens(s, tokens, n, &st, error);
    attn_cost_add(&s->sparse_cost, &st.cost);
    return code;
}

void session_set_observer(quarry_session *s, const attn_observer *observer)
{
    s->observer = observer;
}

attn_cost session_cost(const quarry_session *s)
{
    return s->sparse_cost;
}

/* ---- state out ---- */

const float *quarry_session_logits(const quarry_session *s)
{
    return s->has_logits ? s->logits : NULL;
}

int64_t quarry_session_length(const quarry_session *s)
{
    return s->tokens.n;
}

const int32_t *quarry_session_tokens(const quarry_session *s)
{
    return s->tokens.ids;
}

int quarry_session_truncate(quarry_session *s, int64_t n, quarry_error *error)
{
    if (n < 0 || n > s->tokens.n)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "cannot truncate to %lld tokens: the session holds %lld", (long long)n,
                         (long long)s->tokens.n);
    if (n == s->tokens.n) return QUARRY_OK;
    if (n > 0 && n < kv_cold_in(s->kv)->length)
        return error_set(
            error, QUARRY_ERROR_ARGUMENT,
            "cannot truncate to %lld tokens: the first %lld are a stored context, whose keys and values are on disk; to %lld or "
            "more, or to 0",
            (long long)n, (long long)kv_cold_in(s->kv)->length, (long long)kv_least(s->kv));
    if (n > 0 && n < kv_least(s->kv))
        return error_set(error, QUARRY_ERROR_ARGUMENT,
                         "cannot truncate to %lld tokens: layers with a sliding window of %d have forgotten what precedes them; to %lld or "
                         "more, or to 0",
                         (long long)n, kv_shape_of(s->kv)->window, (long long)kv_least(s->kv));
    session_forget_from(s, n);
    return QUARRY_OK;
}

int64_t quarry_session_common_prefix(const quarry_session *s, const int32_t *tokens, int64_t n)
{
    int64_t i = 0;
    while (i < n && i < s->tokens.n && tokens[i] == s->tokens.ids[i]) i++;
    return i;
}

void quarry_session_get_stats(const quarry_session *s, quarry_stats *stats)
{
    *stats = s->stats;
    if (s->n_steps) {
        stats->kv_bytes_per_step = s->kv_bytes_sum / (double)s->n_steps;
        stats->kv_bytes_full = s->kv_full_sum / (double)s->n_steps;
    }
    stats->kv_bytes = kv_bytes(s->kv);
    memory_tally scratch = {.held_only = true};
    forward_scratch_tally(s->scratch, &scratch);
    stats->scratch_bytes = scratch.held;
    stats->index_bytes = 0;
    for (int i = 0; i < s->n_policies; i++) stats->index_bytes += attn_policy_bytes(s->policies[i]);
    if (kv_cold_of(s->kv)) stats->index_bytes += kv_cold_derived_bytes(kv_cold_of(s->kv));
}
