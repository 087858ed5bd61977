/* The store as a session uses it: what was read once is taken, whatever is near but not the same is read and said, and nothing that fails keeps a text from being read. */
#include "test.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gen/gen.h"

enum { N = 900, MORE = 300, QUESTION = 10 };

static int32_t tokens[N + MORE + QUESTION];
static char folder[64];

static quarry_model *open_model(const char *name)
{
    char path[1024];
    const char *models = getenv("QUARRY_TINY_MODELS");
    if (!models) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", models, name);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = 1}, &e);
    if (!m) fail_msg("%s", e.message);
    random_state r;
    random_seed(&r, 21);
    for (int i = 0; i < N + MORE + QUESTION; i++) tokens[i] = (int32_t)random_below(&r, (uint64_t)model_shape_of(m)->n_vocab);
    return m;
}

static void empty_folder(void)
{
    DIR *d = opendir(folder);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] != '.') unlink(path);
    }
    if (d) closedir(d);
}

static quarry_store *open_store(uint64_t max_bytes)
{
    quarry_error e = {0};
    quarry_store *store = quarry_store_open(&(quarry_store_params){.folder = folder, .max_bytes = max_bytes}, &e);
    if (!store) fail_msg("%s", e.message);
    return store;
}

static quarry_session *open_session(quarry_model *m, const char *attn)
{
    quarry_error e = {0};
    quarry_session *s = quarry_session_open(m, &(quarry_session_params){.attn = attn}, &e);
    if (!s) fail_msg("%s", e.message);
    session_allow_beyond_training(s);
    return s;
}

/* Reads n tokens, of which documents end at 300, 700 and n. */
static quarry_stored read_stored(quarry_session *s, quarry_store *store, int64_t n)
{
    const int64_t ends[] = {300, 700, n};
    int n_ends = 0;
    quarry_stored info;
    quarry_error e = {0};
    while (n_ends < 3 && ends[n_ends] < n) n_ends++;
    if (quarry_session_read_stored(s, store, tokens, n, ends, n_ends, "a\nb", NULL, &info, &e)) fail_msg("%s", e.message);
    assert_int_equal(quarry_session_length(s), n);
    return info;
}

static void assert_same_answer(quarry_model *m, quarry_session *a, quarry_session *b)
{
    quarry_error e = {0};
    assert_int_equal(quarry_session_feed(a, tokens + N + MORE, QUESTION, NULL, &e), 0);
    assert_int_equal(quarry_session_feed(b, tokens + N + MORE, QUESTION, NULL, &e), 0);
    assert_memory_equal(quarry_session_logits(a), quarry_session_logits(b), (size_t)model_shape_of(m)->n_vocab * sizeof(float));
}

static int64_t n_contexts(quarry_store *store)
{
    catalogue_totals totals;
    quarry_error e = {0};
    assert_int_equal(catalogue_get_totals(store_catalogue(store), &totals, &e), QUARRY_OK);
    return totals.n_contexts;
}

static void what_was_read_is_taken(void **state)
{
    quarry_model *m = *state;
    quarry_store *store = open_store(0);
    quarry_session *first = open_session(m, NULL), *again = open_session(m, NULL), *plain = open_session(m, NULL),
                   *full = open_session(m, "full");
    quarry_stored info = read_stored(first, store, N);
    assert_int_equal(info.n_taken, 0);
    assert_true(info.kept_bytes > 0);
    assert_string_equal(info.note, "");
    info = read_stored(again, store, N);
    assert_int_equal(info.n_taken, N);
    assert_int_equal(info.kept_bytes, 0);
    read_stored(plain, NULL, N);
    info = read_stored(full, store, N);
    assert_int_equal(info.n_taken, N);
    assert_same_answer(m, plain, again);
    assert_int_equal(n_contexts(store), 1);
    quarry_session_close(first);
    quarry_session_close(again);
    quarry_session_close(plain);
    quarry_session_close(full);
    quarry_store_close(store);
}

/* A document more: the others are not read again, and stand once in the store. */
static void a_document_more(void **state)
{
    quarry_model *m = *state;
    quarry_store *store = open_store(0);
    quarry_session *one = open_session(m, NULL), *two = open_session(m, NULL), *plain = open_session(m, NULL),
                   *less = open_session(m, NULL);
    const uint64_t kept = read_stored(one, store, N).kept_bytes;
    quarry_stored info = read_stored(two, store, N + MORE); /* its third document goes on where that of the first ended */
    assert_int_equal(info.n_taken, N);
    assert_true(info.kept_bytes > 0 && info.kept_bytes < kept);
    info = read_stored(less, store, 700);
    assert_int_equal(info.n_taken, 700);
    assert_int_equal(n_contexts(store), 3);
    assert_int_equal(read_stored(plain, NULL, 700).n_taken, 0);
    assert_same_answer(m, less, plain);
    quarry_session_close(one);
    quarry_session_close(two);
    quarry_session_close(plain);
    quarry_session_close(less);
    quarry_store_close(store);
}

