#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gen/gen.h"
#include "test.h"

enum { N_VOCAB = 12, N_DRAWS = 60000 };

/* Two ties (3 and 7, 0 and 9), a wide range, a negative tail. */
static const float LOGITS[N_VOCAB] = {0.5f, -1.0f, 2.0f, 3.0f, -4.0f, 1.0f, -20.0f, 3.0f, 0.0f, 0.5f, -0.5f, 2.5f};

static quarry_sampling sampling_at(float temperature)
{
    quarry_sampling p;
    quarry_sampling_default(&p);
    p.temperature = temperature;
    p.seed = 42;
    return p;
}

/* ---- a plain reference: probabilities of every token ---- */

static const float *reference_logits;

static int by_logit(const void *a, const void *b)
{
    int i = *(const int *)a, j = *(const int *)b;
    if (reference_logits[i] != reference_logits[j]) return reference_logits[i] > reference_logits[j] ? -1 : 1;
    return i - j;
}

static void softmax(const float *logits, const int *order, int n, double temperature, double *p)
{
    double total = 0;
    for (int i = 0; i < n; i++) total += p[i] = exp((double)(logits[order[i]] - logits[order[0]]) / temperature);
    for (int i = 0; i < n; i++) p[i] /= total;
}

static void reference(const quarry_sampling *s, const float *in, const int32_t *recent, int n_recent, double *probability)
{
    float logits[N_VOCAB];
    int order[N_VOCAB], n = N_VOCAB;
    double p[N_VOCAB];
    memcpy(logits, in, sizeof logits);
    for (int i = 0; i < s->n_bias; i++) logits[s->bias_tokens[i]] += s->bias_values[i];
    for (int id = 0; id < N_VOCAB; id++) {
        bool seen = false;
        for (int i = n_recent > s->repeat_last_n ? n_recent - s->repeat_last_n : 0; i < n_recent; i++) seen |= recent[i] == id;
        if (seen) logits[id] = logits[id] > 0 ? logits[id] / s->repeat_penalty : logits[id] * s->repeat_penalty;
        order[id] = id;
    }
    reference_logits = logits;
    qsort(order, N_VOCAB, sizeof *order, by_logit);
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    if (s->top_p < 1) {
        double sum = 0;
        int kept = 0;
        softmax(logits, order, n, 1, p);
        do sum += p[kept++];
        while (kept < n && sum < (double)s->top_p);
        n = kept;
    }
    softmax(logits, order, n, 1, p);
    while (n > 1 && p[n - 1] < (double)s->min_p * p[0]) n--;
    softmax(logits, order, n, (double)s->temperature, p);
    memset(probability, 0, N_VOCAB * sizeof *probability);
    for (int i = 0; i < n; i++) probability[order[i]] = p[i];
}

/* Draws many tokens: impossible ones never come, and the counts fit the probabilities by a chi-squared test (99.99 % quantile for 11 degrees of freedom: 37.4). */
static void check_distribution(const quarry_sampling *s, const float *logits, const int32_t *recent, int n_recent)
{
    double probability[N_VOCAB], chi = 0;
    int64_t counts[N_VOCAB] = {0};
    reference(s, logits, recent, n_recent, probability);
    sampler *sampler_under_test = sampler_create(s, N_VOCAB, NULL);
    for (int i = 0; i < N_DRAWS; i++) counts[sampler_next(sampler_under_test, logits, recent, n_recent)]++;
    sampler_destroy(sampler_under_test);
    for (int id = 0; id < N_VOCAB; id++) {
        double expected = probability[id] * N_DRAWS;
        if (probability[id] == 0) assert_int_equal(counts[id], 0);
        if (expected >= 5) assert_true(counts[id] > 0);
        if (expected >= 5) chi += ((double)counts[id] - expected) * ((double)counts[id] - expected) / expected;
    }
    assert_true(chi < 37.4);
}

