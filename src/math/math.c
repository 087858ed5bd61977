#include "math/math.h"

#if defined(__x86_64__)
static const math_kernels tables[CPU_N_ISA] = {
    [CPU_SCALAR] = {"scalar", &vector_scalar, &matmul_scalar, &attention_scalar, &retrieval_scalar},
    [CPU_AVX2] = {"avx2", &vector_avx2, &matmul_avx2, &attention_avx2, &retrieval_avx2},
    [CPU_AVX512] = {"avx512", &vector_avx512, &matmul_avx2, &attention_avx512, &retrieval_avx2},
    [CPU_AVX512VNNI] = {"avx512vnni", &vector_avx512, &matmul_avx512vnni, &attention_avx512, &retrieval_avx512},
    [CPU_AVX512BF16] = {"avx512bf16", &vector_avx512, &matmul_avx512vnni, &attention_avx512bf16, &retrieval_avx512},
};
#else
static const math_kernels tables[CPU_N_ISA] = {
    [CPU_SCALAR] = {"scalar", &vector_scalar, &matmul_scalar, &attention_scalar, &retrieval_scalar},
};
#endif

const math_kernels *math_kernels_get(cpu_isa isa)
{
    return &tables[isa];
}
