/* Removing: the rows in one transaction, together with a note of the files that are to go; the files in a second one. A process killed between them leaves the note, and
 * a piece that is stored again takes its key out of it. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "store/catalogue_db.h"

/* Drops the rows of the pieces in `doomed`, and empties it. */
static quarry_code drop_doomed(catalogue *c, catalogue_removed *removed, quarry_error *error)
{
    static const char *const counts[] = {
        "SELECT count(*) FROM context WHERE piece IN doomed",
        "SELECT count(*) FROM piece WHERE key IN doomed",
        "SELECT coalesce(sum(n_bytes), 0) FROM piece WHERE key IN doomed",
    };
    int64_t n[3];
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < 3 && code == QUARRY_OK; i++) code = db_number(c, 0, &n[i], error, counts[i], "");
    if (code == QUARRY_OK)
        code = db_exec(c,
                       "INSERT OR IGNORE INTO removed SELECT key FROM piece WHERE key IN doomed; DELETE FROM context WHERE piece IN doomed;"
                       "DELETE FROM piece WHERE key IN doomed; DELETE FROM doomed",
                       error);
    if (code != QUARRY_OK) return code;
    removed->n_contexts += n[0];
    removed->n_pieces += n[1];
    removed->n_bytes += n[2];
    return QUARRY_OK;
}

quarry_code catalogue_drop(catalogue *c, const store_key *key, catalogue_removed *removed, quarry_error *error)
{
    const quarry_code code =
        db_change(c, error,
                  "WITH RECURSIVE gone(key) AS (VALUES(?1) UNION SELECT piece.key FROM piece JOIN gone ON parent = gone.key)"
                  " INSERT INTO doomed SELECT key FROM gone",
                  "k", key);
    return code == QUARRY_OK ? drop_doomed(c, removed, error) : code;
}

quarry_code catalogue_unlink_removed(catalogue *c, quarry_error *error)
{
    store_key key;
    bool row = false;
    quarry_code code = QUARRY_OK;
    for (;;) {
        sqlite3_stmt *statement = db_query(c, error, "SELECT key FROM removed LIMIT 1", "");
        if (!statement) return error ? error->code : QUARRY_ERROR_IO;
        code = db_step(c, statement, &row, error);
        if (code == QUARRY_OK && row) code = db_key(c, statement, 0, &key, error);
        sqlite3_finalize(statement);
        if (code != QUARRY_OK || !row) return code;
        const char *path = piece_path(c, &key);
        if (unlink(path) != 0 && errno != ENOENT)
            return error_set(error, QUARRY_ERROR_IO, "%s: cannot be removed: %s; it will be tried again", path, strerror(errno));
        if ((code = db_change(c, error, "DELETE FROM removed WHERE key = ?1", "k", &key)) != QUARRY_OK) return code;
    }
}

/* Ends the transaction that dropped rows, and removes their files. What was removed is reported once the rows are gone. */
static quarry_code finish(catalogue *c, quarry_code code, const catalogue_removed *done, catalogue_removed *removed, quarry_error *error)
{
    if (removed) *removed = (catalogue_removed){0};
    if ((code = db_end(c, code, error)) != QUARRY_OK) return code;
    if (removed) *removed = *done;
    if (done->n_pieces == 0) return QUARRY_OK;
    if ((code = db_begin_write(c, error)) != QUARRY_OK) return code;
    return db_end(c, catalogue_unlink_removed(c, error), error);
}

/* Of one row; *found: there was one. */
static quarry_code get_key(catalogue *c, sqlite3_stmt *statement, store_key *key, bool *found, quarry_error *error)
{
    *found = false;
    if (!statement) return error ? error->code : QUARRY_ERROR_IO;
    quarry_code code = db_step(c, statement, found, error);
    if (code == QUARRY_OK && *found) code = db_key(c, statement, 0, key, error);
    sqlite3_finalize(statement);
    return code;
}

