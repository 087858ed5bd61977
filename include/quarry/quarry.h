/* quarry: a long-context language-model engine in which attention is a search.
 *
 * Mental model
 *   A quarry_model is immutable: weights, tokenizer, chat template and one pool of threads. Open it once, share it.
 *   A quarry_session is one timeline of tokens over a model: its KV cache, the search index over that cache, and the
 *   logits that follow the last token. Read a document into it (dense attention), then ask (attention searches).
 *
 *     quarry_model   *model   = quarry_model_open("model.gguf", NULL, &error);
 *     quarry_session *session = quarry_session_open(model, NULL, &error);
 *     quarry_session_read(session, document_tokens, n, NULL, &error);      dense, indexed while it is read
 *     quarry_session_feed(session, question_tokens, m, NULL, &error);      searches what was read
 *     quarry_session_generate(session, &sampling, on_text, data, NULL, &error);
 *
 * Errors: a function that can fail returns 0 or a negative quarry_code (or NULL), and fills *error when error is not NULL.
 *   The library never prints, exits or aborts. After an error the objects passed in are still valid and unchanged unless said.
 * Threads: a model may be used from any thread at once; a session belongs to one thread at a time. Forward passes of the
 *   sessions of one model run one after the other.
 * Ownership: what quarry_X_open returns is freed by quarry_X_close (NULL is allowed). Close the sessions before their model.
 *   Text is UTF-8; invalid UTF-8 is taken as bytes. Strings that are returned live as long as the object they come from.
 */
#ifndef QUARRY_H
#define QUARRY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define QUARRY_API __attribute__((visibility("default")))
#else
#define QUARRY_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define QUARRY_VERSION "0.1.0"

/* The version of the library that is linked, e.g. "0.1.0". */
QUARRY_API const char *quarry_version(void);

/* ---- errors ---------------------------------------------------------------------------------------------------- */

typedef enum quarry_code {
    QUARRY_OK = 0,
    QUARRY_ERROR_ARGUMENT = -1,    /* an argument or option is wrong */
    QUARRY_ERROR_MEMORY = -2,      /* out of memory */
    QUARRY_ERROR_IO = -3,          /* a file cannot be opened, read or written, or changed while in use */
    QUARRY_ERROR_FORMAT = -4,      /* a file is damaged or not what it claims to be */
    QUARRY_ERROR_UNSUPPORTED = -5, /* valid, but not something this version can run */
    QUARRY_ERROR_CONTEXT = -6,     /* more tokens than the context holds */
    QUARRY_ERROR_CANCELLED = -7,   /* a callback asked to stop */
} quarry_code;

/* What went wrong, in one line fit for a user: which file, what was wrong, what to do. */
typedef struct quarry_error {
    quarry_code code;
    char message[512];
} quarry_error;

/* ---- callbacks ------------------------------------------------------------------------------------------------- */

typedef enum quarry_log_level { QUARRY_LOG_ERROR, QUARRY_LOG_WARN, QUARRY_LOG_INFO, QUARRY_LOG_DEBUG } quarry_log_level;

/* Receives one line without a newline. May be called from the thread that called into the library. */
typedef void (*quarry_log_fn)(quarry_log_level level, const char *line, void *data);

/* Called between pieces of work (many times a second): done and total in tokens. Return false to cancel. */
typedef bool (*quarry_progress_fn)(int64_t done, int64_t total, void *data);

/* Receives generated text, whole UTF-8 characters only, not NUL-terminated; called for every token, with n_bytes 0 when there is nothing to show yet. Return false
 * to stop. */
typedef bool (*quarry_text_fn)(const char *text, size_t n_bytes, void *data);

/* Progress and cancellation for a call that takes long. A NULL pointer to it means neither. */
typedef struct quarry_watch {
    quarry_progress_fn progress;
    void *data;
} quarry_watch;

/* ---- model ----------------------------------------------------------------------------------------------------- */

typedef struct quarry_model quarry_model;

/* A file as the system knows it: as long as all of this stays the same, so do its bytes. */
typedef struct quarry_file_identity {
    uint64_t device, inode, n_bytes;
    int64_t modified, changed; /* nanoseconds since 1970 */
    int method;                /* how fingerprints are made; one made otherwise is another */
} quarry_file_identity;

/* What remembers the fingerprints of model files, a hash of their tensors and tokenizers, from one opening to the next: making one takes longer than anything
 * else at opening but the weights themselves. A change within the grain of the system's clock leaves a file's times as they were: do not
 * remember what changed within the last seconds. */
typedef struct quarry_fingerprints {
    bool (*recall)(const quarry_file_identity *file, uint64_t *fingerprint, void *data); /* false: not known */
    void (*remember)(const quarry_file_identity *file, uint64_t fingerprint, void *data);
    void *data;
} quarry_fingerprints;

