/* One idiom: a function that can fail takes a trailing `quarry_error *error` and returns a code, or NULL;
 *
 *     if ((code = kv_reserve(kv, n, error)) != QUARRY_OK) goto done;
 *     return error_set(error, QUARRY_ERROR_FORMAT, "%s: tensor %s has %d dimensions, at most 4", path, name, n);
 */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include <quarry/quarry.h>

/* Fills *error if it is not NULL and returns code. Messages longer than the buffer are cut. */
quarry_code error_set(quarry_error *error, quarry_code code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* "out of memory (what: n bytes)". */
quarry_code error_memory(quarry_error *error, const char *what, size_t n_bytes);

#endif
