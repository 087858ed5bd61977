/* Matrix products on the shapes of SmolLM2-135M: GB/s of weights for up to 16 rows of activations, Gop/s (two per multiply-add) for many rows.
 *
 *     cmake --build build --target bench_matmul && build/bench_matmul [threads] [rows, negative: precise] [block types]
 *
 * Weights for few rows are rotated through 256 MB of copies, so that they come from memory as in a decode step. Prints the tenth percentile and the median
 * of single products' times. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "base/base.h"
#include "math/math.h"

enum { ROTATE_BYTES = 256 << 20, MAX_COPIES = 4096 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Times n single products, each with the next copy of the weights; seconds at the tenth percentile and the median. */
static void time_products(const matmul_kernels *kernels, thread_pool *pool, const weight *w, int n_copies, int n, activations *a, float *y,
                          double *low, double *median)
{
    double *seconds = malloc((size_t)n * sizeof *seconds);
    for (int i = 0; i < n; i++) {
        double start = now();
        matmul_job job = {&w[i % n_copies], NULL, y, false};
        activations_quantize(a, kernels, pool);
        matmul_run(kernels, pool, a, &job, 1);
        seconds[i] = now() - start;
    }
    qsort(seconds, (size_t)n, sizeof *seconds, compare);
    *low = seconds[n / 10];
    *median = seconds[n / 2];
    free(seconds);
}

static void bench_shape(const matmul_kernels *kernels, const char *isa, thread_pool *pool, block_type type, int64_t n_out, int64_t n_in,
                        int64_t n_rows, bool precise)
{
    const block_info *info = block_info_get(type);
    if (n_in % info->n_weights != 0) return;
    random_state r;
    random_seed(&r, 1);
    size_t n_bytes = (size_t)(n_out * n_in / info->n_weights) * info->n_bytes;
    uint8_t *source = malloc(n_bytes);
    for (size_t i = 0; i < n_bytes; i++) source[i] = (uint8_t)(random_u64(&r) & 0x3b); /* keeps scales finite */
    float *x = malloc((size_t)(n_rows * n_in) * sizeof *x), *y = malloc((size_t)(n_rows * n_out) * sizeof *y);
    for (int64_t i = 0; i < n_rows * n_in; i++) x[i] = (float)random_normal(&r);
    activations a = {.n_rows = n_rows, .n_in = n_in, .x = x, .precise = precise};
    a.quantized = memory_aligned(activations_bytes(n_rows, n_in, precise), 1, "bench", NULL);
    int n_copies = n_rows > 16 ? 1 : (int)(ROTATE_BYTES / n_bytes) + 1;
    if (n_copies > MAX_COPIES) n_copies = MAX_COPIES;
    weight *w = malloc((size_t)n_copies * sizeof *w);
    double pack = now();
    for (int i = 0; i < n_copies; i++) weight_make(&w[i], kernels, pool, type, n_out, n_in, source, NULL);
    pack = now() - pack;
    double low, median, ops = 2.0 * (double)n_out * (double)n_in * (double)n_rows, work = n_rows > 16 ? ops : (double)n_bytes;
    int calls = (int)(n_rows > 16 ? 3e10 / ops : 1e9 / (double)n_bytes) + 10;
    time_products(kernels, pool, w, n_copies, calls, &a, y, &low, &median);
    printf("%-10s %-6s %6lld x %-5lld rows %-4lld %8.1f (median %.1f) %s   pack %.2f GB/s\n", isa, info->name, (long long)n_out,
           (long long)n_in, (long long)n_rows, work / low * 1e-9, work / median * 1e-9, n_rows > 16 ? "Gop/s" : "GB/s",
           (double)n_bytes * n_copies / pack * 1e-9);
    for (int i = 0; i < n_copies; i++) weight_free(&w[i]);
    free(w);
    free(source);
    free(x);
    free(y);
    memory_free(a.quantized);
}

int main(int argc, char **argv)
{
    static const int64_t shapes[][2] = {{576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {49152, 576}};
    int n_threads = argc > 1 ? atoi(argv[1]) : cpu_count();
    int64_t rows[] = {1, 512};
    int n_sizes = argc > 2 ? 1 : 2;
    bool precise = argc > 2 && atoi(argv[2]) < 0;
    if (argc > 2) rows[0] = abs(atoi(argv[2]));
    block_type types[16] = {BLOCK_Q4_1, BLOCK_Q8_0};
    int n_types = 2;
    if (argc > 3)
        for (n_types = 0; n_types + 3 < argc && n_types < 16; n_types++) types[n_types] = (block_type)atoi(argv[3 + n_types]);
    cpu_isa best;
    quarry_error error;
    thread_pool *pool = thread_pool_create(n_threads, &error);
    if (!pool || cpu_choose(&best, &error) != QUARRY_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    for (int isa = CPU_AVX2; isa <= (int)best; isa++) {
        if (isa == CPU_AVX512) continue; /* has the matrix products of AVX2 */
        const matmul_kernels *kernels = isa == CPU_AVX2 ? &matmul_avx2 : &matmul_avx512vnni;
        for (int type = 0; type < n_types; type++)
            for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
                for (int n = 0; n < n_sizes; n++)
                    bench_shape(kernels, cpu_isa_name((cpu_isa)isa), pool, types[type], shapes[s][0], shapes[s][1], rows[n], precise);
    }
    thread_pool_destroy(pool);
    return 0;
}
