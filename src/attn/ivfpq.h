/* ivfpq, the default policy: an inverted file whose lists are never skipped, product codes, exact attention on the selected tokens, an
 * estimated tail.
 *
 * Far tokens are cut into segments. A sealed segment is immutable, depends only on its past, and is shared by forks; behind the last one
 * is the open segment, whose tokens are coded with the tables of the segment before. A part is what a segment holds for one (layer, KV
 * head):
 *
 *     tables     centre, basis and centroids of a product code (vq/vq.h), learned from its keys and the queries seen until it was sealed
 *     codes      4 bits for every 4 dimensions of each key -> an estimated weight for every token
 *     keys       4 bits a dimension -> a better one for those that seem to weigh something; the heaviest are read. Where rows are not in
 *                memory (kv/cold.h) neither are these, but for the outliers': they are made of rows as those are fetched
 *     clusters   int8 sum of the values of about `size` similar tokens -> what the unread ones add up to, each with its estimated weight
 *
 * A part keeps its tokens in the order of their clusters: a token's place there is its slot. Clusters are made by keys and values together:
 * weights need no likeness within a cluster, for every token has its own, but values do.
 *
 * In the open segment, clusters are runs of neighbours, and slots are in order of position. Tokens that have no code yet are read exactly: no segment is sealed, or truncate
 * cut their segment.
 *
 * A segment is sealed when it is full, and at the end of a prompt if it is worth tables of its own: the first from IVFPQ_FIRST_SEAL
 * tokens on, a later one from a quarter of the smallest full segment on. Full segments grow with what lies before them, because a decode
 * step makes the tables of every segment anew, and building a part (quadratic in its tokens) stays a constant share of reading. */
#ifndef ATTN_IVFPQ_H
#define ATTN_IVFPQ_H

#include "attn/policies.h"
#include "vq/vq.h"

enum {
    IVFPQ_RUN = 16,         /* tokens per cluster of the open segment */
    IVFPQ_FIRST_SEAL = 128, /* fewer tokens than this train no tables: they stay open */
    IVFPQ_LATER_SEAL = 4,   /* part of a full segment */
    IVFPQ_GROWTH = 2,       /* the largest full segments are so many times the smallest */
    IVFPQ_LARGEST = 65536,  /* tokens of a segment: clusters have 16-bit numbers */
    IVFPQ_FLAT = 16384,     /* far tokens up to which the threshold is what the option says */
};

typedef struct ivfpq_options {
    double budget, min, threshold, mass, max, refine, margin, outliers, size, values, alpha, shrink, segment, tail;
} ivfpq_options;

/* Where the fields of a part lie, in bytes from its start. */
typedef struct ivfpq_layout {
    size_t centre, centroids, forward, forward_scale, query, query_scale, begin, value_scale, values, order, cluster, codes, errors,
        outliers, outlier_scale, outlier_keys, total;
    size_t key_scale, keys_total; /* of its keys, which are apart */
} ivfpq_layout;

typedef struct ivfpq_status {
    int32_t n_clusters;
    bool coded; /* false: no memory to build with, so every token is read */
} ivfpq_status;

typedef struct ivfpq_segment {
    _Atomic int64_t n_refs;
    int64_t first, n; /* positions [first, first + n); of the open segment: see ivfpq */
    ivfpq_layout layout;
    ivfpq_status *status;  /* [n_layer][n_head_kv] */
    unsigned char *memory; /* [n_layer][n_head_kv] parts: first touched where they are made */
    unsigned char *keys;   /* [n_layer][n_head_kv]: keys and their scales; NULL: their rows are cold */
    size_t bytes, key_bytes;
} ivfpq_segment;

typedef struct ivfpq_part {
    ivfpq_status *status;
    float *centre;                      /* [d]: mean of the keys; this and the next three are not of the open segment */
    vq_codebook book;                   /* of keys - centre, in the coordinates of the basis */
    int8_t *forward, *query;            /* [d][d]: the basis by output dimension */
    float *forward_scale, *query_scale; /* [d] */
    uint32_t *begin;                    /* [clusters + 1]: cluster c has the slots from begin[c] to before begin[c + 1] */
    float *value_scale;                 /* [clusters] */
    int8_t *values;                     /* [clusters][d]: sums of the values */
    uint16_t *order, *cluster;          /* [slots]: the token, counted from the segment's first; its cluster */
    uint8_t *codes;                     /* scan blocks of slots */
    float *errors;                      /* [n_sub]: mean square of what codes leave of a coordinate, in those of the basis */
    uint16_t *outliers;                 /* [tokens * outliers]: the slots whose codes are worst, ascending */
    float *outlier_scale;               /* [tokens * outliers]: the keys of those */
    uint8_t *outlier_keys;              /* [tokens * outliers][d / 2] */
    float *key_scale;                   /* [slots], or NULL */
    uint8_t *keys;                      /* [slots][d / 2], or NULL: key - centre in 4 bits a dimension (math/retrieval.h, dot_i4) */
} ivfpq_part;

