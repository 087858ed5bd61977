/* The policies that score every token: what they read against their definitions written out in double precision, that reading everything is
 * full attention, and that cutting, sharing, threads and failures leave them whole. */
#include "test.h"

#include <math.h>
#include <stdatomic.h>

#include "attn/scored.h"

enum { DIM = 32, GROUP = 2, HEADS_KV = 2, N_HEAD = GROUP * HEADS_KV, MOST = 1600 };

static const math_kernels *kernels;
static const attn_shape shape = {
    .kv = {.n_layer = 1, .n_head_kv = HEADS_KV, .head_dim = DIM, .type = KV_F32}, .n_head = N_HEAD, .scale = 0.17677669f};

typedef struct world {
    kv_seq *kv;
    thread_pool *pool;
    arena scratch[4], shared;
    random_state random;
} world;

/* Rows of the positions [first, n), in eight clusters. */
static void write_rows(world *w, int64_t first, int64_t n)
{
    float centre[8][DIM], k[DIM], v[DIM];
    for (int c = 0; c < 8; c++)
        for (int i = 0; i < DIM; i++) centre[c][i] = 1.5f * (float)random_normal(&w->random);
    assert_int_equal(kv_reserve(w->kv, n, NULL), QUARRY_OK);
    for (int64_t pos = first; pos < n; pos++)
        for (int head = 0; head < HEADS_KV; head++) {
            const float *near = centre[random_below(&w->random, 8)];
            for (int i = 0; i < DIM; i++) {
                k[i] = 0.7f + near[i] + (float)random_normal(&w->random);
                v[i] = 0.5f * near[i] + (float)random_normal(&w->random);
            }
            kv_write(kernels, kv_row(w->kv, 0, head, pos), &shape.kv, k, v);
        }
}

static world open_world(int threads, int64_t n, uint64_t seed)
{
    world w = {.kv = kv_create(&shape.kv, NULL), .pool = thread_pool_create(threads, NULL)};
    assert_non_null(w.kv);
    assert_non_null(w.pool);
    random_seed(&w.random, seed);
    write_rows(&w, 0, n);
    return w;
}

static void close_world(world *w)
{
    kv_destroy(w->kv);
    thread_pool_destroy(w->pool);
    for (int i = 0; i < 4; i++) arena_free(&w->scratch[i]);
    arena_free(&w->shared);
}

static attn_policy *make(const char *spec)
{
    quarry_error e = {0};
    attn_policy *p = attn_policy_create(spec, &shape, kernels, &e);
    if (!p) print_error("%s: %s\n", spec, e.message);
    assert_non_null(p);
    return p;
}

/* Tokens up to n in batches, with some queries observed; then sealed. */
static void read_to(world *w, attn_policy *p, int64_t n, int64_t batch)
{
    float *q = calloc((size_t)(batch * GROUP * DIM), sizeof *q);
    for (int64_t first = kv_length(w->kv); first < n; first += batch) {
        int64_t end = first + batch < n ? first + batch : n;
        for (int head = 0; head < HEADS_KV && p->type->observe; head++) {
            random_state r;
            random_seed(&r, (uint64_t)(first * HEADS_KV + head));
            for (int64_t i = 0; i < (end - first) * GROUP * DIM; i++) q[i] = (float)random_normal(&r);
            p->type->observe(p, 0, head, q, first, end - first);
        }
        kv_commit(w->kv, end);
        assert_int_equal(attn_index_advance(p, w->kv, w->pool, w->scratch, NULL), QUARRY_OK);
    }
    assert_int_equal(attn_index_seal(p, w->kv, w->pool, w->scratch, NULL), QUARRY_OK);
    free(q);
}

/* One step's output and what was read. */
typedef struct outcome {
    float out[N_HEAD * DIM];
    bool read[HEADS_KV][MOST];
    attn_cost cost;
} outcome;

