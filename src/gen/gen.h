/* gen: sessions, sampling, stop conditions. The public quarry_session is this room's type; below is what evaluation and benchmarks need beyond the public header. */
#ifndef GEN_GEN_H
#define GEN_GEN_H

#include "base/base.h"
#include "model/model.h"
#include "store/store.h"

/* ---- sessions with several policies: a document is read once and asked under each ---- */

/* As quarry_session_open, with n_policies specs (the first one answers); every policy observes and indexes while the session reads. */
quarry_session *session_open_policies(quarry_model *model, const quarry_session_params *params, const char *const *specs, int n_policies,
                                      quarry_error *error);
/* A fork that keeps only policy i, which answers in it. */
quarry_session *session_fork_policy(const quarry_session *session, int i, quarry_error *error);
/* Lets a session grow past the length the model was trained for (benchmarks: speed means something there, answers do not): set n_ctx in params; this only lifts the check. */
void session_allow_beyond_training(quarry_session *session);

/* Feeds tokens (sparse) and copies the logits after each of them to logits[n][n_vocab]: teacher forcing. */
quarry_code session_feed_logits(quarry_session *session, const int32_t *tokens, int64_t n, float *logits, quarry_error *error);
/* Whom the rows of tokens fed or generated from now on tell what they read; NULL: nobody. Lives as long as the session or until the next call; a fork has none. quarry_session_cite
 * sets its own. */
void session_set_observer(quarry_session *session, const attn_observer *observer);
/* What the sparse tokens (fed and generated) read since the session was opened or forked, in all layers and KV heads. */
attn_cost session_cost(const quarry_session *session);

/* ---- memory.c, estimate.c: what a model and a session take, and whether it fits ---- */

typedef enum memory_part {
    MEMORY_WEIGHTS,
    MEMORY_KV,
    MEMORY_INDEX,
    MEMORY_CODEBOOKS,  /* tables of the index that were learned, and what they are learned from */
    MEMORY_SCRATCH,    /* of forward passes, of the threads, and logits */
    MEMORY_VOCABULARY, /* tokenizer, and the model file's metadata */
    MEMORY_PROGRAM,    /* of the process: code and constants of the program and its libraries */
    MEMORY_PARTS
} memory_part;

extern const char *const memory_part_keys[MEMORY_PARTS], *const memory_part_names[MEMORY_PARTS]; /* of JSON, and for people */

typedef struct session_memory {
    int64_t n_tokens;
    size_t bytes[MEMORY_PARTS];         /* in RAM */
    double large_blocks;                /* of the index, in an estimate (memory_tally.n_large) */
    uint64_t model_file, codebook_file; /* bytes on disk; 0: none */
    uint64_t stored_kv, stored_index;   /* the same of a stored context of so many tokens, in an estimate; 0: it cannot be stored */
} session_memory;

size_t session_memory_sum(const session_memory *memory);
/* What is in RAM now, by the system's page table. Pages that forks share count in each. */
void session_memory_held(const quarry_session *session, session_memory *memory);
/* What a session with these parameters will hold once it has read so many tokens (0: n_ctx of them, or as many as the model was trained for), and the model. */
quarry_code session_memory_estimate(quarry_model *model, const quarry_session_params *params, int64_t n_tokens, session_memory *need,
                                    quarry_error *error);
/* Error MEMORY, saying what would, if n tokens more will not fit: what they take is compared with what the machine, the control groups and ulimit leave now. */
quarry_code session_memory_check(const quarry_session *session, int64_t n, quarry_error *error);

/* quarry_session_read; seal = false: not the end of a text, the index's open segment stays open. */
int session_read(quarry_session *session, const int32_t *tokens, int64_t n, bool seal, const quarry_watch *watch, quarry_error *error);

/* ---- saved contexts: chains of pieces (store/piece.h) ---- */

/* What the piece would be that the session's tokens since the last saved or loaded one make. UNSUPPORTED: its policy can neither save nor take a saved context. */
quarry_code session_subject(const quarry_session *session, piece_subject *subject, quarry_error *error);
bool session_can_save(const quarry_session *session);
/* Appends that piece to `file`; once it is committed, session_saved makes it the one that the next continues. */
quarry_code session_save(quarry_session *session, file_writer *file, const char *about, store_key *key, quarry_error *error);
void session_saved(quarry_session *session, const store_key *key);
/* What the session holds is in the piece at path, which was just saved, and can be taken from there. */
quarry_code session_set_cold(quarry_session *session, const char *path, quarry_error *error);
/* Brings an empty session to the end of a chain pieces[n]; cold: its rows stay in the files until they are asked for, if the session can save. Errors: ARGUMENT: of another model, cache or index; FORMAT: *damaged is the piece that is; CONTEXT. On error nothing has changed. */
quarry_code session_load(quarry_session *session, piece_file *const *pieces, int n, bool cold, store_key *damaged, quarry_error *error);

/* The catalogue of an open store, for who lists and removes. */
catalogue *store_catalogue(const quarry_store *store);
/* Copies a context, piece by piece, into another store. */
quarry_code store_copy(const quarry_store *from, quarry_store *to, const catalogue_context *context, quarry_error *error);

/* ---- sampling ---- */

typedef struct sampler sampler;
/* Copies *params; checks them (error ARGUMENT names the field). */
sampler *sampler_create(const quarry_sampling *params, int64_t n_vocab, quarry_error *error);
void sampler_destroy(sampler *s);
/* The next token for logits[n_vocab]; recent[n_recent]: tokens so far, newest last (repetition penalty). Order as llama.cpp: bias, penalty, top-k, top-p, min-p, temperature, draw. Ties go to the lower id. */
int32_t sampler_next(sampler *s, const float *logits, const int32_t *recent, int64_t n_recent);

/* Holds back text that may be the beginning of a stop string. */
typedef struct stop_matcher stop_matcher;
stop_matcher *stop_matcher_create(const char *const *stop, int n_stop, quarry_error *error);
void stop_matcher_destroy(stop_matcher *m);
/* Takes text[n]; *out (owned by the matcher, valid until the next call) receives what may be shown now. Returns true when a stop string was completed: *out then ends before it. Of several the one
 * completed first counts, and of those completed by the same character the longest. *out is NULL (and *error set) only out of memory. */
bool stop_matcher_push(stop_matcher *m, const char *text, size_t n, const char **out, size_t *n_out, quarry_error *error);
/* What was held back and is no stop string after all. */
void stop_matcher_flush(stop_matcher *m, const char **out, size_t *n_out);

/* ---- calibration ---- */

typedef struct calibrate_result {
    int resumed;    /* heads that were found */
    int capped;     /* heads that took as many iterations as are allowed */
    double average; /* iterations of a head */
} calibrate_result;

/* Makes the codebook file of the policy a2ats for a model: reads the tokens in windows of the trained context, then header->n_random tokens of random UUIDs, densely; takes keys
 * and queries before RoPE; clusters keys under H of the queries, one (layer, KV head) after the other per thread. Set in header: n_centroids, iterations, distance, exact_rope,
 * type, exponent, shrink, seed, n_random, text_digest; the rest is filled in.
 *
 * Finished heads are in PATH.partial, which a later call with the same parameters takes up; statistics are gathered again. PATH appears by renaming, complete and synced.
 * CANCELLED by watch, which is told tokens first and then heads. */
quarry_code calibrate(quarry_model *model, codebook_header *header, const int32_t *tokens, int64_t n_tokens, const char *path,
                      const quarry_watch *watch_tokens, const quarry_watch *watch_heads, calibrate_result *result, quarry_error *error);

#endif
