/* Cold rows: fetched through a cache of any size they are those of the source, and nothing that fails breaks it; and the sequences whose rows they are. */
#include "test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "kv/kv.h"

enum { ROW = 48, BLOCK = 4, DERIVED = 12, N_PARTS = 3, N_SEGMENTS = 4, MOST = 400 };

static const int64_t lengths[N_SEGMENTS] = {90, 7, 400, 33};
static const size_t everything = SIZE_MAX;

/* ---- a source ---- */

static struct {
    atomic_llong n_reads, n_released, n_wrong;               /* wrong: it was asked for what it does not have */
    atomic_int fails;                                        /* quarry_code of what is read next */
    atomic_llong n_blocks, n_expected, of_read, of_expected; /* blocks, and a sum over which they were */
} source_state;

static void make_row(int64_t segment, int part, int64_t slot, uint8_t row[ROW])
{
    random_state r;
    random_seed(&r, (uint64_t)(segment * 1000003 + part * 10007 + slot * 31 + 1));
    for (int i = 0; i < ROW; i++) row[i] = (uint8_t)random_below(&r, 256);
}

static quarry_code source_read(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n, uint8_t *out, quarry_error *error)
{
    const int fails = atomic_load(&source_state.fails);
    (void)data;
    atomic_fetch_add(&source_state.n_reads, 1);
    memset(out, 0xee, (size_t)n * BLOCK * ROW);
    if (fails) return error_set(error, (quarry_code)fails, "the source fails");
    for (int64_t i = 0; i < n; i++) {
        atomic_fetch_add(&source_state.n_blocks, 1);
        atomic_fetch_add(&source_state.of_read, (blocks[i] + 1) * (blocks[i] + 1));
        if (segment < 0 || segment >= N_SEGMENTS || part < 0 || part >= N_PARTS || (i > 0 && blocks[i] <= blocks[i - 1]) || blocks[i] < 0 ||
            blocks[i] * BLOCK >= lengths[segment]) {
            atomic_fetch_add(&source_state.n_wrong, 1);
            continue;
        }
        for (int64_t j = 0; j < BLOCK && blocks[i] * BLOCK + j < lengths[segment]; j++)
            make_row(segment, part, blocks[i] * BLOCK + j, out + (i * BLOCK + j) * ROW);
    }
    return QUARRY_OK;
}

static void source_expect(void *data, int64_t segment, int part, const int64_t *blocks, int64_t n)
{
    (void)data;
    for (int64_t i = 0; i < n; i++) {
        atomic_fetch_add(&source_state.n_expected, 1);
        atomic_fetch_add(&source_state.of_expected, (blocks[i] + 1) * (blocks[i] + 1));
        if (part < 0 || part >= N_PARTS || (i > 0 && blocks[i] <= blocks[i - 1]) || blocks[i] * BLOCK >= lengths[segment])
            atomic_fetch_add(&source_state.n_wrong, 1);
    }
}

static void source_release(void *data)
{
    (void)data;
    atomic_fetch_add(&source_state.n_released, 1);
}

static const kv_source source = {.block_rows = BLOCK,
                                 .block_bytes = BLOCK * ROW,
                                 .row_bytes = ROW,
                                 .read = source_read,
                                 .expect = source_expect,
                                 .release = source_release};

static const uint8_t salt = 0x5a;

static void derive_make(const void *data, const void *row, uint8_t *derived)
{
    for (int i = 0; i < DERIVED; i++) derived[i] = ((const uint8_t *)row)[3 * i] ^ *(const uint8_t *)data;
}

static const kv_derive derive = {derive_make, &salt};

static kv_cold *make_cold(size_t of_rows, size_t of_derived)
{
    quarry_error e = {0};
    memset(&source_state, 0, sizeof source_state);
    kv_cold *c = kv_cold_create(&source, N_PARTS, DERIVED, &e);
    assert_non_null(c);
    assert_int_equal(kv_cold_extend(c, lengths, N_SEGMENTS, &e), QUARRY_OK);
    assert_int_equal(kv_cold_set_cache(c, of_rows, of_derived, &e), QUARRY_OK);
    return c;
}

static void assert_is_row(const void *row, int64_t segment, int part, int64_t slot)
{
    uint8_t expected[ROW];
    assert_non_null(row);
    make_row(segment, part, slot, expected);
    if (memcmp(row, expected, ROW)) fail_msg("not row %lld of segment %lld, part %d", (long long)slot, (long long)segment, part);
}

/* ---- requests ---- */

/* Ascending slots of a segment, about every `every`-th. */
static int64_t random_slots(random_state *r, int64_t segment, uint64_t every, int32_t *slots)
{
    int64_t n = 0;
    for (int32_t slot = 0; slot < lengths[segment]; slot++)
        if (random_below(r, every) == 0) slots[n++] = slot;
    return n;
}

