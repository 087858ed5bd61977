#include "base/resident.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* ---- one block ---- */

/* /proc/self/pagemap has 64 bits for every page, of which the highest says that it is present. */
static bool count_present(int fd, uintptr_t begin, uintptr_t end, uintptr_t page, size_t *resident)
{
    enum { CHUNK = 4096 };
    uint64_t entries[CHUNK];
    *resident = 0;
    for (uintptr_t first = begin / page, last = (end - 1) / page + 1; first < last;) {
        const size_t want = last - first < CHUNK ? last - first : CHUNK;
        const ssize_t got = pread(fd, entries, want * sizeof *entries, (off_t)(first * sizeof *entries));
        if (got < (ssize_t)sizeof *entries) return false;
        const size_t n = (size_t)got / sizeof *entries;
        for (size_t i = 0; i < n; i++) {
            if (!(entries[i] >> 63)) continue;
            const uintptr_t from = (first + i) * page, to = from + page;
            *resident += (to < end ? to : end) - (from > begin ? from : begin);
        }
        first += n;
    }
    return true;
}

size_t memory_resident(const void *block, size_t n_bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)block;
    size_t resident;
    if (n_bytes < page) return n_bytes;
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return n_bytes;
    const bool known = count_present(fd, begin, begin + n_bytes, page, &resident);
    close(fd);
    return known ? resident : n_bytes;
}

void memory_tally_add(memory_tally *tally, const void *block, size_t n_bytes)
{
    if (!block) return;
    enum { HUGE_PAGE = 2 << 20 };
    tally->held += n_bytes;
    tally->n_large += n_bytes >= HUGE_PAGE;
    if (!tally->held_only) tally->resident += memory_resident(block, n_bytes);
}

/* ---- the process ---- */

bool process_memory_get(process_memory *memory)
{
    struct {
        const char *key;
        size_t *value;
        bool optional;
    } wanted[] = {{"VmRSS:", &memory->resident, false},
                  {"VmHWM:", &memory->peak, true},
                  {"RssFile:", &memory->file, true},
                  {"VmSize:", &memory->address, true},
                  {"VmData:", &memory->data, true}};
    char line[256];
    bool found = false;
    *memory = (process_memory){0};
    FILE *status = fopen("/proc/self/status", "re");
    while (status && fgets(line, sizeof line, status))
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
            unsigned long long kib;
            const size_t n = strlen(wanted[i].key);
            if (strncmp(line, wanted[i].key, n) != 0 || sscanf(line + n, "%llu kB", &kib) != 1) continue;
            *wanted[i].value = (size_t)kib * 1024;
            found = found || !wanted[i].optional;
        }
    if (status) fclose(status);
    return found;
}

/* ---- locking ---- */

bool memory_lock(const void *block, size_t n_bytes)
{
    return mlock(block, n_bytes) == 0;
}

void memory_unlock(const void *block, size_t n_bytes)
{
    munlock(block, n_bytes);
}

size_t memory_lock_limit(void)
{
    struct rlimit limit;
    return getrlimit(RLIMIT_MEMLOCK, &limit) == 0 ? limit.rlim_cur : SIZE_MAX;
}
