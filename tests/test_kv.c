/* Pages of keys and values: addresses, forks, truncation, failures. */
#include "test.h"

#include "kv/kv.h"

enum { LAYERS = 3, HEADS = 2, DIM = 16 };

static const kv_shape shape = {LAYERS, HEADS, DIM, KV_F32};

static void fill(kv_seq *kv, int64_t first, int64_t end, float salt)
{
    float k[DIM], v[DIM];
    for (int64_t pos = first; pos < end; pos++)
        for (int layer = 0; layer < LAYERS; layer++)
            for (int head = 0; head < HEADS; head++) {
                for (int i = 0; i < DIM; i++) {
                    k[i] = salt + (float)(((pos * LAYERS + layer) * HEADS + head) * DIM + i);
                    v[i] = -k[i];
                }
                kv_write(math_kernels_get(CPU_SCALAR), kv_row(kv, layer, head, pos), &shape, k, v);
            }
    kv_commit(kv, end);
}

static void check(const kv_seq *kv, int64_t first, int64_t end, float salt)
{
    float k[DIM], v[DIM];
    for (int64_t pos = first; pos < end; pos++)
        for (int layer = 0; layer < LAYERS; layer++)
            for (int head = 0; head < HEADS; head++) {
                kv_read_key(math_kernels_get(CPU_SCALAR), kv_row(kv, layer, head, pos), &shape, k);
                kv_read_value(math_kernels_get(CPU_SCALAR), kv_row(kv, layer, head, pos), &shape, v);
                for (int i = 0; i < DIM; i++) {
                    float want = salt + (float)(((pos * LAYERS + layer) * HEADS + head) * DIM + i);
                    assert_true(k[i] == want && v[i] == -want);
                }
            }
}

static kv_seq *filled(int64_t n, float salt)
{
    kv_seq *kv = kv_create(&shape, NULL);
    assert_int_equal(kv_reserve(kv, n, NULL), QUARRY_OK);
    fill(kv, 0, n, salt);
    return kv;
}

static void rows_keep_what_was_written(void **state)
{
    (void)state;
    kv_seq *kv = filled(KV_PAGE * 2 + 7, 0);
    check(kv, 0, KV_PAGE * 2 + 7, 0);
    assert_int_equal(kv_length(kv), KV_PAGE * 2 + 7);
    kv_destroy(kv);
}

static void rows_of_a_head_are_contiguous_within_a_page(void **state)
{
    (void)state;
    kv_seq *kv = filled(KV_PAGE + 1, 0);
    const char *first = kv_row(kv, 1, 1, 3);
    assert_int_equal(kv_run(3), KV_PAGE - 3);
    for (int64_t i = 0; i < kv_run(3); i++) assert_ptr_equal(kv_row(kv, 1, 1, 3 + i), first + (size_t)i * kv_row_bytes(KV_F32, DIM));
    kv_destroy(kv);
}

static void a_fork_sees_the_past_and_writes_its_own_future(void **state)
{
    (void)state;
    const int64_t n = KV_PAGE + 40;
    kv_seq *kv = filled(n, 0), *fork = kv_fork(kv, NULL);
    size_t alone = kv_bytes(kv);
    assert_int_equal(kv_length(fork), n);
    assert_ptr_equal(kv_row(kv, 0, 0, 5), kv_row(fork, 0, 0, 5)); /* shared */
    assert_int_equal(kv_reserve(fork, n + 10, NULL), QUARRY_OK);
    fill(fork, n, n + 10, 1000000);
    assert_int_equal(kv_reserve(kv, n + 10, NULL), QUARRY_OK);
    fill(kv, n, n + 10, 2000000);
    assert_ptr_equal(kv_row(kv, 0, 0, 5), kv_row(fork, 0, 0, 5));
    check(kv, 0, n, 0);
    check(fork, 0, n, 0);
    check(kv, n, n + 10, 2000000);
    check(fork, n, n + 10, 1000000);
    assert_int_equal(kv_bytes(kv), alone);
    kv_destroy(kv);
    check(fork, 0, n, 0);
    kv_destroy(fork);
}

static void truncation_frees_pages_and_writing_goes_on(void **state)
{
    (void)state;
    kv_seq *kv = filled(KV_PAGE * 3, 0), *fork = kv_fork(kv, NULL);
    size_t before = kv_bytes(kv);
    kv_truncate(kv, KV_PAGE + 1);
    assert_int_equal(kv_length(kv), KV_PAGE + 1);
    assert_int_equal(kv_bytes(kv), before / 3 * 2);
    assert_int_equal(kv_reserve(kv, KV_PAGE + 9, NULL), QUARRY_OK);
    fill(kv, KV_PAGE + 1, KV_PAGE + 9, 5000000);
    check(kv, 0, KV_PAGE + 1, 0);
    check(kv, KV_PAGE + 1, KV_PAGE + 9, 5000000);
    check(fork, 0, KV_PAGE * 3, 0); /* the fork's rows were not overwritten */
    kv_truncate(kv, 0);
    assert_int_equal(kv_bytes(kv), 0);
    kv_destroy(kv);
    kv_destroy(fork);
}

static void failed_allocations_change_nothing(void **state)
{
    (void)state;
    kv_seq *kv = filled(KV_PAGE + 3, 0), *fork = kv_fork(kv, NULL);
    quarry_code code = QUARRY_ERROR_MEMORY;
    for (int64_t n = 0; code != QUARRY_OK; n++) {
        quarry_error e = {0};
        memory_fail_after(n);
        code = kv_reserve(fork, KV_PAGE * 6, &e);
        memory_fail_after(-1);
        assert_true(code == QUARRY_OK || e.code == QUARRY_ERROR_MEMORY);
        assert_int_equal(kv_length(fork), KV_PAGE + 3);
        check(fork, 0, KV_PAGE + 3, 0);
        check(kv, 0, KV_PAGE + 3, 0);
        assert_true(n < 100);
    }
    for (int64_t n = 0; n < 2; n++) {
        memory_fail_after(n);
        assert_null(kv_fork(kv, NULL));
        memory_fail_after(-1);
    }
    kv_destroy(kv);
    kv_destroy(fork);
}

static void f16_rows_round_to_nearest(void **state)
{
    (void)state;
    kv_shape half = {1, 1, DIM, KV_F16};
    kv_seq *kv = kv_create(&half, NULL);
    assert_int_equal(kv_reserve(kv, 1, NULL), QUARRY_OK);
    float k[DIM], v[DIM], out[DIM];
    for (int i = 0; i < DIM; i++) {
        k[i] = 1.0f / (float)(i + 3);
        v[i] = (float)i * 0.5f; /* exact in f16 */
    }
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    kv_write(kernels, kv_row(kv, 0, 0, 0), &half, k, v);
    kv_read_key(kernels, kv_row(kv, 0, 0, 0), &half, out);
    for (int i = 0; i < DIM; i++) assert_true(out[i] == f16_to_f32(f32_to_f16(k[i])));
    kv_read_value(kernels, kv_row(kv, 0, 0, 0), &half, out);
    assert_memory_equal(out, v, sizeof v);
    kv_destroy(kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_keep_what_was_written),
        cmocka_unit_test(rows_of_a_head_are_contiguous_within_a_page),
        cmocka_unit_test(a_fork_sees_the_past_and_writes_its_own_future),
        cmocka_unit_test(truncation_frees_pages_and_writing_goes_on),
        cmocka_unit_test(failed_allocations_change_nothing),
        cmocka_unit_test(f16_rows_round_to_nearest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