/* The piece, and those before it, as long as nothing else needs them. */
static quarry_code drop_unneeded(catalogue *c, store_key key, catalogue_removed *removed, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    while (code == QUARRY_OK && !store_key_none(&key)) {
        int64_t n_needed;
        bool found;
        store_key parent;
        code =
            db_number(c, 0, &n_needed, error,
                      "SELECT (SELECT count(*) FROM piece WHERE parent = ?1) + (SELECT count(*) FROM context WHERE piece = ?1)", "k", &key);
        if (code != QUARRY_OK || n_needed > 0) return code;
        code = get_key(c, db_query(c, error, "SELECT parent FROM piece WHERE key = ?1", "k", &key), &parent, &found, error);
        if (code != QUARRY_OK || !found) return code;
        code = catalogue_drop(c, &key, removed, error);
        key = parent;
    }
    return code;
}

quarry_code catalogue_remove(catalogue *c, int64_t id, catalogue_removed *removed, quarry_error *error)
{
    catalogue_removed done = {0};
    store_key end;
    bool found;
    quarry_code code = db_begin_write(c, error);
    if (code != QUARRY_OK) return code;
    code = get_key(c, db_query(c, error, "SELECT piece FROM context WHERE id = ?1", "i", id), &end, &found, error);
    if (code == QUARRY_OK && !found) code = error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has no context %lld", c->folder, (long long)id);
    if (code == QUARRY_OK) code = db_change(c, error, "DELETE FROM context WHERE id = ?1", "i", id);
    done.n_contexts = 1;
    if (code == QUARRY_OK) code = drop_unneeded(c, end, &done, error);
    return finish(c, code, &done, removed, error);
}

quarry_code catalogue_discard(catalogue *c, const store_key *key, catalogue_removed *removed, quarry_error *error)
{
    catalogue_removed done = {0};
    const quarry_code code = db_begin_write(c, error);
    if (code != QUARRY_OK) return code;
    return finish(c, catalogue_drop(c, key, &done, error), &done, removed, error);
}

/* Leaves go in the order of their last use. A touch reaches all pieces before the one that is used, so that a piece is never older than those behind it. */
static quarry_code evict(catalogue *c, int64_t coming, int64_t bound, bool *fits, catalogue_removed *removed, quarry_error *error)
{
    int64_t n_bytes;
    quarry_code code = db_number(c, 0, &n_bytes, error, "SELECT coalesce(sum(n_bytes), 0) FROM piece", "");
    while (code == QUARRY_OK) {
        store_key key;
        bool found;
        *fits = coming <= bound && n_bytes - removed->n_bytes <= bound - coming;
        if (*fits) break;
        code = get_key(c,
                       db_query(c, error,
                                "SELECT key FROM piece AS p WHERE NOT EXISTS (SELECT 1 FROM piece WHERE parent = p.key) AND key NOT IN busy"
                                " ORDER BY last_used, key LIMIT 1",
                                ""),
                       &key, &found, error);
        if (code != QUARRY_OK || !found) break;
        if (file_is_held(piece_path(c, &key)))
            code = db_change(c, error, "INSERT INTO busy VALUES (?1)", "k", &key);
        else
            code = catalogue_drop(c, &key, removed, error);
    }
    return code == QUARRY_OK ? db_exec(c, "DELETE FROM busy", error) : code; /* on failure the rollback empties it */
}

quarry_code catalogue_make_room(catalogue *c, int64_t coming, int64_t bound, const store_key *needed, bool *fits,
                                catalogue_removed *removed, quarry_error *error)
{
    catalogue_removed done = {0};
    bool enough = false;
    if (removed) *removed = done;
    quarry_code code = db_begin_write(c, error);
    if (code != QUARRY_OK) return code;
    if (needed && !store_key_none(needed)) code = db_change(c, error, "INSERT INTO busy VALUES (?1)", "k", needed);
    if (code == QUARRY_OK) code = evict(c, coming, bound, &enough, &done, error);
    if (fits) *fits = code == QUARRY_OK && enough;
    if (code == QUARRY_OK && !enough && coming > 0) return db_exec(c, "ROLLBACK", error);
    return finish(c, code, &done, removed, error);
}
