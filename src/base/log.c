#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

void log_line(const logger *log, quarry_log_level level, const char *format, ...)
{
    if (!log || !log->fn) return;
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    log->fn(level, line, log->data);
}
