/* What this processor can do. Kernels are compiled for each level and chosen at run time. */
#ifndef BASE_CPU_H
#define BASE_CPU_H

#include <quarry/quarry.h>

/* Each level includes the ones before it. */
typedef enum cpu_isa {
    CPU_SCALAR,     /* the specification: plain C */
    CPU_AVX2,       /* AVX2 + FMA + F16C */
    CPU_AVX512,     /* F + BW + DQ + VL */
    CPU_AVX512VNNI, /* + VNNI */
    CPU_AVX512BF16, /* + BF16 */
    CPU_N_ISA,
} cpu_isa;

/* The best level this processor and its operating system support. */
cpu_isa cpu_detect(void);
/* The same, lowered by the environment variable QUARRY_ISA (scalar, avx2, avx512, avx512vnni, avx512bf16) when it is set; an unknown or
 * unsupported value is an error. */
quarry_code cpu_choose(cpu_isa *isa, quarry_error *error);
const char *cpu_isa_name(cpu_isa isa);
/* Cores this process may run on (its affinity mask), at least 1. */
int cpu_count(void);

#endif
