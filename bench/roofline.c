/* Each kernel against what this machine gives: bytes and operations per second at the sizes of SmolLM2-135M (30 layers of 3 KV heads of 64 dimensions,
 * 3 query heads each), and the share of the bound that applies, from the peaks of the same run (bench_peak).
 *
 *     bench_roofline [threads]
 *
 * Kernels of a decode step visit the 90 (layer, KV head) parts in turn, spread over the threads, and before each round the caches are filled
 * with something else, as a step's weights do. What such a kernel reads that another has just written (keys of tokens, scores) is in the
 * second-level cache there and here. The bound of a kernel is the slower one of reading its bytes and doing its operations at the peak. Medians
 * of the rounds. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/peaks.h"
#include "math/math.h"

enum {
    D = 64,
    GROUP = 3,
    LAYERS = 30,
    PARTS = LAYERS * 3,
    N_SUB = D / 4,
    CLUSTER = 64,   /* tokens of a cluster */
    CANDIDATE = 10, /* one token in so many is scored again */
    SEGMENT = 4096, /* tokens that share a basis */
    TILE_ROWS = 64,
    MOST_TOKENS = 32768,
    SMALL = 1 << 16, /* floats of the buffer for vectors */
    EVICT_BYTES = 128 << 20,
    MAX_THREADS = 64,
    ROUNDS = 51,
};

/* Where a kernel's bytes come from, and which operations it does. */
typedef enum source { FROM_MEMORY, FROM_L2, FROM_L1 } source;
typedef enum arithmetic { NO_OPS, F32, INT8, SHUFFLE, BF16 } arithmetic;

/* What one thread needs. */
typedef struct bench_thread {
    const void **list; /* [MOST_TOKENS] */
    float *scores;     /* [GROUP][MOST_TOKENS] */
    uint16_t *keys;    /* [GROUP][MOST_TOKENS] */
    uint16_t *merged;  /* [MOST_TOKENS] */
    int32_t *ids;      /* [MOST_TOKENS + SCAN_BLOCK] */
    void *scratch;
    attention_state state;
} bench_thread;

typedef struct bench {
    thread_pool *pool;
    cpu_isa isa;
    const math_kernels *kernels;
    peak peaks[PEAK_N];
    int n_threads;
    random_state random;
    int64_t n;           /* far tokens */
    char *rows;          /* [PARTS][n] K|V rows, f16 */
    uint8_t *codes;      /* [PARTS][n / 32][N_SUB][16] */
    int8_t *clusters;    /* [PARTS][n / CLUSTER][D] */
    uint8_t *keys;       /* [PARTS][n][D / 2] */
    uint32_t *begin;     /* [n / CLUSTER + 1] */
    int8_t *basis;       /* [PARTS][segments][D][D] */
    int32_t *candidates; /* [n / CANDIDATE] ascending */
    int8_t *query;       /* [GROUP][D] */
    float *tables;       /* [PARTS][N_SUB][4][16] */
    float *scale;        /* [MOST_TOKENS] */
    int32_t *chosen;     /* [n_chosen] ascending */
    int64_t n_chosen;
    float *q;       /* [GROUP][D], then more of the kind for tiles */
    float *small;   /* [4][SMALL] */
    int *limit;     /* [TILE_ROWS * GROUP] */
    uint8_t *bytes; /* [GROUP][N_SUB][16] */
    char *evict;    /* [EVICT_BYTES] */
    bench_thread threads[MAX_THREADS];
} bench;

static void *take(size_t n, size_t size)
{
    quarry_error error;
    void *p = memory_aligned(n, size, "benchmark", &error);
    if (!p) {
        fprintf(stderr, "bench_roofline: %s\n", error.message);
        exit(1);
    }
    return p;
}

