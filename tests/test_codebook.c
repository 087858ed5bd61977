/* Codebook files: what is stored comes back, what is damaged is refused, and calibration without memory leaves nothing half done. */
#include "test.h"

#include <math.h>
#include <unistd.h>

#include "attn/attn.h"
#include "gen/gen.h"

enum { DIM = 16, CENTROIDS = 9, TOKENS = 70 };

static char path[64], partial[80];

static int make_path(void **state)
{
    (void)state;
    snprintf(path, sizeof path, "test_codebook.%d", (int)getpid());
    snprintf(partial, sizeof partial, "%s.partial", path);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    unlink(path);
    unlink(partial);
    return 0;
}

static void headers_come_back(void **state)
{
    (void)state;
    const codebook_header h = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, CODEBOOK_INT8, true, 0.5f, 0.25f};
    codebook_header back;
    uint8_t bytes[CODEBOOK_HEADER];
    codebook_header_pack(&h, bytes);
    assert_int_equal(codebook_header_parse(&back, bytes, sizeof bytes, "x", NULL), QUARRY_OK);
    assert_true(back.fingerprint == 1 && back.text_digest == 2 && back.seed == 3 && back.n_text == 4 && back.n_random == 5);
    assert_true(back.n_layer == 6 && back.n_head_kv == 7 && back.head_dim == 8 && back.n_centroids == 9 && back.iterations == 10);
    assert_true(back.distance == 11 && back.type == CODEBOOK_INT8 && back.exact_rope && back.exponent == 0.5f && back.shrink == 0.25f);
}

static void impossible_headers_are_refused(void **state)
{
    (void)state;
    const codebook_header good = {.n_layer = 1, .n_head_kv = 1, .head_dim = DIM, .n_centroids = CENTROIDS};
    codebook_header bad[] = {good, good, good, good, good, good, good, good}, back;
    bad[0].n_layer = 0;
    bad[1].n_head_kv = 1 << 20;
    bad[2].head_dim = 1025;
    bad[3].n_centroids = 65537;
    bad[4].distance = -1;
    bad[5].type = (codebook_type)2;
    bad[6].exponent = NAN;
    bad[7].shrink = INFINITY;
    uint8_t bytes[CODEBOOK_HEADER];
    codebook_header_pack(&good, bytes);
    assert_int_equal(codebook_header_parse(&back, bytes, sizeof bytes, "x", NULL), QUARRY_OK);
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        codebook_header_pack(&bad[i], bytes);
        assert_int_equal(codebook_header_parse(&back, bytes, sizeof bytes, "x", NULL), QUARRY_ERROR_FORMAT);
    }
}

/* Centroids far from zero and close to each other, as keys' are. */
static void centroids_come_back(void **state)
{
    (void)state;
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    for (codebook_type type = CODEBOOK_F16; type <= CODEBOOK_INT8; type++) {
        const codebook_header h = {.n_layer = 1, .n_head_kv = 1, .head_dim = DIM, .n_centroids = CENTROIDS, .type = type};
        float lower[DIM * DIM], other[DIM * DIM], rows[CENTROIDS * DIM], spoilt[CENTROIDS * DIM], back[CENTROIDS * DIM];
        random_state r;
        random_seed(&r, 8);
        for (int i = 0; i < DIM * DIM; i++) lower[i] = (float)random_normal(&r);
        for (int i = 0; i < CENTROIDS * DIM; i++) spoilt[i] = rows[i] = (float)(20 * (i % DIM) + random_normal(&r));
        void *memory = malloc(codebook_centroid_bytes(&h)), *copy = malloc(codebook_centroid_bytes(&h));
        codebook_head head = {.lower = lower, .iterations = 12}, read = {.lower = other};
        codebook_head_place(&h, memory, &head);
        codebook_head_place(&h, copy, &read);
        codebook_quantise(&h, kernels, spoilt, &head);
        uint8_t *record = malloc(codebook_record_bytes(&h));
        codebook_record_pack(&h, &head, record);
        assert_true(codebook_record_parse(&h, record, &read));
        assert_int_equal(read.iterations, 12);
        assert_memory_equal(lower, other, sizeof lower);
        codebook_expand(&h, kernels, &read, back);
        for (int i = 0; i < CENTROIDS * DIM; i++) { /* half a step: of f16, or of the largest of some 4 in 127 */
            const float bound = type == CODEBOOK_F16 ? fabsf(rows[i]) / 2048 + 1e-6f : 0.5f * 4.5f / 127;
            assert_true(fabsf(back[i] - rows[i]) <= bound);
        }
        for (size_t i = 0; i < codebook_record_bytes(&h); i += 7) {
            record[i] ^= 16;
            assert_false(codebook_record_parse(&h, record, &read));
            record[i] ^= 16;
        }
        *(type == CODEBOOK_F16 ? &lower[3] : &head.scale[2]) = NAN;
        codebook_record_pack(&h, &head, record);
        assert_false(codebook_record_parse(&h, record, &read));
        free(memory);
        free(copy);
        free(record);
    }
}

