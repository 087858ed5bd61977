/* Model files that are well-formed GGUF and still cannot be run: each is refused with the reason, in both ways of reading. Made from a tiny model by
 * changing bytes. */
#include "test.h"

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/model.h"

typedef struct image {
    unsigned char *bytes;
    size_t n;
} image;

static image load(const char *name)
{
    char path[1024];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(path, sizeof path, "%s/%s", folder, name);
    image m = {0};
    m.bytes = (unsigned char *)file_read_all(path, &m.n, NULL);
    assert_non_null(m.bytes);
    return m;
}

/* The bytes just after the first occurrence of text from `from` on. */
static unsigned char *after(const image *m, const unsigned char *from, const char *text)
{
    unsigned char *at = memmem(from, m->n - (size_t)(from - m->bytes), text, strlen(text));
    if (!at) fail_msg("no '%s' in the file", text);
    return at + strlen(text);
}

static void rename_to(const image *m, const char *from, const char *to)
{
    assert_int_equal(strlen(from), strlen(to));
    memcpy(after(m, m->bytes, from) - strlen(from), to, strlen(to));
}

/* The value of a 4-byte number: [key][type u32][value]. */
static void set_number(const image *m, const char *key, const void *value)
{
    memcpy(after(m, m->bytes, key) + 4, value, 4);
}

static void set_u32(const image *m, const char *key, uint32_t value)
{
    set_number(m, key, &value);
}

static void set_f32(const image *m, const char *key, float value)
{
    set_number(m, key, &value);
}

/* One more key-value pair at `out`; returns its size. type 4: u32, 6: f32, 8: a string. */
static size_t put_pair(unsigned char *out, const char *key, uint32_t type, const void *value, size_t n_value)
{
    uint64_t n_key = strlen(key), length = n_value;
    size_t at = 0;
    memcpy(out, &n_key, 8);
    memcpy(out + 8, key, n_key);
    at = 8 + n_key;
    memcpy(out + at, &type, 4);
    at += 4;
    if (type == 8) {
        memcpy(out + at, &length, 8);
        at += 8;
    }
    memcpy(out + at, value, n_value);
    return at + n_value;
}

/* Puts pairs in front of the others, and a filler so that the data stay aligned. */
static void insert_pairs(image *m, const unsigned char *pairs, size_t n, uint64_t n_pairs)
{
    enum { HEADER = 24, ALIGNMENT = 32, LEAST = 8 + 6 + 4 + 8 };
    char spaces[ALIGNMENT];
    unsigned char filler[128];
    memset(spaces, ' ', sizeof spaces);
    size_t n_filler = put_pair(filler, "filler", 8, spaces, (ALIGNMENT - (n + LEAST) % ALIGNMENT) % ALIGNMENT);
    assert_int_equal((n + n_filler) % ALIGNMENT, 0);
    unsigned char *bytes = malloc(m->n + n + n_filler);
    uint64_t count;
    memcpy(&count, m->bytes + 16, 8);
    count += n_pairs + 1;
    memcpy(bytes, m->bytes, HEADER);
    memcpy(bytes + 16, &count, 8);
    memcpy(bytes + HEADER, pairs, n);
    memcpy(bytes + HEADER + n, filler, n_filler);
    memcpy(bytes + HEADER + n + n_filler, m->bytes + HEADER, m->n - HEADER);
    memory_free(m->bytes);
    *m = (image){bytes, m->n + n + n_filler};
}

static quarry_model *open_image(const image *m, bool no_mmap, quarry_error *error)
{
    char path[] = "/tmp/quarry-test-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *f = fdopen(fd, "wb");
    assert_int_equal(fwrite(m->bytes, 1, m->n, f), m->n);
    assert_int_equal(fclose(f), 0);
    quarry_model *model = quarry_model_open(path, &(quarry_model_params){.n_threads = 1, .no_mmap = no_mmap}, error);
    unlink(path);
    return model;
}

static void expect_refusal(image *m, quarry_code code, const char *said)
{
    for (int no_mmap = 0; no_mmap < 2; no_mmap++) {
        quarry_error e = {0};
        quarry_model *model = open_image(m, no_mmap, &e);
        quarry_model_close(model);
        if (model) fail_msg("opened; expected: %s", said);
        if (e.code != code || !strstr(e.message, said)) fail_msg("code %d, '%s'; expected %d, '%s'", e.code, e.message, code, said);
    }
    memory_free(m->bytes);
}

