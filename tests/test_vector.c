/* Vector kernels of every instruction set against double precision (conversions: against scalar, bit for bit). Bounds are relative to
 * the magnitudes that enter a result. */
#include "test.h"

#include <math.h>
#include <string.h>

#include "base/base.h"
#include "math/blocks.h"
#include "math/vector.h"

enum { MAX = 1100 };

typedef struct level {
    const char *name;
    const vector_kernels *kernels;
} level;

/* The levels this machine runs, scalar first. */
static int levels(level out[3])
{
    int n = 0;
    out[n++] = (level){"scalar", &vector_scalar};
#if defined(__x86_64__)
    if (cpu_detect() >= CPU_AVX2) out[n++] = (level){"avx2", &vector_avx2};
    if (cpu_detect() >= CPU_AVX512) out[n++] = (level){"avx512", &vector_avx512};
#endif
    return n;
}

static void fill(random_state *r, float *x, int64_t n, double scale)
{
    for (int64_t i = 0; i < n; i++) x[i] = (float)(random_normal(r) * scale);
}

static void expect_near(const char *name, int64_t n, double got, double want, double bound)
{
    if (!(fabs(got - want) <= bound)) fail_msg("%s, n %ld: got %.9g, expected %.9g, bound %.3g", name, (long)n, got, want, bound);
}

/* Lengths around every vector width, and longer ones. */
static const int64_t lengths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 576, 1001};
enum { N_LENGTHS = sizeof lengths / sizeof *lengths };

static void test_rms_norm_matches_double(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 1);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        const level *l = &list[t / N_LENGTHS];
        int64_t n = lengths[t % N_LENGTHS];
        float x[MAX], w[MAX], y[MAX];
        fill(&r, x, n, 3), fill(&r, w, n, 1);
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
        double scale = 1 / sqrt(sum / (double)n + 1e-5);
        y[n] = 42;
        l->kernels->rms_norm(x, w, 1e-5f, n, y);
        for (int64_t i = 0; i < n; i++) expect_near(l->name, n, y[i], x[i] * scale * w[i], 2e-6 * fabs(x[i] * scale * w[i]));
        assert_true(y[n] == 42);
        l->kernels->rms_norm(x, w, 1e-5f, n, x);
        assert_memory_equal(x, y, (size_t)n * sizeof *x);
    }
}

static void test_swiglu_matches_double(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 3);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        const level *l = &list[t / N_LENGTHS];
        int64_t n = lengths[t % N_LENGTHS];
        float gate[MAX], up[MAX], y[MAX];
        fill(&r, gate, n, 6), fill(&r, up, n, 2);
        gate[0] = -120; /* exp(120) overflows f32: the result is 0, not NaN */
        gate[n / 2] = n > 1 ? 120 : gate[0];
        y[n] = 42;
        l->kernels->swiglu(gate, up, n, y);
        for (int64_t i = 0; i < n; i++) {
            double want = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
            expect_near(l->name, n, y[i], want, 2e-6 * fabs(want) + 1e-34);
        }
        assert_true(y[n] == 42);
        l->kernels->swiglu(gate, up, n, gate);
        assert_memory_equal(gate, y, (size_t)n * sizeof *gate);
    }
}

static void test_geglu_matches_double(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 9);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        const level *l = &list[t / N_LENGTHS];
        int64_t n = lengths[t % N_LENGTHS];
        float gate[MAX], up[MAX], y[MAX];
        fill(&r, gate, n, 3), fill(&r, up, n, 2);
        gate[0] = -120; /* exp overflows f32: the result is 0, not NaN */
        gate[n / 2] = n > 1 ? 120 : gate[0];
        y[n] = 42;
        l->kernels->geglu(gate, up, n, y);
        for (int64_t i = 0; i < n; i++) {
            double z = (double)gate[i], u = sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z);
            double want = z / 2 * (1 + tanh(u)) * (double)up[i];
            /* exp(-2u) has the rounding of u, and 1 + tanh(u) of the formula as it is written cancels */
            expect_near(l->name, n, (double)y[i], want, (2e-6 + 5e-7 * fmin(fabs(u), 90)) * fabs(want) + 1e-13 * fabs(z * (double)up[i]));
        }
        assert_true(y[n] == 42);
        l->kernels->geglu(gate, up, n, gate);
        assert_memory_equal(gate, y, (size_t)n * sizeof *gate);
    }
}

