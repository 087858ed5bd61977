#include "base/cpu.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "base/error.h"

static const char *const isa_names[CPU_N_ISA] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16"};

#if defined(__x86_64__)
/* clang 14's __builtin_cpu_supports does not know "f16c". */
static bool cpu_has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

cpu_isa cpu_detect(void)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !cpu_has_f16c()) return CPU_SCALAR;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return CPU_AVX2;
    if (!__builtin_cpu_supports("avx512vnni")) return CPU_AVX512;
    return __builtin_cpu_supports("avx512bf16") ? CPU_AVX512BF16 : CPU_AVX512VNNI;
#else
    return CPU_SCALAR;
#endif
}

quarry_code cpu_choose(cpu_isa *isa, quarry_error *error)
{
    const char *forced = getenv("QUARRY_ISA");
    *isa = cpu_detect();
    if (!forced || !*forced) return QUARRY_OK;
    for (int i = 0; i < CPU_N_ISA; i++) {
        if (strcmp(forced, isa_names[i]) != 0) continue;
        if (i > (int)*isa)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "QUARRY_ISA=%s: this processor supports %s at most", forced, isa_names[*isa]);
        *isa = (cpu_isa)i;
        return QUARRY_OK;
    }
    return error_set(error, QUARRY_ERROR_ARGUMENT, "QUARRY_ISA=%s is not one of scalar, avx2, avx512, avx512vnni, avx512bf16", forced);
}

const char *cpu_isa_name(cpu_isa isa)
{
    return isa_names[isa];
}

int cpu_count(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n > 0 ? n : 1;
}
