/* Each figure is the best of many short runs: what disturbs a run only ever makes it slower. Loops keep their work alive through empty assembler
 * statements that claim to change the accumulators. */
#include "lib/peaks.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

enum { MEMORY_BYTES = 256 << 20, CHAINS = 12, STREAMS = 4, AHEAD = 2048 };

static const struct {
    const char *name;
    bool reads;
} labels[PEAK_N] = {
    [PEAK_MEMORY] = {"memory, 4 KB pages", true},
    [PEAK_MEMORY_HUGE] = {"memory, 2 MB pages", true},
    [PEAK_L3] = {"L3", true},
    [PEAK_L2] = {"L2", true},
    [PEAK_L1] = {"L1", true},
    [PEAK_F32_AVX2] = {"f32 multiply-add, AVX2", false},
    [PEAK_F32_AVX512] = {"f32 multiply-add, AVX-512", false},
    [PEAK_BF16_AVX512] = {"bf16 dot (vdpbf16ps), AVX-512", false},
    [PEAK_I8_AVX2] = {"int8 dot (vpmaddubsw, vpmaddwd), AVX2", false},
    [PEAK_I8_VNNI] = {"int8 dot (vpdpbusd), AVX-512 VNNI", false},
    [PEAK_SHUFFLE_AVX2] = {"byte look-up and add, AVX2", false},
    [PEAK_SHUFFLE_AVX512] = {"byte look-up and add, AVX-512", false},
};

double bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- loops ---- */

/* Reads n bytes once in n_streams equal parts side by side, with a prefetch `ahead` bytes ahead. */
typedef void (*read_fn)(const char *data, size_t n, int n_streams, size_t ahead);
/* Runs n rounds of CHAINS independent instructions. */
typedef void (*compute_fn)(int64_t n);

static void read_plain(const char *data, size_t n, int n_streams, size_t ahead)
{
    const uint64_t *x = (const uint64_t *)(const void *)data;
    uint64_t sum[8] = {0};
    (void)n_streams, (void)ahead;
    for (size_t i = 0; i < n / 8; i += 8)
        for (size_t j = 0; j < 8; j++) sum[j] ^= x[i + j];
    for (int j = 0; j < 8; j++) __asm__ volatile("" ::"r"(sum[j]));
}

#if defined(__x86_64__)
/* Eight loads per stream and round; n is a multiple of what that takes. */
#define READ(name, isa, type, load, xor, zero)                                                                                             \
    __attribute__((target(isa))) static void name(const char *data, size_t n, int n_streams, size_t ahead)                                 \
    {                                                                                                                                      \
        type a[8];                                                                                                                         \
        size_t part = n / (size_t)n_streams;                                                                                               \
        for (int j = 0; j < 8; j++) a[j] = zero();                                                                                         \
        for (size_t i = 0; i < part; i += 8 * sizeof(type))                                                                                \
            for (int s = 0; s < n_streams; s++) {                                                                                          \
                const type *x = (const type *)(const void *)(data + (size_t)s * part + i);                                                 \
                for (int j = 0; j < 8; j++) a[j] = xor(a[j], load(x + j));                                                                 \
                for (size_t j = 0; ahead && j < 8 * sizeof(type); j += 64) _mm_prefetch((const char *)x + ahead + j, _MM_HINT_T0);         \
            }                                                                                                                              \
        for (int j = 0; j < 8; j++) __asm__ volatile("" ::"v"(a[j]));                                                                      \
    }
READ(read_avx2, "avx2", __m256i, _mm256_load_si256, _mm256_xor_si256, _mm256_setzero_si256)
READ(read_avx512, "avx512f", __m512i, _mm512_load_si512, _mm512_xor_si512, _mm512_setzero_si512)

/* Twelve sums, by name: elements of an array would go through memory. */
#define EACH(step) step(a0) step(a1) step(a2) step(a3) step(a4) step(a5) step(a6) step(a7) step(a8) step(a9) step(a10) step(a11)
#define COMPUTE(name, isa, type, set, step)                                                                                                \
    __attribute__((target(isa))) static void name(int64_t n)                                                                               \
    {                                                                                                                                      \
        type x = set, y = set, a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, a8 = x, a9 = x, a10 = x, a11 = x;           \
        for (int64_t k = 0; k < n; k++) {                                                                                                  \
            __asm__ volatile("" : "+v"(x), "+v"(y));                                                                                       \
            EACH(step)                                                                                                                     \
        }                                                                                                                                  \
    }
