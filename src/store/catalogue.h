/* Which pieces and contexts a store folder holds: one SQLite database, catalogue.sqlite, beside the piece files KEY.piece.
 *
 * Any number of processes may use a store at once. Every change of the folder's names (a piece gets its name, a piece is removed) is made under the database's
 * write lock; a process killed at any point leaves a store that opens with everything that was committed. The piece files are the truth: rows that lack their file are dropped, files that
 * lack their row are entered again, and from a damaged database only times and names not written in the pieces are lost.
 *
 * A catalogue belongs to one thread at a time, and not to a child after fork. Errors: IO (folder or database cannot be read or written, disk full, locked for more
 * than 10 s), FORMAT (not a catalogue, damaged), UNSUPPORTED (of a newer quarry), MEMORY. */
#ifndef STORE_CATALOGUE_H
#define STORE_CATALOGUE_H

#include "store/key.h"

enum { CATALOGUE_PARAMS = 256 };

typedef struct catalogue_piece {
    store_key key, parent;         /* parent none: the piece begins a context */
    uint64_t fingerprint;          /* of the model */
    char params[CATALOGUE_PARAMS]; /* what else must be equal for the piece to be of use: policy specification, type of the K|V rows */
    int64_t first, n_tokens;       /* it holds the tokens [first, first + n_tokens), n_tokens > 0 */
    uint64_t token_digest;         /* catalogue_digest of their ids */
    int64_t n_bytes;               /* of the file */
    int64_t created, last_used;    /* microseconds since 1970; set by the catalogue */
} catalogue_piece;

/* XXH3, 64 bits, of token ids as 32-bit little-endian numbers. */
uint64_t catalogue_digest(const int32_t *tokens, int64_t n);

/* What a piece file says of itself, for rebuilding and verifying: fills key, parent, fingerprint, params, first, n_tokens and token_digest of *piece, and
 * may give the names and the model of the context that ends there, as for catalogue_name, in memory from memory_string (else NULL). Errors: FORMAT: not a piece, or a damaged one
 * (without a row it is removed); any other: left alone. */
typedef quarry_code (*catalogue_describe_fn)(const char *path, catalogue_piece *piece, char **names, char **model, void *data,
                                             quarry_error *error);

typedef struct catalogue catalogue;

typedef struct catalogue_params {
    const char *folder;             /* NULL: catalogue_default_folder; made if absent, for this user only */
    catalogue_describe_fn describe; /* NULL: files without a row are left alone */
    void *data;
    quarry_log_fn log; /* is told what was repaired; may be NULL */
    void *log_data;
} catalogue_params;

/* $QUARRY_STORE, else $XDG_CACHE_HOME/quarry/contexts, else ~/.cache/quarry/contexts; free with memory_free. Error ARGUMENT without any of them. */
char *catalogue_default_folder(quarry_error *error);

/* Opens the store, makes it if there is none, and tidies: removes what dead writers left, finishes removals, drops rows without a file and enters files without a
 * row. A damaged database is set aside as catalogue.sqlite.damaged and made anew from the piece files. */
catalogue *catalogue_open(const catalogue_params *params, quarry_error *error);
void catalogue_close(catalogue *c);
const char *catalogue_folder(const catalogue *c);
/* Where the piece is or belongs; free with memory_free. */
char *catalogue_piece_path(const catalogue *c, const store_key *key, quarry_error *error);

/* ---- adding ---- */

/* Commits `file`, a writer of the piece's path that holds all its bytes, and enters the piece, both or neither; size and times of *piece are filled in. If the store has the piece by now (another
 * process was quicker), its file stays and `file` is not committed. The caller closes `file` in any case. Error ARGUMENT if the parent is not in the store (any more). */
quarry_code catalogue_add(catalogue *c, catalogue_piece *piece, file_writer *file, quarry_error *error);

/* Makes the piece the end of a context, or renames the context that ends there. names: of its documents, one a line; model: its name, for people. *id may be NULL. */
quarry_code catalogue_name(catalogue *c, const store_key *end, const char *names, const char *model, int64_t *id, quarry_error *error);

/* ---- finding ---- */

