/* Ids and splits against references that we did not write: tests/data/tokenizer.bin, made by scripts/make_tokenizer_fixtures.py, holds strings and a hash of what each
 * becomes. The vocabularies of SmolLM2 (QUARRY_TEST_MODEL) and of others (QUARRY_TEST_VOCABS, a folder with ggml-vocab-*.gguf) are tried where they are at hand. */
#include "test.h"

#include <pthread.h>

#include "text/pretokenize.h"
#include "tokenizer_builder.h"

#define DATA QUARRY_TEST_DATA

/* ---- the fixture ---- */

typedef struct column {
    char name[64];
    uint32_t *hashes; /* [n] */
} column;

static struct {
    unsigned char *bytes;
    uint32_t n, n_columns;
    const char **text;
    size_t *length;
    column *columns;
} fixture;

static uint32_t read_u32(const unsigned char **p)
{
    uint32_t value;
    memcpy(&value, *p, 4);
    *p += 4;
    return value;
}

static int fixture_load(void **state)
{
    (void)state;
    FILE *f = fopen(DATA "/tokenizer.bin", "rb");
    if (!f) return -1;
    fseek(f, 0, SEEK_END);
    size_t size = (size_t)ftell(f);
    rewind(f);
    fixture.bytes = malloc(size);
    bool whole = fread(fixture.bytes, 1, size, f) == size;
    fclose(f);
    if (!whole) return -1;
    const unsigned char *p = fixture.bytes;
    fixture.n = read_u32(&p);
    fixture.n_columns = read_u32(&p);
    fixture.text = calloc(fixture.n, sizeof *fixture.text);
    fixture.length = calloc(fixture.n, sizeof *fixture.length);
    fixture.columns = calloc(fixture.n_columns, sizeof *fixture.columns);
    for (uint32_t i = 0; i < fixture.n; i++) {
        fixture.length[i] = read_u32(&p);
        fixture.text[i] = (const char *)p;
        p += fixture.length[i];
    }
    for (uint32_t c = 0; c < fixture.n_columns; c++) {
        uint32_t n = read_u32(&p);
        memcpy(fixture.columns[c].name, p, n);
        p += n;
        fixture.columns[c].hashes = malloc(4 * fixture.n);
        memcpy(fixture.columns[c].hashes, p, 4 * fixture.n);
        p += 4 * fixture.n;
    }
    return p == fixture.bytes + size ? 0 : -1;
}

static int fixture_free(void **state)
{
    (void)state;
    for (uint32_t c = 0; c < fixture.n_columns; c++) free(fixture.columns[c].hashes);
    free(fixture.columns);
    free(fixture.text);
    free(fixture.length);
    free(fixture.bytes);
    return 0;
}

static const uint32_t *fixture_column(const char *kind, const char *name)
{
    char full[128];
    snprintf(full, sizeof full, "%s %s", kind, name);
    for (uint32_t c = 0; c < fixture.n_columns; c++)
        if (strcmp(fixture.columns[c].name, full) == 0) return fixture.columns[c].hashes;
    fail_msg("tokenizer.bin has no column \"%s\"", full);
    return NULL;
}

static uint32_t hash_add(uint32_t h, int32_t value)
{
    unsigned char bytes[4];
    memcpy(bytes, &value, 4);
    for (int i = 0; i < 4; i++) h = (h ^ bytes[i]) * 16777619u;
    return h;
}

#define HASH_START 2166136261u

static void print_escaped(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (text[i] > ' ' && text[i] < 127)
            fputc(text[i], stderr);
        else
            fprintf(stderr, "\\x%02x", (unsigned char)text[i]);
    }
    fputc('\n', stderr);
}

/* ---- helpers ---- */

static tokenizer *open_tokenizer(const char *path)
{
    quarry_error error = {0};
    gguf_file *g = gguf_open(path, true, &error);
    if (!g) fail_msg("%s", error.message);
    tokenizer *t = tokenizer_create(g, &error);
    gguf_close(g);
    if (!t) fail_msg("%s", error.message);
    return t;
}

static tokenizer *open_small(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, DATA "/tokenizer_%s.gguf", name);
    return open_tokenizer(path);
}

