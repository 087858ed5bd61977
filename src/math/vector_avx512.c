#include "math/vector_simd.h"

const vector_kernels vector_avx512 = VECTOR_KERNELS;
