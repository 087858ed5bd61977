/* Logging by callback: the library never prints. */
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <quarry/quarry.h>

typedef struct logger {
    quarry_log_fn fn; /* NULL: silent */
    void *data;
} logger;

void log_line(const logger *log, quarry_log_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
