#include <stdio.h>
#include <string.h>

#include "model/internal.h"

static const model_arch archs[] = {
    {.name = "llama"},
    {.name = "qwen2", .rope_halves = true, .qkv_bias = true},
    {.name = "qwen3", .rope_halves = true, .qk_norm = true},
    {.name = "gemma3",
     .rope_halves = true,
     .qk_norm = true,
     .post_norms = true,
     .scale_embedding = true,
     .gelu = true,
     .global_every = 6,
     .local_base = 10000},
};

enum { N_ARCHS = sizeof archs / sizeof archs[0] };

const model_arch *model_arch_find(const char *name)
{
    for (int i = 0; i < N_ARCHS; i++)
        if (strcmp(archs[i].name, name) == 0) return &archs[i];
    return NULL;
}

void model_arch_names(char *out, size_t capacity)
{
    size_t used = 0;
    for (int i = 0; i < N_ARCHS && used < capacity; i++)
        used += (size_t)snprintf(out + used, capacity - used, "%s%s", i ? ", " : "", archs[i].name);
}
