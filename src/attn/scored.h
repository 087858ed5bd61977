/* scored: what policies share that give every far token, or every page of them, an estimated score and read the best: the family that
 * ivfpq is measured against. A method contributes what it keeps of the keys and how it scores; here are its memory, the choice, and the
 * tail.
 *
 * The far tokens are cut into units of `unit` tokens from ATTN_SINKS on. Of each (layer, KV head) a method keeps tables, learned once at
 * the end of the first prompt (if it learns at all), and unit_bytes for each unit. Tokens without a unit yet are read. */
#ifndef ATTN_SCORED_H
#define ATTN_SCORED_H

#include "attn/policies.h"

/* How tokens are chosen by their estimated weights (softmax of the scores, the near rows included). */
typedef struct scored_options {
    double budget, min;    /* share of the far tokens, and how many at least */
    double threshold, max; /* all of at least this weight, up to a share; 0: off */
    double mass;           /* instead of the budget: as many as this share of the mass needs, per head, at least min, up to max; 0: off */
    double shared;         /* 1: the group's best by the largest weight over its heads; 0, and with mass: each head's best, together */
    double tail;           /* 1: the unread are estimated, by an ivfpq that is kept beside */
    double own[4];         /* the method's */
} scored_options;

typedef struct scored scored;

/* One (layer, KV head). */
typedef struct scored_part {
    const scored *p;
    const kv_seq *kv;
    int layer, head;
    unsigned char *tables, *units;
} scored_part;

/* Which of the options of the choice a method takes. */
typedef enum scored_choice {
    SCORED_ALL,   /* every one */
    SCORED_SHARE, /* budget and min */
    SCORED_NONE
} scored_choice;

typedef struct scored_method {
    scored_choice choice;
    const attn_policy_type *type;
    scored_options defaults;
    const char *own[4]; /* names of its options, NULL at the end */
    double least[4], most[4];
    int unit;                               /* tokens */
    bool whole;                             /* units hold what belongs to tokens of others: a cut forgets them all until the next seal */
    size_t (*unit_bytes)(const scored *p);  /* NULL: none kept */
    size_t (*table_bytes)(const scored *p); /* NULL: nothing is learned */
    bool (*prepare)(scored *p, quarry_error *error); /* makes p->shared; NULL: nothing. On failure it reports. */
    /* Every query read, as attn_policy_type's. NULL: not wanted. */
    void (*observe)(const scored_part *part, const float *q, int64_t first, int64_t n);
    /* Tables and units of the first n far tokens. False: no memory; the part reads everything. */
    bool (*learn)(const scored_part *part, int64_t n, arena *scratch);
    /* Units [first, end), of the first n far tokens. False as learn. */
    bool (*encode)(const scored_part *part, int64_t first, int64_t end, int64_t n, arena *scratch);
    /* scores[group][n], scaled, of the first n far tokens for q[group][d], scaled; adds to cost what a careful implementation would read. */
    bool (*score)(const scored_part *part, const float *q, int64_t n, float *scores, arena *scratch, attn_cost *cost, quarry_error *error);
} scored_method;

struct scored {
    attn_policy base;
    const scored_method *method;
    scored_options options;
    int d, group, n_parts;
    unsigned char *tables, *units; /* [n_parts][table_bytes], [n_parts][capacity][unit_bytes] */
    float *shared;                 /* what all parts use, never changed; or NULL */
    size_t table_bytes, unit_bytes;
    int64_t capacity; /* units */
    bool learned;
    bool *broken;       /* [n_parts]: had no memory */
    int64_t n_learned;  /* far tokens that the tables were learned from */
    int64_t n_coded;    /* far tokens whose units are complete as of now */
    attn_policy *inner; /* the ivfpq of the tail, or NULL */
};

/* The functions of a scored policy's table: those that keep it up, and all but create. */
#define SCORED_KEEPING                                                                                                                     \
    .destroy = scored_destroy, .fork = scored_fork, .observe = scored_observe, .reserve = scored_reserve, .append = scored_append,         \
    .commit = scored_commit, .reserve_seal = scored_reserve_seal, .seal = scored_seal, .commit_seal = scored_commit_seal,                  \
    .truncate = scored_truncate, .tally = scored_tally, .scratch = scored_scratch
#define SCORED_FUNCTIONS SCORED_KEEPING, .select = scored_select, .tail = scored_tail

/* How the options of the choice are listed; a method's own come before. */
#define SCORED_OPTIONS(budget, shared)                                                                                                     \
    "budget=" budget "       share of the far tokens that is read\n"                                                                       \
    "min=16            but at least so many\n"                                                                                             \
    "threshold=0       and all of at least this estimated attention weight (0: off)\n"                                                     \
    "mass=0            instead of a budget: as many as this share of each head's estimated mass needs (0: off)\n"                          \
    "max=0.3           with either, not more than this share\n"                                                                            \
    "shared=" shared "          1: one choice for the group, by the largest weight over its heads; 0: each head's own, together\n"         \
    "tail=0            1: estimate the unread, as ivfpq does\n"

attn_policy *scored_create(const scored_method *method, const attn_shape *shape, const math_kernels *kernels, const char *spec,
                           quarry_error *error);
void scored_destroy(attn_policy *p);
attn_policy *scored_fork(const attn_policy *p, quarry_error *error);
void scored_observe(attn_policy *p, int layer, int head, const float *q, int64_t first, int64_t n);
quarry_code scored_reserve(attn_policy *p, int64_t n, quarry_error *error);
void scored_append(attn_policy *p, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch);
void scored_commit(attn_policy *p, int64_t n);
quarry_code scored_reserve_seal(attn_policy *p, quarry_error *error);
void scored_seal(attn_policy *p, int layer, int head, const kv_seq *kv, arena *scratch);
void scored_commit_seal(attn_policy *p);
quarry_code scored_select(const attn_policy *p, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                          const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error);
void scored_tail(const attn_policy *p, int layer, int head, const float *q, const attn_selection *sel, const float *scores,
                 const void *const *rows, arena *scratch, attention_state *state, attn_cost *cost);
void scored_truncate(attn_policy *p, int64_t n);
void scored_tally(const attn_policy *p, attn_memory *memory);
size_t scored_scratch(const attn_policy *p, int64_t n_far);

/* The part that select or tail works on; tail does not have the rows. */
scored_part scored_part_of(const scored *p, const kv_seq *kv, int layer, int head);
/* Tokens [n_coded, n_far) into ids[k]; returns the new k. */
static inline int64_t scored_rest(const scored *p, int32_t *ids, int64_t k)
{
    for (int64_t t = p->n_coded; t < p->base.n_far - ATTN_SINKS; t++) ids[k++] = (int32_t)(ATTN_SINKS + t);
    return k;
}
/* The key or value of far token t (counted from ATTN_SINKS) as f32. */
static inline void scored_key(const scored_part *part, int64_t t, float *key)
{
    const attn_policy *p = &part->p->base;
    kv_read_key(p->kernels, kv_row(part->kv, part->layer, part->head, ATTN_SINKS + t), &p->shape.kv, key);
}
static inline void scored_value(const scored_part *part, int64_t t, float *value)
{
    const attn_policy *p = &part->p->base;
    kv_read_value(p->kernels, kv_row(part->kv, part->layer, part->head, ATTN_SINKS + t), &p->shape.kv, value);
}
/* Gives the tokens of each unit its score: unit_scores[group][n_units] to scores[group][n]. */
void scored_spread(const scored_part *part, const float *unit_scores, int64_t n, float *scores);

#endif
