#include "test.h"

#include <math.h>

#include "base/base.h"
#include "math/matmul.h"

static const block_type quantized_types[] = {BLOCK_Q4_0, BLOCK_Q4_1, BLOCK_Q5_0, BLOCK_Q5_1, BLOCK_Q8_0,  BLOCK_Q2_K,
                                             BLOCK_Q3_K, BLOCK_Q4_K, BLOCK_Q5_K, BLOCK_Q6_K, BLOCK_IQ4_NL};
static const block_type float_types[] = {BLOCK_F32, BLOCK_F16, BLOCK_BF16};

/* The tables this machine can run, the specification first. */
static int kernels_here(const matmul_kernels **tables)
{
    int n = 0;
    tables[n++] = &matmul_scalar;
#if defined(__x86_64__)
    if (cpu_detect() >= CPU_AVX2) tables[n++] = &matmul_avx2;
    if (cpu_detect() >= CPU_AVX512VNNI) tables[n++] = &matmul_avx512vnni;
#endif
    return n;
}

/* Offsets of the f16 scales of a block, -1 for none. */
static void scale_offsets(block_type type, int offset[2])
{
    offset[0] = type == BLOCK_Q2_K ? 80 : type == BLOCK_Q3_K ? 108 : type == BLOCK_Q6_K ? 208 : 0;
    offset[1] = type == BLOCK_Q2_K ? 82 : type == BLOCK_Q4_1 || type == BLOCK_Q5_1 || type == BLOCK_Q4_K || type == BLOCK_Q5_K ? 2 : -1;
}

static void set_scale(block_type type, uint8_t *block, int which, uint16_t h)
{
    int offset[2];
    scale_offsets(type, offset);
    if (offset[which] >= 0) memcpy(block + offset[which], &h, sizeof h);
}

/* Random blocks (every bit pattern of the quants) with scales about 0.02. */
static uint8_t *random_blocks(random_state *r, block_type type, int64_t n)
{
    const block_info *info = block_info_get(type);
    int64_t n_blocks = n / info->n_weights;
    uint8_t *blocks = malloc((size_t)n_blocks * info->n_bytes);
    for (int64_t b = 0; b < n_blocks; b++) {
        uint8_t *block = blocks + b * info->n_bytes;
        if (info->n_weights == 1) {
            float x = (float)random_normal(r);
            block_quantize(type, &x, 1, block);
            continue;
        }
        for (uint32_t i = 0; i < info->n_bytes; i++) block[i] = (uint8_t)random_u64(r);
        for (int which = 0; which < 2; which++) set_scale(type, block, which, f32_to_f16(0.02f * (float)random_normal(r)));
    }
    return blocks;
}

static float *random_floats(random_state *r, int64_t n)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (float)random_normal(r);
    return x;
}

/* y[n][n_out] by the kernels under test. */
static void product(const matmul_kernels *kernels, thread_pool *pool, const weight *w, const float *x, int64_t n, bool precise, float *y)
{
    activations a = {.n_rows = n, .n_in = w->n_in, .x = x, .precise = precise};
    a.quantized = memory_aligned(activations_bytes(n, w->n_in, precise), 1, "test", NULL);
    activations_quantize(&a, kernels, pool);
    matmul_job job = {w, NULL, y, false};
    matmul_run(kernels, pool, &a, &job, 1);
    memory_free(a.quantized);
}

/* The values that int8 activations stand for: blocks of 32, scale max / 127, nearest. */
static void round_activations(const float *x, int64_t n, double *out)
{
    for (int64_t b = 0; b < n; b += 32) {
        float max = 0;
        for (int i = 0; i < 32; i++) max = fmaxf(max, fabsf(x[b + i]));
        for (int i = 0; i < 32; i++) out[b + i] = max > 0 ? (double)(max / 127) * rint((double)(x[b + i] * (127 / max))) : 0;
    }
}