static void listen(void *data, const attn_reading *r, arena *scratch)
{
    outcome *o = data;
    (void)scratch;
    for (int64_t pos = 0; pos <= r->pos; pos++) o->read[r->head][pos] = pos < r->n_sinks || pos >= r->far_end || r->selected->all;
    for (int64_t i = 0; !r->selected->all && i < r->selected->n; i++) {
        int64_t id = r->selected->ids[i];
        assert_true(id >= r->n_sinks && id < r->far_end && !o->read[r->head][id]);
        o->read[r->head][id] = true;
    }
}

static void step(world *w, attn_policy *p, const float *q, outcome *o)
{
    memset(o, 0, sizeof *o);
    const attn_observer observer = {listen, o};
    const attn_row row = {.kv = w->kv, .policy = p, .pos = kv_length(w->kv) - 1, .observer = &observer};
    const attn_context c = {kernels, w->pool, w->scratch, &w->shared};
    quarry_error e = {0};
    assert_int_equal(attn_forward(&c, &shape, 0, &row, 1, q, o->out, &o->cost, &e), QUARRY_OK);
}

static void query(world *w, float *q)
{
    for (int i = 0; i < N_HEAD * DIM; i++) q[i] = 1.5f * (float)random_normal(&w->random);
}

static const float *key(const world *w, int head, int64_t pos)
{
    return kv_row(w->kv, 0, head, pos);
}

static double score(const world *w, const float *q, int h, int64_t pos)
{
    double sum = 0;
    for (int i = 0; i < DIM; i++) sum += (double)q[h * DIM + i] * (double)key(w, h / GROUP, pos)[i];
    return sum * (double)shape.scale;
}

/* Attention of head h over what `read` says, in double. */
static void attend(const world *w, const float *q, int h, const bool *read, double *out)
{
    double l = 0, top = -INFINITY;
    for (int64_t pos = 0; pos < kv_length(w->kv); pos++) top = fmax(top, score(w, q, h, pos));
    for (int i = 0; i < DIM; i++) out[i] = 0;
    for (int64_t pos = 0; pos < kv_length(w->kv); pos++) {
        if (read && !read[pos]) continue;
        double e = exp(score(w, q, h, pos) - top);
        l += e;
        for (int i = 0; i < DIM; i++) out[i] += e * (double)key(w, h / GROUP, pos)[DIM + i];
    }
    for (int i = 0; i < DIM; i++) out[i] /= l;
}

/* Relative difference of a step's output to attention over what it read (all: over everything). */
static double difference(const world *w, const float *q, const outcome *o, bool all)
{
    double e = 0, size = 0, want[DIM];
    for (int h = 0; h < N_HEAD; h++) {
        attend(w, q, h, all ? NULL : o->read[h / GROUP], want);
        for (int i = 0; i < DIM; i++) {
            e += pow((double)o->out[h * DIM + i] - want[i], 2);
            size += pow(want[i], 2);
        }
    }
    return sqrt(e / size);
}

static void a_budget_of_everything_is_full_attention(void **state)
{
    (void)state;
    for (int i = 0; attn_policies[i]; i++) {
        const char *name = attn_policies[i]->name;
        if (strcmp(name, "window") == 0 || strcmp(name, "magicpig") == 0 || strcmp(name, "a2ats") == 0)
            continue; /* no budget; a codebook is needed (test_a2ats.c) */
        char spec[64];
        snprintf(spec, sizeof spec, "%s%s", name, strcmp(name, "full") == 0 ? "" : ":budget=1");
        world w = open_world(2, 900, 1);
        attn_policy *p = make(spec);
        read_to(&w, p, 900, 128);
        float q[N_HEAD * DIM];
        query(&w, q);
        outcome o;
        step(&w, p, q, &o);
        if (difference(&w, q, &o, true) > 1e-5) print_error("%s\n", spec);
        assert_true(difference(&w, q, &o, true) <= 1e-5);
        attn_policy_destroy(p);
        close_world(&w);
    }
}

/* What each policy estimates, written out. */
typedef double (*naive_score)(const world *w, const attn_policy *p, const float *q, int h, int64_t t);