typedef struct ivfpq {
    attn_policy base;
    ivfpq_options options;
    int d, group, n_sub, n_parts; /* n_parts = n_layer * n_head_kv */
    int64_t segment;              /* tokens of the smallest full segments */
    ivfpq_segment **sealed;       /* [n_sealed], then [n_pending] that the current step fills */
    int64_t n_sealed, n_pending, capacity;
    ivfpq_segment *open; /* NULL until the first append; never shared */
    int64_t open_first, n_open,
        n_coded; /* positions [open_first, open_first + n_open), of which the first n_coded have codes and clusters */
    /* Query statistics [n_parts][d][d] and counts [n_parts]: of the positions up to the end of the open segment, and of later ones that
     * a long batch has brought already. A segment learns from the first alone, so that the index does not depend on the size of the
     * batches. */
    float *moments, *ahead;
    int64_t *n_queries, *n_ahead;
} ivfpq;

static inline int64_t ivfpq_min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Outliers of a sealed segment of n tokens. */
static inline int64_t ivfpq_outliers(const ivfpq *p, int64_t n)
{
    return (int64_t)(p->options.outliers * (double)n);
}

/* ---- ivfpq_build.c ---- */

extern const attn_saving ivfpq_saving; /* ivfpq_save.c */

int64_t ivfpq_cluster_count(const ivfpq *p, int64_t n, bool sealed); /* most clusters of a segment of n tokens */

/* Tokens of the segment that begins at position `first`, when it is full. */
int64_t ivfpq_full_segment(const ivfpq *p, int64_t first);

/* A segment for n tokens; the open one (sealed = false) has no tables. cold: without keys. */
ivfpq_segment *ivfpq_segment_create(const ivfpq *p, int64_t n, bool sealed, bool cold, quarry_error *error);
void ivfpq_segment_release(ivfpq_segment *s); /* NULL allowed */
ivfpq_part ivfpq_part_of(const ivfpq *p, const ivfpq_segment *s, int part);

quarry_code ivfpq_reserve(attn_policy *p, int64_t n, quarry_error *error);
void ivfpq_append(attn_policy *p, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch);
void ivfpq_commit(attn_policy *p, int64_t n);
quarry_code ivfpq_reserve_seal(attn_policy *p, quarry_error *error);
void ivfpq_seal(attn_policy *p, int layer, int head, const kv_seq *kv, arena *scratch);
void ivfpq_commit_seal(attn_policy *p);
void ivfpq_drop_pending(ivfpq *p);
/* An open segment with room for n tokens; one that is large enough stays. */
quarry_code ivfpq_grow_open(ivfpq *p, int64_t n, quarry_error *error);
/* One more sealed segment, of n tokens, to be filled. */
quarry_code ivfpq_push_loaded(ivfpq *p, int64_t n, bool cold, quarry_error *error);
void ivfpq_load_rows(attn_policy *p, int64_t i, int layer, int head, const kv_seq *kv, arena *scratch);
void ivfpq_load_commit(attn_policy *p);
/* The queries ahead become seen ones. */
void ivfpq_catch_up(ivfpq *p);

/* ---- ivfpq_search.c ---- */

/* Of what is kept beside a cold row: its 4-bit key. */
size_t ivfpq_derived_bytes(const attn_policy *p);
quarry_code ivfpq_select(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                         const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
/* The same for q[g][d], of several queries: the largest weight over all decides. */
quarry_code ivfpq_select_block(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int g,
                               const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
/* For policies that choose in their own way and take the tail from an ivfpq beside them: ids[n], ascending, were chosen; *out receives
 * them and what has no code, each once, and what ivfpq_tail needs. All that it reads counts as tail. */
quarry_code ivfpq_cover(const attn_policy *p, int layer, int head, const float *q, const attention_state *near, const int32_t *ids,
                        int64_t n, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
quarry_code ivfpq_fetch(const attn_policy *p, int layer, int head, const kv_seq *kv, attn_selection *sel, arena *scratch,
                        quarry_error *error);
void ivfpq_tail(const attn_policy *p, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost);

#endif