/* Largest |y - exact| relative to the sum of |w x|, over all outputs. */
static double worst_error(block_type type, int64_t n_out, int64_t n_in, const uint8_t *blocks, const float *x, int64_t n, const float *y)
{
    bool is_float = block_info_get(type)->n_weights == 1;
    float *w = malloc((size_t)(n_out * n_in) * sizeof *w);
    double *rounded = malloc((size_t)n_in * sizeof *rounded), worst = 0;
    block_dequantize(type, blocks, n_out * n_in, w);
    for (int64_t t = 0; t < n; t++) {
        if (is_float)
            for (int64_t i = 0; i < n_in; i++) rounded[i] = x[t * n_in + i];
        else
            round_activations(x + t * n_in, n_in, rounded);
        for (int64_t row = 0; row < n_out; row++) {
            double exact = 0, magnitude = 1e-30;
            for (int64_t i = 0; i < n_in; i++) {
                exact += rounded[i] * (double)w[row * n_in + i];
                magnitude += fabs(rounded[i] * (double)w[row * n_in + i]);
            }
            worst = fmax(worst, fabs(exact - (double)y[t * n_out + row]) / magnitude);
        }
    }
    free(w);
    free(rounded);
    return worst;
}

/* Every chain of f32 operations has at most 2 n_in / 16 (floats: n_in) roundings of half a unit each, on partial sums no larger than
 * the sum of magnitudes (with mins: up to a few times that). */
enum { N_ROWS = 19 };

static void check_against_doubles(block_type type, int64_t n_out, int64_t n_in, double bound)
{
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    random_state r;
    random_seed(&r, (uint64_t)(type * 1000 + n_in));
    uint8_t *blocks = random_blocks(&r, type, n_out * n_in);
    float *x = random_floats(&r, N_ROWS * n_in), *y = malloc((size_t)(N_ROWS * n_out) * sizeof *y);
    thread_pool *pool = thread_pool_create(2, NULL);
    for (int i = 0; i < n_tables; i++) {
        weight w;
        assert_int_equal(weight_make(&w, tables[i], pool, type, n_out, n_in, blocks, NULL), QUARRY_OK);
        product(tables[i], pool, &w, x, N_ROWS, false, y);
        double error = worst_error(type, n_out, n_in, blocks, x, N_ROWS, y);
        if (!(error <= bound))
            fail_msg("%s %lldx%lld, table %d: error %g", block_type_name(type), (long long)n_out, (long long)n_in, i, error);
        weight_free(&w);
    }
    thread_pool_destroy(pool);
    free(blocks);
    free(x);
    free(y);
}

static void test_quantised_products_agree_with_doubles(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(quantized_types); i++) {
        check_against_doubles(quantized_types[i], 37, 256, 1e-6);
        check_against_doubles(quantized_types[i], 16, 768, 1e-6);
        if (block_info_get(quantized_types[i])->n_weights == 32) check_against_doubles(quantized_types[i], 5, 96, 1e-6);
    }
}

static void test_float_products_agree_with_doubles(void **state)
{
    (void)state;
    static const int64_t shapes[][2] = {{1, 1}, {3, 7}, {17, 33}, {40, 576}, {16, 1003}};
    for (size_t i = 0; i < TEST_COUNT(float_types); i++)
        for (size_t s = 0; s < TEST_COUNT(shapes); s++) check_against_doubles(float_types[i], shapes[s][0], shapes[s][1], 2e-6);
}