/* Finds slots[n]: what comes is right, and where no row comes the cache has it. Returns how many came without. */
static int64_t find_right(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void **rows, arena *scratch)
{
    quarry_error e = {0};
    uint8_t derived[MOST * DERIVED], row[ROW], expected[DERIVED];
    int64_t found = 0;
    if (kv_cold_find(c, part, segment, slots, n, &derive, derived, rows, scratch, &e) != QUARRY_OK) fail_msg("%s", e.message);
    for (int64_t i = 0; i < n; i++) {
        make_row(segment, part, slots[i], row);
        derive_make(&salt, row, expected);
        assert_memory_equal(derived + i * DERIVED, expected, DERIVED);
        if (rows[i])
            assert_is_row(rows[i], segment, part, slots[i]);
        else
            found++;
    }
    return found;
}

static void take_right(kv_cold *c, int part, int64_t segment, const int32_t *slots, int64_t n, const void **rows, arena *scratch)
{
    quarry_error e = {0};
    if (kv_cold_take(c, part, segment, slots, n, rows, scratch, &e) != QUARRY_OK) fail_msg("%s", e.message);
    for (int64_t i = 0; i < n; i++) assert_is_row(rows[i], segment, part, slots[i]);
}

/* Some of slots[n], in their place. */
static int64_t keep_some(random_state *r, int32_t *slots, const void **rows, int64_t n)
{
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++)
        if (random_below(r, 3) == 0) {
            slots[m] = slots[i];
            rows[m++] = rows[i];
        }
    return m;
}

enum { ROW_ENTRY = ROW + 12, DERIVED_ENTRY = DERIVED + 12 }; /* with what the caches know of them */

/* Rows for which there is room in every part. */
static const int64_t rooms[] = {0, 1, 63, 64, 100, 200, 530, 536, 575, 576, -1};

static size_t room_of(int64_t room, size_t each)
{
    return room < 0 ? everything : (size_t)room * N_PARTS * each;
}

/* Whatever the caches take, from nothing to all, and whoever asked before. */
static void test_rows_are_those_of_the_source(void **state)
{
    (void)state;
    for (size_t k = 0; k < TEST_COUNT(rooms) * TEST_COUNT(rooms); k++) {
        const int64_t rows_room = rooms[k % TEST_COUNT(rooms)], derived_room = rooms[k / TEST_COUNT(rooms)];
        const size_t of_rows = room_of(rows_room, ROW_ENTRY), of_derived = room_of(derived_room, DERIVED_ENTRY);
        kv_cold *c = make_cold(of_rows, of_derived);
        arena scratch = {0};
        random_state r;
        random_seed(&r, k + 5);
        int64_t n_asked = 0, n_found = 0;
        for (int call = 0; call < 120; call++) {
            const int part = (int)random_below(&r, N_PARTS);
            const int64_t segment = (int64_t)random_below(&r, N_SEGMENTS);
            int32_t slots[MOST];
            const void *rows[MOST];
            int64_t n = random_slots(&r, segment, 1 + random_below(&r, 40), slots);
            arena_reset(&scratch);
            n_found += find_right(c, part, segment, slots, n, rows, &scratch);
            n_asked += n;
            n = keep_some(&r, slots, rows, n);
            if (call % 2) kv_cold_expect(c, part, segment, slots, n, rows, &scratch);
            take_right(c, part, segment, slots, n, rows, &scratch);
            if (kv_cold_row_bytes(c) > of_rows || kv_cold_derived_bytes(c) > of_derived)
                fail_msg("%zu and %zu bytes where %zu and %zu are allowed", kv_cold_row_bytes(c), kv_cold_derived_bytes(c), of_rows,
                         of_derived);
            if (call == 60) { /* set anew, also to the same: rows are read again, and right */
                quarry_error e = {0};
                assert_int_equal(kv_cold_set_cache(c, of_rows, of_derived, &e), QUARRY_OK);
            }
        }
        const kv_cold_counts counts = kv_cold_count(c);
        assert_int_equal(counts.n_derived, n_asked);
        assert_true(counts.n_derived_found <= n_found);
        assert_int_equal(counts.n_blocks, atomic_load(&source_state.n_blocks));
        if (of_rows < 64 * ROW_ENTRY && of_derived < 64 * DERIVED_ENTRY) assert_int_equal(n_found, 0);
        if (of_derived == everything) assert_true(n_found > n_asked / 4);
        assert_int_equal(atomic_load(&source_state.n_wrong), 0);
        kv_cold_release(c);
        assert_int_equal(atomic_load(&source_state.n_released), 1);
        arena_free(&scratch);
    }
}

