/* Allocation that can fail, and can be made to fail. All of the library's heap memory goes through here. */
#ifndef BASE_MEMORY_H
#define BASE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* malloc of n * size bytes with an overflow check; NULL and *error on failure. n * size == 0 gives a valid pointer. */
void *memory_alloc(size_t n, size_t size, const char *what, quarry_error *error);
/* The same, zeroed. */
void *memory_zero(size_t n, size_t size, const char *what, quarry_error *error);
/* Aligned to 64 bytes, for vectors and pages; free with memory_free. Large blocks ask for huge pages. */
void *memory_aligned(size_t n, size_t size, const char *what, quarry_error *error);
/* The same for what is used here and there only: no huge pages, so that what is not touched takes no memory. */
void *memory_sparse(size_t n, size_t size, const char *what, quarry_error *error);
size_t memory_aligned_bytes(size_t bytes); /* what memory_aligned takes for so many */
/* Grows *pointer (NULL allowed) to n * size bytes; on failure *pointer is unchanged. */
quarry_code memory_grow(void *pointer_to_pointer, size_t n, size_t size, const char *what, quarry_error *error);
void memory_free(void *pointer);
char *memory_string(const char *text, size_t n_bytes, quarry_error *error); /* copy with a NUL */

/* a * b into *product; false if it overflows. */
static inline bool size_multiply(size_t a, size_t b, size_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

/* Tests: the n-th allocation from now on this thread (0 = the next) and all after it fail; negative switches it off. */
void memory_fail_after(int64_t n);

#endif
