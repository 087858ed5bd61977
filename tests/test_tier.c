/* Contexts whose rows stay in files: they answer as those in memory do, in the memory they may take, and whatever is wrong with a file is found before an answer comes of it. */
#include "test.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <unistd.h>

#include "gen/gen.h"
#include "store/piece_format.h"

enum { N = 900, MORE = 200, QUESTION = 12, LONG = 4000, MAX_PIECES = 4 };

static int32_t tokens[LONG + MORE + QUESTION];
static const int32_t *const more = tokens + LONG, *const question = tokens + LONG + MORE;
static int64_t n_vocab;
static char folder[64];

static const char *const kinds[] = {"llama-f32.gguf", "gemma3-f32.gguf", "qwen3-q8_0.gguf"};
static const char policy[] = "ivfpq:segment=128,budget=0.05,threshold=0.02";

static quarry_model *open_model(const char *name, int n_threads)
{
    char path[1024];
    const char *models = getenv("QUARRY_TINY_MODELS");
    if (!models) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", models, name);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, &(quarry_model_params){.n_threads = n_threads}, &e);
    if (!m) fail_msg("%s", e.message);
    n_vocab = model_shape_of(m)->n_vocab;
    random_state r;
    random_seed(&r, 17);
    for (size_t i = 0; i < TEST_COUNT(tokens); i++) tokens[i] = (int32_t)random_below(&r, (uint64_t)n_vocab);
    return m;
}

/* What sessions are opened with. */
static quarry_session_params params = {.attn = policy, .n_batch = 64};

static void set_extended(bool extended)
{
    params.extend = extended;
    params.read_window = extended ? 64 : 0;
}

static quarry_session *open_session(quarry_model *m, size_t kv_ram)
{
    quarry_error e = {0};
    quarry_session_params own = params;
    own.kv_ram = kv_ram;
    quarry_session *s = quarry_session_open(m, &own, &e);
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

static quarry_code load(quarry_session *s, int n, bool cold, quarry_error *e)
{
    piece_file *pieces[MAX_PIECES] = {0};
    store_key damaged;
    quarry_code code = QUARRY_OK;
    int opened = 0;
    for (; opened < n && code == QUARRY_OK; opened++)
        if (!(pieces[opened] = piece_open(path_of(opened), e))) code = e->code;
    if (code == QUARRY_OK) code = session_load(s, pieces, n, cold, &damaged, e);
    for (int i = 0; i < opened; i++) piece_close(pieces[i]);
    return code;
}

/* A session that holds the first n pieces. */
static quarry_session *loaded(quarry_model *m, int n, bool cold, size_t kv_ram)
{
    quarry_error e = {0};
    quarry_session *s = open_session(m, kv_ram);
    if (load(s, n, cold, &e) != QUARRY_OK) fail_msg("%s", e.message);
    return s;
}

/* A model, and its tokens up to N in n pieces. */
static void make_pieces(quarry_model *m, int n)
{
    quarry_session *s = open_session(m, 0);
    for (int i = 0; i < n; i++) {
        read_to(s, N * (i + 1) / n, true);
        save(s, i);
    }
    quarry_session_close(s);
}

static size_t kv_bytes_of(const quarry_session *s)
{
    quarry_stats stats;
    quarry_session_get_stats(s, &stats);
    return stats.kv_bytes;
}

static void assert_within(const quarry_session *s, size_t kv_ram)
{
    if (kv_ram && kv_bytes_of(s) > kv_ram) fail_msg("%zu bytes of keys and values, %zu are allowed", kv_bytes_of(s), kv_ram);
}

static void feed(quarry_session *s)
{
    quarry_error e = {0};
    if (quarry_session_feed(s, question, QUESTION, NULL, &e) != 0) fail_msg("%s", e.message);
}

static bool same_logits(const quarry_session *a, const quarry_session *b)
{
    return memcmp(quarry_session_logits(a), quarry_session_logits(b), (size_t)n_vocab * sizeof(float)) == 0;
}

static void assert_same(quarry_session *a, quarry_session *b)
{
    assert_int_equal(quarry_session_length(a), quarry_session_length(b));
    assert_memory_equal(quarry_session_tokens(a), quarry_session_tokens(b), (size_t)quarry_session_length(a) * sizeof(int32_t));
    assert_true(same_logits(a, b));
}

static void assert_same_answer(quarry_session *a, quarry_session *b)
{
    feed(a);
    feed(b);
    assert_same(a, b);
}

/* Within a share of the largest logit. */
static void assert_close(const quarry_session *a, const quarry_session *b, double share)
{
    const float *x = quarry_session_logits(a), *y = quarry_session_logits(b);
    double worst = 0, size = 0;
    for (int64_t i = 0; i < n_vocab; i++) {
        worst = fmax(worst, fabs((double)x[i] - (double)y[i]));
        size = fmax(size, fabs((double)x[i]));
    }
    if (!(worst <= share * size)) fail_msg("logits of up to %g differ by %g", size, worst);
}

/* Greedy tokens, one after the other. */
static void generate(quarry_session *s, int n, size_t kv_ram)
{
    for (int i = 0; i < n; i++) {
        const float *logits = quarry_session_logits(s);
        quarry_error e = {0};
        int32_t best = 0;
        for (int32_t t = 1; t < n_vocab; t++)
            if (logits[t] > logits[best]) best = t;
        if (quarry_session_feed(s, &best, 1, NULL, &e) != 0) fail_msg("%s", e.message);
        assert_within(s, kv_ram);
    }
}

/* The least bound on memory with which the pieces can be loaded. */
static size_t least_ram(quarry_model *m, int n_pieces)
{
    size_t low = 1, high = 64 << 20;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        quarry_error e = {0};
        quarry_session *s = open_session(m, middle);
        const quarry_code code = load(s, n_pieces, true, &e);
        if (code == QUARRY_OK) {
            assert_within(s, middle);
            high = middle;
        } else {
            low = middle + 1;
            assert_int_equal(code, QUARRY_ERROR_MEMORY);
            assert_non_null(strstr(e.message, "--kv-ram"));
            assert_int_equal(quarry_session_length(s), 0); /* nothing has changed */
            assert_int_equal(kv_bytes_of(s), 0);
        }
        quarry_session_close(s);
    }
    return low;
}