/* The source is told of the blocks that the next call reads. */
static void test_blocks_that_are_expected_are_read(void **state)
{
    (void)state;
    kv_cold *c = make_cold((size_t)N_PARTS * 128 * ROW_ENTRY, everything);
    arena scratch = {0};
    random_state r;
    random_seed(&r, 6);
    for (int call = 0; call < 200; call++) {
        const int64_t segment = (int64_t)random_below(&r, N_SEGMENTS);
        int32_t slots[MOST];
        const void *rows[MOST];
        int64_t n = random_slots(&r, segment, 1 + random_below(&r, 40), slots);
        arena_reset(&scratch);
        find_right(c, 1, segment, slots, n, rows, &scratch);
        n = keep_some(&r, slots, rows, n);
        const int64_t n_blocks = atomic_load(&source_state.n_blocks), of_read = atomic_load(&source_state.of_read),
                      n_expected = atomic_load(&source_state.n_expected), of_expected = atomic_load(&source_state.of_expected);
        kv_cold_expect(c, 1, segment, slots, n, rows, &scratch);
        take_right(c, 1, segment, slots, n, rows, &scratch);
        assert_int_equal(atomic_load(&source_state.n_blocks) - n_blocks, atomic_load(&source_state.n_expected) - n_expected);
        assert_int_equal(atomic_load(&source_state.of_read) - of_read, atomic_load(&source_state.of_expected) - of_expected);
    }
    assert_true(atomic_load(&source_state.n_expected) > 100);
    assert_int_equal(atomic_load(&source_state.n_wrong), 0);
    kv_cold_release(c);
    arena_free(&scratch);
}

/* With room for all of them, no row is read twice; also of segments that came later. */
static void test_a_whole_cache_reads_once(void **state)
{
    (void)state;
    quarry_error e = {0};
    kv_cold *c = kv_cold_create(&source, N_PARTS, DERIVED, &e);
    arena scratch = {0};
    int32_t slots[MOST];
    const void *rows[MOST];
    random_state r;
    random_seed(&r, 1);
    for (int64_t segment = 0; segment < N_SEGMENTS; segment++) {
        assert_int_equal(kv_cold_extend(c, &lengths[segment], 1, &e), QUARRY_OK);
        /* between that and the next line the old cache must serve: */
        const int64_t some = random_slots(&r, segment, 2, slots);
        find_right(c, 1, segment, slots, some, rows, &scratch);
        take_right(c, 1, segment, slots, some, rows, &scratch);
        assert_int_equal(kv_cold_set_cache(c, everything, everything, &e), QUARRY_OK);
        for (int64_t s = 0; s <= segment; s++) {
            const int64_t n = random_slots(&r, s, 1, slots);
            assert_int_equal(n, lengths[s]);
            assert_int_equal(kv_cold_length(c, s), lengths[s]);
            assert_int_equal(find_right(c, 2, s, slots, n, rows, &scratch), 0);
        }
        const int64_t reads = atomic_load(&source_state.n_reads);
        for (int64_t s = 0; s <= segment; s++) {
            const int64_t n = random_slots(&r, s, 3, slots);
            assert_int_equal(find_right(c, 2, s, slots, n, rows, &scratch), n);
            take_right(c, 2, s, slots, n, rows, &scratch);
        }
        assert_int_equal(atomic_load(&source_state.n_reads), reads);
    }
    kv_cold_release(c);
    arena_free(&scratch);
}

/* Whether what is derived of a row is known; it is from now on. */
static bool knows(kv_cold *c, int32_t slot, arena *scratch)
{
    const void *row;
    return find_right(c, 0, 2, &slot, 1, &row, scratch) == 1;
}

/* Whether a row is in the cache; it is from now on. */
static bool has(kv_cold *c, int32_t slot, arena *scratch)
{
    const int64_t reads = atomic_load(&source_state.n_reads);
    const void *row = NULL;
    take_right(c, 0, 2, &slot, 1, &row, scratch);
    return atomic_load(&source_state.n_reads) == reads;
}

/* Of a set goes what was not asked for longest. */
static void test_what_is_asked_for_stays(void **state)
{
    (void)state;
    for (int of_rows = 0; of_rows < 2; of_rows++) {
        bool (*is_there)(kv_cold * c, int32_t slot, arena * scratch) = of_rows ? has : knows;
        kv_cold *c = of_rows ? make_cold((size_t)N_PARTS * 64 * ROW_ENTRY, 0) : make_cold(0, (size_t)N_PARTS * 64 * DERIVED_ENTRY);
        arena scratch = {0};
        assert_false(is_there(c, 17, &scratch));
        assert_false(is_there(c, 18, &scratch));
        for (int32_t slot = 20; slot < 399; slot++) {
            arena_reset(&scratch);
            if (slot % 3 == 0) assert_true(is_there(c, 17, &scratch));
            assert_false(is_there(c, slot, &scratch));
            assert_true(is_there(c, slot, &scratch));
        }
        assert_false(is_there(c, 18, &scratch));
        kv_cold_release(c);
        arena_free(&scratch);
    }
}

