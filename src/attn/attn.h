/* attn: dense attention, and retrieval policies behind one interface (one file each).
 *
 * A token's rows, as a query at position pos sees them:
 *
 *     [0, n_sink)        sinks: always read
 *     [n_sink, n_far)    far tokens: in the policy's key index, read if selected, else estimated by the tail (or dropped)
 *     [n_far, pos]       local: at least n_window tokens, always read
 *
 * In an extended sequence (attn_shape.extend) keys are kept without position, and rows of the local tokens also as they are after RoPE, in layers of their own. A query
 * reads its local tokens at their distance, and everything before them, sinks too, alike: as from a range of distances on average (docs/extend.md). */
#ifndef ATTN_ATTN_H
#define ATTN_ATTN_H

#include "base/base.h"
#include "kv/kv.h"
#include "math/math.h"

enum {
    ATTN_SINKS = 8,
    ATTN_WINDOW = 64,
    ATTN_BLOCK = 32,        /* tokens move from the window to the index in blocks of this size */
    ATTN_HEAD_MULTIPLE = 8, /* head_dim must be a multiple */
    ATTN_OPTION_TEXT = 512, /* bytes of an option that is text, with its NUL */
    ATTN_MAX_GROUP = 64     /* query heads that share a KV head, at most */
};

/* How keys and queries were rotated; the model's. */
typedef struct attn_rope {
    int n_rot;
    bool halves;           /* pairs (i, i + n_rot/2) instead of (2i, 2i+1) */
    const double *inverse; /* [n_rot / 2] radians per position */
} attn_rope;

/* How a text longer than the model was trained for is read. */
typedef struct attn_extend {
    int64_t window; /* local tokens of a query, at least; 0: not extended */
    int64_t block;  /* of all positions modulo this one moves the beginning of the local tokens, so that rows of a block share it */
    int64_t nearest, farthest; /* what is not local is scored by the mean of the scores that it would have at all these distances */
    int near_layer;            /* of the cache: layer i's local rows are in near_layer + i */
    int sliding;               /* window of the model's own local layers; kv.window is what is kept, enough for both */
} attn_extend;

typedef struct attn_shape {
    kv_shape kv;          /* policies know kv.n_layer layers and nothing of the local ones */
    int n_head;           /* query heads; group = n_head / n_head_kv */
    float scale;          /* of scores: 1 / sqrt(head_dim) */
    attn_rope rope;       /* for policies that need keys before RoPE; n_rot == 0: none */
    uint64_t fingerprint; /* of the model's tensors and tokenizer, for what was calibrated on it */
    int64_t
        read_window; /* > 0: a document is read in blocks of rows, each with at least so many local tokens and what the policy selects for the block; 0: with full attention */
    attn_extend extend;
} attn_shape;

/* Makes the shape that of extended sequences, with read_window as window: more layers in kv, and keys that policies see without RoPE. */
void attn_shape_extend(attn_shape *shape, int64_t window, int64_t nearest, int64_t farthest);
/* cs[2 n_pairs] = the mean of cosine and of sine of each pair's angle over all distances from nearest to farthest: what turns a query so that its products with keys without
 * position are those means. inverse[n_pairs]: radians per position. */
void attn_extend_angles(const attn_extend *e, const double *inverse, int n_pairs, float *cs);
/* The first local token of a query at pos, in extended sequences. */
int64_t attn_extend_first(const attn_extend *e, int64_t pos);
/* The end of what may be indexed when a sequence has n tokens. */
int64_t attn_far_end(const attn_shape *shape, int64_t n);

/* Turns x[d] from one position to another `by` positions on; by = -pos undoes RoPE. */
void attn_rotate(const attn_rope *rope, const math_kernels *kernels, int64_t by, float *x);

/* ---- policies ---- */

typedef struct attn_policy attn_policy;

/* What one attention step read. */
typedef struct attn_cost {
    int64_t index_bytes; /* by select: codes, page summaries */
    int64_t table_bytes; /* by select: codebooks and bases, which do not grow with every token */
    int64_t tail_bytes;  /* by tail: clusters */
    int64_t rows;        /* K|V rows: sinks, selected and near ones */
    int64_t window_rows; /* the same of layers that see a sliding window only, where there is nothing to choose */
} attn_cost;

static inline void attn_cost_add(attn_cost *sum, const attn_cost *cost)
{
    sum->index_bytes += cost->index_bytes;
    sum->table_bytes += cost->table_bytes;
    sum->tail_bytes += cost->tail_bytes;
    sum->rows += cost->rows;
    sum->window_rows += cost->window_rows;
}