static double naive_oracle(const world *w, const attn_policy *p, const float *q, int h, int64_t t)
{
    (void)p;
    return score(w, q, h, ATTN_SINKS + t);
}

static void page_of(const attn_policy *p, int64_t t, int64_t *first, int64_t *end)
{
    *first = ATTN_SINKS + t / 16 * 16;
    *end = *first + 16 < p->n_far ? *first + 16 : p->n_far;
}

static double naive_quest(const world *w, const attn_policy *p, const float *q, int h, int64_t t)
{
    int64_t first, end;
    double sum = 0;
    page_of(p, t, &first, &end);
    for (int i = 0; i < DIM; i++) {
        double low = INFINITY, high = -INFINITY;
        for (int64_t pos = first; pos < end; pos++) {
            low = fmin(low, (double)key(w, h / GROUP, pos)[i]);
            high = fmax(high, (double)key(w, h / GROUP, pos)[i]);
        }
        sum += fmax((double)q[h * DIM + i] * low, (double)q[h * DIM + i] * high);
    }
    return sum * (double)shape.scale;
}

static double naive_meanstd(const world *w, const attn_policy *p, const float *q, int h, int64_t t)
{
    int64_t first, end;
    double sum = 0, spread = 0;
    page_of(p, t, &first, &end);
    for (int i = 0; i < DIM; i++) {
        double mean = 0, square = 0;
        for (int64_t pos = first; pos < end; pos++) {
            double x = (double)key(w, h / GROUP, pos)[i];
            mean += x / (double)(end - first);
            square += x * x / (double)(end - first);
        }
        sum += (double)q[h * DIM + i] * mean;
        spread += pow((double)q[h * DIM + i], 2) * (square - mean * mean);
    }
    return (sum + 2 * sqrt(spread)) * (double)shape.scale;
}

/* The mean key of the token's block of 128. */
static double naive_rekv(const world *w, const attn_policy *p, const float *q, int h, int64_t t)
{
    const int64_t first = ATTN_SINKS + t / 128 * 128, end = first + 128 < p->n_far ? first + 128 : p->n_far;
    double sum = 0;
    for (int64_t pos = first; pos < end; pos++) sum += score(w, q, h, pos);
    return sum / (double)(end - first);
}

/* The nearest centroid of each sub-vector in the place of the key. */
static double naive_pqcache(const world *w, const attn_policy *policy, const float *q, int h, int64_t t)
{
    const scored *p = (const scored *)policy;
    enum { SUB = 4, WIDTH = DIM / SUB, CENTROIDS = 16 };
    const float *centroids = (const float *)(p->tables + (size_t)(h / GROUP) * p->table_bytes);
    double sum = 0;
    for (int s = 0; s < SUB; s++) {
        double nearest = INFINITY, dot = 0;
        for (int c = 0; c < CENTROIDS; c++) {
            double distance = 0, product = 0;
            for (int i = 0; i < WIDTH; i++) {
                double x = (double)centroids[(s * CENTROIDS + c) * WIDTH + i];
                distance += pow(x - (double)key(w, h / GROUP, ATTN_SINKS + t)[s * WIDTH + i], 2);
                product += x * (double)q[h * DIM + s * WIDTH + i];
            }
            if (distance >= nearest) continue;
            nearest = distance;
            dot = product;
        }
        sum += dot;
    }
    return sum * (double)shape.scale;
}

/* The mean key of the token's cluster. */
static double naive_clusters(const world *w, const attn_policy *policy, const float *q, int h, int64_t t)
{
    const scored *p = (const scored *)policy;
    const unsigned char *units = p->units + (size_t)(h / GROUP) * (size_t)p->capacity * p->unit_bytes;
    const int32_t cluster = ((const int32_t *)(units + (size_t)(t / 16) * p->unit_bytes))[t % 16];
    double sum = 0, n = 0;
    for (int64_t other = 0; other < p->n_coded; other++) {
        if (((const int32_t *)(units + (size_t)(other / 16) * p->unit_bytes))[other % 16] != cluster) continue;
        sum += score(w, q, h, ATTN_SINKS + other);
        n++;
    }
    return sum / n;
}

