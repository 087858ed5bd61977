/* The products of all packed types, one function for each so that what depends on the type is decided while compiling: included once by each
 * instruction set's file, after its product() and add_rests(). */
#define PRODUCT(name)                                                                                                                      \
    static void product_##name(const uint8_t *panel, int64_t n_in, const uint8_t *quantized, const rest_list *rests, int64_t n,            \
                               float *out)                                                                                                 \
    {                                                                                                                                      \
        if (!rests) {                                                                                                                      \
            product(BLOCK_##name, true, panel, n_in, quantized, n, out);                                                                   \
            return;                                                                                                                        \
        }                                                                                                                                  \
        panel_layout layout;                                                                                                               \
        panel_layout_get(BLOCK_##name, &layout);                                                                                           \
        product(BLOCK_##name, false, panel, n_in, quantized, n, out);                                                                      \
        add_rests(BLOCK_##name, &layout, panel, n_in, rests, n, out);                                                                      \
    }
PRODUCT(Q4_0)
PRODUCT(Q4_1)
PRODUCT(Q5_0)
PRODUCT(Q5_1)
PRODUCT(Q8_0)
PRODUCT(IQ4_NL)
PRODUCT(Q2_K)
PRODUCT(Q3_K)
PRODUCT(Q4_K)
PRODUCT(Q5_K)
PRODUCT(Q6_K)

static void panel_product(block_type type, const uint8_t *panel, int64_t n_in, const uint8_t *quantized, const rest_list *rests, int64_t n,
                          float *out)
{
    switch ((int)type) {
    case BLOCK_Q4_0: product_Q4_0(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q4_1: product_Q4_1(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q5_0: product_Q5_0(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q5_1: product_Q5_1(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q8_0: product_Q8_0(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_IQ4_NL: product_IQ4_NL(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q2_K: product_Q2_K(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q3_K: product_Q3_K(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q4_K: product_Q4_K(panel, n_in, quantized, rests, n, out); break;
    case BLOCK_Q5_K: product_Q5_K(panel, n_in, quantized, rests, n, out); break;
    default: product_Q6_K(panel, n_in, quantized, rests, n, out); break;
    }
}
