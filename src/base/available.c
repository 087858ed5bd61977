#include "base/available.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/resident.h"

enum { PATH_SIZE = 1024, LINE_SIZE = 512 };

static FILE *open_under(const char *root, const char *folder, const char *name)
{
    char path[2 * PATH_SIZE];
    const int n = snprintf(path, sizeof path, "%s%s/%s", root, folder, name);
    return n > 0 && (size_t)n < sizeof path ? fopen(path, "re") : NULL;
}

/* The number in a file, or behind `key` at the beginning of one of its lines ("max" is UINT64_MAX); false if there is none. */
static bool read_number(const char *root, const char *folder, const char *name, const char *key, uint64_t *value)
{
    char line[LINE_SIZE];
    const size_t n = strlen(key);
    bool found = false;
    FILE *f = open_under(root, folder, name);
    while (f && !found && fgets(line, sizeof line, f)) {
        unsigned long long number;
        if (strncmp(line, key, n) != 0) continue;
        found = strncmp(line + n, "max", 3) == 0 || sscanf(line + n, "%llu", &number) == 1;
        if (found) *value = line[n] == 'm' ? UINT64_MAX : number;
    }
    if (f) fclose(f);
    return found;
}

static uint64_t less(uint64_t a, uint64_t b)
{
    return a > b ? a - b : 0;
}

static uint64_t sum(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

/* ---- control groups ---- */

/* How a version names what it says. */
typedef struct group_version {
    const char *mount;
    const char *limit, *high, *usage;   /* high, NULL if there is none: beyond it a group stands still rather than grows */
    const char *active, *inactive;      /* lines of memory.stat: pages of files, which the system takes back when it needs memory */
    const char *swap_limit, *swap_used; /* NULL: the system's swap is not counted apart */
} group_version;

static const group_version versions[2] = {
    {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", NULL, "memory.usage_in_bytes", "total_active_file ", "total_inactive_file ", NULL,
     NULL},
    {"/sys/fs/cgroup", "memory.max", "memory.high", "memory.current", "active_file ", "inactive_file ", "memory.swap.max",
     "memory.swap.current"},
};

/* The group in `folder` alone. */
static void take_group(const char *root, const group_version *v, const char *folder, uint64_t free_swap, memory_available *available)
{
    uint64_t limit, high, usage, active = 0, inactive = 0, swap_limit, swap_used;
    if (!read_number(root, folder, v->limit, "", &limit) || !read_number(root, folder, v->usage, "", &usage)) return;
    if (v->high && read_number(root, folder, v->high, "", &high) && high < limit) limit = high;
    if (limit >= INT64_MAX / 2) return; /* what version 1 says for none */
    read_number(root, folder, "memory.stat", v->active, &active);
    read_number(root, folder, "memory.stat", v->inactive, &inactive);
    if (v->swap_limit && read_number(root, folder, v->swap_limit, "", &swap_limit) &&
        read_number(root, folder, v->swap_used, "", &swap_used) && less(swap_limit, swap_used) < free_swap)
        free_swap = less(swap_limit, swap_used);
    const uint64_t left = sum(less(limit, less(usage, active + inactive)), free_swap);
    if (left >= available->bytes) return;
    available->bytes = left;
    available->swap = free_swap;
    available->limit = "the control group";
}

/* A group's limit holds for all groups in it. The file says where the process is as its own view of the hierarchy has it, which in a container may not be where that
 * hierarchy is mounted: then the mount itself is the group. */
static void take_groups(const char *root, const group_version *v, const char *group, uint64_t free_swap, memory_available *available)
{
    char folder[PATH_SIZE];
    const size_t mount = strlen(v->mount);
    const int n = snprintf(folder, sizeof folder, "%s%s", v->mount, group);
    if (n < 0 || (size_t)n >= sizeof folder) return;
    for (;;) {
        take_group(root, v, folder, free_swap, available);
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= mount || !slash || slash < folder + mount) break;
        *slash = 0;
    }
}

/* Lines of /proc/self/cgroup: "4:memory:/group" of version 1, "0::/group" of version 2. */
static void take_all_groups(const char *root, uint64_t free_swap, memory_available *available)
{
    char line[PATH_SIZE];
    FILE *f = open_under(root, "/proc/self", "cgroup");
    while (f && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        group[strcspn(group, "\n")] = 0;
        if (*group && group[strlen(group) - 1] == '/') group[strlen(group) - 1] = 0;
        if (strcmp(controllers + 1, "memory") == 0) take_groups(root, &versions[0], group, free_swap, available);
        if (!controllers[1]) take_groups(root, &versions[1], group, free_swap, available);
    }
    if (f) fclose(f);
}

/* ---- all ---- */

static uint64_t under_rlimit(int resource, size_t used)
{
    struct rlimit limit;
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return UINT64_MAX;
    return less(limit.rlim_cur, used);
}

/* What may still be committed, where the system promises no more than it has (overcommit_memory 2). */
static void take_commit_limit(const char *root, memory_available *available)
{
    uint64_t mode, limit, used;
    if (!read_number(root, "/proc/sys/vm", "overcommit_memory", "", &mode) || mode != 2) return;
    if (!read_number(root, "/proc", "meminfo", "CommitLimit:", &limit) || !read_number(root, "/proc", "meminfo", "Committed_AS:", &used))
        return;
    if (1024 * less(limit, used) >= available->address) return;
    available->address = 1024 * less(limit, used);
    available->address_limit = "the system's commit limit";
}

void memory_available_get(const char *root, memory_available *available)
{
    uint64_t ram, swap = 0;
    process_memory own;
    *available = (memory_available){UINT64_MAX, 0, UINT64_MAX, "the machine", "ulimit"};
    if (process_memory_get(&own)) {
        const uint64_t address = under_rlimit(RLIMIT_AS, own.address), data = under_rlimit(RLIMIT_DATA, own.data);
        available->address = address < data ? address : data;
    }
    take_commit_limit(root, available);
    if (read_number(root, "/proc", "meminfo", "SwapFree:", &swap)) swap *= 1024;
    if (read_number(root, "/proc", "meminfo", "MemAvailable:", &ram)) {
        available->bytes = sum(ram * 1024, swap);
        available->swap = swap;
    }
    take_all_groups(root, swap, available);
}