static void assert_tokens(const tokenizer *t, const char *text, size_t n, int flags, const int32_t *ids, int64_t n_ids)
{
    quarry_error error = {0};
    token_list list = {0};
    assert_int_equal(tokenizer_encode(t, text, n, flags, &list, &error), QUARRY_OK);
    assert_int_equal(list.n, n_ids);
    for (int64_t i = 0; i < n_ids; i++) assert_int_equal(list.ids[i], ids[i]);
    token_list_free(&list);
}

#define ASSERT_TOKENS(t, text, flags, ...)                                                                                                 \
    assert_tokens(t, text, sizeof(text) - 1, flags, (const int32_t[]){__VA_ARGS__},                                                        \
                  (int64_t)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t)))

/* ---- against the references ---- */

static void assert_splits(const char *name)
{
    pretokenizer kind;
    bool ignore_merges, add_bos;
    assert_true(pretokenizer_find(name, &kind, &ignore_merges, &add_bos));
    const uint32_t *expected = fixture_column("split", name);
    int n_wrong = 0;
    for (uint32_t i = 0; i < fixture.n; i++) {
        uint32_t h = HASH_START;
        for (size_t at = 0; at < fixture.length[i];) {
            at = pretokenizer_next(kind, fixture.text[i], fixture.length[i], at);
            h = hash_add(h, (int32_t)at);
        }
        if (h != expected[i] && n_wrong++ < 5) print_escaped(fixture.text[i], fixture.length[i]);
    }
    assert_int_equal(n_wrong, 0);
}

static void test_splits_are_those_of_the_published_patterns(void **state)
{
    (void)state;
    assert_true(fixture.n >= 5000);
    const char *const names[] = {"gpt-2", "smollm", "qwen2", "llama-bpe"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) assert_splits(names[i]);
}

static void assert_ids(const tokenizer *t, const char *kind, const char *name, int flags)
{
    const uint32_t *expected = fixture_column(kind, name);
    quarry_error error = {0};
    token_list list = {0};
    int n_wrong = 0;
    for (uint32_t i = 0; i < fixture.n; i++) {
        list.n = 0;
        assert_int_equal(tokenizer_encode(t, fixture.text[i], fixture.length[i], flags, &list, &error), QUARRY_OK);
        uint32_t h = HASH_START;
        for (int64_t k = 0; k < list.n; k++) h = hash_add(h, list.ids[k]);
        if (h != expected[i] && n_wrong++ < 5) print_escaped(fixture.text[i], fixture.length[i]);
    }
    token_list_free(&list);
    if (n_wrong > 0) fail_msg("%s %s: %d of %u strings differ", kind, name, n_wrong, fixture.n);
}

static void assert_all_ids(tokenizer *t, const char *name)
{
    assert_ids(t, "plain", name, TOKENIZE_PLAIN);
    assert_ids(t, "special", name, TOKENIZE_SPECIAL);
    tokenizer_destroy(t);
}

static void test_ids_of_small_byte_level_vocabularies(void **state)
{
    (void)state;
    const char *const names[] = {"gpt-2", "smollm", "qwen2", "llama-bpe"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        char name[64];
        snprintf(name, sizeof name, "tokenizer_%s", names[i]);
        assert_all_ids(open_small(names[i]), name);
    }
}

static void test_ids_of_small_sentencepiece_vocabularies(void **state)
{
    (void)state;
    assert_all_ids(open_small("spm"), "tokenizer_spm");
    assert_all_ids(open_small("spm-crossing"), "tokenizer_spm-crossing");
}

static const char *model_path(void)
{
    const char *path = getenv("QUARRY_TEST_MODEL");
    if (!path || !*path) {
        print_message("SKIPPED: QUARRY_TEST_MODEL does not name the SmolLM2 model\n");
        skip();
    }
    return path;
}

static void test_ids_of_smollm2(void **state)
{
    (void)state;
    assert_all_ids(open_tokenizer(model_path()), "smollm2");
}

static void test_ids_of_smollm2_written_out(void **state)
{
    (void)state;
    tokenizer *t = open_tokenizer(model_path());
    assert_string_equal(tokenizer_name(t), "gpt2/smollm");
    ASSERT_TOKENS(t, "Document <|im_end|>.\n", TOKENIZE_PLAIN, 24217, 2067, 108, 306, 79, 486, 108, 19369, 198);
    ASSERT_TOKENS(t, "Question?<|im_end|>\n<|im_start|>assistant\n", TOKENIZE_SPECIAL, 17872, 47, 2, 198, 1, 520, 9531, 198);
    assert_int_equal(tokenizer_find(t, "<|im_end|>"), 2);
    assert_true(tokenizer_is_end(t, 2));
    assert_true(tokenizer_is_special(t, 2));
    assert_false(tokenizer_is_end(t, 1));
    tokenizer_destroy(t);
}

