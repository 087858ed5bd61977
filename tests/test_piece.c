/* Saved contexts: what was read, saved and loaded answers as if it had been read; whatever is wrong with a file is found. */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gen/gen.h"

enum { N = 700, QUESTION = 12, MAX_PIECES = 4 };

static int32_t tokens[N + QUESTION];
static int64_t n_vocab;
static char folder[64];

static quarry_model *open_model(const char *name)
{
    char path[1024];
    const char *models = getenv("QUARRY_TINY_MODELS");
    if (!models) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", models, name);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = 2}, &e);
    if (!m) fail_msg("%s", e.message);
    n_vocab = model_shape_of(m)->n_vocab;
    random_state r;
    random_seed(&r, 11);
    for (int i = 0; i < N + QUESTION; i++) tokens[i] = (int32_t)random_below(&r, (uint64_t)n_vocab);
    return m;
}

static bool extended; /* sessions are */

static quarry_session *open_session(quarry_model *m, const char *attn)
{
    quarry_error e = {0};
    quarry_session_params params = {.attn = attn, .n_batch = 64, .extend = extended, .read_window = extended ? 64 : 0};
    quarry_session *s = quarry_session_open(m, &params, &e);
    if (!s) fail_msg("%s", e.message);
    session_allow_beyond_training(s);
    return s;
}

static void read_to(quarry_session *s, int64_t end, bool seal)
{
    quarry_error e = {0};
    const int64_t n = quarry_session_length(s);
    if (session_read(s, tokens + n, end - n, seal, NULL, &e) != 0) fail_msg("%s", e.message);
}

static const char *path_of(int i)
{
    static char paths[MAX_PIECES][128];
    snprintf(paths[i], sizeof paths[i], "%s/%d.piece", folder, i);
    return paths[i];
}

static void save(quarry_session *s, int i)
{
    quarry_error e = {0};
    store_key key;
    file_writer *file = file_write_open(path_of(i), &e);
    if (!file || session_save(s, file, "a text\n", &key, &e) || file_write_commit(file, &e)) fail_msg("%s", e.message);
    file_write_close(file);
    session_saved(s, &key);
}

static store_key damaged;

static quarry_code load(quarry_session *s, int n, quarry_error *e)
{
    piece_file *pieces[MAX_PIECES] = {0};
    quarry_code code = QUARRY_OK;
    int opened = 0;
    for (; opened < n && code == QUARRY_OK; opened++)
        if (!(pieces[opened] = piece_open(path_of(opened), e))) code = e->code;
    if (code == QUARRY_OK) code = session_load(s, pieces, n, false, &damaged, e);
    for (int i = 0; i < opened; i++) piece_close(pieces[i]);
    return code;
}

static void feed(quarry_session *s)
{
    quarry_error e = {0};
    if (quarry_session_feed(s, tokens + N, QUESTION, NULL, &e) != 0) fail_msg("%s", e.message);
}

static void assert_same_answer(quarry_session *a, quarry_session *b)
{
    feed(a);
    feed(b);
    assert_int_equal(quarry_session_length(a), quarry_session_length(b));
    assert_memory_equal(quarry_session_tokens(a), quarry_session_tokens(b), (size_t)quarry_session_length(a) * sizeof(int32_t));
    assert_memory_equal(quarry_session_logits(a), quarry_session_logits(b), (size_t)n_vocab * sizeof(float));
    attn_cost x = session_cost(a), y = session_cost(b);
    assert_memory_equal(&x, &y, sizeof x);
}

/* ---- */

static const char *const kinds[] = {"llama-f32.gguf", "gemma3-f32.gguf", "qwen3-q8_0.gguf"};
static const char policy[] = "ivfpq:segment=128,budget=0.05,threshold=0.02";

/* In one piece, in several that end at ends of texts, and in one that ends in the middle of a text. */
static void answers_alike(void)
{
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
        quarry_model *m = open_model(kinds[k]);
        for (int way = 0; way < 3; way++) {
            const int64_t ends[3][MAX_PIECES] = {{N}, {260, 290, 560, N}, {333, N}};
            quarry_session *s = open_session(m, policy), *again = open_session(m, policy);
            quarry_error e = {0};
            int n = 0;
            for (; n < MAX_PIECES && ends[way][n]; n++) {
                read_to(s, ends[way][n], way != 2 || ends[way][n] == N);
                save(s, n);
                quarry_session *part = open_session(m, policy);
                if (load(part, n + 1, &e) != QUARRY_OK) fail_msg("%s way %d piece %d: %s", kinds[k], way, n, e.message);
                quarry_session *fork = quarry_session_fork(s, &e);
                assert_same_answer(fork, part);
                quarry_session_close(fork);
                quarry_session_close(part);
            }
            assert_int_equal(load(again, n, &e), QUARRY_OK);
            assert_same_answer(s, again);
            quarry_session_close(s);
            quarry_session_close(again);
        }
        quarry_model_close(m);
    }
}