/* Integer dot products are exact and the f32 chain has one order, so the instruction sets agree to the last bit. */
static void test_instruction_sets_agree_bit_for_bit(void **state)
{
    (void)state;
    enum { N_OUT = 53, N_IN = 512, N = 33 };
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 7);
    float *x = random_floats(&r, N * N_IN), *expected = malloc(N * N_OUT * sizeof(float)), *y = malloc(N * N_OUT * sizeof(float));
    for (int i = 0; i < N_IN; i++) x[i + N_IN] *= 1e-20f, x[i + 2 * N_IN] = 0;
    for (int t = 3; t < N; t++) /* massive activations */
        for (int i = 0; i < t % 4; i++) x[t * N_IN + (t * 37 + 64 * i) % N_IN] *= 50;
    for (size_t k = 0; k < TEST_COUNT(quantized_types); k++) {
        uint8_t *blocks = random_blocks(&r, quantized_types[k], N_OUT * N_IN);
        weight w;
        assert_int_equal(weight_make(&w, tables[0], pool, quantized_types[k], N_OUT, N_IN, blocks, NULL), QUARRY_OK);
        for (int i = 0; i < 2 * n_tables; i++) {
            bool precise = i >= n_tables;
            memset(y, 0xff, N * N_OUT * sizeof(float));
            product(tables[i % n_tables], pool, &w, x, N, precise, y);
            if (i % n_tables == 0) memcpy(expected, y, N * N_OUT * sizeof(float));
            for (int j = 0; j < N * N_OUT; j++)
                if (memcmp(&y[j], &expected[j], sizeof(float)) != 0)
                    fail_msg("%s table %d%s, token %d row %d: %.9g, expected %.9g", block_type_name(quantized_types[k]), i % n_tables,
                             precise ? " precise" : "", j / N_OUT, j % N_OUT, y[j], expected[j]);
        }
        weight_free(&w);
        free(blocks);
    }
    thread_pool_destroy(pool);
    free(x);
    free(expected);
    free(y);
}

static void test_a_row_does_not_depend_on_its_batch_or_on_threads(void **state)
{
    (void)state;
    enum { N_OUT = 70, N_IN = 512, N = 61 };
    static const block_type types[] = {BLOCK_Q4_0, BLOCK_Q4_1, BLOCK_Q8_0, BLOCK_Q6_K, BLOCK_Q4_K, BLOCK_F32, BLOCK_F16, BLOCK_BF16};
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *one = thread_pool_create(1, NULL), *three = thread_pool_create(3, NULL);
    random_state r;
    random_seed(&r, 8);
    float *x = random_floats(&r, N * N_IN), *alone = malloc(N * N_OUT * sizeof(float)), *y = malloc(N * N_OUT * sizeof(float));
    for (int t = 0; t < N; t++) x[t * N_IN + t * 29 % N_IN] *= 50;
    for (size_t k = 0; k < TEST_COUNT(types); k++) {
        uint8_t *blocks = random_blocks(&r, types[k], N_OUT * N_IN);
        for (int j = 0; j < 2 * n_tables; j++) {
            int i = j / 2;
            bool precise = j % 2;
            weight w;
            assert_int_equal(weight_make(&w, tables[i], one, types[k], N_OUT, N_IN, blocks, NULL), QUARRY_OK);
            for (int t = 0; t < N; t++) product(tables[i], one, &w, x + t * N_IN, 1, precise, alone + t * N_OUT);
            for (int n = 2; n <= N; n += n < 20 ? 1 : 41) {
                product(tables[i], n % 2 ? one : three, &w, x, n, precise, y);
                if (memcmp(alone, y, (size_t)(n * N_OUT) * sizeof(float)) != 0)
                    fail_msg("%s table %d: batch of %d differs", block_type_name(types[k]), i, n);
            }
            weight_free(&w);
        }
        free(blocks);
    }
    thread_pool_destroy(one);
    thread_pool_destroy(three);
    free(x);
    free(alone);
    free(y);
}

static void test_rows_come_back_as_the_source_says(void **state)
{
    (void)state;
    enum { N_OUT = 21, N_IN = 512 };
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 9);
    for (size_t k = 0; k < TEST_COUNT(quantized_types) + TEST_COUNT(float_types); k++) {
        block_type type = k < TEST_COUNT(quantized_types) ? quantized_types[k] : float_types[k - TEST_COUNT(quantized_types)];
        uint8_t *blocks = random_blocks(&r, type, N_OUT * N_IN);
        float expected[N_OUT * N_IN], row[N_IN];
        block_dequantize(type, blocks, N_OUT * N_IN, expected);
        weight w;
        assert_int_equal(weight_make(&w, &matmul_scalar, pool, type, N_OUT, N_IN, blocks, NULL), QUARRY_OK);
        if (w.packed) memset(blocks, 0, (size_t)(N_OUT * N_IN / block_info_get(type)->n_weights) * block_info_get(type)->n_bytes);
        for (int i = 0; i < N_OUT; i++) {
            weight_row(&w, i, row);
            assert_memory_equal(row, expected + i * N_IN, sizeof row);
        }
        weight_free(&w);
        free(blocks);
    }
    thread_pool_destroy(pool);
}