/* A request of more than there is room for leaves what it found in its place: asked again, it finds the same. */
static void test_a_call_drops_nothing_of_its_own(void **state)
{
    (void)state;
    kv_cold *c = make_cold(0, (size_t)N_PARTS * 64 * DERIVED_ENTRY);
    arena scratch = {0};
    int32_t slots[MOST];
    const void *rows[MOST];
    bool kept[MOST];
    random_state r;
    random_seed(&r, 2);
    const int64_t n = random_slots(&r, 2, 1, slots);
    assert_int_equal(find_right(c, 1, 2, slots, n, rows, &scratch), 0);
    assert_int_equal(find_right(c, 1, 2, slots, n, rows, &scratch), 64);
    for (int64_t i = 0; i < n; i++) kept[i] = !rows[i];
    for (int again = 0; again < 3; again++) {
        assert_int_equal(find_right(c, 1, 2, slots, n, rows, &scratch), 64);
        for (int64_t i = 0; i < n; i++) assert_int_equal(kept[i], !rows[i]);
    }
    kv_cold_release(c);
    c = make_cold((size_t)N_PARTS * 64 * ROW_ENTRY, 0);
    int64_t found = 0;
    for (int again = 0; again < 4; again++) {
        memset(rows, 0, sizeof rows);
        take_right(c, 1, 2, slots, n, rows, &scratch);
        assert_int_equal(kv_cold_count(c).n_rows_found - found, again ? 64 : 0);
        found = kv_cold_count(c).n_rows_found;
    }
    kv_cold_release(c);
    arena_free(&scratch);
}

static void test_reading_past_the_cache(void **state)
{
    (void)state;
    kv_cold *c = make_cold(0, 0);
    quarry_error e = {0};
    uint8_t out[(MOST + BLOCK) * ROW];
    assert_int_equal(kv_cold_block_rows(c), BLOCK);
    assert_int_equal(kv_cold_block_bytes(c), BLOCK * ROW);
    for (int64_t segment = 0; segment < N_SEGMENTS; segment++)
        for (int64_t first = 0; first < lengths[segment]; first += 5 * BLOCK)
            for (int64_t n = 1; first + n <= lengths[segment]; n += 1 + n * 2) {
                memset(out, 0, sizeof out);
                assert_int_equal(kv_cold_read(c, 2, segment, first, n, out, &e), QUARRY_OK);
                for (int64_t i = 0; i < n; i++) assert_is_row(out + i * ROW, segment, 2, first + i);
                for (int64_t i = (n + BLOCK - 1) / BLOCK * BLOCK * ROW; i < (int64_t)sizeof out; i++) assert_int_equal(out[i], 0);
            }
    atomic_store(&source_state.fails, QUARRY_ERROR_FORMAT);
    assert_int_equal(kv_cold_read(c, 2, 0, 0, 20, out, &e), QUARRY_ERROR_FORMAT);
    assert_int_equal(atomic_load(&source_state.n_wrong), 0);
    kv_cold_release(c);
}

/* ---- failures ---- */

static void test_a_source_that_fails(void **state)
{
    (void)state;
    static const quarry_code codes[] = {QUARRY_ERROR_IO, QUARRY_ERROR_FORMAT};
    kv_cold *c = make_cold(everything, everything);
    arena scratch = {0};
    int32_t slots[MOST];
    const void *rows[MOST];
    uint8_t derived[MOST * DERIVED];
    random_state r;
    random_seed(&r, 8);
    for (size_t k = 0; k < TEST_COUNT(codes); k++) {
        quarry_error e = {0};
        const int64_t n = random_slots(&r, 2, 4, slots);
        atomic_store(&source_state.fails, codes[k]);
        assert_int_equal(kv_cold_find(c, 0, 2, slots, n, &derive, derived, rows, &scratch, &e), codes[k]);
        assert_string_equal(e.message, "the source fails");
        memset(rows, 0, sizeof rows);
        assert_int_equal(kv_cold_take(c, 0, 2, slots, n, rows, &scratch, &e), codes[k]);
        atomic_store(&source_state.fails, 0);
        find_right(c, 0, 2, slots, n, rows, &scratch);
        take_right(c, 0, 2, slots, n, rows, &scratch);
        assert_int_equal(find_right(c, 0, 2, slots, n, rows, &scratch), n); /* what is in the cache needs no source */
        atomic_store(&source_state.fails, codes[k]);
        assert_int_equal(find_right(c, 0, 2, slots, n, rows, &scratch), n);
        take_right(c, 0, 2, slots, n, rows, &scratch);
    }
    kv_cold_release(c);
    arena_free(&scratch);
}

