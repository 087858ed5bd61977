#include "math/attention_simd.h"

const attention_kernels attention_avx512 = ATTENTION_KERNELS;