static void test_packed_weights_take_little_more_than_the_source(void **state)
{
    (void)state;
    enum { N_OUT = 32, N_IN = 512 };
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 10);
    for (size_t k = 0; k < TEST_COUNT(quantized_types); k++) {
        uint8_t *blocks = random_blocks(&r, quantized_types[k], N_OUT * N_IN);
        const block_info *info = block_info_get(quantized_types[k]);
        weight w;
        assert_int_equal(weight_make(&w, &matmul_scalar, pool, quantized_types[k], N_OUT, N_IN, blocks, NULL), QUARRY_OK);
        assert_true((double)w.n_bytes <= 1.04 * N_OUT * N_IN / info->n_weights * info->n_bytes);
        weight_free(&w);
        free(blocks);
    }
    thread_pool_destroy(pool);
}

static void test_several_jobs_with_bias_and_accumulation(void **state)
{
    (void)state;
    enum { N_IN = 96, N = 5 };
    static const int64_t n_out[3] = {48, 7, 100};
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(2, NULL);
    random_state r;
    random_seed(&r, 11);
    float *x = random_floats(&r, N * N_IN), *bias = random_floats(&r, 100);
    for (int i = 0; i < n_tables; i++) {
        weight w[3];
        float *y[3], *plain[3];
        matmul_job jobs[3];
        for (int j = 0; j < 3; j++) {
            block_type type = j == 1 ? BLOCK_F32 : j ? BLOCK_Q8_0 : BLOCK_Q4_1;
            uint8_t *blocks = random_blocks(&r, type, n_out[j] * N_IN);
            assert_int_equal(weight_make(&w[j], tables[i], pool, type, n_out[j], N_IN, blocks, NULL), QUARRY_OK);
            plain[j] = malloc((size_t)(N * n_out[j]) * sizeof(float));
            product(tables[i], pool, &w[j], x, N, false, plain[j]);
            y[j] = malloc((size_t)(N * n_out[j]) * sizeof(float));
            for (int k = 0; k < N * n_out[j]; k++) y[j][k] = 0.5f;
            jobs[j] = (matmul_job){&w[j], j == 2 ? NULL : bias, y[j], j != 1};
            if (w[j].packed) free(blocks);
        }
        activations a = {
            .n_rows = N, .n_in = N_IN, .x = x, .quantized = memory_aligned(activations_bytes(N, N_IN, false), 1, "test", NULL)};
        activations_quantize(&a, tables[i], pool);
        matmul_run(tables[i], pool, &a, jobs, 3);
        for (int j = 0; j < 3; j++) {
            for (int k = 0; k < N * n_out[j]; k++) {
                float expected = plain[j][k];
                if (jobs[j].bias) expected += bias[k % n_out[j]];
                if (jobs[j].accumulate) expected = 0.5f + expected;
                assert_true(y[j][k] == expected);
            }
            if (!w[j].packed) free((void *)(uintptr_t)w[j].data);
            weight_free(&w[j]);
            free(y[j]);
            free(plain[j]);
        }
        memory_free(a.quantized);
    }
    thread_pool_destroy(pool);
    free(x);
    free(bias);
}