#define KEEP(a) __asm__ volatile("" : "+v"(a));
/* What does not depend on the sums would leave the loop, were x not claimed to change. */
#define RENEW __asm__ volatile("" : "+v"(x));
#define STEP_F32_AVX2(a)                                                                                                                   \
    a = _mm256_fmadd_ps(a, x, y);                                                                                                          \
    KEEP(a)
#define STEP_F32_AVX512(a)                                                                                                                 \
    a = _mm512_fmadd_ps(a, x, y);                                                                                                          \
    KEEP(a)
#define STEP_BF16(a)                                                                                                                       \
    a = _mm512_dpbf16_ps(a, (__m512bh)x, (__m512bh)y);                                                                                     \
    KEEP(a)
#define STEP_I8_AVX2(a)                                                                                                                    \
    RENEW a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), y));                                                       \
    KEEP(a)
#define STEP_VNNI(a)                                                                                                                       \
    a = _mm512_dpbusd_epi32(a, x, y);                                                                                                      \
    KEEP(a)
#define STEP_SHUFFLE_AVX2(a)                                                                                                               \
    RENEW a = _mm256_add_epi8(a, _mm256_shuffle_epi8(x, y));                                                                               \
    KEEP(a)
#define STEP_SHUFFLE_AVX512(a)                                                                                                             \
    RENEW a = _mm512_add_epi8(a, _mm512_shuffle_epi8(x, y));                                                                               \
    KEEP(a)
COMPUTE(f32_avx2, "avx2,fma", __m256, _mm256_set1_ps(0.5f), STEP_F32_AVX2)
COMPUTE(f32_avx512, "avx512f", __m512, _mm512_set1_ps(0.5f), STEP_F32_AVX512)
COMPUTE(bf16_avx512, "avx512f,avx512bw,avx512bf16", __m512, _mm512_set1_ps(0.5f), STEP_BF16)
COMPUTE(i8_avx2, "avx2", __m256i, _mm256_set1_epi8(1), STEP_I8_AVX2)
COMPUTE(i8_vnni, "avx512f,avx512bw,avx512vnni", __m512i, _mm512_set1_epi8(1), STEP_VNNI)
COMPUTE(shuffle_avx2, "avx2", __m256i, _mm256_set1_epi8(1), STEP_SHUFFLE_AVX2)
COMPUTE(shuffle_avx512, "avx512f,avx512bw", __m512i, _mm512_set1_epi8(1), STEP_SHUFFLE_AVX512)

/* Operations of one round of CHAINS. */
static const struct {
    compute_fn fn;
    double ops;
} loops[PEAK_N] = {
    [PEAK_F32_AVX2] = {f32_avx2, CHAINS * 8 * 2},
    [PEAK_F32_AVX512] = {f32_avx512, CHAINS * 16 * 2},
    [PEAK_BF16_AVX512] = {bf16_avx512, CHAINS * 32 * 2},
    [PEAK_I8_AVX2] = {i8_avx2, CHAINS * 32 * 2},
    [PEAK_I8_VNNI] = {i8_vnni, CHAINS * 64 * 2},
    [PEAK_SHUFFLE_AVX2] = {shuffle_avx2, CHAINS * 32 * 2},
    [PEAK_SHUFFLE_AVX512] = {shuffle_avx512, CHAINS * 64 * 2},
};

