/* Quantisation under a query-aware metric: properties that define it, and planted structure that it must find. */
#include "test.h"

#include <math.h>

#include "vq/vq.h"

static const math_kernels scalar = {.isa = "scalar", .retrieval = &retrieval_scalar};

static float *normals(random_state *r, size_t n)
{
    float *x = memory_alloc(n, sizeof *x, "test", NULL);
    assert_non_null(x);
    for (size_t i = 0; i < n; i++) x[i] = (float)random_normal(r);
    return x;
}

/* n points of a distribution whose axes are stretched very differently. */
static float *stretched(random_state *r, int n, int d)
{
    float *x = normals(r, (size_t)n * (size_t)d), *mix = normals(r, (size_t)d * (size_t)d),
          *out = memory_zero((size_t)n * (size_t)d, sizeof *out, "test", NULL);
    for (int t = 0; t < n; t++)
        for (int i = 0; i < d; i++)
            for (int j = 0; j < d; j++) out[t * d + j] += x[t * d + i] * mix[i * d + j] * expf(-5.0f * (float)i / (float)d);
    memory_free(x);
    memory_free(mix);
    return out;
}

static void eigenvectors_diagonalise(void **state)
{
    (void)state;
    const int dims[] = {1, 2, 3, 8, 64, 80, 96, 128};
    random_state r;
    random_seed(&r, 1);
    for (size_t s = 0; s < TEST_COUNT(dims); s++)
        for (int degenerate = 0; degenerate < 2; degenerate++) {
            int d = dims[s], n = degenerate ? d / 2 + 1 : 3 * d;
            arena scratch = {0};
            float *x = stretched(&r, n, d), *a = memory_zero((size_t)d * (size_t)d, sizeof *a, "test", NULL);
            float *values = normals(&r, (size_t)d), *vectors = normals(&r, (size_t)d * (size_t)d);
            retrieval_scalar.product(x, 1, d, x, d, a, d, d, d, n, false);
            assert_int_equal(vq_eigen(d, a, values, vectors, &scratch, NULL), QUARRY_OK);
            double largest = fabs(values[d - 1]);
            for (int i = 0; i < d; i++) {
                if (i) assert_true(values[i] >= values[i - 1]);
                for (int j = 0; j < d; j++) { /* v_i' a v_j and v_i' v_j */
                    double quadratic = 0, dot = 0;
                    for (int k = 0; k < d; k++) {
                        double row = 0;
                        for (int l = 0; l < d; l++) row += (double)a[k * d + l] * vectors[j * d + l];
                        quadratic += vectors[i * d + k] * row;
                        dot += (double)vectors[i * d + k] * vectors[j * d + k];
                    }
                    assert_true(fabs(dot - (i == j)) < 1e-5);
                    assert_true(fabs(quadratic - (i == j ? values[i] : 0)) < 1e-5 * largest);
                }
            }
            memory_free(x), memory_free(a), memory_free(values), memory_free(vectors);
            arena_free(&scratch);
        }
}

static void eigenvalues_of_nonsense_are_an_error(void **state)
{
    (void)state;
    float a[4] = {1, NAN, NAN, 1}, values[2], vectors[4];
    arena scratch = {0};
    quarry_error error;
    assert_int_equal(vq_eigen(2, a, values, vectors, &scratch, &error), QUARRY_ERROR_ARGUMENT);
    arena_free(&scratch);
}

static void moments_sum_outer_products_of_strided_queries(void **state)
{
    (void)state;
    enum { D = 8, N = 7, STRIDE = 13 };
    random_state r;
    random_seed(&r, 2);
    float *q = normals(&r, N * STRIDE), sum[D * D] = {0};
    vq_moments h = {.d = D, .sum = sum};
    vq_moments_add(&h, &scalar, q, 3, STRIDE);
    vq_moments_add(&h, &scalar, q + 3 * STRIDE, N - 3, STRIDE);
    assert_int_equal(h.n, N);
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) {
            double want = 0;
            for (int t = 0; t < N; t++) want += (double)q[t * STRIDE + i] * q[t * STRIDE + j];
            assert_true(fabs(sum[i * D + j] - want) < 1e-4);
        }
    memory_free(q);
}

