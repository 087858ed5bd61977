/* exp(step * (key - top)) of 16-bit keys in 16-bit integers: a key's distance from the top, times log2(e) 2^10 step, taken from the bits
 * of 2^13 as a half float gives the bits of the power, its exponent and, below the point, its mantissa (after Schraudolph, "A fast,
 * compact approximation of the exponential function", 1999). What lies 28 octaves below the top is 0. Private to math. */
#ifndef MATH_RETRIEVAL_EXP_H
#define MATH_RETRIEVAL_EXP_H

#include <stdint.h>

/* By how much the powers are too large on average over fractions of an octave: the integral of (1 + x) 2^-x from 0 to 1. */
#define EXP_MEAN 1.04068f

enum { EXP_TOP_BITS = (13 + 15) << 10 }; /* 2^13 */

typedef struct exp_scale {
    uint16_t whole, part; /* half-float bits per key step: whole + part / 65536 */
    uint16_t most;        /* distances are cut off here, where the power is 0; times (whole + 1) below 65536 */
} exp_scale;

static inline exp_scale exp_scale_make(float step)
{
    float bits = step * 0x1.715476p+10f;
    if (!(bits < EXP_TOP_BITS)) bits = EXP_TOP_BITS;
    float most = bits > 0 ? EXP_TOP_BITS / bits + 1 : UINT16_MAX;
    exp_scale s = {.whole = (uint16_t)bits, .most = most < UINT16_MAX ? (uint16_t)most : UINT16_MAX};
    float part = (bits - s.whole) * 65536;
    s.part = part < UINT16_MAX ? (uint16_t)part : UINT16_MAX;
    return s;
}

#endif
