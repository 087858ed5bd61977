/* Kernels of the key index: integers equal the scalar specification exactly, floats to rounding, on every instruction set of this
 * machine. */
#include "test.h"

#include <math.h>

#include "base/base.h"
#include "math/retrieval.h"

static const struct {
    cpu_isa isa;
    const retrieval_kernels *kernels;
} tables[] = {
#if defined(__x86_64__)
    {CPU_AVX2, &retrieval_avx2},
    {CPU_AVX512, &retrieval_avx512},
#endif
    {CPU_SCALAR, &retrieval_scalar},
};

#define EACH_TABLE(k)                                                                                                                      \
    for (size_t table_ = 0; table_ < TEST_COUNT(tables); table_++)                                                                         \
        if (tables[table_].isa <= cpu_detect())                                                                                            \
            for (const retrieval_kernels *k = tables[table_].kernels; k; k = NULL)

static void *make(size_t n, size_t size)
{
    void *p = memory_aligned(n, size, "test", NULL);
    assert_non_null(p);
    return p;
}

static float *normals(random_state *r, size_t n)
{
    float *x = make(n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)random_normal(r);
    return x;
}

static uint8_t *bytes(random_state *r, size_t n)
{
    uint8_t *x = make(n, 1);
    for (size_t i = 0; i < n; i++) x[i] = (uint8_t)random_u64(r);
    return x;
}

/* Entries of tables. */
static uint8_t *entries(random_state *r, size_t n)
{
    uint8_t *x = bytes(r, n);
    for (size_t i = 0; i < n; i++) x[i] &= SCAN_TOP;
    return x;
}

static void assert_close(const float *a, const float *b, size_t n, float bound)
{
    for (size_t i = 0; i < n; i++) {
        if (fabsf(a[i] - b[i]) > bound * (1 + fabsf(b[i]))) print_error("at %zu: %g, not %g\n", i, (double)a[i], (double)b[i]);
        assert_true(fabsf(a[i] - b[i]) <= bound * (1 + fabsf(b[i])));
    }
}

/* The scalar scan itself, against sums written out from the layout in the header. */
static void scalar_scan_adds_the_tables_of_each_token(void **state)
{
    (void)state;
    enum { SUB = 3, BLOCKS = 2 };
    random_state r;
    random_seed(&r, 1);
    uint8_t *codes = bytes(&r, BLOCKS * SUB * 16), *lut = entries(&r, 2 * SUB * 16);
    uint16_t offset[2] = {100, 65000}, out[2 * BLOCKS * 32];
    retrieval_scalar.scan(codes, SUB, BLOCKS, lut, 2, offset, out, BLOCKS * 32);
    for (int t = 0; t < BLOCKS * 32; t++) {
        const uint8_t *block = codes + t / 32 * SUB * 16;
        int sum[2] = {100, 65000};
        for (int s = 0; s < SUB; s++) {
            int byte = block[s * 16 + t % 16], code = t % 32 < 16 ? byte % 16 : byte / 16;
            for (int h = 0; h < 2; h++) sum[h] += lut[(h * SUB + s) * 16 + code];
        }
        for (int h = 0; h < 2; h++) assert_int_equal(out[h * BLOCKS * 32 + t], sum[h] > 65535 ? 65535 : sum[h]);
    }
    memory_free(codes);
    memory_free(lut);
}

