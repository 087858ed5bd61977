#include "math/vector_simd.h"

const vector_kernels vector_avx2 = VECTOR_KERNELS;
