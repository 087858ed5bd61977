#include "test.h"

#include <math.h>

#include "math/blocks.h"

enum { ALL = 14, MAX_VALUES = 512, MAX_BYTES = 1024 };

static const block_type all_types[ALL] = {BLOCK_F32,  BLOCK_F16,  BLOCK_BF16, BLOCK_Q4_0, BLOCK_Q4_1, BLOCK_Q5_0, BLOCK_Q5_1,
                                          BLOCK_Q8_0, BLOCK_Q2_K, BLOCK_Q3_K, BLOCK_Q4_K, BLOCK_Q5_K, BLOCK_Q6_K, BLOCK_IQ4_NL};

struct record {
    uint32_t kind, type, n_bytes, n_values;
    uint8_t bytes[MAX_BYTES];
    float values[MAX_VALUES];
};

static bool record_read(FILE *file, struct record *r)
{
    if (fread(&r->kind, sizeof(uint32_t), 4, file) != 4) return false;
    assert_in_range(r->n_bytes, 1, MAX_BYTES);
    assert_in_range(r->n_values, 1, MAX_VALUES);
    assert_int_equal(fread(r->bytes, 1, r->n_bytes, file), r->n_bytes);
    assert_int_equal(fread(r->values, sizeof(float), r->n_values, file), r->n_values);
    return true;
}

/* Values and bytes come from the Python package gguf (scripts/make_block_fixtures.py). */
static void test_blocks_agree_with_gguf_python(void **state)
{
    (void)state;
    FILE *file = fopen(QUARRY_TEST_DATA "/blocks.bin", "rb");
    assert_non_null(file);
    struct record r;
    int n_dequantized = 0, n_quantized = 0;
    while (record_read(file, &r)) {
        if (r.kind == 0) {
            float out[MAX_VALUES];
            block_dequantize((block_type)r.type, r.bytes, r.n_values, out);
            for (uint32_t i = 0; i < r.n_values; i++)
                if (out[i] != r.values[i]) fail_msg("%s weight %u: %g, expected %g", block_type_name(r.type), i, out[i], r.values[i]);
            n_dequantized++;
        } else {
            uint8_t out[MAX_BYTES];
            assert_true(block_quantize((block_type)r.type, r.values, r.n_values, out));
            for (uint32_t i = 0; i < r.n_bytes; i++)
                if (out[i] != r.bytes[i]) fail_msg("%s byte %u: %d, expected %d", block_type_name(r.type), i, out[i], r.bytes[i]);
            n_quantized++;
        }
    }
    fclose(file);
    assert_int_equal(n_dequantized, ALL - 1);
    assert_int_equal(n_quantized, 6);
}

static void test_sizes_and_names_are_known(void **state)
{
    (void)state;
    static const uint32_t n_bytes[ALL] = {4, 2, 2, 18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18};
    for (int i = 0; i < ALL; i++) {
        const block_info *info = block_info_get(all_types[i]);
        assert_non_null(info);
        assert_int_equal(info->n_bytes, n_bytes[i]);
        assert_string_equal(info->name, block_type_name(all_types[i]));
    }
    assert_null(block_info_get(16));
    assert_string_equal(block_type_name(16), "IQ2_XXS");
    assert_null(block_info_get(99));
    assert_null(block_type_name(99));
}

static void test_every_f16_survives_the_way_to_f32_and_back(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = f16_to_f32((uint16_t)h);
        if ((h & 0x7c00) == 0x7c00 && (h & 0x3ff))
            assert_true(isnan(x) && isnan(f16_to_f32(f32_to_f16(x))));
        else
            assert_int_equal(f32_to_f16(x), h);
    }
    assert_true(f16_to_f32(0x3c00) == 1 && f16_to_f32(0x7bff) == 65504 && f16_to_f32(1) == 0x1p-24f && f16_to_f32(0xc000) == -2);
}

static void test_f16_rounds_to_nearest_even(void **state)
{
    (void)state;
    /* Between every two neighbours the middle goes to the even one, and a little more or less to the nearer one. */
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float low = f16_to_f32((uint16_t)h), high = f16_to_f32((uint16_t)(h + 1)), middle = (low + high) / 2;
        assert_int_equal(f32_to_f16(middle), h % 2 ? h + 1 : h);
        assert_int_equal(f32_to_f16(nextafterf(middle, 0)), h);
        assert_int_equal(f32_to_f16(-nextafterf(middle, INFINITY)), (h + 1) | 0x8000);
    }
    assert_int_equal(f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(f32_to_f16(65520), 0x7c00);
    assert_int_equal(f32_to_f16(3e38f), 0x7c00);
    assert_int_equal(f32_to_f16(1e-30f), 0);
}

static void test_quantised_values_stay_within_a_step(void **state)
{
    (void)state;
    static const struct {
        block_type type;
        float error; /* half a step; Q4_0 and Q5_0 cut a whole one where the sign is not that of the largest value */
    } cases[] = {
        {BLOCK_Q4_0, 1.0f / 8}, {BLOCK_Q4_1, 1.0f / 15}, {BLOCK_Q5_0, 1.0f / 16}, {BLOCK_Q5_1, 1.0f / 31}, {BLOCK_Q8_0, 0.5f / 127}};
    float x[32], y[32];
    for (int i = 0; i < 32; i++) x[i] = (float)(2 * i - 31) / 31;
    for (size_t c = 0; c < TEST_COUNT(cases); c++) {
        uint8_t blocks[64];
        assert_true(block_quantize(cases[c].type, x, 32, blocks));
        block_dequantize(cases[c].type, blocks, 32, y);
        for (int i = 0; i < 32; i++) assert_true(fabsf(x[i] - y[i]) <= cases[c].error * 1.001f + 1e-3f);
    }
    assert_false(block_quantize(BLOCK_Q4_K, x, 32, y));
}

static void test_quantising_what_is_not_finite_does_not_trap(void **state)
{
    (void)state;
    static const block_type types[] = {BLOCK_F16, BLOCK_BF16, BLOCK_Q4_0, BLOCK_Q4_1, BLOCK_Q5_0, BLOCK_Q5_1, BLOCK_Q8_0};
    float x[32] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f};
    for (size_t i = 0; i < TEST_COUNT(types); i++) {
        uint8_t blocks[64];
        assert_true(block_quantize(types[i], x, 32, blocks));
    }
    uint16_t h[32];
    float y[32];
    assert_true(block_quantize(BLOCK_BF16, x, 32, h));
    block_dequantize(BLOCK_BF16, h, 32, y);
    assert_true(isnan(y[0]) && y[1] == INFINITY && y[2] == -INFINITY);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks_agree_with_gguf_python),
        cmocka_unit_test(test_sizes_and_names_are_known),
        cmocka_unit_test(test_every_f16_survives_the_way_to_f32_and_back),
        cmocka_unit_test(test_f16_rounds_to_nearest_even),
        cmocka_unit_test(test_quantised_values_stay_within_a_step),
        cmocka_unit_test(test_quantising_what_is_not_finite_does_not_trap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