static void test_without_memory(void **state)
{
    (void)state;
    quarry_error e = {0};
    int64_t n = 0;
    memset(&source_state, 0, sizeof source_state);
    kv_cold *c = NULL;
    for (; !c; n++) {
        memory_fail_after(n);
        c = kv_cold_create(&source, N_PARTS, DERIVED, &e);
        memory_fail_after(-1);
        assert_int_equal(atomic_load(&source_state.n_released), c ? n : n + 1);
    }
    assert_true(n > 2);
    memory_fail_after(0);
    assert_int_equal(kv_cold_extend(c, lengths, N_SEGMENTS, &e), QUARRY_ERROR_MEMORY);
    memory_fail_after(-1);
    assert_int_equal(kv_cold_extend(c, lengths, N_SEGMENTS, &e), QUARRY_OK);
    for (int64_t s = 0; s < N_SEGMENTS; s++) assert_int_equal(kv_cold_length(c, s), lengths[s]);
    const int32_t slots[] = {1, 5, 6, 30, 31, 32};
    const void *rows[6];
    uint8_t derived[6 * DERIVED];
    quarry_code code = QUARRY_ERROR_MEMORY;
    for (n = 0; code != QUARRY_OK; n++) { /* what stays is a cache that takes nothing */
        arena scratch = {0};
        assert_int_equal(kv_cold_set_cache(c, 100000, 100000, &e), QUARRY_OK);
        find_right(c, 0, 0, slots, 6, rows, &scratch);
        memory_fail_after(n);
        code = kv_cold_set_cache(c, everything, everything, &e);
        memory_fail_after(-1);
        if (code != QUARRY_OK) assert_int_equal(kv_cold_row_bytes(c) + kv_cold_derived_bytes(c), 0);
        find_right(c, 0, 0, slots, 6, rows, &scratch);
        take_right(c, 0, 0, slots, 6, rows, &scratch);
        arena_free(&scratch);
    }
    assert_true(n > N_PARTS);
    kv_cold_set_cache(c, everything, everything, &e);
    for (int taking = 0; taking < 2; taking++) {
        arena scratch = {0};
        memory_fail_after(0);
        memset(rows, 0, sizeof rows);
        code = taking ? kv_cold_take(c, 0, 2, slots, 6, rows, &scratch, &e)
                      : kv_cold_find(c, 0, 2, slots, 6, &derive, derived, rows, &scratch, &e);
        memory_fail_after(-1);
        assert_int_equal(code, QUARRY_ERROR_MEMORY);
        assert_int_equal(find_right(c, 0, 2, slots, 6, rows, &scratch), taking ? 6 : 0);
        take_right(c, 0, 2, slots, 6, rows, &scratch);
        arena_free(&scratch);
    }
    const int64_t too_long[] = {UINT32_MAX};
    assert_int_equal(kv_cold_extend(c, too_long, 1, &e), QUARRY_ERROR_UNSUPPORTED);
    kv_cold_release(c);
}

/* ---- threads ---- */

typedef struct asker {
    kv_cold *cold;
    uint64_t seed;
    atomic_int *n_wrong;
} asker;

static void *ask(void *data)
{
    const asker *a = data;
    arena scratch = {0};
    random_state r;
    random_seed(&r, a->seed);
    for (int call = 0; call < 1500; call++) {
        const int part = (int)random_below(&r, N_PARTS);
        const int64_t segment = (int64_t)random_below(&r, N_SEGMENTS);
        int32_t slots[MOST];
        const void *rows[MOST];
        uint8_t derived[MOST * DERIVED], row[ROW], expected[DERIVED];
        int64_t n = random_slots(&r, segment, 1 + random_below(&r, 60), slots);
        quarry_error e = {0};
        arena_reset(&scratch);
        quarry_code code = kv_cold_find(a->cold, part, segment, slots, n, &derive, derived, rows, &scratch, &e);
        for (int64_t i = 0; i < n; i++) {
            make_row(segment, part, slots[i], row);
            derive_make(&salt, row, expected);
            if (memcmp(derived + i * DERIVED, expected, DERIVED)) atomic_fetch_add(a->n_wrong, 1);
        }
        n = keep_some(&r, slots, rows, n);
        if (code == QUARRY_OK) kv_cold_expect(a->cold, part, segment, slots, n, rows, &scratch);
        if (code == QUARRY_OK) code = kv_cold_take(a->cold, part, segment, slots, n, rows, &scratch, &e);
        if (code != QUARRY_OK) atomic_fetch_add(a->n_wrong, 1);
        for (int64_t i = 0; i < n && code == QUARRY_OK; i++) {
            make_row(segment, part, slots[i], row);
            if (memcmp(rows[i], row, ROW)) atomic_fetch_add(a->n_wrong, 1);
        }
        if (kv_cold_row_bytes(a->cold) > (size_t)N_PARTS * 64 * ROW_ENTRY) atomic_fetch_add(a->n_wrong, 1);
    }
    arena_free(&scratch);
    return NULL;
}

