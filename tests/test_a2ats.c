/* The policy a2ats and its codebook file against the definitions written out in double (arXiv 2502.12665). */
#include "test.h"

#include <math.h>
#include <unistd.h>

#include "attn/attn.h"
#include "vq/vq.h"

enum { DIM = 16, GROUP = 3, CENTROIDS = 24, N = 700, DISTANCE = 300 };

static const double inverse[DIM / 2] = {1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003};
static const attn_shape shape = {.kv = {.n_layer = 1, .n_head_kv = 1, .head_dim = DIM, .type = KV_F32},
                                 .n_head = GROUP,
                                 .scale = 0.25f,
                                 .rope = {.n_rot = DIM, .halves = true, .inverse = inverse},
                                 .fingerprint = 77};

static void make_file(const char *path, codebook_type type, long flip, long cut)
{
    const codebook_header h = {.fingerprint = 77,
                               .n_layer = 1,
                               .n_head_kv = 1,
                               .head_dim = DIM,
                               .n_centroids = CENTROIDS,
                               .distance = DISTANCE,
                               .type = type,
                               .exponent = 1};
    float lower[DIM * DIM], centroids[CENTROIDS * DIM];
    random_state r;
    random_seed(&r, 5);
    for (int i = 0; i < DIM * DIM; i++) lower[i] = i / DIM == i % DIM ? 1.5f : i % DIM < i / DIM ? 0.1f * (float)random_normal(&r) : 0;
    for (int i = 0; i < CENTROIDS * DIM; i++) centroids[i] = (float)random_normal(&r);
    void *stored = malloc(codebook_centroid_bytes(&h));
    codebook_head head = {.lower = lower, .iterations = 3};
    codebook_head_place(&h, stored, &head);
    codebook_quantise(&h, math_kernels_get(cpu_detect()), centroids, &head);
    const size_t n = CODEBOOK_HEADER + codebook_record_bytes(&h);
    uint8_t *bytes = calloc(n, 1);
    codebook_header_pack(&h, bytes);
    codebook_record_pack(&h, &head, bytes + CODEBOOK_HEADER);
    if (flip >= 0) bytes[flip] ^= 4;
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n - (size_t)cut, f), n - (size_t)cut);
    fclose(f);
    free(bytes);
    free(stored);
}

/* x turned by `by` positions, in double */
static void turn(const float *x, double by, double *out)
{
    for (int i = 0; i < DIM / 2; i++) {
        const double c = cos(by * inverse[i]), s = sin(by * inverse[i]);
        out[i] = x[i] * c - x[i + DIM / 2] * s;
        out[i + DIM / 2] = x[i] * s + x[i + DIM / 2] * c;
    }
}

static char path[64], spec[128];

static int make_path(void **state)
{
    (void)state;
    snprintf(path, sizeof path, "test_a2ats.%d.codebook", (int)getpid());
    snprintf(spec, sizeof spec, "a2ats:budget=0.1,codebook=%s", path);
    return 0;
}

static int remove_path(void **state)
{
    (void)state;
    unlink(path);
    return 0;
}

/* Rows of N tokens, of eight kinds that differ more or less. */
static kv_seq *random_rows(const math_kernels *kernels, random_state *r, float kinds)
{
    float kind[8][DIM];
    for (int i = 0; i < 8 * DIM; i++) kind[i / DIM][i % DIM] = kinds * (float)random_normal(r);
    kv_seq *kv = kv_create(&shape.kv, NULL);
    assert_int_equal(kv_reserve(kv, N, NULL), QUARRY_OK);
    for (int64_t pos = 0; pos < N; pos++) {
        float k[DIM], v[DIM];
        const float *of = kind[random_below(r, 8)];
        for (int i = 0; i < DIM; i++) k[i] = of[i] + (float)random_normal(r);
        for (int i = 0; i < DIM; i++) v[i] = of[i] + 0.5f * (float)random_normal(r);
        kv_write(kernels, kv_row(kv, 0, 0, pos), &shape.kv, k, v);
    }
    kv_commit(kv, N);
    return kv;
}