static void test_rope_rotates_pairs_and_leaves_the_rest(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    static const int sizes[] = {2, 8, 20, 32, 40, 64, 80, 96, 128, 256};
    random_state r;
    random_seed(&r, 4);
    for (int t = 0; t < n_levels * 20; t++) {
        const level *l = &list[t / 20];
        int n_rot = sizes[t % 10], n = n_rot / 2;
        bool halves = t / 10 % 2;
        float x[264], cs[256], y[264];
        fill(&r, x, 264, 1);
        for (int i = 0; i < n; i++) {
            double angle = random_normal(&r) * 10;
            cs[2 * i] = (float)cos(angle), cs[2 * i + 1] = (float)sin(angle);
        }
        memcpy(y, x, sizeof x);
        l->kernels->rope(y, cs, n_rot, halves);
        for (int i = 0; i < n; i++) {
            int a = halves ? i : 2 * i, b = halves ? i + n : 2 * i + 1;
            double c = cs[2 * i], s = cs[2 * i + 1];
            expect_near(l->name, n_rot, y[a], x[a] * c - x[b] * s, 1.5e-7 * (fabs(x[a]) + fabs(x[b])));
            expect_near(l->name, n_rot, y[b], x[a] * s + x[b] * c, 1.5e-7 * (fabs(x[a]) + fabs(x[b])));
        }
        assert_memory_equal(y + n_rot, x + n_rot, (size_t)(264 - n_rot) * sizeof *x);
    }
}

static void test_f16_reads_every_value_as_scalar_does(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    static uint16_t half[65536], back[65536];
    static float got[65536];
    for (int i = 0; i < 65536; i++) half[i] = (uint16_t)i;
    for (int t = 0; t < n_levels; t++) {
        list[t].kernels->from_f16(half, 65536, got);
        list[t].kernels->to_f16(got, 65536, back);
        for (int i = 0; i < 65536; i++) {
            float want = f16_to_f32(half[i]);
            if (isnan(want))
                assert_true(isnan(got[i]) && isnan(f16_to_f32(back[i])));
            else
                assert_true(memcmp(&got[i], &want, sizeof want) == 0 && back[i] == half[i]);
        }
    }
}

static void test_f16_rounds_as_scalar_does(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    for (int t = 0; t < n_levels; t++) {
        for (uint16_t i = 0; i < 0x7bff; i++) { /* halfway cases and their neighbours */
            float middle = (f16_to_f32(i) + f16_to_f32((uint16_t)(i + 1))) / 2;
            float in[4] = {nextafterf(middle, 0), middle, -nextafterf(middle, 1e9f), 1};
            uint16_t out[4] = {0, 0, 0, 0x1234}, want[4] = {0, 0, 0, 0x1234};
            for (int j = 0; j < 3; j++) want[j] = f32_to_f16(in[j]);
            list[t].kernels->to_f16(in, 3, out);
            assert_memory_equal(out, want, sizeof want);
        }
        float in[5] = {65519, 70000, -70000, 1e-9f, -INFINITY};
        uint16_t out[5], want[5] = {0x7bff, 0x7c00, 0xfc00, 0, 0xfc00};
        list[t].kernels->to_f16(in, 5, out);
        assert_memory_equal(out, want, sizeof want);
    }
}

static void test_f16_lengths_are_kept(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        int64_t n = lengths[t % N_LENGTHS];
        float x[MAX], y[MAX];
        uint16_t h[MAX];
        for (int64_t i = 0; i <= n; i++) x[i] = (float)i / 4, y[i] = -1, h[i] = 0xabcd;
        list[t / N_LENGTHS].kernels->to_f16(x, n, h);
        list[t / N_LENGTHS].kernels->from_f16(h, n, y);
        assert_memory_equal(x, y, (size_t)n * sizeof *x);
        assert_true(h[n] == 0xabcd && y[n] == -1);
    }
}

