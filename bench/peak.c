/* Measures what this machine gives at most, by one thread and by all: bytes per second from memory and the caches, operations per second in registers,
 * multiplications and additions counted apart.
 *
 *     bench_peak [--json] [threads]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/peaks.h"

static void print_md(const peak *peaks, int n_threads)
{
    char machine[256];
    peaks_machine(n_threads, machine, sizeof machine);
    printf("%s\n\n| peak | unit | 1 thread | %d thread%s |\n| :-- | :-- | --: | --: |\n", machine, n_threads, n_threads == 1 ? "" : "s");
    for (const peak *p = peaks; p < peaks + PEAK_N; p++)
        if (p->present)
            printf("| %s | %s | %.1f | %.1f |\n", p->name, p->reads ? "GB/s" : "Gop/s", p->one, p->all);
        else
            printf("| %s | %s | %s | |\n", p->name, p->reads ? "GB/s" : "Gop/s", p->why);
}

static void print_json(const peak *peaks, int n_threads)
{
    char machine[256];
    peaks_machine(n_threads, machine, sizeof machine);
    printf("{\"machine\": \"%s\", \"threads\": %d, \"peaks\": [", machine, n_threads);
    for (const peak *p = peaks; p < peaks + PEAK_N; p++) {
        printf("%s\n  {\"name\": \"%s\", \"unit\": \"%s\", ", p == peaks ? "" : ",", p->name, p->reads ? "GB/s" : "Gop/s");
        if (p->present)
            printf("\"one_thread\": %.3f, \"all_threads\": %.3f}", p->one, p->all);
        else
            printf("\"missing\": \"%s\"}", p->why);
    }
    printf("\n]}\n");
}

int main(int argc, char **argv)
{
    bool json = false;
    int n_threads = cpu_count();
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0)
            json = true;
        else if ((n_threads = atoi(argv[i])) < 1 || n_threads > 256) {
            fprintf(stderr, "usage: bench_peak [--json] [threads]\n");
            return 1;
        }
    }
    quarry_error error;
    peak peaks[PEAK_N];
    thread_pool *pool = thread_pool_create(n_threads, &error);
    if (!pool || !peaks_measure(pool, peaks)) {
        fprintf(stderr, "bench_peak: %s\n", pool ? "not enough memory for two buffers of 256 MB" : error.message);
        return 1;
    }
    (json ? print_json : print_md)(peaks, n_threads);
    thread_pool_destroy(pool);
    return 0;
}
