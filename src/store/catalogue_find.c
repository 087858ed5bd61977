/* Reading the catalogue. */
#include <string.h>

#include "store/catalogue_db.h"

void catalogue_chain_free(catalogue_chain *chain)
{
    memory_free(chain->pieces);
    *chain = (catalogue_chain){0};
}

/* ---- the longest stored prefix ---- */

/* Pieces that match, found breadth first, so that of two ways to the same token the one with fewer pieces is met first. */
typedef struct search {
    catalogue *c;
    catalogue_chain reached;
    int64_t *before; /* [reached.n] index of the parent, -1: begins a context */
} search;

/* Adds the children of reached piece `at` (-1: those that begin a context) whose tokens are those wanted. */
static quarry_code reach(search *s, int64_t at, uint64_t fingerprint, const char *params, const int32_t *tokens, int64_t n,
                         quarry_error *error)
{
    static const char sql[] = "SELECT " DB_PIECE " FROM piece WHERE parent IS ?1 AND fingerprint = ?2 AND params = ?3 AND first = ?4"
                              " AND n_tokens <= ?5 ORDER BY created, key";
    const catalogue_piece *parent = at < 0 ? &(catalogue_piece){0} : &s->reached.pieces[at];
    const int64_t first = parent->first + parent->n_tokens;
    catalogue_chain children = {0};
    quarry_code code = db_pieces(s->c, db_query(s->c, error, sql, "pitii", &parent->key, (int64_t)fingerprint, params, first, n - first),
                                 &children, error);
    for (int64_t i = 0; i < children.n && code == QUARRY_OK; i++) {
        const catalogue_piece *child = &children.pieces[i];
        const int64_t more = s->reached.n + 1;
        if (catalogue_digest(tokens + first, child->n_tokens) != child->token_digest) continue;
        code = memory_grow(&s->reached.pieces, (size_t)more, sizeof *child, "catalogue", error);
        if (code == QUARRY_OK) code = memory_grow(&s->before, (size_t)more, sizeof *s->before, "catalogue", error);
        if (code != QUARRY_OK) break;
        s->reached.pieces[more - 1] = *child;
        s->before[more - 1] = at;
        s->reached.n = more;
    }
    catalogue_chain_free(&children);
    return code;
}

quarry_code catalogue_find(catalogue *c, uint64_t fingerprint, const char *params, const int32_t *tokens, int64_t n, catalogue_chain *chain,
                           quarry_error *error)
{
    search s = {.c = c};
    int64_t best = -1;
    *chain = (catalogue_chain){0};
    quarry_code code = db_begin_read(c, error);
    if (code != QUARRY_OK) return code;
    for (int64_t at = -1; at < s.reached.n && code == QUARRY_OK; at++) {
        if (at >= 0) {
            const int64_t end = s.reached.pieces[at].first + s.reached.pieces[at].n_tokens;
            if (end > chain->n_tokens) {
                chain->n_tokens = end;
                best = at;
            }
        }
        code = reach(&s, at, fingerprint, params, tokens, n, error);
    }
    code = db_end(c, code, error);
    int64_t n_pieces = 0;
    for (int64_t at = best; at >= 0; at = s.before[at]) n_pieces++;
    if (code == QUARRY_OK && n_pieces) {
        chain->pieces = memory_alloc((size_t)n_pieces, sizeof *chain->pieces, "catalogue", error);
        if (!chain->pieces) code = QUARRY_ERROR_MEMORY;
    }
    if (code == QUARRY_OK) {
        chain->n = n_pieces;
        for (int64_t at = best; at >= 0; at = s.before[at]) chain->pieces[--n_pieces] = s.reached.pieces[at];
    } else {
        chain->n_tokens = 0;
    }
    memory_free(s.before);
    catalogue_chain_free(&s.reached);
    return code;
}

/* ---- chains ---- */

static void reverse(catalogue_chain *chain)
{
    for (int64_t i = 0, j = chain->n - 1; i < j; i++, j--) {
        const catalogue_piece piece = chain->pieces[i];
        chain->pieces[i] = chain->pieces[j];
        chain->pieces[j] = piece;
    }
}

/* From the end to the beginning; `first` falls with every step, so that a damaged row cannot lead in circles. */
static quarry_code walk_back(catalogue *c, store_key key, catalogue_chain *chain, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    while (code == QUARRY_OK && !store_key_none(&key)) {
        const int64_t n = chain->n;
        code = db_pieces(c, db_query(c, error, "SELECT " DB_PIECE " FROM piece WHERE key = ?1", "k", &key), chain, error);
        if (code != QUARRY_OK) break;
        if (chain->n == n) return catalogue_unknown(c, &key, error);
        const catalogue_piece *p = &chain->pieces[n], *next = n ? &chain->pieces[n - 1] : NULL;
        if ((next && (p->first + p->n_tokens != next->first || p->fingerprint != next->fingerprint)) ||
            store_key_none(&p->parent) != (p->first == 0)) {
            char text[STORE_KEY_CHARS];
            store_key_text(&key, text);
            return error_set(error, QUARRY_ERROR_FORMAT, "%s: piece %s does not fit the one that continues it", c->path, text);
        }
        key = p->parent;
    }
    return code;
}

quarry_code catalogue_chain_of(catalogue *c, const store_key *end, catalogue_chain *chain, quarry_error *error)
{
    *chain = (catalogue_chain){0};
    quarry_code code = db_begin_read(c, error);
    if (code != QUARRY_OK) return code;
    code = store_key_none(end) ? catalogue_unknown(c, end, error) : walk_back(c, *end, chain, error);
    code = db_end(c, code, error);
    if (code == QUARRY_OK)
        reverse(chain);
    else
        catalogue_chain_free(chain);
    return code;
}