/* ---- timing and report ---- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void evict_task(void *context, int64_t task, int thread)
{
    const bench *b = context;
    const uint64_t *x = (const uint64_t *)(const void *)b->evict;
    uint64_t sum = 0;
    (void)thread;
    for (int64_t i = task << 17; i < (task + 1) << 17; i += 8) sum ^= x[i];
    __asm__ volatile("" ::"r"(sum));
}

typedef struct kernel {
    const char *name;
    char at[64];
    double bytes, ops; /* of one round */
    source from;
    arithmetic arithmetic;
    int times;       /* repetitions in a round, of kernels that take no time */
    int64_t n_tasks; /* spread over the threads; 0: one call of fn by the calling thread */
    task_fn fn;
    void *context;
} kernel;

static double run_once(bench *b, const kernel *k)
{
    if (k->from == FROM_MEMORY) thread_pool_run(b->pool, EVICT_BYTES >> 20, evict_task, b);
    double start = bench_now();
    for (int i = 0; i < k->times; i++) {
        if (k->n_tasks)
            thread_pool_run(b->pool, k->n_tasks, k->fn, k->context);
        else
            k->fn(k->context, 0, 0);
    }
    return (bench_now() - start) / k->times;
}

static double byte_peak(const bench *b, const kernel *k, const char **name, bool one)
{
    static const peak_kind kinds[] = {[FROM_L2] = PEAK_L2, [FROM_L1] = PEAK_L1};
    static const char *const names[] = {"memory", "L2", "L1"};
    *name = names[k->from];
    if (k->from == FROM_MEMORY) return peaks_memory(b->peaks);
    const peak *p = &b->peaks[kinds[k->from]];
    return one ? p->one : p->all;
}

static double op_peak(const bench *b, const kernel *k, const char **name, bool one)
{
    static const char *const names[] = {"", "f32 arithmetic", "int8 arithmetic", "byte shuffles", "bf16 arithmetic"};
    double all = k->arithmetic == F32    ? peaks_f32(b->peaks, b->isa)
                 : k->arithmetic == INT8 ? peaks_i8(b->peaks, b->isa)
                 : k->arithmetic == BF16 ? b->peaks[PEAK_BF16_AVX512].all
                                         : peaks_shuffle(b->peaks, b->isa);
    *name = names[k->arithmetic];
    return one ? all / b->n_threads : all;
}

static void measure(bench *b, kernel k)
{
    double seconds[ROUNDS], begin = bench_now();
    int rounds = 0;
    if (k.times == 0) k.times = 1;
    run_once(b, &k); /* warms up */
    while (rounds < ROUNDS && (rounds < 3 || bench_now() - begin < 1)) seconds[rounds++] = run_once(b, &k);
    qsort(seconds, (size_t)rounds, sizeof *seconds, ascending);
    double s = seconds[rounds / 2];
    const char *bytes_name, *ops_name = "";
    bool one = k.n_tasks == 0 && k.from != FROM_MEMORY;
    double bytes_bound = k.bytes * 1e-9 / byte_peak(b, &k, &bytes_name, one);
    double ops_bound = k.arithmetic == NO_OPS ? 0 : k.ops * 1e-9 / op_peak(b, &k, &ops_name, one);
    bool by_ops = ops_bound > bytes_bound;
    printf("| %s | %s | %.1f | ", k.name, k.at, k.bytes / s * 1e-9);
    if (k.arithmetic == NO_OPS)
        printf("| ");
    else
        printf("%.1f | ", k.ops / s * 1e-9);
    printf("%s | %.0f %% |\n", by_ops ? ops_name : bytes_name, 100 * (by_ops ? ops_bound : bytes_bound) / s);
    fflush(stdout);
}

/* ---- matrix products ---- */

typedef struct model {
    bench *b;
    int n_layers;
    weight (*layers)[7]; /* q, k, v, o, gate, up, down */
    activations narrow, wide;
    float *y;
} model;

