/* Inside needle: what policies answered about one needle, and what that adds up to. */
#ifndef EVAL_NEEDLE_H
#define EVAL_NEEDLE_H

#include "eval/common.h"

/* One policy's answer about one needle. */
typedef struct needle_said {
    bool correct, cited;
    const double *kld; /* [n_kld] along full's answer, nats */
    int64_t n_kld;
    reading_sum reading; /* of question and answer */
} needle_said;

/* Sums over the needles of one policy. */
typedef struct needle_tally {
    series kld;
    reading_sum reading;
    int64_t asked, full_correct, correct, kept, cited;
} needle_tally;

/* For the journal; NULL out of memory. */
json_t *needle_said_json(const needle_said *s);
/* Adds one needle to tallies[n_policies], and to its cell of each policy, cells[policy * stride] (NULL: none): policies is the array of what needle_said_json made, "full" first. FORMAT if it
 * is not. */
quarry_code needle_tally_add(needle_tally *tallies, int n_policies, const json_t *policies, needle_cell *cells, int64_t stride,
                             quarry_error *error);
void needle_tally_finish(needle_tally *t, const needle_tally *full, const quarry_model *model, needle_result *out); /* sorts */

#endif
