/* Reading through the store: what it has of a context is taken from there, the rest is read, and kept. */
#include <stdio.h>
#include <string.h>

#include "gen/session.h"

enum {
    TRIES = 4,          /* at taking a chain of which another process just removed a piece */
    CHECKPOINT = 32768, /* tokens: a longer text is kept in pieces of so many, so that a reading that was cut off goes on */
    LEAST = 64,         /* tokens that make a piece of their own */
    CLOSE_MISS = 256    /* tokens alike from which on it is said where a stored context differs */
};

static const uint64_t usual_bound = UINT64_C(10) << 30;

struct quarry_store {
    catalogue *catalogue;
    uint64_t max_bytes;
};

/* ---- what a piece says of itself ---- */

/* Lines of a piece's about: what a line is of, a space, its text. */
static const char about_model[] = "model ", about_document[] = "document ";

/* The texts of the lines of about that are of `what`, a line each; NULL if there are none, or without memory. */
static char *about_lines(const char *about, const char *what)
{
    char *out = memory_alloc(strlen(about) + 1, 1, "saved context", NULL);
    size_t n = 0;
    for (const char *line = about; out && *line;) {
        const size_t length = strcspn(line, "\n"), skip = strlen(what);
        if (length >= skip && memcmp(line, what, skip) == 0) {
            if (n) out[n++] = '\n';
            memcpy(out + n, line + skip, length - skip);
            n += length - skip;
        }
        line += length + (line[length] != 0);
    }
    if (n) {
        out[n] = 0;
        return out;
    }
    memory_free(out);
    return NULL;
}

static void params_of(const piece_subject *subject, char params[CATALOGUE_PARAMS])
{
    snprintf(params, CATALOGUE_PARAMS, "%s %.200s", subject->kv.type == KV_F16 ? "f16" : "f32", subject->index);
}

static void row_of(const piece_subject *subject, const store_key *key, const int32_t *tokens, catalogue_piece *row)
{
    *row = (catalogue_piece){.key = *key,
                             .parent = subject->parent,
                             .fingerprint = subject->fingerprint,
                             .first = subject->first,
                             .n_tokens = subject->end - subject->first,
                             .token_digest = catalogue_digest(tokens, subject->end - subject->first)};
    params_of(subject, row->params);
}

static quarry_code describe(const char *path, catalogue_piece *row, char **names, char **model, void *data, quarry_error *error)
{
    (void)data;
    quarry_error own;
    piece_file *piece = piece_open(path, error ? error : &own);
    if (!piece) return error ? error->code : own.code;
    row_of(piece_subject_of(piece), piece_key_in(piece), piece_tokens(piece), row);
    *names = about_lines(piece_about(piece), about_document);
    *model = about_lines(piece_about(piece), about_model);
    piece_close(piece);
    return QUARRY_OK;
}

/* ---- the store ---- */

quarry_store *quarry_store_open(const quarry_store_params *params, quarry_error *error)
{
    quarry_store *store = memory_zero(1, sizeof *store, "store", error);
    if (!store) return NULL;
    const catalogue_params open = {.folder = params ? params->folder : NULL,
                                   .describe = describe,
                                   .log = params ? params->log : NULL,
                                   .log_data = params ? params->log_data : NULL};
    store->max_bytes = params && params->max_bytes ? params->max_bytes : usual_bound;
    store->catalogue = catalogue_open(&open, error);
    if (store->catalogue) return store;
    memory_free(store);
    return NULL;
}

void quarry_store_close(quarry_store *store)
{
    if (!store) return;
    catalogue_close(store->catalogue);
    memory_free(store);
}

quarry_fingerprints quarry_store_fingerprints(quarry_store *store)
{
    return catalogue_fingerprints(store->catalogue);
}

catalogue *store_catalogue(const quarry_store *store)
{
    return store->catalogue;
}