typedef struct memory_of_one {
    bool knows;
    quarry_file_identity file;
    uint64_t fingerprint;
    int n_remembered;
} memory_of_one;

static bool recall(const quarry_file_identity *file, uint64_t *fingerprint, void *data)
{
    memory_of_one *memory = data;
    memory->file = *file;
    if (memory->knows) *fingerprint = memory->fingerprint;
    return memory->knows;
}

static void remember(const quarry_file_identity *file, uint64_t fingerprint, void *data)
{
    memory_of_one *memory = data;
    assert_memory_equal(file, &memory->file, sizeof *file);
    memory->fingerprint = fingerprint;
    memory->n_remembered++;
}

static uint64_t fingerprint_with(const char *path, bool no_mmap, const quarry_fingerprints *fingerprints)
{
    quarry_error e = {0};
    const quarry_model_params params = {.n_threads = 1, .no_mmap = no_mmap, .fingerprints = fingerprints};
    quarry_model *model = quarry_model_open(path, &params, &e);
    if (!model) fail_msg("%s", e.message);
    const uint64_t fingerprint = model_attn_shape(model, KV_F16).fingerprint;
    quarry_model_close(model);
    return fingerprint;
}

static void a_fingerprint_is_given_to_be_remembered_and_taken_when_known(void **state)
{
    (void)state;
    char path[1024];
    struct stat st;
    snprintf(path, sizeof path, "%s/llama-f32.gguf", getenv("QUARRY_TINY_MODELS"));
    assert_int_equal(stat(path, &st), 0);
    for (int no_mmap = 0; no_mmap < 2; no_mmap++) {
        memory_of_one memory = {0};
        const quarry_fingerprints known = {recall, remember, &memory};
        const uint64_t made = fingerprint_with(path, no_mmap, NULL);
        assert_true(fingerprint_with(path, no_mmap, &known) == made);
        assert_int_equal(memory.n_remembered, 1);
        assert_true(memory.fingerprint == made);
        assert_true(memory.file.device == st.st_dev && memory.file.inode == st.st_ino);
        assert_int_equal(memory.file.n_bytes, st.st_size);
        assert_int_equal(memory.file.modified, st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec);
        assert_int_equal(memory.file.changed, st.st_ctim.tv_sec * 1000000000 + st.st_ctim.tv_nsec);
        assert_int_not_equal(memory.file.method, 0);
        memory.knows = true;
        memory.fingerprint = ~made; /* to see that it is not made again */
        assert_true(fingerprint_with(path, no_mmap, &known) == ~made);
        assert_int_equal(memory.n_remembered, 1);
    }
}

static void an_unknown_architecture_is_named(void **state)
{
    (void)state;
    image m = load("llama-f32.gguf");
    unsigned char *value = after(&m, m.bytes, "general.architecture") + 4 + 8;
    assert_memory_equal(value, "llama", 5);
    memcpy(value, "zamba", 5);
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "architecture not supported: zamba (supported: llama, qwen2, qwen3, gemma3)");
}

static void a_missing_tensor_is_named(void **state)
{
    (void)state;
    const char *const names[] = {"token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight", "blk.0.attn_q.weight"};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        char other[64];
        image m = load("llama-f32.gguf");
        snprintf(other, sizeof other, "X%s", names[i] + 1);
        rename_to(&m, names[i], other);
        expect_refusal(&m, QUARRY_ERROR_FORMAT, names[i]);
    }
    image m = load("qwen2-f32.gguf"); /* where biases are part of the architecture */
    rename_to(&m, "blk.0.attn_k.bias", "blk.0.attn_X.bias");
    expect_refusal(&m, QUARRY_ERROR_FORMAT, "blk.0.attn_k.bias is missing");
    m = load("gemma3-f32.gguf");
    rename_to(&m, "blk.3.post_ffw_norm.weight", "blk.3.post_fXX_norm.weight");
    expect_refusal(&m, QUARRY_ERROR_FORMAT, "blk.3.post_ffw_norm.weight is missing");
}

static void a_tensor_that_nothing_reads_is_refused(void **state)
{
    (void)state;
    image m = load("llama-freqs-f32.gguf");
    rename_to(&m, "rope_freqs.weight", "rope_extra.weight");
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "not part of architecture llama");
}

