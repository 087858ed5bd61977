/* How much memory this process may still take. */
#ifndef BASE_AVAILABLE_H
#define BASE_AVAILABLE_H

#include <stdint.h>

typedef struct memory_available {
    uint64_t bytes;   /* before the system ends the process or refuses memory, swap included */
    uint64_t swap;    /* of these, at least so many in swap */
    uint64_t address; /* that may be allocated, touched or not */
    const char *limit,
        *address_limit; /* what they are left of: "the machine", "the control group"; "ulimit", "the system's commit limit" */
} memory_available;

/* Reads /proc and /sys/fs/cgroup (versions 1 and 2) under root: "" is the system, tests have folders. What is not to be found counts as without limit: UINT64_MAX. */
void memory_available_get(const char *root, memory_available *available);

#endif