/* Copies one file of a store, unless the other has it. */
static quarry_code copy_piece(const quarry_store *from, quarry_store *to, catalogue_piece *piece, quarry_error *error)
{
    enum { STEP = 1 << 20 };
    char *source = catalogue_piece_path(from->catalogue, &piece->key, error),
         *target = catalogue_piece_path(to->catalogue, &piece->key, error);
    uint8_t *bytes = memory_alloc(STEP, 1, "copy", error);
    file_map *in = source ? file_map_open(source, false, error) : NULL;
    file_writer *out = in && target ? file_write_open(target, error) : NULL;
    quarry_code code = !bytes || !source || !target ? QUARRY_ERROR_MEMORY : out ? QUARRY_OK : QUARRY_ERROR_IO;
    for (uint64_t at = 0, n; code == QUARRY_OK && at < file_map_size(in); at += n) {
        n = file_map_size(in) - at < STEP ? file_map_size(in) - at : STEP;
        code = file_map_read(in, at, (size_t)n, bytes, error);
        if (code == QUARRY_OK) code = file_write_append(out, bytes, (size_t)n, error);
    }
    if (code == QUARRY_OK) code = catalogue_add(to->catalogue, piece, out, error);
    file_write_close(out);
    file_map_close(in);
    memory_free(bytes);
    memory_free(source);
    memory_free(target);
    return code;
}

quarry_code store_copy(const quarry_store *from, quarry_store *to, const catalogue_context *context, quarry_error *error)
{
    catalogue_chain chain;
    quarry_code code = catalogue_chain_of(from->catalogue, &context->end, &chain, error);
    for (int64_t i = 0; i < chain.n && code == QUARRY_OK; i++) code = copy_piece(from, to, &chain.pieces[i], error);
    if (code == QUARRY_OK) code = catalogue_name(to->catalogue, &context->end, context->names, context->model, NULL, error);
    catalogue_chain_free(&chain);
    return code;
}

/* ---- taking ---- */

static void pieces_close(piece_file **pieces, int64_t n)
{
    for (int64_t i = 0; pieces && i < n; i++) piece_close(pieces[i]);
    memory_free(pieces);
}

/* Loads a chain whose tokens begin tokens[n]. *damaged receives the piece that is. */
static quarry_code take_chain(quarry_session *s, const quarry_store *store, const catalogue_chain *chain, const int32_t *tokens, int64_t n,
                              store_key *damaged, quarry_error *error)
{
    piece_file **pieces = memory_zero((size_t)chain->n, sizeof *pieces, "saved context", error);
    quarry_code code = pieces ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < chain->n && code == QUARRY_OK; i++) {
        char *path = catalogue_piece_path(store->catalogue, &chain->pieces[i].key, error);
        if (!path || !(pieces[i] = piece_open(path, error))) code = path ? error->code : QUARRY_ERROR_MEMORY;
        if (pieces[i]) {
            const piece_subject *subject = piece_subject_of(pieces[i]);
            const size_t bytes = (size_t)(subject->end - subject->first) * sizeof *tokens;
            if (subject->first != chain->pieces[i].first || subject->end - subject->first != chain->pieces[i].n_tokens ||
                memcmp(piece_tokens(pieces[i]), tokens + subject->first, bytes) != 0)
                code = error_set(error, QUARRY_ERROR_FORMAT, "%s: holds other tokens than the catalogue says", path);
        }
        if (code == QUARRY_ERROR_FORMAT) *damaged = chain->pieces[i].key;
        memory_free(path);
    }
    /* What reads on needs all rows: from memory, unless they are not to be there. */
    if (code == QUARRY_OK) code = session_load(s, pieces, (int)chain->n, chain->n_tokens == n || s->params.kv_ram, damaged, error);
    pieces_close(pieces, chain->n);
    return code;
}

