/* Attention kernels on one thread: decode over contiguous and gathered rows in GB/s of K|V, dense tiles in GFLOP/s beside what the
 * machine's multiply-adds reach in registers. Levels take turns, so that they see the same noise; minimum and median of the rounds.
 * Usage: bench_attention [d] [g] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/base.h"
#include "math/attention.h"
#include "math/vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { N_ROWS = 8192, N_COPIES = 64, N_QUERIES = 192, N_TILES = 32, ROUNDS = 15, N_LEVELS = 4 };

static const char *const names[N_LEVELS] = {"scalar", "avx2", "avx512", "avx512bf16"};
static const attention_kernels *const kernels[N_LEVELS] = {
    &attention_scalar,
#if defined(__x86_64__)
    &attention_avx2,
    &attention_avx512,
    &attention_avx512bf16,
#endif
};

typedef struct bench {
    int g, d;
    size_t bytes;      /* of a row */
    char *rows;        /* [N_COPIES][N_ROWS]: more than any cache, so that every pass reads memory */
    const void **list; /* [N_COPIES][N_ROWS] */
    float *q;          /* [N_QUERIES][d] */
    int *limit;        /* [N_QUERIES] */
    void *scratch;
    attention_state state;
    int round;
} bench;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double run_rows(bench *b, const attention_kernels *k, int64_t n, int copy)
{
    double start = now();
    attention_clear(&b->state, b->g, b->d);
    k->rows(b->q, b->g, b->d, KV_F16, b->list + (int64_t)copy * N_ROWS, n, NULL, &b->state);
    return now() - start;
}

/* A reader of memory and nothing else, for comparison. */
static double run_read(bench *b, int copy)
{
    double start = now();
    const uint64_t *x = (const uint64_t *)(b->rows + (size_t)copy * N_ROWS * b->bytes);
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < N_ROWS * b->bytes / 8; i += 8)
        for (int j = 0; j < 8; j++) sum[j] ^= x[i + (size_t)j];
    volatile uint64_t sink = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
    (void)sink;
    return now() - start;
}

static double run_tiles(bench *b, const attention_kernels *k, int nq, bool causal)
{
    double start = now();
    attention_clear(&b->state, nq, b->d);
    for (int t = 0; t < N_TILES; t++) {
        for (int i = 0; i < nq; i++) b->limit[i] = causal ? i * ATTENTION_TILE / nq + 1 : ATTENTION_TILE;
        k->tile_coarse(b->q, b->limit, nq, b->d, KV_F16, b->rows + (size_t)t * ATTENTION_TILE * b->bytes, ATTENTION_TILE, b->scratch,
                       &b->state);
    }
    return now() - start;
}

#if defined(__x86_64__)
enum { PEAK_STEPS = 200000 };
#define PEAK(name, isa, type, lanes, set, fma)                                                                                             \
    __attribute__((target(isa))) static double name(void)                                                                                  \
    {                                                                                                                                      \
        type a[12], x = set(0.999f), y = set(1e-3f);                                                                                       \
        for (int i = 0; i < 12; i++) a[i] = set((float)i);                                                                                 \
        double start = now();                                                                                                              \
        for (int k = 0; k < PEAK_STEPS; k++)                                                                                               \
            for (int i = 0; i < 12; i++) a[i] = fma(a[i], x, y);                                                                           \
        for (int i = 1; i < 12; i++) a[0] = fma(a[0], x, a[i]);                                                                            \
        volatile float sink = a[0][0];                                                                                                     \
        (void)sink;                                                                                                                        \
        return (now() - start) / (2.0 * 12 * lanes * PEAK_STEPS);                                                                          \
    }
PEAK(peak_avx2, "avx2,fma", __m256, 8, _mm256_set1_ps, _mm256_fmadd_ps)
PEAK(peak_avx512, "avx512f", __m512, 16, _mm512_set1_ps, _mm512_fmadd_ps)
#endif

/* Seconds per floating-point operation of the level's multiply-adds in registers; 0 for scalar. */
static double run_peak(int level)
{
#if defined(__x86_64__)
    if (level == 1) return peak_avx2();
    if (level == 2) return peak_avx512();
#endif
    (void)level;
    return 0;
}

typedef enum bench_case {
    CASE_PEAK,
    CASE_READ,
    CASE_CONTIGUOUS,
    CASE_GATHERED,
    CASE_CACHED,
    CASE_TILE,
    CASE_TILE_SMALL,
    CASE_CAUSAL,
    N_CASES
} bench_case;
static const char *const case_names[N_CASES] = {
    "multiply-adds in registers", "reading memory only", "rows, contiguous", "rows, gathered",
    "rows, 512 in cache",         "tile, 192 queries",   "tile, 12 queries", "tile, 192 queries, causal"};