/* Log weights of the far tokens by the naive scores, and what the near rows hold. */
static double log_weights(const world *w, const attn_policy *p, const float *q, int h, naive_score naive, int64_t n, double *out)
{
    double top = -INFINITY, near = 0, far = 0;
    for (int64_t t = 0; t < n; t++) {
        out[t] = naive(w, p, q, h, t);
        top = fmax(top, out[t]);
    }
    for (int64_t t = 0; t < n; t++) far += exp(out[t] - top);
    for (int64_t pos = 0; pos < kv_length(w->kv); pos++)
        if (pos < ATTN_SINKS || pos >= p->n_far) near += exp(score(w, q, h, pos) - top);
    for (int64_t t = 0; t < n; t++) out[t] -= top + log(near + far);
    return near / (near + far);
}

/* The best of each head, or of the group, are read and nothing else; a difference of a key step may go either way. */
static void check_choice(const world *w, const attn_policy *p, const float *q, const outcome *o, naive_score naive, bool shared, int64_t k)
{
    const double slack = 0.003;
    int64_t n = p->n_far - ATTN_SINKS;
    double *weights = calloc((size_t)n * N_HEAD, sizeof *weights), *sorted = calloc((size_t)n, sizeof *sorted);
    for (int head = 0; head < HEADS_KV; head++) {
        bool surely[MOST] = {false}, perhaps[MOST] = {false};
        for (int g = 0; g < GROUP; g++) log_weights(w, p, q, head * GROUP + g, naive, n, weights + g * n);
        for (int64_t t = 0; t < n && shared; t++) weights[t] = fmax(weights[t], weights[n + t]);
        for (int g = 0; g < (shared ? 1 : GROUP); g++) {
            double *x = weights + g * n;
            memcpy(sorted, x, (size_t)n * sizeof *sorted);
            for (int64_t i = 0; i < k; i++)
                for (int64_t j = i + 1; j < n; j++)
                    if (sorted[j] > sorted[i]) {
                        double swap = sorted[i];
                        sorted[i] = sorted[j];
                        sorted[j] = swap;
                    }
            for (int64_t t = 0; t < n; t++) {
                surely[t] |= x[t] > sorted[k - 1] + slack;
                perhaps[t] |= x[t] >= sorted[k - 1] - slack;
            }
        }
        for (int64_t t = 0; t < n; t++) {
            if (surely[t]) assert_true(o->read[head][ATTN_SINKS + t]);
            if (o->read[head][ATTN_SINKS + t]) assert_true(perhaps[t]);
        }
    }
    free(weights), free(sorted);
}

static const struct {
    const char *spec;
    naive_score naive;
    bool learns;
} scorers[] = {{"oracle:budget=0.05", naive_oracle, false},
               {"quest:budget=0.05", naive_quest, false},
               {"meanstd:deviations=2,budget=0.05", naive_meanstd, false},
               {"rekv:budget=0.05", naive_rekv, false},
               {"pqcache:subvectors=4,bits=4,budget=0.05", naive_pqcache, true},
               {"clusters:budget=0.05,estimate=0", naive_clusters, true}};

static void the_best_by_the_definition_are_read(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(scorers); i++)
        for (int shared = 0; shared < 2; shared++) {
            char spec[128];
            snprintf(spec, sizeof spec, "%s,shared=%d", scorers[i].spec, shared);
            world w = open_world(2, 1200, 2 + i);
            attn_policy *p = make(spec);
            read_to(&w, p, 1200, 200);
            float q[N_HEAD * DIM];
            for (int round = 0; round < 3; round++) {
                outcome o;
                query(&w, q);
                step(&w, p, q, &o);
                check_choice(&w, p, q, &o, scorers[i].naive, shared, (int64_t)ceil(0.05 * (double)(p->n_far - ATTN_SINKS)));
                assert_true(difference(&w, q, &o, false) < 1e-5); /* the rest is dropped */
                assert_true(o.cost.index_bytes > 0);
            }
            attn_policy_destroy(p);
            close_world(&w);
        }
}

