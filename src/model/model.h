/* model: architectures as data, and one forward pass that serves prefill, decode and batches of several sessions. Knows kv sequences, not sessions. */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include "attn/attn.h"
#include "base/base.h"
#include "gguf/gguf.h"
#include "kv/kv.h"
#include "math/math.h"
#include "text/text.h"

/* Dimensions, all from the file's metadata. */
typedef struct model_shape {
    int n_layer, n_head, n_head_kv, head_dim, n_rot;
    int n_local, window; /* layers that see only the last `window` tokens */
    int64_t n_embd, n_ff, n_vocab, n_ctx_train;
    float rms_eps, rope_base;
} model_shape;

/* The public quarry_model is this room's type. */
const model_shape *model_shape_of(const quarry_model *m);
const tokenizer *model_tokenizer(const quarry_model *m);
/* The recognised chat family; NULL with error UNSUPPORTED if the file's template is unknown or absent. */
const chat_template *model_chat(const quarry_model *m, quarry_error *error);
const char *model_chat_text(const quarry_model *m); /* the Jinja source, NULL if absent */
const math_kernels *model_kernels(const quarry_model *m);
thread_pool *model_pool(const quarry_model *m);
const logger *model_logger(const quarry_model *m);
attn_shape model_attn_shape(const quarry_model *m, kv_type type);

/* ---- memory.c ---- */

typedef struct model_memory {
    memory_tally weights, vocabulary; /* as kernels read them; the tokenizer, and what is kept of the file's metadata */
    size_t mapped;                    /* of the file's mapping, weights that are read from there and are in RAM */
    uint64_t file_bytes;              /* on disk */
} model_memory;

void model_tally(const quarry_model *m, model_memory *memory);
size_t model_mapped_weights(const quarry_model *m); /* bytes of weights that are read from the mapped file, in RAM or not */

/* One token of one timeline. Rows of one kv come in order of position, starting at its length. */
typedef struct forward_row {
    kv_seq *kv;
    attn_policy *policy; /* NULL: dense. Those of one pass have one shape */
    int64_t pos;
    int32_t token;
    bool dense;                    /* read all of the cache (a document), though policy observes */
    const attn_observer *observer; /* NULL: nobody */
    float *logits;                 /* [n_vocab] for the logits of this row, or NULL: not wanted */
} forward_row;

/* Forward passes and index updates of the sessions of one model run one after the other: each session holds the lock for one step. */
void model_lock(quarry_model *m);
void model_unlock(quarry_model *m);

/* Scratch memory of forward passes; one per session (or batch), reused. */
typedef struct forward_scratch forward_scratch;
forward_scratch *forward_scratch_create(const quarry_model *m, quarry_error *error);
void forward_scratch_destroy(forward_scratch *s);
void forward_scratch_tally(const forward_scratch *s, memory_tally *tally);
/* What a pass of n rows of sequences of this shape takes, but for the work space of each thread. */
quarry_code forward_scratch_estimate(quarry_model *m, const attn_shape *shape, int64_t n, size_t *n_bytes, quarry_error *error);
arena *forward_scratch_threads(forward_scratch *s); /* [pool size] arenas, for attn_index_* */

/* Runs rows through all layers, writes their K|V rows, and puts the logits of the rows that want them where they say. Rows of several timelines read the weights once; their caches
 * have one type. cost[n], if not NULL, receives bytes read per row. cancel, if not NULL, is asked between layers. On success kv lengths are committed; on any error they are as before. The caller holds the model's lock. */
typedef bool (*forward_cancel_fn)(void *data); /* true: stop */
quarry_code model_forward(quarry_model *m, forward_scratch *s, const forward_row *rows, int64_t n, attn_cost *cost,
                          forward_cancel_fn cancel, void *data, quarry_error *error);

#endif
