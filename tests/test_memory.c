/* What memory there is, what of it is in RAM, and that what a session says it takes is what the system counts (QUARRY_TINY_MODELS). */
#include "test.h"

#include <inttypes.h>
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gen/gen.h"

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1 /* the sanitizer's own memory is beyond every account and limit */
#else
#define SANITIZED 0
#endif

static void *pages(size_t n)
{
    void *block = mmap(NULL, n * (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(block != MAP_FAILED);
    return block;
}

/* ---- in RAM ---- */

static void only_memory_that_was_touched_is_resident(void **state)
{
    (void)state;
    enum { N = 64 };
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *block = pages(N);
    madvise(block, N * page, MADV_NOHUGEPAGE);
    assert_int_equal(memory_resident(block, N * page), 0);
    for (int i = 0; i < N; i += 4) block[(size_t)i * page] = 1;
    assert_int_equal(memory_resident(block, N * page), N / 4 * page);
    assert_int_equal(memory_resident(block + page / 2, N * page - page),
                     N / 4 * page - page / 2); /* half of a page that is there, and of one that is not */
    memory_tally tally = {0};
    memory_tally_add(&tally, NULL, 1000);
    memory_tally_add(&tally, block, N * page);
    memory_tally_add(&tally, &tally, sizeof tally); /* less than a page: taken as there */
    assert_int_equal(tally.held, N * page + sizeof tally);
    assert_int_equal(tally.resident, N / 4 * page + sizeof tally);
    munmap(block, N * page);
}

static void the_process_grows_by_what_is_touched(void **state)
{
    (void)state;
    enum { N = 4096 };
    const size_t n_bytes = N * (size_t)sysconf(_SC_PAGESIZE);
    process_memory before, after;
    if (SANITIZED) skip();
    assert_true(process_memory_get(&before));
    char *block = pages(N);
    memset(block, 1, n_bytes);
    assert_true(process_memory_get(&after));
    assert_in_range(after.resident - before.resident, n_bytes * 95 / 100, n_bytes * 105 / 100);
    assert_true(after.peak >= after.resident && after.file > 0 && after.address >= before.address + n_bytes);
    munmap(block, n_bytes);
}

static void locked_memory_is_resident(void **state)
{
    (void)state;
    const size_t n_bytes = 4 * (size_t)sysconf(_SC_PAGESIZE);
    if (SANITIZED) skip(); /* it locks nothing */
    char *block = pages(4);
    if (memory_lock_limit() < n_bytes || !memory_lock(block, n_bytes)) {
        munmap(block, n_bytes);
        skip();
    }
    assert_int_equal(memory_resident(block, n_bytes), n_bytes);
    memory_unlock(block, n_bytes);
    munmap(block, n_bytes);
}

/* ---- what there is ---- */

/* A folder that looks like a system. */
typedef struct place {
    char root[64];
} place;

static place place_make(void)
{
    place p;
    snprintf(p.root, sizeof p.root, "/tmp/quarry-memory-XXXXXX");
    assert_non_null(mkdtemp(p.root));
    return p;
}

static void place_put(const place *p, const char *path, const char *text)
{
    char full[512];
    const int n = snprintf(full, sizeof full, "%s/%s", p->root, path);
    assert_true(n > 0 && (size_t)n < sizeof full);
    for (char *slash = full + strlen(p->root) + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void place_remove(const place *p)
{
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", p->root);
    assert_int_equal(system(command), 0);
}

static const char meminfo[] =
    "MemTotal:       16000000 kB\nMemFree:         100000 kB\nMemAvailable:    8000000 kB\nSwapFree:        1000 kB\n";
static const uint64_t kib = 1024, of_machine = 8001000ull * 1024;

static void the_machine_has_what_it_says_and_its_swap(void **state)
{
    (void)state;
    const place p = place_make();
    memory_available a;
    memory_available_get(p.root, &a); /* nothing is said */
    assert_true(a.bytes == UINT64_MAX && a.swap == 0);
    place_put(&p, "proc/meminfo", meminfo);
    memory_available_get(p.root, &a);
    assert_true(a.bytes == of_machine && a.swap == 1000 * kib);
    assert_string_equal(a.limit, "the machine");
    place_remove(&p);
}

static void a_system_that_promises_no_more_than_it_has_has_a_commit_limit(void **state)
{
    (void)state;
    const place p = place_make();
    memory_available free_of_it, a;
    place_put(&p, "proc/meminfo", "MemAvailable:    8000000 kB\nSwapFree:  0 kB\nCommitLimit:  5000000 kB\nCommitted_AS:  4999990 kB\n");
    place_put(&p, "proc/sys/vm/overcommit_memory", "0\n");
    memory_available_get(p.root, &free_of_it);
    place_put(&p, "proc/sys/vm/overcommit_memory", "2\n");
    memory_available_get(p.root, &a);
    assert_true(free_of_it.address > a.address && a.address == 10 * kib);
    assert_string_equal(a.address_limit, "the system's commit limit");
    assert_int_equal(a.bytes, 8000000 * kib);
    place_remove(&p);
}

static void a_control_group_of_version_2_and_those_around_it_are_limits(void **state)
{
    (void)state;
    const place p = place_make();
    memory_available a;
    place_put(&p, "proc/meminfo", meminfo);
    place_put(&p, "proc/self/cgroup", "0::/outer/inner\n");
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.max", "max\n");
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.current", "4096\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == of_machine);
    place_put(&p, "sys/fs/cgroup/outer/memory.max", "1000000000\n");
    place_put(&p, "sys/fs/cgroup/outer/memory.current", "700000000\n");
    place_put(&p, "sys/fs/cgroup/outer/memory.stat", "anon 1\nfile 9\ninactive_file 30000000\nactive_file 20000000\n");
    memory_available_get(p.root, &a);
    assert_string_equal(a.limit, "the control group");
    assert_true(a.bytes == 350000000 + 1000 * kib && a.swap == 1000 * kib); /* pages of files can be had back */
    place_put(&p, "sys/fs/cgroup/outer/memory.swap.max", "4096\n");
    place_put(&p, "sys/fs/cgroup/outer/memory.swap.current", "0\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 350000000 + 4096 && a.swap == 4096);
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.max", "8192\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 4096 + 1000 * kib); /* the inner one is narrower, and has a swap of its own */
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.max", "max\n");
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.high", "6144\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 2048 + 1000 * kib);
    place_put(&p, "sys/fs/cgroup/outer/inner/memory.max", "100\n"); /* lowered under what is used */
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 1000 * kib);
    place_remove(&p);
}

static void a_control_group_of_version_1_is_a_limit_also_when_its_path_is_not_to_be_found(void **state)
{
    (void)state;
    const place p = place_make();
    memory_available a;
    place_put(&p, "proc/meminfo", meminfo);
    place_put(&p, "proc/self/cgroup", "5:devices:/x\n4:memory:/container/7\n0::/\n");
    place_put(&p, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    place_put(&p, "sys/fs/cgroup/memory/memory.usage_in_bytes", "70000000\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == of_machine);
    place_put(&p, "sys/fs/cgroup/memory/memory.limit_in_bytes", "100000000\n");
    place_put(&p, "sys/fs/cgroup/memory/memory.stat", "cache 5\nactive_file 3\ntotal_inactive_file 1000\ntotal_active_file 2000\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 30003000 + 1000 * kib);
    place_put(&p, "sys/fs/cgroup/memory/container/7/memory.limit_in_bytes", "50000000\n");
    place_put(&p, "sys/fs/cgroup/memory/container/7/memory.usage_in_bytes", "49000000\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == 1000000 + 1000 * kib);
    place_remove(&p);
}

static void what_the_files_say_may_be_anything(void **state)
{
    (void)state;
    const place p = place_make();
    memory_available a;
    char longer[5000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    place_put(&p, "proc/meminfo", "MemAvailable: many kB\nSwapFree:\n");
    place_put(&p, "proc/self/cgroup", longer);
    memory_available_get(p.root, &a);
    assert_true(a.bytes == UINT64_MAX);
    static const char *const groups[] = {"", "\n", ":", "::", "0::\n", "0::relative", "4:memory:/../../x\n", "memory:/x\n"};
    for (size_t i = 0; i < TEST_COUNT(groups); i++) {
        place_put(&p, "proc/self/cgroup", groups[i]);
        memory_available_get(p.root, &a);
        assert_true(a.bytes == UINT64_MAX);
    }
    place_put(&p, "proc/self/cgroup", "0::/\n");
    place_put(&p, "sys/fs/cgroup/memory.max", "-5\n");
    place_put(&p, "sys/fs/cgroup/memory.current", "\n");
    memory_available_get(p.root, &a);
    assert_true(a.bytes == UINT64_MAX);
    place_remove(&p);
}

/* ---- a session ---- */

static quarry_model *open_model(const char *name, quarry_error *error)
{
    const char *folder = getenv("QUARRY_TINY_MODELS");
    char path[1024];
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return quarry_model_open(path, &(quarry_model_params){.n_threads = 2}, error);
}

enum { N = 12000 };

static int32_t *some_tokens(int n)
{
    int32_t *tokens = calloc((size_t)n, sizeof *tokens);
    random_state r;
    random_seed(&r, 3);
    for (int k = 0; k < n; k++) tokens[k] = (int32_t)random_below(&r, 256) + 3;
    return tokens;
}

static void what_a_session_says_it_holds_is_what_the_system_counts(void **state)
{
    (void)state;
    static const char *const policies[] = {"ivfpq", "full", "quest:tail=1"};
    if (SANITIZED) skip();
    int32_t *tokens = some_tokens(N);
    for (size_t i = 0; i < TEST_COUNT(policies); i++) {
        process_memory before, after;
        session_memory held, need;
        quarry_error e = {0};
        /* Pages of the program come in as it runs, so what is compared leaves them out. The index, scratch and cache of 12,000 tokens are far larger than what a test program has about them */
        const quarry_session_params params = {.attn = policies[i], .kv_f32 = true, .read_window = 512};
        malloc_trim(0); /* what malloc keeps of small blocks that were freed is a few percent of so little */
        assert_true(process_memory_get(&before));
        quarry_model *model = open_model("llama-mha-f16.gguf", &e);
        if (!model) fail_msg("%s", e.message);
        quarry_session *s = quarry_session_open(model, &params, &e);
        if (!s || quarry_session_read(s, tokens, N, NULL, &e)) fail_msg("%s", e.message);
        assert_int_equal(session_memory_estimate(model, &params, N, &need, &e), QUARRY_OK);
        malloc_trim(0);
        session_memory_held(s, &held);
        assert_true(process_memory_get(&after));
        const double grown = (double)(after.resident - after.file) - (double)(before.resident - before.file),
                     known = (double)(session_memory_sum(&held) - held.bytes[MEMORY_PROGRAM]);
        if (known < 0.95 * grown || known > 1.05 * grown)
            fail_msg("%s: %.0f KiB are known of %.0f", policies[i], known / 1024, grown / 1024);
        assert_true(held.bytes[MEMORY_KV] > 10 << 20 && held.bytes[MEMORY_PROGRAM] > 0 && held.model_file > 0);
        assert_true(need.bytes[MEMORY_WEIGHTS] >= held.bytes[MEMORY_WEIGHTS]); /* all that is allocated, touched or not */
        const double expected = (double)session_memory_sum(&need), actual = (double)session_memory_sum(&held);
        if (expected < 0.95 * actual || expected > 1.15 * actual)
            fail_msg("%s: estimated %.0f KiB, held %.0f", policies[i], expected / 1024, actual / 1024);
        quarry_session_close(s);
        quarry_model_close(model);
    }
    free(tokens);
}

static void a_stored_context_is_as_large_as_estimated(void **state)
{
    (void)state;
    char folder[] = "/tmp/quarry-memory-XXXXXX";
    assert_non_null(mkdtemp(folder));
    quarry_error e = {0};
    quarry_stored stored;
    session_memory need;
    int32_t *tokens = some_tokens(N);
    quarry_model *model = open_model("llama-q4_1.gguf", &e);
    quarry_store *store = quarry_store_open(&(quarry_store_params){.folder = folder}, &e);
    const quarry_session_params params = {.read_window = 512};
    quarry_session *s = model ? quarry_session_open(model, &params, &e) : NULL;
    if (!s || !store) fail_msg("%s", e.message);
    if (quarry_session_read_stored(s, store, tokens, N, NULL, 0, NULL, NULL, &stored, &e)) fail_msg("%s", e.message);
    assert_int_equal(stored.n_kept, N);
    assert_int_equal(session_memory_estimate(model, &params, N, &need, &e), QUARRY_OK);
    const uint64_t estimated = need.stored_kv + need.stored_index;
    assert_in_range(stored.kept_bytes, estimated * 90 / 100, estimated * 110 / 100);
    quarry_session_close(s);
    s = quarry_session_open(model, &params, &e);
    assert_int_equal(quarry_session_read_stored(s, store, tokens, N, NULL, 0, NULL, NULL, &stored, &e), 0);
    assert_int_equal(stored.n_taken, N);
    assert_in_range(stored.taken_bytes, estimated * 90 / 100, estimated * 110 / 100);
    quarry_session_close(s);
    quarry_store_close(store);
    quarry_model_close(model);
    free(tokens);
    place p;
    snprintf(p.root, sizeof p.root, "%s", folder);
    place_remove(&p);
}

/* In another process, with so many bytes more than it has, read n tokens: what it reports goes to the message. */
static int read_under_limit(int resource, rlim_t more, const char *attn, bool kv_f32, int n, char message[512])
{
    int channel[2];
    assert_int_equal(pipe(channel), 0);
    const pid_t child = fork();
    if (child == 0) {
        quarry_error e = {0};
        process_memory now;
        int32_t *tokens = some_tokens(N);
        quarry_model *model = open_model("llama-mha-f16.gguf", &e);
        quarry_session *s =
            model ? quarry_session_open(model, &(quarry_session_params){.attn = attn, .kv_f32 = kv_f32, .read_window = 512}, &e) : NULL;
        process_memory_get(&now);
        const struct rlimit limit = {more + (resource == RLIMIT_AS ? now.address : now.data), RLIM_INFINITY};
        int code = s && setrlimit(resource, &limit) == 0 ? quarry_session_read(s, tokens, n, NULL, &e) : 1;
        if (quarry_session_length(s) != (code ? 0 : n)) code = 2;
        if (write(channel[1], e.message, sizeof e.message) < 0) code = 3;
        _exit(-code);
    }
    int status;
    assert_int_equal(read(channel[0], message, 512), 512);
    close(channel[0]);
    close(channel[1]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return -(int)(signed char)WEXITSTATUS(status);
}

static void what_will_not_fit_is_refused_before_anything_is_read(void **state)
{
    (void)state;
    char message[512];
    const rlim_t mib = 1 << 20;
    if (SANITIZED) skip();
    assert_int_equal(read_under_limit(RLIMIT_AS, 100 * mib, "ivfpq", true, N, message), 0);
    assert_int_equal(read_under_limit(RLIMIT_AS, 27 * mib, "ivfpq", true, N, message), QUARRY_ERROR_MEMORY);
    assert_non_null(strstr(message, "12000 tokens take"));
    assert_non_null(strstr(message, "ulimit"));
    assert_non_null(strstr(message, "--kv-f32"));
    assert_non_null(strstr(message, "smaller model"));
    assert_non_null(strstr(message, "--attn full"));
    assert_int_equal(read_under_limit(RLIMIT_DATA, 4 * mib, "full", false, N, message), QUARRY_ERROR_MEMORY);
    assert_null(strstr(message, "--attn full"));
    assert_null(strstr(message, "--kv-f32"));
}

static void the_text_that_is_said_to_fit_does(void **state)
{
    (void)state;
    static const char *const policies[] = {"ivfpq", "full", "quest:tail=1"};
    static const rlim_t limits[] = {24 << 20, 10 << 20, 24 << 20};
    if (SANITIZED) skip();
    for (size_t i = 0; i < TEST_COUNT(policies); i++) {
        char message[512];
        int fitting = 0;
        assert_int_equal(read_under_limit(RLIMIT_AS, limits[i], policies[i], true, N, message), QUARRY_ERROR_MEMORY);
        const char *at_most = strstr(message, "at most ");
        if (!at_most || sscanf(at_most, "at most %d tokens", &fitting) != 1) fail_msg("%s", message);
        assert_in_range(fitting, 100, N - 1000);
        assert_int_equal(read_under_limit(RLIMIT_AS, limits[i], policies[i], true, fitting, message), 0);
        assert_int_equal(read_under_limit(RLIMIT_AS, limits[i], policies[i], true, fitting + N / 16, message), QUARRY_ERROR_MEMORY);
    }
}

static void a_second_text_is_reckoned_by_the_first(void **state)
{
    (void)state;
    quarry_error e = {0};
    int32_t *tokens = some_tokens(N);
    quarry_model *model = open_model("llama-q4_1.gguf", &e);
    quarry_session *s = model ? quarry_session_open(model, &(quarry_session_params){.extend = true}, &e) : NULL;
    if (!s || quarry_session_read(s, tokens, 2000, NULL, &e)) fail_msg("%s", e.message);
    assert_int_equal(session_memory_check(s, N, &e), QUARRY_OK);
    assert_int_equal(session_memory_check(s, (int64_t)1 << 40, &e), QUARRY_ERROR_MEMORY);
    assert_non_null(strstr(e.message, "tokens take"));
    quarry_session_close(s);
    quarry_model_close(model);
    free(tokens);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_memory_that_was_touched_is_resident),
        cmocka_unit_test(the_process_grows_by_what_is_touched),
        cmocka_unit_test(locked_memory_is_resident),
        cmocka_unit_test(the_machine_has_what_it_says_and_its_swap),
        cmocka_unit_test(a_system_that_promises_no_more_than_it_has_has_a_commit_limit),
        cmocka_unit_test(a_control_group_of_version_2_and_those_around_it_are_limits),
        cmocka_unit_test(a_control_group_of_version_1_is_a_limit_also_when_its_path_is_not_to_be_found),
        cmocka_unit_test(what_the_files_say_may_be_anything),
        cmocka_unit_test(what_a_session_says_it_holds_is_what_the_system_counts),
        cmocka_unit_test(a_stored_context_is_as_large_as_estimated),
        cmocka_unit_test(what_will_not_fit_is_refused_before_anything_is_read),
        cmocka_unit_test(the_text_that_is_said_to_fit_does),
        cmocka_unit_test(a_second_text_is_reckoned_by_the_first),
    };
    mallopt(M_MMAP_THRESHOLD, 1 << 20); /* as the program does */
    mallopt(M_ARENA_MAX, 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