/* Codes by definition: nearest centroid of the key before RoPE under H = L L'. */
static int naive_code(const kv_seq *kv, int64_t pos, const float *lower, const float *c)
{
    double key[DIM], best = INFINITY;
    int code = 0;
    turn(kv_row(kv, 0, 0, pos), -(double)pos, key);
    for (int j = 0; j < CENTROIDS; j++) {
        double distance = 0;
        for (int b = 0; b < DIM; b++) {
            double sum = 0;
            for (int a = 0; a < DIM; a++) sum += (key[a] - (double)c[j * DIM + a]) * (double)lower[a * DIM + b];
            distance += sum * sum;
        }
        if (distance < best) {
            best = distance;
            code = j;
        }
    }
    return code;
}

/* A choice, and how it is written; `near` is what the rows read anyway add up to. */
typedef struct choice {
    const char *spec;
    double budget, threshold, mass, max;
    bool shared;
    int64_t window;
} choice;

static const float near_max[GROUP] = {0.5f, -1, 2}, near_sum[GROUP] = {10, 30, 3};

/* Marks the best of the far tokens with score[CENTROIDS] (log weights if it matters), one after the other: by score, then centroid, then the newer. */
static void naive_walk(const int *codes, int64_t end, const double *score, int64_t least, int64_t most, double light, double mass,
                       bool *chosen)
{
    bool taken[N] = {false};
    double held = 0;
    for (int64_t k = 0; k < end - ATTN_SINKS; k++) {
        int64_t best = -1;
        for (int64_t t = ATTN_SINKS; t < end; t++)
            if (!taken[t] && (best < 0 || score[codes[t]] >= score[codes[best]])) best = t;
        const bool wanted = k < least || (k < most && (score[codes[best]] >= light || held < mass));
        if (!wanted) return;
        taken[best] = chosen[best] = true;
        held += exp(score[codes[best]]);
    }
}

/* Which far tokens are chosen, every one scored by itself. */
static void naive_selection(const int *codes, int64_t n_far, int64_t pos, const float *q, const float *c, const choice *o, bool *chosen)
{
    const int64_t end = N - o->window < n_far ? N - o->window : n_far;
    const double far = (double)(end - ATTN_SINKS);
    const int64_t least = o->mass > 0 ? 0 : (int64_t)(o->budget * far),
                  most = o->mass > 0 || o->threshold > 0 ? (int64_t)(o->max * far) : 0;
    const double light = o->threshold > 0 ? log(o->threshold) : INFINITY;
    double largest[CENTROIDS];
    for (int j = 0; j < CENTROIDS; j++) largest[j] = -INFINITY;
    for (int64_t t = 0; t < N; t++) chosen[t] = t >= end && t < n_far;
    for (int g = 0; g < GROUP; g++) {
        double turned[DIM], score[CENTROIDS] = {0}, near = (double)near_sum[g] * exp((double)near_max[g]), all = near;
        turn(q + g * DIM, (double)(DISTANCE - pos), turned);
        for (int j = 0; j < CENTROIDS; j++)
            for (int i = 0; i < DIM; i++) score[j] += turned[i] * (double)c[j * DIM + i] * (double)shape.scale;
        for (int64_t t = ATTN_SINKS; t < n_far; t++) all += exp(score[codes[t]]);
        for (int j = 0; j < CENTROIDS; j++) {
            score[j] -= log(all);
            largest[j] = fmax(largest[j], score[j]);
        }
        if (!o->shared) naive_walk(codes, end, score, least, most, light, o->mass - near / all, chosen);
    }
    if (o->shared) naive_walk(codes, end, largest, least, most, light, 0, chosen);
}

/* Returns how many it selects. */
static int64_t selects(const attn_policy *p, const kv_seq *kv, const int *codes, const float *c, random_state *r, const choice *o)
{
    arena scratch = {0};
    float q[GROUP * DIM], m[GROUP], l[GROUP];
    bool chosen[N];
    attn_selection sel;
    attn_cost cost = {0};
    memcpy(m, near_max, sizeof m);
    memcpy(l, near_sum, sizeof l);
    const attention_state near = {m, l, NULL};
    for (int i = 0; i < GROUP * DIM; i++) q[i] = (float)random_normal(r);
    assert_int_equal(p->type->select(p, 0, 0, kv, q, N - 1, &near, &scratch, &sel, &cost, NULL), QUARRY_OK);
    naive_selection(codes, p->n_far, N - 1, q, c, o, chosen);
    int64_t n = 0;
    for (int64_t t = 0; t < N; t++) n += chosen[t];
    assert_int_equal(sel.n, n);
    for (int64_t i = 0; i < n; i++) {
        assert_true(chosen[sel.ids[i]]);
        chosen[sel.ids[i]] = false;
    }
    assert_true(cost.index_bytes > 0 && cost.table_bytes > 0);
    arena_free(&scratch);
    return n;
}