static void greedy_takes_the_likeliest_and_the_lower_id_of_a_tie(void **state)
{
    (void)state;
    quarry_sampling p = sampling_at(0);
    sampler *s = sampler_create(&p, N_VOCAB, NULL);
    assert_int_equal(sampler_next(s, LOGITS, NULL, 0), 3);
    sampler_destroy(s);
}

static void temperature_shapes_the_distribution(void **state)
{
    (void)state;
    static const float temperatures[] = {0.3f, 0.7f, 1, 2, 10};
    for (int i = 0; i < 5; i++) {
        quarry_sampling p = sampling_at(temperatures[i]);
        check_distribution(&p, LOGITS, NULL, 0);
    }
}

static void top_k_keeps_exactly_k(void **state)
{
    (void)state;
    for (int k = 0; k <= N_VOCAB + 1; k++) {
        quarry_sampling p = sampling_at(1);
        p.top_k = k;
        check_distribution(&p, LOGITS, NULL, 0);
    }
}

static void top_p_keeps_the_smallest_set_with_that_mass(void **state)
{
    (void)state;
    for (int i = 0; i <= 20; i++) {
        quarry_sampling p = sampling_at(2);
        p.top_p = (float)i / 20;
        check_distribution(&p, LOGITS, NULL, 0);
        p.top_k = 5;
        check_distribution(&p, LOGITS, NULL, 0);
    }
}

static void min_p_drops_what_is_far_below_the_likeliest(void **state)
{
    (void)state;
    for (int i = 0; i <= 20; i++) {
        quarry_sampling p = sampling_at(3);
        p.min_p = (float)i / 20;
        check_distribution(&p, LOGITS, NULL, 0);
        p.top_p = 0.9f;
        p.top_k = 7;
        check_distribution(&p, LOGITS, NULL, 0);
    }
}

static void the_penalty_looks_back_so_far_and_counts_a_token_once(void **state)
{
    (void)state;
    static const int32_t recent[] = {2, 11, 3, 3, 3, 1, 4};
    for (int last_n = 0; last_n <= 8; last_n++) {
        quarry_sampling p = sampling_at(1);
        p.repeat_penalty = 1.5f;
        p.repeat_last_n = last_n;
        check_distribution(&p, LOGITS, recent, 7);
    }
}

static void bias_is_added_and_can_forbid(void **state)
{
    (void)state;
    static const int32_t tokens[] = {3, 7, 6};
    static const float values[] = {-INFINITY, -1.5f, 22};
    quarry_sampling p = sampling_at(1);
    p.bias_tokens = tokens;
    p.bias_values = values;
    p.n_bias = 3;
    check_distribution(&p, LOGITS, NULL, 0);
    p.temperature = 0;
    sampler *s = sampler_create(&p, N_VOCAB, NULL);
    assert_int_equal(sampler_next(s, LOGITS, NULL, 0), 11);
    sampler_destroy(s);
}

static void equal_seeds_draw_equally_and_others_do_not(void **state)
{
    (void)state;
    quarry_sampling p = sampling_at(2);
    sampler *a = sampler_create(&p, N_VOCAB, NULL), *b = sampler_create(&p, N_VOCAB, NULL);
    p.seed++;
    sampler *other = sampler_create(&p, N_VOCAB, NULL);
    int n_same = 0;
    for (int i = 0; i < 200; i++) {
        int32_t token = sampler_next(a, LOGITS, NULL, 0);
        assert_int_equal(token, sampler_next(b, LOGITS, NULL, 0));
        n_same += token == sampler_next(other, LOGITS, NULL, 0);
    }
    assert_true(n_same < 150);
    sampler_destroy(a);
    sampler_destroy(b);
    sampler_destroy(other);
}