static void test_ids_of_other_vocabularies(void **state)
{
    (void)state;
    const char *folder = getenv("QUARRY_TEST_VOCABS");
    if (!folder || !*folder) {
        print_message("SKIPPED: QUARRY_TEST_VOCABS does not name a folder with ggml-vocab-*.gguf\n");
        skip();
    }
    const char *const names[] = {"ggml-vocab-qwen2", "ggml-vocab-llama-bpe", "ggml-vocab-gpt-2", "ggml-vocab-llama-spm",
                                 "ggml-vocab-phi-3"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s.gguf", folder, names[i]);
        assert_all_ids(open_tokenizer(path), names[i]);
    }
}

/* Gemma 3: no space in front of a text, pieces that cross spaces, runs of spaces and line feeds as user-defined pieces. */
static void test_ids_of_gemma3(void **state)
{
    (void)state;
    const char *path = getenv("QUARRY_TEST_GEMMA");
    if (!path || !*path) {
        print_message("SKIPPED: QUARRY_TEST_GEMMA does not name the Gemma 3 model (scripts/fetch-gemma.sh)\n");
        skip();
    }
    assert_all_ids(open_tokenizer(path), "gemma3");
}

/* ---- any bytes, any length ---- */

static void assert_round_trip(const tokenizer *t, const char *bytes, size_t n, bool prefixed)
{
    quarry_error error = {0};
    token_list list = {0};
    assert_int_equal(tokenizer_encode(t, bytes, n, TOKENIZE_PLAIN, &list, &error), QUARRY_OK);
    size_t at = 0;
    for (int64_t i = 0; i < list.n; i++) {
        size_t n_piece;
        const char *piece = tokenizer_token_bytes(t, list.ids[i], &n_piece);
        if (prefixed && i == 0) {
            assert_int_equal(piece[0], ' ');
            piece++;
            n_piece--;
        }
        assert_true(at + n_piece <= n);
        assert_memory_equal(piece, bytes + at, n_piece);
        at += n_piece;
    }
    assert_int_equal(at, n);
    token_list_free(&list);
}

static void test_any_bytes_come_back(void **state)
{
    (void)state;
    tokenizer *const tokenizers[] = {open_small("gpt-2"), open_small("qwen2"), open_small("llama-bpe"), open_small("spm"),
                                     open_small("spm-crossing")};
    static const char almost[] = "aZ \n\t1.'s\xC3\xA9\xE2\x80\xF0\x9F\xED\xC5\xBF\xC2\xA0";
    static char bytes[300];
    uint32_t seed = 1;
    for (int round = 0; round < 2000; round++) {
        size_t n = 1 + (seed >> 8) % sizeof bytes;
        for (size_t i = 0; i < n; i++) {
            seed = seed * 1664525u + 1013904223u;
            /* lead and continuation bytes, separators and letters: much is almost UTF-8 */
            bytes[i] = round % 2 ? (char)(seed >> 24) : almost[(seed >> 24) % (sizeof almost - 1)];
        }
        for (size_t k = 0; k < TEST_COUNT(tokenizers); k++) assert_round_trip(tokenizers[k], bytes, n, k == 3);
    }
    for (size_t k = 0; k < TEST_COUNT(tokenizers); k++) tokenizer_destroy(tokenizers[k]);
}

enum { LONG_RUN = 1 << 20, SMALL_STACK = 128 << 10 };

