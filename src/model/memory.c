/* What a model takes, and keeping it in RAM. */
#include <errno.h>
#include <string.h>

#include "model/internal.h"

typedef bool (*weight_fn)(const weight *w, void *data); /* false: stop */

/* The matrices that are not packed: packed ones are in m->packed. */
static bool each_unpacked(const quarry_model *m, weight_fn fn, void *data)
{
    if (!m->embedding.packed && !fn(&m->embedding, data)) return false;
    if (!m->tied && !m->output.packed && !fn(&m->output, data)) return false;
    for (int i = 0; i < m->shape.n_layer; i++) {
        const model_layer *l = &m->layers[i];
        const weight *all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t j = 0; j < sizeof all / sizeof *all; j++)
            if (!all[j]->packed && !fn(all[j], data)) return false;
    }
    return true;
}

static bool weight_tally(const weight *w, void *data)
{
    memory_tally_add(data, w->data, w->n_bytes);
    return true;
}

void model_tally(const quarry_model *m, model_memory *memory)
{
    memory_tally mapped = {0}, unpacked = {0};
    *memory = (model_memory){0};
    each_unpacked(m, weight_tally, &unpacked);
    arena_tally(&m->packed, &memory->weights);
    arena_tally(&m->small, &memory->weights);
    memory->weights.held += unpacked.held;
    memory->weights.resident += unpacked.resident;
    tokenizer_tally(m->tokenizer, &memory->vocabulary);
    gguf_tally(m->file, &memory->vocabulary, &mapped);
    memory->mapped = mapped.resident < unpacked.resident ? mapped.resident : unpacked.resident;
    memory->file_bytes = gguf_size(m->file);
}

size_t model_mapped_weights(const quarry_model *m)
{
    memory_tally unpacked = {.held_only = true};
    if (gguf_is_mapped(m->file)) each_unpacked(m, weight_tally, &unpacked);
    return unpacked.held;
}

/* ---- keeping the weights in RAM ---- */

static bool weight_lock(const weight *w, void *data)
{
    (void)data;
    return memory_lock(w->data, w->n_bytes);
}

static bool weight_unlock(const weight *w, void *data)
{
    (void)data;
    memory_unlock(w->data, w->n_bytes);
    return true;
}

void model_lock_weights(quarry_model *m)
{
    m->locked = true;
    if (arena_lock(&m->packed) && arena_lock(&m->small) && each_unpacked(m, weight_lock, NULL)) return;
    const int failure = errno;
    const size_t limit = memory_lock_limit();
    model_unlock_weights(m);
    if (limit < m->weight_bytes)
        log_line(&m->log, QUARRY_LOG_WARN,
                 "the weights are not kept in memory: they take %.1f MiB, and this process may lock %.1f; raise that limit "
                 "(ulimit -l, as root, or LimitMEMLOCK of a service)",
                 (double)m->weight_bytes / (1 << 20), (double)limit / (1 << 20));
    else
        log_line(&m->log, QUARRY_LOG_WARN, "the weights are not kept in memory: %s", strerror(failure));
}

void model_unlock_weights(quarry_model *m)
{
    if (!m->locked) return;
    arena_unlock(&m->packed);
    arena_unlock(&m->small);
    each_unpacked(m, weight_unlock, NULL);
    m->locked = false;
}
