#include "base/error.h"

#include <stdarg.h>
#include <stdio.h>

quarry_code error_set(quarry_error *error, quarry_code code, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->message, sizeof error->message, format, args);
        va_end(args);
        error->code = code;
    }
    return code;
}

quarry_code error_memory(quarry_error *error, const char *what, size_t n_bytes)
{
    return error_set(error, QUARRY_ERROR_MEMORY, "out of memory (%s: %zu bytes)", what, n_bytes);
}