/* Takes the longest stored beginning of tokens[n]. What turns out damaged is removed, said, and the next longest is tried. */
static quarry_code take(quarry_session *s, quarry_store *store, const int32_t *tokens, int64_t n, quarry_stored *info, quarry_error *error)
{
    piece_subject subject;
    char params[CATALOGUE_PARAMS];
    quarry_code code = session_subject(s, &subject, error);
    if (code != QUARRY_OK) return code;
    params_of(&subject, params);
    for (int tries = 0;;) {
        catalogue_chain chain;
        store_key damaged = {{0}};
        code = catalogue_find(store->catalogue, subject.fingerprint, params, tokens, n, &chain, error);
        if (code != QUARRY_OK || chain.n == 0) return code;
        quarry_error wrong = {0};
        code = take_chain(s, store, &chain, tokens, n, &damaged, &wrong);
        if (code == QUARRY_OK) {
            info->n_taken = chain.n_tokens;
            for (int64_t i = 0; i < chain.n; i++) info->taken_bytes += (uint64_t)chain.pieces[i].n_bytes;
            catalogue_touch(store->catalogue, &chain.pieces[chain.n - 1].key, NULL); /* only the order of removal depends on it */
        }
        catalogue_chain_free(&chain);
        if (code == QUARRY_ERROR_IO && ++tries < TRIES) continue;
        if (code != QUARRY_ERROR_FORMAT || store_key_none(&damaged)) {
            if (error && code != QUARRY_OK) *error = wrong;
            return code;
        }
        snprintf(info->note, sizeof info->note, "%.400s; it is removed, and its text read again", wrong.message);
        if ((code = catalogue_discard(store->catalogue, &damaged, NULL, error)) != QUARRY_OK) return code;
    }
}

bool quarry_store_remove_damaged(quarry_store *store, const quarry_session *s)
{
    const kv_cold *cold = kv_cold_of(s->kv);
    const piece_file *piece = cold ? tier_damaged(tier_of(cold)) : NULL;
    return piece && catalogue_discard(store->catalogue, piece_key_in(piece), NULL, NULL) == QUARRY_OK;
}

/* ---- why not ---- */

enum { SHOWN = 128 };