static bool has_bf16(void)
{
    unsigned a, b, c, d;
    return cpu_detect() >= CPU_AVX512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

/* ---- runs ---- */

typedef struct race {
    int n;
    _Atomic int ready;
    double start[256], end[256]; /* of each thread */
    read_fn read;
    int n_streams;
    size_t ahead;
    int64_t rounds;
    const char *data; /* [n][bytes] */
    size_t bytes;
    compute_fn compute;
} race;

/* All threads begin together, each with one task: a task waits for the others. */
static void race_task(void *context, int64_t task, int thread)
{
    (void)thread;
    race *r = context;
    atomic_fetch_add(&r->ready, 1);
    while (atomic_load(&r->ready) < r->n) {
    }
    r->start[task] = bench_now();
    if (r->compute)
        r->compute(r->rounds);
    else
        for (int64_t i = 0; i < r->rounds; i++) r->read(r->data + (size_t)task * r->bytes, r->bytes, r->n_streams, r->ahead);
    r->end[task] = bench_now();
}

/* Seconds from the first start to the last end. */
static double race_run(race *r, thread_pool *pool)
{
    atomic_store(&r->ready, 0);
    thread_pool_run(pool, r->n, race_task, r);
    double first = r->start[0], last = r->end[0];
    for (int i = 1; i < r->n; i++) {
        first = r->start[i] < first ? r->start[i] : first;
        last = r->end[i] > last ? r->end[i] : last;
    }
    return last - first;
}

/* The best of `times` runs, in 1e9 units per second. */
static double race_best(race *r, thread_pool *pool, double units, int times)
{
    double best = 0;
    for (int i = 0; i < times; i++) {
        double rate = units * r->n / race_run(r, pool) * 1e-9;
        best = rate > best ? rate : best;
    }
    return best;
}

/* The threads read together `bytes` each, again and again; the best pattern counts. */
static double read_rate(thread_pool *pool, read_fn read, const char *data, size_t bytes, int n)
{
    double best = 0;
    size_t quantum = STREAMS * 8 * 64;
    bytes = bytes / quantum * quantum;
    bool cached = bytes * (size_t)n < MEMORY_BYTES / 2;
    int64_t rounds = cached ? (16 << 20) / (int64_t)bytes + 1 : 1;
    for (int streams = 1; streams <= STREAMS; streams *= 2)
        for (size_t ahead = 0; ahead <= (cached ? 0 : AHEAD); ahead += AHEAD) {
            race r = {.n = n, .read = read, .n_streams = streams, .ahead = ahead, .rounds = rounds, .data = data, .bytes = bytes};
            double rate = race_best(&r, pool, (double)rounds * (double)bytes, cached ? 20 : 5);
            best = rate > best ? rate : best;
        }
    return best;
}

/* sysconf reports all last-level caches of the socket as one, also those a virtual machine does not see. */
static size_t cache_bytes(int level)
{
    static const int index[] = {0, 2, 3};
    static const int defaults[] = {32, 256, 8 << 10}; /* where the system does not tell */
    char path[64];
    int kb = 0;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index[level - 1]);
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%dK", &kb) != 1) kb = defaults[level - 1];
    if (f) fclose(f);
    return (size_t)kb << 10;
}

static void *map(size_t bytes, bool huge)
{
    enum { HUGE_PAGE = 2 << 20 };
    char *p = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return NULL;
    p += (HUGE_PAGE - (uintptr_t)p % HUGE_PAGE) % HUGE_PAGE;
    madvise(p, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    memset(p, 1, bytes);
    return p;
}

/* Bytes of this process in huge pages. */
static long huge_bytes(void)
{
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    char line[256];
    long kb = 0;
    while (f && fgets(line, sizeof line, f)) sscanf(line, "AnonHugePages: %ld", &kb);
    if (f) fclose(f);
    return kb << 10;
}

static void measure_reads(thread_pool *pool, read_fn read, peak *peaks, const char *small, const char *huge)
{
    int n = thread_pool_size(pool);
    size_t share = cache_bytes(3) / 2 / (size_t)n, l2 = cache_bytes(2);
    const struct {
        peak_kind kind;
        const char *data;
        size_t one, all; /* bytes per thread */
    } runs[] = {{PEAK_MEMORY, small, MEMORY_BYTES, MEMORY_BYTES / (size_t)n},
                {PEAK_MEMORY_HUGE, huge, MEMORY_BYTES, MEMORY_BYTES / (size_t)n},
                {PEAK_L3, huge, 4 * l2, 4 * l2 < share ? 4 * l2 : share},
                {PEAK_L2, huge, l2 / 2, l2 / 2},
                {PEAK_L1, huge, cache_bytes(1) / 2, cache_bytes(1) / 2}};
    for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++) {
        peak *p = &peaks[runs[i].kind];
        p->present = true;
        p->one = read_rate(pool, read, runs[i].data, runs[i].one, 1);
        p->all = read_rate(pool, read, runs[i].data, runs[i].all, n);
    }
    if (huge_bytes() < MEMORY_BYTES / 2) {
        peaks[PEAK_MEMORY_HUGE].present = false;
        peaks[PEAK_MEMORY_HUGE].why = "the system gives no huge pages";
    }
}

