/* The folder and the rows, brought to agree when the store is opened, and compared when the user asks. */
#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/catalogue_db.h"

static int compare_keys(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(store_key));
}

typedef struct key_list {
    store_key *items;
    int64_t n, capacity;
} key_list;

static quarry_code push(key_list *list, const store_key *key, quarry_error *error)
{
    if (list->n == list->capacity) {
        const int64_t capacity = list->capacity ? 2 * list->capacity : 64;
        const quarry_code code = memory_grow(&list->items, (size_t)capacity, sizeof *key, "catalogue", error);
        if (code != QUARRY_OK) return code;
        list->capacity = capacity;
    }
    list->items[list->n++] = *key;
    return QUARRY_OK;
}

/* KEY.piece.* in the folder, if its writer has ended. */
static void remove_leftover(catalogue *c, const char *name)
{
    store_key key;
    char text[STORE_KEY_CHARS + 6], path[4096];
    snprintf(text, sizeof text, "%.*s", (int)sizeof text - 1, name);
    if (!piece_name_parse(text, &key) || snprintf(path, sizeof path, "%s/%s", c->folder, name) >= (int)sizeof path) return;
    if (file_write_remove_leftover(path)) log_line(&c->log, QUARRY_LOG_INFO, "%s: left by a process that ended early; removed", path);
}

/* The piece files in the folder, sorted; removes what dead writers left. */
static quarry_code scan_folder(catalogue *c, key_list *files, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    DIR *folder = opendir(c->folder);
    if (!folder) return error_set(error, QUARRY_ERROR_IO, "%s: cannot be read: %s", c->folder, strerror(errno));
    while (code == QUARRY_OK) {
        store_key key;
        errno = 0;
        const struct dirent *entry = readdir(folder);
        if (!entry && errno) code = error_set(error, QUARRY_ERROR_IO, "%s: cannot be read: %s", c->folder, strerror(errno));
        if (!entry) break;
        if (piece_name_parse(entry->d_name, &key))
            code = push(files, &key, error);
        else
            remove_leftover(c, entry->d_name);
    }
    closedir(folder);
    if (files->n) qsort(files->items, (size_t)files->n, sizeof *files->items, compare_keys);
    return code;
}

/* In what the folder and the rows differ: files without a row, rows without a file. Both are sorted, by memcmp. */
typedef struct difference {
    key_list orphans, missing;
} difference;

static void difference_free(difference *d)
{
    memory_free(d->orphans.items);
    memory_free(d->missing.items);
    *d = (difference){0};
}

static quarry_code compare_rows(catalogue *c, const key_list *files, difference *d, quarry_error *error)
{
    bool row = true;
    int64_t at = 0;
    sqlite3_stmt *statement = db_query(c, error, "SELECT key FROM piece ORDER BY key", "");
    quarry_code code = statement ? QUARRY_OK : error ? error->code : QUARRY_ERROR_IO;
    while (code == QUARRY_OK && (code = db_step(c, statement, &row, error)) == QUARRY_OK && row) {
        store_key key;
        int order = 1;
        code = db_key(c, statement, 0, &key, error);
        while (code == QUARRY_OK && at < files->n && (order = compare_keys(&files->items[at], &key)) < 0)
            code = push(&d->orphans, &files->items[at++], error);
        if (code != QUARRY_OK) break;
        if (at < files->n && order == 0)
            at++;
        else
            code = push(&d->missing, &key, error);
    }
    sqlite3_finalize(statement);
    while (code == QUARRY_OK && at < files->n) code = push(&d->orphans, &files->items[at++], error);
    return code;
}

static quarry_code compare(catalogue *c, difference *d, quarry_error *error)
{
    key_list files = {0};
    quarry_code code = scan_folder(c, &files, error);
    if (code == QUARRY_OK) code = compare_rows(c, &files, d, error);
    memory_free(files.items);
    return code;
}

/* ---- files without a row ---- */