static void products_task(void *context, int64_t task, int thread)
{
    model *m = context;
    thread_pool *pool = m->b->pool;
    const matmul_kernels *kernels = m->b->kernels->matmul;
    (void)task, (void)thread;
    for (int i = 0; i < m->n_layers; i++) {
        const weight *w = m->layers[i];
        float *y = m->y;
        int64_t at = m->narrow.n_rows * 1536;
        matmul_run(kernels, pool, &m->narrow,
                   (matmul_job[]){{&w[0], NULL, y, false}, {&w[1], NULL, y + at, false}, {&w[2], NULL, y + 2 * at, false}}, 3);
        matmul_run(kernels, pool, &m->narrow, &(matmul_job){&w[3], NULL, y, false}, 1);
        matmul_run(kernels, pool, &m->narrow, (matmul_job[]){{&w[4], NULL, y, false}, {&w[5], NULL, y + at, false}}, 2);
        matmul_run(kernels, pool, &m->wide, &(matmul_job){&w[6], NULL, y, false}, 1);
    }
}

static void bench_products(bench *b, block_type type)
{
    static const int64_t shapes[7][2] = {{576, 576}, {192, 576}, {192, 576}, {576, 576}, {1536, 576}, {1536, 576}, {576, 1536}};
    static const int64_t counts[] = {1, 8, 512};
    const block_info *info = block_info_get(type);
    model m = {.b = b, .n_layers = LAYERS, .layers = take(LAYERS, sizeof *m.layers)};
    double bytes = 0, products = 0;
    size_t most = (size_t)(1536 * 576 / info->n_weights * info->n_bytes);
    uint8_t *blocks = take(most, 1);
    for (size_t i = 0; i < most; i++) blocks[i] = (uint8_t)(random_u64(&b->random) & 0x3b); /* keeps scales finite */
    for (int i = 0; i < LAYERS; i++)
        for (int j = 0; j < 7; j++) {
            if (weight_make(&m.layers[i][j], b->kernels->matmul, b->pool, type, shapes[j][0], shapes[j][1], blocks, NULL) != QUARRY_OK)
                exit(1);
            bytes += (double)m.layers[i][j].n_bytes;
            products += (double)(shapes[j][0] * shapes[j][1]);
        }
    m.y = take(512 * 1536 * 3, sizeof(float));
    for (size_t c = 0; c < 3; c++) {
        int64_t n = counts[c];
        bool precise = n <= 8; /* as rows that answer, and rows that read */
        m.narrow = (activations){.n_rows = n, .n_in = 576, .x = b->small, .precise = precise};
        m.wide = (activations){.n_rows = n, .n_in = 1536, .x = b->small, .precise = precise};
        float *x = take((size_t)n * 1536, sizeof *x);
        for (int64_t i = 0; i < n * 1536; i++) x[i] = b->small[i % SMALL];
        m.narrow.x = m.wide.x = x;
        m.narrow.quantized = take(activations_bytes(n, 576, precise), 1);
        m.wide.quantized = take(activations_bytes(n, 1536, precise), 1);
        activations_quantize(&m.narrow, b->kernels->matmul, b->pool);
        activations_quantize(&m.wide, b->kernels->matmul, b->pool);
        kernel k = {"matrix products", "", bytes, 2 * products * (double)n * (precise ? 2 : 1), FROM_MEMORY, INT8, 1, 0, products_task, &m};
        snprintf(k.at, sizeof k.at, "%s, %lld row%s%s", info->name, (long long)n, n == 1 ? "" : "s", precise ? ", two terms" : "");
        measure(b, k);
        memory_free(m.narrow.quantized);
        memory_free(m.wide.quantized);
        memory_free(x);
    }
    for (int i = 0; i < LAYERS; i++)
        for (int j = 0; j < 7; j++) weight_free(&m.layers[i][j]);
    memory_free(m.layers);
    memory_free(m.y);
    memory_free(blocks);
}

/* ---- attention ---- */

static const char *part_rows(const bench *b, int64_t part)
{
    return b->rows + (size_t)(part * b->n) * kv_row_bytes(KV_F16, D);
}

