#include "base/memory.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static _Thread_local int64_t fail_after = -1; /* injected failures of tests; per thread so that other threads run on */

void memory_fail_after(int64_t n)
{
    fail_after = n;
}

static bool fails(void)
{
    if (fail_after < 0) return false;
    if (fail_after == 0) return true;
    fail_after--;
    return false;
}

void *memory_alloc(size_t n, size_t size, const char *what, quarry_error *error)
{
    size_t bytes;
    if (!size_multiply(n, size, &bytes)) {
        error_memory(error, what, SIZE_MAX);
        return NULL;
    }
    void *p = fails() ? NULL : malloc(bytes ? bytes : 1);
    if (!p) error_memory(error, what, bytes);
    return p;
}

void *memory_zero(size_t n, size_t size, const char *what, quarry_error *error)
{
    void *p = fails() ? NULL : calloc(n ? n : 1, size ? size : 1);
    if (!p) error_memory(error, what, n * size);
    return p;
}

enum { HUGE_PAGE = 2 << 20 };

/* Whole huge pages if they leave little of the last one unused (what is in one is resident), else a multiple of 64. */
size_t memory_aligned_bytes(size_t bytes)
{
    size_t whole = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    return bytes > HUGE_PAGE / 2 && whole - bytes <= whole / 12 ? whole : (bytes + 63) / 64 * 64;
}

void *memory_aligned(size_t n, size_t size, const char *what, quarry_error *error)
{
    size_t bytes;
    if (!size_multiply(n, size, &bytes) || bytes > SIZE_MAX - HUGE_PAGE) {
        error_memory(error, what, SIZE_MAX);
        return NULL;
    }
    size_t rounded = memory_aligned_bytes(bytes);
    bool large = rounded >= (size_t)HUGE_PAGE;
    size_t align = large ? (size_t)HUGE_PAGE : 64;
    void *p = NULL;
    if (fails() || posix_memalign(&p, align, rounded ? rounded : 64) != 0) {
        error_memory(error, what, bytes);
        return NULL;
    }
    if (large) madvise(p, rounded / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); /* whole pages only: resident size stays true */
    return p;
}

void *memory_sparse(size_t n, size_t size, const char *what, quarry_error *error)
{
    enum { SYSTEM_PAGE = 4096 };
    size_t bytes;
    if (!size_multiply(n, size, &bytes) || bytes > SIZE_MAX - HUGE_PAGE) {
        error_memory(error, what, SIZE_MAX);
        return NULL;
    }
    const bool large = bytes >= (size_t)HUGE_PAGE;
    void *p = NULL;
    if (fails() || posix_memalign(&p, large ? SYSTEM_PAGE : 64, bytes ? bytes : 64) != 0) {
        error_memory(error, what, bytes);
        return NULL;
    }
    if (large) {
        madvise(p, bytes / SYSTEM_PAGE * SYSTEM_PAGE, MADV_NOHUGEPAGE);
        madvise(p, bytes / SYSTEM_PAGE * SYSTEM_PAGE, MADV_DONTNEED); /* it may have been used, and freed, before */
    }
    return p;
}

quarry_code memory_grow(void *pointer_to_pointer, size_t n, size_t size, const char *what, quarry_error *error)
{
    void *old, *grown;
    size_t bytes;
    memcpy(&old, pointer_to_pointer, sizeof old);
    if (!size_multiply(n, size, &bytes)) return error_memory(error, what, SIZE_MAX);
    grown = fails() ? NULL : realloc(old, bytes ? bytes : 1);
    if (!grown) return error_memory(error, what, bytes);
    memcpy(pointer_to_pointer, &grown, sizeof grown);
    return QUARRY_OK;
}

void memory_free(void *pointer)
{
    free(pointer);
}

char *memory_string(const char *text, size_t n_bytes, quarry_error *error)
{
    char *copy = n_bytes == SIZE_MAX ? NULL : memory_alloc(n_bytes + 1, 1, "string", error);
    if (!copy) return NULL;
    memcpy(copy, text, n_bytes);
    copy[n_bytes] = 0;
    return copy;
}