static void scan_equals_scalar_exactly(void **state)
{
    (void)state;
    const int subs[] = {1, 2, 3, 7, 16, 18, 20, 24, 32, 64, 255, 256};
    enum { BLOCKS = 5, HEADS = 9, STRIDE = BLOCKS * 32 + 7 };
    random_state r;
    random_seed(&r, 2);
    EACH_TABLE(k)
    {
        for (size_t i = 0; i < TEST_COUNT(subs); i++)
            for (int g = 1; g <= HEADS; g++) {
                size_t n = (size_t)subs[i] * 16;
                uint8_t *codes = bytes(&r, BLOCKS * n), *lut = entries(&r, (size_t)g * n);
                if (g == 2) memset(lut, SCAN_TOP, (size_t)g * n); /* the largest sums */
                uint16_t offset[HEADS], want[HEADS * STRIDE] = {0}, got[HEADS * STRIDE] = {0};
                for (int h = 0; h < g; h++) offset[h] = (uint16_t)(g == 3 ? 65500 + h : (int)random_below(&r, 40000));
                retrieval_scalar.scan(codes, subs[i], BLOCKS, lut, g, offset, want, STRIDE);
                k->scan(codes, subs[i], BLOCKS, lut, g, offset, got, STRIDE);
                assert_memory_equal(got, want, sizeof want);
                memory_free(codes);
                memory_free(lut);
            }
    }
}

static void tables_equal_scalar_and_quantise_to_the_same_bytes(void **state)
{
    (void)state;
    enum { SUB = 24 };
    random_state r;
    random_seed(&r, 3);
    for (int d_sub = 2; d_sub <= 8; d_sub += 2) {
        float *q = normals(&r, (size_t)SUB * (size_t)d_sub), *centroids = normals(&r, (size_t)SUB * (size_t)d_sub * 16);
        float want[SUB * 16], want_low[SUB], got[SUB * 16], low[SUB];
        uint8_t want_bytes[SUB * 16], got_bytes[SUB * 16];
        float widest = retrieval_scalar.lut(q, centroids, SUB, d_sub, want, want_low);
        EACH_TABLE(k)
        {
            float range = k->lut(q, centroids, SUB, d_sub, got, low);
            assert_close(got, want, SUB * 16, 1e-5f);
            assert_close(low, want_low, SUB, 1e-5f);
            assert_close(&range, &widest, 1, 1e-5f);
            /* 80 / widest: some entries are above the top */
            retrieval_scalar.lut_quantise(want, want_low, 80 / widest, SUB, want_bytes);
            k->lut_quantise(want, want_low, 80 / widest, SUB, got_bytes);
            assert_memory_equal(got_bytes, want_bytes, sizeof want_bytes);
        }
        int least = SCAN_TOP, most = 0;
        for (int i = 0; i < SUB * 16; i++) {
            least = want_bytes[i] < least ? want_bytes[i] : least;
            most = want_bytes[i] > most ? want_bytes[i] : most;
        }
        assert_int_equal(least, 0);
        assert_int_equal(most, SCAN_TOP);
        memory_free(q);
        memory_free(centroids);
    }
}

/* Reference: exp in double precision, within the stated bound. */
static void sums_of_exponentials_are_within_their_bound(void **state)
{
    (void)state;
    enum { N = 320 };
    random_state r;
    random_seed(&r, 11);
    uint16_t keys[N];
    const float steps[] = {1e-4f, 0.02f, 0.3f, 5};
    for (size_t i = 0; i < TEST_COUNT(steps); i++)
        for (int low = 1; low <= 65001; low += 13000) {
            double want = 0;
            int most = 0;
            for (int t = 0; t < N; t++) {
                keys[t] = t % 9 == 0 ? 0 : (uint16_t)(low + (int)random_below(&r, 500));
                most = keys[t] > most ? keys[t] : most;
            }
            for (int t = 0; t < N; t++) want += keys[t] ? exp(steps[i] * (double)(keys[t] - most)) : 0;
            EACH_TABLE(k)
            {
                uint16_t top;
                double got = k->exp_sum(keys, N, steps[i], &top);
                assert_int_equal(top, most);
                assert_true(got >= want * 0.998 && got <= want * 1.0625);
            }
        }
    memset(keys, 0, sizeof keys);
    EACH_TABLE(k)
    {
        uint16_t top;
        assert_true(k->exp_sum(keys, N, 0.1f, &top) == 0);
        assert_int_equal(top, 0);
    }
}