/* ---- answers ---- */

/* In one piece and in several, with and without a bound, after the question and later on: as loaded into memory, and as never saved. */
static void answers_alike(void)
{
    for (size_t k = 0; k < TEST_COUNT(kinds); k++) {
        quarry_model *m = open_model(kinds[k], 2);
        for (int n_pieces = 1; n_pieces <= 3; n_pieces += 2) {
            quarry_session *never = open_session(m, 0);
            for (int i = 0; i < n_pieces; i++) {
                read_to(never, N * (i + 1) / n_pieces, true);
                save(never, i);
            }
            quarry_session *hot = loaded(m, n_pieces, false, 0), *cold = loaded(m, n_pieces, true, 0);
            assert_true(kv_bytes_of(cold) < kv_bytes_of(hot));
            assert_same_answer(never, cold);
            feed(hot);
            assert_same(never, hot);
            const attn_cost x = session_cost(hot), y = session_cost(cold);
            assert_memory_equal(&x, &y, sizeof x);
            generate(hot, 100, 0);
            generate(cold, 100, 0);
            assert_same(hot, cold);
            const size_t least = least_ram(m, n_pieces), whole = kv_bytes_of(hot);
            for (size_t kv_ram = least + 100000; kv_ram < 2 * whole; kv_ram += kv_ram / 4) {
                quarry_session *bound = loaded(m, n_pieces, true, kv_ram);
                feed(bound);
                assert_within(bound, kv_ram);
                generate(bound, 100, kv_ram);
                assert_same(hot, bound);
                quarry_session_close(bound);
            }
            quarry_session_close(never);
            quarry_session_close(hot);
            quarry_session_close(cold);
        }
        quarry_model_close(m);
    }
}

static void test_answers_alike(void **state)
{
    (void)state;
    answers_alike();
}

static void test_answers_alike_extended(void **state)
{
    (void)state;
    set_extended(true);
    answers_alike();
    set_extended(false);
}

/* A context so short that no segment was sealed. */
static void test_short_contexts(void **state)
{
    (void)state;
    static const int64_t lengths[] = {3, 8, 9, 70, 150};
    quarry_model *m = open_model(kinds[0], 2);
    for (size_t i = 0; i < TEST_COUNT(lengths); i++) {
        quarry_error e = {0};
        quarry_session *s = open_session(m, 0);
        read_to(s, lengths[i], true);
        save(s, 0);
        quarry_session *cold = loaded(m, 1, true, 0), *again = loaded(m, 1, true, 0);
        assert_same_answer(s, cold);
        assert_int_equal(quarry_session_read(cold, more, MORE, NULL, &e), 0);
        assert_int_equal(quarry_session_read(s, more, MORE, NULL, &e), 0);
        assert_close(s, cold, 1e-4);
        assert_int_equal(quarry_session_read(again, more, MORE, NULL, &e), 0);
        quarry_session_close(s);
        quarry_session_close(cold);
        quarry_session_close(again);
    }
    quarry_model_close(m);
}

static void test_forks(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[1], 2);
    quarry_error e = {0};
    make_pieces(m, 2);
    const size_t kv_ram = least_ram(m, 2) + 150000;
    quarry_session *hot = loaded(m, 2, false, 0), *cold = loaded(m, 2, true, kv_ram), *forks[3];
    for (int i = 0; i < 3; i++) {
        assert_non_null(forks[i] = quarry_session_fork(cold, &e));
        assert_within(forks[i], kv_ram);
    }
    assert_same_answer(hot, forks[0]);
    quarry_session_close(forks[0]);
    assert_int_equal(quarry_session_length(cold), N);
    feed(cold);
    assert_same(hot, cold);
    quarry_session_close(cold); /* the forks go on without it */
    feed(forks[1]);
    assert_same(hot, forks[1]);
    generate(hot, 80, 0);
    generate(forks[1], 80, kv_ram);
    assert_same(hot, forks[1]);
    feed(forks[2]);
    generate(forks[2], 80, kv_ram);
    assert_same(hot, forks[2]);
    for (int i = 1; i < 3; i++) quarry_session_close(forks[i]);
    quarry_session_close(hot);
    quarry_model_close(m);
}