static void rows_task(void *context, int64_t part, int thread)
{
    enum { SPLIT = 2048 }; /* as attention does */
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    const char *rows = part_rows(b, part);
    attention_clear(&t->state, GROUP, D);
    for (int64_t first = 0; first < b->n; first += SPLIT) {
        int64_t n = b->n - first < SPLIT ? b->n - first : SPLIT;
        for (int64_t i = 0; i < n; i++) t->list[i] = rows + (size_t)(first + i) * kv_row_bytes(KV_F16, D);
        b->kernels->attention->rows(b->q, GROUP, D, KV_F16, t->list, n, NULL, &t->state);
    }
}

static void gather_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    const char *rows = part_rows(b, part);
    attention_clear(&t->state, GROUP, D);
    for (int64_t i = 0; i < b->n_chosen; i++) t->list[i] = rows + (size_t)b->chosen[i] * kv_row_bytes(KV_F16, D);
    b->kernels->attention->rows(b->q, GROUP, D, KV_F16, t->list, b->n_chosen, t->scores, &t->state);
}

static void tile_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    attention_clear(&t->state, TILE_ROWS * GROUP, D);
    for (int64_t first = 0; first + ATTENTION_TILE <= b->n; first += ATTENTION_TILE)
        b->kernels->attention->tile_coarse(b->q, b->limit, TILE_ROWS * GROUP, D, KV_F16,
                                           part_rows(b, part) + (size_t)first * kv_row_bytes(KV_F16, D), ATTENTION_TILE, t->scratch,
                                           &t->state);
}

static void accumulate_rows_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    const char *rows = part_rows(b, thread); /* the tail comes back to rows that attention has just read */
    (void)part;
    for (int64_t i = 0; i < b->n_chosen; i++) t->list[i] = rows + (size_t)b->chosen[i] * kv_row_bytes(KV_F16, D);
    b->kernels->retrieval->accumulate_rows(b->scale, GROUP, D, KV_F16, t->list, b->n_chosen, t->state.o);
}

/* ---- retrieval ---- */

static int64_t blocks_of(const bench *b)
{
    return (b->n + SCAN_BLOCK - 1) / SCAN_BLOCK;
}

static int64_t clusters_of(const bench *b)
{
    return b->n / CLUSTER;
}

static void lut_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    float lut[N_SUB * SCAN_CODES], low[N_SUB];
    uint8_t *bytes = b->threads[thread].scratch;
    for (int h = 0; h < GROUP; h++) {
        float range = b->kernels->retrieval->lut(b->q + h * D, b->tables + part * D * SCAN_CODES, N_SUB, D / N_SUB, lut, low);
        b->kernels->retrieval->lut_quantise(lut, low, SCAN_TOP / range, N_SUB, bytes + h * N_SUB * SCAN_CODES);
    }
}

static void scan_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    static const uint16_t offset[GROUP] = {1, 1, 1};
    int64_t n = blocks_of(b);
    b->kernels->retrieval->scan(b->codes + part * n * N_SUB * 16, N_SUB, n, b->bytes, GROUP, offset, b->threads[thread].keys,
                                n * SCAN_BLOCK);
}

static void exp_sum_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    int64_t n = blocks_of(b) * SCAN_BLOCK;
    uint16_t top;
    (void)part;
    for (int h = 0; h < GROUP; h++) b->kernels->retrieval->exp_sum(b->threads[thread].keys + h * n, n, 0.01f, &top);
}

static void merge_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    static const uint16_t up[GROUP] = {10, 0, 3}, down[GROUP] = {0, 4, 0};
    int64_t n = blocks_of(b) * SCAN_BLOCK;
    (void)part;
    b->kernels->retrieval->merge(t->keys, n, GROUP, up, down, n, t->merged);
}

static void count_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    (void)part;
    b->kernels->retrieval->count(b->threads[thread].merged, blocks_of(b) * SCAN_BLOCK, 900);
}

/* Keys are sums of random table entries; the threshold leaves a few percent. */
static void collect_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    int64_t ties = 0;
    (void)part;
    b->kernels->retrieval->collect(t->merged, blocks_of(b) * SCAN_BLOCK, t->merged[MOST_TOKENS], &ties, 4, t->ids);
}