static void merge_equals_scalar_exactly(void **state)
{
    (void)state;
    enum { N = 96, STRIDE = 100, HEADS = 5 };
    random_state r;
    random_seed(&r, 12);
    uint16_t keys[HEADS * STRIDE], up[HEADS], down[HEADS], want[N], got[N];
    for (int round = 0; round < 20; round++)
        for (int g = 1; g <= HEADS; g++) {
            for (int i = 0; i < HEADS * STRIDE; i++) keys[i] = (uint16_t)random_u64(&r);
            for (int h = 0; h < HEADS; h++) {
                up[h] = (uint16_t)random_below(&r, 40000);
                down[h] = (uint16_t)random_below(&r, 40000);
            }
            for (int t = 0; t < N; t++) {
                int best = 0;
                for (int h = 0; h < g; h++) {
                    int x = keys[h * STRIDE + t] + up[h];
                    x = (x > 65535 ? 65535 : x) - down[h];
                    best = x > best ? x : best;
                }
                want[t] = (uint16_t)best;
            }
            EACH_TABLE(k)
            {
                k->merge(keys, STRIDE, g, up, down, N, got);
                assert_memory_equal(got, want, sizeof want);
            }
        }
}

static void count_and_collect_find_the_keys_above_and_the_first_ties(void **state)
{
    (void)state;
    enum { N = 40000 / 32 * 32 };
    random_state r;
    random_seed(&r, 4);
    uint16_t *keys = make(N, sizeof *keys);
    int32_t *want = make(N, sizeof *want), *got = make(N + SCAN_BLOCK, sizeof *got);
    const uint32_t spans[] = {3, 300, 65536};
    for (size_t s = 0; s < TEST_COUNT(spans); s++) {
        for (int i = 0; i < N; i++) keys[i] = (uint16_t)random_below(&r, spans[s]);
        const uint16_t thresholds[] = {0, 1, 2, 299, 32767, 32768, 65534, 65535};
        for (size_t t = 0; t < TEST_COUNT(thresholds); t++) {
            int64_t above = 0, equal = 0;
            for (int i = 0; i < N; i++) {
                above += keys[i] > thresholds[t];
                equal += keys[i] == thresholds[t];
            }
            EACH_TABLE(k)
            {
                assert_int_equal(k->count(keys, N, thresholds[t]), above + equal);
                for (int64_t ties = 0; ties <= equal; ties += 1 + equal / 3) {
                    int64_t left = ties, n = 0, taken = 0;
                    for (int i = 0; i < N; i++) {
                        if (keys[i] == thresholds[t] && taken++ >= ties) continue;
                        if (keys[i] >= thresholds[t]) want[n++] = 1000 + i;
                    }
                    assert_int_equal(k->collect(keys, N, thresholds[t], &left, 1000, got), n);
                    assert_int_equal(left, 0);
                    assert_memory_equal(got, want, (size_t)n * sizeof *got);
                }
            }
        }
    }
    memory_free(keys);
    memory_free(want);
    memory_free(got);
}

static void int8_products_equal_scalar(void **state)
{
    (void)state;
    const int dims[] = {8, 64, 72, 80, 96, 128, 256};
    random_state r;
    random_seed(&r, 5);
    for (size_t i = 0; i < TEST_COUNT(dims); i++)
        for (int g = 1; g <= 9; g += g < 5 ? 1 : 4)
            for (int n = 0; n < 23; n += 11) {
                size_t d = (size_t)dims[i], heads = (size_t)g, c = (size_t)n, stride = c + 3;
                float *q = normals(&r, heads * d), *scale = normals(&r, c), *o = normals(&r, heads * d), *w = normals(&r, heads * stride);
                int8_t *x = (int8_t *)bytes(&r, c * d);
                float *want = normals(&r, heads * stride), *got = make(heads * stride, sizeof *got),
                      *sums = make(2 * heads * d, sizeof *sums);
                memcpy(got, want, heads * stride * sizeof *got);
                retrieval_scalar.dot_i8(q, g, dims[i], x, scale, o, n, want, (int64_t)stride);
                memcpy(sums, o, heads * d * sizeof *o);
                retrieval_scalar.accumulate_i8(w, (int64_t)stride, g, dims[i], x, scale, n, sums);
                EACH_TABLE(k)
                {
                    k->dot_i8(q, g, dims[i], x, scale, o, n, got, (int64_t)stride);
                    assert_close(got, want, heads * stride, 2e-4f);
                    memcpy(sums + heads * d, o, heads * d * sizeof *o);
                    k->accumulate_i8(w, (int64_t)stride, g, dims[i], x, scale, n, sums + heads * d);
                    assert_close(sums + heads * d, sums, heads * d, 1e-3f);
                }
                memory_free(q), memory_free(scale), memory_free(o), memory_free(w), memory_free(x), memory_free(want), memory_free(got),
                    memory_free(sums);
            }
}