static void *encode_long_runs(void *argument)
{
    const tokenizer *t = argument;
    static const char *const runs[] = {"a", " ", "\n", "1", "!", "\xC3\xA9", "\xE4\xB8\xAD", "\xFF", "ab", " \n", "'s", "\t"};
    char *bytes = malloc(LONG_RUN);
    for (size_t r = 0; r < TEST_COUNT(runs); r++) {
        size_t period = strlen(runs[r]), n = LONG_RUN - LONG_RUN % period;
        for (size_t i = 0; i < n; i++) bytes[i] = runs[r][i % period];
        token_list list = {0};
        quarry_code code = tokenizer_encode(t, bytes, n, TOKENIZE_SPECIAL, &list, NULL);
        size_t total = 0, n_piece;
        for (int64_t i = 0; i < list.n; i++) {
            tokenizer_token_bytes(t, list.ids[i], &n_piece);
            total += n_piece;
        }
        token_list_free(&list);
        if (code != QUARRY_OK || total < n || total > n + 1) {
            free(bytes);
            return (void *)runs[r];
        }
    }
    free(bytes);
    return NULL;
}

/* A megabyte of one class would keep a quadratic merge busy for hours and overflow the small stack of a recursive scanner. */
static void test_long_runs_end_on_a_small_stack(void **state)
{
    (void)state;
    const char *const names[] = {"gpt-2", "llama-bpe", "spm-crossing"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        tokenizer *t = open_small(names[i]);
        pthread_attr_t attributes;
        pthread_t thread;
        void *failed_run;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, SMALL_STACK);
        assert_int_equal(pthread_create(&thread, &attributes, encode_long_runs, t), 0);
        pthread_join(thread, &failed_run);
        pthread_attr_destroy(&attributes);
        if (failed_run) fail_msg("%s: run of \"%s\"", names[i], (const char *)failed_run);
        tokenizer_destroy(t);
    }
}

/* ---- vocabularies made here ---- */

static const char *const abc_tokens[] = {"a",          "b",      "c",       "ab",  "bc",  "abc", "\xC4\xA0" /* space */,
                                         "<|im_end|>", "<|im|>", "<|im|>x", "<u>", "</s>"};
static const int32_t abc_types[] = {1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 4, 1};
static const char *const abc_merges[] = {"b c", "a b", "a bc", "ab c", "x y", "nonsense", "a zz"};

enum { A, B, C, AB, BC, ABC, SPACE, IM_END, IM, IM_X, USER_DEFINED, SLASH_S, N_ABC };

static void build_abc(builder *b)
{
    builder_start(b);
    builder_string(b, "ggml.model", "gpt2");
    builder_string(b, "ggml.pre", "gpt-2");
    builder_strings(b, "ggml.tokens", abc_tokens, N_ABC);
    builder_numbers(b, "ggml.token_type", GGUF_TYPE_I32, abc_types, N_ABC);
    builder_strings(b, "ggml.merges", abc_merges, TEST_COUNT(abc_merges));
}

static builder built;

static tokenizer *built_tokenizer(void)
{
    quarry_error error = {0};
    tokenizer *t = builder_tokenizer(&built, &error);
    if (!t) fail_msg("%s", error.message);
    return t;
}

static void test_merges_apply_by_rank_then_from_the_left(void **state)
{
    (void)state;
    build_abc(&built);
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "abc", TOKENIZE_PLAIN, ABC);
    ASSERT_TOKENS(t, "abab", TOKENIZE_PLAIN, AB, AB);
    ASSERT_TOKENS(t, "abcbc", TOKENIZE_PLAIN, ABC, BC);
    ASSERT_TOKENS(t, "cab ba", TOKENIZE_PLAIN, C, AB, SPACE, B, A);
    assert_tokens(t, "", 0, TOKENIZE_ADD_BOS | TOKENIZE_SPECIAL, NULL, 0);
    tokenizer_destroy(t);
}

static void test_special_tokens_need_the_flag_and_the_longest_wins(void **state)
{
    (void)state;
    build_abc(&built);
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "a<|im|>xb", TOKENIZE_SPECIAL, A, IM_X, B);
    ASSERT_TOKENS(t, "a<|im|>b<|im_end|>", TOKENIZE_SPECIAL, A, IM, B, IM_END);
    ASSERT_TOKENS(t, "a<|im|>b<|im_end|>", TOKENIZE_PLAIN, A, B); /* this vocabulary has no token for the other bytes */
    ASSERT_TOKENS(t, "a<u>b", TOKENIZE_PLAIN, A, USER_DEFINED, B);
    assert_tokens(t, "<|im", 4, TOKENIZE_SPECIAL, NULL, 0);
    tokenizer_destroy(t);
}

