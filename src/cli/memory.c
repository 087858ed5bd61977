#include "cli/memory.h"

#include <stdio.h>

const char *memory_text(const session_memory *memory, char *text, size_t size)
{
    size_t n = 0;
    char bytes[32];
    text[0] = 0;
    for (int i = 0; i < MEMORY_PARTS && n < size; i++)
        if (memory->bytes[i] >= 1024)
            n += (size_t)snprintf(text + n, size - n, "%s%s %s", n ? ", " : "", memory_part_names[i],
                                  cli_bytes((double)memory->bytes[i], bytes));
    return text;
}

json_t *memory_json(const session_memory *memory)
{
    json_t *parts = json_object();
    for (int i = 0; i < MEMORY_PARTS; i++) json_object_set_new(parts, memory_part_keys[i], json_integer((json_int_t)memory->bytes[i]));
    json_object_set_new(parts, "together", json_integer((json_int_t)session_memory_sum(memory)));
    return parts;
}