static void *ask(void *session)
{
    feed(session);
    generate(session, 150, 0);
    return NULL;
}

/* Forks share the cache of cold rows, which is divided anew as they grow. */
static void test_forks_on_two_threads(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[0], 2);
    quarry_error e = {0};
    make_pieces(m, 1);
    quarry_session *hot = loaded(m, 1, false, 0), *cold = loaded(m, 1, true, least_ram(m, 1) + 120000);
    quarry_session *fork = quarry_session_fork(cold, &e);
    assert_non_null(fork);
    pthread_t threads[2];
    assert_int_equal(pthread_create(&threads[0], NULL, ask, cold), 0);
    assert_int_equal(pthread_create(&threads[1], NULL, ask, fork), 0);
    for (int i = 0; i < 200; i++) kv_bytes_of(hot);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    ask(hot);
    assert_same(hot, cold);
    assert_same(hot, fork);
    quarry_session_close(fork);
    quarry_session_close(cold);
    quarry_session_close(hot);
    quarry_model_close(m);
}

/* One token to each of several sessions: within the bound, too. */
static void test_sessions_together(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[0], 2);
    make_pieces(m, 1);
    const size_t kv_ram = least_ram(m, 1) + 120000;
    quarry_session *hot = loaded(m, 1, false, 0), *cold = loaded(m, 1, true, kv_ram);
    quarry_session *both[] = {hot, cold};
    for (int i = 0; i < 200; i++) {
        quarry_error e = {0};
        const int32_t next[] = {tokens[i], tokens[i]};
        if (quarry_sessions_feed(both, next, 2, &e)) fail_msg("%s", e.message);
        assert_within(cold, kv_ram);
    }
    assert_same(hot, cold);
    quarry_session_close(hot);
    quarry_session_close(cold);
    quarry_model_close(m);
}

/* What was saved cannot be made shorter, what came later can; and all of it can be forgotten. */
static void test_truncation(void **state)
{
    (void)state;
    for (size_t k = 0; k < 2; k++) {
        quarry_model *m = open_model(kinds[k], 2);
        quarry_error e = {0};
        make_pieces(m, 1);
        quarry_session *hot = loaded(m, 1, false, 0), *cold = loaded(m, 1, true, 0);
        feed(hot);
        feed(cold);
        generate(hot, 30, 0);
        generate(cold, 30, 0);
        assert_int_equal(quarry_session_truncate(cold, N - 1, &e), QUARRY_ERROR_ARGUMENT);
        assert_null(strstr(e.message, "window"));
        assert_non_null(strstr(e.message, "900"));
        assert_int_equal(quarry_session_length(cold), N + QUESTION + 30);
        assert_int_equal(quarry_session_truncate(hot, N, &e), 0);
        assert_int_equal(quarry_session_truncate(cold, N, &e), 0);
        assert_same_answer(hot, cold);
        assert_int_equal(quarry_session_truncate(hot, 0, &e), 0);
        assert_int_equal(quarry_session_truncate(cold, 0, &e), 0);
        assert_int_equal(kv_bytes_of(cold), 0);
        read_to(hot, 300, true);
        read_to(cold, 300, true);
        assert_same_answer(hot, cold);
        quarry_session_close(cold);
        quarry_session_close(hot);
        quarry_model_close(m);
    }
}

static char *make_text(uint64_t seed)
{
    random_state r;
    random_seed(&r, seed);
    char *text = calloc(1, 1200);
    for (size_t n = 0; n < 1000;) {
        for (uint64_t i = 0, length = 3 + random_below(&r, 6); i < length; i++) text[n++] = (char)('a' + random_below(&r, 26));
        text[n++] = random_below(&r, 8) ? ' ' : '.';
        if (text[n - 1] == '.') text[n++] = ' ';
    }
    return text;
}

