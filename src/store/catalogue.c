/* Opening, the schema, and what adds to it. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "store/catalogue_db.h"

enum { WAIT_MS = 10000, SCHEMA = 1, APPLICATION = 0x51727943 /* "QryC" */ };

static const char database_name[] = "/catalogue.sqlite", lock_name[] = "/catalogue.lock", piece_end[] = ".piece";

uint64_t catalogue_digest(const int32_t *tokens, int64_t n)
{
    return XXH3_64bits(tokens, (size_t)n * sizeof *tokens); /* of the bytes in memory: all machines it is built for are little-endian */
}

const char *piece_path(catalogue *c, const store_key *key)
{
    const size_t n = strlen(c->folder);
    c->piece_path[n] = '/';
    store_key_text(key, c->piece_path + n + 1);
    strcpy(c->piece_path + n + STORE_KEY_CHARS, piece_end);
    return c->piece_path;
}

bool piece_name_parse(const char *name, store_key *key)
{
    char text[STORE_KEY_CHARS];
    if (strlen(name) != STORE_KEY_CHARS - 1 + sizeof piece_end - 1 || strcmp(name + STORE_KEY_CHARS - 1, piece_end) != 0) return false;
    memcpy(text, name, STORE_KEY_CHARS - 1);
    text[STORE_KEY_CHARS - 1] = 0;
    return store_key_parse(text, key);
}

char *catalogue_piece_path(const catalogue *c, const store_key *key, quarry_error *error)
{
    const size_t n = strlen(c->folder) + 1 + STORE_KEY_CHARS + sizeof piece_end;
    char text[STORE_KEY_CHARS], *path = memory_alloc(n, 1, "path", error);
    store_key_text(key, text);
    if (path) snprintf(path, n, "%s/%s%s", c->folder, text, piece_end);
    return path;
}

/* ---- the folder ---- */

static char *joined(const char *a, const char *b, quarry_error *error)
{
    const size_t n = strlen(a);
    char *text = memory_alloc(n + strlen(b) + 1, 1, "path", error);
    if (text) strcpy(stpcpy(text, a), b);
    return text;
}

