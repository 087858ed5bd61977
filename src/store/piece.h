/* A piece: one immutable file with what was read of a context from one token on to another (docs/context-format.md).
 *
 * A context is a chain of pieces, each of which names the one before it. A piece holds
 *
 *     its tokens, [first, end)
 *     the segments of the key index that were sealed on the way, and the rows of their tokens: a segment may begin a little before
 *         `first`, for tokens are sealed some time after they were read
 *     the loose rows at its end: of the tokens that no segment holds (the first piece has the sinks among them), and what layers with a
 *         sliding window still see
 *     the state of the index at its end
 *
 * so that the segments of all pieces of a chain and the loose rows of the last one are the whole. Its key is a digest of everything that
 * it depends on: the key before it, the model's fingerprint, the type of the rows, the options that shape the index, its tokens. */
#ifndef STORE_PIECE_H
#define STORE_PIECE_H

#include "attn/attn.h"
#include "store/key.h"

enum { PIECE_INDEX_TEXT = 256, PIECE_ABOUT_TEXT = 1024 };

/* What a piece is of, and what its key is made of. */
typedef struct piece_subject {
    store_key parent; /* none: the context begins with it */
    uint64_t fingerprint;
    kv_shape kv;
    char index[PIECE_INDEX_TEXT]; /* attn_saving.describe, and how documents were read if not with full attention */
    int64_t first, end;           /* tokens */
} piece_subject;

store_key piece_key_of(const piece_subject *subject, const int32_t *tokens /*[end - first]*/);

/* ---- writing ---- */

typedef struct piece_source {
    piece_subject subject;
    const int32_t *tokens; /* [end - first] */
    const char *about;     /* for people: names of documents, the program; lines of UTF-8, cut at PIECE_ABOUT_TEXT - 1 bytes */
    int64_t created;       /* seconds since 1970 */
    const kv_seq *kv;      /* `end` tokens long */
    const attn_policy *policy;
    int64_t first_segment; /* of the policy's: those before it are in earlier pieces */
} piece_source;

/* Appends all of the piece to `file`, which the caller commits. The policy must have `saving`. */
quarry_code piece_write(file_writer *file, const piece_source *source, thread_pool *pool, arena *scratch /*[threads]*/,
                        quarry_error *error);

/* ---- reading ---- */

typedef struct piece_file piece_file;

/* Opens a piece and checks everything but its records and rows. Errors: IO; FORMAT: the file is damaged or no piece; UNSUPPORTED: version. */
piece_file *piece_open(const char *path, quarry_error *error);
void piece_close(piece_file *p);       /* NULL allowed */
piece_file *piece_hold(piece_file *p); /* one more owner, who closes it too */
const piece_subject *piece_subject_of(const piece_file *p);
const store_key *piece_key_in(const piece_file *p);
const int32_t *piece_tokens(const piece_file *p); /* [end - first] */
const char *piece_about(const piece_file *p);
int64_t piece_created(const piece_file *p);
uint64_t piece_bytes(const piece_file *p);

/* Brings an empty cache and an empty policy to the end of a chain pieces[n], each the parent of the next, the first without one. The policy is one of the
 * pieces' `index`, or has no `saving` and stays empty. All checksums are tested on the way; cold: but those of the rows of segments, which stay in the files, held open, until they are asked for (kv/cold.h). On error the cache and the policy must be destroyed; *damaged is the key of the piece that FORMAT is about. */
quarry_code pieces_load(piece_file *const *pieces, int n, bool cold, kv_seq *kv, attn_policy *policy, thread_pool *pool,
                        arena *scratch /*[threads]*/, store_key *damaged, quarry_error *error);
/* The rows that a piece has of the cache and the policy it was written from are cold from now on; before it only cold segments. Error FORMAT also if it is another piece. On
 * error nothing has changed. */
quarry_code piece_set_cold(piece_file *p, kv_seq *kv, attn_policy *policy, arena *scratch, quarry_error *error);
/* Tests every checksum of a piece. */
quarry_code piece_verify(const piece_file *p, thread_pool *pool, arena *scratch /*[threads]*/, quarry_error *error);

#endif