static void test_answers_alike(void **state)
{
    (void)state;
    answers_alike();
    extended = true;
    answers_alike();
    extended = false;
}

/* Reading on after loading gives what reading everything at once does. */
static void test_goes_on(void **state)
{
    (void)state;
    for (size_t k = 0; k < 2; k++) {
        quarry_model *m = open_model(kinds[k]);
        quarry_session *s = open_session(m, policy), *again = open_session(m, policy), *whole = open_session(m, policy);
        quarry_error e = {0};
        read_to(s, 384, false); /* a whole number of batches */
        save(s, 0);
        assert_int_equal(load(again, 1, &e), QUARRY_OK);
        read_to(again, N, true);
        read_to(whole, N, true);
        assert_same_answer(whole, again);
        quarry_session_close(s);
        quarry_session_close(again);
        quarry_session_close(whole);
        quarry_model_close(m);
    }
}

/* Other policies take the rows and make their index of them; those that learn from queries cannot. */
static void test_other_policies(void **state)
{
    (void)state;
    static const char *const others[] = {"full", "window"};
    quarry_model *m = open_model("llama-f32.gguf");
    quarry_session *s = open_session(m, "ivfpq");
    quarry_error e = {0};
    read_to(s, N, true);
    save(s, 0);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        quarry_session *read = open_session(m, others[i]), *loaded = open_session(m, others[i]);
        read_to(read, N, true);
        if (load(loaded, 1, &e) != QUARRY_OK) fail_msg("%s: %s", others[i], e.message);
        assert_false(session_can_save(loaded));
        assert_same_answer(read, loaded);
        quarry_session_close(read);
        quarry_session_close(loaded);
    }
    quarry_session *snapkv = open_session(m, "snapkv"), *finer = open_session(m, "ivfpq:size=32");
    assert_int_equal(load(snapkv, 1, &e), QUARRY_ERROR_UNSUPPORTED);
    assert_non_null(strstr(e.message, "snapkv"));
    assert_int_equal(load(finer, 1, &e), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(e.message, "size=32"));
    assert_int_equal(quarry_session_length(finer), 0);
    read_to(finer, N, true); /* still of use */
    quarry_session_close(snapkv);
    quarry_session_close(finer);
    quarry_session_close(s);
    quarry_model_close(m);
}

/* ---- damage ---- */

static char *file_bytes(int i, size_t *n)
{
    quarry_error e = {0};
    char *bytes = file_read_all(path_of(i), n, &e);
    if (!bytes) fail_msg("%s", e.message);
    return bytes;
}

static void put_file(int i, const char *bytes, size_t n)
{
    quarry_error e = {0};
    if (file_write_all(path_of(i), bytes, n, &e) != QUARRY_OK) fail_msg("%s", e.message);
}

static void assert_found(quarry_model *m, int n_pieces, size_t at)
{
    quarry_session *s = open_session(m, policy);
    quarry_error e = {0};
    quarry_code code = load(s, n_pieces, &e);
    if (code != QUARRY_ERROR_FORMAT && code != QUARRY_ERROR_UNSUPPORTED) fail_msg("byte %zu: code %d", at, code);
    assert_non_null(strstr(e.message, ".piece"));
    assert_int_equal(quarry_session_length(s), 0);
    assert_null(quarry_session_logits(s));
    quarry_session_close(s);
}

static void test_any_flipped_bit_is_found(void **state)
{
    (void)state;
    quarry_model *m = open_model("gemma3-f32.gguf");
    quarry_session *s = open_session(m, policy);
    random_state r;
    random_seed(&r, 3);
    read_to(s, 560, true);
    save(s, 0);
    read_to(s, N, true);
    save(s, 1);
    for (int i = 0; i < 2; i++) {
        size_t n;
        char *bytes = file_bytes(i, &n);
        for (int k = 0; k < 400; k++) {
            const size_t half = k % 2 ? n : 8192, at = k < 8 ? n - 1 - (size_t)k : (size_t)random_below(&r, half < n ? half : n);
            const char bit = (char)(1 << random_below(&r, 8));
            bytes[at] ^= bit;
            put_file(i, bytes, n);
            /* of a piece that another continues only the sinks count among its loose rows, and nothing of its state */
            quarry_error e = {0};
            piece_file *p = piece_open(path_of(i), &e);
            if (p) {
                thread_pool *pool = model_pool(m);
                arena scratch[2] = {0};
                quarry_code code = piece_verify(p, pool, scratch, &e);
                if (code != QUARRY_ERROR_FORMAT) fail_msg("byte %zu of piece %d: verify says %d", at, i, code);
                for (int t = 0; t < 2; t++) arena_free(&scratch[t]);
                piece_close(p);
            }
            if (i == 1) assert_found(m, 2, at);
            bytes[at] ^= bit;
        }
        put_file(i, bytes, n);
        memory_free(bytes);
    }
    quarry_session *whole = open_session(m, policy);
    quarry_error e = {0};
    assert_int_equal(load(whole, 2, &e), QUARRY_OK);
    assert_same_answer(s, whole);
    quarry_session_close(whole);
    quarry_session_close(s);
    quarry_model_close(m);
}

