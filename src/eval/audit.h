/* What a policy read, held against exact scores: an observer of the rows it is set for, one at a time. */
#ifndef EVAL_AUDIT_H
#define EVAL_AUDIT_H

#include <stdatomic.h>

#include "eval/common.h"

/* Sums over query heads, layers and steps. */
typedef struct audit_sums {
    double mass, recall;
    int64_t n_mass, n_recall;
} audit_sums;

typedef struct audit {
    attn_observer observer;
    const math_kernels *kernels;
    int n_layer, n_head_kv;
    audit_sums *sums; /* [n_layer][n_head_kv], for readings come from several threads */
    atomic_bool failed;
} audit;

quarry_code audit_open(audit *a, const quarry_model *model, quarry_error *error);
void audit_close(audit *a);
void audit_clear(audit *a);
/* MEMORY if a thread's scratch could not grow. */
quarry_code audit_total(const audit *a, audit_sums *out, quarry_error *error);

/* The k-th largest of values[n], 1 <= k <= n; changes their order. */
float audit_kth_largest(float *values, int64_t n, int64_t k);

#endif