/* One measurement: seconds per unit (byte or floating-point operation). */
static double measure(bench *b, bench_case c, int level)
{
    const attention_kernels *k = kernels[level];
    double tile_ops = 4.0 * ATTENTION_TILE * b->d * N_TILES, bytes = (double)(N_ROWS * b->bytes);
    int copy = b->round++ % (N_COPIES / 2);
    switch (c) {
    case CASE_PEAK: return run_peak(level);
    case CASE_READ: return run_read(b, copy) / bytes;
    case CASE_CONTIGUOUS: return run_rows(b, k, N_ROWS, copy) / bytes;
    case CASE_GATHERED: return run_rows(b, k, N_ROWS, N_COPIES / 2 + copy) / bytes;
    case CASE_CACHED: run_rows(b, k, 512, 0); return run_rows(b, k, 512, 0) / (512.0 * (double)b->bytes);
    case CASE_TILE: return run_tiles(b, k, N_QUERIES, false) / (N_QUERIES * tile_ops);
    case CASE_TILE_SMALL: return run_tiles(b, k, 12, false) / (12 * tile_ops);
    default: return run_tiles(b, k, N_QUERIES, true) / (N_QUERIES * tile_ops * (ATTENTION_TILE + 1) / (2.0 * ATTENTION_TILE));
    }
}

static bool prepare(bench *b)
{
    random_state r;
    random_seed(&r, 1);
    int64_t n = (int64_t)N_COPIES * N_ROWS;
    b->bytes = kv_row_bytes(KV_F16, b->d);
    b->rows = memory_aligned((size_t)n, b->bytes, "rows", NULL);
    b->list = memory_aligned((size_t)n, sizeof *b->list, "list", NULL);
    b->q = memory_aligned((size_t)(N_QUERIES * b->d), sizeof *b->q, "queries", NULL);
    b->limit = memory_aligned(N_QUERIES, sizeof *b->limit, "limits", NULL);
    b->scratch = memory_aligned(attention_tile_scratch(N_QUERIES, b->d), 1, "scratch", NULL);
    b->state.m = memory_aligned(N_QUERIES, sizeof(float), "state", NULL);
    b->state.l = memory_aligned(N_QUERIES, sizeof(float), "state", NULL);
    b->state.o = memory_aligned((size_t)(N_QUERIES * b->d), sizeof(float), "state", NULL);
    if (!b->rows || !b->list || !b->q || !b->limit || !b->scratch || !b->state.m || !b->state.l || !b->state.o) return false;
    for (size_t i = 0; i < (size_t)n * b->bytes / 2; i++)
        ((uint16_t *)b->rows)[i] = (uint16_t)(random_u64(&r) % 0x4000 | (random_u64(&r) & 0x8000));
    for (int i = 0; i < N_QUERIES * b->d; i++) b->q[i] = (float)random_normal(&r) / 8;
    for (int64_t i = 0; i < n; i++) b->list[i] = b->rows + (size_t)i * b->bytes;
    for (int64_t i = n - 1; i > n / 2; i--) { /* the second half is gathered: in random order */
        int64_t j = n / 2 + (int64_t)random_below(&r, (uint64_t)(i - n / 2 + 1));
        const void *swap = b->list[i];
        b->list[i] = b->list[j], b->list[j] = swap;
    }
    return true;
}

int main(int argc, char **argv)
{
    bench b = {.d = argc > 1 ? atoi(argv[1]) : 64, .g = argc > 2 ? atoi(argv[2]) : 3};
    if (b.d < 8 || b.d > 1024 || b.d % 8 || b.g < 1 || b.g > 64 || !prepare(&b)) {
        fprintf(stderr, "bench_attention: d is a multiple of 8 up to 1024, g at most 64; or too little memory\n");
        return 1;
    }
    static double times[N_CASES][N_LEVELS][ROUNDS];
    int best = cpu_detect() == CPU_AVX512BF16 ? 3 : cpu_detect() > CPU_AVX512 ? 2 : (int)cpu_detect();
    for (int round = 0; round < ROUNDS; round++)
        for (int c = 0; c < N_CASES; c++)
            for (int level = best > 0 && round > 0 ? 1 : 0; level <= best; level++)
                times[c][level][round] = measure(&b, (bench_case)c, level);
    printf("d %d, g %d, f16 rows of %zu bytes, %d rows; one thread; best (median) of %d rounds, scalar: 1\n", b.d, b.g, b.bytes, N_ROWS,
           ROUNDS);
    for (int c = 0; c < N_CASES; c++) {
        printf("%-28s", case_names[c]);
        for (int level = 0; level <= best; level++) {
            int n = best > 0 && level == 0 ? 1 : ROUNDS;
            qsort(times[c][level], (size_t)n, sizeof(double), compare);
            double min = times[c][level][0], median = times[c][level][n / 2];
            if (min > 0) printf("  %s %6.1f (%6.1f)", names[level], 1e-9 / min, 1e-9 / median);
        }
        printf("  %s\n", c == CASE_READ || (c >= CASE_CONTIGUOUS && c <= CASE_CACHED) ? "GB/s" : "GFLOP/s");
    }
    memory_free(b.rows), memory_free(b.list), memory_free(b.q), memory_free(b.limit), memory_free(b.scratch);
    memory_free(b.state.m), memory_free(b.state.l), memory_free(b.state.o);
    return 0;
}
