#include "eval/common.h"

static bool watch_progress(int64_t done, int64_t total, void *data)
{
    const eval_watch *w = data;
    (void)total;
    return w->outer->progress(w->done + done, w->total, w->outer->data);
}

static quarry_watch watch_inner(eval_watch *w)
{
    return w->outer && w->outer->progress ? (quarry_watch){watch_progress, w} : (quarry_watch){0};
}

quarry_code eval_read(quarry_session *session, const int32_t *tokens, int64_t n, eval_watch *watch, quarry_error *error)
{
    const quarry_watch inner = watch_inner(watch);
    const quarry_code code = (quarry_code)quarry_session_read(session, tokens, n, &inner, error);
    watch->done += n;
    return code;
}

quarry_code eval_watch_ask(const eval_watch *watch, quarry_error *error)
{
    if (watch->outer && watch->outer->progress && !watch->outer->progress(watch->done, watch->total, watch->outer->data))
        return error_set(error, QUARRY_ERROR_CANCELLED, "cancelled");
    return QUARRY_OK;
}

quarry_code eval_bos(const quarry_model *model, int32_t *bos, int *n_bos, quarry_error *error)
{
    token_list list = {0};
    const tokenizer *t = model_tokenizer(model);
    const quarry_code code = tokenizer_encode(t, "", 0, TOKENIZE_ADD_BOS, &list, error);
    *bos = tokenizer_bos(t);
    *n_bos = code == QUARRY_OK && list.n > 0 && list.ids[0] == *bos;
    token_list_free(&list);
    return code;
}

quarry_code eval_check_length(const quarry_model *model, int64_t n_tokens, const char *what, quarry_error *error)
{
    const int64_t trained = model_shape_of(model)->n_ctx_train;
    if (n_tokens <= trained) return QUARRY_OK;
    return error_set(error, QUARRY_ERROR_CONTEXT, "%s: %lld tokens, but the model was trained for a context of %lld", what,
                     (long long)n_tokens, (long long)trained);
}

quarry_code eval_check_way(const quarry_model *model, const eval_way *way, int64_t n_tokens, const char *what, quarry_error *error)
{
    return way->extend && way->reference ? QUARRY_OK : eval_check_length(model, n_tokens, what, error);
}

quarry_code eval_sessions_read(eval_sessions *s, quarry_model *model, const eval_way *way, const char *const *specs, int n_policies,
                               const int32_t *tokens, int64_t n, eval_watch *watch, quarry_error *error)
{
    const int n_sessions = eval_readings(way, n_policies);
    quarry_code code = QUARRY_OK;
    *s = (eval_sessions){.apart = n_sessions > 1 || way->extend || way->read_window > 0};
    if (!(s->read = memory_zero((size_t)n_sessions, sizeof *s->read, "sessions", error))) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < n_sessions && code == QUARRY_OK; i++) {
        const bool plain = !s->apart || (i == 0 && !way->reference);
        const quarry_session_params params = {
            .n_batch = way->n_batch, .read_window = plain ? 0 : way->read_window, .extend = !plain && way->extend};
        s->read[i] = session_open_policies(model, &params, specs + i, s->apart ? 1 : n_policies, error);
        if (!s->read[i]) return eval_failed(error);
        s->n++;
        code = eval_read(s->read[i], tokens, n, watch, error);
    }
    return code;
}

quarry_session *eval_sessions_fork(const eval_sessions *s, int policy, quarry_error *error)
{
    return s->apart ? quarry_session_fork(s->read[policy], error) : session_fork_policy(s->read[0], policy, error);
}

void eval_sessions_free(eval_sessions *s)
{
    for (int i = 0; i < s->n; i++) quarry_session_close(s->read[i]);
    memory_free(s->read);
    *s = (eval_sessions){0};
}

const char **eval_policies(const char *reference, const char *const *attn, int n_attn, quarry_error *error)
{
    const char **specs = memory_alloc((size_t)n_attn + 1, sizeof *specs, "policies", error);
    if (!specs) return NULL;
    specs[0] = reference ? reference : "full";
    for (int i = 0; i < n_attn; i++) specs[i + 1] = attn[i];
    return specs;
}

void reading_add(reading_sum *sum, const quarry_session *session, int64_t n_tokens)
{
    const attn_cost cost = session_cost(session);
    attn_cost_add(&sum->cost, &cost);
    sum->tokens += n_tokens;
}

bool reading_add_record(reading_sum *sum, const json_t *cost, int64_t n_tokens)
{
    json_int_t index, tables, tail, rows;
    if (json_unpack((json_t *)cost, "[I,I,I,I!]", &index, &tables, &tail, &rows)) return false;
    attn_cost_add(&sum->cost, &(attn_cost){.index_bytes = index, .table_bytes = tables, .tail_bytes = tail, .rows = rows});
    sum->tokens += n_tokens;
    return true;
}

json_t *record_cost(const attn_cost *cost)
{
    return json_pack("[I,I,I,I]", (json_int_t)cost->index_bytes, (json_int_t)cost->table_bytes, (json_int_t)cost->tail_bytes,
                     (json_int_t)cost->rows);
}

void reading_relate(const reading_sum *sum, const reading_sum *full, const quarry_model *model, eval_reading *out)
{
    const int64_t row = (int64_t)kv_row_bytes(KV_F16, model_shape_of(model)->head_dim);
    const double bytes = (double)attn_cost_bytes(&sum->cost, row);
    *out = (eval_reading){0};
    if (full->cost.rows == 0 || sum->tokens == 0 || full->tokens == 0) return;
    const double as_long = (double)sum->tokens / (double)full->tokens; /* what full would have read over as many tokens */
    const double full_rows = (double)full->cost.rows * as_long, full_bytes = (double)attn_cost_bytes(&full->cost, row) * as_long;
    out->rows_share = (double)sum->cost.rows / full_rows;
    out->index_share = (double)sum->cost.index_bytes / full_bytes;
    out->tables_share = (double)sum->cost.table_bytes / full_bytes;
    out->tail_share = (double)sum->cost.tail_bytes / full_bytes;
    out->bytes_share = bytes / full_bytes;
    out->bytes_per_token = bytes / (double)sum->tokens;
}

json_t *record_numbers(const double *values, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n && list; i++)
        if (json_array_append_new(list, json_real(values[i]))) {
            json_decref(list);
            return NULL;
        }
    return list;
}