typedef struct orphan {
    catalogue_piece piece;
    char *names, *model;
    enum { WAITING, ENTERED, LEFT, USELESS } state;
} orphan;

static void describe(catalogue *c, const store_key *key, orphan *o)
{
    quarry_error why = {0};
    struct stat st;
    const char *path = piece_path(c, key);
    quarry_code code = c->describe(path, &o->piece, &o->names, &o->model, c->data, &why);
    const bool other = code == QUARRY_OK && !store_key_same(key, &o->piece.key);
    if (code == QUARRY_OK && stat(path, &st) != 0) code = error_set(&why, QUARRY_ERROR_IO, "%s", strerror(errno));
    const catalogue_piece *p = &o->piece;
    if (code == QUARRY_OK && (p->first < 0 || p->n_tokens < 1 || p->first > (int64_t)1 << 48 || p->n_tokens > (int64_t)1 << 48 ||
                              store_key_none(&p->parent) != (p->first == 0) || !memchr(p->params, 0, sizeof p->params)))
        code = error_set(&why, QUARRY_ERROR_FORMAT, "what it says of itself makes no sense");
    o->piece.key = *key;
    if (code == QUARRY_OK && !other) {
        o->piece.n_bytes = st.st_size;
        o->piece.created = o->piece.last_used = (int64_t)st.st_mtim.tv_sec * 1000000 + st.st_mtim.tv_nsec / 1000;
        return;
    }
    o->state = code == QUARRY_ERROR_FORMAT ? USELESS : LEFT;
    log_line(&c->log, QUARRY_LOG_WARN, "%s: %s", path, other ? "is another piece than its name says; left alone" : why.message);
}

static quarry_code enter_orphan(catalogue *c, const orphan *o, quarry_error *error)
{
    const catalogue_piece *p = &o->piece;
    quarry_code code = db_change(c, error, "INSERT INTO piece(" DB_PIECE ") VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)", "kpitiiiiii",
                                 &p->key, &p->parent, (int64_t)p->fingerprint, p->params, p->first, p->n_tokens, (int64_t)p->token_digest,
                                 p->n_bytes, p->created, p->last_used);
    if (code == QUARRY_OK && o->names)
        code = db_change(c, error, "INSERT INTO context(piece, names, model, created) VALUES (?1, ?2, ?3, ?4)", "ktti", &p->key, o->names,
                         o->model ? o->model : "", p->created);
    if (code == QUARRY_OK) log_line(&c->log, QUARRY_LOG_INFO, "%s: entered again", piece_path(c, &p->key));
    return code;
}

/* *ready: the parent has its row, or there is none; *hopeless: it never will. */
static quarry_code look_for_parent(catalogue *c, const orphan *orphans, int64_t n, const store_key *parent, bool *ready, bool *hopeless,
                                   quarry_error *error)
{
    int64_t n_rows = 0;
    quarry_code code = QUARRY_OK;
    *ready = store_key_none(parent);
    *hopeless = false;
    if (*ready) return code;
    code = db_number(c, 0, &n_rows, error, "SELECT count(*) FROM piece WHERE key = ?1", "k", parent);
    *ready = n_rows > 0;
    *hopeless = !*ready;
    for (int64_t i = 0; i < n && *hopeless; i++)
        if (store_key_same(&orphans[i].piece.key, parent) && orphans[i].state != USELESS) *hopeless = false;
    return code;
}