/* Per head as few as hold the share of the mass, near rows included. */
static void a_budget_by_mass_takes_as_few_as_hold_it(void **state)
{
    (void)state;
    world w = open_world(2, 1000, 20);
    attn_policy *p = make("oracle:mass=0.9,min=1,max=1");
    read_to(&w, p, 1000, 250);
    int64_t n = p->n_far - ATTN_SINKS;
    float q[N_HEAD * DIM];
    double *weights = calloc((size_t)n, sizeof *weights);
    outcome o;
    query(&w, q);
    step(&w, p, q, &o);
    for (int head = 0; head < HEADS_KV; head++) {
        bool needed[MOST] = {false};
        for (int g = 0; g < GROUP; g++) { /* the heaviest until 0.9 is reached, by selection */
            double sum = log_weights(&w, p, q, head * GROUP + g, naive_oracle, n, weights);
            while (sum < 0.9) {
                int64_t best = 0;
                for (int64_t t = 0; t < n; t++)
                    if (weights[t] > weights[best]) best = t;
                sum += exp(weights[best]);
                weights[best] = -INFINITY;
                needed[best] = true;
            }
        }
        int64_t missing = 0, more = 0;
        for (int64_t t = 0; t < n; t++) {
            missing += needed[t] && !o.read[head][ATTN_SINKS + t];
            more += !needed[t] && o.read[head][ATTN_SINKS + t];
        }
        assert_true(missing + more <= 2); /* of equal keys */
    }
    free(weights);
    attn_policy_destroy(p);
    close_world(&w);
}

static void a_threshold_reads_what_reaches_it(void **state)
{
    (void)state;
    world w = open_world(2, 1000, 21);
    attn_policy *p = make("oracle:threshold=0.004,budget=0,min=1,max=1,shared=1");
    read_to(&w, p, 1000, 250);
    int64_t n = p->n_far - ATTN_SINKS;
    float q[N_HEAD * DIM];
    double *weights = calloc((size_t)n * GROUP, sizeof *weights);
    outcome o;
    query(&w, q);
    step(&w, p, q, &o);
    for (int head = 0; head < HEADS_KV; head++) {
        for (int g = 0; g < GROUP; g++) log_weights(&w, p, q, head * GROUP + g, naive_oracle, n, weights + g * n);
        for (int64_t t = 0; t < n; t++) {
            double heaviest = fmax(weights[t], weights[n + t]) - log(0.004);
            if (fabs(heaviest) > 0.003) assert_int_equal(o.read[head][ATTN_SINKS + t], heaviest > 0);
        }
    }
    free(weights);
    attn_policy_destroy(p);
    close_world(&w);
}

/* The tail of ivfpq serves any choice: nearer to everything than without it. */
static void the_tail_estimates_what_any_policy_left(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(scorers); i++) {
        double error[2];
        for (int tail = 0; tail < 2; tail++) {
            char spec[128];
            snprintf(spec, sizeof spec, "%s,tail=%d", scorers[i].spec, tail);
            world w = open_world(2, 1500, 30);
            attn_policy *p = make(spec);
            read_to(&w, p, 1500, 300);
            float q[N_HEAD * DIM];
            outcome o;
            query(&w, q);
            step(&w, p, q, &o);
            error[tail] = difference(&w, q, &o, true);
            assert_int_equal(o.cost.tail_bytes > 0, tail);
            attn_policy_destroy(p);
            close_world(&w);
        }
        if (error[1] > error[0] / 2) print_error("%s: %g without a tail, %g with\n", scorers[i].spec, error[0], error[1]);
        assert_true(error[1] <= error[0] / 2);
    }
}