bool peaks_measure(thread_pool *pool, peak peaks[PEAK_N])
{
    read_fn read = read_plain;
    for (int i = 0; i < PEAK_N; i++) peaks[i] = (peak){.name = labels[i].name, .reads = labels[i].reads, .why = "not on this processor"};
#if defined(__x86_64__)
    enum { ROUNDS = 200000 };
    cpu_isa isa = cpu_detect();
    if (isa >= CPU_AVX2) read = isa >= CPU_AVX512 ? read_avx512 : read_avx2;
    peaks[PEAK_F32_AVX2].present = peaks[PEAK_I8_AVX2].present = peaks[PEAK_SHUFFLE_AVX2].present = isa >= CPU_AVX2;
    peaks[PEAK_F32_AVX512].present = peaks[PEAK_SHUFFLE_AVX512].present = isa >= CPU_AVX512;
    peaks[PEAK_I8_VNNI].present = isa >= CPU_AVX512VNNI;
    peaks[PEAK_BF16_AVX512].present = has_bf16();
    for (int i = 0; i < PEAK_N; i++) {
        if (!peaks[i].present) continue;
        race r = {.n = 1, .compute = loops[i].fn, .rounds = ROUNDS};
        peaks[i].one = race_best(&r, pool, ROUNDS * loops[i].ops, 20);
        r.n = thread_pool_size(pool);
        peaks[i].all = race_best(&r, pool, ROUNDS * loops[i].ops, 20);
    }
#endif
    char *small = map(MEMORY_BYTES, false), *huge = small ? map(MEMORY_BYTES, true) : NULL;
    if (!huge) return false;
    measure_reads(pool, read, peaks, small, huge);
    munmap(small, MEMORY_BYTES);
    munmap(huge, MEMORY_BYTES);
    return true;
}

static double best_of(const peak peaks[PEAK_N], peak_kind low, peak_kind high, bool high_allowed)
{
    return high_allowed && peaks[high].present && peaks[high].all > peaks[low].all ? peaks[high].all : peaks[low].all;
}

double peaks_memory(const peak peaks[PEAK_N])
{
    return best_of(peaks, PEAK_MEMORY, PEAK_MEMORY_HUGE, true);
}

double peaks_f32(const peak peaks[PEAK_N], cpu_isa isa)
{
    return best_of(peaks, PEAK_F32_AVX2, PEAK_F32_AVX512, isa >= CPU_AVX512);
}

double peaks_i8(const peak peaks[PEAK_N], cpu_isa isa)
{
    return best_of(peaks, PEAK_I8_AVX2, PEAK_I8_VNNI, isa >= CPU_AVX512VNNI);
}

double peaks_shuffle(const peak peaks[PEAK_N], cpu_isa isa)
{
    return best_of(peaks, PEAK_SHUFFLE_AVX2, PEAK_SHUFFLE_AVX512, isa >= CPU_AVX512);
}

void peaks_machine(int n_threads, char *out, size_t size)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256], name[128] = "unknown processor";
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "model name : %127[^\n]", name) == 1) break;
    if (f) fclose(f);
    snprintf(out, size, "%s, %s, %d thread%s, caches %zu KB, %zu KB, %zu MB", name, cpu_isa_name(cpu_detect()), n_threads,
             n_threads == 1 ? "" : "s", cache_bytes(1) >> 10, cache_bytes(2) >> 10, cache_bytes(3) >> 20);
}
