#include "attn/choose.h"

#include <math.h>

cut cut_find(const retrieval_kernels *kernels, const uint16_t *keys, int64_t n, int64_t k, int low, int64_t reach, int high, int64_t above)
{
    while (high - low > 1) {
        /* counts fall about exponentially with the key, so their logarithms are interpolated, away from the ends so that the range
         * always shrinks by an eighth */
        float share = logf((float)reach / (float)k) / logf((float)reach / ((float)above + 0.5f));
        share = fminf(0.875f, fmaxf(0.125f, share));
        int middle = low + (int)(share * (float)(high - low));
        middle = middle <= low ? low + 1 : middle;
        int64_t count = kernels->count(keys, n, (uint16_t)middle);
        if (count >= k) {
            low = middle;
            reach = count;
        } else {
            high = middle;
            above = count;
        }
    }
    return (cut){k, k - above, (uint16_t)low};
}

cut cut_between(const retrieval_kernels *kernels, const uint16_t *keys, int64_t n, int64_t least, int64_t most, int heavy)
{
    int64_t n_heavy = kernels->count(keys, n, (uint16_t)heavy);
    if (n_heavy < least) return cut_find(kernels, keys, n, least, 0, n, heavy, n_heavy);
    if (n_heavy > most) return cut_find(kernels, keys, n, most, heavy, n_heavy, CUT_BEYOND, 0);
    return (cut){n_heavy, n_heavy, (uint16_t)heavy};
}