/* Of the sampled tokens, and of those alone, each counts as often as its odds say. */
static void magicpig_weighs_what_it_samples(void **state)
{
    (void)state;
    enum { BITS = 4, TABLES = 12, PLANES = BITS * TABLES };
    world w = open_world(2, 900, 40);
    attn_policy *policy = make("magicpig:bits=4,tables=12");
    read_to(&w, policy, 900, 300);
    const scored *p = (const scored *)policy;
    float q[N_HEAD * DIM];
    outcome o;
    query(&w, q);
    step(&w, policy, q, &o);
    for (int h = 0; h < N_HEAD; h++) {
        double mean[DIM] = {0}, out[DIM] = {0}, l = 0;
        int64_t n = policy->n_far - ATTN_SINKS;
        for (int64_t t = 0; t < n; t++)
            for (int i = 0; i < DIM; i++) mean[i] += (double)key(&w, h / GROUP, ATTN_SINKS + t)[i] / (double)n;
        for (int64_t pos = 0; pos < 900; pos++) {
            double factor = 1, dot = 0, kk = 0, qq = 0;
            int met = 0;
            bool far = pos >= ATTN_SINKS && pos < policy->n_far;
            for (int t = 0; t < TABLES && far; t++) {
                bool same = true;
                for (int b = 0; b < BITS; b++) {
                    double of_q = 0, of_k = 0;
                    for (int i = 0; i < DIM; i++) {
                        double plane = (double)p->shared[i * PLANES + t * BITS + b];
                        of_q += plane * (double)q[h * DIM + i];
                        of_k += plane * ((double)key(&w, h / GROUP, pos)[i] - mean[i]);
                    }
                    same &= (of_q > 0) == (of_k > 0);
                }
                met += same;
            }
            for (int i = 0; i < DIM; i++) {
                double x = (double)key(&w, h / GROUP, pos)[i] - mean[i], y = (double)q[h * DIM + i];
                dot += x * y;
                kk += x * x;
                qq += y * y;
            }
            if (far) {
                double same = pow(1 - acos(dot / sqrt(kk * qq)) / acos(-1), BITS);
                double u = 1 - pow(1 - same, TABLES) - TABLES * same * pow(1 - same, TABLES - 1);
                factor = met >= 2 ? 1 / u : 0;
                if (met >= 2) assert_true(o.read[h / GROUP][pos]);
            }
            double e = factor * exp(score(&w, q, h, pos));
            l += e;
            for (int i = 0; i < DIM; i++) out[i] += e * (double)key(&w, h / GROUP, pos)[DIM + i];
        }
        for (int i = 0; i < DIM; i++) assert_true(fabs(out[i] / l - (double)o.out[h * DIM + i]) < 1e-3);
    }
    attn_policy_destroy(policy);
    close_world(&w);
}