typedef struct quarry_model_params {
    int n_threads; /* 0: one per available core */
    bool no_mmap;  /* read the file instead of mapping it */
    bool
        mlock; /* keep the weights in RAM, safe from swapping; if the system does not allow it, the log is told, and nothing else changes */
    const char *chat_template; /* NULL: recognise the model's own; otherwise the name of a family, e.g. "chatml", or "plain" for no turns */
    quarry_log_fn log;         /* NULL: silent */
    void *log_data;
    const quarry_fingerprints *fingerprints; /* used while opening only; NULL: the fingerprint is made anew */
} quarry_model_params;

/* Opens a GGUF file. params may be NULL. Errors: IO, FORMAT, UNSUPPORTED (architecture, block type, tokenizer), MEMORY (also, before they are loaded, if the
 * weights will not fit). */
QUARRY_API quarry_model *quarry_model_open(const char *path, const quarry_model_params *params, quarry_error *error);
QUARRY_API void quarry_model_close(quarry_model *model);

typedef struct quarry_model_info {
    const char *name;          /* general.name, "" if absent */
    const char *architecture;  /* "llama", "qwen2", … */
    const char *quantization;  /* the block type that holds most weights, e.g. "Q4_1" */
    const char *chat_template; /* recognised family, "" if none */
    const char *tokenizer;     /* e.g. "gpt2/smollm" */
    const char *kernels;       /* kernels chosen for this processor, e.g. "avx512vnni" */
    int n_layer, n_head, n_head_kv, head_dim, n_embd, n_vocab, n_threads;
    int64_t n_ctx_train; /* tokens of context the model was trained for */
    int64_t n_params;
    size_t weight_bytes;       /* memory the weights take */
    size_t kv_bytes_per_token; /* memory that one more token's K|V rows take: of all layers but those with a sliding window */
} quarry_model_info;

QUARRY_API void quarry_model_get_info(const quarry_model *model, quarry_model_info *info);

/* ---- tokens ---------------------------------------------------------------------------------------------------- */

/* Tokenises n_bytes of text into a new array, freed with quarry_free. with_special: add what the model expects at the start
 * (BOS) and recognise special tokens written out, e.g. "<|im_end|>". Returns the number of tokens, or a negative code. */
QUARRY_API int64_t quarry_tokenize(const quarry_model *model, const char *text, size_t n_bytes, bool with_special, int32_t **tokens,
                                   quarry_error *error);

/* The bytes of one token (may be part of a character). Special tokens give their written form. Lives as long as the model. */
QUARRY_API const char *quarry_token_text(const quarry_model *model, int32_t token, size_t *n_bytes);

/* True for tokens that end an answer (EOS, EOT). */
QUARRY_API bool quarry_token_ends(const quarry_model *model, int32_t token);

QUARRY_API void quarry_free(void *memory);

typedef struct quarry_document {
    const char *name; /* for messages and citations; may be NULL */
    const char *text;
    size_t n_bytes;
} quarry_document;

/* A question over documents through the model's chat template, as two token arrays (freed with quarry_free): `context` is all up to
 * the end of the documents, `question` the rest, so that a document's tokens do not depend on the question, nor on the documents after it. A document's
 * name stands above it as a heading; system may be NULL. Errors: ARGUMENT (no question, a document without text), UNSUPPORTED (no known chat template), MEMORY. */
typedef struct quarry_prompt {
    int32_t *context, *question;
    int64_t n_context, n_question;
    int64_t *ends; /* [n_documents] position in context behind each document */
} quarry_prompt;

QUARRY_API int quarry_prompt_build(const quarry_model *model, const quarry_document *documents, int n_documents, const char *system,
                                   const char *question, quarry_prompt *prompt, quarry_error *error);
QUARRY_API void quarry_prompt_free(quarry_prompt *prompt);

/* ---- session --------------------------------------------------------------------------------------------------- */

typedef struct quarry_session quarry_session;

typedef struct quarry_session_params {
    int64_t n_ctx;    /* most tokens held; 0: what the model was trained for, and no more without extend. Memory is taken as they come. */
    const char *attn; /* retrieval policy, "name[:option=value,…]"; NULL: "ivfpq". See `quarry info --attn`. */
    int n_batch;      /* tokens per forward pass while reading; 0: 512 */
    /* > 0: a document is read in blocks of tokens, each attending to at least so many before it, to the first ones, and to what the policy finds for the block,
     * instead of to everything; 0: with full attention */
    int64_t read_window;
    /* hold more than the model was trained for (n_ctx 0: without limit): what lies before the last read_window tokens (0: 2,048, or an eighth of what the model was
     * trained for if that is less; at most a quarter) is searched, and seen alike whatever its distance, by tokens read and generated. See docs/extend.md */
    bool extend;
    bool kv_f32; /* keep keys and values in f32 instead of f16: twice the memory, for comparing with references */
    /* > 0: bytes of memory that keys and values may take. Documents must be read by quarry_session_read_stored, which keeps them on disk; from there rows are read as they are searched for. 0: no bound */
    size_t kv_ram;
} quarry_session_params;

