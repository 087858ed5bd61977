/* Inside kld: one policy along one sample, and what samples add up to. */
#ifndef EVAL_KLD_H
#define EVAL_KLD_H

#include "eval/audit.h"
#include "eval/common.h"

/* What was measured of one policy along one sample. */
typedef struct kld_steps {
    int64_t n;        /* steps */
    double *kld;      /* [n] nats */
    double *nll;      /* [n] of the next token, nats */
    int64_t agreed;   /* steps whose most likely token is that of full */
    bool correct;     /* at every step the next token was the likeliest */
    attn_cost cost;   /* of these steps */
    audit_sums audit; /* zero if not asked for */
} kld_steps;

/* Sums over the samples of one task and policy. */
typedef struct kld_tally {
    series kld, nll, dnll;                   /* over steps */
    series kld_means, nll_means, dnll_means; /* over samples */
    reading_sum reading;
    int64_t steps, agreed, samples, full_correct, correct, kept;
    audit_sums audit;
} kld_tally;

/* For the journal; NULL out of memory. */
json_t *kld_steps_json(const kld_steps *s);
/* Adds one sample to tallies[n_policies]: policies is the array of what kld_steps_json made, "full" first. FORMAT if it is not. */
quarry_code kld_tally_add(kld_tally *tallies, int n_policies, const json_t *policies, quarry_error *error);
void kld_tally_finish(kld_tally *t, const kld_tally *full, const quarry_model *model, kld_result *out); /* sorts */
void kld_tally_free(kld_tally *t);

#endif