static void test_cut_short_or_grown(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf");
    quarry_session *s = open_session(m, policy);
    read_to(s, N, true);
    save(s, 0);
    size_t n;
    char *bytes = file_bytes(0, &n);
    const size_t lengths[] = {0, 1, 4095, 4096, 5000, n / 2, n - 4096, n - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_file(0, bytes, lengths[i]);
        assert_found(m, 1, lengths[i]);
    }
    char *longer = calloc(n + 4096, 1);
    memcpy(longer, bytes, n);
    put_file(0, longer, n + 4096);
    assert_found(m, 1, n);
    free(longer);
    memory_free(bytes);
    quarry_session_close(s);
    quarry_model_close(m);
}

/* ---- failures ---- */

static void test_without_memory(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf");
    quarry_session *s = open_session(m, policy);
    quarry_error e = {0};
    read_to(s, N, true);
    save(s, 0);
    int64_t failures = 0;
    for (int64_t n = 0;; n++) {
        quarry_session *again = open_session(m, policy);
        memory_fail_after(n);
        quarry_code code = load(again, 1, &e);
        memory_fail_after(-1);
        if (code == QUARRY_OK) {
            quarry_session *fork = quarry_session_fork(s, &e);
            assert_same_answer(fork, again);
            quarry_session_close(fork);
            quarry_session_close(again);
            break;
        }
        failures++;
        assert_int_equal(code, QUARRY_ERROR_MEMORY);
        assert_int_equal(quarry_session_length(again), 0);
        quarry_session_close(again);
    }
    assert_true(failures > 5);
    quarry_session_close(s);
    quarry_model_close(m);
}

static void test_a_disk_that_fails(void **state)
{
    (void)state;
    quarry_model *m = open_model("llama-f32.gguf");
    quarry_session *s = open_session(m, policy);
    read_to(s, N, true);
    static const file_call calls[] = {FILE_CALL_WRITE, FILE_CALL_SYNC, FILE_CALL_RENAME};
    for (size_t c = 0; c < sizeof calls / sizeof *calls; c++) {
        quarry_error e = {0};
        store_key key;
        unlink(path_of(2));
        file_fail_at(calls[c], 0, ENOSPC);
        file_writer *file = file_write_open(path_of(2), &e);
        assert_non_null(file);
        quarry_code code = session_save(s, file, "", &key, &e);
        if (code == QUARRY_OK) code = file_write_commit(file, &e);
        file_fail_at(calls[c], -1, 0);
        file_write_close(file);
        assert_int_equal(code, QUARRY_ERROR_IO);
        assert_non_null(strstr(e.message, "2.piece"));
        assert_int_not_equal(access(path_of(2), F_OK), 0);
    }
    save(s, 0); /* and now it goes */
    quarry_error e = {0};
    quarry_session *again = open_session(m, policy);
    for (int n = 0; n < 2; n++) { /* later ones are of whichever thread comes first */
        file_fail_at(FILE_CALL_READ, n, EIO);
        assert_int_equal(load(again, 1, &e), QUARRY_ERROR_IO);
        file_fail_at(FILE_CALL_READ, -1, 0);
    }
    assert_int_equal(load(again, 1, &e), QUARRY_OK);
    assert_same_answer(s, again);
    quarry_session_close(again);
    quarry_session_close(s);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answers_alike),      cmocka_unit_test(test_goes_on),
        cmocka_unit_test(test_other_policies),     cmocka_unit_test(test_any_flipped_bit_is_found),
        cmocka_unit_test(test_cut_short_or_grown), cmocka_unit_test(test_without_memory),
        cmocka_unit_test(test_a_disk_that_fails),
    };
    strcpy(folder, "piece-XXXXXX");
    if (!mkdtemp(folder)) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    for (int i = 0; i < MAX_PIECES; i++) unlink(path_of(i));
    rmdir(folder);
    return failed;
}