/* The last 32 queries decide, smoothed over 7 neighbours; later tokens stay. */
static void snapkv_keeps_what_the_end_attends_to(void **state)
{
    (void)state;
    world w = open_world(2, 1000, 50);
    attn_policy *p = make("snapkv:budget=0.1,min=1");
    read_to(&w, p, 800, 100);
    int64_t n = p->n_far - ATTN_SINKS, kept = 0;
    double *sum = calloc((size_t)n, sizeof *sum), *pooled = calloc((size_t)n, sizeof *pooled);
    random_state r;
    random_seed(&r, 700 * HEADS_KV); /* the last batch's queries of head 0, as read_to made them */
    float *q = calloc(100 * GROUP * DIM, sizeof *q), ask[N_HEAD * DIM];
    for (int i = 0; i < 100 * GROUP * DIM; i++) q[i] = (float)random_normal(&r);
    for (int64_t pos = 768; pos < 800; pos++)
        for (int g = 0; g < GROUP; g++) {
            double l = 0, e[800];
            for (int64_t t = 0; t <= pos; t++) {
                double dot = 0;
                for (int i = 0; i < DIM; i++) dot += (double)q[((pos - 700) * GROUP + g) * DIM + i] * (double)key(&w, 0, t)[i];
                e[t] = exp(dot * (double)shape.scale);
                l += e[t];
            }
            for (int64_t t = 0; t < n && ATTN_SINKS + t <= pos; t++) sum[t] += e[ATTN_SINKS + t] / l;
        }
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = t < 3 ? 0 : t - 3; i <= t + 3 && i < n; i++) pooled[t] = fmax(pooled[t], sum[i]);
    outcome o;
    query(&w, ask);
    step(&w, p, ask, &o);
    double least_kept = INFINITY, most_dropped = 0, most = 0;
    for (int64_t t = 0; t < n; t++) {
        bool read = o.read[0][ATTN_SINKS + t];
        kept += read;
        most = fmax(most, pooled[t]);
        if (read) least_kept = fmin(least_kept, pooled[t]);
        if (!read) most_dropped = fmax(most_dropped, pooled[t]);
    }
    assert_int_equal(kept, (int64_t)ceil(0.1 * (double)n));
    assert_true(least_kept >= most_dropped - 3e-5 * most);
    int64_t before = p->n_far;
    kv_commit(w.kv, 1000);
    assert_int_equal(attn_index_advance(p, w.kv, w.pool, w.scratch, NULL), QUARRY_OK);
    step(&w, p, ask, &o);
    for (int64_t pos = before; pos < p->n_far; pos++) assert_true(o.read[0][pos]);
    free(sum), free(pooled), free(q);
    attn_policy_destroy(p);
    close_world(&w);
}

static const char *const all_specs[] = {"oracle",          "quest",         "meanstd",
                                        "pqcache",         "snapkv:min=8",  "magicpig:bits=4,tables=12",
                                        "clusters",        "oracle:tail=1", "quest:tail=1,mass=0.8",
                                        "clusters:tail=1", "rekv"};

static void results_depend_neither_on_threads_nor_on_a_fork(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(all_specs); i++) {
        outcome first, other;
        float q[N_HEAD * DIM];
        for (int threads = 1; threads <= 3; threads++) {
            world w = open_world(threads, 1100, 60);
            attn_policy *p = make(all_specs[i]);
            read_to(&w, p, 1000, 128);
            query(&w, q);
            step(&w, p, q, threads == 1 ? &first : &other);
            if (threads > 1) assert_memory_equal(first.out, other.out, sizeof first.out);
            attn_policy *fork = p->type->fork(p, NULL);
            assert_non_null(fork);
            fork->n_far = p->n_far;
            p->type->truncate(p, 300); /* the fork does not notice */
            attn_policy_destroy(p);
            step(&w, fork, q, &other);
            assert_memory_equal(first.out, other.out, sizeof first.out);
            attn_policy_destroy(fork);
            close_world(&w);
        }
    }
}

/* After a cut nothing that is gone is read, and after the next seal all is as if it had been read at once. */
static void a_cut_leaves_only_live_tokens(void **state)
{
    (void)state;
    const int64_t cuts[] = {8, 100, 264, 500, 903};
    for (size_t i = 0; i < TEST_COUNT(all_specs); i++)
        for (size_t c = 0; c < TEST_COUNT(cuts); c++) {
            world w = open_world(2, 1100, 70);
            attn_policy *p = make(all_specs[i]);
            read_to(&w, p, 1000, 100);
            float q[N_HEAD * DIM];
            outcome o;
            query(&w, q);
            p->type->truncate(p, cuts[c]);
            kv_truncate(w.kv, cuts[c] + ATTN_WINDOW);
            assert_int_equal(p->n_far, cuts[c]);
            step(&w, p, q, &o);                          /* the observer checks the ids */
            write_rows(&w, cuts[c] + ATTN_WINDOW, 1000); /* other tokens take their places, and a seal comes */
            read_to(&w, p, 1000, 100);
            step(&w, p, q, &o);
            int64_t n_read = 0;
            for (int64_t pos = 0; pos < kv_length(w.kv); pos++) n_read += o.read[0][pos];
            assert_true(n_read < kv_length(w.kv));
            attn_policy_destroy(p);
            close_world(&w);
        }
    for (size_t i = 0; i < 3; i++) { /* those that learn nothing are made anew exactly */
        world w = open_world(2, 1000, 71);
        attn_policy *p = make(scorers[i].spec), *fresh = make(scorers[i].spec);
        read_to(&w, p, 1000, 100);
        p->type->truncate(p, 517);
        assert_int_equal(attn_index_advance(p, w.kv, w.pool, w.scratch, NULL), QUARRY_OK);
        assert_int_equal(attn_index_seal(p, w.kv, w.pool, w.scratch, NULL), QUARRY_OK);
        assert_int_equal(attn_index_seal(fresh, w.kv, w.pool, w.scratch, NULL), QUARRY_OK);
        float q[N_HEAD * DIM];
        outcome a, b;
        query(&w, q);
        step(&w, p, q, &a);
        step(&w, fresh, q, &b);
        assert_memory_equal(a.out, b.out, sizeof a.out);
        attn_policy_destroy(p);
        attn_policy_destroy(fresh);
        close_world(&w);
    }
}