/* root² = (d H / tr H + shrink I)^alpha; at alpha = 1 that can be written down without eigenvalues. */
static void metric_is_a_power_of_the_moments(void **state)
{
    (void)state;
    enum { D = 24, N = 100 };
    random_state r;
    random_seed(&r, 3);
    float *q = stretched(&r, N, D), sum[D * D] = {0}, root[D * D], inverse[D * D], half[D * D], unused[D * D];
    vq_moments h = {.d = D, .sum = sum};
    vq_moments_add(&h, &scalar, q, N, D);
    arena scratch = {0};
    vq_metric full = {D, root, inverse}, square_root = {D, half, unused};
    assert_int_equal(vq_metric_make(&full, &h, 1, 0.05f, &scratch, NULL), QUARRY_OK);
    assert_int_equal(vq_metric_make(&square_root, &h, 0.5f, 0.05f, &scratch, NULL), QUARRY_OK);
    double trace = 0;
    for (int i = 0; i < D; i++) trace += sum[i * D + i];
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) {
            double m = 0, identity = 0, root_again = 0;
            for (int k = 0; k < D; k++) {
                m += (double)root[i * D + k] * root[k * D + j];
                identity += (double)root[i * D + k] * inverse[k * D + j];
                root_again += (double)half[i * D + k] * half[k * D + j];
            }
            assert_true(fabs(m - (D * sum[i * D + j] / trace + (i == j ? 0.05 : 0))) < 1e-4);
            assert_true(fabs(identity - (i == j)) < 1e-4);
            assert_true(fabs(root_again - root[i * D + j]) < 1e-4);
        }
    memory_free(q);
    arena_free(&scratch);
}

static void metric_of_no_queries_is_the_identity(void **state)
{
    (void)state;
    float sum[4] = {0}, root[4], inverse[4];
    vq_moments h = {.d = 2, .sum = sum};
    vq_metric m = {2, root, inverse};
    arena scratch = {0};
    assert_int_equal(vq_metric_make(&m, &h, 0.5f, 0.05f, &scratch, NULL), QUARRY_OK);
    const float identity[4] = {1, 0, 0, 1};
    assert_memory_equal(root, identity, sizeof identity);
    assert_memory_equal(inverse, identity, sizeof identity);
    arena_free(&scratch);
}

typedef struct trained {
    int d, n, n_sub;
    float *x, *forward, *query, *y, *columns, *centroids;
    int32_t *codes;
    vq_basis basis;
    vq_codebook book;
    vq_points points;
    arena scratch;
} trained;

static trained train(const math_kernels *kernels, int n, int d, int n_sub, bool rotate, uint64_t seed)
{
    trained t = {.d = d, .n = n, .n_sub = n_sub};
    random_state r;
    random_seed(&r, seed);
    size_t cells = (size_t)d * (size_t)d, tokens = (size_t)n;
    int64_t stride = vq_column_stride(n);
    float *q = stretched(&r, 200, d), *sum = memory_zero(cells, sizeof *sum, "test", NULL), *root = normals(&r, cells),
          *inverse = normals(&r, cells);
    t.x = stretched(&r, n, d);
    t.forward = normals(&r, cells);
    t.query = normals(&r, cells);
    t.y = normals(&r, tokens * (size_t)d);
    t.columns = normals(&r, (size_t)d * (size_t)stride);
    t.centroids = normals(&r, (size_t)d * 16);
    t.codes = memory_zero(tokens * (size_t)n_sub, sizeof *t.codes, "test", NULL);
    vq_moments h = {.d = d, .sum = sum};
    vq_moments_add(&h, kernels, q, 200, d);
    vq_metric metric = {d, root, inverse};
    assert_int_equal(vq_metric_make(&metric, &h, 0.5f, 0.05f, &t.scratch, NULL), QUARRY_OK);
    t.basis = (vq_basis){d, t.forward, t.query};
    if (rotate) {
        assert_int_equal(vq_basis_make(&t.basis, kernels, &metric, t.x, n, n_sub, &t.scratch, NULL), QUARRY_OK);
    } else {
        memcpy(t.forward, root, cells * sizeof *root);
        memcpy(t.query, inverse, cells * sizeof *root);
    }
    kernels->retrieval->product(t.x, d, 1, t.forward, d, t.y, d, n, d, d, false);
    vq_transpose(t.y, d, n, d, t.columns, stride);
    t.points = (vq_points){t.y, t.columns, n, d, stride, d};
    t.book = (vq_codebook){d, n_sub, t.centroids};
    assert_int_equal(vq_codebook_train(&t.book, kernels, &t.points, 8, seed, t.codes, &t.scratch, NULL), QUARRY_OK);
    memory_free(q), memory_free(sum), memory_free(root), memory_free(inverse);
    return t;
}