quarry_code catalogue_children(catalogue *c, const store_key *parent, catalogue_chain *children, quarry_error *error)
{
    *children = (catalogue_chain){0};
    sqlite3_stmt *statement = db_query(c, error, "SELECT " DB_PIECE " FROM piece WHERE parent IS ?1 ORDER BY created, key", "p", parent);
    const quarry_code code = db_pieces(c, statement, children, error);
    if (code != QUARRY_OK) catalogue_chain_free(children);
    return code;
}

quarry_code catalogue_touch(catalogue *c, const store_key *end, quarry_error *error)
{
    int64_t now;
    quarry_code code =
        db_exec(c, "PRAGMA synchronous = NORMAL", error); /* a use forgotten in a power failure is no harm, waiting for the disk is */
    if (code == QUARRY_OK && (code = db_begin_write(c, error)) == QUARRY_OK) {
        code = catalogue_now(c, &now, error);
        if (code == QUARRY_OK)
            code = db_change(
                c, error,
                "WITH RECURSIVE used(key) AS (VALUES(?1) UNION SELECT parent FROM piece JOIN used USING (key) WHERE parent IS NOT NULL)"
                " UPDATE piece SET last_used = ?2 WHERE key IN used",
                "ki", end, now);
        code = db_end(c, code, error);
    }
    const quarry_code after = db_exec(c, "PRAGMA synchronous = FULL", code == QUARRY_OK ? error : NULL);
    return code == QUARRY_OK ? after : code;
}

/* ---- listing ---- */

void catalogue_contexts_free(catalogue_contexts *list)
{
    for (int64_t i = 0; i < list->n; i++) {
        memory_free(list->items[i].names);
        memory_free(list->items[i].model);
    }
    memory_free(list->items);
    *list = (catalogue_contexts){0};
}

static char *column_text(sqlite3_stmt *statement, int column, quarry_error *error)
{
    const char *text = (const char *)sqlite3_column_text(statement, column);
    return memory_string(text ? text : "", text ? strlen(text) : 0, error);
}

/* A row of id, piece, names, model, created. */
static quarry_code take_context(catalogue *c, sqlite3_stmt *statement, catalogue_contexts *list, quarry_error *error)
{
    quarry_code code = memory_grow(&list->items, (size_t)list->n + 1, sizeof *list->items, "catalogue", error);
    if (code != QUARRY_OK) return code;
    catalogue_context *x = &list->items[list->n++];
    *x = (catalogue_context){.id = sqlite3_column_int64(statement, 0), .created = sqlite3_column_int64(statement, 4)};
    x->names = column_text(statement, 2, error);
    x->model = column_text(statement, 3, error);
    return x->names && x->model ? db_key(c, statement, 1, &x->end, error) : QUARRY_ERROR_MEMORY;
}

/* What the pieces say of a context. */
static quarry_code measure_context(catalogue *c, catalogue_context *x, quarry_error *error)
{
    catalogue_chain chain = {0};
    bool alone = true;
    quarry_code code = walk_back(c, x->end, &chain, error);
    for (int64_t i = 0; i < chain.n && code == QUARRY_OK; i++) {
        const catalogue_piece *p = &chain.pieces[i];
        int64_t n_others;
        x->n_bytes += p->n_bytes;
        if (!alone) continue;
        code = db_number(c, 0, &n_others, error,
                         "SELECT (SELECT count(*) FROM piece WHERE parent = ?1) + (SELECT count(*) FROM context WHERE piece = ?1)", "k",
                         &p->key);
        alone = n_others == 1; /* the piece behind it, or the context itself */
        if (alone) x->n_bytes_alone += p->n_bytes;
    }
    if (code == QUARRY_OK) {
        x->fingerprint = chain.pieces[0].fingerprint;
        strcpy(x->params, chain.pieces[0].params);
        x->n_tokens = chain.n_tokens;
        x->n_pieces = chain.n;
        x->last_used = chain.pieces[0].last_used;
    }
    catalogue_chain_free(&chain);
    return code;
}

quarry_code catalogue_list(catalogue *c, catalogue_contexts *list, quarry_error *error)
{
    bool row = true;
    *list = (catalogue_contexts){0};
    quarry_code code = db_begin_read(c, error);
    if (code != QUARRY_OK) return code;
    sqlite3_stmt *statement =
        db_query(c, error,
                 "SELECT id, context.piece, names, model, context.created FROM context JOIN piece ON piece.key = context.piece"
                 " ORDER BY last_used DESC, id DESC",
                 "");
    if (!statement) code = error ? error->code : QUARRY_ERROR_IO;
    while (code == QUARRY_OK && (code = db_step(c, statement, &row, error)) == QUARRY_OK && row)
        code = take_context(c, statement, list, error);
    sqlite3_finalize(statement);
    for (int64_t i = 0; i < list->n && code == QUARRY_OK; i++) code = measure_context(c, &list->items[i], error);
    code = db_end(c, code, error);
    if (code != QUARRY_OK) catalogue_contexts_free(list);
    return code;
}

quarry_code catalogue_get_totals(catalogue *c, catalogue_totals *totals, quarry_error *error)
{
    quarry_code code = db_begin_read(c, error);
    if (code != QUARRY_OK) return code;
    code = db_number(c, 0, &totals->n_contexts, error, "SELECT count(*) FROM context", "");
    if (code == QUARRY_OK) code = db_number(c, 0, &totals->n_pieces, error, "SELECT count(*) FROM piece", "");
    if (code == QUARRY_OK) code = db_number(c, 0, &totals->n_bytes, error, "SELECT coalesce(sum(n_bytes), 0) FROM piece", "");
    return db_end(c, code, error);
}
