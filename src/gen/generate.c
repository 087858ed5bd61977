#include <math.h>

#include "gen/session.h"

/* Logits of a padded vocabulary that no token stands for are left out. */
static int64_t vocabulary_size(const quarry_model *model)
{
    int64_t n_logits = model_shape_of(model)->n_vocab, n_tokens = tokenizer_size(model_tokenizer(model));
    return n_logits < n_tokens ? n_logits : n_tokens;
}

/* ignore_eos becomes a bias of minus infinity on every token that ends an answer, so that the model goes on with its text instead of with another turn. */
static sampler *make_sampler(const quarry_sampling *p, const quarry_model *model, quarry_error *error)
{
    int64_t n_vocab = vocabulary_size(model);
    if (!p->ignore_eos || p->n_bias < 0) return sampler_create(p, n_vocab, error);
    const tokenizer *t = model_tokenizer(model);
    size_t n = (size_t)p->n_bias;
    for (int32_t id = 0; id < n_vocab; id++) n += tokenizer_is_end(t, id);
    quarry_sampling with_bias = *p;
    sampler *s = NULL;
    int32_t *tokens = memory_alloc(n, sizeof *tokens, "logit bias", error);
    float *values = memory_alloc(n, sizeof *values, "logit bias", error);
    if (!tokens || !values) goto done;
    for (int i = 0; i < p->n_bias; i++) {
        tokens[i] = p->bias_tokens[i];
        values[i] = p->bias_values[i];
    }
    for (int32_t id = 0; id < n_vocab; id++) {
        if (!tokenizer_is_end(t, id)) continue;
        tokens[with_bias.n_bias] = id;
        values[with_bias.n_bias++] = -INFINITY;
    }
    with_bias.bias_tokens = tokens;
    with_bias.bias_values = values;
    s = sampler_create(&with_bias, n_vocab, error);
done:
    memory_free(tokens);
    memory_free(values);
    return s;
}

/* ---- text on its way out: token -> whole characters -> stop strings -> the caller ---- */

typedef struct text_stream {
    const tokenizer *tokenizer;
    detokenizer detokenizer;
    stop_matcher *stop;
    char *piece;
    size_t capacity;
    quarry_text_fn on_text;
    void *data;
    bool ended; /* no more text is wanted, for this reason: */
    quarry_stop_reason reason;
} text_stream;

static void stream_end(text_stream *s, quarry_stop_reason reason)
{
    s->ended = true;
    s->reason = reason;
}

static void stream_emit(text_stream *s, const char *text, size_t n)
{
    if (s->on_text && !s->on_text(text, n, s->data)) stream_end(s, QUARRY_STOP_CALLBACK);
}

static quarry_code stream_match(text_stream *s, const char *text, size_t n, quarry_error *error)
{
    const char *out;
    size_t n_out;
    bool stopped = stop_matcher_push(s->stop, text, n, &out, &n_out, error);
    if (!out) return QUARRY_ERROR_MEMORY;
    stream_emit(s, out, n_out);
    if (stopped && !s->ended) stream_end(s, QUARRY_STOP_STRING);
    return QUARRY_OK;
}

static quarry_code stream_token(text_stream *s, int32_t token, quarry_error *error)
{
    size_t n_bytes = 0, needed;
    tokenizer_token_bytes(s->tokenizer, token, &n_bytes);
    needed = n_bytes + 16;
    if (needed > s->capacity) {
        if (memory_grow(&s->piece, needed, 1, "text", error)) return QUARRY_ERROR_MEMORY;
        s->capacity = needed;
    }
    size_t n = detokenizer_push(&s->detokenizer, s->tokenizer, token, s->piece, s->capacity);
    return stream_match(s, s->piece, n, error);
}

/* What was held back, when nothing more comes. */
static quarry_code stream_finish(text_stream *s, quarry_error *error)
{
    char rest[16];
    size_t n = detokenizer_finish(&s->detokenizer, rest, sizeof rest);
    quarry_code code = stream_match(s, rest, n, error);
    if (code || s->ended) return code;
    const char *out;
    stop_matcher_flush(s->stop, &out, &n);
    stream_emit(s, out, n);
    return QUARRY_OK;
}

/* ---- the loop ---- */

static quarry_code generate_tokens(quarry_session *session, sampler *choice, text_stream *stream, int64_t max_tokens,
                                   quarry_stop_reason *reason, quarry_error *error)
{
    for (int64_t n = 0;; n++) {
        int64_t length = quarry_session_length(session);
        *reason = max_tokens >= 0 && n >= max_tokens ? QUARRY_STOP_LENGTH : QUARRY_STOP_CONTEXT;
        if (*reason == QUARRY_STOP_LENGTH || session_room(session) <= 0) break;
        int32_t token = sampler_next(choice, quarry_session_logits(session), quarry_session_tokens(session), length);
        *reason = QUARRY_STOP_END;
        if (tokenizer_is_end(stream->tokenizer, token)) break;
        quarry_code code = stream_token(stream, token, error);
        if (!code) code = session_feed_generated(session, token, NULL, error);
        if (code) return code;
        if (stream->ended) {
            *reason = stream->reason;
            return QUARRY_OK;
        }
    }
    quarry_code code = stream_finish(stream, error);
    if (stream->ended) *reason = stream->reason;
    return code;
}

int quarry_session_generate(quarry_session *session, const quarry_sampling *sampling, quarry_text_fn on_text, void *data,
                            quarry_stop_reason *reason, quarry_error *error)
{
    const quarry_model *model = session->model;
    if (!quarry_session_logits(session))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "nothing to go on from: read or feed tokens before generating");
    if (sampling->n_stop < 0 || (sampling->n_stop && !sampling->stop))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "n_stop is %d without stop strings", sampling->n_stop);
    text_stream stream = {.tokenizer = model_tokenizer(model), .on_text = on_text, .data = data};
    detokenizer_start(&stream.detokenizer);
    sampler *choice = NULL;
    quarry_code code = QUARRY_ERROR_MEMORY;
    quarry_error failure = {0};
    quarry_stop_reason why;
    stream.stop = stop_matcher_create(sampling->stop, sampling->n_stop, &failure);
    if (stream.stop) choice = make_sampler(sampling, model, &failure);
    if (!choice) {
        code = error_set(error, failure.code, "%s", failure.message);
        goto done;
    }
    code = generate_tokens(session, choice, &stream, sampling->max_tokens, &why, error);
    if (!code && reason) *reason = why;
done:
    sampler_destroy(choice);
    stop_matcher_destroy(stream.stop);
    memory_free(stream.piece);
    return code;
}
