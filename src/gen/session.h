/* Shared by the files of this room: the state of a session. */
#ifndef GEN_SESSION_H
#define GEN_SESSION_H

#include "gen/gen.h"

enum {
    SESSION_MAX_POLICIES = 32,
    SESSION_DEFAULT_BATCH = 512,
    EXTEND_WINDOW = 2048 /* local tokens of an extended session, unless the model was trained for less than eight times as many */
};

/* What of a session is saved: the piece it ends in, its tokens, and the index's segments in it. */
typedef struct saved_part {
    store_key end;
    int64_t n_tokens, n_segments;
} saved_part;

struct quarry_session {
    quarry_model *model;
    quarry_session_params params; /* attn is not kept */
    bool beyond_training;
    token_list tokens; /* what kv holds, token by token */
    kv_seq *kv;
    attn_policy *policies[SESSION_MAX_POLICIES]; /* linked by `also` */
    int n_policies;                              /* the first answers */
    forward_scratch *scratch;
    float *logits; /* [n_vocab] */
    bool has_logits;
    quarry_stats stats;
    saved_part saved;
    struct cite_counts *cite;         /* NULL: nobody asked for citations */
    const attn_observer *observer;    /* not the session's; NULL: nobody */
    attn_cost sparse_cost;            /* of all sparse tokens since opened or forked */
    double kv_bytes_sum, kv_full_sum; /* over n_steps generated tokens */
    int64_t n_steps;
};

/* Fills in defaults. Error ARGUMENT. */
quarry_code session_check_params(const quarry_model *model, quarry_session_params *params, quarry_error *error);
/* Of a session with these parameters, checked. */
attn_shape session_attn_shape(const quarry_model *model, const quarry_session_params *params);
/* Feeds one generated token: quarry_session_feed, counted as generation. */
quarry_code session_feed_generated(quarry_session *s, int32_t token, const quarry_watch *watch, quarry_error *error);
/* Tokens that still fit. */
int64_t session_room(const quarry_session *s);
/* Error CONTEXT if n tokens more do not. */
quarry_code session_check_room(const quarry_session *s, int64_t n, quarry_error *error);
/* Divides params.kv_ram: what must be in memory, `coming` tokens more, and the rest for the cache of cold rows. Error MEMORY if it is too little. Without a bound cold rows may all be cached. */
quarry_code session_fit_kv(quarry_session *s, int64_t coming, quarry_error *error);
/* The same after tokens came, if they made it too much. The model is locked, for forks of other threads have the same cache. */
quarry_code session_fit_grown(quarry_session *s, quarry_error *error);
/* Tokens that may be read now before they must be saved and become cold, so that params.kv_ram suffices. Error MEMORY if it does not for anything. */
quarry_code session_stretch(const quarry_session *s, int64_t *n, quarry_error *error);
/* Forgets the tokens from n on, in cache and index. The last ones that remain are the local window again. */
void session_forget_from(quarry_session *s, int64_t n);
/* ---- cite.c: what the tokens held when citing began received of later ones ---- */

/* The question has been fed: what comes now is the answer. cite may be NULL. */
void cite_question_ends(struct cite_counts *cite);
void cite_destroy(struct cite_counts *cite); /* NULL allowed */

/* ---- prompt.c ---- */

/* Tokens [first, end) of a context that are a document. */
typedef struct prompt_span {
    int64_t first, end;
} prompt_span;

/* Finds the documents in tokens[n_context], the context that quarry_prompt_build made of them: spans[n_documents], and for each of their tokens the byte of
 * the document's text where it begins, starts[n_context]. Error ARGUMENT if the tokens are not those documents. */
quarry_code prompt_locate(const quarry_model *model, const int32_t *tokens, int64_t n_context, const quarry_document *documents,
                          int n_documents, prompt_span *spans, size_t *starts, quarry_error *error);

double session_now(void); /* seconds on a clock that only goes forward */

#endif