/* Parents before children, until nothing changes. What waits for a file that was left alone is left alone too. */
static quarry_code enter_orphans(catalogue *c, orphan *orphans, int64_t n, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (bool changed = true; changed && code == QUARRY_OK;) {
        changed = false;
        for (int64_t i = 0; i < n && code == QUARRY_OK; i++) {
            bool ready, hopeless;
            if (orphans[i].state != WAITING) continue;
            code = look_for_parent(c, orphans, n, &orphans[i].piece.parent, &ready, &hopeless, error);
            if (code == QUARRY_OK && ready) code = enter_orphan(c, &orphans[i], error);
            if (code == QUARRY_OK && (ready || hopeless)) {
                orphans[i].state = ready ? ENTERED : USELESS;
                changed = true;
            }
        }
    }
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++) {
        if (orphans[i].state != USELESS) continue;
        const char *path = piece_path(c, &orphans[i].piece.key);
        if (unlink(path) == 0) log_line(&c->log, QUARRY_LOG_WARN, "%s: is of no use, damaged or without what it continues; removed", path);
    }
    return code;
}

static quarry_code take_orphans(catalogue *c, const key_list *keys, quarry_error *error)
{
    if (!c->describe || keys->n == 0) return QUARRY_OK;
    orphan *orphans = memory_zero((size_t)keys->n, sizeof *orphans, "catalogue", error);
    if (!orphans) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < keys->n; i++) describe(c, &keys->items[i], &orphans[i]);
    const quarry_code code = enter_orphans(c, orphans, keys->n, error);
    for (int64_t i = 0; i < keys->n; i++) {
        memory_free(orphans[i].names);
        memory_free(orphans[i].model);
    }
    memory_free(orphans);
    return code;
}

/* ---- when opening ---- */

/* Rows whose file somebody took away, and all that continue them. */
static quarry_code drop_missing(catalogue *c, const key_list *keys, quarry_error *error)
{
    catalogue_removed removed = {0};
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; i < keys->n && code == QUARRY_OK; i++) {
        log_line(&c->log, QUARRY_LOG_WARN, "%s: is gone; what needs it is forgotten", piece_path(c, &keys->items[i]));
        code = catalogue_drop(c, &keys->items[i], &removed, error);
    }
    return code;
}

/* The store works without those that cannot be removed now. */
static void unlink_removed(catalogue *c)
{
    quarry_error why = {0};
    if (catalogue_unlink_removed(c, &why) != QUARRY_OK) log_line(&c->log, QUARRY_LOG_WARN, "%s", why.message);
}

/* Under the write lock, where every difference is one that a dead process or another program left. */
static quarry_code tidy(catalogue *c, quarry_error *error)
{
    difference d = {0};
    unlink_removed(c); /* before they count as files without a row */
    quarry_code code = compare(c, &d, error);
    if (code == QUARRY_OK) code = drop_missing(c, &d.missing, error);
    if (code == QUARRY_OK) unlink_removed(c);
    if (code == QUARRY_OK) code = take_orphans(c, &d.orphans, error);
    difference_free(&d);
    if (code != QUARRY_OK || !c->fresh) return code;
    return db_exec(c, /* names that no file knows: one context per chain, so that all can be listed and removed */
                   "INSERT OR IGNORE INTO context(piece, names, model, created) SELECT key, '', '', created FROM piece AS p"
                   " WHERE NOT EXISTS (SELECT 1 FROM piece WHERE parent = p.key)",
                   error);
}

quarry_code catalogue_tidy(catalogue *c, quarry_error *error)
{
    difference d = {0};
    int64_t n_removed;
    quarry_code code = compare(c, &d, error);
    if (code == QUARRY_OK) code = db_number(c, 0, &n_removed, error, "SELECT count(*) FROM removed", "");
    const bool agree = code == QUARRY_OK && n_removed == 0 && d.missing.n == 0 && (d.orphans.n == 0 || !c->describe);
    difference_free(&d);
    if (code != QUARRY_OK || agree) return code; /* the common case takes no lock */
    return (code = db_begin_write(c, error)) == QUARRY_OK ? db_end(c, tidy(c, error), error) : code;
}

/* ---- verifying ---- */

typedef struct verification {
    catalogue *c;
    catalogue_report_fn report;
    void *data;
    int64_t n_faults;
} verification;