/* One token differs: what is before its document is taken, and it is said where. */
static void a_token_differs(void **state)
{
    quarry_model *m = *state;
    quarry_store *store = open_store(0);
    quarry_session *one = open_session(m, NULL), *two = open_session(m, NULL);
    read_stored(one, store, N);
    const int32_t was = tokens[690];
    tokens[690] = was ? 0 : 1;
    quarry_stored info = read_stored(two, store, N);
    tokens[690] = was;
    assert_int_equal(info.n_taken, 300);
    assert_non_null(strstr(info.note, "up to token 690"));
    quarry_session_close(one);
    quarry_session_close(two);
    quarry_store_close(store);
}

static void another_model(void **state)
{
    quarry_model *m = *state, *other = open_model("llama-q8_0.gguf");
    quarry_store *store = open_store(0);
    quarry_session *one = open_session(m, NULL), *two = open_session(other, NULL);
    read_stored(one, store, 290);
    read_stored(two, store, 290);
    quarry_session_close(two);
    two = open_session(other, NULL);
    assert_int_equal(read_stored(two, store, 290).n_taken, 290);
    quarry_session_close(two);
    empty_folder(); /* now the other one alone */
    quarry_store_close(store);
    store = open_store(0);
    quarry_session *three = open_session(m, NULL), *four = open_session(other, NULL);
    read_stored(three, store, 290);
    quarry_stored info = read_stored(four, store, 290);
    assert_int_equal(info.n_taken, 0);
    assert_non_null(strstr(info.note, "another model"));
    quarry_session_close(three);
    quarry_session_close(four);
    quarry_session_close(one);
    quarry_store_close(store);
    quarry_model_close(other);
}

static char *only_piece(int64_t at_least)
{
    static char path[512];
    DIR *d = opendir(folder);
    path[0] = 0;
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char this[512];
        struct stat st;
        snprintf(this, sizeof this, "%s/%s", folder, entry->d_name);
        if (strstr(entry->d_name, ".piece") && stat(this, &st) == 0 && st.st_size >= at_least) strcpy(path, this);
    }
    closedir(d);
    return path;
}

/* A damaged piece is told, removed, and what it held read again; the piece before it is used. */
static void damage_is_told_and_mended(void **state)
{
    quarry_model *m = *state;
    quarry_store *store = open_store(0);
    quarry_session *one = open_session(m, NULL), *two = open_session(m, NULL), *three = open_session(m, NULL),
                   *plain = open_session(m, NULL);
    quarry_error e = {0};
    read_stored(one, store, 300);
    char first[512];
    strcpy(first, only_piece(0));
    read_stored(two, store, 700);
    DIR *d = opendir(folder);
    char second[512] = "";
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char this[512];
        snprintf(this, sizeof this, "%s/%s", folder, entry->d_name);
        if (strstr(entry->d_name, ".piece") && strcmp(this, first) != 0) strcpy(second, this);
    }
    closedir(d);
    size_t n;
    char *bytes = file_read_all(second, &n, &e);
    assert_non_null(bytes);
    bytes[n - 100] ^= 4;
    FILE *f = fopen(second, "wb");
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
    memory_free(bytes);
    quarry_stored info = read_stored(three, store, 700);
    assert_int_equal(info.n_taken, 300);
    assert_non_null(strstr(info.note, "damaged"));
    assert_non_null(strstr(info.note, "its text read again"));
    assert_non_null(strstr(info.note, strrchr(second, '/')));
    assert_true(info.kept_bytes > 0);
    read_stored(plain, NULL, 700);
    assert_same_answer(m, plain, three);
    quarry_session *again = open_session(m, NULL);
    assert_int_equal(read_stored(again, store, 700).n_taken, 700);
    quarry_session_close(again);
    quarry_session_close(one);
    quarry_session_close(two);
    quarry_session_close(three);
    quarry_session_close(plain);
    quarry_store_close(store);
}

