/* kv: the keys and values of one timeline of tokens, in pages.
 *
 * A page holds KV_PAGE tokens; within it each layer and KV head has its rows side by side, so that a head's rows are contiguous:
 *
 *     page: [layer 0: [head 0: KV_PAGE rows][head 1: KV_PAGE rows] …][layer 1: …] …      row: [K d][V d] (math/attention.h)
 *
 * Layers that see a sliding window only have pages of their own, which are freed when no later token sees them.
 * Pages are reference-counted: a fork shares them, and a page that is shared is copied before it is written.
 *
 * Tokens behind the first page may be cold: their rows, of the layers that keep every token, lie in files, are known by the slots of an index instead of positions, and are fetched (kv/cold.h). */
#ifndef KV_KV_H
#define KV_KV_H

#include "base/base.h"
#include "kv/cold.h"
#include "math/math.h"

enum {
    KV_PAGE = 256,
    KV_SLACK = 512 /* tokens that may be taken back though layers with a window have forgotten what lies before */
};

typedef struct kv_shape {
    int n_layer, n_head_kv, head_dim; /* n_layer: those that keep every token */
    kv_type type;
    int n_local; /* further layers, numbered from n_layer on: a token sees itself and the window - 1 before it */
    int window;  /* of these; at least 1 if there are any */
} kv_shape;

typedef struct kv_seq kv_seq;

kv_seq *kv_create(const kv_shape *shape, quarry_error *error);
void kv_destroy(kv_seq *kv);
kv_seq *kv_fork(const kv_seq *kv, quarry_error *error); /* shares pages; as long as the original at this moment */

const kv_shape *kv_shape_of(const kv_seq *kv);
int64_t kv_length(const kv_seq *kv); /* tokens whose rows are valid in every layer */

/* First token whose rows in local layers a sequence of n tokens holds at least: its page has the first row that the next token, after KV_SLACK were taken back, may see. */
static inline int64_t kv_local_kept(const kv_shape *shape, int64_t n)
{
    const int64_t first = n - shape->window + 1 - KV_SLACK;
    return shape->n_local && first > 0 ? first / KV_PAGE * KV_PAGE : 0;
}
/* An empty sequence becomes n tokens long, for rows that come from elsewhere: all of them, of local layers those from kv_local_kept on, are the caller's to write (kv_row)
 * before they are read. */
quarry_code kv_restore(kv_seq *kv, int64_t n, quarry_error *error);
/* Tokens of which the rows are cold, as kv_set_cold takes them. */
typedef struct kv_cold_span {
    int64_t from, end;  /* positions: behind the sinks, which stay in memory, up to `end` */
    int64_t n_segments; /* the first ones of the cold rows */
    int64_t length;     /* of the sequence, now or when it will be restored: it cannot be made shorter any more, but for nothing */
} kv_cold_span;
/* Tokens become cold: what memory their rows took is given back, and kv_row no longer has them. `cold` gains an owner. What is cold stays so. On error nothing changed. */
quarry_code kv_set_cold(kv_seq *kv, kv_cold *cold, const kv_cold_span *span, quarry_error *error);
kv_cold *kv_cold_of(const kv_seq *kv);            /* NULL: all rows are in memory */
const kv_cold_span *kv_cold_in(const kv_seq *kv); /* all zero: none are cold */
/* Makes rows [0, n) addressable and [kv_length, n) writable (copies a shared last page). On error nothing changed. Before that frees what local layers
 * hold of tokens that are more than the window and KV_SLACK behind. */
quarry_code kv_reserve(kv_seq *kv, int64_t n, quarry_error *error);
/* After all layers wrote rows up to n: they count now. n <= reserved. */
void kv_commit(kv_seq *kv, int64_t n);
/* Forgets rows from n on and frees pages that hold none. n is 0 or at least kv_least(kv). */
void kv_truncate(kv_seq *kv, int64_t n);
/* The shortest length > 0 it can be cut to: local layers still hold all that the next token sees. */
int64_t kv_least(const kv_seq *kv);

/* The row of token position pos, which is not cold; rows of the same page and head follow each other. */
void *kv_row(const kv_seq *kv, int layer, int head, int64_t pos);
/* The same, and how many rows from there on are contiguous (up to the page's end). */
static inline int64_t kv_run(int64_t pos)
{
    return KV_PAGE - pos % KV_PAGE;
}
/* Writes one token's key and value (f32) as a row of the sequence's type. */
void kv_write(const math_kernels *kernels, void *row, const kv_shape *shape, const float *k, const float *v);
/* key[d] or value[d] of a row as f32. */
void kv_read_key(const math_kernels *kernels, const void *row, const kv_shape *shape, float *key);
void kv_read_value(const math_kernels *kernels, const void *row, const kv_shape *shape, float *value);

/* First token that a query at pos sees in a layer. */
static inline int64_t kv_first_seen(const kv_shape *shape, int layer, int64_t pos)
{
    return layer < shape->n_layer || pos < shape->window ? 0 : pos - shape->window + 1;
}
/* Most memory while n tokens are written, n_step at a time; false if it is beyond size_t. */
bool kv_bytes_for(const kv_shape *shape, int64_t n, int64_t n_step, size_t *n_bytes);
/* What local layers will take at most, beyond what they do, when n tokens more were written, n_step at a time. */
size_t kv_local_coming(const kv_seq *kv, int64_t n, int64_t n_step);
/* What full attention reads for one query after n tokens, in all layers and heads: the window, where there is one. */
double kv_bytes_seen(const kv_shape *shape, int64_t n);
size_t kv_bytes(const kv_seq *kv);                    /* memory of its pages, shared ones counted whole, and of cold rows that are cached */
void kv_tally(const kv_seq *kv, memory_tally *tally); /* the same, and what of it is in RAM */

#endif