typedef struct catalogue_chain {
    catalogue_piece *pieces; /* [n], from the beginning of the context */
    int64_t n, n_tokens;     /* tokens of all of them */
} catalogue_chain;           /* free with catalogue_chain_free */
void catalogue_chain_free(catalogue_chain *chain);

/* The longest chain of pieces of this model and these params whose tokens (by digest) begin tokens[n]; n = 0 in *chain if there is none. Another process may remove them at any
 * time: open their files and hold them (file_map_hold); one that cannot be opened counts as not found, one that is damaged is to be discarded. */
quarry_code catalogue_find(catalogue *c, uint64_t fingerprint, const char *params, const int32_t *tokens, int64_t n, catalogue_chain *chain,
                           quarry_error *error);
/* The pieces that end in this one. Error ARGUMENT if the store does not have it, FORMAT if the chain is broken. */
quarry_code catalogue_chain_of(catalogue *c, const store_key *end, catalogue_chain *chain, quarry_error *error);
/* The pieces that continue this one, of any model and params; none: those that begin a context. In *chain in order of creation: n_tokens means nothing there. */
quarry_code catalogue_children(catalogue *c, const store_key *parent, catalogue_chain *children, quarry_error *error);
/* The piece and those before it were used now. */
quarry_code catalogue_touch(catalogue *c, const store_key *end, quarry_error *error);

typedef struct catalogue_context {
    int64_t id; /* never used twice */
    store_key end;
    char *names, *model;
    uint64_t fingerprint;
    char params[CATALOGUE_PARAMS];
    int64_t n_tokens, n_pieces;
    int64_t n_bytes;       /* of its files */
    int64_t n_bytes_alone; /* of those that no other context or piece needs: what removing it frees */
    int64_t created, last_used;
} catalogue_context;

typedef struct catalogue_contexts {
    catalogue_context *items; /* [n], the last used first */
    int64_t n;
} catalogue_contexts; /* free with catalogue_contexts_free */
quarry_code catalogue_list(catalogue *c, catalogue_contexts *list, quarry_error *error);
void catalogue_contexts_free(catalogue_contexts *list);

typedef struct catalogue_totals {
    int64_t n_contexts, n_pieces, n_bytes;
} catalogue_totals;
quarry_code catalogue_get_totals(catalogue *c, catalogue_totals *totals, quarry_error *error);

/* ---- removing ---- */

typedef struct catalogue_removed {
    int64_t n_contexts, n_pieces, n_bytes;
} catalogue_removed;

/* Forgets a context and removes the pieces that no other context ends in and no other piece continues. Who has them open keeps them open. Error ARGUMENT
 * if there is none of this id. removed may be NULL. */
quarry_code catalogue_remove(catalogue *c, int64_t id, catalogue_removed *removed, quarry_error *error);
/* Removes a piece that turned out damaged, with all pieces that continue it and the contexts that end in them. OK if it is gone already. */
quarry_code catalogue_discard(catalogue *c, const store_key *key, catalogue_removed *removed, quarry_error *error);
/* Removes the pieces longest unused, each after those that continue it, until the store and `coming` more bytes take at most `bound`; never what somebody holds
 * (file_map_hold), nor `needed` (may be NULL: the piece that the coming one continues) and those before it. *fits (may be NULL): whether they do now. If they cannot, nothing is
 * removed for what comes in vain; with coming 0 as much as possible is. */
quarry_code catalogue_make_room(catalogue *c, int64_t coming, int64_t bound, const store_key *needed, bool *fits,
                                catalogue_removed *removed, quarry_error *error);

/* ---- fingerprints of models ---- */

/* The catalogue as what remembers them (quarry_model_params), while it is open. Failures are told to the log and otherwise mean that it does not know; nothing is remembered of
 * a file that changed in the last 2 s. */
quarry_fingerprints catalogue_fingerprints(catalogue *c);

/* ---- verifying ---- */

/* Called for each disagreement between rows and files with one line that names the file. */
typedef void (*catalogue_report_fn)(const char *line, void *data);
/* Compares every row with its file (size, and what `describe` says) and chain; changes nothing. *n_faults counts the reports. */
quarry_code catalogue_verify(catalogue *c, catalogue_report_fn report, void *data, int64_t *n_faults, quarry_error *error);

#endif