static void test_citations(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[0], 2);
    quarry_error e = {0};
    char *texts[2] = {make_text(1), make_text(2)};
    const quarry_document documents[] = {{.name = "a", .text = texts[0], .n_bytes = strlen(texts[0])},
                                         {.name = "b", .text = texts[1], .n_bytes = strlen(texts[1])}};
    quarry_prompt prompt;
    if (quarry_prompt_build(m, documents, 2, NULL, "what became of it?", &prompt, &e)) fail_msg("%s", e.message);
    quarry_session *s = open_session(m, 0);
    assert_int_equal(quarry_session_read(s, prompt.context, prompt.n_context, NULL, &e), 0);
    save(s, 0);
    quarry_session_close(s);
    quarry_citation *cited[2] = {NULL, NULL};
    int64_t n[2];
    for (int cold = 0; cold < 2; cold++) {
        s = loaded(m, 1, cold, 0);
        assert_int_equal(quarry_session_cite(s, &e), 0);
        assert_int_equal(quarry_session_feed(s, prompt.question, prompt.n_question, NULL, &e), 0);
        generate(s, 40, 0);
        n[cold] = quarry_session_citations(s, documents, 2, 10, &cited[cold], &e);
        if (n[cold] < 0) fail_msg("%s", e.message);
        quarry_session_close(s);
    }
    assert_true(n[0] > 0);
    assert_int_equal(n[0], n[1]);
    for (int64_t i = 0; i < n[0]; i++) {
        assert_int_equal(cited[0][i].document, cited[1][i].document);
        assert_int_equal(cited[0][i].first_byte, cited[1][i].first_byte);
        assert_int_equal(cited[0][i].end_byte, cited[1][i].end_byte);
        assert_true(cited[0][i].share == cited[1][i].share);
    }
    for (int i = 0; i < 2; i++) {
        quarry_free(cited[i]);
        free(texts[i]);
    }
    quarry_prompt_free(&prompt);
    quarry_model_close(m);
}

/* Of logits after what was rounded in another order: 8-bit activations and what is selected for a question jump. */
static const double COARSE = 0.05;

/* Another document behind a cold one: with full attention cold rows are read in another order, in blocks in the same. */
static void test_a_document_more(void **state)
{
    (void)state;
    setenv("QUARRY_ISA", "scalar", 1); /* others may round to bf16 while reading */
    for (size_t k = 0; k < TEST_COUNT(kinds); k++)
        for (int way = 0; way < 3; way++) {
            set_extended(way == 2);
            params.read_window = way ? 64 : 0;
            quarry_model *m = open_model(kinds[k], 2);
            quarry_error e = {0};
            make_pieces(m, 2);
            const size_t kv_ram = least_ram(m, 2) + 900000;
            quarry_session *hot = loaded(m, 2, false, 0), *cold = loaded(m, 2, true, 0), *bound = loaded(m, 2, true, kv_ram);
            assert_int_equal(quarry_session_read(hot, more, MORE, NULL, &e), 0);
            assert_int_equal(quarry_session_read(cold, more, MORE, NULL, &e), 0);
            if (quarry_session_read(bound, more, MORE, NULL, &e) != 0) fail_msg("%s", e.message);
            assert_within(bound, kv_ram);
            assert_same(cold, bound);
            if (way)
                assert_same(hot, cold);
            else
                assert_close(hot, cold, k < 2 ? 1e-4 : COARSE);
            feed(hot);
            feed(cold);
            if (way)
                assert_same(hot, cold);
            else
                assert_close(hot, cold, COARSE);
            quarry_session_close(hot);
            quarry_session_close(cold);
            quarry_session_close(bound);
            quarry_model_close(m);
        }
    set_extended(false);
    unsetenv("QUARRY_ISA");
}

/* ---- reading within a bound ---- */

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

static quarry_store *open_store(void)
{
    quarry_error e = {0};
    quarry_store *store = quarry_store_open(&(quarry_store_params){.folder = folder}, &e);
    if (!store) fail_msg("%s", e.message);
    return store;
}

static quarry_code read_long(quarry_session *s, quarry_store *store, quarry_stored *info, quarry_error *e)
{
    static const int64_t ends[] = {300, LONG};
    return (quarry_code)quarry_session_read_stored(s, store, tokens, LONG, ends, 2, "long", NULL, info, e);
}

/* A text of which only a part fits becomes cold as it is read. Too little: it is said, and what was read is kept for who comes with more. */
static void reads_in_stretches(quarry_model *m)
{
    quarry_store *store = open_store();
    quarry_stored info;
    quarry_error e = {0};
    quarry_session *hot = open_session(m, 0);
    assert_int_equal(read_long(hot, NULL, &info, &e), QUARRY_OK);
    size_t kv_ram = 50000;
    int64_t taken = 0;
    int refused = 0;
    for (;; kv_ram += kv_ram / 6) {
        quarry_session *s = open_session(m, kv_ram);
        const quarry_code code = read_long(s, store, &info, &e);
        assert_within(s, code == QUARRY_OK ? kv_ram : 0);
        assert_true(info.n_taken >= taken);
        taken = info.n_taken;
        quarry_session_close(s);
        if (code == QUARRY_OK) break;
        assert_int_equal(code, QUARRY_ERROR_MEMORY);
        assert_non_null(strstr(e.message, "--kv-ram"));
        refused++;
    }
    assert_true(refused > 0);
    quarry_store_close(store);
    empty_folder();
    store = open_store();
    quarry_session *s = NULL;
    for (;; kv_ram += kv_ram / 6) { /* and at once */
        s = open_session(m, kv_ram);
        const quarry_code code = read_long(s, store, &info, &e);
        if (code == QUARRY_OK) break;
        assert_int_equal(code, QUARRY_ERROR_MEMORY);
        quarry_session_close(s);
        quarry_store_close(store);
        empty_folder();
        store = open_store();
    }
    /* not of Gemma, whose local layers take more than the one that keeps all of this text */
    const int n_local = model_attn_shape(m, KV_F16).kv.n_local;
    if (kv_ram > kv_bytes_of(hot) * 3 / 4 && !n_local) fail_msg("%zu of %zu bytes are needed", kv_ram, kv_bytes_of(hot));
    assert_within(s, kv_ram);
    assert_int_equal(info.n_taken, 0);
    assert_int_equal(info.n_kept, LONG);
    feed(hot);
    feed(s);
    if (params.extend)
        assert_same(hot, s);
    else
        assert_close(hot, s, COARSE);
    generate(s, 90, kv_ram);
    quarry_session *again = open_session(m, kv_ram);
    assert_int_equal(read_long(again, store, &info, &e), QUARRY_OK);
    assert_int_equal(info.n_taken, LONG);
    feed(again);
    generate(again, 90, kv_ram);
    assert_same(s, again);
    quarry_session_close(again);
    quarry_session_close(s);
    quarry_session_close(hot);
    quarry_store_close(store);
    empty_folder();
}