/* What a codebook file holds, as f32, and the codes of the first n tokens by it. */
static void read_file(const kv_seq *kv, int64_t n, float *c, int *codes)
{
    size_t n_bytes;
    uint8_t *bytes = (uint8_t *)file_read_all(path, &n_bytes, NULL);
    float lower[DIM * DIM];
    codebook_header h;
    codebook_head head = {.lower = lower};
    assert_int_equal(codebook_header_parse(&h, bytes, n_bytes, path, NULL), QUARRY_OK);
    void *stored = malloc(codebook_centroid_bytes(&h));
    codebook_head_place(&h, stored, &head);
    assert_true(codebook_record_parse(&h, bytes + CODEBOOK_HEADER, &head));
    codebook_expand(&h, math_kernels_get(cpu_detect()), &head, c);
    for (int64_t t = ATTN_SINKS; t < n; t++) codes[t] = naive_code(kv, t, lower, c);
    free(stored);
    memory_free(bytes);
}

static const choice plain = {"budget=0.1", 0.1, 0, 0, 0.3, false, 0};

static attn_policy *open_policy(const choice *o, const char *more)
{
    char text[256];
    quarry_error e = {0};
    snprintf(text, sizeof text, "a2ats:codebook=%s,%s%s", path, o->spec, more);
    attn_policy *p = attn_policy_create(text, &shape, math_kernels_get(cpu_detect()), &e);
    if (!p) fail_msg("%s", e.message);
    return p;
}

static void lists_give_what_scoring_every_token_gives(codebook_type type)
{
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    thread_pool *pool = thread_pool_create(2, NULL);
    arena scratch[2] = {{0}};
    random_state r;
    random_seed(&r, 9);
    make_file(path, type, -1, 0);
    kv_seq *kv = random_rows(kernels, &r, 0);
    attn_policy *p = open_policy(&plain, "");
    float c[CENTROIDS * DIM];
    int codes[N] = {0};
    read_file(kv, N, c, codes);
    assert_int_equal(attn_index_advance(p, kv, pool, scratch, NULL), QUARRY_OK);
    for (int i = 0; i < 20; i++) selects(p, kv, codes, c, &r, &plain);
    attn_policy *fork = p->type->fork(p, NULL);
    p->type->truncate(p, 333); /* and grows again */
    for (int i = 0; i < 20; i++) selects(p, kv, codes, c, &r, &plain);
    assert_int_equal(attn_index_advance(p, kv, pool, scratch, NULL), QUARRY_OK);
    selects(p, kv, codes, c, &r, &plain);
    attn_policy_destroy(p);
    selects(fork, kv, codes, c, &r, &plain);
    attn_policy_destroy(fork);
    const choice choices[] = {{"budget=1", 1, 0, 0, 0.3, false, 0},
                              {"budget=0.05,shared=1", 0.05, 0, 0, 0.3, true, 0},
                              {"budget=0.02,threshold=0.003", 0.02, 0.003, 0, 0.3, false, 0},
                              {"budget=0.02,threshold=0.003,shared=1", 0.02, 0.003, 0, 0.3, true, 0},
                              {"threshold=0.0001,max=0.1", 0.03, 0.0001, 0, 0.1, false, 0},
                              {"mass=0.7", 0.03, 0, 0.7, 0.3, false, 0},
                              {"mass=0.9,max=0.04", 0.03, 0, 0.9, 0.04, false, 0},
                              {"window=200,budget=0.1", 0.1, 0, 0, 0.3, false, 200},
                              {"window=600,shared=1", 0.03, 0, 0, 0.3, true, 600}};
    for (size_t i = 0; i < TEST_COUNT(choices); i++) {
        int64_t least = N, most = 0;
        p = open_policy(&choices[i], "");
        assert_int_equal(attn_index_seal(p, kv, pool, scratch, NULL), QUARRY_OK);
        for (int k = 0; k < 20; k++) {
            const int64_t n = selects(p, kv, codes, c, &r, &choices[i]);
            least = n < least ? n : least;
            most = n > most ? n : most;
        }
        if (i == 2 || i == 3 || i == 5) assert_true(least < most); /* the weights decide */
        attn_policy_destroy(p);
    }
    kv_destroy(kv);
    thread_pool_destroy(pool);
    arena_free(&scratch[0]);
    arena_free(&scratch[1]);
}