/* Products of 4-bit rows are integers: every table gives the same steps, and those of the sum written out. */
static void four_bit_rows_give_the_same_steps_everywhere(void **state)
{
    (void)state;
    const int dims[] = {8, 24, 64, 72, 80, 96, 128, 256};
    enum { ROWS = 61, MOST = 9 };
    random_state r;
    random_seed(&r, 13);
    for (size_t i = 0; i < TEST_COUNT(dims); i++)
        for (int g = 1; g <= MOST; g += 1 + (g > 4))
            for (int64_t n = 0; n <= ROWS; n += n < 6 ? 1 : 11) {
                const int d = dims[i];
                uint8_t *x = bytes(&r, (size_t)(ROWS * d / 2)), *q_bytes = bytes(&r, (size_t)(g * d));
                int8_t *q = (int8_t *)q_bytes;
                float *scale = normals(&r, ROWS), factor[MOST], bias[MOST];
                int32_t at[ROWS];
                uint16_t want[MOST * ROWS], got[MOST * (ROWS + 3)], top[MOST], want_top[MOST];
                for (int j = 0; j < g * d; j++) q[j] = q[j] == -128 ? 0 : q[j];
                for (int h = 0; h < g; h++) {
                    factor[h] = h == 1 ? 100 : 0.05f; /* of head 1 many steps are cut off */
                    bias[h] = 2000;
                    want_top[h] = h == 2 ? 60000 : 0;
                }
                for (int t = 0; t < ROWS; t++) at[t] = (int32_t)random_below(&r, ROWS);
                for (int64_t t = 0; t < n; t++)
                    for (int h = 0; h < g; h++) {
                        int32_t sum = 0;
                        for (int j = 0; j < d; j++) {
                            int byte = x[at[t] * d / 2 + j % (d / 2)];
                            sum += q[h * d + j] * ((j < d / 2 ? byte & 15 : byte >> 4) - 8);
                        }
                        float steps = rintf(bias[h] + factor[h] * (scale[at[t]] * (float)sum));
                        want[h * ROWS + t] = (uint16_t)fminf(fmaxf(steps, 1), 65535);
                        if (want[h * ROWS + t] > want_top[h]) want_top[h] = want[h * ROWS + t];
                    }
                EACH_TABLE(k)
                {
                    memset(got, 0xaa, sizeof got);
                    memset(top, 0, sizeof top);
                    if (g > 2) top[2] = 60000;
                    k->dot_i4(q, factor, bias, g, d, x, scale, at, n, got, ROWS + 3, top);
                    for (int h = 0; h < g; h++) {
                        assert_memory_equal(got + h * (ROWS + 3), want + h * ROWS, (size_t)n * sizeof *got);
                        assert_int_equal(got[h * (ROWS + 3) + n], 0xaaaa); /* nothing after them */
                        assert_int_equal(top[h], want_top[h]);
                    }
                }
                memory_free(x), memory_free(q_bytes), memory_free(scale);
            }
}

