/* What commands say of memory. */
#ifndef CLI_MEMORY_H
#define CLI_MEMORY_H

#include "cli/cli.h"
#include "cli/json.h"
#include "gen/gen.h"

/* "weights 92.0 MiB, keys and values 186 MiB, …": the parts that are not nothing. */
const char *memory_text(const session_memory *memory, char *text, size_t size);
/* The parts by their keys, and "together". */
json_t *memory_json(const session_memory *memory);

#endif
