/* Files: mapping that survives a file shrinking, whole reads, and writes that are complete or absent. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

typedef struct file_map file_map;

/* Opens path for reading and maps it (or, with use_mmap false, keeps only the descriptor and reads on demand). Error IO names the path. */
file_map *file_map_open(const char *path, bool use_mmap, quarry_error *error);
void file_map_close(file_map *map);
uint64_t file_map_size(const file_map *map); /* size when opened */
const char *file_map_path(const file_map *map);

/* The mapped bytes, NULL when not mapped. Touching them after the file shrank reads zeros and marks the map as failed (a SIGBUS handler chained
 * in front of the program's own puts a zero page in place). */
const uint8_t *file_map_data(const file_map *map);
/* Error IO if the file shrank under the mapping; call after a piece of work that read it. */
quarry_code file_map_check(const file_map *map, quarry_error *error);
/* Copies [offset, offset + n) to out by pread (both modes). Error IO on a short file. */
quarry_code file_map_read(const file_map *map, uint64_t offset, size_t n, void *out, quarry_error *error);
/* Bytes [offset, offset + n) to out. */
typedef struct file_range {
    uint64_t offset;
    size_t n;
    void *out;
} file_range;
/* The same for all of ranges[n]: the disk is asked for every one that is not in memory before the first is waited for. Moves those it waits for to the front. */
quarry_code file_map_read_many(const file_map *map, file_range *ranges, int64_t n, quarry_error *error);
/* The system may begin to bring [offset, offset + n) to memory. */
void file_map_expect(const file_map *map, uint64_t offset, size_t n);
/* The file will be read here and there: more than was asked for need not be brought to memory. */
void file_map_scatter(const file_map *map);
/* Gives the pages of [offset, offset + n) back to the system; they come back from the file when touched. */
void file_map_release(const file_map *map, uint64_t offset, size_t n);

/* The file as the system knows it now; method is left 0. False if it does not say. */
bool file_map_identity(const file_map *map, quarry_file_identity *identity);
/* Tells other processes, by a shared lock (flock) that ends with the map, that the file is in use. Advice: nothing of the map depends on it. */
void file_map_hold(const file_map *map);
/* True if somebody, this process included, holds the file at path (file_map_hold) or is still writing it. */
bool file_is_held(const char *path);

/* Reads all of a file ("-" is standard input) into a new buffer with a NUL after it; free with memory_free. */
char *file_read_all(const char *path, size_t *n_bytes, quarry_error *error);

/* ---- file_write.c: a file that is complete or absent ----
 *
 *     file_writer *w = file_write_open(path, error);
 *     if (!w || (code = file_write_append(w, bytes, n, error)) != QUARRY_OK) goto done;
 *     code = file_write_commit(w, error);
 * done:
 *     file_write_close(w);
 *
 * What is written goes to PATH.PID-RANDOM.tmp in the folder of path, whose writer holds an exclusive lock on it: after a crash anybody can tell that
 * it was left behind (file_write_remove_leftover). Commit makes it durable and gives it its name; whoever opens path sees the old file or all of the new one. An error stays: all
 * later calls on the writer fail with it. Errors are of code IO and name path and what to do. */
typedef struct file_writer file_writer;

file_writer *file_write_open(const char *path, quarry_error *error);
/* Adds n bytes at the end. Small pieces are gathered in a buffer of 1 MiB, large ones are not copied. */
quarry_code file_write_append(file_writer *w, const void *bytes, size_t n, quarry_error *error);
/* Writes over [offset, offset + n) of what was appended before: a header that is known at the end. Error ARGUMENT beyond the end. */
quarry_code file_write_at(file_writer *w, uint64_t offset, const void *bytes, size_t n, quarry_error *error);
uint64_t file_write_size(const file_writer *w); /* bytes appended */
const char *file_write_path(const file_writer *w);
/* Brings all bytes to the disk. Commit does it too; for those who want the slow part done before they take a lock. */
quarry_code file_write_sync(file_writer *w, quarry_error *error);
/* Syncs, renames, and syncs the folder. If only the last of these failed, path is the new file but may not outlive a power failure. */
quarry_code file_write_commit(file_writer *w, quarry_error *error);
/* Frees the writer (NULL allowed); removes the temporary file unless it was committed. */
void file_write_close(file_writer *w);
/* All three for bytes in memory. */
quarry_code file_write_all(const char *path, const void *bytes, size_t n, quarry_error *error);

/* Removes path if it is named like a temporary file of a writer and its writer has ended; true if it did. */
bool file_write_remove_leftover(const char *path);

/* ---- failures for tests ---- */

typedef enum file_call { FILE_CALL_OPEN, FILE_CALL_READ, FILE_CALL_WRITE, FILE_CALL_SYNC, FILE_CALL_RENAME, FILE_N_CALLS } file_call;

/* Tests: the n-th call of this kind from now on this thread (0 = the next) fails with errno `failure`; with failure 0 a read or write does half of what it
 * was asked, with a negative one the process is killed (SIGKILL) in its place. Negative n switches it off. Only calls of base/file.h count; calibration and journals write for themselves. */
void file_fail_at(file_call call, int64_t n, int failure);

#endif
