#include "math/attention_simd.h"

const attention_kernels attention_avx2 = ATTENTION_KERNELS;