static int64_t segments_of(const bench *b)
{
    return (b->n + SEGMENT - 1) / SEGMENT;
}

static void basis_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    static const float bias[GROUP];
    for (int64_t i = 0; i < segments_of(b); i++)
        b->kernels->retrieval->dot_i8(b->q, GROUP, D, b->basis + (part * segments_of(b) + i) * D * D, b->scale, bias, D,
                                      b->threads[thread].scores, D);
}

static void dot_i4_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    static const float factor[GROUP] = {0.1f, 0.1f, 0.1f}, bias[GROUP] = {9000, 9000, 9000};
    uint16_t top[GROUP] = {0};
    int64_t n = b->n / CANDIDATE;
    b->kernels->retrieval->dot_i4(b->query, factor, bias, GROUP, D, b->keys + part * b->n * D / 2, b->scale, b->candidates, n,
                                  b->threads[thread].keys, n, top);
}

static void cell_sums_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    bench_thread *t = &b->threads[thread];
    (void)part;
    for (int h = 0; h < GROUP; h++)
        b->kernels->retrieval->cell_sums(t->keys + h * blocks_of(b) * SCAN_BLOCK, b->begin, clusters_of(b), 0.01f, GROUP * N_SUB * SCAN_TOP,
                                         t->scores);
}

static void accumulate_i8_task(void *context, int64_t part, int thread)
{
    bench *b = context;
    int64_t n = clusters_of(b);
    b->kernels->retrieval->accumulate_i8(b->scale, n, GROUP, D, b->clusters + part * n * D, b->scale, n, b->threads[thread].state.o);
}

/* ---- vectors ---- */

static void norm_task(void *context, int64_t task, int thread)
{
    bench *b = context;
    (void)task, (void)thread;
    b->kernels->vector->rms_norm(b->small, b->small + SMALL, 1e-5f, 576, b->small + 2 * SMALL);
}

static void rope_task(void *context, int64_t task, int thread)
{
    bench *b = context;
    (void)task, (void)thread;
    for (int h = 0; h < 12; h++) b->kernels->vector->rope(b->small + 3 * SMALL + h * D, b->small + 3 * SMALL + SMALL / 2, D, true);
}

static void swiglu_task(void *context, int64_t task, int thread)
{
    bench *b = context;
    (void)task, (void)thread;
    b->kernels->vector->swiglu(b->small, b->small + SMALL, 1536, b->small + 2 * SMALL);
}

static void softmax_task(void *context, int64_t task, int thread)
{
    bench *b = context;
    float max;
    (void)task, (void)thread;
    memcpy(b->small + 2 * SMALL, b->small, 1024 * sizeof(float));
    b->kernels->vector->softmax_exp(b->small + 2 * SMALL, 1024, &max);
}

static void quantize_task(void *context, int64_t task, int thread)
{
    bench *b = context;
    activations a = {.n_rows = 1, .n_in = 1536, .x = b->small, .precise = true, .quantized = b->threads[0].scratch};
    (void)task, (void)thread;
    activations_quantize(&a, b->kernels->matmul, b->pool);
}

/* ---- all ---- */

static void fill(bench *b, void *out, size_t bytes, size_t pattern, uint64_t mask, uint64_t add)
{
    uint64_t *x = out;
    size_t n = bytes / 8, k = pattern / 8 < n ? pattern / 8 : n;
    for (size_t i = 0; i < k; i++) x[i] = (random_u64(&b->random) & mask) + add;
    for (size_t i = k; i < n; i += k) memcpy(x + i, x, (n - i < k ? n - i : k) * 8);
}

/* One id of every `step`, ascending. */
static void choose(bench *b, int32_t *ids, int step)
{
    for (int64_t i = 0; i < b->n / step; i++) ids[i] = (int32_t)(step * i + (int64_t)random_below(&b->random, (uint64_t)step));
}

