#include "base/file_calls.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/file.h"

static _Thread_local struct {
    int64_t after; /* calls until the one that fails, plus one; 0: none does */
    int failure;
} plans[FILE_N_CALLS]; /* injected failures of tests; per thread so that other threads run on */

void file_fail_at(file_call call, int64_t n, int failure)
{
    plans[call].after = n < 0 ? 0 : n + 1;
    plans[call].failure = failure;
}

/* True if this call is to fail (errno is set) or, with errno 0, to be short. */
static bool fails(file_call call)
{
    if (plans[call].after == 0 || --plans[call].after > 0) return false;
    if (plans[call].failure < 0) raise(SIGKILL);
    errno = plans[call].failure;
    return true;
}

/* What is left of n bytes; -1 to fail. */
static ssize_t allowed(file_call call, size_t n)
{
    if (!fails(call)) return (ssize_t)n;
    return errno ? -1 : (ssize_t)(n + 1) / 2;
}

int file_call_open(const char *path, int flags, mode_t mode)
{
    return fails(FILE_CALL_OPEN) ? -1 : open(path, flags, mode);
}

ssize_t file_call_read(int fd, void *out, size_t n)
{
    const ssize_t most = allowed(FILE_CALL_READ, n);
    return most < 0 ? -1 : read(fd, out, (size_t)most);
}

ssize_t file_call_pread(int fd, void *out, size_t n, off_t offset)
{
    const ssize_t most = allowed(FILE_CALL_READ, n);
    return most < 0 ? -1 : pread(fd, out, (size_t)most, offset);
}

ssize_t file_call_pread_now(int fd, void *out, size_t n, off_t offset)
{
    const ssize_t most = allowed(FILE_CALL_READ, n);
    const struct iovec to = {out, (size_t)most};
#ifdef RWF_NOWAIT
    return most < 0 ? -1 : preadv2(fd, &to, 1, offset, RWF_NOWAIT);
#else
    (void)fd, (void)to, (void)offset;
    if (most >= 0) errno = EOPNOTSUPP;
    return -1;
#endif
}

ssize_t file_call_pwrite(int fd, const void *bytes, size_t n, off_t offset)
{
    const ssize_t most = allowed(FILE_CALL_WRITE, n);
    return most < 0 ? -1 : pwrite(fd, bytes, (size_t)most, offset);
}

int file_call_sync(int fd)
{
    return fails(FILE_CALL_SYNC) ? -1 : fsync(fd);
}

int file_call_rename(const char *from, const char *to)
{
    return fails(FILE_CALL_RENAME) ? -1 : rename(from, to);
}
