/* What the key index costs: building it, per segment, and one decode step, per (layer, KV head). Keys are random clusters; the parts are
 * visited in turn, as a model does, so that nothing stays in the nearest caches. Prints the median and the spread of the rounds.
 *
 *     bench_ivfpq [head_dim 64] [group 3] [tokens 8000] [parts 90] [options]
 * */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attn/attn.h"

enum { ROUNDS = 15 };

typedef struct bench {
    attn_shape shape;
    int d, group, parts;
    int64_t n;
    const math_kernels *kernels;
    kv_seq *kv;
    attn_policy *p;
    arena scratch;
    random_state random;
} bench;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* times: of the rounds, per unit of work */
static void report(const char *what, double *times, int n, double scale, const char *unit)
{
    qsort(times, (size_t)n, sizeof *times, ascending);
    printf("%-28s %8.2f %s   (%.2f to %.2f)\n", what, times[n / 2] * scale, unit, times[0] * scale, times[n - 1] * scale);
}

static void fill(bench *b)
{
    int d = b->d;
    float *centres = malloc(sizeof(float) * 64 * (size_t)d), *k = malloc(sizeof(float) * (size_t)d), *v = malloc(sizeof(float) * (size_t)d);
    if (!centres || !k || !v || kv_reserve(b->kv, b->n, NULL) != QUARRY_OK) exit(1);
    for (int i = 0; i < 64 * d; i++) centres[i] = (float)random_normal(&b->random);
    for (int64_t pos = 0; pos < b->n; pos++)
        for (int part = 0; part < b->parts; part++) {
            const float *centre = centres + (int64_t)random_below(&b->random, 64) * d;
            for (int i = 0; i < d; i++) {
                uint64_t bits = random_u64(&b->random); /* normal deviates would take longer than the benchmark */
                k[i] = centre[i] + (float)((double)(bits & 0xffff) / 65536 - 0.5) * (i < d / 2 ? 2 : 1);
                v[i] = (float)((double)(bits >> 16 & 0xffff) / 65536 - 0.5);
            }
            kv_write(b->kernels, kv_row(b->kv, part, 0, pos), &b->shape.kv, k, v);
        }
    kv_commit(b->kv, b->n);
    free(centres);
    free(k);
    free(v);
}

static void build(bench *b)
{
    int64_t n = b->n - ATTN_WINDOW - ATTN_SINKS, done = 0;
    double appends = 0, seal;
    float *q = malloc(sizeof(float) * 512 * (size_t)b->group * (size_t)b->d);
    if (!q) exit(1);
    for (int64_t i = 0; i < 512 * b->group * b->d; i++) q[i] = (float)random_normal(&b->random);
    double start = now();
    for (int part = 0; part < b->parts; part++) b->p->type->observe(b->p, part, 0, q, 0, 512);
    printf("%-28s %8.2f us per part\n", "observe 512 positions", (now() - start) / b->parts * 1e6);
    free(q);
    for (int64_t step; done < n; done += step) {
        step = n - done < 512 ? n - done : 512;
        start = now();
        if (b->p->type->reserve(b->p, step, NULL) != QUARRY_OK) exit(1);
        for (int part = 0; part < b->parts; part++) {
            arena_reset(&b->scratch);
            b->p->type->append(b->p, part, 0, b->kv, step, &b->scratch);
        }
        b->p->type->commit(b->p, step);
        appends += now() - start;
    }
    start = now();
    if (b->p->type->reserve_seal(b->p, NULL) != QUARRY_OK) exit(1);
    for (int part = 0; part < b->parts; part++) {
        arena_reset(&b->scratch);
        b->p->type->seal(b->p, part, 0, b->kv, &b->scratch);
    }
    b->p->type->commit_seal(b->p);
    seal = now() - start;
    printf("%-28s %8.2f ms per part   (appends in blocks of 512 %.2f, seal %.2f), %.2f ms per 2,048 tokens\n", "index",
           (appends + seal) / b->parts * 1e3, appends / b->parts * 1e3, seal / b->parts * 1e3,
           (appends + seal) / b->parts * 1e3 * 2048 / (double)n);
    printf("%-28s %8.2f %% of the cache\n", "index size", 100 * (double)attn_policy_bytes(b->p) / (double)kv_bytes(b->kv));
}

