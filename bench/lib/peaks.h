/* What this machine gives at most: bytes read per second from each level of memory, and operations per second in registers. */
#ifndef BENCH_PEAKS_H
#define BENCH_PEAKS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/base.h"

typedef enum peak_kind {
    PEAK_MEMORY,      /* buffers of many times the last cache, pages of 4 KB */
    PEAK_MEMORY_HUGE, /* the same, pages of 2 MB */
    PEAK_L3,
    PEAK_L2,
    PEAK_L1,
    PEAK_F32_AVX2, /* multiply and add counted apart, from here on */
    PEAK_F32_AVX512,
    PEAK_BF16_AVX512, /* vdpbf16ps */
    PEAK_I8_AVX2,     /* vpmaddubsw, vpmaddwd, vpaddd */
    PEAK_I8_VNNI,     /* vpdpbusd */
    PEAK_SHUFFLE_AVX2,
    PEAK_SHUFFLE_AVX512, /* a byte looked up among 16 and added */
    PEAK_N
} peak_kind;

typedef struct peak {
    const char *name; /* "int8 dot, AVX-512 VNNI" */
    bool reads;       /* GB/s; otherwise Gop/s */
    bool present;     /* on this processor */
    const char *why;  /* what is missing, if not present */
    double one, all;  /* 1e9 per second, by one thread and by all */
} peak;

/* Measures everything; the pool has all threads. False when memory is short. */
bool peaks_measure(thread_pool *pool, peak peaks[PEAK_N]);
/* The best of those a level may use, for reading memory, or for f32, int8 or shuffles. */
double peaks_memory(const peak peaks[PEAK_N]);
double peaks_f32(const peak peaks[PEAK_N], cpu_isa isa);
double peaks_i8(const peak peaks[PEAK_N], cpu_isa isa);
double peaks_shuffle(const peak peaks[PEAK_N], cpu_isa isa);
/* "AMD EPYC, 2 threads, caches 32 KB, 1 MB, 32 MB" */
void peaks_machine(int n_threads, char *out, size_t size);
double bench_now(void); /* seconds */

#endif