static void test_reading_in_stretches(void **state)
{
    (void)state;
    for (size_t k = 0; k < TEST_COUNT(kinds); k++) {
        quarry_model *m = open_model(kinds[k], 2);
        reads_in_stretches(m);
        set_extended(true);
        reads_in_stretches(m);
        set_extended(false);
        quarry_model_close(m);
    }
}

static bool stop_late(int64_t done, int64_t total, void *data)
{
    ++*(int64_t *)data;
    return done < total * 3 / 4;
}

/* A reading that was stopped goes on. */
static void test_a_reading_that_was_stopped(void **state)
{
    (void)state;
    static const int64_t ends[] = {300, LONG};
    quarry_model *m = open_model(kinds[0], 1);
    quarry_store *store = open_store();
    quarry_stored info;
    quarry_error e = {0};
    int64_t calls = 0;
    const quarry_watch watch = {stop_late, &calls};
    quarry_session *first = open_session(m, 400000), *again = open_session(m, 400000);
    assert_int_equal(quarry_session_read_stored(first, store, tokens, LONG, ends, 2, "long", &watch, &info, &e), QUARRY_ERROR_CANCELLED);
    assert_true(info.n_kept > 1300);
    const int64_t kept = info.n_kept;
    assert_int_equal(read_long(again, store, &info, &e), QUARRY_OK);
    assert_int_equal(info.n_taken, kept);
    assert_int_equal(info.n_kept, LONG - kept);
    quarry_session_close(first);
    quarry_session_close(again);
    quarry_store_close(store);
    quarry_model_close(m);
}

/* What is stored does not fit: that is said before anything is read. */
static void test_a_stored_context_that_does_not_fit(void **state)
{
    (void)state;
    static const int64_t ends[] = {300, 1300, LONG}; /* what is between is too short for a segment */
    quarry_model *m = open_model(kinds[0], 1);
    quarry_store *store = open_store();
    quarry_stored info;
    quarry_error e = {0};
    int64_t calls = 0;
    const quarry_watch watch = {stop_late, &calls};
    params.attn = "ivfpq:segment=4096";
    quarry_session *s = open_session(m, 0), *small = open_session(m, 310000);
    assert_int_equal(quarry_session_read_stored(s, store, tokens, 1300, ends, 2, "short", NULL, &info, &e), QUARRY_OK);
    assert_int_equal(info.n_kept, 1300);
    assert_int_equal(quarry_session_read_stored(small, store, tokens, LONG, ends, 3, "long", &watch, &info, &e), QUARRY_ERROR_MEMORY);
    assert_non_null(strstr(e.message, "--kv-ram"));
    assert_int_equal(quarry_session_length(small), 0);
    assert_int_equal(calls, 0);
    quarry_session_close(s);
    quarry_session_close(small);
    quarry_store_close(store);
    quarry_model_close(m);
    params.attn = policy;
}