static void test_two_threads_at_once(void **state)
{
    (void)state;
    atomic_int n_wrong = 0;
    asker askers[2] = {{make_cold((size_t)N_PARTS * 64 * ROW_ENTRY, (size_t)N_PARTS * 128 * DERIVED_ENTRY), 1, &n_wrong},
                       {NULL, 2, &n_wrong}};
    askers[1].cold = kv_cold_hold(askers[0].cold);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) assert_int_equal(pthread_create(&threads[i], NULL, ask, &askers[i]), 0);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    assert_int_equal(n_wrong, 0);
    assert_int_equal(atomic_load(&source_state.n_wrong), 0);
    kv_cold_release(askers[0].cold);
    assert_int_equal(atomic_load(&source_state.n_released), 0);
    kv_cold_release(askers[1].cold);
    assert_int_equal(atomic_load(&source_state.n_released), 1);
}

/* ---- sequences with cold rows ---- */

enum { N = 700, SINKS = 8 };

static const kv_shape plain = {.n_layer = 2, .n_head_kv = 2, .head_dim = 8, .type = KV_F32};
static const kv_shape local = {.n_layer = 1, .n_head_kv = 2, .head_dim = 8, .type = KV_F32, .n_local = 2, .window = 20};

static float value_of(int layer, int head, int64_t pos)
{
    return (float)(layer * 100000 + head * 10000 + pos);
}

static void write_rows(kv_seq *kv, int64_t n)
{
    const kv_shape *shape = kv_shape_of(kv);
    quarry_error e = {0};
    const int64_t first = kv_length(kv);
    assert_int_equal(kv_reserve(kv, n, &e), QUARRY_OK);
    for (int layer = 0; layer < shape->n_layer + shape->n_local; layer++)
        for (int head = 0; head < shape->n_head_kv; head++)
            for (int64_t pos = first; pos < n; pos++) {
                float *row = kv_row(kv, layer, head, pos);
                for (int i = 0; i < 2 * shape->head_dim; i++) row[i] = value_of(layer, head, pos) + (float)i / 16;
            }
    kv_commit(kv, n);
}

/* Rows [first, end) of the layers that keep them all, and of local ones what of them the next token sees. */
static void assert_rows(const kv_seq *kv, int64_t first, int64_t end)
{
    const kv_shape *shape = kv_shape_of(kv);
    const int64_t seen = kv_length(kv) - shape->window + 1;
    for (int layer = 0; layer < shape->n_layer + shape->n_local; layer++)
        for (int head = 0; head < shape->n_head_kv; head++)
            for (int64_t pos = layer < shape->n_layer || first > seen ? first : seen; pos < end; pos++) {
                const float *row = kv_row(kv, layer, head, pos);
                for (int i = 0; i < 2 * shape->head_dim; i++) assert_true(row[i] == value_of(layer, head, pos) + (float)i / 16);
            }
}

static kv_seq *make_kv(const kv_shape *shape, int64_t n)
{
    quarry_error e = {0};
    kv_seq *kv = kv_create(shape, &e);
    assert_non_null(kv);
    write_rows(kv, n);
    return kv;
}

static void set_cold(kv_seq *kv, kv_cold *cold, int64_t end, int64_t n_segments)
{
    quarry_error e = {0};
    const kv_cold_span span = {SINKS, end, n_segments, kv_length(kv)};
    assert_int_equal(kv_set_cold(kv, cold, &span, &e), QUARRY_OK);
    assert_ptr_equal(kv_cold_of(kv), cold);
    assert_memory_equal(kv_cold_in(kv), &span, sizeof span);
}

/* What is not cold stays; then more becomes cold, within a page and beyond it; then all is forgotten. */
static void test_rows_become_cold(void **state)
{
    (void)state;
    static const kv_shape *const shapes[] = {&plain, &local};
    static const int64_t ends[] = {100, 150, 256, 300, 520, 600, 690};
    for (size_t k = 0; k < TEST_COUNT(shapes); k++) {
        kv_seq *kv = make_kv(shapes[k], N);
        kv_cold *cold = make_cold(0, 0);
        size_t bytes = kv_bytes(kv);
        assert_null(kv_cold_of(kv));
        assert_int_equal(kv_cold_in(kv)->end, 0);
        for (size_t i = 0; i < TEST_COUNT(ends); i++) {
            set_cold(kv, cold, ends[i], (int64_t)i + 1);
            assert_true(kv_bytes(kv) <= bytes);
            bytes = kv_bytes(kv);
            assert_rows(kv, 0, SINKS);
            assert_rows(kv, ends[i], N);
            assert_int_equal(kv_least(kv), N);
            assert_int_equal(kv_length(kv), N);
        }
        write_rows(kv, N + 300);
        assert_rows(kv, ends[TEST_COUNT(ends) - 1], N + 300);
        assert_true(kv_least(kv) >= N);
        kv_truncate(kv, kv_least(kv) + 1);
        kv_truncate(kv, 0);
        assert_null(kv_cold_of(kv));
        assert_int_equal(kv_cold_in(kv)->end, 0);
        assert_int_equal(kv_bytes(kv), 0);
        assert_int_equal(kv_least(kv), 1);
        write_rows(kv, N);
        assert_rows(kv, 0, N);
        kv_destroy(kv);
        kv_cold_release(cold);
        assert_int_equal(atomic_load(&source_state.n_released), 1);
    }
}