static void decode(bench *b)
{
    int g = b->group, d = b->d;
    double select[ROUNDS], rows_time[ROUNDS], tail[ROUNDS], both[ROUNDS];
    float *q = malloc(sizeof(float) * (size_t)(b->parts * g * d)), *scaled = malloc(sizeof(float) * (size_t)(g * d)), m[64], l[64],
          *o = malloc(sizeof(float) * (size_t)(g * d));
    attn_cost cost = {0};
    int64_t n_rows = 0;
    if (!q || !scaled || !o) exit(1);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < b->parts * g * d; i++) q[i] = 2 * (float)random_normal(&b->random);
        double t_select = 0, t_rows = 0, t_tail = 0;
        cost = (attn_cost){0};
        n_rows = 0;
        for (int part = 0; part < b->parts; part++) {
            const float *raw = q + part * g * d;
            attn_selection sel;
            attention_state state = {m, l, o};
            arena_reset(&b->scratch);
            attention_clear(&state, g, d);
            for (int h = 0; h < g; h++) l[h] = 1, m[h] = 0;
            for (int i = 0; i < g * d; i++) scaled[i] = raw[i] * b->shape.scale;
            double start = now();
            if (b->p->type->select(b->p, part, 0, NULL, raw, b->n, &state, &b->scratch, &sel, &cost, NULL) != QUARRY_OK) exit(1);
            double selected = now();
            const void **rows = arena_alloc(&b->scratch, (size_t)sel.n, sizeof *rows, NULL);
            float *scores = arena_alloc(&b->scratch, (size_t)(sel.n * g), sizeof *scores, NULL);
            if (!rows || !scores) exit(1);
            for (int64_t i = 0; i < sel.n; i++) rows[i] = kv_row(b->kv, part, 0, sel.ids[i]);
            b->kernels->attention->rows(scaled, g, d, b->shape.kv.type, rows, sel.n, scores, &state);
            double read = now();
            b->p->type->tail(b->p, part, 0, raw, &sel, scores, rows, &b->scratch, &state, &cost);
            double end = now();
            t_select += selected - start;
            t_rows += read - selected;
            t_tail += end - read;
            n_rows += sel.n;
        }
        select[round] = t_select / b->parts;
        rows_time[round] = t_rows / b->parts;
        tail[round] = t_tail / b->parts;
        both[round] = (t_select + t_tail) / b->parts;
    }
    report("select", select, ROUNDS, 1e6, "us");
    report("rows", rows_time, ROUNDS, 1e6, "us");
    report("tail", tail, ROUNDS, 1e6, "us");
    report("select + tail", both, ROUNDS, 1e6, "us");
    printf("%-28s %8lld rows, %lld bytes of index, of %lld bytes of cache\n", "read per part", (long long)(n_rows / b->parts),
           (long long)(attn_cost_bytes(&cost, 0) / b->parts), (long long)(b->n * (int64_t)kv_row_bytes(b->shape.kv.type, d)));
    free(q);
    free(scaled);
    free(o);
}

int main(int argc, char **argv)
{
    bench b = {.d = argc > 1 ? atoi(argv[1]) : 64,
               .group = argc > 2 ? atoi(argv[2]) : 3,
               .n = argc > 3 ? atoll(argv[3]) : 8000,
               .parts = argc > 4 ? atoi(argv[4]) : 90};
    cpu_isa isa;
    quarry_error error = {0};
    if (b.d < 8 || b.d % 8 || b.group < 1 || b.group > 64 || b.n < 500 || b.parts < 1 || cpu_choose(&isa, &error) != QUARRY_OK) {
        fprintf(stderr, "usage: bench_ivfpq [head_dim] [group] [tokens] [parts] [options] %s\n", error.message);
        return 1;
    }
    b.kernels = math_kernels_get(isa);
    b.shape = (attn_shape){.kv = {b.parts, 1, b.d, KV_F16}, .n_head = b.group, .scale = 1 / sqrtf((float)b.d)};
    random_seed(&b.random, 1);
    char spec[256];
    snprintf(spec, sizeof spec, "ivfpq:%s", argc > 5 ? argv[5] : "");
    b.kv = kv_create(&b.shape.kv, &error);
    b.p = b.kv ? attn_policy_create(spec, &b.shape, b.kernels, &error) : NULL;
    if (!b.p) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    printf("head_dim %d, group %d, %lld tokens, %d parts, %s\n", b.d, b.group, (long long)b.n, b.parts, b.kernels->isa);
    fill(&b);
    build(&b);
    decode(&b);
    attn_policy_destroy(b.p);
    kv_destroy(b.kv);
    arena_free(&b.scratch);
    return 0;
}