static void untrain(trained *t)
{
    memory_free(t->x), memory_free(t->forward), memory_free(t->query), memory_free(t->y), memory_free(t->columns);
    memory_free(t->centroids), memory_free(t->codes);
    arena_free(&t->scratch);
}

/* Share of the squared length of y that the codes lose. */
static double loss(const trained *t)
{
    int d_sub = t->d / t->n_sub;
    double lost = 0, all = 0;
    for (int i = 0; i < t->n; i++)
        for (int j = 0; j < t->d; j++) {
            int s = j / d_sub, code = t->codes[s * t->n + i];
            double y = t->y[i * t->d + j], e = y - t->centroids[(s * d_sub + j % d_sub) * 16 + code];
            lost += e * e;
            all += y * y;
        }
    return lost / all;
}

static void basis_keeps_inner_products(void **state)
{
    (void)state;
    const int dims[] = {64, 80, 96};
    for (size_t i = 0; i < TEST_COUNT(dims); i++) {
        trained t = train(&scalar, 300, dims[i], dims[i] / 4, true, 4 + i);
        random_state r;
        random_seed(&r, 99);
        float *q = normals(&r, (size_t)t.d);
        for (int k = 0; k < 20; k++) {
            double want = 0, got = 0, size = 0;
            for (int j = 0; j < t.d; j++) {
                double rotated = 0;
                for (int l = 0; l < t.d; l++) rotated += (double)q[l] * t.query[l * t.d + j];
                got += rotated * t.y[k * t.d + j];
                want += (double)q[j] * t.x[k * t.d + j];
                size += fabs((double)q[j] * t.x[k * t.d + j]);
            }
            assert_true(fabs(got - want) < 1e-3 * size);
        }
        memory_free(q);
        untrain(&t);
    }
}

static void balanced_axes_make_better_codes_than_given_ones(void **state)
{
    (void)state;
    trained with = train(&scalar, 600, 32, 8, true, 5), without = train(&scalar, 600, 32, 8, false, 5);
    assert_true(loss(&with) < 0.8 * loss(&without));
    untrain(&with);
    untrain(&without);
}

static void kmeans_finds_planted_clusters(void **state)
{
    (void)state;
    enum { K = 12, EACH = 30, N = K * EACH, D = 20 };
    random_state r;
    random_seed(&r, 6);
    float *centres = normals(&r, K * D), *x = normals(&r, N * D), *columns = normals(&r, (size_t)D * (size_t)vq_column_stride(N)),
          centroids[K * D];
    int32_t assign[N], counts[K], of_planted[K];
    for (int t = 0; t < N; t++)
        for (int i = 0; i < D; i++)
            x[t * D + i] = 0.01f * x[t * D + i] + 10 * centres[t / EACH * D + i]; /* neighbours belong together, as tokens do */
    vq_transpose(x, D, N, D, columns, vq_column_stride(N));
    vq_points points = {x, columns, N, D, vq_column_stride(N), D};
    arena scratch = {0};
    assert_int_equal(vq_kmeans(&scalar, &points, K, 10, 7, centroids, assign, counts, &scratch, NULL), QUARRY_OK);
    for (int c = 0; c < K; c++) {
        of_planted[c] = assign[c * EACH];
        assert_int_equal(counts[of_planted[c]], EACH);
        for (int t = 0; t < EACH; t++) assert_int_equal(assign[c * EACH + t], of_planted[c]);
        for (int b = 0; b < c; b++) assert_int_not_equal(of_planted[b], of_planted[c]);
    }
    memory_free(centres), memory_free(x), memory_free(columns);
    arena_free(&scratch);
}