static void test_restored_with_cold_rows(void **state)
{
    (void)state;
    static const kv_shape *const shapes[] = {&plain, &local};
    for (size_t k = 0; k < TEST_COUNT(shapes); k++) {
        quarry_error e = {0};
        kv_seq *kv = kv_create(shapes[k], &e);
        kv_cold *cold = make_cold(0, 0);
        const kv_cold_span span = {SINKS, 520, 3, N};
        assert_int_equal(kv_set_cold(kv, cold, &span, &e), QUARRY_OK);
        memory_fail_after(3);
        assert_int_equal(kv_restore(kv, N, &e), QUARRY_ERROR_MEMORY);
        memory_fail_after(-1);
        assert_int_equal(kv_length(kv), 0);
        assert_int_equal(kv_restore(kv, N, &e), QUARRY_OK);
        assert_int_equal(kv_least(kv), N);
        kv_commit(kv, N);
        for (int layer = 0; layer < shapes[k]->n_layer; layer++)
            for (int head = 0; head < 2; head++)
                for (int64_t pos = 0; pos < N; pos == SINKS - 1 ? pos = 520 : pos++) {
                    float *row = kv_row(kv, layer, head, pos);
                    for (int i = 0; i < 16; i++) row[i] = value_of(layer, head, pos) + (float)i / 16;
                }
        for (int layer = shapes[k]->n_layer; layer < shapes[k]->n_layer + shapes[k]->n_local; layer++)
            for (int head = 0; head < 2; head++)
                for (int64_t pos = N - 20; pos < N; pos++) {
                    float *row = kv_row(kv, layer, head, pos);
                    for (int i = 0; i < 16; i++) row[i] = value_of(layer, head, pos) + (float)i / 16;
                }
        write_rows(kv, N + 200);
        assert_rows(kv, 0, SINKS);
        assert_rows(kv, N - 20, N + 200);
        kv_cold_release(cold);
        assert_int_equal(atomic_load(&source_state.n_released), 0); /* kv has it */
        kv_destroy(kv);
        assert_int_equal(atomic_load(&source_state.n_released), 1);
    }
}

/* Forks share what is cold, and go on by themselves. */
static void test_forks_of_cold_rows(void **state)
{
    (void)state;
    quarry_error e = {0};
    kv_seq *kv = make_kv(&plain, N);
    kv_seq *hot = kv_fork(kv, &e);
    kv_cold *cold = make_cold(0, 0);
    set_cold(kv, cold, 520, 3);
    assert_rows(hot, 0, N); /* a fork made before keeps its rows */
    kv_seq *fork = kv_fork(kv, &e);
    assert_ptr_equal(kv_cold_of(fork), cold);
    assert_memory_equal(kv_cold_in(fork), kv_cold_in(kv), sizeof(kv_cold_span));
    write_rows(fork, N + 100);
    assert_rows(fork, 0, SINKS);
    assert_rows(fork, 520, N + 100);
    assert_rows(kv, 520, N);
    assert_int_equal(kv_least(fork), N);
    set_cold(fork, cold, 700, 4); /* only of the fork */
    assert_rows(kv, 520, N);
    assert_rows(fork, 700, N + 100);
    kv_destroy(kv);
    kv_cold_release(cold);
    assert_rows(fork, 700, N + 100);
    assert_rows(hot, 0, N);
    kv_destroy(hot);
    assert_int_equal(atomic_load(&source_state.n_released), 0);
    kv_destroy(fork);
    assert_int_equal(atomic_load(&source_state.n_released), 1);
}