char *catalogue_default_folder(quarry_error *error)
{
    const char *store = getenv("QUARRY_STORE"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (store && *store) return joined(store, "", error);
    if (cache && *cache == '/') return joined(cache, "/quarry/contexts", error); /* its specification has relative paths ignored */
    if (home && *home) return joined(home, "/.cache/quarry/contexts", error);
    error_set(error, QUARRY_ERROR_ARGUMENT,
              "no folder for saved contexts: set QUARRY_STORE to one (HOME and XDG_CACHE_HOME are not set either)");
    return NULL;
}

static quarry_code fail_folder(const catalogue *c, const char *what, quarry_error *error)
{
    const char *hint = errno == ENOSPC || errno == EDQUOT ? "free some space there" : "name a folder that you may write to (QUARRY_STORE)";
    return error_set(error, QUARRY_ERROR_IO, "%s: cannot %s the store of contexts: %s; %s", c->folder, what, strerror(errno), hint);
}

/* With the folders above it; documents are nobody else's business. */
static quarry_code make_folder(const catalogue *c, quarry_error *error)
{
    struct stat st;
    for (char *slash = c->folder;;) {
        slash = strchr(slash + 1, '/');
        if (slash) *slash = 0;
        const bool made = mkdir(c->folder, 0700) == 0 || errno == EEXIST || (slash && (errno == EROFS || errno == EACCES));
        if (slash) *slash = '/';
        if (!made) return fail_folder(c, "make", error);
        if (!slash) break;
    }
    if (stat(c->folder, &st) != 0) return fail_folder(c, "open", error);
    if (!S_ISDIR(st.st_mode)) return error_set(error, QUARRY_ERROR_IO, "%s: is a file, not the folder of a store of contexts", c->folder);
    return QUARRY_OK;
}

static void wait_10_ms(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

/* mode LOCK_SH: the store is in use; LOCK_EX: nobody else has it open. */
static quarry_code lock_store(const catalogue *c, int mode, quarry_error *error)
{
    flock(c->lock, LOCK_UN); /* two processes that hold it shared and both want it alone would wait for each other */
    for (int waited = 0; flock(c->lock, mode | LOCK_NB) != 0; waited += 10) {
        if (errno != EWOULDBLOCK && errno != EINTR) return fail_folder(c, "lock", error);
        if (waited >= WAIT_MS)
            return error_set(error, QUARRY_ERROR_IO, "%s: %s; try again when it has ended", c->folder,
                             mode == LOCK_EX ? "the catalogue is damaged, and another process has the store open"
                                             : "another process is repairing the store");
        wait_10_ms();
    }
    return QUARRY_OK;
}

static quarry_code open_lock(catalogue *c, quarry_error *error)
{
    char *path = joined(c->folder, lock_name, error);
    if (!path) return QUARRY_ERROR_MEMORY;
    c->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    memory_free(path);
    return c->lock < 0 ? fail_folder(c, "write to", error) : lock_store(c, LOCK_SH, error);
}

/* ---- the database ---- */

/* integrity_check looks at the CHECKs too, so that a row that passed it makes sense. */
static const char schema[] =
    "CREATE TABLE piece("
    " key BLOB NOT NULL PRIMARY KEY CHECK (length(key) = 16),"
    " parent BLOB REFERENCES piece(key)," /* NULL: begins a context */
    " fingerprint INTEGER NOT NULL,"      /* of the model */
    " params TEXT NOT NULL CHECK (length(CAST(params AS BLOB)) < 256),"
    " first INTEGER NOT NULL CHECK (first BETWEEN 0 AND 1 << 48),"
    " n_tokens INTEGER NOT NULL CHECK (n_tokens BETWEEN 1 AND 1 << 48),"
    " token_digest INTEGER NOT NULL,"
    " n_bytes INTEGER NOT NULL CHECK (n_bytes BETWEEN 0 AND 1 << 60),"
    " created INTEGER NOT NULL,"  /* microseconds since 1970 */
    " last_used INTEGER NOT NULL" /* the same, no two alike but in rows that were entered again */
    ") STRICT, WITHOUT ROWID;"
    "CREATE INDEX piece_parent ON piece(parent);"
    "CREATE INDEX piece_last_used ON piece(last_used);"
    "CREATE TABLE context("
    " id INTEGER PRIMARY KEY AUTOINCREMENT,"
    " piece BLOB NOT NULL UNIQUE REFERENCES piece(key)," /* its last one */
    " names TEXT NOT NULL,"
    " model TEXT NOT NULL,"
    " created INTEGER NOT NULL"
    ") STRICT;"
    "CREATE TABLE removed(key BLOB NOT NULL PRIMARY KEY CHECK (length(key) = 16)) STRICT, WITHOUT ROWID;" /* no row any more, the file is to go */
    "CREATE TABLE model_file("
    " device INTEGER NOT NULL,"
    " inode INTEGER NOT NULL,"
    " n_bytes INTEGER NOT NULL,"
    " modified INTEGER NOT NULL," /* nanoseconds since 1970 */
    " changed INTEGER NOT NULL,"
    " method INTEGER NOT NULL,"
    " fingerprint INTEGER NOT NULL,"
    " PRIMARY KEY (device, inode)"
    ") STRICT, WITHOUT ROWID;";

static void close_database(catalogue *c)
{
    sqlite3_close(c->db);
    c->db = NULL;
}

/* Changing to WAL needs the database alone for a moment, and does not wait for it. */
static quarry_code use_wal(catalogue *c, quarry_error *error)
{
    for (int waited = 0;; waited += 10) {
        const int result = sqlite3_exec(c->db, "PRAGMA journal_mode = WAL", NULL, NULL, NULL);
        if (result == SQLITE_OK) return QUARRY_OK;
        if (result != SQLITE_BUSY || waited >= WAIT_MS) return db_fail(c, error);
        wait_10_ms();
    }
}

static quarry_code make_schema(catalogue *c, quarry_error *error)
{
    char numbers[96];
    snprintf(numbers, sizeof numbers, "PRAGMA application_id = %d; PRAGMA user_version = %d", APPLICATION, SCHEMA);
    c->fresh = true;
    const quarry_code code = db_exec(c, schema, error);
    return code == QUARRY_OK ? db_exec(c, numbers, error) : code;
}

/* Of an open database: ours, of this version, sound, and made if it is empty. */
static quarry_code check_schema(catalogue *c, quarry_error *error)
{
    static const char *const questions[] = {
        "PRAGMA application_id",
        "PRAGMA user_version",
        "SELECT count(*) FROM sqlite_schema",
        "SELECT count(*) FROM sqlite_schema WHERE name IN ('piece', 'context', 'removed', 'model_file')",
        "SELECT count(*) FROM pragma_integrity_check WHERE integrity_check <> 'ok'",
        "SELECT count(*) FROM pragma_foreign_key_check",
    };
    int64_t answers[6] = {0};
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < 6 && code == QUARRY_OK; i++) code = db_number(c, 0, &answers[i], error, questions[i], "");
    if (code != QUARRY_OK) return code;
    const int64_t version = answers[1];
    const bool empty = answers[2] == 0 && version == 0, whole = answers[3] == 4;
    if (empty) return make_schema(c, error);
    if (answers[0] != APPLICATION && !whole)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: is a database, but no catalogue of contexts; name another folder (QUARRY_STORE)",
                         c->path);
    if (answers[0] == APPLICATION && version > SCHEMA)
        return error_set(
            error, QUARRY_ERROR_UNSUPPORTED,
            "%s: was made by a newer quarry (version %lld, this one knows %d); use that, or name another folder (QUARRY_STORE)", c->path,
            (long long)version, SCHEMA);
    if (answers[0] != APPLICATION || version != SCHEMA || !whole) return db_damaged(c, "its tables are not those of a catalogue", error);
    return answers[4] || answers[5] ? db_damaged(c, "it contradicts itself", error) : QUARRY_OK;
}