static void a_full_disk_does_not_matter(void **state)
{
    quarry_model *m = *state;
    quarry_store *store = open_store(0), *small = NULL;
    quarry_session *one = open_session(m, NULL), *two = open_session(m, NULL);
    file_fail_at(FILE_CALL_WRITE, 0, ENOSPC);
    quarry_stored info = read_stored(one, store, 290);
    file_fail_at(FILE_CALL_WRITE, -1, 0);
    assert_int_equal(info.kept_bytes, 0);
    assert_non_null(strstr(info.note, ".piece"));
    assert_string_equal(only_piece(0), "");
    quarry_store_close(store);
    small = open_store(1000);
    info = read_stored(two, small, 290);
    assert_non_null(strstr(info.note, "not kept"));
    assert_string_equal(only_piece(0), "");
    quarry_session_close(one);
    quarry_session_close(two);
    quarry_store_close(small);
}

/* Killed at the n-th call of the file layer: the store opens, and what was committed is there. */
static void killed_at_any_point(void **state)
{
    quarry_model *m = *state;
    static const file_call calls[] = {FILE_CALL_OPEN, FILE_CALL_WRITE, FILE_CALL_SYNC, FILE_CALL_RENAME};
    int killed = 0;
    for (size_t c = 0; c < sizeof calls / sizeof *calls; c++)
        for (int at = 0; at < 4; at++) {
            empty_folder();
            quarry_store *store = open_store(0);
            quarry_session *one = open_session(m, NULL);
            read_stored(one, store, 300);
            quarry_session_close(one);
            quarry_store_close(store);
            pid_t child = fork();
            if (child == 0) {
                store = open_store(0);
                one = open_session(m, NULL);
                file_fail_at(calls[c], at, -1);
                read_stored(one, store, N);
                _exit(0);
            }
            int status;
            waitpid(child, &status, 0);
            killed += WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
            store = open_store(0);
            one = open_session(m, NULL);
            assert_true(read_stored(one, store, N).n_taken >= 300);
            quarry_session_close(one);
            one = open_session(m, NULL);
            assert_int_equal(read_stored(one, store, N).n_taken, N);
            quarry_session_close(one);
            quarry_store_close(store);
        }
    assert_true(killed >= 4);
}

static bool stop_late(int64_t done, int64_t total, void *data)
{
    *(int64_t *)data = done;
    return done < total - 300;
}

/* A long text is kept in parts: a reading that was stopped goes on where the last one ended. */
static void a_long_text_goes_on(void **state)
{
    enum { LONG = 34000, PART = 32768 };
    quarry_model *m = *state;
    quarry_store *store = open_store(0);
    quarry_error e = {0};
    quarry_stored info;
    int32_t *text = malloc(LONG * sizeof *text);
    int64_t done = 0;
    random_state r;
    random_seed(&r, 9);
    for (int i = 0; i < LONG; i++) text[i] = (int32_t)random_below(&r, (uint64_t)model_shape_of(m)->n_vocab);
    const quarry_session_params params = {.extend = true, .read_window = 256};
    const int64_t end = LONG;
    quarry_session *one = quarry_session_open(m, &params, &e), *two = quarry_session_open(m, &params, &e);
    assert_int_equal(quarry_session_read_stored(one, store, text, LONG, &end, 1, "long", &(quarry_watch){stop_late, &done}, &info, &e),
                     QUARRY_ERROR_CANCELLED);
    assert_true(done >= LONG - 300 - 512);
    assert_int_equal(info.n_kept, PART);
    assert_int_equal(quarry_session_read_stored(two, store, text, LONG, &end, 1, "long", NULL, &info, &e), 0);
    assert_int_equal(info.n_taken, PART);
    assert_int_equal(info.n_kept, LONG - PART);
    quarry_session_close(one);
    quarry_session_close(two);
    quarry_store_close(store);
    free(text);
}

static int setup(void **state)
{
    *state = open_model("llama-q4_1.gguf");
    return 0;
}

static int teardown(void **state)
{
    quarry_model_close(*state);
    return 0;
}

static int before_each(void **state)
{
    (void)state;
    empty_folder();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(what_was_read_is_taken, before_each),    cmocka_unit_test_setup(a_document_more, before_each),
        cmocka_unit_test_setup(a_token_differs, before_each),           cmocka_unit_test_setup(another_model, before_each),
        cmocka_unit_test_setup(damage_is_told_and_mended, before_each), cmocka_unit_test_setup(a_full_disk_does_not_matter, before_each),
        cmocka_unit_test_setup(killed_at_any_point, before_each),       cmocka_unit_test_setup(a_long_text_goes_on, before_each),
    };
    strcpy(folder, "stored-XXXXXX");
    if (!mkdtemp(folder)) return 1;
    int failed = cmocka_run_group_tests(tests, setup, teardown);
    empty_folder();
    rmdir(folder);
    return failed;
}