static void test_rows_stay_where_memory_fails(void **state)
{
    (void)state;
    kv_cold *cold = make_cold(0, 0);
    int failures = 0;
    for (int64_t n = 0;; n++) {
        quarry_error e = {0};
        kv_seq *kv = make_kv(&local, N);
        const size_t bytes = kv_bytes(kv);
        const kv_cold_span span = {SINKS, 520, 3, N};
        memory_fail_after(n);
        const quarry_code code = kv_set_cold(kv, cold, &span, &e);
        memory_fail_after(-1);
        if (code != QUARRY_OK) {
            failures++;
            assert_int_equal(code, QUARRY_ERROR_MEMORY);
            assert_null(kv_cold_of(kv));
            assert_int_equal(kv_cold_in(kv)->end, 0);
            assert_int_equal(kv_bytes(kv), bytes);
            assert_rows(kv, 0, N);
            set_cold(kv, cold, 520, 3);
        }
        assert_rows(kv, 520, N);
        kv_destroy(kv);
        if (code == QUARRY_OK) break;
    }
    assert_true(failures >= 4); /* two pages, each in two parts */
    kv_cold_release(cold);
}

/* Bytes of [first, end) that are in memory. */
static size_t resident(const char *first, const char *end)
{
    enum { SYSTEM_PAGE = 4096 };
    const uintptr_t from = (uintptr_t)first / SYSTEM_PAGE * SYSTEM_PAGE, n_pages = ((uintptr_t)end - from + SYSTEM_PAGE - 1) / SYSTEM_PAGE;
    unsigned char *in = malloc(n_pages);
    size_t n = 0;
    assert_int_equal(mincore((void *)from, n_pages * SYSTEM_PAGE, in), 0);
    for (size_t i = 0; i < n_pages; i++) n += (in[i] & 1) * (size_t)SYSTEM_PAGE;
    free(in);
    return n;
}

/* What all pages take of the system, of a sequence of which [SINKS, end) is cold. */
static size_t resident_of(const kv_seq *kv, int64_t end)
{
    const kv_shape *shape = kv_shape_of(kv);
    const size_t row = kv_row_bytes(shape->type, shape->head_dim);
    size_t n = 0;
    for (int64_t page = 0; page * KV_PAGE < kv_length(kv); page++) {
        if (page > 0 && (page + 1) * KV_PAGE <= end) continue; /* cold */
        const int64_t any = page == 0 ? 0 : page * KV_PAGE >= end ? page * KV_PAGE : end, at = any % KV_PAGE;
        const char *first = (const char *)kv_row(kv, 0, 0, any) - (size_t)at * row;
        n += resident(first, first + (size_t)shape->n_layer * (size_t)shape->n_head_kv * KV_PAGE * row);
    }
    return n;
}

/* kv_bytes says what is really taken, though rows become cold in the middle of a page, again and again, and in forks. */
static void test_bytes_are_true(void **state)
{
    (void)state;
    static const kv_shape large = {.n_layer = 16, .n_head_kv = 3, .head_dim = 128, .type = KV_F32};
    static const int64_t ends[] = {140, 200, 300, 460, 550, 600};
    kv_cold *cold = make_cold(0, 0);
    quarry_error e = {0};
    kv_seq *kv = make_kv(&large, 300);
    assert_true(resident_of(kv, 0) <= kv_bytes(kv) + (1 << 20));
    for (size_t i = 0; i < TEST_COUNT(ends); i++) {
        if (ends[i] > kv_length(kv)) write_rows(kv, ends[i] + 60);
        set_cold(kv, cold, ends[i], 1);
        const size_t told = kv_bytes(kv), taken = resident_of(kv, ends[i]);
        if (taken > told + told / 8 + 500000 || told > taken + taken / 8 + 500000)
            fail_msg("cold up to %lld: %zu bytes said, %zu taken", (long long)ends[i], told, taken);
    }
    kv_seq *fork = kv_fork(kv, &e);
    write_rows(fork, kv_length(fork) + 5);
    const size_t told = kv_bytes(fork), taken = resident_of(fork, 600);
    if (taken > told + told / 8 + 500000 || told > taken + taken / 8 + 500000) fail_msg("fork: %zu bytes said, %zu taken", told, taken);
    kv_destroy(fork);
    kv_destroy(kv);
    kv_cold_release(cold);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bytes_are_true), /* first: from memory that was not used yet */
        cmocka_unit_test(test_rows_are_those_of_the_source),
        cmocka_unit_test(test_a_whole_cache_reads_once),
        cmocka_unit_test(test_what_is_asked_for_stays),
        cmocka_unit_test(test_blocks_that_are_expected_are_read),
        cmocka_unit_test(test_a_call_drops_nothing_of_its_own),
        cmocka_unit_test(test_reading_past_the_cache),
        cmocka_unit_test(test_a_source_that_fails),
        cmocka_unit_test(test_without_memory),
        cmocka_unit_test(test_two_threads_at_once),
        cmocka_unit_test(test_rows_become_cold),
        cmocka_unit_test(test_restored_with_cold_rows),
        cmocka_unit_test(test_forks_of_cold_rows),
        cmocka_unit_test(test_rows_stay_where_memory_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
