/* What a session and its model have in RAM. */
#include "gen/session.h"

const char *const memory_part_keys[MEMORY_PARTS] = {"weights", "kv", "index", "codebooks", "scratch", "vocabulary", "program"};
const char *const memory_part_names[MEMORY_PARTS] = {"weights", "keys and values", "index",  "codebooks",
                                                     "scratch", "vocabulary",      "program"};

size_t session_memory_sum(const session_memory *memory)
{
    size_t sum = 0;
    for (int i = 0; i < MEMORY_PARTS; i++) sum += memory->bytes[i];
    return sum;
}

void session_memory_held(const quarry_session *s, session_memory *memory)
{
    model_memory model;
    process_memory process;
    attn_memory attention = {0};
    memory_tally kv = {0}, scratch = {0};
    kv_tally(s->kv, &kv);
    for (int i = 0; i < s->n_policies; i++) s->policies[i]->type->tally(s->policies[i], &attention);
    if (kv_cold_of(s->kv)) kv_cold_tally(kv_cold_of(s->kv), NULL, &attention.index);
    forward_scratch_tally(s->scratch, &scratch);
    memory_tally_add(&scratch, s->logits, (size_t)model_shape_of(s->model)->n_vocab * sizeof *s->logits);
    memory_tally_add(&scratch, s->tokens.ids, (size_t)s->tokens.capacity * sizeof *s->tokens.ids);
    model_tally(s->model, &model);
    *memory = (session_memory){.n_tokens = s->tokens.n,
                               .bytes = {[MEMORY_WEIGHTS] = model.weights.resident,
                                         [MEMORY_KV] = kv.resident,
                                         [MEMORY_INDEX] = attention.index.resident,
                                         [MEMORY_CODEBOOKS] = attention.codebooks.resident,
                                         [MEMORY_SCRATCH] = scratch.resident,
                                         [MEMORY_VOCABULARY] = model.vocabulary.resident},
                               .model_file = model.file_bytes,
                               .codebook_file = attention.codebook_file};
    if (process_memory_get(&process) && process.file > model.mapped) memory->bytes[MEMORY_PROGRAM] = process.file - model.mapped;
}