static void prepare(bench *b)
{
    size_t rows_bytes = (size_t)(PARTS * b->n) * kv_row_bytes(KV_F16, D), code_bytes = (size_t)(PARTS * blocks_of(b)) * N_SUB * 16;
    size_t cluster_bytes = (size_t)(PARTS * clusters_of(b)) * D, key_bytes = (size_t)(PARTS * b->n) * D / 2;
    size_t basis_bytes = (size_t)(PARTS * segments_of(b)) * D * D;
    b->rows = take(rows_bytes, 1);
    b->codes = take(code_bytes, 1);
    b->clusters = take(cluster_bytes, 1);
    b->keys = take(key_bytes, 1);
    b->basis = take(basis_bytes, 1);
    fill(b, b->rows, rows_bytes, 1 << 20, 0x83ff83ff83ff83ffULL, 0x3400340034003400ULL); /* ±0.25 to 0.5 */
    fill(b, b->codes, code_bytes, 1 << 20, UINT64_MAX, 0);
    fill(b, b->clusters, cluster_bytes, 1 << 20, 0x3f3f3f3f3f3f3f3fULL, 0);
    fill(b, b->keys, key_bytes, 1 << 20, UINT64_MAX, 0);
    fill(b, b->basis, basis_bytes, 1 << 20, 0x3f3f3f3f3f3f3f3fULL, 0);
    b->n_chosen = b->n / 25;
    choose(b, b->chosen, 25);
    choose(b, b->candidates, CANDIDATE);
    for (int64_t c = 0; c <= clusters_of(b); c++) b->begin[c] = (uint32_t)(c * CLUSTER);
    for (int t = 0; t < b->n_threads; t++) {
        bench_thread *w = &b->threads[t];
        int64_t ties = 0, n = blocks_of(b) * SCAN_BLOCK;
        scan_task(b, t % PARTS, t);
        merge_task(b, 0, t);
        uint16_t threshold = 0;
        while (b->kernels->retrieval->collect(w->merged, n, threshold, &ties, 0, w->ids) > b->n_chosen) threshold++;
        w->merged[MOST_TOKENS] = threshold;
    }
}

static void unprepare(bench *b)
{
    memory_free(b->rows);
    memory_free(b->codes);
    memory_free(b->clusters);
    memory_free(b->keys);
    memory_free(b->basis);
}

static void bench_depth(bench *b, int64_t n)
{
    char at[64];
    b->n = n;
    prepare(b);
    snprintf(at, sizeof at, "%lld tokens", (long long)n);
    double tokens = (double)PARTS * (double)n, rows = (double)PARTS * (double)b->n_chosen,
           clusters = (double)PARTS * (double)clusters_of(b), candidates = (double)PARTS * (double)(n / CANDIDATE),
           bases = (double)PARTS * (double)segments_of(b) * D;
    double padded = (double)PARTS * (double)blocks_of(b) * SCAN_BLOCK, row = (double)kv_row_bytes(KV_F16, D);
    int64_t tile_parts = n > 10000 ? 8 : 30;
    double tile = (double)tile_parts * (double)(n / ATTENTION_TILE * ATTENTION_TILE);
    const kernel kernels[] = {
        {"attention rows, contiguous", "", tokens * row, tokens * 4 * D * GROUP, FROM_MEMORY, F32, 1, PARTS, rows_task, b},
        {"attention rows, one in 25", "", rows * row, rows * 4 * D * GROUP, FROM_MEMORY, F32, 1, PARTS, gather_task, b},
        {"attention tile, 64 rows", "", tile * row, tile * 4 * D * GROUP * TILE_ROWS, FROM_MEMORY, b->isa >= CPU_AVX512BF16 ? BF16 : F32, 1,
         tile_parts, tile_task, b},
        {"scan", "", padded * N_SUB / 2, padded * 2 * N_SUB * GROUP, FROM_MEMORY, SHUFFLE, 1, PARTS, scan_task, b},
        {"exp_sum", "", padded * 2 * GROUP, padded * 4 * GROUP, FROM_L2, F32, 1, PARTS, exp_sum_task, b},
        {"merge", "", padded * 2 * (GROUP + 1), 0, FROM_L2, NO_OPS, 1, PARTS, merge_task, b},
        {"count", "", padded * 2, 0, n > 10000 ? FROM_L2 : FROM_L1, NO_OPS, 1, PARTS, count_task, b},
        {"collect", "", padded * 2, 0, n > 10000 ? FROM_L2 : FROM_L1, NO_OPS, 1, PARTS, collect_task, b},
        {"dot_i8 (queries in the bases)", "", bases * D, bases * 2 * D * GROUP, FROM_MEMORY, F32, 1, PARTS, basis_task, b},
        {"dot_i4, one token in 10", "", candidates * (D / 2 + 8), candidates * 2 * D * GROUP, FROM_MEMORY, INT8, 1, PARTS, dot_i4_task, b},
        {"cell_sums", "", padded * 2 * GROUP, padded * 4 * GROUP, FROM_L2, F32, 1, PARTS, cell_sums_task, b},
        {"accumulate_i8 (cluster values)", "", clusters * D, clusters * 2 * D * GROUP, FROM_MEMORY, F32, 1, PARTS, accumulate_i8_task, b},
        {"accumulate_rows (read again)", "", rows * row / 2, rows * 2 * D * GROUP, FROM_L2, F32, 1, PARTS, accumulate_rows_task, b},
    };
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        kernel k = kernels[i];
        memcpy(k.at, at, sizeof at);
        measure(b, k);
    }
    unprepare(b);
}

