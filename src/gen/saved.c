/* What a session keeps on disk, and takes from there (docs/context-format.md). */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "gen/session.h"

/* The index that saved contexts have by default, for a policy that has none and can do with the rows alone. */
static quarry_code describe_default(const attn_policy *p, char *text, size_t size, quarry_error *error)
{
    attn_policy *usual = attn_policy_create(attn_policies[0]->name, &p->shape, p->kernels, error);
    if (!usual) return QUARRY_ERROR_MEMORY;
    usual->type->saving->describe(usual, text, size);
    attn_policy_destroy(usual);
    return QUARRY_OK;
}

quarry_code session_subject(const quarry_session *s, piece_subject *subject, quarry_error *error)
{
    const attn_policy *p = s->policies[0];
    *subject = (piece_subject){.parent = s->saved.end,
                               .fingerprint = p->shape.fingerprint,
                               .kv = *kv_shape_of(s->kv),
                               .first = s->saved.n_tokens,
                               .end = s->tokens.n};
    quarry_code code = QUARRY_OK;
    if (p->type->saving)
        p->type->saving->describe(p, subject->index, sizeof subject->index);
    else if (!p->type->observe)
        code = describe_default(p, subject->index, sizeof subject->index, error);
    else
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "policy %s learns from queries that saved contexts do not have", p->type->name);
    const size_t n = strlen(subject->index);
    if (p->shape.read_window) /* what was read in blocks differs, and differs more when extended */
        snprintf(subject->index + n, sizeof subject->index - n, " %s=%lld", p->shape.extend.window ? "extend" : "read-window",
                 (long long)p->shape.read_window);
    return code;
}

bool session_can_save(const quarry_session *s)
{
    return s->n_policies == 1 && s->policies[0]->type->saving;
}

quarry_code session_save(quarry_session *s, file_writer *file, const char *about, store_key *key, quarry_error *error)
{
    const attn_policy *p = s->policies[0];
    piece_source source = {.tokens = s->tokens.ids + s->saved.n_tokens,
                           .about = about,
                           .created = (int64_t)time(NULL),
                           .kv = s->kv,
                           .policy = p,
                           .first_segment = s->saved.n_segments};
    if (!session_can_save(s)) return error_set(error, QUARRY_ERROR_UNSUPPORTED, "the index of policy %s cannot be saved", p->type->name);
    if (s->tokens.n <= s->saved.n_tokens) return error_set(error, QUARRY_ERROR_ARGUMENT, "nothing was read since the context was saved");
    quarry_code code = session_subject(s, &source.subject, error);
    if (code != QUARRY_OK) return code;
    model_lock(s->model);
    code = piece_write(file, &source, model_pool(s->model), forward_scratch_threads(s->scratch), error);
    model_unlock(s->model);
    if (code == QUARRY_OK) *key = piece_key_of(&source.subject, source.tokens);
    return code;
}

void session_saved(quarry_session *s, const store_key *key)
{
    s->saved = (saved_part){*key, s->tokens.n, s->policies[0]->type->saving->n_segments(s->policies[0])};
}

quarry_code session_set_cold(quarry_session *s, const char *path, quarry_error *error)
{
    piece_file *piece = piece_open(path, error);
    if (!piece) return error ? error->code : QUARRY_ERROR_IO;
    model_lock(s->model);
    quarry_code code = piece_set_cold(piece, s->kv, s->policies[0], forward_scratch_threads(s->scratch), error);
    model_unlock(s->model);
    piece_close(piece);
    return code;
}

/* ---- loading ---- */

static quarry_code check_pieces(const quarry_session *s, piece_file *const *pieces, int n, quarry_error *error)
{
    const piece_subject *last = piece_subject_of(pieces[n - 1]);
    piece_subject own;
    if (s->tokens.n)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "a saved context is loaded into an empty session; this one holds %lld tokens",
                         (long long)s->tokens.n);
    if (s->n_policies != 1)
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "a session of %d policies takes no saved context", s->n_policies);
    quarry_code code = session_subject(s, &own, error);
    if (code != QUARRY_OK) return code;
    if (last->fingerprint != own.fingerprint) return error_set(error, QUARRY_ERROR_ARGUMENT, "the saved context is of another model file");
    if (strcmp(last->index, own.index))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "the saved context has another index: '%s' instead of '%s'", last->index, own.index);
    return session_check_room(s, last->end, error);
}

static quarry_code take_tokens(quarry_session *s, piece_file *const *pieces, int n, quarry_error *error)
{
    for (int i = 0; i < n; i++) {
        const piece_subject *subject = piece_subject_of(pieces[i]);
        for (int64_t t = 0; t < subject->end - subject->first; t++) {
            const int32_t token = piece_tokens(pieces[i])[t];
            if (token < 0 || token >= model_shape_of(s->model)->n_vocab)
                return error_set(error, QUARRY_ERROR_FORMAT, "the saved context holds a token that the model does not have");
            quarry_code code = token_list_push(&s->tokens, token, error);
            if (code != QUARRY_OK) return code;
        }
    }
    return QUARRY_OK;
}

quarry_code session_load(quarry_session *s, piece_file *const *pieces, int n, bool cold, store_key *damaged, quarry_error *error)
{
    quarry_code code = check_pieces(s, pieces, n, error);
    if (code != QUARRY_OK) return code;
    /* into a new cache and index, so that nothing has changed if it fails */
    kv_seq *kv = kv_create(kv_shape_of(s->kv), error);
    attn_policy *policy = kv ? s->policies[0]->type->fork(s->policies[0], error) : NULL;
    if (!policy) {
        kv_destroy(kv);
        return QUARRY_ERROR_MEMORY;
    }
    arena *scratch = forward_scratch_threads(s->scratch);
    model_lock(s->model);
    code = pieces_load(pieces, n, cold && session_can_save(s), kv, policy, model_pool(s->model), scratch, damaged, error);
    if (code == QUARRY_OK && !policy->type->saving) code = attn_index_seal(policy, kv, model_pool(s->model), scratch, error);
    model_unlock(s->model);
    if (code == QUARRY_OK) code = take_tokens(s, pieces, n, error);
    kv_seq *old_kv = s->kv;
    attn_policy *old_policy = s->policies[0];
    s->kv = kv;
    s->policies[0] = policy;
    if (code == QUARRY_OK) code = session_fit_kv(s, 0, error);
    if (code != QUARRY_OK) {
        s->tokens.n = 0;
        s->kv = old_kv;
        s->policies[0] = old_policy;
        old_kv = kv;
        old_policy = policy;
    } else if (policy->type->saving) {
        session_saved(s, piece_key_in(pieces[n - 1]));
    }
    kv_destroy(old_kv);
    attn_policy_destroy(old_policy);
    return code;
}