/* ---- calibration ---- */

static quarry_model *open_model(void)
{
    char name[1024];
    const char *folder = getenv("QUARRY_TINY_MODELS");
    if (!folder) fail_msg("QUARRY_TINY_MODELS is not set: run through ctest, or make the models with scripts/make_tiny_models.py");
    snprintf(name, sizeof name, "%s/llama-f32.gguf", folder);
    quarry_error e = {0};
    quarry_model *m = quarry_model_open(name, &(quarry_model_params){.n_threads = 2}, &e);
    if (!m) fail_msg("%s", e.message);
    return m;
}

static quarry_code run(quarry_model *m, const int32_t *tokens, const quarry_watch *heads, calibrate_result *result, quarry_error *e)
{
    codebook_header h = {
        .seed = 1, .n_random = 20, .n_centroids = CENTROIDS, .iterations = 3, .distance = 50, .exponent = 1, .shrink = 1e-6f};
    return calibrate(m, &h, tokens, TOKENS, path, NULL, heads, result, e);
}

static bool stop_at_4(int64_t done, int64_t of, void *data)
{
    (void)of, (void)data;
    return done < 4;
}

/* Every allocation fails once: of a run from the beginning, and of one that takes up finished heads, which are still there afterwards. */
static void calibration_without_memory_says_so(void **state)
{
    (void)state;
    quarry_model *m = open_model();
    int32_t tokens[TOKENS];
    size_t n_whole, n_bytes;
    calibrate_result result;
    quarry_error e = {0};
    for (int i = 0; i < TOKENS; i++) tokens[i] = 3 + i * 37 % 250;
    assert_int_equal(run(m, tokens, NULL, &result, &e), QUARRY_OK);
    assert_int_equal(result.resumed, 0);
    assert_true(result.average > 1 && result.average <= 3 && result.capped > 0); /* of at most 3 */
    const double average = result.average;
    char *whole = file_read_all(path, &n_whole, NULL);
    for (int taken_up = 0; taken_up < 2; taken_up++) {
        bool done = false;
        for (int i = 0; !done; i++) {
            unlink(path);
            unlink(partial);
            if (taken_up) assert_int_equal(run(m, tokens, &(quarry_watch){.progress = stop_at_4}, &result, &e), QUARRY_ERROR_CANCELLED);
            e.code = QUARRY_OK;
            memory_fail_after(i);
            const quarry_code code = run(m, tokens, NULL, &result, &e);
            memory_fail_after(-1);
            done = code == QUARRY_OK;
            if (!done) {
                assert_int_equal(code, QUARRY_ERROR_MEMORY);
                assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
                assert_int_not_equal(access(path, F_OK), 0);
                if (i % 4) continue; /* every fourth: what is there is taken up */
                assert_int_equal(run(m, tokens, NULL, &result, &e), QUARRY_OK);
                assert_true(result.resumed >= 4 * taken_up);
            }
            assert_true(!done || i > 10);
            assert_true(fabs(result.average - average) < 1e-9); /* counts heads that were there */
            char *bytes = file_read_all(path, &n_bytes, NULL);
            assert_int_equal(n_bytes, n_whole);
            assert_memory_equal(bytes, whole, n_whole);
            memory_free(bytes);
        }
    }
    memory_free(whole);
    quarry_model_close(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(headers_come_back),
        cmocka_unit_test(impossible_headers_are_refused),
        cmocka_unit_test(centroids_come_back),
        cmocka_unit_test(calibration_without_memory_says_so),
    };
    return cmocka_run_group_tests(tests, make_path, remove_files);
}
