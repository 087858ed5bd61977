/* Errors, memory, arenas, random numbers and the thread pool. */
#include "test.h"

#include <pthread.h>
#include <stdatomic.h>

#include "base/base.h"

static void error_message_is_cut_not_overrun(void **state)
{
    (void)state;
    quarry_error e = {0};
    char name[2000];
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = 0;
    assert_int_equal(error_set(&e, QUARRY_ERROR_IO, "%s", name), QUARRY_ERROR_IO);
    assert_int_equal(strlen(e.message), sizeof e.message - 1);
    assert_int_equal(error_set(NULL, QUARRY_ERROR_IO, "x"), QUARRY_ERROR_IO);
}

static void overflowing_sizes_are_out_of_memory(void **state)
{
    (void)state;
    quarry_error e = {0};
    assert_null(memory_alloc(SIZE_MAX / 2, 3, "test", &e));
    assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
    assert_null(memory_aligned(SIZE_MAX / 2, 3, "test", &e));
    void *p = memory_alloc(4, 4, "test", &e), *same = p;
    assert_int_equal(memory_grow(&p, SIZE_MAX, 2, "test", &e), QUARRY_ERROR_MEMORY);
    assert_ptr_equal(p, same);
    memory_free(p);
    arena a = {0};
    assert_null(arena_alloc(&a, SIZE_MAX / 2, 3, &e));
    assert_null(arena_alloc(&a, SIZE_MAX / 3, 1, &e));
    arena_free(&a);
}

static void injected_failure_hits_the_nth_allocation(void **state)
{
    (void)state;
    quarry_error e = {0};
    memory_fail_after(1);
    void *first = memory_alloc(1, 1, "test", &e);
    void *second = memory_alloc(1, 1, "test", &e);
    void *third = memory_zero(1, 1, "test", &e);
    memory_fail_after(-1);
    assert_non_null(first);
    assert_null(second);
    assert_null(third);
    assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
    memory_free(first);
}

static void reserved_arena_memory_lies_together(void **state)
{
    (void)state;
    arena a = {0};
    assert_int_equal(arena_reserve(&a, 3 * ((size_t)1 << 20), NULL), QUARRY_OK);
    size_t held = a.n_bytes;
    char *first = arena_alloc(&a, 1 << 20, 1, NULL), *last = NULL;
    for (int i = 0; i < 2; i++) last = arena_alloc(&a, 1 << 20, 1, NULL);
    assert_ptr_equal(last, first + (2 << 20));
    assert_int_equal(a.n_bytes, held);
    assert_int_equal(arena_reserve(&a, SIZE_MAX - 256, NULL), QUARRY_ERROR_MEMORY);
    memset(first, 1, 3 << 20);
    arena_free(&a);
}

static void arena_blocks_are_aligned_and_do_not_overlap(void **state)
{
    (void)state;
    arena a = {0};
    for (int round = 0; round < 3; round++) {
        unsigned char *p[200];
        for (int i = 0; i < 200; i++) {
            p[i] = arena_alloc(&a, (size_t)(i * 37 + 1), 3, NULL);
            assert_non_null(p[i]);
            assert_int_equal((uintptr_t)p[i] % 64, 0);
            memset(p[i], i, (size_t)(i * 37 + 1) * 3);
        }
        for (int i = 0; i < 200; i++)
            for (int j = 0; j < (i * 37 + 1) * 3; j++) assert_int_equal(p[i][j], (unsigned char)i);
        size_t held = a.n_bytes;
        arena_reset(&a);
        assert_true(a.n_bytes <= held);
    }
    arena_free(&a);
    assert_int_equal(a.n_bytes, 0);
}