static void test_end_tokens(void **state)
{
    (void)state;
    build_abc(&built);
    builder_u32(&built, "ggml.eos_token_id", C);
    builder_u32(&built, "ggml.eot_token_id", AB);
    builder_u32(&built, "ggml.eom_token_id", 99);
    tokenizer *t = built_tokenizer();
    const bool ends[N_ABC] = {[C] = true, [AB] = true, [IM_END] = true};
    for (int32_t id = -1; id <= N_ABC; id++) assert_int_equal(tokenizer_is_end(t, id), id >= 0 && id < N_ABC && ends[id]);
    assert_int_equal(tokenizer_eos(t), C);
    assert_false(tokenizer_is_special(t, SLASH_S)); /* ordinary text by its type */
    assert_true(tokenizer_is_special(t, IM_END));
    tokenizer_destroy(t);
}

static void test_start_and_end_tokens_follow_the_file(void **state)
{
    (void)state;
    build_abc(&built);
    builder_u32(&built, "ggml.bos_token_id", IM);
    builder_u32(&built, "ggml.eos_token_id", IM_END);
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "a", TOKENIZE_ADD_BOS, A); /* gpt-2 adds none unless told */
    tokenizer_destroy(t);
    builder_bool(&built, "ggml.add_bos_token", true);
    builder_bool(&built, "ggml.add_eos_token", true);
    t = built_tokenizer();
    ASSERT_TOKENS(t, "a", TOKENIZE_ADD_BOS, IM, A, IM_END);
    ASSERT_TOKENS(t, "a", TOKENIZE_PLAIN, A);
    tokenizer_destroy(t);
}

static void test_ids_outside_the_vocabulary_count_as_absent(void **state)
{
    (void)state;
    build_abc(&built);
    builder_u32(&built, "ggml.bos_token_id", 4000000000u);
    builder_u32(&built, "ggml.eos_token_id", N_ABC);
    builder_bool(&built, "ggml.add_bos_token", true);
    builder_bool(&built, "ggml.add_eos_token", true);
    tokenizer *t = built_tokenizer();
    assert_int_equal(tokenizer_bos(t), -1);
    assert_int_equal(tokenizer_eos(t), -1);
    ASSERT_TOKENS(t, "a", TOKENIZE_ADD_BOS, A);
    tokenizer_destroy(t);
}

static void test_of_equal_tokens_the_first_counts(void **state)
{
    (void)state;
    const char *const tokens[] = {"a", "b", "ab", "ab", "a"};
    const char *const merges[] = {"a b", "a b"};
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    builder_strings(&built, "ggml.tokens", tokens, TEST_COUNT(tokens));
    builder_strings(&built, "ggml.merges", merges, TEST_COUNT(merges));
    tokenizer *t = built_tokenizer();
    assert_string_equal(tokenizer_name(t), "gpt2/default");
    ASSERT_TOKENS(t, "aba", TOKENIZE_PLAIN, 2, 0);
    tokenizer_destroy(t);
}

static void test_merging_never_makes_tokens_outside_the_byte_alphabet(void **state)
{
    (void)state;
    /* the first token has the bytes of the last one, but no byte-level text is written so */
    const char *const tokens[] = {"\u200D", "\u00E2", "\u0122", "\u012F", "\u00E2\u0122", "\u00E2\u0122\u012F"};
    const char *const merges[] = {"\u00E2 \u0122", "\u00E2\u0122 \u012F"};
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    builder_strings(&built, "ggml.tokens", tokens, TEST_COUNT(tokens));
    builder_strings(&built, "ggml.merges", merges, TEST_COUNT(merges));
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "\u200D", TOKENIZE_PLAIN, 5);
    assert_int_equal(tokenizer_find(t, "\u200D"), 0);
    tokenizer_destroy(t);
}

static void build_sentencepiece(const char *const *tokens, const int32_t *types, const float *scores, size_t n)
{
    builder_start(&built);
    builder_string(&built, "ggml.model", "llama");
    builder_strings(&built, "ggml.tokens", tokens, n);
    builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, types, n);
    builder_numbers(&built, "ggml.scores", GGUF_TYPE_F32, scores, n);
}

