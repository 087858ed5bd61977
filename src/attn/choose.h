/* Choosing the largest of many 16-bit keys. */
#ifndef ATTN_CHOOSE_H
#define ATTN_CHOOSE_H

#include "math/math.h"

/* Which keys are chosen: those above the threshold and n_ties of those that equal it, k in all. */
typedef struct cut {
    int64_t k, n_ties;
    uint16_t threshold;
} cut;

enum { CUT_BEYOND = UINT16_MAX + 1 }; /* above every key */

/* The largest threshold that at least k of keys[n] reach, n a multiple of SCAN_BLOCK. It lies in [low, high), which `reach` and `above`
 * keys reach: reach >= k > above. For all keys: low 0, reach n, high CUT_BEYOND, above 0. */
cut cut_find(const retrieval_kernels *kernels, const uint16_t *keys, int64_t n, int64_t k, int low, int64_t reach, int high, int64_t above);

/* At least `least` of keys[n], and all that reach `heavy` as far as they are not more than `most`. */
cut cut_between(const retrieval_kernels *kernels, const uint16_t *keys, int64_t n, int64_t least, int64_t most, int heavy);

/* n rounded up to a multiple of SCAN_BLOCK. */
static inline int64_t cut_padded(int64_t n)
{
    return (n + SCAN_BLOCK - 1) / SCAN_BLOCK * SCAN_BLOCK;
}

#endif
