/* One step of several sessions: their rows go through the layers together, so the weights are read once for all. */
#include "gen/session.h"

static quarry_code check(quarry_session *const *sessions, int n, quarry_error *error)
{
    for (int i = 0; i < n; i++) {
        if (sessions[i]->model != sessions[0]->model)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "session %d of the batch belongs to another model than session 0", i);
        if (sessions[i]->params.kv_f32 != sessions[0]->params.kv_f32)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "session %d of the batch keeps its cache in another type than session 0", i);
        if (sessions[i]->params.extend != sessions[0]->params.extend || sessions[i]->params.read_window != sessions[0]->params.read_window)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "session %d of the batch is extended or read in another way than session 0", i);
        for (int j = 0; j < i; j++)
            if (sessions[i] == sessions[j])
                return error_set(error, QUARRY_ERROR_ARGUMENT, "sessions %d and %d of the batch are the same", j, i);
        quarry_code code = session_check_room(sessions[i], 1, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

/* The pass, then the indexes follow. The scratch memory is the first session's. */
static quarry_code run(quarry_session *const *sessions, const forward_row *rows, attn_cost *cost, int n, quarry_error *error)
{
    quarry_model *model = sessions[0]->model;
    forward_scratch *scratch = sessions[0]->scratch;
    model_lock(model);
    quarry_code code = model_forward(model, scratch, rows, n, cost, NULL, NULL, error);
    for (int i = 0; i < n && code == QUARRY_OK; i++)
        code = attn_index_advance(sessions[i]->policies[0], sessions[i]->kv, model_pool(model), forward_scratch_threads(scratch), error);
    for (int i = 0; i < n && code == QUARRY_OK; i++) code = session_fit_grown(sessions[i], error);
    model_unlock(model);
    return code;
}

int quarry_sessions_feed(quarry_session *const *sessions, const int32_t *tokens, int n, quarry_error *error)
{
    double start = session_now();
    if (n < 1) return n == 0 ? QUARRY_OK : error_set(error, QUARRY_ERROR_ARGUMENT, "a batch of %d sessions", n);
    quarry_code code = check(sessions, n, error);
    if (code != QUARRY_OK) return code;
    int n_pushed = 0;
    forward_row *rows = memory_alloc((size_t)n, sizeof *rows, "batch", error);
    attn_cost *cost = memory_zero((size_t)n, sizeof *cost, "batch", error);
    code = rows && cost ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    for (; n_pushed < n && code == QUARRY_OK; n_pushed++) {
        quarry_session *s = sessions[n_pushed];
        rows[n_pushed] = (forward_row){.kv = s->kv,
                                       .policy = s->policies[0],
                                       .pos = s->tokens.n,
                                       .token = tokens[n_pushed],
                                       .observer = s->observer,
                                       .logits = s->logits};
        if ((code = token_list_push(&s->tokens, tokens[n_pushed], error)) != QUARRY_OK) break;
    }
    if (code == QUARRY_OK) code = run(sessions, rows, cost, n, error);
    for (int i = 0; i < n_pushed; i++) {
        quarry_session *s = sessions[i];
        if (code != QUARRY_OK) {
            session_forget_from(s, s->tokens.n - 1);
            continue;
        }
        s->has_logits = true;
        attn_cost_add(&s->sparse_cost, &cost[i]);
        s->stats.n_fed++;
        s->stats.feed_seconds += session_now() - start;
    }
    memory_free(rows);
    memory_free(cost);
    return code;
}