static quarry_code open_database(catalogue *c, quarry_error *error)
{
    const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
    c->damaged = false;
    quarry_code code = sqlite3_open_v2(c->path, &c->db, flags, NULL) == SQLITE_OK ? QUARRY_OK : db_fail(c, error);
    if (code == QUARRY_OK) {
        sqlite3_extended_result_codes(c->db, 1);
        sqlite3_busy_timeout(c->db, WAIT_MS);
        sqlite3_db_config(c->db, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
        sqlite3_db_config(c->db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0, NULL);
        code = use_wal(c, error);
    }
    if (code == QUARRY_OK)
        code = db_exec(c,
                       "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;"
                       "CREATE TEMP TABLE doomed(key BLOB PRIMARY KEY); CREATE TEMP TABLE busy(key BLOB PRIMARY KEY)",
                       error);
    if (code == QUARRY_OK && (code = db_begin_write(c, error)) == QUARRY_OK) code = db_end(c, check_schema(c, error), error);
    if (code != QUARRY_OK) close_database(c);
    return code;
}

/* The log first: without it the database is damaged or old, with another database's it would be wrong. */
static quarry_code set_aside(const catalogue *c, quarry_error *error)
{
    static const char *const ends[] = {"-wal", "-shm", ""};
    quarry_code code = QUARRY_OK;
    for (size_t i = 0; i < sizeof ends / sizeof *ends && code == QUARRY_OK; i++) {
        char *from = joined(c->path, ends[i], error), *base = from ? joined(c->path, ".damaged", error) : NULL;
        char *to = base ? joined(base, ends[i], error) : NULL;
        if (!to)
            code = QUARRY_ERROR_MEMORY;
        else if (rename(from, to) != 0 && errno != ENOENT)
            code = fail_folder(c, "repair", error);
        memory_free(from);
        memory_free(base);
        memory_free(to);
    }
    return code;
}

/* Opens, and if the database is damaged looks again when nobody else has the store open: another process may have repaired it by then. */
static quarry_code open_or_repair(catalogue *c, quarry_error *error)
{
    quarry_code code = open_database(c, error);
    if (code == QUARRY_OK || !c->damaged) return code;
    if ((code = lock_store(c, LOCK_EX, error)) != QUARRY_OK) return code;
    code = open_database(c, error);
    if (c->damaged) {
        log_line(&c->log, QUARRY_LOG_WARN, "%s: is damaged; kept as catalogue.sqlite.damaged, and made anew from the pieces", c->path);
        if ((code = set_aside(c, error)) == QUARRY_OK) code = open_database(c, error);
    }
    flock(c->lock, LOCK_SH);
    return code;
}

catalogue *catalogue_open(const catalogue_params *params, quarry_error *error)
{
    catalogue *c = memory_zero(1, sizeof *c, "catalogue", error);
    quarry_code code = c ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    if (!c) return NULL;
    c->lock = -1;
    c->describe = params->describe;
    c->data = params->data;
    c->log = (logger){params->log, params->log_data};
    c->folder = params->folder && *params->folder ? joined(params->folder, "", error) : catalogue_default_folder(error);
    c->path = c->folder ? joined(c->folder, database_name, error) : NULL;
    c->piece_path = c->path ? catalogue_piece_path(c, &(store_key){0}, error) : NULL;
    if (!c->piece_path) code = QUARRY_ERROR_MEMORY;
    if (c->piece_path) strcpy(c->piece_path, c->folder);
    if (code == QUARRY_OK) code = make_folder(c, error);
    if (code == QUARRY_OK) code = open_lock(c, error);
    if (code == QUARRY_OK) code = open_or_repair(c, error);
    if (code == QUARRY_OK) code = catalogue_tidy(c, error);
    if (code == QUARRY_OK) return c;
    catalogue_close(c);
    return NULL;
}

void catalogue_close(catalogue *c)
{
    if (!c) return;
    close_database(c);
    if (c->lock >= 0) close(c->lock);
    memory_free(c->folder);
    memory_free(c->path);
    memory_free(c->piece_path);
    memory_free(c);
}

const char *catalogue_folder(const catalogue *c)
{
    return c->folder;
}

/* ---- adding ---- */

quarry_code catalogue_now(catalogue *c, int64_t *now, quarry_error *error)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return db_number(c, 0, now, error, "SELECT max(?1, 1 + coalesce((SELECT max(last_used) FROM piece), 0))", "i",
                     (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000);
}

quarry_code catalogue_unknown(const catalogue *c, const store_key *key, quarry_error *error)
{
    char text[STORE_KEY_CHARS];
    store_key_text(key, text);
    return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has no piece %s (any more); read the documents again", c->folder, text);
}

/* The row of a piece that exists is written over: it was damaged if it differs. The rename comes last, when nothing but the commit can fail. */
static quarry_code enter(catalogue *c, catalogue_piece *p, file_writer *file, quarry_error *error)
{
    int64_t n_same = 0, now;
    quarry_code code = catalogue_now(c, &now, error);
    if (code == QUARRY_OK) code = db_number(c, 0, &n_same, error, "SELECT count(*) FROM piece WHERE key = ?1", "k", &p->key);
    if (code != QUARRY_OK) return code;
    struct stat st;
    const bool there = n_same && stat(piece_path(c, &p->key), &st) == 0;
    if (there) p->n_bytes = st.st_size; /* it stays; the names of documents in it may be others */
    p->created = p->last_used = now;
    code = db_change(c, error,
                     "INSERT INTO piece(" DB_PIECE ") VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT(key) DO UPDATE SET"
                     " parent = excluded.parent, fingerprint = excluded.fingerprint, params = excluded.params, first = excluded.first,"
                     " n_tokens = excluded.n_tokens, token_digest = excluded.token_digest, n_bytes = excluded.n_bytes,"
                     " last_used = excluded.last_used",
                     "kpitiiiiii", &p->key, &p->parent, (int64_t)p->fingerprint, p->params, p->first, p->n_tokens, (int64_t)p->token_digest,
                     p->n_bytes, p->created, p->last_used);
    if (code != QUARRY_OK && sqlite3_extended_errcode(c->db) == SQLITE_CONSTRAINT_FOREIGNKEY)
        return catalogue_unknown(c, &p->parent, error);
    if (code == QUARRY_OK) code = db_change(c, error, "DELETE FROM removed WHERE key = ?1", "k", &p->key);
    if (code == QUARRY_OK && !there) code = file_write_commit(file, error);
    return code;
}

quarry_code catalogue_add(catalogue *c, catalogue_piece *piece, file_writer *file, quarry_error *error)
{
    quarry_code code;
    if (strcmp(file_write_path(file), piece_path(c, &piece->key)) != 0 || store_key_none(&piece->key) || piece->n_tokens <= 0)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: is not the file of this piece", file_write_path(file));
    if ((code = file_write_sync(file, error)) != QUARRY_OK) return code; /* the slow part, before others have to wait */
    piece->n_bytes = (int64_t)file_write_size(file);
    if ((code = db_begin_write(c, error)) != QUARRY_OK) return code;
    return db_end(c, enter(c, piece, file, error), error);
}

quarry_code catalogue_name(catalogue *c, const store_key *end, const char *names, const char *model, int64_t *id, quarry_error *error)
{
    int64_t now, found = 0;
    quarry_code code = db_begin_write(c, error);
    if (code != QUARRY_OK) return code;
    code = catalogue_now(c, &now, error);
    if (code == QUARRY_OK)
        code = db_change(c, error,
                         "INSERT INTO context(piece, names, model, created) VALUES (?1, ?2, ?3, ?4)"
                         " ON CONFLICT(piece) DO UPDATE SET names = excluded.names, model = excluded.model",
                         "ktti", end, names, model, now);
    if (code != QUARRY_OK && sqlite3_extended_errcode(c->db) == SQLITE_CONSTRAINT_FOREIGNKEY) code = catalogue_unknown(c, end, error);
    if (code == QUARRY_OK) code = db_number(c, 0, &found, error, "SELECT id FROM context WHERE piece = ?1", "k", end);
    if (id) *id = found;
    return db_end(c, code, error);
}