/* Past a place where longer texts are cut: this one is read as without a bound. Stretches end behind sealed segments, so that little is kept twice. */
static void test_reading_past_a_checkpoint(void **state)
{
    (void)state;
    enum { FIRST = 1000, END = 33760, TOKEN_BYTES = 384 };
    static const struct {
        const char *attn;
        size_t kv_ram, most_kept;
    } ways[] = {{"ivfpq:segment=512,budget=0.01,refine=0.05", 2000000, END * TOKEN_BYTES * 7 / 4},
                {"ivfpq:budget=0.01,refine=0.05", 9000000, END * TOKEN_BYTES * 5 / 4}};
    static const int64_t ends[] = {FIRST, END};
    quarry_model *m = open_model("llama-q4_0.gguf", 2);
    int32_t *text = malloc(END * sizeof *text);
    for (int i = 0; i < END; i++) text[i] = tokens[i % (LONG - 13)];
    set_extended(true);
    params.n_batch = 512;
    for (size_t k = 0; k < TEST_COUNT(ways); k++) {
        quarry_error e = {0};
        quarry_stored info;
        params.attn = ways[k].attn;
        quarry_store *store = open_store();
        quarry_session *hot = open_session(m, 0), *bound = open_session(m, ways[k].kv_ram);
        if (quarry_session_read_stored(bound, store, text, END, ends, 2, "long", NULL, &info, &e)) fail_msg("%s", e.message);
        if (quarry_session_read_stored(hot, NULL, text, END, ends, 2, "long", NULL, NULL, &e)) fail_msg("%s", e.message);
        assert_int_equal(info.n_kept, END);
        if (info.kept_bytes > ways[k].most_kept) fail_msg("%llu bytes are kept", (unsigned long long)info.kept_bytes);
        assert_true(kv_bytes_of(hot) > 12000000);
        assert_within(bound, ways[k].kv_ram);
        assert_same_answer(hot, bound);
        quarry_session_close(hot);
        quarry_session_close(bound);
        quarry_store_close(store);
        empty_folder();
    }
    free(text);
    params.attn = policy;
    params.n_batch = 64;
    set_extended(false);
    quarry_model_close(m);
}

static void test_who_can_be_bound(void **state)
{
    (void)state;
    static const char *const others[] = {"full", "window", "quest", "snapkv"};
    quarry_model *m = open_model(kinds[0], 1);
    for (size_t i = 0; i < TEST_COUNT(others); i++) {
        quarry_error e = {0};
        quarry_session_params own = {.attn = others[i], .kv_ram = 1 << 20};
        assert_null(quarry_session_open(m, &own, &e));
        assert_int_equal(e.code, QUARRY_ERROR_UNSUPPORTED);
        assert_non_null(strstr(e.message, others[i]));
        assert_non_null(strstr(e.message, "--kv-ram"));
    }
    /* without a store nothing can become cold */
    quarry_error e = {0};
    quarry_session *s = open_session(m, 300000);
    assert_int_equal(read_long(s, NULL, NULL, &e), QUARRY_ERROR_MEMORY);
    assert_non_null(strstr(e.message, "--kv-ram"));
    quarry_session_close(s);
    quarry_model_close(m);
}

/* ---- faults ---- */

static void flip(const char *path, uint64_t at)
{
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    fseek(f, (long)at, SEEK_SET);
    const int c = fgetc(f);
    fseek(f, (long)at, SEEK_SET);
    fputc(c ^ 8, f);
    fclose(f);
}

/* Somewhere in the rows of a segment. */
static uint64_t place_in_rows(int piece, random_state *r)
{
    quarry_error e = {0};
    piece_file *p = piece_open(path_of(piece), &e);
    assert_non_null(p);
    const piece_region *region = &p->layout.regions[random_below(r, (uint64_t)p->header.n_segments)];
    const uint64_t at = region->rows_at + random_below(r, (uint64_t)region->n_parts) * region->rows_bytes +
                        random_below(r, (uint64_t)region->n_rows * p->layout.row_bytes);
    piece_close(p);
    return at;
}

/* A damaged block is found when it is needed, and only then; the session is what it was. */
static void test_damage_is_found_when_it_is_read(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[2], 2);
    params.attn = "ivfpq:segment=128,budget=0.005,min=4,threshold=0,refine=0.02,outliers=0";
    make_pieces(m, 2);
    quarry_session *hot = loaded(m, 2, false, 0), *reading = loaded(m, 2, true, 0);
    quarry_error none = {0};
    assert_int_equal(quarry_session_feed(hot, question, 1, NULL, &none), 0);
    random_state r;
    random_seed(&r, 3);
    int needed = 0, not_needed = 0;
    for (int k = 0; k < 60; k++) {
        const int piece = (int)random_below(&r, 2);
        const uint64_t at = place_in_rows(piece, &r);
        quarry_error e = {0};
        flip(path_of(piece), at);
        quarry_session *s = loaded(m, 2, true, 0); /* which reads no rows */
        const quarry_code code = (quarry_code)quarry_session_feed(s, question, 1, NULL, &e);
        if (code == QUARRY_OK) {
            not_needed++;
        } else {
            needed++;
            assert_int_equal(code, QUARRY_ERROR_FORMAT);
            assert_non_null(strstr(e.message, path_of(piece)));
            assert_int_equal(quarry_session_length(s), N);
            assert_null(quarry_session_logits(s));
            assert_int_equal(quarry_session_feed(s, question, 1, NULL, &e), QUARRY_ERROR_FORMAT);
        }
        if (k == 0) { /* full attention reads everything */
            assert_int_equal(quarry_session_read(reading, more, MORE, NULL, &e), QUARRY_ERROR_FORMAT);
            assert_non_null(strstr(e.message, path_of(piece)));
            assert_int_equal(quarry_session_length(reading), N);
        }
        flip(path_of(piece), at);
        if (code != QUARRY_OK) assert_int_equal(quarry_session_feed(s, question, 1, NULL, &e), 0);
        assert_same(hot, s);
        if (k == 0) assert_int_equal(quarry_session_read(reading, more, MORE, NULL, &e), 0);
        quarry_session_close(s);
    }
    if (needed < 5 || not_needed < 5) fail_msg("%d blocks were needed, %d not", needed, not_needed);
    params.attn = policy;
    quarry_session_close(reading);
    quarry_session_close(hot);
    quarry_model_close(m);
}

