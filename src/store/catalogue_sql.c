#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "store/catalogue_db.h"

quarry_code db_damaged(catalogue *c, const char *how, quarry_error *error)
{
    c->damaged = true;
    return error_set(error, QUARRY_ERROR_FORMAT, "%s: is damaged (%s); opening the store again repairs it", c->path, how);
}

static quarry_code unwritable(const char *path, const char *why, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_IO, "%s: cannot be opened for writing (%s); name a folder that you may write to (QUARRY_STORE)",
                     path, why);
}

quarry_code db_fail(catalogue *c, quarry_error *error)
{
    const char *path = c->path, *message = sqlite3_errmsg(c->db);
    const int failure = c->db ? sqlite3_system_errno(c->db) : 0;
    switch (sqlite3_errcode(c->db) & 0xff) {
    case SQLITE_NOMEM: return error_memory(error, path, 0);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return error_set(error, QUARRY_ERROR_IO, "%s: another process is changing it and does not end; try again later", path);
    case SQLITE_FULL: return error_set(error, QUARRY_ERROR_IO, "%s: the disk is full; free some space there and try again", path);
    case SQLITE_READONLY:
        if (sqlite3_extended_errcode(c->db) == SQLITE_READONLY && access(path, W_OK) == 0) return db_damaged(c, message, error);
        return unwritable(path, message, error);
    case SQLITE_PERM:
    case SQLITE_AUTH:
    case SQLITE_CANTOPEN: return unwritable(path, message, error);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
    case SQLITE_ERROR: return db_damaged(c, message, error); /* the last: our statements are right, so what they speak of is not there */
    case SQLITE_IOERR:
        return error_set(error, QUARRY_ERROR_IO, "%s: cannot be read or written: %s", path, failure ? strerror(failure) : message);
    default: return error_set(error, QUARRY_ERROR_IO, "%s: %s", path, message);
    }
}

quarry_code db_exec(catalogue *c, const char *sql, quarry_error *error)
{
    return sqlite3_exec(c->db, sql, NULL, NULL, NULL) == SQLITE_OK ? QUARRY_OK : db_fail(c, error);
}

static sqlite3_stmt *query(catalogue *c, quarry_error *error, const char *sql, const char *types, va_list values)
{
    sqlite3_stmt *statement = NULL;
    int result = sqlite3_prepare_v2(c->db, sql, -1, &statement, NULL);
    for (int i = 0; types[i] && result == SQLITE_OK; i++) {
        if (types[i] == 'i') {
            result = sqlite3_bind_int64(statement, i + 1, va_arg(values, int64_t));
        } else if (types[i] == 't') {
            result = sqlite3_bind_text(statement, i + 1, va_arg(values, const char *), -1, SQLITE_TRANSIENT);
        } else {
            const store_key *key = va_arg(values, const store_key *);
            const bool none = types[i] == 'p' && store_key_none(key);
            result = none ? sqlite3_bind_null(statement, i + 1)
                          : sqlite3_bind_blob(statement, i + 1, key->bytes, sizeof key->bytes, SQLITE_TRANSIENT);
        }
    }
    if (result == SQLITE_OK) return statement;
    db_fail(c, error);
    sqlite3_finalize(statement);
    return NULL;
}

sqlite3_stmt *db_query(catalogue *c, quarry_error *error, const char *sql, const char *types, ...)
{
    va_list values;
    va_start(values, types);
    sqlite3_stmt *statement = query(c, error, sql, types, values);
    va_end(values);
    return statement;
}

quarry_code db_step(catalogue *c, sqlite3_stmt *statement, bool *row, quarry_error *error)
{
    const int result = sqlite3_step(statement);
    *row = result == SQLITE_ROW;
    return *row || result == SQLITE_DONE ? QUARRY_OK : db_fail(c, error);
}

/* The code of a statement that could not be made. */
static quarry_code unmade(const quarry_error *error)
{
    return error ? error->code : QUARRY_ERROR_IO;
}

static quarry_code run(catalogue *c, sqlite3_stmt *statement, int64_t *out, quarry_error *error)
{
    bool row;
    if (!statement) return unmade(error);
    const quarry_code code = db_step(c, statement, &row, error);
    if (code == QUARRY_OK && row && out) *out = sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    return code;
}

