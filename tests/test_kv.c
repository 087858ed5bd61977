/* Pages of keys and values: addresses, forks, truncation, failures. */
#include "test.h"

#include "kv/kv.h"

enum { LAYERS = 3, HEADS = 2, DIM = 16 };

static const kv_shape shape = {.n_layer = LAYERS, .n_head_kv = HEADS, .head_dim = DIM, .type = KV_F32};

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

enum { WINDOW = 100 };

static const kv_shape windowed = {
    .n_layer = 1, .n_head_kv = HEADS, .head_dim = DIM, .type = KV_F32, .n_local = LAYERS - 1, .window = WINDOW};

/* n tokens, 50 at a time, as a session feeds them. */
static kv_seq *fed(int64_t n)
{
    kv_seq *kv = kv_create(&windowed, NULL);
    for (int64_t at = 0; at < n; at += 50) {
        int64_t end = at + 50 < n ? at + 50 : n;
        assert_int_equal(kv_reserve(kv, end, NULL), QUARRY_OK);
        fill(kv, at, end, 0);
    }
    return kv;
}

static void check_windowed(const kv_seq *kv, int64_t n, float salt)
{
    float k[DIM];
    for (int layer = 0; layer < LAYERS; layer++)
        for (int64_t pos = kv_first_seen(&windowed, layer, n); pos < n; pos++) {
            kv_read_key(math_kernels_get(CPU_SCALAR), kv_row(kv, layer, 1, pos), &windowed, k);
            assert_true(k[3] == salt + (float)(((pos * LAYERS + layer) * HEADS + 1) * DIM + 3));
        }
}

static void local_layers_forget_what_no_later_token_sees(void **state)
{
    (void)state;
    const int64_t n = KV_PAGE * 20 + 30;
    kv_seq *kv = fed(n);
    size_t most;
    check_windowed(kv, n, 0);
    assert_int_equal(kv_first_seen(&windowed, 0, n), 0);
    assert_int_equal(kv_first_seen(&windowed, 1, n), n - WINDOW + 1);
    assert_true(kv_bytes_for(&windowed, n, 50, &most));
    assert_in_range(kv_bytes(kv), most * 2 / 3, most);
    const double row = (double)kv_row_bytes(KV_F32, DIM) * HEADS;
    assert_true(kv_bytes_seen(&windowed, n) == row * (double)(n + (LAYERS - 1) * WINDOW));
    assert_true(kv_bytes_seen(&windowed, 7) == row * 7 * LAYERS);
    kv_destroy(kv);
}

static void what_is_taken_back_can_be_written_again(void **state)
{
    (void)state;
    const int64_t n = KV_PAGE * 8 + 30;
    kv_seq *kv = fed(n), *fork = kv_fork(kv, NULL);
    assert_in_range(kv_least(kv), 1, n - KV_SLACK);
    kv_truncate(fork, kv_least(fork));
    check_windowed(fork, kv_length(fork), 0);
    assert_int_equal(kv_reserve(fork, n, NULL), QUARRY_OK);
    int64_t first = kv_length(fork);
    fill(fork, first, n, 0);
    check_windowed(fork, n, 0);
    check_windowed(kv, n, 0);
    kv_destroy(kv);
    check_windowed(fork, n, 0);
    kv_truncate(fork, 0);
    assert_int_equal(kv_bytes(fork), 0);
    assert_int_equal(kv_least(fork), 1);
    assert_int_equal(kv_reserve(fork, 10, NULL), QUARRY_OK);
    fill(fork, 0, 10, 0);
    check_windowed(fork, 10, 0);
    kv_destroy(fork);
}

static void local_pages_fail_as_the_others(void **state)
{
    (void)state;
    kv_seq *kv = fed(KV_PAGE * 5 + 3), *fork = kv_fork(kv, NULL);
    quarry_code code = QUARRY_ERROR_MEMORY;
    int64_t n = 0;
    for (; code != QUARRY_OK; n++) {
        memory_fail_after(n);
        code = kv_reserve(fork, KV_PAGE * 8, NULL);
        memory_fail_after(-1);
        check_windowed(fork, kv_length(fork), 0);
        check_windowed(kv, kv_length(kv), 0);
        assert_true(n < 100);
    }
    assert_true(n >= 5); /* copies of both last pages, the table, and pages of both kinds failed at least once */
    kv_destroy(kv);
    kv_destroy(fork);
}

static void f16_rows_round_to_nearest(void **state)
{
    (void)state;
    kv_shape half = {.n_layer = 1, .n_head_kv = 1, .head_dim = DIM, .type = KV_F16};
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
        cmocka_unit_test(local_layers_forget_what_no_later_token_sees),
        cmocka_unit_test(what_is_taken_back_can_be_written_again),
        cmocka_unit_test(local_pages_fail_as_the_others),
        cmocka_unit_test(f16_rows_round_to_nearest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