static void clusters_in_two_levels_are_nearly_as_tight_as_in_one(void **state)
{
    (void)state;
    enum { N = 600, D = 16, K = 48 };
    random_state r;
    random_seed(&r, 20);
    float *x = stretched(&r, N, D), *columns = normals(&r, (size_t)D * (size_t)vq_column_stride(N)), *sums = normals(&r, K * D);
    int32_t one[N], two[N], counts[K], n_clusters = 0;
    vq_transpose(x, D, N, D, columns, vq_column_stride(N));
    vq_points points = {x, columns, N, D, vq_column_stride(N), D};
    arena scratch = {0};
    assert_int_equal(vq_kmeans(&scalar, &points, K, 6, 1, sums, one, counts, &scratch, NULL), QUARRY_OK);
    assert_int_equal(vq_cluster(&scalar, &points, K, 6, 1, two, &n_clusters, &scratch, NULL), QUARRY_OK);
    assert_true(n_clusters > K * 3 / 4 && n_clusters <= K);
    double spread[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        const int32_t *assign = i ? two : one;
        memset(sums, 0, sizeof(float) * K * D);
        memset(counts, 0, sizeof counts);
        for (int t = 0; t < N; t++) {
            assert_true(assign[t] >= 0 && assign[t] < K);
            counts[assign[t]]++;
            for (int j = 0; j < D; j++) sums[assign[t] * D + j] += x[t * D + j];
        }
        for (int t = 0; t < N; t++)
            for (int j = 0; j < D; j++) spread[i] += pow(x[t * D + j] - sums[assign[t] * D + j] / (float)counts[assign[t]], 2);
    }
    if (spread[1] > 1.15 * spread[0]) print_error("%g, not %g\n", spread[1], spread[0]);
    assert_true(spread[1] <= 1.15 * spread[0]);
    memory_free(x), memory_free(columns), memory_free(sums);
    arena_free(&scratch);
}

static void kmeans_survives_more_clusters_than_different_points(void **state)
{
    (void)state;
    enum { K = 16, N = 40, D = 4 };
    float rows[N * D] = {0}, columns[D * 64] = {0}, centroids[K * D];
    for (int t = 0; t < N; t++) rows[t * D] = columns[t] = (float)(t % 3);
    int32_t assign[N], counts[K], total = 0;
    vq_points points = {rows, columns, N, D, 64, D};
    arena scratch = {0};
    assert_int_equal(vq_kmeans(&scalar, &points, K, 5, 1, centroids, assign, counts, &scratch, NULL), QUARRY_OK);
    for (int t = 0; t < N; t++) assert_true(centroids[assign[t] * D] == rows[t * D]);
    for (int c = 0; c < K; c++) total += counts[c];
    assert_int_equal(total, N);
    arena_free(&scratch);
}

static void training_codes_are_the_nearest_centroids(void **state)
{
    (void)state;
    trained t = train(&scalar, 333, 64, 16, true, 8);
    int32_t *codes = memory_zero(333 * 16, sizeof *codes, "test", NULL);
    float values[333];
    vq_encode(&t.book, &scalar, t.columns, t.points.column_stride, t.n, codes, values);
    assert_memory_equal(codes, t.codes, 333 * 16 * sizeof *codes);
    for (int s = 0; s < 16; s++)
        for (int i = 0; i < t.n; i++) {
            double best = INFINITY, mine = 0;
            for (int c = 0; c < 16; c++) {
                double distance = 0;
                for (int j = 0; j < 4; j++) distance += pow((double)t.y[i * 64 + s * 4 + j] - t.centroids[(s * 4 + j) * 16 + c], 2);
                best = distance < best ? distance : best;
                if (c == codes[s * t.n + i]) mine = distance;
            }
            assert_true(mine <= best * 1.0001 + 1e-5);
        }
    memory_free(codes);
    untrain(&t);
}