static void test_equal_scores_merge_from_the_left(void **state)
{
    (void)state;
    const char *const tokens[] = {"<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"};
    const int32_t types[] = {2, 3, 3, 1, 1, 1, 1, 1};
    const float scores[] = {0, 0, 0, -9, -9, -9, -0.0f, 0.0f};
    build_sentencepiece(tokens, types, scores, TEST_COUNT(tokens));
    builder_bool(&built, "ggml.add_space_prefix", false);
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "abc", TOKENIZE_PLAIN, 6, 5);
    tokenizer_destroy(t);
}

static void test_phi3_takes_white_space_behind_special_tokens(void **state)
{
    (void)state;
    const char *const tokens[] = {"<unk>", "<s>", "</s>", "\u2581", "a", "<|end|>", "<0x0A>"};
    const int32_t types[] = {2, 3, 3, 1, 1, 3, 6};
    const float scores[7] = {0};
    build_sentencepiece(tokens, types, scores, TEST_COUNT(tokens));
    tokenizer *t = built_tokenizer();
    ASSERT_TOKENS(t, "<|end|>\n a", TOKENIZE_SPECIAL, 5, 3, 6, 3, 4);
    tokenizer_destroy(t);
    builder_string(&built, "general.name", "Phi-3 mini");
    t = built_tokenizer();
    ASSERT_TOKENS(t, "<|end|>\n a", TOKENIZE_SPECIAL, 5, 3, 4);
    ASSERT_TOKENS(t, "<s>\na", TOKENIZE_SPECIAL, 1, 3, 6, 4);
    tokenizer_destroy(t);
}

static void test_sentencepiece_falls_back_to_bytes_and_then_to_unknown(void **state)
{
    (void)state;
    const char *const tokens[] = {"<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a", "<0xC3>"};
    const int32_t types[] = {2, 3, 3, 1, 1, 1, 6};
    const float scores[] = {0, 0, 0, -3, -4, -1, 0};
    build_sentencepiece(tokens, types, scores, TEST_COUNT(tokens));
    tokenizer *t = built_tokenizer();
    assert_string_equal(tokenizer_name(t), "llama");
    ASSERT_TOKENS(t, "a a", TOKENIZE_PLAIN, 5, 5);
    ASSERT_TOKENS(t, "a\u2581a", TOKENIZE_PLAIN, 5, 5);
    ASSERT_TOKENS(t, "a\xC3\xA9", TOKENIZE_ADD_BOS, 1, 5, 6, 0);
    ASSERT_TOKENS(t, "<unk></s>a", TOKENIZE_SPECIAL, 0, 2, 5); /* a space stands after special tokens too */
    ASSERT_TOKENS(t, "<0xC3>", TOKENIZE_PLAIN, 3, 0, 0, 0, 0, 0, 0);
    tokenizer_destroy(t);
}

/* ---- errors ---- */

static void assert_refused(quarry_code code, const char *part, const char *other)
{
    quarry_error error = {0};
    assert_null(builder_tokenizer(&built, &error));
    assert_int_equal(error.code, code);
    if (!strstr(error.message, part) || !strstr(error.message, other))
        fail_msg("message \"%s\" should name %s and %s", error.message, part, other);
}

static void test_other_tokenizers_are_refused_by_name(void **state)
{
    (void)state;
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    builder_string(&built, "ggml.pre", "klingon");
    assert_refused(QUARRY_ERROR_UNSUPPORTED, "gpt2", "klingon");
    builder_start(&built);
    builder_string(&built, "ggml.model", "bert");
    builder_string(&built, "ggml.pre", "smollm");
    assert_refused(QUARRY_ERROR_UNSUPPORTED, "bert", "smollm");
    builder_start(&built);
    assert_refused(QUARRY_ERROR_FORMAT, "built.gguf", "tokenizer.ggml.model");
}

static void build_tokens_only(const char *model, size_t n)
{
    builder_start(&built);
    builder_string(&built, "ggml.model", model);
    builder_strings(&built, "ggml.tokens", abc_tokens, n);
}