/* A vocabulary of real size, where the heap has depth: the set kept is the reference's. */
static void a_large_vocabulary_is_cut_exactly(void **state)
{
    (void)state;
    enum { N = 50000, K = 40 };
    float *logits = malloc(N * sizeof *logits), top[K];
    random_state r;
    random_seed(&r, 7);
    for (int i = 0; i < N; i++) logits[i] = (float)random_normal(&r);
    for (int k = 0; k < K; k++) {
        top[k] = -INFINITY;
        for (int i = 0; i < N; i++)
            if (logits[i] > top[k] && (!k || logits[i] < top[k - 1])) top[k] = logits[i];
    }
    quarry_sampling p = sampling_at(1e6f); /* all kept ones alike */
    p.top_k = K;
    sampler *s = sampler_create(&p, N, NULL);
    int counts[K] = {0};
    for (int i = 0; i < 600; i++) {
        float logit = logits[sampler_next(s, logits, NULL, 0)];
        int k = 0;
        while (k < K && top[k] != logit) k++;
        assert_true(k < K);
        counts[k]++;
    }
    for (int k = 0; k < K; k++) assert_true(counts[k] > 0);
    sampler_destroy(s);
    free(logits);
}

static void logits_that_are_not_numbers_do_no_harm(void **state)
{
    (void)state;
    float logits[N_VOCAB];
    for (int i = 0; i < N_VOCAB; i++) logits[i] = i == 5 ? 1.0f : NAN;
    for (int t = 0; t < 2; t++) {
        quarry_sampling p = sampling_at((float)t);
        p.top_p = 0.9f;
        sampler *s = sampler_create(&p, N_VOCAB, NULL);
        logits[5] = 1;
        assert_int_equal(sampler_next(s, logits, NULL, 0), 5);
        logits[5] = NAN;
        assert_int_equal(sampler_next(s, logits, NULL, 0), 0);
        sampler_destroy(s);
    }
}

static void assert_refused(const quarry_sampling *p, const char *field)
{
    quarry_error error;
    assert_null(sampler_create(p, N_VOCAB, &error));
    assert_int_equal(error.code, QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, field));
}

static void wrong_parameters_are_refused_by_name(void **state)
{
    (void)state;
    static const int32_t token = N_VOCAB;
    static const float value = 1;
    quarry_sampling p = sampling_at(NAN);
    assert_refused(&p, "temperature");
    p = sampling_at(1);
    p.top_p = 1.5f;
    assert_refused(&p, "top_p");
    p = sampling_at(1);
    p.min_p = NAN;
    assert_refused(&p, "min_p");
    p = sampling_at(1);
    p.repeat_penalty = 0;
    assert_refused(&p, "repeat_penalty");
    p = sampling_at(1);
    p.bias_tokens = &token;
    p.bias_values = &value;
    p.n_bias = 1;
    assert_refused(&p, "logit bias");
}

static void running_out_of_memory_is_reported(void **state)
{
    (void)state;
    quarry_sampling p = sampling_at(1);
    for (int64_t after = 0;; after++) {
        quarry_error error;
        memory_fail_after(after);
        sampler *s = sampler_create(&p, N_VOCAB, &error);
        memory_fail_after(-1);
        sampler_destroy(s);
        if (s) {
            assert_true(after >= 4);
            return;
        }
        assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_likeliest_and_the_lower_id_of_a_tie),
        cmocka_unit_test(temperature_shapes_the_distribution),
        cmocka_unit_test(top_k_keeps_exactly_k),
        cmocka_unit_test(top_p_keeps_the_smallest_set_with_that_mass),
        cmocka_unit_test(min_p_drops_what_is_far_below_the_likeliest),
        cmocka_unit_test(the_penalty_looks_back_so_far_and_counts_a_token_once),
        cmocka_unit_test(bias_is_added_and_can_forbid),
        cmocka_unit_test(equal_seeds_draw_equally_and_others_do_not),
        cmocka_unit_test(a_large_vocabulary_is_cut_exactly),
        cmocka_unit_test(logits_that_are_not_numbers_do_no_harm),
        cmocka_unit_test(wrong_parameters_are_refused_by_name),
        cmocka_unit_test(running_out_of_memory_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
