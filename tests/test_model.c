/* The forward pass against references that we did not write: transformers on tiny random models, llama.cpp with weights in f32 on SmolLM2
 * (scripts/make_model_fixtures.py describes the files and makes them). */
#include "test.h"

#include <math.h>

#include "gen/gen.h"

enum { TOP = 64 };

typedef struct reader {
    char *bytes;
    size_t n, at;
} reader;

static reader open_fixture(const char *name, const char *magic)
{
    reader r = {0};
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", QUARRY_TEST_DATA, name);
    r.bytes = file_read_all(path, &r.n, NULL);
    assert_non_null(r.bytes);
    assert_memory_equal(r.bytes, magic, 8);
    r.at = 8;
    return r;
}

static const void *take(reader *r, size_t n)
{
    assert_true(r->n - r->at >= n);
    const void *p = r->bytes + r->at;
    r->at += n;
    return p;
}

static uint32_t take_u32(reader *r)
{
    uint32_t x;
    memcpy(&x, take(r, 4), 4);
    return x;
}

/* n values of 4 bytes, copied to where they are aligned. */
static void *take_array(reader *r, size_t n)
{
    void *copy = malloc(n * 4);
    return memcpy(copy, take(r, n * 4), n * 4);
}

static quarry_model *open_model(const char *path)
{
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(path, NULL, &e);
    if (!m) fail_msg("%s", e.message);
    return m;
}

static quarry_session *open_session(quarry_model *m, bool kv_f32)
{
    quarry_error e = {0};
    quarry_session *s = quarry_session_open(m, &(quarry_session_params){.attn = "full", .kv_f32 = kv_f32}, &e);
    if (!s) fail_msg("%s", e.message);
    return s;
}

/* Logits [n][n_vocab] after each token. */
static float *all_logits(quarry_model *m, const int32_t *tokens, int64_t n, bool kv_f32)
{
    quarry_session *s = open_session(m, kv_f32);
    float *logits = malloc((size_t)n * (size_t)model_shape_of(m)->n_vocab * sizeof *logits);
    quarry_error e = {0};
    if (session_feed_logits(s, tokens, n, logits, &e) != QUARRY_OK) fail_msg("%s", e.message);
    quarry_session_close(s);
    return logits;
}

static void tiny_models_give_the_reference_logits(void **state)
{
    (void)state;
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    reader r = open_fixture("tiny_logits.bin", "QLOGITS1");
    uint32_t n_models = take_u32(&r);
    assert_true(n_models >= 3);
    for (uint32_t i = 0; i < n_models; i++) {
        char name[17] = {0}, path[1024];
        memcpy(name, take(&r, 16), 16);
        uint32_t n_tokens = take_u32(&r), n_positions = take_u32(&r), n_vocab = take_u32(&r);
        int32_t *tokens = take_array(&r, n_tokens), *positions = take_array(&r, n_positions);
        float *want = take_array(&r, (size_t)n_positions * n_vocab);
        snprintf(path, sizeof path, "%s/%s-f32.gguf", folder, name);
        quarry_model *m = open_model(path);
        assert_int_equal(model_shape_of(m)->n_vocab, n_vocab);
        float *got = all_logits(m, tokens, n_tokens, true);
        for (uint32_t p = 0; p < n_positions; p++) {
            double largest = 0, worst = 0;
            for (uint32_t j = 0; j < n_vocab; j++) {
                double w = (double)want[p * n_vocab + j];
                largest = fmax(largest, fabs(w));
                worst = fmax(worst, fabs(w - (double)got[(size_t)positions[p] * n_vocab + j]));
            }
            assert_true(largest > 1); /* flat logits would agree with anything */
            if (!(worst <= 1e-4 * largest)) fail_msg("%s, position %d: relative error %g", name, positions[p], worst / largest);
        }
        free(tokens);
        free(positions);
        free(want);
        free(got);
        quarry_model_close(m);
    }
    memory_free(r.bytes);
}

static const char *real_model(void)
{
    const char *path = getenv("QUARRY_TEST_MODEL");
    if (!path) {
        print_message("SKIPPED: QUARRY_TEST_MODEL does not name the SmolLM2 model\n");
        skip();
    }
    return path;
}

/* Log-probabilities of logits[n], in place, in double. */
static void log_softmax(const float *logits, int64_t n, double *out)
{
    double max = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) max = fmax(max, (double)logits[i]);
    for (int64_t i = 0; i < n; i++) sum += exp((double)logits[i] - max);
    for (int64_t i = 0; i < n; i++) out[i] = (double)logits[i] - max - log(sum);
}

