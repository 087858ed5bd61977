/* xoshiro256** 1.0 (Blackman and Vigna, "Scrambled linear pseudorandom number generators", 2018), seeded by splitmix64. */
#ifndef BASE_RANDOM_H
#define BASE_RANDOM_H

#include <stdint.h>

typedef struct random_state {
    uint64_t s[4];
} random_state;

void random_seed(random_state *r, uint64_t seed);
uint64_t random_u64(random_state *r);
double random_unit(random_state *r);                /* uniform in [0, 1) */
uint64_t random_below(random_state *r, uint64_t n); /* uniform in [0, n), n > 0 */
double random_normal(random_state *r);              /* mean 0, variance 1 (Box-Muller) */

#endif