static void test_extreme_quants_are_exact(void **state)
{
    (void)state;
    enum { N_IN = 256, N_OUT = 16 };
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(1, NULL);
    for (size_t k = 0; k < TEST_COUNT(quantized_types); k++) {
        const block_info *info = block_info_get(quantized_types[k]);
        for (int fill = 0; fill < 3; fill++) {
            static const uint8_t fills[3] = {0x00, 0xff, 0x80}; /* 0x80 in Q8_0 is -128 */
            uint8_t blocks[N_OUT * N_IN / 32 * 34];
            memset(blocks, fills[fill], sizeof blocks);
            for (uint32_t b = 0; b < N_OUT * N_IN / info->n_weights; b++)
                for (int which = 0; which < 2; which++) set_scale(quantized_types[k], blocks + b * info->n_bytes, which, 0x3c00);
            float x[2 * N_IN], y[2 * N_OUT];
            for (int i = 0; i < N_IN; i++) x[i] = 127, x[N_IN + i] = i % 2 ? 127 : -127;
            weight w;
            assert_int_equal(weight_make(&w, tables[0], pool, quantized_types[k], N_OUT, N_IN, blocks, NULL), QUARRY_OK);
            for (int i = 0; i < n_tables; i++) {
                for (int precise = 0; precise < 2; precise++) {
                    product(tables[i], pool, &w, x, 2, precise, y);
                    assert_true(worst_error(quantized_types[k], N_OUT, N_IN, blocks, x, 2, y) == 0);
                }
            }
            weight_free(&w);
        }
    }
    thread_pool_destroy(pool);
}

static void test_scales_and_activations_that_are_not_finite_reach_the_output(void **state)
{
    (void)state;
    enum { N_IN = 256, N_OUT = 16, N = 3 };
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 12);
    for (size_t k = 0; k < TEST_COUNT(quantized_types); k++) {
        uint8_t *blocks = random_blocks(&r, quantized_types[k], N_OUT * N_IN);
        const block_info *info = block_info_get(quantized_types[k]);
        set_scale(quantized_types[k], blocks + 3 * N_IN / info->n_weights * info->n_bytes, 0, 0x7e00); /* row 3: NaN */
        float *x = random_floats(&r, N * N_IN), y[N * N_OUT];
        x[N_IN + 40] = NAN;
        x[2 * N_IN + 5] = -INFINITY;
        weight w;
        assert_int_equal(weight_make(&w, tables[0], pool, quantized_types[k], N_OUT, N_IN, blocks, NULL), QUARRY_OK);
        for (int i = 0; i < n_tables; i++) {
            product(tables[i], pool, &w, x, N, false, y);
            for (int row = 0; row < N_OUT; row++) {
                assert_int_equal(isnan(y[row]) != 0, row == 3);
                assert_true(isnan(y[N_OUT + row]) && isnan(y[2 * N_OUT + row]));
            }
        }
        weight_free(&w);
        free(blocks);
        free(x);
    }
    thread_pool_destroy(pool);
}

static void test_bad_shapes_and_types_are_refused(void **state)
{
    (void)state;
    thread_pool *pool = thread_pool_create(1, NULL);
    quarry_error error;
    weight w;
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_0, 4, 33, "", &error), QUARRY_ERROR_UNSUPPORTED);
    assert_non_null(strstr(error.message, "Q4_0"));
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_K, 4, 128, "", &error), QUARRY_ERROR_UNSUPPORTED);
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, (block_type)99, 4, 32, "", &error), QUARRY_ERROR_UNSUPPORTED);
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_0, 0, 32, "", &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_0, INT64_MAX / 64, 64, "", &error), QUARRY_ERROR_ARGUMENT);
    thread_pool_destroy(pool);
}

static void test_running_out_of_memory_is_an_error(void **state)
{
    (void)state;
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 13);
    uint8_t *blocks = random_blocks(&r, BLOCK_Q4_1, 16 * 32);
    quarry_error error;
    weight w;
    memory_fail_after(0);
    quarry_code code = weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_1, 16, 32, blocks, &error);
    memory_fail_after(-1);
    assert_int_equal(code, QUARRY_ERROR_MEMORY);
    weight_free(&w); /* allowed after a failure */
    assert_int_equal(weight_make(&w, &matmul_scalar, pool, BLOCK_Q4_1, 16, 32, blocks, &error), QUARRY_OK);
    weight_free(&w);
    free(blocks);
    thread_pool_destroy(pool);
}

