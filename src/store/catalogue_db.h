/* Inside the catalogue: its connection, statements with bound values, and steps that several operations share. */
#ifndef STORE_CATALOGUE_DB_H
#define STORE_CATALOGUE_DB_H

#include <sqlite3.h>

#include "store/catalogue.h"

struct catalogue {
    char *folder, *path; /* path: of the database */
    char *piece_path;    /* room for that of any piece, see piece_path */
    sqlite3 *db;
    int lock;     /* catalogue.lock, shared while open: nobody sets the database aside */
    bool fresh;   /* the tables were made by this open */
    bool damaged; /* a statement, or the check when opening, found the database damaged */
    catalogue_describe_fn describe;
    void *data;
    logger log;
};

/* ---- catalogue.c ---- */

/* The path of the piece, valid until the next call. */
const char *piece_path(catalogue *c, const store_key *key);
/* True for the name of a piece file, KEY.piece. */
bool piece_name_parse(const char *name, store_key *key);
/* Now in microseconds, and later than every last_used. Inside a write transaction. */
quarry_code catalogue_now(catalogue *c, int64_t *now, quarry_error *error);
quarry_code catalogue_unknown(const catalogue *c, const store_key *key, quarry_error *error); /* error ARGUMENT: no such piece */

/* ---- catalogue_sql.c ---- */

/* The last failure of SQLite as an error for the user. */
quarry_code db_fail(catalogue *c, quarry_error *error);
quarry_code db_damaged(catalogue *c, const char *how, quarry_error *error); /* error FORMAT, and marks it as such */
quarry_code db_exec(catalogue *c, const char *sql, quarry_error *error);
/* A statement with ?1, ?2, … bound by types: k key, p key that may be none (NULL), i int64_t, t text. NULL on failure. */
sqlite3_stmt *db_query(catalogue *c, quarry_error *error, const char *sql, const char *types, ...);
/* *row: there is one. */
quarry_code db_step(catalogue *c, sqlite3_stmt *statement, bool *row, quarry_error *error);
/* A statement without rows. */
quarry_code db_change(catalogue *c, quarry_error *error, const char *sql, const char *types, ...);
/* The first column of the first row, as a number; otherwise if there is no row. */
quarry_code db_number(catalogue *c, int64_t otherwise, int64_t *out, quarry_error *error, const char *sql, const char *types, ...);

/* A transaction that may write holds the database's write lock from its beginning; a reading one sees one state. */
quarry_code db_begin_write(catalogue *c, quarry_error *error);
quarry_code db_begin_read(catalogue *c, quarry_error *error);
/* Commits if code is OK, else rolls back; returns code, or that of the failed commit. */
quarry_code db_end(catalogue *c, quarry_code code, quarry_error *error);

/* Column names for db_piece. */
#define DB_PIECE "key, parent, fingerprint, params, first, n_tokens, token_digest, n_bytes, created, last_used"
quarry_code db_piece(catalogue *c, sqlite3_stmt *statement, catalogue_piece *piece, quarry_error *error);
quarry_code db_key(catalogue *c, sqlite3_stmt *statement, int column, store_key *key, quarry_error *error);
/* Appends the pieces that the statement yields, and finalises it (NULL: it failed, *error is set). */
quarry_code db_pieces(catalogue *c, sqlite3_stmt *statement, catalogue_chain *pieces, quarry_error *error);

/* ---- catalogue_remove.c ---- */

/* Drops the rows of a piece, of all that continue it and of contexts that end in them; their files are noted in `removed`. Inside a write transaction. */
quarry_code catalogue_drop(catalogue *c, const store_key *key, catalogue_removed *removed, quarry_error *error);
/* Unlinks the files noted in `removed`. Inside a write transaction. */
quarry_code catalogue_unlink_removed(catalogue *c, quarry_error *error);

/* ---- catalogue_tidy.c ---- */

/* Makes the folder and the rows agree. */
quarry_code catalogue_tidy(catalogue *c, quarry_error *error);

#endif
