#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/file_calls.h"
#include "base/memory.h"

enum { BUFFER_BYTES = 1 << 20, TAG_BYTES = 48 };
static const char tag_format[] = ".%ld-%016llx.tmp"; /* the process, for who looks at the folder; a random number */

struct file_writer {
    char *path, *temporary;
    int fd;
    bool committed, synced;
    uint64_t written; /* bytes of the temporary file */
    size_t n_buffer;  /* bytes behind them that are still in the buffer */
    uint8_t *buffer;  /* [BUFFER_BYTES] */
    quarry_error failure;
};

static const char *advice(int failure)
{
    switch (failure) {
    case ENOSPC:
    case EDQUOT: return "; free some space there and try again";
    case EFBIG: return "; the file system or a limit of this process (ulimit -f) allows no file of this size";
    case EROFS:
    case EACCES:
    case EPERM: return "; choose a folder that you may write to";
    case ENOENT:
    case ENOTDIR: return "; make its folder first";
    case EIO: return "; the disk or its connection is failing";
    default: return "";
    }
}

/* Keeps the error in the writer: what is missing at one place makes the whole file worthless. */
static quarry_code fail(file_writer *w, const char *what, int failure, quarry_error *error)
{
    error_set(&w->failure, QUARRY_ERROR_IO, "%s: cannot %s: %s%s", w->path, what, strerror(failure), advice(failure));
    if (error) *error = w->failure;
    return QUARRY_ERROR_IO;
}

static quarry_code failed_before(const file_writer *w, quarry_error *error)
{
    if (w->failure.code != QUARRY_OK && error) *error = w->failure;
    return w->failure.code;
}

static uint64_t random_tag(void)
{
    uint64_t tag = 0;
    if (getrandom(&tag, sizeof tag, GRND_NONBLOCK) != (ssize_t)sizeof tag) tag = (uint64_t)getpid(); /* a name in use is tried again */
    return tag;
}

/* Another process may take a new file for a leftover until it is locked, and remove it: then it has no name any more, and is made anew. */
static quarry_code make_temporary(file_writer *w, quarry_error *error)
{
    const size_t n_path = strlen(w->path);
    uint64_t tag = random_tag();
    for (int tries = 0; tries < 100; tries++, tag++) {
        struct stat st;
        snprintf(w->temporary + n_path, TAG_BYTES, tag_format, (long)getpid(), (unsigned long long)tag);
        w->fd = file_call_open(w->temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (w->fd < 0 && (errno == EEXIST || errno == EINTR)) continue;
        if (w->fd < 0) return fail(w, "write", errno, error);
        while (flock(w->fd, LOCK_EX) != 0 && errno == EINTR) { /* a file system without locks has no leftovers either */
        }
        if (fstat(w->fd, &st) == 0 && st.st_nlink > 0) return QUARRY_OK;
        close(w->fd);
        w->fd = -1;
    }
    return fail(w, "make a temporary file beside it", EEXIST, error);
}

file_writer *file_write_open(const char *path, quarry_error *error)
{
    const size_t n_path = strlen(path);
    file_writer *w = memory_zero(1, sizeof *w, "file writer", error);
    if (!w) return NULL;
    w->fd = -1;
    w->path = memory_string(path, n_path, error);
    w->temporary = w->path ? memory_alloc(n_path + TAG_BYTES, 1, "file name", error) : NULL;
    w->buffer = w->temporary ? memory_aligned(BUFFER_BYTES, 1, path, error) : NULL;
    if (w->buffer) {
        memcpy(w->temporary, path, n_path);
        if (make_temporary(w, error) == QUARRY_OK) return w;
    }
    file_write_close(w);
    return NULL;
}

static quarry_code put(file_writer *w, uint64_t offset, const uint8_t *bytes, size_t n, quarry_error *error)
{
    enum { MOST = 1 << 30 }; /* one call writes less than 2 GiB */
    for (size_t done = 0; done < n;) {
        const size_t part = n - done < MOST ? n - done : MOST;
        const ssize_t wrote =
            offset + done > INT64_MAX ? (errno = EFBIG, -1) : file_call_pwrite(w->fd, bytes + done, part, (off_t)(offset + done));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return fail(w, "write", wrote < 0 ? errno : EIO, error);
        done += (size_t)wrote;
    }
    w->synced = false;
    return QUARRY_OK;
}

static quarry_code flush(file_writer *w, quarry_error *error)
{
    const size_t n = w->n_buffer;
    const quarry_code code = n ? put(w, w->written, w->buffer, n, error) : QUARRY_OK;
    if (code != QUARRY_OK) return code;
    w->written += n;
    w->n_buffer = 0;
    return QUARRY_OK;
}

quarry_code file_write_append(file_writer *w, const void *bytes, size_t n, quarry_error *error)
{
    quarry_code code = failed_before(w, error);
    if (code != QUARRY_OK || n == 0) return code;
    if (n > BUFFER_BYTES - w->n_buffer && (code = flush(w, error)) != QUARRY_OK) return code;
    if (n < BUFFER_BYTES) {
        memcpy(w->buffer + w->n_buffer, bytes, n);
        w->n_buffer += n;
        return QUARRY_OK;
    }
    code = put(w, w->written, bytes, n, error);
    if (code == QUARRY_OK) w->written += n;
    return code;
}

quarry_code file_write_at(file_writer *w, uint64_t offset, const void *bytes, size_t n, quarry_error *error)
{
    quarry_code code = failed_before(w, error);
    const uint64_t size = file_write_size(w);
    if (code != QUARRY_OK || n == 0) return code;
    if (offset > size || n > size - offset)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: bytes %llu to %llu lie behind the end of what was written", w->path,
                         (unsigned long long)offset, (unsigned long long)offset + n);
    if (offset + n > w->written && (code = flush(w, error)) != QUARRY_OK) return code;
    return put(w, offset, bytes, n, error);
}