static void test_damaged_vocabularies_are_refused(void **state)
{
    (void)state;
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.tokens", "built.gguf");
    build_tokens_only("gpt2", 0);
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.tokens", "empty");
    build_tokens_only("gpt2", N_ABC);
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.merges", "missing");
    build_tokens_only("gpt2", N_ABC);
    builder_strings(&built, "ggml.merges", abc_merges, 1);
    builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, abc_types, N_ABC - 1);
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.token_type", "fewer");
    build_tokens_only("llama", N_ABC);
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.scores", "fewer");
    build_tokens_only("gpt2", N_ABC);
    builder_numbers(&built, "ggml.merges", GGUF_TYPE_I32, abc_types, 4);
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.merges", "built.gguf");
    build_tokens_only("gpt2", N_ABC);
    builder_strings(&built, "ggml.merges", abc_merges, 1);
    builder_string(&built, "ggml.bos_token_id", "one");
    assert_refused(QUARRY_ERROR_FORMAT, "tokenizer.ggml.bos_token_id", "built.gguf");
}

static void test_running_out_of_memory_while_opening(void **state)
{
    (void)state;
    build_abc(&built);
    memcpy(built.bytes + 16, &built.n_keys, 8);
    gguf_file *g = gguf_open_memory(built.bytes, built.n, "built.gguf", NULL);
    assert_non_null(g);
    int failures = 0;
    for (tokenizer *t = NULL; !t; failures++) {
        quarry_error error = {0};
        memory_fail_after(failures);
        t = tokenizer_create(g, &error);
        memory_fail_after(-1);
        if (!t) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
        tokenizer_destroy(t);
    }
    assert_true(failures > 5);
    gguf_close(g);
}

static void test_running_out_of_memory_while_encoding_leaves_the_list(void **state)
{
    (void)state;
    const char *const names[] = {"llama-bpe", "spm"};
    static char text[5000];
    for (size_t i = 0; i < sizeof text; i++) text[i] = "the cat, 12 <|im_end|> \n"[i % 24];
    for (size_t k = 0; k < TEST_COUNT(names); k++) {
        tokenizer *t = open_small(names[k]);
        token_list list = {0};
        assert_int_equal(token_list_push(&list, 7, NULL), QUARRY_OK);
        quarry_code code = QUARRY_ERROR_MEMORY;
        int failures = 0;
        for (; code != QUARRY_OK; failures++) {
            quarry_error error = {0};
            memory_fail_after(failures);
            code = tokenizer_encode(t, text, sizeof text, TOKENIZE_ADD_BOS | TOKENIZE_SPECIAL, &list, &error);
            memory_fail_after(-1);
            if (code == QUARRY_OK) break;
            assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
            assert_int_equal(list.n, 1);
            assert_int_equal(list.ids[0], 7);
        }
        assert_true(failures >= 3);
        assert_true(list.n > 1000);
        token_list_free(&list);
        tokenizer_destroy(t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_splits_are_those_of_the_published_patterns),
        cmocka_unit_test(test_ids_of_small_byte_level_vocabularies),
        cmocka_unit_test(test_ids_of_small_sentencepiece_vocabularies),
        cmocka_unit_test(test_ids_of_smollm2),
        cmocka_unit_test(test_ids_of_smollm2_written_out),
        cmocka_unit_test(test_ids_of_other_vocabularies),
        cmocka_unit_test(test_ids_of_gemma3),
        cmocka_unit_test(test_any_bytes_come_back),
        cmocka_unit_test(test_long_runs_end_on_a_small_stack),
        cmocka_unit_test(test_merges_apply_by_rank_then_from_the_left),
        cmocka_unit_test(test_special_tokens_need_the_flag_and_the_longest_wins),
        cmocka_unit_test(test_end_tokens),
        cmocka_unit_test(test_start_and_end_tokens_follow_the_file),
        cmocka_unit_test(test_ids_outside_the_vocabulary_count_as_absent),
        cmocka_unit_test(test_of_equal_tokens_the_first_counts),
        cmocka_unit_test(test_merging_never_makes_tokens_outside_the_byte_alphabet),
        cmocka_unit_test(test_equal_scores_merge_from_the_left),
        cmocka_unit_test(test_phi3_takes_white_space_behind_special_tokens),
        cmocka_unit_test(test_sentencepiece_falls_back_to_bytes_and_then_to_unknown),
        cmocka_unit_test(test_other_tokenizers_are_refused_by_name),
        cmocka_unit_test(test_damaged_vocabularies_are_refused),
        cmocka_unit_test(test_running_out_of_memory_while_opening),
        cmocka_unit_test(test_running_out_of_memory_while_encoding_leaves_the_list),
    };
    return cmocka_run_group_tests(tests, fixture_load, fixture_free);
}