/* Precise activations: the products are those of the floats themselves, to 2^-14 of the sum of magnitudes, bitwise equal for every batch size and number of
 * threads and on every instruction set; floats that are not finite stay so. */
static void check_precise(block_type type)
{
    enum { N = 37, N_IN = 256, N_OUT = 40 };
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    random_state r;
    random_seed(&r, 99);
    uint8_t *blocks = random_blocks(&r, type, N_OUT * N_IN);
    float *x = random_floats(&r, N * N_IN), dense[N_OUT * N_IN], first[N * N_OUT], y[N * N_OUT];
    block_dequantize(type, blocks, N_OUT * N_IN, dense);
    x[5] = 8; /* an outlier makes one term coarse */
    for (int i = 0; i < n_tables; i++)
        for (int n = 1; n <= N; n += 9) {
            thread_pool *pool = thread_pool_create(1 + n % 3, NULL);
            weight w;
            assert_int_equal(weight_make(&w, tables[i], pool, type, N_OUT, N_IN, blocks, NULL), QUARRY_OK);
            activations a = {.n_rows = n, .n_in = N_IN, .x = x, .precise = true};
            a.quantized = memory_aligned(activations_bytes(n, N_IN, true), 1, "test", NULL);
            activations_quantize(&a, tables[i], pool);
            matmul_run(tables[i], pool, &a, &(matmul_job){.w = &w, .y = y}, 1);
            for (int t = 0; t < n; t++)
                for (int row = 0; row < N_OUT; row++) {
                    double exact = 0, magnitude = 0;
                    for (int j = 0; j < N_IN; j++) {
                        exact += (double)x[t * N_IN + j] * (double)dense[row * N_IN + j];
                        magnitude += fabs((double)x[t * N_IN + j] * (double)dense[row * N_IN + j]);
                    }
                    assert_true(fabs(exact - (double)y[t * N_OUT + row]) <= magnitude * 0x1p-14);
                }
            if (i == 0 && n == 1) memcpy(first, y, N_OUT * sizeof *y);
            assert_memory_equal(first, y, N_OUT * sizeof *y);
            x[0] = NAN;
            activations_quantize(&a, tables[i], pool);
            matmul_run(tables[i], pool, &a, &(matmul_job){.w = &w, .y = y}, 1);
            assert_true(isnan(y[0]));
            x[0] = 0.25f;
            if (i == 0 && n == 1) { /* row 0 as it is from now on */
                activations_quantize(&a, tables[i], pool);
                matmul_run(tables[i], pool, &a, &(matmul_job){.w = &w, .y = first}, 1);
            }
            memory_free(a.quantized);
            weight_free(&w);
            thread_pool_destroy(pool);
        }
    free(blocks);
    free(x);
}

static void precise_activations_lose_nothing_that_matters(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(quantized_types); i++) check_precise(quantized_types[i]);
}