uint64_t file_write_size(const file_writer *w)
{
    return w->written + w->n_buffer;
}

const char *file_write_path(const file_writer *w)
{
    return w->path;
}

quarry_code file_write_sync(file_writer *w, quarry_error *error)
{
    quarry_code code = failed_before(w, error);
    if (code != QUARRY_OK || (code = flush(w, error)) != QUARRY_OK || w->synced) return code;
    if (file_call_sync(w->fd) != 0) return fail(w, "bring it to the disk", errno, error); /* once: a second fsync may forget the error */
    w->synced = true;
    return QUARRY_OK;
}

/* The rename is durable when the folder is. */
static quarry_code sync_folder(file_writer *w, quarry_error *error)
{
    const char *slash = strrchr(w->path, '/');
    const size_t n = slash ? (size_t)(slash - w->path) : 0;
    memcpy(w->temporary, w->path, n); /* its name is no longer needed */
    strcpy(w->temporary + n, !slash ? "." : n == 0 ? "/" : "");
    const int fd = file_call_open(w->temporary, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    const bool synced = fd >= 0 && (file_call_sync(fd) == 0 || errno == EINVAL); /* file systems whose folders need no sync say EINVAL */
    const int failure = errno;
    if (fd >= 0) close(fd);
    return synced ? QUARRY_OK : fail(w, "bring its folder to the disk", failure, error);
}

quarry_code file_write_commit(file_writer *w, quarry_error *error)
{
    const quarry_code code = file_write_sync(w, error);
    if (code != QUARRY_OK) return code;
    if (file_call_rename(w->temporary, w->path) != 0) return fail(w, "give it its name", errno, error);
    w->committed = true;
    return sync_folder(w, error);
}

void file_write_close(file_writer *w)
{
    if (!w) return;
    if (w->fd >= 0) {
        if (!w->committed) unlink(w->temporary);
        close(w->fd); /* after fsync it has nothing left to report */
    }
    memory_free(w->buffer);
    memory_free(w->temporary);
    memory_free(w->path);
    memory_free(w);
}

quarry_code file_write_all(const char *path, const void *bytes, size_t n, quarry_error *error)
{
    file_writer *w = file_write_open(path, error);
    quarry_code code = w ? file_write_append(w, bytes, n, error) : error ? error->code : QUARRY_ERROR_IO;
    if (code == QUARRY_OK) code = file_write_commit(w, error);
    file_write_close(w);
    return code;
}

/* Removed under the lock that its writer would need: a new file that is removed before its writer has locked it is made anew. */
bool file_write_remove_leftover(const char *path)
{
    long process;
    unsigned long long tag;
    int end = 0;
    const size_t n = strlen(path);
    const char *dot = n > 4 ? memrchr(path, '.', n - 4) : NULL; /* the one before the process */
    if (!dot || sscanf(dot, ".%ld-%16llx.tmp%n", &process, &tag, &end) != 2 || end == 0 || dot[end] != 0) return false;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    const bool removed = fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 && unlink(path) == 0;
    if (fd >= 0) close(fd);
    return removed;
}