static void cells_add_up_powers(void **state)
{
    (void)state;
    enum { CELLS = 40, KEYS = 4096 };
    random_state r;
    random_seed(&r, 14);
    uint16_t *keys = memory_zero(KEYS + SCAN_BLOCK, sizeof *keys, "test", NULL);
    uint32_t begin[CELLS + 1];
    float got[CELLS];
    for (int round = 0; round < 20; round++) {
        const float step = round == 0 ? 0 : expf((float)round / 2 - 7);
        const uint16_t top = (uint16_t)(1 + random_below(&r, 3000));
        for (int i = 0; i < KEYS + SCAN_BLOCK; i++) keys[i] = random_below(&r, 5) == 0 ? 0 : (uint16_t)(1 + random_below(&r, top));
        begin[0] = (uint32_t)random_below(&r, 3);
        for (int c = 0; c < CELLS; c++) begin[c + 1] = begin[c] + (uint32_t)random_below(&r, c % 4 == 0 ? 3 : 100);
        EACH_TABLE(k)
        {
            k->cell_sums(keys, begin, CELLS, step, top, got);
            for (int c = 0; c < CELLS; c++) {
                double want = 0;
                for (uint32_t i = begin[c]; i < begin[c + 1]; i++) want += keys[i] ? exp((double)step * (keys[i] - top)) : 0;
                const double error = got[c] - want;
                assert_true(error <= 0.022 * want + 1e-7 && error >= -0.042 * want - 1e-7 * (begin[c + 1] - begin[c]));
            }
        }
    }
    memory_free(keys);
}

static void rows_are_accumulated_as_scalar_does(void **state)
{
    (void)state;
    const int dims[] = {8, 64, 72, 96, 256};
    enum { N = 13 };
    random_state r;
    random_seed(&r, 6);
    for (size_t i = 0; i < TEST_COUNT(dims); i++)
        for (int g = 1; g <= 5; g++)
            for (int type = KV_F16; type <= KV_F32; type++) {
                size_t d = (size_t)dims[i], heads = (size_t)g, row = kv_row_bytes((kv_type)type, dims[i]);
                uint8_t *data = bytes(&r, N * row);
                const void *rows[N];
                for (size_t t = 0; t < N; t++) {
                    rows[t] = data + (N - 1 - t) * row;
                    for (size_t j = 0; j < 2 * d; j++) {
                        if (type == KV_F32) ((float *)rows[t])[j] = (float)random_normal(&r);
                        if (type == KV_F16) ((uint16_t *)rows[t])[j] &= 0xbfff; /* below 2, with subnormals */
                    }
                }
                float *w = normals(&r, heads * N), *o = normals(&r, heads * d), *want = make(heads * d, sizeof *want),
                      *got = make(heads * d, sizeof *got);
                memcpy(want, o, heads * d * sizeof *o);
                retrieval_scalar.accumulate_rows(w, g, dims[i], (kv_type)type, rows, N, want);
                EACH_TABLE(k)
                {
                    memcpy(got, o, heads * d * sizeof *o);
                    k->accumulate_rows(w, g, dims[i], (kv_type)type, rows, N, got);
                    assert_close(got, want, heads * d, 1e-4f);
                }
                memory_free(data), memory_free(w), memory_free(o), memory_free(want), memory_free(got);
            }
}

