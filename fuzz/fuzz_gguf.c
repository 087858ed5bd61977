/* Opens arbitrary bytes as a GGUF file; of what opens, reads every key by every getter and every byte of every tensor. */
#include <stdlib.h>
#include <string.h>

#include "gguf/parts.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint64_t sink; /* so that reads happen */

static void read_key(const gguf_file *g, const gguf_entry *e)
{
    size_t n = 0;
    const char *key = e->key, *text = gguf_string(g, key, &n);
    if (!gguf_has(g, key)) abort();
    if (text) sink += strlen(text) > n ? abort(), 0 : n;
    sink += (uint64_t)gguf_int(g, key, 1) + gguf_bool(g, key, true) + (gguf_float(g, key, 2) > 1);
    for (int kind = GGUF_INT; kind <= GGUF_STRING; kind++) {
        int64_t length = gguf_array(g, key, (gguf_value_kind)kind);
        for (int64_t i = -1; i <= length; i++) {
            sink += (uint64_t)gguf_array_int(g, key, i) + (gguf_array_float(g, key, i) > 1);
            text = gguf_array_string(g, key, i, &n);
            for (size_t j = 0; text && j < n; j++) sink += (uint8_t)text[j];
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    quarry_error error = {0};
    gguf_file *g = gguf_open_memory(data, size, "fuzz", &error);
    if (!g) {
        if (error.code == QUARRY_OK || strchr(error.message, '\n')) abort();
        return 0;
    }
    for (int64_t i = 0; i < g->n_entries; i++) read_key(g, &g->entries[i]);
    for (int64_t i = 0; i < gguf_n_tensors(g); i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        void *copy;
        const uint8_t *bytes = gguf_tensor_data(g, t, &copy, &error);
        if (gguf_find(g, t->name) != t) abort();
        for (size_t j = 0; j < t->n_bytes; j++) sink += bytes[j];
    }
    gguf_close(g);
    return 0;
}