/* Operations of exp: 19; of what else there is: see math/vector_simd.h. */
static void bench_small(bench *b)
{
    double lut = PARTS * (double)(D * SCAN_CODES);
    const kernel kernels[] = {
        {"lut and lut_quantise", "3 heads", lut * 4, lut * GROUP * 4, FROM_MEMORY, F32, 1, PARTS, lut_task, b},
        {"quantise activations", "1,536, two terms", 1536 * 4, 0, FROM_L1, NO_OPS, 1000, 0, quantize_task, b},
        {"rms_norm", "576", 576 * 16, 576 * 4, FROM_L1, F32, 1000, 0, norm_task, b},
        {"rope", "12 heads of 64", 12 * D * 8, 12 * D * 3, FROM_L1, F32, 1000, 0, rope_task, b},
        {"swiglu", "1,536", 1536 * 8, 1536 * 23, FROM_L1, F32, 1000, 0, swiglu_task, b},
        {"softmax_exp, with a copy", "1,024", 1024 * 12, 1024 * 22, FROM_L1, F32, 1000, 0, softmax_task, b},
    };
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) measure(b, kernels[i]);
}

static void buffers(bench *b)
{
    b->tables = take((size_t)PARTS * D * SCAN_CODES, sizeof *b->tables);
    b->scale = take((size_t)MOST_TOKENS * GROUP, sizeof *b->scale);
    b->chosen = take(MOST_TOKENS, sizeof *b->chosen);
    b->candidates = take(MOST_TOKENS, sizeof *b->candidates);
    b->begin = take(MOST_TOKENS / CLUSTER + 1, sizeof *b->begin);
    b->query = take((size_t)GROUP * D, 1);
    for (int i = 0; i < GROUP * D; i++) b->query[i] = (int8_t)((int)random_below(&b->random, 201) - 100);
    b->q = take((size_t)GROUP * TILE_ROWS * D, sizeof *b->q);
    b->small = take(4 * (size_t)SMALL, sizeof *b->small);
    b->limit = take((size_t)GROUP * TILE_ROWS, sizeof *b->limit);
    b->bytes = take((size_t)GROUP * N_SUB * SCAN_CODES, 1);
    b->evict = take(EVICT_BYTES, 1);
    memset(b->evict, 1, EVICT_BYTES);
    for (int i = 0; i < PARTS * D * SCAN_CODES; i++) b->tables[i] = (float)random_normal(&b->random);
    for (int i = 0; i < MOST_TOKENS * GROUP; i++) b->scale[i] = 0.01f;
    for (int i = 0; i < GROUP * TILE_ROWS * D; i++) b->q[i] = (float)random_normal(&b->random) / 8;
    for (int i = 0; i < 4 * SMALL; i++) b->small[i] = (float)random_normal(&b->random);
    for (int i = 0; i < D / 2; i++) { /* a rotation, so that values stay */
        b->small[3 * SMALL + SMALL / 2 + 2 * i] = cosf((float)i);
        b->small[3 * SMALL + SMALL / 2 + 2 * i + 1] = sinf((float)i);
    }
    for (int i = 0; i < GROUP * TILE_ROWS; i++) b->limit[i] = ATTENTION_TILE;
    for (int i = 0; i < GROUP * N_SUB * SCAN_CODES; i++) b->bytes[i] = (uint8_t)random_below(&b->random, SCAN_TOP + 1);
    size_t scratch = attention_tile_scratch(GROUP * TILE_ROWS, D);
    for (int t = 0; t < b->n_threads; t++) {
        bench_thread *w = &b->threads[t];
        w->list = take(MOST_TOKENS, sizeof *w->list);
        w->scores = take((size_t)GROUP * MOST_TOKENS, sizeof *w->scores);
        w->keys = take((size_t)GROUP * MOST_TOKENS, sizeof *w->keys);
        w->merged = take(MOST_TOKENS + 1, sizeof *w->merged);
        w->ids = take(MOST_TOKENS + SCAN_BLOCK, sizeof *w->ids);
        w->scratch = take(scratch > 65536 ? scratch : 65536, 1);
        w->state.m = take((size_t)GROUP * TILE_ROWS, sizeof(float));
        w->state.l = take((size_t)GROUP * TILE_ROWS, sizeof(float));
        w->state.o = take((size_t)GROUP * TILE_ROWS * D, sizeof(float));
        attention_clear(&w->state, GROUP * TILE_ROWS, D);
    }
}