/* params may be NULL. Errors: ARGUMENT (sizes, the policy or its options), IO and FORMAT (a file that the policy needs), MEMORY. */
QUARRY_API quarry_session *quarry_session_open(quarry_model *model, const quarry_session_params *params, quarry_error *error);
QUARRY_API void quarry_session_close(quarry_session *session);

/* An independent session in the same state; its statistics begin anew, and it notes no citations. Full KV pages and sealed index segments are shared, not copied. */
QUARRY_API quarry_session *quarry_session_fork(const quarry_session *session, quarry_error *error);

/* Appends tokens with full attention (or in blocks: read_window, extend), indexing keys as they leave the local window, and seals the index at the end.
 * Errors CONTEXT if they are too many, and MEMORY if what they take is more than the machine, the control group or ulimit leaves: nothing is read then. After
 * CANCELLED, and MEMORY on the way, the session holds the tokens read so far. */
QUARRY_API int quarry_session_read(quarry_session *session, const int32_t *tokens, int64_t n, const quarry_watch *watch,
                                   quarry_error *error);

/* Appends tokens with the session's retrieval policy (a question, a generated token). Errors as quarry_session_read. */
QUARRY_API int quarry_session_feed(quarry_session *session, const int32_t *tokens, int64_t n, const quarry_watch *watch,
                                   quarry_error *error);

/* Appends one token to each of n different sessions of one model, in one pass that reads the weights once: tokens[n]. The sessions may
 * differ in length, document and policy, not in kv_f32, extend and read_window. Equal to feeding them one by one. On error every
 * session holds the tokens it held; after ARGUMENT and CONTEXT nothing was done, after others the logits are undefined. */
QUARRY_API int quarry_sessions_feed(quarry_session *const *sessions, const int32_t *tokens, int n, quarry_error *error);

/* Logits [n_vocab] for the token after the last one; NULL before anything was read, and after a truncation or an error in the midst of work until the next read
 * or feed. Valid until the next call on the session. */
QUARRY_API const float *quarry_session_logits(const quarry_session *session);

/* Number of tokens held, and the tokens themselves [length]. */
QUARRY_API int64_t quarry_session_length(const quarry_session *session);
QUARRY_API const int32_t *quarry_session_tokens(const quarry_session *session);

/* Keeps the first n_tokens and forgets the rest; there are no logits until the next read or feed. Error ARGUMENT if layers with a sliding window no longer
 * hold what the next token would see (at least 512 tokens can be taken back), or of a context that came from a store, or was kept there with kv_ram, a part would be cut off.
 * All tokens can always be forgotten. */
QUARRY_API int quarry_session_truncate(quarry_session *session, int64_t n_tokens, quarry_error *error);

/* Length of the longest common prefix of the session's tokens and the given ones. */
QUARRY_API int64_t quarry_session_common_prefix(const quarry_session *session, const int32_t *tokens, int64_t n);

typedef struct quarry_sampling {
    float temperature;    /* <= 0: greedy */
    int top_k;            /* <= 0: off */
    float top_p, min_p;   /* 1 and 0: off */
    float repeat_penalty; /* 1: off */
    int repeat_last_n;    /* tokens the penalty looks back; < 0: all */
    uint64_t seed;
    int64_t max_tokens;      /* < 0: until the context is full */
    const char *const *stop; /* stop strings, not part of the answer */
    int n_stop;
    const int32_t *bias_tokens; /* logit bias: bias_values[i] is added to the logit of bias_tokens[i] */
    const float *bias_values;
    int n_bias;
    bool ignore_eos;
} quarry_sampling;

/* Defaults: greedy, repeat_penalty 1, max_tokens -1. */
QUARRY_API void quarry_sampling_default(quarry_sampling *sampling);

typedef enum quarry_stop_reason {
    QUARRY_STOP_END,     /* the model ended its answer */
    QUARRY_STOP_STRING,  /* a stop string */
    QUARRY_STOP_LENGTH,  /* max_tokens */
    QUARRY_STOP_CONTEXT, /* the context is full */
    QUARRY_STOP_CALLBACK /* on_text returned false */
} quarry_stop_reason;