/* KL divergence of the reference's 64 most probable tokens and "any other" from ours. */
static double divergence(const int32_t *ids, const float *log_probabilities, double rest, const double *ours)
{
    double kl = 0, our_rest = 1;
    for (int i = 0; i < TOP; i++) {
        double p = exp((double)log_probabilities[i]);
        kl += p * ((double)log_probabilities[i] - ours[ids[i]]);
        our_rest -= exp(ours[ids[i]]);
    }
    if (rest > 0) kl += rest * (log(rest) - log(fmax(our_rest, 1e-12)));
    return kl;
}

/* Logits [n][n_vocab] after each token, all of them read as a document is. */
static float *read_logits(quarry_model *m, const int32_t *tokens, int64_t n)
{
    quarry_session *s = open_session(m, false);
    int64_t vocab = model_shape_of(m)->n_vocab;
    float *logits = malloc((size_t)(n * vocab) * sizeof *logits);
    quarry_error e = {0};
    for (int64_t i = 0; i < n; i++) {
        if (quarry_session_read(s, tokens + i, 1, NULL, &e) != 0) fail_msg("%s", e.message);
        memcpy(logits + i * vocab, quarry_session_logits(s), (size_t)vocab * sizeof *logits);
    }
    quarry_session_close(s);
    return logits;
}

/* Mean KL divergence of the reference from us, over every position of the fixture; its tokens read like a document, or fed like a question. */
static double mean_divergence(bool read)
{
    quarry_model *m = open_model(real_model());
    int64_t vocab = model_shape_of(m)->n_vocab;
    reader r = open_fixture("smollm2_logprobs.bin", "QLOGPRB1");
    uint32_t n_texts = take_u32(&r);
    assert_int_equal(take_u32(&r), TOP);
    double sum = 0, *ours = malloc((size_t)vocab * sizeof *ours);
    int64_t n = 0;
    for (uint32_t t = 0; t < n_texts; t++) {
        uint32_t n_tokens = take_u32(&r);
        int32_t *tokens = take_array(&r, n_tokens);
        float *got = read ? read_logits(m, tokens, n_tokens) : all_logits(m, tokens, n_tokens, false);
        for (uint32_t p = 0; p < n_tokens; p++, n++) {
            int32_t *ids = take_array(&r, TOP);
            float *log_probabilities = take_array(&r, TOP), *rest = take_array(&r, 1);
            log_softmax(got + p * vocab, vocab, ours);
            sum += divergence(ids, log_probabilities, (double)*rest, ours);
            free(ids);
            free(log_probabilities);
            free(rest);
        }
        free(tokens);
        free(got);
    }
    print_message("mean KL divergence from the reference, tokens %s: %.2e over %lld positions\n", read ? "read" : "fed", sum / (double)n,
                  (long long)n);
    assert_true(n >= 200);
    free(ours);
    memory_free(r.bytes);
    quarry_model_close(m);
    return sum / (double)n;
}

/* The reference rounds nothing beyond the file's own weights; rows that answer have two int8 terms per activation. */
static void smollm2_answers_as_the_reference(void **state)
{
    (void)state;
    assert_true(mean_divergence(false) < 1e-4);
}

/* A document's rows have one term, and a second for the few blocks with massive activations. */
static void smollm2_reads_nearly_as_the_reference(void **state)
{
    (void)state;
    double mean = mean_divergence(true);
    assert_true(mean > 0 && mean < 2e-3);
}

/* Where the reference's two best logits are further apart than f16 keys and values explain, the greedy token is the same. */
static void smollm2_continues_as_the_reference(void **state)
{
    (void)state;
    const float explained = 0.02f;
    quarry_model *m = open_model(real_model());
    int64_t vocab = model_shape_of(m)->n_vocab, compared = 0;
    reader r = open_fixture("smollm2_greedy.bin", "QGREEDY1");
    uint32_t n_prompts = take_u32(&r);
    for (uint32_t i = 0; i < n_prompts; i++) {
        uint32_t n_prompt = take_u32(&r), n_generated = take_u32(&r);
        int32_t *tokens = take_array(&r, n_prompt + n_generated);
        float *margins = take_array(&r, n_generated);
        float *got = all_logits(m, tokens, n_prompt + n_generated, false);
        for (uint32_t g = 0; g < n_generated; g++) {
            const float *logits = got + (n_prompt + g - 1) * vocab;
            int64_t best = 0;
            for (int64_t j = 1; j < vocab; j++)
                if (logits[j] > logits[best]) best = j;
            if (margins[g] <= explained) continue;
            compared++;
            assert_int_equal(best, tokens[n_prompt + g]);
        }
        free(tokens);
        free(margins);
        free(got);
    }
    assert_true(compared > 100);
    memory_free(r.bytes);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tiny_models_give_the_reference_logits),
        cmocka_unit_test(smollm2_answers_as_the_reference),
        cmocka_unit_test(smollm2_reads_nearly_as_the_reference),
        cmocka_unit_test(smollm2_continues_as_the_reference),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