/* The largest file of the store, with rows of segments. */
static const char *largest_piece(void)
{
    static char path[600];
    uint64_t most = 0;
    DIR *d = opendir(folder);
    for (struct dirent *entry; (entry = readdir(d));) {
        char this[600];
        size_t n;
        quarry_error e = {0};
        snprintf(this, sizeof this, "%s/%s", folder, entry->d_name);
        if (!strstr(entry->d_name, ".piece")) continue;
        char *bytes = file_read_all(this, &n, &e);
        assert_non_null(bytes);
        memory_free(bytes);
        if (n > most) strcpy(path, this);
        if (n > most) most = n;
    }
    closedir(d);
    return path;
}

/* What an answer found damaged is removed from the store when it is asked for, and read anew; nothing is removed otherwise. */
static void test_what_is_damaged_is_removed(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[0], 2);
    quarry_store *store = open_store();
    quarry_stored info;
    quarry_error e = {0};
    quarry_session *hot = open_session(m, 0), *cold = open_session(m, 0), *again = open_session(m, 0);
    assert_int_equal(read_long(hot, store, &info, &e), QUARRY_OK);
    assert_int_equal(read_long(cold, store, &info, &e), QUARRY_OK);
    assert_int_equal(info.n_taken, LONG);
    feed(hot);
    assert_false(quarry_store_remove_damaged(store, hot));
    assert_false(quarry_store_remove_damaged(store, cold));
    const char *path = largest_piece();
    piece_file *p = piece_open(path, &e);
    assert_non_null(p);
    const piece_region *region = &p->layout.regions[0];
    for (uint64_t at = 100; at < (uint64_t)region->n_parts * region->rows_bytes; at += p->layout.block_bytes)
        flip(path, region->rows_at + at);
    piece_close(p);
    assert_int_equal(quarry_session_feed(cold, question, QUESTION, NULL, &e), QUARRY_ERROR_FORMAT);
    assert_non_null(strstr(e.message, path));
    assert_true(quarry_store_remove_damaged(store, cold));
    assert_int_not_equal(access(path, F_OK), 0);
    assert_int_equal(read_long(again, store, &info, &e), QUARRY_OK);
    assert_true(info.n_taken < LONG && info.n_kept == LONG - info.n_taken);
    feed(again);
    assert_same(hot, again);
    quarry_session_close(hot);
    quarry_session_close(cold);
    quarry_session_close(again);
    quarry_store_close(store);
    quarry_model_close(m);
}

/* Cut short, and mended, under a session; then without a name. */
static void test_a_file_that_changes(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[2], 2);
    quarry_error e = {0};
    make_pieces(m, 1);
    size_t n;
    char *bytes = file_read_all(path_of(0), &n, &e);
    quarry_session *hot = loaded(m, 1, false, 0), *cold = loaded(m, 1, true, 0);
    random_state r;
    random_seed(&r, 3);
    assert_int_equal(truncate(path_of(0), 5000), 0);
    assert_int_equal(quarry_session_feed(cold, question, QUESTION, NULL, &e), QUARRY_ERROR_IO);
    assert_non_null(strstr(e.message, path_of(0)));
    assert_int_equal(quarry_session_length(cold), N);
    FILE *f = fopen(path_of(0), "r+b");
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
    memory_free(bytes);
    assert_int_equal(unlink(path_of(0)), 0);
    assert_same_answer(hot, cold);
    generate(hot, 20, 0);
    generate(cold, 20, 0);
    assert_same(hot, cold);
    quarry_session_close(hot);
    quarry_session_close(cold);
    quarry_model_close(m);
}

/* Any read of a feed fails, or any allocation: it is an error, and the session goes on from where it was. */
static void test_failing_reads_and_memory(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[1], 1); /* failures are of this thread */
    make_pieces(m, 2);
    quarry_session *hot = loaded(m, 2, false, 0);
    feed(hot);
    for (int memory = 0; memory < 2; memory++) {
        int64_t failures = 0;
        for (int64_t n = 0;; n += 1 + n / 8) {
            quarry_error e = {0};
            quarry_session *s = loaded(m, 2, true, memory && n % 2 ? least_ram(m, 2) + 100000 : 0);
            if (memory)
                memory_fail_after(n);
            else
                file_fail_at(FILE_CALL_READ, n, n % 3 == 2 ? 0 : EIO);
            const quarry_code code = (quarry_code)quarry_session_feed(s, question, QUESTION, NULL, &e);
            memory_fail_after(-1);
            file_fail_at(FILE_CALL_READ, -1, 0);
            if (code != QUARRY_OK) {
                failures++;
                assert_int_equal(code, memory ? QUARRY_ERROR_MEMORY : QUARRY_ERROR_IO);
                assert_int_equal(quarry_session_length(s), N);
                feed(s);
            }
            assert_same(hot, s);
            quarry_session_close(s);
            if (code == QUARRY_OK && (memory || n % 3 != 2)) break;
        }
        if (failures < 5) fail_msg("%lld failures", (long long)failures);
    }
    quarry_session_close(hot);
    quarry_model_close(m);
}