/* A token as part of a line: whole characters, none of them control; cut if it is long. */
static const char *token_shown(const quarry_model *m, int32_t token, char out[SHOWN])
{
    const tokenizer *t = model_tokenizer(m);
    detokenizer d = {0};
    size_t n_bytes, n = 0;
    const char *bytes = tokenizer_token_bytes(t, token, &n_bytes);
    if (!bytes || n_bytes > SHOWN - 20) return "...";
    n = detokenizer_push(&d, t, token, out, SHOWN - 4);
    n += detokenizer_finish(&d, out + n, SHOWN - 1 - n);
    out[n] = 0;
    for (char *c = out; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = ' ';
    return out;
}

/* Where the stored pieces that could go on after `taken` tokens differ from tokens[n], if one is nearly what was asked for. */
static void explain(quarry_session *s, quarry_store *store, const int32_t *tokens, int64_t n, quarry_stored *info)
{
    catalogue_chain children = {0};
    const int64_t first = info->n_taken;
    int64_t best = 0;
    int32_t stored = -1;
    bool other_model = false;
    if (catalogue_children(store->catalogue, &s->saved.end, &children, NULL) != QUARRY_OK) return;
    for (int64_t i = 0; i < children.n; i++) {
        char *path = catalogue_piece_path(store->catalogue, &children.pieces[i].key, NULL);
        piece_file *piece = path ? piece_open(path, NULL) : NULL;
        const bool same_model = children.pieces[i].fingerprint == s->policies[0]->shape.fingerprint;
        const int64_t most = children.pieces[i].n_tokens < n - first ? children.pieces[i].n_tokens : n - first;
        int64_t alike = 0;
        while (piece && alike < most && piece_tokens(piece)[alike] == tokens[first + alike]) alike++;
        if (piece && alike > best) {
            best = alike;
            stored = alike < children.pieces[i].n_tokens ? piece_tokens(piece)[alike] : -1;
            other_model = !same_model;
        }
        piece_close(piece);
        memory_free(path);
    }
    catalogue_chain_free(&children);
    if (best < CLOSE_MISS) return;
    char ours[SHOWN], theirs[SHOWN];
    const bool differ = first + best < n && stored >= 0;
    if (other_model)
        snprintf(info->note, sizeof info->note,
                 "a stored context of %lld equal tokens is of another model file, or of another conversion of this one", (long long)best);
    else if (differ)
        snprintf(info->note, sizeof info->note, "a stored context is the same up to token %lld, where it has '%s' instead of '%s'",
                 (long long)(first + best), token_shown(s->model, stored, theirs), token_shown(s->model, tokens[first + best], ours));
    else
        snprintf(info->note, sizeof info->note,
                 "a stored context is the same up to token %lld and ends elsewhere, or its index has other options",
                 (long long)(first + best));
}

/* ---- keeping ---- */

static char *about_make(const quarry_session *s, const char *names)
{
    quarry_model_info model;
    quarry_model_get_info(s->model, &model);
    const size_t size = strlen(model.name) + strlen(model.kernels) + (names ? 10 * strlen(names) : 0) + 256;
    char *about = memory_alloc(size, 1, "saved context", NULL);
    if (!about) return NULL;
    size_t n = (size_t)snprintf(about, size, "%s%s\nwith quarry %s, %s\n", about_model, model.name, quarry_version(), model.kernels);
    while (names && *names) {
        const size_t length = strcspn(names, "\n");
        n += (size_t)snprintf(about + n, size - n, "%s%.*s\n", about_document, (int)length, names);
        names += length + (names[length] != 0);
    }
    return about;
}

static quarry_code keep(quarry_session *s, quarry_store *store, const char *names, quarry_stored *info, quarry_error *error)
{
    char *about = about_make(s, names), *path = NULL;
    const int64_t first = s->saved.n_tokens;
    const size_t row = kv_row_bytes(kv_shape_of(s->kv)->type, kv_shape_of(s->kv)->head_dim);
    const double coming = 1.15 * (double)(s->tokens.n - first) * kv_shape_of(s->kv)->n_layer * kv_shape_of(s->kv)->n_head_kv * (double)row;
    file_writer *file = NULL;
    piece_subject subject;
    catalogue_piece entry;
    store_key key;
    bool fits;
    quarry_code code = about ? session_subject(s, &subject, error) : error_memory(error, "saved context", 0);
    if (code != QUARRY_OK) goto done;
    key = piece_key_of(&subject, s->tokens.ids + first);
    code =
        catalogue_make_room(store->catalogue, (int64_t)coming, (int64_t)store->max_bytes, first ? &s->saved.end : NULL, &fits, NULL, error);
    if (code == QUARRY_OK && !fits)
        code =
            error_set(error, QUARRY_ERROR_ARGUMENT, "the context is not kept: %.0f MB are more than the store has room for", coming / 1e6);
    if (code == QUARRY_OK && !(path = catalogue_piece_path(store->catalogue, &key, error))) code = QUARRY_ERROR_MEMORY;
    if (code == QUARRY_OK && !(file = file_write_open(path, error))) code = QUARRY_ERROR_IO;
    if (code == QUARRY_OK) code = session_save(s, file, about, &key, error);
    if (code != QUARRY_OK) goto done;
    row_of(&subject, &key, s->tokens.ids + first, &entry);
    code = catalogue_add(store->catalogue, &entry, file, error);
    if (code != QUARRY_OK) goto done;
    session_saved(s, &key);
    info->kept_bytes += (uint64_t)entry.n_bytes;
    if (s->params.kv_ram) code = session_set_cold(s, path, error);
done:
    file_write_close(file);
    memory_free(path);
    memory_free(about);
    return code;
}

/* ---- reading ---- */

/* Progress of one stretch as a part of all. */
typedef struct stretch {
    const quarry_watch *watch;
    int64_t done, total;
} stretch;

static bool stretch_progress(int64_t done, int64_t total, void *data)
{
    const stretch *s = data;
    (void)total;
    return s->watch->progress(s->done + done, s->total, s->watch->data);
}

static bool is_one_of(int64_t end, const int64_t *ends, int n_ends)
{
    for (int i = 0; i < n_ends; i++)
        if (ends[i] == end) return true;
    return false;
}

/* Where the stretch that begins at `at` ends: at the end of its document, where a long one is cut, after `most` tokens at the latest. A document is cut at the same places
 * whatever most is, for its blocks begin anew there. */
static int64_t stretch_end(int64_t at, int64_t n, int64_t most, const int64_t *ends, int n_ends, bool *is_end)
{
    const int64_t checkpoint = (at / CHECKPOINT + 1) * CHECKPOINT;
    int64_t first = 0, last = n;
    for (int i = 0; i < n_ends; i++) {
        if (ends[i] <= at && ends[i] > first) first = ends[i];
        if (ends[i] > at && ends[i] < last) last = ends[i];
    }
    int64_t end = last - first > CHECKPOINT && checkpoint < last ? checkpoint : last;
    if (end - at > most) end = at + most;
    *is_end = end == last;
    return end;
}

int quarry_session_read_stored(quarry_session *s, quarry_store *store, const int32_t *tokens, int64_t n, const int64_t *ends, int n_ends,
                               const char *names, const quarry_watch *watch, quarry_stored *info, quarry_error *error)
{
    quarry_stored own;
    quarry_error wrong = {0};
    double start = session_now();
    if (!info) info = &own;
    *info = (quarry_stored){0};
    if (s->tokens.n) return error_set(error, QUARRY_ERROR_ARGUMENT, "the session holds tokens already");
    quarry_code code = session_check_room(s, n, error);
    if (code == QUARRY_OK) code = session_memory_check(s, n, error);
    if (code != QUARRY_OK) return code;
    bool keeping = store && session_can_save(s);
    if (store) code = take(s, store, tokens, n, info, &wrong);
    if (code == QUARRY_ERROR_MEMORY && s->params.kv_ram) { /* what was stored does not fit, nor would all of it */
        if (error) *error = wrong;
        return code;
    }
    if (code != QUARRY_OK) { /* the text can be read without the store */
        snprintf(info->note, sizeof info->note, "%s", wrong.message);
        keeping = false;
        code = QUARRY_OK;
    } else if (store && info->n_taken < n && !*info->note) {
        explain(s, store, tokens, n, info);
    }
    info->take_seconds = session_now() - start;
    stretch part = {watch, 0, n - info->n_taken};
    const quarry_watch inner = {stretch_progress, &part};
    bool cut = info->n_taken > 0 &&
               !is_one_of(info->n_taken, ends, n_ends); /* a text, before the stretch at hand: its end is kept, however short */
    while (s->tokens.n < n && code == QUARRY_OK) {
        bool is_end, is_rest = cut;
        int64_t most;
        if ((code = session_stretch(s, &most, error)) != QUARRY_OK) break;
        const int64_t at = s->tokens.n, end = stretch_end(at, n, most, ends, n_ends, &is_end);
        if ((code = session_fit_kv(s, end - at, error)) != QUARRY_OK) break;
        part.done = at - info->n_taken;
        code = session_read(s, tokens + at, end - at, is_end, watch && watch->progress ? &inner : NULL, error);
        cut = !is_end;
        if (code != QUARRY_OK || !keeping || (s->tokens.n - s->saved.n_tokens < LEAST && !is_rest)) continue;
        start = session_now();
        const int64_t before = s->saved.n_tokens;
        if (keep(s, store, end == n ? names : NULL, info, &wrong) != QUARRY_OK) {
            snprintf(info->note, sizeof info->note, "%s", wrong.message);
            keeping = false;
            if (s->params.kv_ram) code = error_set(error, wrong.code, "%s; with --kv-ram keys and values must be kept", wrong.message);
        }
        info->n_kept += s->saved.n_tokens - before;
        info->keep_seconds += session_now() - start;
    }
    if (code == QUARRY_OK) code = session_fit_kv(s, 0, error);
    if (code == QUARRY_OK && store && s->saved.n_tokens == n) {
        quarry_model_info model;
        quarry_model_get_info(s->model, &model);
        catalogue_name(store->catalogue, &s->saved.end, names ? names : "", model.name, NULL, NULL);
    }
    return code;
}