/* Generates after the last token, streaming text. Tokens generated become part of the session, also before an error. Returns 0 or a negative code;
 * *reason (may be NULL) tells why it stopped. Errors: ARGUMENT (no logits to go on from, sampling parameters), MEMORY. */
QUARRY_API int quarry_session_generate(quarry_session *session, const quarry_sampling *sampling, quarry_text_fn on_text, void *data,
                                       quarry_stop_reason *reason, quarry_error *error);

/* ---- stored contexts: what was read once is not read again -------------------------------------------------------- */

/* A folder of contexts that were read, of any models. Any number of processes may use it at once; a store object belongs to one thread at a time. */
typedef struct quarry_store quarry_store;

typedef struct quarry_store_params {
    const char *folder; /* NULL: $QUARRY_STORE, else quarry/contexts in the user's cache folder; made if absent, for this user only */
    uint64_t max_bytes; /* what its files may take: the longest unused are removed first; 0: 10 GiB */
    quarry_log_fn log;  /* is told what was repaired; may be NULL */
    void *log_data;
} quarry_store_params;

/* params may be NULL. Errors: IO, FORMAT, UNSUPPORTED (made by a newer version), MEMORY. */
QUARRY_API quarry_store *quarry_store_open(const quarry_store_params *params, quarry_error *error);
QUARRY_API void quarry_store_close(quarry_store *store);

/* The store as what remembers fingerprints, for quarry_model_params, while it is open. */
QUARRY_API quarry_fingerprints quarry_store_fingerprints(quarry_store *store);

typedef struct quarry_stored {
    int64_t n_taken; /* tokens that came from the store instead of being read */
    int64_t n_kept;  /* tokens that the store has now and had not before */
    double take_seconds, keep_seconds;
    uint64_t taken_bytes, kept_bytes; /* of files: what was taken from, what was written */
    char note[512]; /* one line: why a stored context that is nearly the same was not taken, or why this one is not kept; else "" */
} quarry_stored;

/* Reads tokens[n] into an empty session as quarry_session_read does, but takes the longest beginning that the store holds from there, if its token ids, the
 * model and the index are exactly these, and keeps what it reads. ends[n_ends], ascending: where documents end; so far they can be taken again when others follow. names: of
 * the documents, a line each, for lists; may be NULL. store NULL: only reads. A store that fails is told in info->note (info may be NULL) and does not keep the text from being read. */
QUARRY_API int quarry_session_read_stored(quarry_session *session, quarry_store *store, const int32_t *tokens, int64_t n,
                                          const int64_t *ends, int n_ends, const char *names, const quarry_watch *watch,
                                          quarry_stored *info, quarry_error *error);

/* After FORMAT of a feed or an answer, whose rows come from the store as they are needed: removes the file that was found damaged; true if it did. The session is of no use then but to be closed; its text must be
 * read again. */
QUARRY_API bool quarry_store_remove_damaged(quarry_store *store, const quarry_session *session);

/* ---- citations ------------------------------------------------------------------------------------------------- */

/* A passage of a document that the answer was written from: whole sentences. */
typedef struct quarry_citation {
    int document;                  /* index into the documents given */
    size_t first_byte, end_byte;   /* in its text, without white space at the ends */
    int64_t first_line, last_line; /* counted from 1 */
    double share;                  /* 0 to 1 of the attention that the answer paid to all documents; see docs/cite.md for what counts */
} quarry_citation;

/* Begins to note what the session attends to of the tokens it holds now (a prompt's context), and forgets what it noted before. The next call of
 * quarry_session_feed is taken as the question; what is fed or generated after it is the answer. Costs 16 bytes per token held. */
QUARRY_API int quarry_session_cite(quarry_session *session, quarry_error *error);

/* The passages that the answer was written from, largest share first, at most max_citations (those with less than 1 % are left out), in a new array,
 * freed with quarry_free. documents: those that the context was built from. Returns their number or a negative code. Errors: ARGUMENT if
 * quarry_session_cite was not called, or the session read other documents. */
QUARRY_API int64_t quarry_session_citations(const quarry_session *session, const quarry_document *documents, int n_documents,
                                            int64_t max_citations, quarry_citation **citations, quarry_error *error);

/* ---- statistics ------------------------------------------------------------------------------------------------ */

typedef struct quarry_stats {
    int64_t n_read, n_fed, n_generated; /* tokens: dense, question, answer */
    double read_seconds, feed_seconds, generate_seconds;
    double kv_bytes_per_step;                    /* mean bytes of KV and index read per generated token */
    double kv_bytes_full;                        /* what full attention would have read */
    size_t kv_bytes, index_bytes, scratch_bytes; /* memory held now */
} quarry_stats;

QUARRY_API void quarry_session_get_stats(const quarry_session *session, quarry_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
