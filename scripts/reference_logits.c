/* Logits of llama.cpp, for make_model_fixtures.py. Needs llama.cpp's headers and shared libraries; not part of the build:
 *
 *     cc -O2 -I LLAMA/include -I LLAMA/ggml/include scripts/reference_logits.c -o reference_logits -L BIN -lllama -lggml -lggml-base -Wl,-rpath,BIN
 *     reference_logits MODEL.gguf N_GENERATE < SEQUENCES > OUT
 *
 * SEQUENCES holds token ids, one sequence a line. Each is run from an empty cache and then continued greedily by N_GENERATE tokens (fewer if the model
 * ends its turn). OUT, for each sequence: uint32 n, int32 tokens[n] (given and generated), float32 logits[n][n_vocab], those that follow each token.
 * Keys and values are kept in F32 and attention is computed without flash attention: nothing is rounded but the model's own blocks (and, for quantised
 * blocks, activations; give a model in F32 to avoid that). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llama.h"

enum { N_CONTEXT = 1024 };

static void silent(enum ggml_log_level level, const char *text, void *data)
{
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void fail(const char *what)
{
    fprintf(stderr, "reference_logits: %s\n", what);
    exit(1);
}

/* The token ids of a line; returns how many. */
static int tokens_parse(const char *line, llama_token tokens[N_CONTEXT])
{
    int n = 0;
    char *end;
    for (long id; n < N_CONTEXT && (id = strtol(line, &end, 10), end != line); line = end) tokens[n++] = (llama_token)id;
    return n;
}

static llama_token best_token(const float *logits, int n_vocab)
{
    int best = 0;
    for (int i = 1; i < n_vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Runs tokens[from, to) and copies their logits to out[from, to)[n_vocab]. */
static void run(struct llama_context *context, const llama_token *tokens, int from, int to, float *out, int n_vocab)
{
    struct llama_batch batch = llama_batch_init(to - from, 0, 1);
    for (int i = from; i < to; i++) {
        batch.token[i - from] = tokens[i];
        batch.pos[i - from] = i;
        batch.n_seq_id[i - from] = 1;
        batch.seq_id[i - from][0] = 0;
        batch.logits[i - from] = 1;
    }
    batch.n_tokens = to - from;
    if (llama_decode(context, batch) != 0) fail("llama_decode failed");
    for (int i = from; i < to; i++) memcpy(out + (size_t)i * n_vocab, llama_get_logits_ith(context, i - from), n_vocab * sizeof *out);
    llama_batch_free(batch);
}

int main(int argc, char **argv)
{
    static char line[1 << 16];
    static llama_token tokens[N_CONTEXT];
    if (argc != 3) fail("usage: reference_logits MODEL.gguf N_GENERATE < SEQUENCES > OUT");
    llama_log_set(silent, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("cannot load the model");
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = N_CONTEXT;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.n_threads = params.n_threads_batch = 2;
    struct llama_context *context = llama_init_from_model(model, params);
    if (!context) fail("cannot create a context");
    const struct llama_vocab *vocab = llama_model_get_vocab(model);
    int n_vocab = llama_vocab_n_tokens(vocab), n_generate = atoi(argv[2]);
    float *logits = malloc(sizeof *logits * N_CONTEXT * n_vocab);
    while (logits && fgets(line, sizeof line, stdin)) {
        int n_given = tokens_parse(line, tokens), n = n_given;
        if (n == 0 || n + n_generate > N_CONTEXT) fail("a sequence is empty or too long");
        llama_memory_clear(llama_get_memory(context), true);
        run(context, tokens, 0, n, logits, n_vocab);
        while (n < n_given + n_generate && !llama_vocab_is_eog(vocab, tokens[n - 1])) {
            tokens[n] = best_token(logits + (size_t)(n - 1) * n_vocab, n_vocab);
            run(context, tokens, n, n + 1, logits, n_vocab);
            n++;
        }
        uint32_t count = (uint32_t)n;
        fwrite(&count, sizeof count, 1, stdout);
        fwrite(tokens, sizeof *tokens, n, stdout);
        fwrite(logits, sizeof *logits * n_vocab, n, stdout);
    }
    free(logits);
    llama_free(context);
    llama_model_free(model);
    if (fflush(stdout) != 0) fail("cannot write");
    return 0;
}
