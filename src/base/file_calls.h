/* The system calls behind base/file.h, which tests can make fail (file_fail_at). They return and set errno as the system's do. */
#ifndef BASE_FILE_CALLS_H
#define BASE_FILE_CALLS_H

#include <fcntl.h>
#include <sys/types.h>

int file_call_open(const char *path, int flags, mode_t mode);
ssize_t file_call_read(int fd, void *out, size_t n);
ssize_t file_call_pread(int fd, void *out, size_t n, off_t offset);
/* What is in memory already: EAGAIN if that is not all; EOPNOTSUPP where the system cannot tell. */
ssize_t file_call_pread_now(int fd, void *out, size_t n, off_t offset);
ssize_t file_call_pwrite(int fd, const void *bytes, size_t n, off_t offset);
int file_call_sync(int fd);
int file_call_rename(const char *from, const char *to);

#endif