static void shapes_that_contradict_the_metadata_are_refused(void **state)
{
    (void)state;
    image m = load("llama-f32.gguf");
    set_u32(&m, "llama.feed_forward_length", 64 * 9);
    expect_refusal(&m, QUARRY_ERROR_FORMAT, "ffn_gate.weight is");
    m = load("llama-f32.gguf");
    set_u32(&m, "llama.attention.head_count_kv", 3);
    expect_refusal(&m, QUARRY_ERROR_FORMAT, "do not fit together");
}

static void dimensions_out_of_range_are_refused(void **state)
{
    (void)state;
    const char *const keys[] = {"llama.block_count", "llama.embedding_length", "llama.feed_forward_length", "llama.context_length",
                                "llama.attention.head_count"};
    const uint32_t values[] = {0, UINT32_MAX};
    for (size_t i = 0; i < TEST_COUNT(keys); i++)
        for (size_t j = 0; j < TEST_COUNT(values); j++) {
            image m = load("llama-f32.gguf");
            set_u32(&m, keys[i], values[j]);
            expect_refusal(&m, QUARRY_ERROR_FORMAT, "out of range");
        }
}

static void windows_without_sense_are_refused(void **state)
{
    (void)state;
    const uint32_t values[] = {0, UINT32_MAX};
    for (size_t i = 0; i < TEST_COUNT(values); i++) {
        image m = load("gemma3-f32.gguf");
        set_u32(&m, "gemma3.attention.sliding_window", values[i]);
        expect_refusal(&m, QUARRY_ERROR_FORMAT, "gemma3.attention.sliding_window is missing or out of range");
    }
    image m = load("gemma3-f32.gguf");
    set_u32(&m, "gemma3.block_count", 5);
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "without a layer that sees the whole context");
}

static void numbers_without_sense_are_refused(void **state)
{
    (void)state;
    const float bases[] = {0, -1, NAN, INFINITY}, epsilons[] = {0, -1, NAN};
    for (size_t i = 0; i < TEST_COUNT(bases); i++) {
        image m = load("llama-f32.gguf");
        set_f32(&m, "llama.rope.freq_base", bases[i]);
        expect_refusal(&m, QUARRY_ERROR_FORMAT, "out of range");
    }
    for (size_t i = 0; i < TEST_COUNT(epsilons); i++) {
        image m = load("llama-f32.gguf");
        set_f32(&m, "llama.attention.layer_norm_rms_epsilon", epsilons[i]);
        expect_refusal(&m, QUARRY_ERROR_FORMAT, "out of range");
    }
}

static void what_the_pass_does_not_do_is_refused(void **state)
{
    (void)state;
    unsigned char pairs[256];
    uint32_t experts = 8, length = 8;
    float factor = 4;
    image m = load("llama-f32.gguf");
    insert_pairs(&m, pairs, put_pair(pairs, "llama.expert_count", 4, &experts, 4), 1);
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "mixture of experts");
    m = load("llama-f32.gguf");
    size_t n = put_pair(pairs, "llama.rope.scaling.type", 8, "yarn", 4);
    n += put_pair(pairs + n, "llama.rope.scaling.factor", 6, &factor, 4);
    insert_pairs(&m, pairs, n, 2);
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "RoPE scaling");
    m = load("llama-f32.gguf");
    insert_pairs(&m, pairs, put_pair(pairs, "llama.attention.value_length", 4, &length, 4), 1);
    expect_refusal(&m, QUARRY_ERROR_UNSUPPORTED, "value length");
    m = load("llama-f32.gguf"); /* a pair that means nothing to us does no harm */
    insert_pairs(&m, pairs, put_pair(pairs, "llama.comment", 8, "x", 1), 1);
    quarry_error e = {0};
    quarry_model *model = open_image(&m, false, &e);
    if (!model) fail_msg("%s", e.message);
    quarry_model_close(model);
    memory_free(m.bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_fingerprint_is_given_to_be_remembered_and_taken_when_known),
        cmocka_unit_test(an_unknown_architecture_is_named),
        cmocka_unit_test(a_missing_tensor_is_named),
        cmocka_unit_test(a_tensor_that_nothing_reads_is_refused),
        cmocka_unit_test(shapes_that_contradict_the_metadata_are_refused),
        cmocka_unit_test(dimensions_out_of_range_are_refused),
        cmocka_unit_test(numbers_without_sense_are_refused),
        cmocka_unit_test(what_the_pass_does_not_do_is_refused),
        cmocka_unit_test(windows_without_sense_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
