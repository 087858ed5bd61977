#include "math/matmul_internal.h"

const matmul_kernels matmul_avx2 = {8, activations_quantize_scalar, panel_product_scalar, floats_product_scalar};