static void test_loading_without_memory(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[0], 1);
    make_pieces(m, 2);
    quarry_session *hot = loaded(m, 2, false, 0);
    feed(hot);
    int64_t failures = 0;
    for (int64_t n = 0;; n++) {
        quarry_error e = {0};
        quarry_session *s = open_session(m, n % 2 ? 400000 : 0);
        memory_fail_after(n);
        const quarry_code code = load(s, 2, true, &e);
        memory_fail_after(-1);
        if (code != QUARRY_OK) {
            failures++;
            assert_int_equal(code, QUARRY_ERROR_MEMORY);
            assert_int_equal(quarry_session_length(s), 0);
            assert_int_equal(load(s, 2, true, &e), QUARRY_OK);
        }
        feed(s);
        assert_same(hot, s);
        quarry_session_close(s);
        if (code == QUARRY_OK) break;
    }
    assert_true(failures > 20);
    quarry_session_close(hot);
    quarry_model_close(m);
}

/* What was just saved becomes cold: with what it needs, or nothing has changed; and only if the file is what the session wrote. */
static void test_becoming_cold(void **state)
{
    (void)state;
    quarry_model *m = open_model(kinds[1], 1);
    int64_t failures = 0;
    quarry_session *other = open_session(m, 0);
    read_to(other, 400, true);
    save(other, 3);
    quarry_session *hot = open_session(m, 0);
    read_to(hot, 500, true);
    save(hot, 0);
    read_to(hot, N, true);
    save(hot, 1);
    feed(hot);
    for (int64_t n = 0;; n++) {
        quarry_error e = {0};
        quarry_session *s = loaded(m, 1, false, 0);
        assert_int_equal(session_set_cold(s, path_of(3), &e), QUARRY_ERROR_FORMAT);
        assert_int_equal(session_set_cold(s, path_of(0), &e), QUARRY_OK);
        read_to(s, N, true);
        save(s, 1);
        const size_t bytes = kv_bytes_of(s);
        memory_fail_after(n);
        const quarry_code code = session_set_cold(s, path_of(1), &e);
        memory_fail_after(-1);
        if (code != QUARRY_OK) {
            failures++;
            assert_int_equal(code, QUARRY_ERROR_MEMORY);
            assert_int_equal(kv_bytes_of(s), bytes);
            quarry_session *fork = quarry_session_fork(s, &e);
            feed(fork);
            assert_close(hot, fork, COARSE);
            quarry_session_close(fork);
            assert_int_equal(session_set_cold(s, path_of(1), &e), QUARRY_OK);
        }
        assert_true(kv_bytes_of(s) < bytes);
        feed(s);
        assert_close(hot, s, COARSE);
        quarry_session_close(s);
        if (code == QUARRY_OK) break;
    }
    assert_true(failures > 5);
    quarry_session_close(other);
    quarry_session_close(hot);
    quarry_model_close(m);
}

static int empty_before(void **state)
{
    (void)state;
    empty_folder();
    return 0;
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_answers_alike, empty_before),
        cmocka_unit_test_setup(test_answers_alike_extended, empty_before),
        cmocka_unit_test_setup(test_short_contexts, empty_before),
        cmocka_unit_test_setup(test_forks, empty_before),
        cmocka_unit_test_setup(test_forks_on_two_threads, empty_before),
        cmocka_unit_test_setup(test_sessions_together, empty_before),
        cmocka_unit_test_setup(test_truncation, empty_before),
        cmocka_unit_test_setup(test_citations, empty_before),
        cmocka_unit_test_setup(test_a_document_more, empty_before),
        cmocka_unit_test_setup(test_reading_in_stretches, empty_before),
        cmocka_unit_test_setup(test_a_reading_that_was_stopped, empty_before),
        cmocka_unit_test_setup(test_a_stored_context_that_does_not_fit, empty_before),
        cmocka_unit_test_setup(test_reading_past_a_checkpoint, empty_before),
        cmocka_unit_test_setup(test_who_can_be_bound, empty_before),
        cmocka_unit_test_setup(test_damage_is_found_when_it_is_read, empty_before),
        cmocka_unit_test_setup(test_what_is_damaged_is_removed, empty_before),
        cmocka_unit_test_setup(test_a_file_that_changes, empty_before),
        cmocka_unit_test_setup(test_failing_reads_and_memory, empty_before),
        cmocka_unit_test_setup(test_loading_without_memory, empty_before),
        cmocka_unit_test_setup(test_becoming_cold, empty_before),
    };
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    strcpy(folder, "tier-XXXXXX");
    if (!mkdtemp(folder)) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    empty_folder();
    rmdir(folder);
    return failed;
}