static void test_dot_matches_double(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 5);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        const level *l = &list[t / N_LENGTHS];
        int64_t n = lengths[t % N_LENGTHS];
        float x[MAX], y[MAX];
        fill(&r, x, n, 1), fill(&r, y, n, 1);
        x[n] = y[n] = NAN; /* reading on would show */
        double want = 0, size = 0;
        for (int64_t i = 0; i < n; i++) want += (double)x[i] * y[i], size += fabs((double)x[i] * y[i]);
        expect_near(l->name, n, l->kernels->dot(x, y, n), want, 1e-6 * size);
    }
}

static void test_softmax_exp_is_accurate_over_its_range(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    for (int t = 0; t < n_levels; t++) {
        /* The first element is the maximum 0, so that the others go into exp unchanged: a stride through the negative floats up to -87. */
        for (uint32_t bits = 0x80000000u; bits < 0xc2ae0000u - 16 * 9973; bits += 16 * 9973) {
            float in[17] = {0}, x[17], max;
            for (uint32_t i = 1; i < 17; i++) {
                uint32_t at = bits + i * 9973;
                memcpy(&in[i], &at, sizeof at);
            }
            memcpy(x, in, sizeof in);
            list[t].kernels->softmax_exp(x, 17, &max);
            for (int i = 0; i < 17; i++) expect_near(list[t].name, i, x[i], exp(in[i]), 2e-7 * exp(in[i]));
        }
    }
}

static void test_softmax_exp_sums_and_finds_the_maximum(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    random_state r;
    random_seed(&r, 6);
    for (int t = 0; t < n_levels * N_LENGTHS; t++) {
        const level *l = &list[t / N_LENGTHS];
        int64_t n = lengths[t % N_LENGTHS];
        float x[MAX], in[MAX], max;
        fill(&r, x, n, 20);
        for (int64_t i = 0; i < n; i++) x[i] -= 500; /* padding with 0 would win */
        x[n] = 42;
        memcpy(in, x, (size_t)n * sizeof *x);
        float sum = l->kernels->softmax_exp(x, n, &max), top = in[0];
        double want = 0;
        for (int64_t i = 0; i < n; i++) top = in[i] > top ? in[i] : top;
        for (int64_t i = 0; i < n; i++) {
            float difference = in[i] - top; /* rounded, as the kernels see it */
            want += exp(difference);
            expect_near(l->name, n, x[i], exp(difference), 2e-7 * exp(difference) + 2e-38);
        }
        assert_true(max == top && x[n] == 42);
        expect_near(l->name, n, sum, want, 2e-6 * want);
    }
}

static void test_softmax_exp_of_masked_elements_is_zero(void **state)
{
    (void)state;
    level list[3];
    int n_levels = levels(list);
    for (int t = 0; t < n_levels; t++) {
        float x[20], max;
        for (int i = 0; i < 20; i++) x[i] = i % 3 == 1 ? (float)i : i % 3 ? -INFINITY : -1e30f;
        assert_true(list[t].kernels->softmax_exp(x, 20, &max) >= 1 && max == 19);
        for (int i = 0; i < 20; i++) assert_true(i % 3 == 1 ? x[i] > 0 : x[i] == 0);
        for (int i = 0; i < 20; i++) x[i] = -INFINITY;
        assert_true(list[t].kernels->softmax_exp(x, 20, &max) == 0 && max == -INFINITY);
        for (int i = 0; i < 20; i++) assert_true(x[i] == 0);
        x[5] = NAN; /* a broken model must stay visible */
        assert_true(isnan(list[t].kernels->softmax_exp(x, 20, &max)));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm_matches_double),
        cmocka_unit_test(test_swiglu_matches_double),
        cmocka_unit_test(test_geglu_matches_double),
        cmocka_unit_test(test_rope_rotates_pairs_and_leaves_the_rest),
        cmocka_unit_test(test_f16_reads_every_value_as_scalar_does),
        cmocka_unit_test(test_f16_rounds_as_scalar_does),
        cmocka_unit_test(test_f16_lengths_are_kept),
        cmocka_unit_test(test_dot_matches_double),
        cmocka_unit_test(test_softmax_exp_is_accurate_over_its_range),
        cmocka_unit_test(test_softmax_exp_sums_and_finds_the_maximum),
        cmocka_unit_test(test_softmax_exp_of_masked_elements_is_zero),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