static void lists_of_f16_centroids(void **state)
{
    (void)state;
    lists_give_what_scoring_every_token_gives(CODEBOOK_F16);
}

static void lists_of_int8_centroids(void **state)
{
    (void)state;
    lists_give_what_scoring_every_token_gives(CODEBOOK_INT8);
}

/* Relative distance of one step's output to attention over everything, in double; what was read and estimated in *cost. */
static double error_of_step(attn_policy *p, const kv_seq *kv, const float *q, thread_pool *pool, arena *scratch, attn_cost *cost)
{
    arena shared = {0};
    float out[GROUP * DIM];
    double e = 0, size = 0;
    const attn_row row = {.kv = kv, .policy = p, .pos = N - 1};
    const attn_context context = {math_kernels_get(cpu_detect()), pool, scratch, &shared};
    assert_int_equal(attn_forward(&context, &shape, 0, &row, 1, q, out, cost, NULL), QUARRY_OK);
    for (int g = 0; g < GROUP; g++) {
        double sum = 0, want[DIM] = {0};
        for (int64_t t = 0; t < N; t++) {
            const float *k = kv_row(kv, 0, 0, t);
            double score = 0;
            for (int i = 0; i < DIM; i++) score += (double)q[g * DIM + i] * (double)k[i];
            sum += exp(score * (double)shape.scale);
            for (int i = 0; i < DIM; i++) want[i] += exp(score * (double)shape.scale) * (double)k[DIM + i];
        }
        for (int i = 0; i < DIM; i++) {
            e += pow((double)out[g * DIM + i] - want[i] / sum, 2);
            size += pow(want[i] / sum, 2);
        }
    }
    arena_free(&shared);
    return sqrt(e / size);
}

static void the_tail_estimates_what_was_left(void **state)
{
    (void)state;
    thread_pool *pool = thread_pool_create(2, NULL);
    arena scratch[2] = {{0}};
    random_state r;
    random_seed(&r, 12);
    make_file(path, CODEBOOK_F16, -1, 0);
    kv_seq *kv = random_rows(math_kernels_get(cpu_detect()), &r, 2);
    double error[3] = {0};
    for (int tail = 0; tail < 3; tail++) { /* without, with, and a fork that was cut and has grown again */
        attn_policy *p = open_policy(&plain, tail ? ",tail=1" : "");
        random_seed(&r, 13);
        float *q = calloc((size_t)N * GROUP * DIM, sizeof *q);
        for (int i = 0; i < N * GROUP * DIM; i++) q[i] = (float)random_normal(&r);
        p->type->observe(p, 0, 0, q, 0, N);
        assert_int_equal(attn_index_seal(p, kv, pool, scratch, NULL), QUARRY_OK);
        if (tail == 2) {
            attn_policy *fork = p->type->fork(p, NULL);
            assert_non_null(fork);
            assert_true(attn_policy_bytes(fork) > 0);
            attn_policy_destroy(p);
            p = fork;
            p->type->truncate(p, 400);
            assert_int_equal(attn_index_seal(p, kv, pool, scratch, NULL), QUARRY_OK);
        }
        for (int i = 0; i < 20; i++) {
            attn_cost cost = {0};
            error[tail] += error_of_step(p, kv, q + i * GROUP * DIM, pool, scratch, &cost);
            assert_int_equal(cost.tail_bytes > 0, tail > 0);
        }
        free(q);
        attn_policy_destroy(p);
    }
    if (!(error[1] < error[0] / 2 && error[2] < error[0] / 2)) print_error("%g without, %g and %g with\n", error[0], error[1], error[2]);
    assert_true(error[1] < error[0] / 2 && error[2] < error[0] / 2);
    kv_destroy(kv);
    thread_pool_destroy(pool);
    arena_free(&scratch[0]);
    arena_free(&scratch[1]);
}

static void allocations_fail_one_by_one(const char *policy)
{
    quarry_error e;
    for (int i = 0;; i++) { /* no leak, no crash: the sanitizers look */
        memory_fail_after(i);
        attn_policy *p = attn_policy_create(policy, &shape, math_kernels_get(cpu_detect()), &e);
        memory_fail_after(-1);
        if (p) {
            assert_true(i > 5);
            attn_policy_destroy(p);
            return;
        }
        assert_int_equal(e.code, QUARRY_ERROR_MEMORY);
    }
}

