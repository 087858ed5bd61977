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
/* Gives the pages of [offset, offset + n) back to the system; they come back from the file when touched. */
void file_map_release(const file_map *map, uint64_t offset, size_t n);

/* Reads all of a file ("-" is standard input) into a new buffer with a NUL after it; free with memory_free. */
char *file_read_all(const char *path, size_t *n_bytes, quarry_error *error);

#endif