/* Every allocation fails once: an error, or a part that reads everything. */
static void failed_allocations_lose_nothing(void **state)
{
    (void)state;
    for (size_t i = 0; i < TEST_COUNT(all_specs); i++) {
        world w = open_world(1, 500, 80);
        kv_commit(w.kv, 500);
        float q[N_HEAD * DIM];
        query(&w, q);
        bool worked = false;
        for (int64_t fail = 0; !worked; fail++) {
            quarry_error e = {0};
            for (int t = 0; t < 4; t++) arena_free(&w.scratch[t]);
            memory_fail_after(fail);
            attn_policy *p = attn_policy_create(all_specs[i], &shape, kernels, &e);
            worked = p && attn_index_seal(p, w.kv, w.pool, w.scratch, &e) == QUARRY_OK;
            attn_policy *fork = worked ? p->type->fork(p, &e) : NULL;
            worked &= fork != NULL;
            memory_fail_after(-1);
            outcome o;
            if (fork) {
                fork->n_far = p->n_far;
                step(&w, fork, q, &o);
                for (int j = 0; j < N_HEAD * DIM; j++) assert_true(isfinite(o.out[j]));
            }
            if (fork) attn_policy_destroy(fork);
            attn_policy_destroy(p);
            assert_true(fail < 3000);
        }
        close_world(&w);
    }
}

static void options_are_checked(void **state)
{
    (void)state;
    const char *const bad[] = {"quest:budget=2", "oracle:bits=3", "pqcache:bits=9",  "magicpig:budget=x",   "clusters:estimate=2",
                               "snapkv:min",     "snapkv:tail=1", "snapkv:mass=0.9", "magicpig:budget=0.5", "magicpig:tail=1"};
    quarry_error e;
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        e = (quarry_error){0};
        assert_null(attn_policy_create(bad[i], &shape, kernels, &e));
        assert_int_equal(e.code, QUARRY_ERROR_ARGUMENT);
    }
}

int main(void)
{
    cpu_isa isa;
    if (cpu_choose(&isa, NULL) != QUARRY_OK) return 1;
    kernels = math_kernels_get(isa);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_budget_of_everything_is_full_attention),
        cmocka_unit_test(the_best_by_the_definition_are_read),
        cmocka_unit_test(a_budget_by_mass_takes_as_few_as_hold_it),
        cmocka_unit_test(a_threshold_reads_what_reaches_it),
        cmocka_unit_test(the_tail_estimates_what_any_policy_left),
        cmocka_unit_test(magicpig_weighs_what_it_samples),
        cmocka_unit_test(snapkv_keeps_what_the_end_attends_to),
        cmocka_unit_test(results_depend_neither_on_threads_nor_on_a_fork),
        cmocka_unit_test(a_cut_leaves_only_live_tokens),
        cmocka_unit_test(failed_allocations_lose_nothing),
        cmocka_unit_test(options_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