static void random_numbers_follow_the_reference(void **state)
{
    (void)state;
    /* xoshiro256** from the state {1, 2, 3, 4}: first outputs of the authors' reference code */
    random_state r = {{1, 2, 3, 4}};
    const uint64_t expected[] = {11520, 0, 1509978240, 1215971899390074240u};
    for (int i = 0; i < 4; i++) assert_true(random_u64(&r) == expected[i]);
    random_seed(&r, 7);
    double sum = 0, squares = 0;
    for (int i = 0; i < 20000; i++) {
        double x = random_normal(&r);
        sum += x;
        squares += x * x;
        assert_true(random_below(&r, 3) < 3);
    }
    assert_true(sum / 20000 > -0.03 && sum / 20000 < 0.03);
    assert_true(squares / 20000 > 0.95 && squares / 20000 < 1.05);
}

typedef struct loop {
    _Atomic int *runs;
    int n_threads;
    _Atomic int bad_thread;
} loop;

static void count_run(void *context, int64_t task, int thread)
{
    loop *l = context;
    if (thread < 0 || thread >= l->n_threads) atomic_store(&l->bad_thread, 1);
    atomic_fetch_add(&l->runs[task], 1);
}

static void every_task_runs_once(void **state)
{
    (void)state;
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        thread_pool *pool = thread_pool_create(n_threads, NULL);
        assert_non_null(pool);
        assert_int_equal(thread_pool_size(pool), n_threads);
        for (int round = 0; round < 2000; round++) {
            int n = round % 17;
            _Atomic int runs[17] = {0};
            loop l = {runs, n_threads, 0};
            thread_pool_run(pool, n, count_run, &l);
            for (int i = 0; i < n; i++) assert_int_equal(runs[i], 1);
            assert_int_equal(l.bad_thread, 0);
        }
        thread_pool_destroy(pool);
    }
}

typedef struct caller {
    thread_pool *pool;
    int failures;
} caller;

static void *call_loops(void *argument)
{
    caller *c = argument;
    for (int round = 0; round < 500; round++) {
        _Atomic int runs[8] = {0};
        loop l = {runs, 3, 0};
        thread_pool_run(c->pool, 8, count_run, &l);
        for (int i = 0; i < 8; i++) c->failures += runs[i] != 1;
    }
    return NULL;
}

static void callers_on_several_threads_take_turns(void **state)
{
    (void)state;
    thread_pool *pool = thread_pool_create(3, NULL);
    pthread_t threads[4];
    caller callers[4];
    for (int i = 0; i < 4; i++) {
        callers[i] = (caller){pool, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, call_loops, &callers[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(callers[i].failures, 0);
    }
    thread_pool_destroy(pool);
}

static void wrong_number_of_threads_is_an_error(void **state)
{
    (void)state;
    quarry_error e = {0};
    assert_null(thread_pool_create(0, &e));
    assert_int_equal(e.code, QUARRY_ERROR_ARGUMENT);
    assert_null(thread_pool_create(100000, &e));
}

static void forced_instruction_set_is_checked(void **state)
{
    (void)state;
    quarry_error e = {0};
    cpu_isa isa;
    assert_int_equal(setenv("QUARRY_ISA", "scalar", 1), 0);
    assert_int_equal(cpu_choose(&isa, &e), QUARRY_OK);
    assert_int_equal(isa, CPU_SCALAR);
    setenv("QUARRY_ISA", "mmx", 1);
    assert_int_equal(cpu_choose(&isa, &e), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(e.message, "mmx"));
    unsetenv("QUARRY_ISA");
    assert_int_equal(cpu_choose(&isa, &e), QUARRY_OK);
    assert_int_equal(isa, cpu_detect());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(error_message_is_cut_not_overrun),
        cmocka_unit_test(overflowing_sizes_are_out_of_memory),
        cmocka_unit_test(injected_failure_hits_the_nth_allocation),
        cmocka_unit_test(reserved_arena_memory_lies_together),
        cmocka_unit_test(arena_blocks_are_aligned_and_do_not_overlap),
        cmocka_unit_test(random_numbers_follow_the_reference),
        cmocka_unit_test(every_task_runs_once),
        cmocka_unit_test(callers_on_several_threads_take_turns),
        cmocka_unit_test(wrong_number_of_threads_is_an_error),
        cmocka_unit_test(forced_instruction_set_is_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