int main(int argc, char **argv)
{
    static bench b;
    quarry_error error;
    char machine[256];
    b.n_threads = argc > 1 ? atoi(argv[1]) : cpu_count();
    if (b.n_threads < 1 || b.n_threads > MAX_THREADS) {
        fprintf(stderr, "usage: bench_roofline [threads, at most %d]\n", MAX_THREADS);
        return 1;
    }
    b.pool = thread_pool_create(b.n_threads, &error);
    if (!b.pool || cpu_choose(&b.isa, &error) != QUARRY_OK) {
        fprintf(stderr, "bench_roofline: %s\n", error.message);
        return 1;
    }
    if (!peaks_measure(b.pool, b.peaks)) {
        fprintf(stderr, "bench_roofline: not enough memory\n");
        return 1;
    }
    b.kernels = math_kernels_get(b.isa);
    random_seed(&b.random, 1);
    buffers(&b);
    peaks_machine(b.n_threads, machine, sizeof machine);
    printf("%s; kernels: %s; peaks: memory %.1f GB/s, L2 %.0f, L1 %.0f, f32 %.0f Gop/s, int8 %.0f, byte shuffles %.0f\n\n", machine,
           b.kernels->isa, peaks_memory(b.peaks), b.peaks[PEAK_L2].all, b.peaks[PEAK_L1].all, peaks_f32(b.peaks, b.isa),
           peaks_i8(b.peaks, b.isa), peaks_shuffle(b.peaks, b.isa));
    printf("| kernel | at | GB/s | Gop/s | bound | share of it |\n| :-- | :-- | --: | --: | :-- | --: |\n");
    bench_products(&b, BLOCK_Q4_1);
    bench_products(&b, BLOCK_Q8_0);
    bench_depth(&b, 7600);
    bench_depth(&b, MOST_TOKENS);
    bench_small(&b);
    thread_pool_destroy(b.pool);
    return 0;
}