static void wrong_files_are_refused(void **state)
{
    (void)state;
    const struct {
        long flip, cut;
        quarry_code code;
        const char *says;
    } cases[] = {{0, 0, QUARRY_ERROR_FORMAT, "not a codebook"}, {8, 0, QUARRY_ERROR_UNSUPPORTED, "version 6"},
                 {60, 0, QUARRY_ERROR_FORMAT, "header"},        {CODEBOOK_HEADER + 9, 0, QUARRY_ERROR_FORMAT, "layer 0, head 0"},
                 {-1, 1, QUARRY_ERROR_FORMAT, "bytes"},         {-1, CODEBOOK_HEADER, QUARRY_ERROR_FORMAT, "bytes"}};
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    quarry_error e;
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        make_file(path, CODEBOOK_F16, cases[i].flip, cases[i].cut);
        assert_null(attn_policy_create(spec, &shape, kernels, &e));
        assert_int_equal(e.code, cases[i].code);
        assert_non_null(strstr(e.message, cases[i].says));
    }
    make_file(path, CODEBOOK_F16, -1, 0);
    attn_shape other = shape;
    other.fingerprint = 78;
    assert_null(attn_policy_create(spec, &other, kernels, &e));
    assert_non_null(strstr(e.message, "another model"));
    other = shape;
    other.kv.n_layer = 2;
    assert_null(attn_policy_create(spec, &other, kernels, &e));
    assert_non_null(strstr(e.message, "2 of 1"));
    assert_null(attn_policy_create("a2ats", &shape, kernels, &e));
    assert_non_null(strstr(e.message, "codebook=FILE"));
    make_file(path, CODEBOOK_F16, -1, 0);
    allocations_fail_one_by_one(spec);
    make_file(path, CODEBOOK_INT8, -1, 0);
    char with_tail[sizeof spec + 8];
    snprintf(with_tail, sizeof with_tail, "%s,tail=1", spec);
    allocations_fail_one_by_one(with_tail);
}

static void cholesky_gives_the_normalised_moments(void **state)
{
    (void)state;
    double h[DIM * DIM] = {0}, squares = 0;
    float lower[DIM * DIM], inverted[DIM * DIM];
    arena scratch = {0};
    random_state r;
    random_seed(&r, 3);
    for (int n = 0; n < DIM / 2; n++) { /* of half the rank */
        double x[DIM];
        for (int i = 0; i < DIM; i++) x[i] = random_normal(&r);
        for (int i = 0; i < DIM * DIM; i++) h[i] += x[i / DIM] * x[i % DIM];
    }
    for (int i = 0; i < DIM * DIM; i++) squares += h[i] * h[i];
    assert_int_equal(vq_cholesky(DIM, h, 1e-2, lower, inverted, &scratch, NULL), QUARRY_OK);
    for (int i = 0; i < DIM; i++)
        for (int j = 0; j < DIM; j++) {
            double product = 0, one = 0;
            for (int k = 0; k < DIM; k++) {
                product += (double)lower[i * DIM + k] * (double)lower[j * DIM + k];
                one += (double)lower[i * DIM + k] * (double)inverted[k * DIM + j];
            }
            assert_true(fabs(product - h[i * DIM + j] / sqrt(squares / (DIM * DIM)) - (i == j ? 1e-2 : 0)) < 1e-5);
            assert_true(fabs(one - (i == j)) < 1e-4);
        }
    h[0] = -1;
    assert_int_equal(vq_cholesky(DIM, h, 1e-2, lower, inverted, &scratch, NULL), QUARRY_ERROR_UNSUPPORTED);
    arena_free(&scratch);
}