/* Reference: distances in double precision. */
static void nearest_finds_the_nearest_centroid(void **state)
{
    (void)state;
    const struct {
        int k, d, n;
    } shapes[] = {{16, 4, 100}, {1, 8, 33}, {13, 10, 47}, {130, 64, 65}};
    random_state r;
    random_seed(&r, 7);
    for (size_t s = 0; s < TEST_COUNT(shapes); s++) {
        size_t k = (size_t)shapes[s].k, d = (size_t)shapes[s].d, n = (size_t)shapes[s].n, stride = n + 5;
        float *c = normals(&r, k * d), *y = normals(&r, d * stride), *half = make(k, sizeof *half), *value = make(n, sizeof *value);
        int32_t *index = make(n, sizeof *index);
        for (size_t j = 0; j < k; j++) {
            half[j] = 0;
            for (size_t i = 0; i < d; i++) half[j] += 0.5f * c[j * d + i] * c[j * d + i];
        }
        EACH_TABLE(kernels)
        {
            kernels->nearest(c, half, shapes[s].k, shapes[s].d, y, (int64_t)stride, shapes[s].n, index, value);
            for (size_t t = 0; t < n; t++) {
                double best = INFINITY, mine = 0, norm = 0;
                for (size_t j = 0; j < k; j++) {
                    double distance = 0;
                    for (size_t i = 0; i < d; i++) distance += pow((double)c[j * d + i] - y[i * stride + t], 2);
                    if (distance < best) best = distance;
                    if ((int32_t)j == index[t]) mine = distance;
                }
                for (size_t i = 0; i < d; i++) norm += pow(y[i * stride + t], 2);
                assert_true(mine <= best + 1e-4 * (1 + best));
                assert_true(fabs(norm - 2 * value[t] - best) <= 1e-3 * (1 + best));
            }
        }
        memory_free(c), memory_free(y), memory_free(half), memory_free(value), memory_free(index);
    }
}

static void product_multiplies_with_any_strides(void **state)
{
    (void)state;
    const struct {
        int m, n, k;
    } shapes[] = {{1, 1, 1}, {3, 64, 64}, {17, 33, 9}, {64, 64, 100}, {7, 15, 8}, {80, 80, 80}};
    random_state r;
    random_seed(&r, 8);
    for (size_t s = 0; s < TEST_COUNT(shapes); s++)
        for (int variant = 0; variant < 4; variant++) {
            size_t m = (size_t)shapes[s].m, n = (size_t)shapes[s].n, k = (size_t)shapes[s].k;
            bool transposed = variant & 1, add = variant & 2;
            float *a = normals(&r, (m + 2) * (k + 2)), *b = normals(&r, k * (n + 1)), *c = normals(&r, m * (n + 3)),
                  *got = make(m * (n + 3), sizeof *got);
            size_t a_row = transposed ? 1 : k + 2, a_column = transposed ? m + 2 : 1;
            EACH_TABLE(kernels)
            {
                memcpy(got, c, m * (n + 3) * sizeof *c);
                kernels->product(a, (int64_t)a_row, (int64_t)a_column, b, (int64_t)n + 1, got, (int64_t)n + 3, (int64_t)m, (int64_t)n,
                                 (int64_t)k, add);
                for (size_t i = 0; i < m; i++)
                    for (size_t j = 0; j < n + 3; j++) {
                        double sum = add || j >= n ? c[i * (n + 3) + j] : 0;
                        for (size_t l = 0; l < k && j < n; l++) sum += (double)a[i * a_row + l * a_column] * b[l * (n + 1) + j];
                        assert_true(fabs(got[i * (n + 3) + j] - sum) <= 1e-4);
                    }
            }
            memory_free(a), memory_free(b), memory_free(c), memory_free(got);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scalar_scan_adds_the_tables_of_each_token),
        cmocka_unit_test(scan_equals_scalar_exactly),
        cmocka_unit_test(tables_equal_scalar_and_quantise_to_the_same_bytes),
        cmocka_unit_test(sums_of_exponentials_are_within_their_bound),
        cmocka_unit_test(merge_equals_scalar_exactly),
        cmocka_unit_test(count_and_collect_find_the_keys_above_and_the_first_ties),
        cmocka_unit_test(int8_products_equal_scalar),
        cmocka_unit_test(four_bit_rows_give_the_same_steps_everywhere),
        cmocka_unit_test(cells_add_up_powers),
        cmocka_unit_test(rows_are_accumulated_as_scalar_does),
        cmocka_unit_test(nearest_finds_the_nearest_centroid),
        cmocka_unit_test(product_multiplies_with_any_strides),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