/* A few massive activations in rows of one term: their blocks get a second one, so that what they add to the error is what 32 ordinary floats do. */
static void massive_activations_do_not_coarsen_their_blocks(void **state)
{
    (void)state;
    enum { N = 50, N_IN = 768, N_OUT = 20 }; /* two blocks of 24 stand out far enough */
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(2, NULL);
    random_state r;
    random_seed(&r, 13);
    float *x = random_floats(&r, N * N_IN), *dense = malloc(N_OUT * N_IN * sizeof *dense), y[N * N_OUT];
    for (int t = 0; t < N; t++)
        for (int i = 0; i < t % 3; i++) x[t * N_IN + (t * 37 + 160 * i) % N_IN] = 300;
    for (size_t k = 0; k < TEST_COUNT(quantized_types); k++) {
        block_type type = quantized_types[k];
        uint8_t *blocks = random_blocks(&r, type, N_OUT * N_IN);
        block_dequantize(type, blocks, N_OUT * N_IN, dense);
        for (int i = 0; i < n_tables; i++) {
            weight w;
            assert_int_equal(weight_make(&w, tables[i], pool, type, N_OUT, N_IN, blocks, NULL), QUARRY_OK);
            product(tables[i], pool, &w, x, N, false, y);
            for (int t = 0; t < N; t++)
                for (int row = 0; row < N_OUT; row++) {
                    double exact = 0, square = 0;
                    for (int j = 0; j < N_IN; j++) {
                        double weight_j = (double)dense[row * N_IN + j];
                        exact += (double)x[t * N_IN + j] * weight_j;
                        square += weight_j * weight_j;
                    }
                    /* Ordinary floats are rounded to steps of 4 / 127 at most: five standard deviations of the sum. Steps of 300 / 127 exceed that by far. */
                    double bound = 5 * 4.0 / 127 / sqrt(12) * sqrt(square) + 1e-5 * fabs(exact);
                    if (!(fabs(exact - (double)y[t * N_OUT + row]) <= bound))
                        fail_msg("%s table %d, token %d row %d: %g, exact %g, bound %g", block_type_name(type), i, t, row,
                                 (double)y[t * N_OUT + row], exact, bound);
                }
            weight_free(&w);
        }
        free(blocks);
    }
    thread_pool_destroy(pool);
    free(x);
    free(dense);
}

/* Zeros, tiny, huge and infinite floats among ordinary ones, in groups that are full and not. */
static void activations_are_the_same_bytes_on_every_instruction_set(void **state)
{
    (void)state;
    enum { N = 21, N_IN = 160 };
    const matmul_kernels *tables[4];
    int n_tables = kernels_here(tables);
    thread_pool *pool = thread_pool_create(1, NULL);
    random_state r;
    random_seed(&r, 12);
    float *x = random_floats(&r, N * N_IN);
    for (int i = 0; i < 32; i++) x[i] = 0, x[32 + i] *= 1e-34f, x[64 + i] *= 1e37f;
    x[96 + 7] = INFINITY;
    x[128 + 31] = -NAN;
    for (int precise = 0; precise < 2; precise++) {
        size_t n_bytes = activations_bytes(N, N_IN, precise);
        uint8_t *first = calloc(n_bytes, 1);
        for (int i = 0; i < n_tables; i++) {
            activations a = {.n_rows = N, .n_in = N_IN, .x = x, .precise = precise, .quantized = memory_aligned(n_bytes, 1, "test", NULL)};
            memset(a.quantized, 0, n_bytes);
            activations_quantize(&a, tables[i], pool);
            if (i == 0) memcpy(first, a.quantized, n_bytes);
            assert_memory_equal(first, a.quantized, n_bytes);
            memory_free(a.quantized);
        }
        free(first);
    }
    thread_pool_destroy(pool);
    free(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantised_products_agree_with_doubles),
        cmocka_unit_test(test_float_products_agree_with_doubles),
        cmocka_unit_test(test_instruction_sets_agree_bit_for_bit),
        cmocka_unit_test(test_a_row_does_not_depend_on_its_batch_or_on_threads),
        cmocka_unit_test(test_rows_come_back_as_the_source_says),
        cmocka_unit_test(test_packed_weights_take_little_more_than_the_source),
        cmocka_unit_test(test_several_jobs_with_bias_and_accumulation),
        cmocka_unit_test(test_extreme_quants_are_exact),
        cmocka_unit_test(test_scales_and_activations_that_are_not_finite_reach_the_output),
        cmocka_unit_test(test_bad_shapes_and_types_are_refused),
        cmocka_unit_test(activations_are_the_same_bytes_on_every_instruction_set),
        cmocka_unit_test(precise_activations_lose_nothing_that_matters),
        cmocka_unit_test(massive_activations_do_not_coarsen_their_blocks),
        cmocka_unit_test(test_running_out_of_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