/* root^2 = M^(1/2) has the square M; 0 and moments of nothing give the identity, 1 what Cholesky gives. */
static void powers_of_the_metric(void **state)
{
    (void)state;
    double h[DIM * DIM] = {0}, none[DIM * DIM] = {0}, squares = 0, power[DIM * DIM] = {0}, m[DIM * DIM] = {0};
    float root[DIM * DIM], inverted[DIM * DIM], lower[DIM * DIM];
    arena scratch = {0};
    random_state r;
    random_seed(&r, 6);
    for (int n = 0; n < 3 * DIM; n++) {
        double x[DIM];
        for (int i = 0; i < DIM; i++) x[i] = 100 * random_normal(&r);
        for (int i = 0; i < DIM * DIM; i++) h[i] += x[i / DIM] * x[i % DIM];
    }
    for (int i = 0; i < DIM * DIM; i++) squares += h[i] * h[i];
    assert_int_equal(vq_root(DIM, h, 0.5, 0.1, root, inverted, &scratch, NULL), QUARRY_OK);
    for (int i = 0; i < DIM * DIM; i++)
        for (int k = 0; k < DIM; k++) power[i] += (double)root[i / DIM * DIM + k] * (double)root[k * DIM + i % DIM];
    for (int i = 0; i < DIM * DIM; i++)
        for (int k = 0; k < DIM; k++) m[i] += power[i / DIM * DIM + k] * power[k * DIM + i % DIM];
    const double factor = m[0] / (h[0] / sqrt(squares / (DIM * DIM)) + 0.1);
    for (int i = 0; i < DIM * DIM; i++) {
        const double wanted = h[i] / sqrt(squares / (DIM * DIM)) + (i / DIM == i % DIM ? 0.1 : 0);
        assert_true(fabs(m[i] / factor - wanted) < 1e-4);
    }
    for (int i = 0; i < 3; i++) {
        assert_int_equal(vq_root(DIM, i ? none : h, i / 2.0, 0.1, root, inverted, &scratch, NULL), QUARRY_OK);
        for (int j = 0; j < DIM * DIM; j++) assert_true(root[j] == (float)(j / DIM == j % DIM) && inverted[j] == root[j]);
    }
    assert_int_equal(vq_root(DIM, h, 1, 1e-6, root, inverted, &scratch, NULL), QUARRY_OK);
    assert_int_equal(vq_cholesky(DIM, h, 1e-6, lower, inverted, &scratch, NULL), QUARRY_OK);
    assert_memory_equal(root, lower, sizeof root);
    arena_free(&scratch);
}

static void kmeans_ends_at_a_fixed_point(void **state)
{
    (void)state;
    enum { POINTS = 400, K = 20 };
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    float rows[POINTS * DIM], columns[DIM * (POINTS + 32)], centroids[K * DIM];
    int32_t assign[POINTS];
    int used;
    arena scratch = {0};
    random_state r;
    random_seed(&r, 4);
    for (int i = 0; i < POINTS * DIM; i++) rows[i] = (float)random_normal(&r) + (float)(i / DIM % 20) * (i % DIM == 0 ? 3 : 0);
    const vq_points x = {rows, columns, POINTS, DIM, vq_column_stride(POINTS), DIM};
    vq_transpose(rows, DIM, POINTS, DIM, columns, x.column_stride);
    assert_int_equal(vq_kmeans_converge(kernels, &x, K, 300, 1, centroids, assign, &used, &scratch, NULL), QUARRY_OK);
    assert_true(used > 1 && used < 300);
    for (int j = 0; j < K; j++) {
        double mean[DIM] = {0};
        int n = 0;
        for (int t = 0; t < POINTS; t++)
            for (int i = 0; assign[t] == j && i < DIM; i++) {
                mean[i] += rows[t * DIM + i];
                n += i == 0;
            }
        assert_true(n > 0);
        for (int i = 0; i < DIM; i++) assert_true(fabs(mean[i] / n - (double)centroids[j * DIM + i]) < 1e-5);
    }
    for (int t = 0; t < POINTS; t++) {
        double distance[K] = {0};
        for (int j = 0; j < K; j++)
            for (int i = 0; i < DIM; i++) distance[j] += pow((double)rows[t * DIM + i] - (double)centroids[j * DIM + i], 2);
        for (int j = 0; j < K; j++) assert_true(distance[assign[t]] <= distance[j] + 1e-4);
    }
    arena_free(&scratch);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists_of_f16_centroids),
        cmocka_unit_test(lists_of_int8_centroids),
        cmocka_unit_test(the_tail_estimates_what_was_left),
        cmocka_unit_test(wrong_files_are_refused),
        cmocka_unit_test(cholesky_gives_the_normalised_moments),
        cmocka_unit_test(powers_of_the_metric),
        cmocka_unit_test(kmeans_ends_at_a_fixed_point),
    };
    return cmocka_run_group_tests(tests, make_path, remove_path);
}