static void packed_codes_scan_to_the_sums_of_their_tables(void **state)
{
    (void)state;
    enum { N = 77, SUB = 6, FIRST = 13, LANES = 96 };
    random_state r;
    random_seed(&r, 9);
    int32_t codes[SUB * N];
    uint8_t packed[LANES / 2 * SUB], lut[SUB * 16];
    uint16_t offset = 0, out[LANES];
    assert_true(vq_code_bytes(SUB, FIRST + N) == sizeof packed);
    memset(packed, 0xff, sizeof packed); /* lanes are overwritten, others kept */
    for (int i = 0; i < SUB * N; i++) codes[i] = (int32_t)random_below(&r, 16);
    for (int i = 0; i < SUB * 16; i++) lut[i] = (uint8_t)random_below(&r, SCAN_TOP + 1);
    vq_pack(SUB, codes, N, FIRST, packed);
    retrieval_scalar.scan(packed, SUB, LANES / 32, lut, 1, &offset, out, LANES);
    for (int t = 0; t < LANES; t++) {
        int want = 0;
        for (int s = 0; s < SUB; s++) want += lut[s * 16 + (t < FIRST || t >= FIRST + N ? 15 : codes[s * N + t - FIRST])];
        assert_int_equal(out[t], want);
    }
}

static void int8_vectors_are_within_half_a_step(void **state)
{
    (void)state;
    random_state r;
    random_seed(&r, 10);
    float *x = normals(&r, 64);
    int8_t q[64];
    float scale = vq_quantise_i8(x, 64, q);
    for (int i = 0; i < 64; i++) assert_true(fabsf(x[i] - scale * (float)q[i]) <= 0.5001f * scale);
    uint8_t nibbles[32];
    scale = vq_quantise_i4(x, 64, nibbles);
    for (int i = 0; i < 64; i++) {
        int nibble = i < 32 ? nibbles[i] & 15 : nibbles[i - 32] >> 4;
        assert_in_range(nibble, 1, 15);
        assert_true(fabsf(x[i] - scale * (float)(nibble - 8)) <= 0.5001f * scale);
    }
    float zero[8] = {0};
    assert_true(vq_quantise_i4(zero, 8, nibbles) == 0);
    for (int i = 0; i < 4; i++) assert_int_equal(nibbles[i], 0x88);
    assert_true(vq_quantise_i8(zero, 8, q) == 0);
    for (int i = 0; i < 8; i++) assert_int_equal(q[i], 0);
    memory_free(x);
}

static void failed_allocations_are_reported(void **state)
{
    (void)state;
    trained t = train(&scalar, 64, 16, 4, true, 11);
    float centroids[8 * 16];
    int32_t assign[64], counts[8];
    arena empty = {0};
    quarry_error error;
    memory_fail_after(0);
    assert_int_equal(vq_kmeans(&scalar, &t.points, 8, 2, 1, centroids, assign, counts, &empty, &error), QUARRY_ERROR_MEMORY);
    assert_int_equal(vq_codebook_train(&t.book, &scalar, &t.points, 2, 1, NULL, &empty, &error), QUARRY_ERROR_MEMORY);
    vq_metric metric = {16, t.forward, t.query};
    assert_int_equal(vq_basis_make(&t.basis, &scalar, &metric, t.x, 64, 4, &empty, &error), QUARRY_ERROR_MEMORY);
    memory_fail_after(-1);
    arena_free(&empty);
    untrain(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(eigenvectors_diagonalise),
        cmocka_unit_test(eigenvalues_of_nonsense_are_an_error),
        cmocka_unit_test(moments_sum_outer_products_of_strided_queries),
        cmocka_unit_test(metric_is_a_power_of_the_moments),
        cmocka_unit_test(metric_of_no_queries_is_the_identity),
        cmocka_unit_test(basis_keeps_inner_products),
        cmocka_unit_test(balanced_axes_make_better_codes_than_given_ones),
        cmocka_unit_test(kmeans_finds_planted_clusters),
        cmocka_unit_test(clusters_in_two_levels_are_nearly_as_tight_as_in_one),
        cmocka_unit_test(kmeans_survives_more_clusters_than_different_points),
        cmocka_unit_test(training_codes_are_the_nearest_centroids),
        cmocka_unit_test(packed_codes_scan_to_the_sums_of_their_tables),
        cmocka_unit_test(int8_vectors_are_within_half_a_step),
        cmocka_unit_test(failed_allocations_are_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