/* Bytes in the layers that a policy searches, with row_bytes for a K|V row. */
static inline int64_t attn_cost_bytes(const attn_cost *cost, int64_t row_bytes)
{
    return cost->index_bytes + cost->table_bytes + cost->tail_bytes + cost->rows * row_bytes;
}

/* Selection of one (layer, KV head) for one query position; memory belongs to the thread's scratch. */
typedef struct attn_selection {
    int32_t *ids; /* [n] positions of far tokens, each once, in any order */
    int64_t n;
    bool all;          /* every far token (ids unused) */
    const void **rows; /* [n] their rows, where some are cold (fetch); NULL: where kv_row says */
} attn_selection;

typedef struct attn_saving attn_saving; /* below */

/* What policies hold. */
typedef struct attn_memory {
    memory_tally index, codebooks; /* what grows with every token; tables that were learned once */
    uint64_t codebook_file;        /* bytes of a file that these are read from */
} attn_memory;

/* A policy is a table of functions over a state that covers all layers and KV heads of one session. Functions marked (parallel) may be called at the same time for different
 * (layer, head), never twice for the same one. q is post-RoPE, not scaled. Positions are absolute. */
typedef struct attn_policy_type {
    const char *name, *summary;
    const char *options; /* "budget=0.02 share of the far tokens that is read; …": one per line, for `quarry info --attn` */
    /* spec: the part after "name:", may be "". Error ARGUMENT names the option. */
    attn_policy *(*create)(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error);
    void (*destroy)(attn_policy *p);
    attn_policy *(*fork)(const attn_policy *p, quarry_error *error); /* shares sealed segments */
    /* (parallel) Queries seen while reading, every one: q[n][group][d] of positions first … first+n-1, for H. May be NULL. */
    void (*observe)(attn_policy *p, int layer, int head, const float *q, int64_t first, int64_t n);
    /* Before the parallel appends of one step: n_far becomes n_far + n in every (layer, head); allocates, so that append cannot fail. */
    quarry_code (*reserve)(attn_policy *p, int64_t n, quarry_error *error);
    /* (parallel) Tokens n_far … n_far+n-1 left the window; their rows are in kv. n is a multiple of ATTN_BLOCK except before a seal. scratch is the calling thread's. */
    void (*append)(attn_policy *p, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch);
    /* After the appends. */
    void (*commit)(attn_policy *p, int64_t n);
    /* (parallel) End of prompt: close the open segment. Same calling pattern as append: reserve_seal, then seal for every (layer, head), then commit_seal. */
    quarry_code (*reserve_seal)(attn_policy *p, quarry_error *error);
    void (*seal)(attn_policy *p, int layer, int head, const kv_seq *kv, arena *scratch);
    void (*commit_seal)(attn_policy *p);
    /* NULL: every far token, always (`full`). (parallel, const) Far tokens for q[group][d] of a query at pos: one selection for the group. near: what its sinks and local rows have added up to, with which weights can be normalised. kv: the rows. QUARRY_ERROR_MEMORY when scratch cannot grow. */
    quarry_code (*select)(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                          const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
    /* The same for the vectors q[n][d], n <= ATTN_MAX_GROUP, of several queries, which read what is selected together; no tail follows. near: m and l of each. NULL: select is asked with their mean. */
    quarry_code (*select_block)(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int n,
                                const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
    /* (parallel, const) Where rows of kv are cold: out of what select left behind the ids, sel->rows. NULL: none are, for the index is not kept in saved contexts. */
    quarry_code (*fetch)(const attn_policy *p, int layer, int head, const kv_seq *kv, attn_selection *sel, arena *scratch,
                         quarry_error *error);
    /* (parallel, const) Adds an estimate of the far tokens not selected to state[group]; called after the selected rows were added. scores[group][n]: their scaled scores; rows[n]. May be NULL: dropped. Uses
     * what select left behind the ids, maybe in another thread's scratch. */
    void (*tail)(const attn_policy *p, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                 const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost);
    /* Forget positions >= n (n may lie inside a sealed segment: only live tokens are selected and estimated). */
    void (*truncate)(attn_policy *p, int64_t n);
    void (*tally)(const attn_policy *p, attn_memory *memory); /* adds what it holds */
    size_t (*scratch)(const attn_policy *p,
                      int64_t n_far); /* what indexing n_far tokens takes of each thread's scratch, about. NULL: little */
    const attn_saving *saving;        /* NULL: its index is not kept in saved contexts */
} attn_policy_type;

/* What a saved context keeps of an index: its sealed segments, and a state. Segments are counted from 0. */
typedef struct attn_saved_segment {
    int64_t first, n;  /* positions [first, first + n) */
    size_t part_bytes; /* that save_part writes */
} attn_saved_segment;

struct attn_saving {
    /* The options that shape the index, and the version of its making: what two policies of the same text make can be exchanged. */
    void (*describe)(const attn_policy *p, char *text, size_t size);
    int64_t (*n_segments)(const attn_policy *p);
    attn_saved_segment (*segment)(const attn_policy *p, int64_t i);
    /* Tokens that no sealed segment would hold if n_far became so much. */
    int64_t (*n_open)(const attn_policy *p, int64_t n_far);
    /* (parallel) The token, counted from the segment's first, of every slot [n]: the order in which the index has them. NULL: as they come. */
    const uint16_t *(*order)(const attn_policy *p, int64_t i, int layer, int head);
    void (*save_part)(const attn_policy *p, int64_t i, int layer, int head, uint8_t *out); /* (parallel) */
    size_t (*state_bytes)(const attn_policy *p);
    void (*save_state)(const attn_policy *p, uint8_t *out);
    /* Loading, into a policy that holds nothing. First every segment: room for one of n tokens behind the others, then its parts. Bytes are not trusted: FORMAT (without a
     * message) if they cannot be what was saved. cold: its rows are not in memory. */
    quarry_code (*load_segment)(attn_policy *p, int64_t n, size_t part_bytes, bool cold, quarry_error *error);
    /* (parallel) order[n]: every token once, as `order` gave it. */
    quarry_code (*load_part)(attn_policy *p, int64_t i, int layer, int head, const uint16_t *order, const uint8_t *bytes);
    /* Then the state of a context of `length` tokens. */
    quarry_code (*load_state)(attn_policy *p, const uint8_t *bytes, size_t n_bytes, int64_t length, quarry_error *error);
    /* (parallel) What is made of the rows of segment i, which are in kv now, and not cold; last, with i == n_segments, of those that no segment holds. */
    void (*load_rows)(attn_policy *p, int64_t i, int layer, int head, const kv_seq *kv, arena *scratch);
    void (*load_commit)(attn_policy *p);
    /* Bytes that the policy keeps beside a cold row (kv_cold_create). */
    size_t (*derived_bytes)(const attn_policy *p);
    /* The rows of the first n segments are cold now: what can be made of them again is given back. */
    void (*set_cold)(attn_policy *p, int64_t n);
};

/* Every policy's state starts with this. */
struct attn_policy {
    const attn_policy_type *type;
    attn_shape shape;
    const math_kernels *kernels;
    int64_t n_far;     /* end of the far tokens: positions [ATTN_SINKS, n_far) are indexed; starts at ATTN_SINKS */
    attn_policy *also; /* further policies of the same session, that observe and index too; the session's, NULL at the end */
};

/* All policies, NULL-terminated, the default first. */
extern const attn_policy_type *const attn_policies[];
/* spec is "name" or "name:option=value,…". Error ARGUMENT: unknown name (lists the known), unknown option, bad value. */
attn_policy *attn_policy_create(const char *spec, const attn_shape *shape, const math_kernels *kernels, quarry_error *error);
void attn_policy_destroy(attn_policy *p);       /* NULL allowed */
size_t attn_policy_bytes(const attn_policy *p); /* allocated, index and codebooks */
/* What attention and index take of each thread's scratch when n_far tokens are indexed, about. */
size_t attn_policy_scratch(const attn_policy *p, int64_t n_far);

/* Option strings: reads "key=value" pairs into fields. */
typedef struct attn_option {
    const char *key;
    void *value; /* double; where min and max are both 0 char[ATTN_OPTION_TEXT], a text without commas */
    double min, max;
} attn_option;
quarry_code attn_options_parse(const char *policy, const char *spec, const attn_option *options, int n_options, quarry_error *error);

/* ---- codebook.c: what `quarry calibrate` makes and the policy a2ats reads (docs/a2ats.md) ---- */

enum { CODEBOOK_HEADER = 128 };

/* How centroids are stored. */
typedef enum codebook_type { CODEBOOK_F16, CODEBOOK_INT8 } codebook_type;

/* What a codebook was made for and how. */
typedef struct codebook_header {
    uint64_t fingerprint, text_digest, seed;
    int64_t n_text, n_random; /* tokens of the calibration text, and of random UUIDs */
    int32_t n_layer, n_head_kv, head_dim, n_centroids, iterations, distance;
    codebook_type type;
    bool exact_rope;        /* keys are coded after RoPE instead of before it */
    float exponent, shrink; /* the metric is (H / rms H + shrink I)^exponent */
} codebook_header;

/* Of one (layer, KV head): L, a root of the metric, and C L^-1 [n_centroids][d], whose product with a query is a score. Arrays are the caller's. */
typedef struct codebook_head {
    float *lower;  /* [d][d] L */
    uint16_t *f16; /* [n_centroids][d]: CODEBOOK_F16 */
    int8_t *int8;  /* [n_centroids][d], in units of scale [n_centroids] around mean [d]: CODEBOOK_INT8 */
    float *scale, *mean;
    int32_t iterations; /* used */
} codebook_head;

void codebook_header_pack(const codebook_header *h, uint8_t out[CODEBOOK_HEADER]);
/* FORMAT, UNSUPPORTED (version); name is the file's, for messages. */
quarry_code codebook_header_parse(codebook_header *h, const uint8_t *bytes, size_t n_bytes, const char *name, quarry_error *error);
size_t codebook_record_bytes(const codebook_header *h);   /* of one head, 0 if beyond reason */
size_t codebook_centroid_bytes(const codebook_header *h); /* of one head's centroids, with scales and mean */
void codebook_record_pack(const codebook_header *h, const codebook_head *head, uint8_t *out);
/* Copies into head's memory; false if the record is damaged. */
bool codebook_record_parse(const codebook_header *h, const uint8_t *bytes, codebook_head *head);
/* A head's arrays of centroids in one block of codebook_centroid_bytes, aligned for floats; lower is left. */
void codebook_head_place(const codebook_header *h, void *memory, codebook_head *head);
/* Between rows[n_centroids][d] and what is stored. */
void codebook_quantise(const codebook_header *h, const math_kernels *kernels, float *rows, codebook_head *head); /* spoils rows */
void codebook_expand(const codebook_header *h, const math_kernels *kernels, const codebook_head *head, float *rows);

/* ---- keeping the index: what a session calls after rows were committed ---- */

/* Moves tokens that left the window (attn_far_end) into the index of p and its companions (also), in blocks. Parallel over (layer, head). */
quarry_code attn_index_advance(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch /*[threads]*/, quarry_error *error);
/* The same while a document is read in blocks: the last read_window tokens stay local. */
quarry_code attn_index_trail(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch, quarry_error *error);
/* The same to the last token outside the window, and closes the open segment. */
quarry_code attn_index_seal(attn_policy *p, const kv_seq *kv, thread_pool *pool, arena *scratch, quarry_error *error);

/* ---- attention of one layer: what the forward pass calls ---- */

/* What the query at `pos` read in one (layer, KV head), for whoever measures or cites. */
typedef struct attn_reading {
    int layer, head, group, d;
    int64_t pos;
    const kv_seq *kv;
    const float *q, *q_far;   /* [group][d], scaled: as rows from near_first on see it, and those before */
    int64_t n_sinks, far_end; /* rows [0, n_sinks) and [far_end, pos] were read, and of the far ones between */
    int64_t near_first;       /* rows from here on are those of layer near_layer */
    int near_layer;
    const attn_selection *selected;
    const float *scores;          /* [group][n], scaled: of the selected; NULL when all were */
    const attention_state *state; /* [group] after everything: what all weights add up to is l exp(m) */
} attn_reading;

/* scores[group][end - first], scaled, of the rows [first, end), read or not. False: scratch could not grow. */
bool attn_reading_scores(const attn_reading *r, const math_kernels *kernels, int64_t first, int64_t end, float *scores, arena *scratch);

/* Is told of every (layer, KV head) of a row, except where a document is read; may be called at the same time for different ones. The
 * reading and what it points to are the callback's for the length of the call, and so is scratch. */
typedef struct attn_observer {
    void (*reading)(void *data, const attn_reading *reading, arena *scratch);
    void *data;
} attn_observer;

typedef struct attn_row {
    const kv_seq *kv;
    attn_policy *policy;           /* NULL: dense, nothing observed */
    int64_t pos;                   /* rows [0, pos] of kv are written in this layer */
    bool dense;                    /* read everything although there is a policy (reading a document) */
    const attn_observer *observer; /* NULL: nobody */
    const float *q_far;            /* [n_head][d] of an extended sequence: the row's query as what is not local sees it; else NULL */
} attn_row;

typedef struct attn_context {
    const math_kernels *kernels;
    thread_pool *pool;
    arena *scratch; /* [thread_pool_size], one per thread */
    arena *shared;  /* of the calling thread, for the length of one attn_forward */
} attn_context;

/* out[n][n_head][d] = attention of q[n][n_head][d] (post-RoPE, unscaled). Consecutive dense rows of one kv with consecutive positions are tiled together. Adds to cost[n] if
 * not NULL. The result does not depend on the number of threads. The rows' policies have this shape. A local layer (layer >= kv.n_layer) is not the policies': its rows read their window, exactly, and nobody is told. */
quarry_code attn_forward(const attn_context *c, const attn_shape *shape, int layer, const attn_row *rows, int64_t n, const float *q,
                         float *out, attn_cost *cost, quarry_error *error);

#endif