static void fault(verification *v, const store_key *key, const char *format, ...) __attribute__((format(printf, 3, 4)));
static void fault(verification *v, const store_key *key, const char *format, ...)
{
    char line[1024];
    va_list args;
    const char *path = piece_path(v->c, key);
    const size_t n = (size_t)snprintf(line, sizeof line / 2, "%s: ", path);
    const size_t at = n < sizeof line / 2 ? n : sizeof line / 2 - 1;
    va_start(args, format);
    vsnprintf(line + at, sizeof line - at, format, args);
    va_end(args);
    v->n_faults++;
    if (v->report) v->report(line, v->data);
}

/* What the file says against its row. A file may be removed by another process while this one looks. */
static void verify_file(verification *v, const catalogue_piece *row)
{
    catalogue *c = v->c;
    catalogue_piece piece = {0};
    quarry_error why = {0};
    struct stat st;
    char *names = NULL, *model = NULL;
    const char *path = piece_path(c, &row->key);
    if (stat(path, &st) != 0) {
        fault(v, &row->key, "cannot be opened: %s", strerror(errno));
        return;
    }
    if (st.st_size != row->n_bytes)
        fault(v, &row->key, "has %lld bytes, the catalogue says %lld", (long long)st.st_size, (long long)row->n_bytes);
    if (!c->describe) return;
    const quarry_code code = c->describe(path, &piece, &names, &model, c->data, &why);
    memory_free(names);
    memory_free(model);
    if (code != QUARRY_OK)
        fault(v, &row->key, "%s", why.message);
    else if (!store_key_same(&piece.key, &row->key) || !store_key_same(&piece.parent, &row->parent) ||
             piece.fingerprint != row->fingerprint || strcmp(piece.params, row->params) != 0 || piece.first != row->first ||
             piece.n_tokens != row->n_tokens || piece.token_digest != row->token_digest)
        fault(v, &row->key, "says otherwise than its row in the catalogue");
}

static quarry_code verify_rows(verification *v, const catalogue_chain *rows, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; i < rows->n && code == QUARRY_OK; i++) {
        const catalogue_piece *row = &rows->pieces[i];
        int64_t n_there, n_fitting;
        code = db_number(v->c, 0, &n_there, error, "SELECT count(*) FROM piece WHERE key = ?1", "k", &row->key);
        if (code != QUARRY_OK || n_there == 0) continue; /* removed since */
        verify_file(v, row);
        code = db_number(v->c, 0, &n_fitting, error,
                         "SELECT count(*) FROM piece WHERE key = ?1 AND first + n_tokens = ?2 AND fingerprint = ?3 AND params = ?4", "kiit",
                         &row->parent, row->first, (int64_t)row->fingerprint, row->params);
        if (code == QUARRY_OK && (store_key_none(&row->parent) ? row->first != 0 : n_fitting == 0))
            fault(v, &row->key, "does not fit the piece that it continues");
    }
    return code;
}

quarry_code catalogue_verify(catalogue *c, catalogue_report_fn report, void *data, int64_t *n_faults, quarry_error *error)
{
    verification v = {.c = c, .report = report, .data = data};
    difference d = {0};
    catalogue_chain rows = {0};
    *n_faults = 0;
    quarry_code code = db_begin_write(c, error); /* names change under this lock only */
    if (code != QUARRY_OK) return code;
    code = compare(c, &d, error);
    if (code == QUARRY_OK)
        code = db_pieces(c, db_query(c, error, "SELECT " DB_PIECE " FROM piece ORDER BY created, key", ""), &rows, error);
    code = db_end(c, code, error);
    for (int64_t i = 0; i < d.orphans.n && code == QUARRY_OK; i++) fault(&v, &d.orphans.items[i], "has no row in the catalogue");
    if (code == QUARRY_OK) code = verify_rows(&v, &rows, error);
    difference_free(&d);
    catalogue_chain_free(&rows);
    *n_faults = v.n_faults;
    return code;
}