quarry_code db_change(catalogue *c, quarry_error *error, const char *sql, const char *types, ...)
{
    va_list values;
    va_start(values, types);
    sqlite3_stmt *statement = query(c, error, sql, types, values);
    va_end(values);
    return run(c, statement, NULL, error);
}

quarry_code db_number(catalogue *c, int64_t otherwise, int64_t *out, quarry_error *error, const char *sql, const char *types, ...)
{
    va_list values;
    va_start(values, types);
    sqlite3_stmt *statement = query(c, error, sql, types, values);
    va_end(values);
    *out = otherwise;
    return run(c, statement, out, error);
}

quarry_code db_begin_write(catalogue *c, quarry_error *error)
{
    return db_exec(c, "BEGIN IMMEDIATE", error);
}

quarry_code db_begin_read(catalogue *c, quarry_error *error)
{
    return db_exec(c, "BEGIN", error);
}

quarry_code db_end(catalogue *c, quarry_code code, quarry_error *error)
{
    if (code == QUARRY_OK && (code = db_exec(c, "COMMIT", error)) == QUARRY_OK) return code;
    sqlite3_exec(c->db, "ROLLBACK", NULL, NULL, NULL); /* after some failures SQLite has rolled back by itself, and this one fails */
    return code;
}

quarry_code db_key(catalogue *c, sqlite3_stmt *statement, int column, store_key *key, quarry_error *error)
{
    *key = (store_key){0};
    if (sqlite3_column_type(statement, column) == SQLITE_NULL) return QUARRY_OK;
    const void *bytes = sqlite3_column_blob(statement, column);
    if (!bytes || sqlite3_column_bytes(statement, column) != (int)sizeof key->bytes) return db_damaged(c, "a row makes no sense", error);
    memcpy(key->bytes, bytes, sizeof key->bytes);
    return QUARRY_OK;
}

quarry_code db_piece(catalogue *c, sqlite3_stmt *statement, catalogue_piece *piece, quarry_error *error)
{
    *piece = (catalogue_piece){0};
    quarry_code code = db_key(c, statement, 0, &piece->key, error);
    if (code == QUARRY_OK) code = db_key(c, statement, 1, &piece->parent, error);
    if (code != QUARRY_OK) return code;
    const char *params = (const char *)sqlite3_column_text(statement, 3);
    piece->fingerprint = (uint64_t)sqlite3_column_int64(statement, 2);
    piece->first = sqlite3_column_int64(statement, 4);
    piece->n_tokens = sqlite3_column_int64(statement, 5);
    piece->token_digest = (uint64_t)sqlite3_column_int64(statement, 6);
    piece->n_bytes = sqlite3_column_int64(statement, 7);
    piece->created = sqlite3_column_int64(statement, 8);
    piece->last_used = sqlite3_column_int64(statement, 9);
    if (!params || strlen(params) >= sizeof piece->params || piece->first < 0 || piece->n_tokens <= 0 ||
        piece->first > INT64_MAX - piece->n_tokens || piece->n_bytes < 0)
        return db_damaged(c, "a row makes no sense", error);
    strcpy(piece->params, params);
    return QUARRY_OK;
}

quarry_code db_pieces(catalogue *c, sqlite3_stmt *statement, catalogue_chain *pieces, quarry_error *error)
{
    bool row = true;
    quarry_code code = statement ? QUARRY_OK : unmade(error);
    while (code == QUARRY_OK && (code = db_step(c, statement, &row, error)) == QUARRY_OK && row) {
        /* the room doubles whenever n is a power of two */
        if ((pieces->n & (pieces->n - 1)) == 0)
            code = memory_grow(&pieces->pieces, pieces->n ? 2 * (size_t)pieces->n : 1, sizeof *pieces->pieces, "catalogue", error);
        if (code != QUARRY_OK) break;
        catalogue_piece *piece = &pieces->pieces[pieces->n];
        if ((code = db_piece(c, statement, piece, error)) == QUARRY_OK) {
            pieces->n++;
            pieces->n_tokens += piece->n_tokens;
        }
    }
    sqlite3_finalize(statement);
    return code;
}
