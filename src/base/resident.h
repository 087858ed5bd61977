/* What of the memory that was allocated is in RAM: memory that nobody touched, and what was moved to swap, is not. */
#ifndef BASE_RESIDENT_H
#define BASE_RESIDENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes of block[n_bytes] that this process has in RAM, by the system's page table; all of them where the system does not say, and where they are less than a page. */
size_t memory_resident(const void *block, size_t n_bytes);

/* What blocks of one kind add up to. */
typedef struct memory_tally {
    size_t held;     /* allocated */
    size_t resident; /* of that, in RAM */
    size_t n_large;  /* blocks of at least a huge page: each begins at a multiple of one, which may spoil as much address space before it */
    bool held_only;  /* do not ask the system for what is in RAM */
} memory_tally;

/* Counts a block; NULL is none. */
void memory_tally_add(memory_tally *tally, const void *block, size_t n_bytes);

/* The system's own figures for this process, in bytes. */
typedef struct process_memory {
    size_t resident, peak; /* now, and the most there ever was */
    size_t file;           /* of what is resident, pages of mapped files: of the program, its libraries, a model */
    size_t address, data;  /* what RLIMIT_AS and RLIMIT_DATA count */
} process_memory;

bool process_memory_get(process_memory *memory); /* false: the system does not say */

/* Keeps the pages of a block in RAM until memory_unlock; false with errno if the system refuses. */
bool memory_lock(const void *block, size_t n_bytes);
void memory_unlock(const void *block, size_t n_bytes);
size_t memory_lock_limit(void); /* bytes that one without privileges may keep so (RLIMIT_MEMLOCK) */

#endif
