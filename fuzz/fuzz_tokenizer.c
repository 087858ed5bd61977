/* Encodes any bytes with vocabularies that can write every byte (nothing may be lost), makes vocabularies of any bytes, and renders any text as a chat template. */
#include "../tests/tokenizer_builder.h"

#include <stdio.h>
#include <stdlib.h>

#include "text/unicode.h"

enum { N_KINDS = 5 };

static builder built;
static tokenizer *fixed[N_KINDS];

static tokenizer *make_fixed(const char *pre)
{
    static char bytes[256][8];
    const char *tokens[320];
    int32_t types[320];
    float scores[320];
    const bool sentencepiece = !pre;
    size_t n = 0;
    for (int b = 0, other = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
        size_t length = sentencepiece ? (size_t)snprintf(bytes[b], 8, "<0x%02X>", b)
                                      : utf8_encode(printable ? (uint32_t)b : (uint32_t)(256 + other++), bytes[b]);
        bytes[b][length] = 0;
        types[n] = sentencepiece ? 6 : 1;
        tokens[n++] = bytes[b];
    }
    const char *const more[] = {"aa",       "aaaa", "ab", "\u0120\u0120", "\u0120a", "12", "''", "\u2581", "\u2581\u2581",
                                "\u2581ab", "a",    "b",  "\u4E2D"};
    for (size_t i = 0; i < sizeof more / sizeof *more; i++, n++) {
        types[n] = 1;
        tokens[n] = more[i];
    }
    const char *const special[] = {"<|im_start|>", "<|im_end|>", "<|im", "  ", "<u>"};
    for (size_t i = 0; i < sizeof special / sizeof *special; i++, n++) {
        types[n] = i < 3 ? 3 : 4;
        tokens[n] = special[i];
    }
    for (size_t i = 0; i < n; i++) scores[i] = -(float)(i % 7);
    const char *const merges[] = {"a a", "\u0120 \u0120", "aa aa", "a b", "1 2", "' '", "\u0120 a"};
    builder_start(&built);
    builder_string(&built, "ggml.model", sentencepiece ? "llama" : "gpt2");
    if (pre) builder_string(&built, "ggml.pre", pre);
    builder_strings(&built, "ggml.tokens", tokens, n);
    builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, types, n);
    builder_numbers(&built, "ggml.scores", GGUF_TYPE_F32, scores, n);
    builder_strings(&built, "ggml.merges", merges, sizeof merges / sizeof *merges);
    builder_bool(&built, "ggml.add_space_prefix", false);
    return builder_tokenizer(&built, NULL);
}

static void encode(const tokenizer *t, const char *text, size_t n, int flags, bool complete)
{
    token_list list = {0};
    if (tokenizer_encode(t, text, n, flags, &list, NULL) != QUARRY_OK) abort();
    detokenizer d;
    detokenizer_start(&d);
    size_t at = 0;
    for (int64_t i = 0; i < list.n; i++) {
        size_t length;
        char out[4096];
        const char *piece = tokenizer_token_bytes(t, list.ids[i], &length);
        if (!piece) abort();
        if (complete && (at + length > n || memcmp(piece, text + at, length) != 0)) abort();
        at += length;
        if (length + 16 <= sizeof out) detokenizer_push(&d, t, list.ids[i], out, length + 16);
    }
    if (complete && at != n) abort();
    token_list_free(&list);
}

/* A vocabulary of the input's lines, each after a byte for its type; the longer ones are merges as well. */
static void make_and_encode(const char *data, size_t n, bool sentencepiece)
{
    static char lines[64][40];
    const char *tokens[64], *merges[64];
    int32_t types[64];
    float scores[64];
    size_t n_tokens = 0, n_merges = 0;
    for (size_t i = 0; i < n && n_tokens < 64;) {
        size_t length = 0;
        types[n_tokens] = data[i++] % 8;
        while (i < n && data[i] != '\n' && data[i] && length < sizeof lines[0] - 1) lines[n_tokens][length++] = data[i++];
        lines[n_tokens][length] = 0;
        i++;
        tokens[n_tokens] = lines[n_tokens];
        scores[n_tokens] = (float)types[n_tokens] * (float)length;
        if (strchr(lines[n_tokens], ' ')) merges[n_merges++] = lines[n_tokens];
        n_tokens++;
    }
    builder_start(&built);
    builder_string(&built, "ggml.model", sentencepiece ? "llama" : "gpt2");
    builder_strings(&built, "ggml.tokens", tokens, n_tokens);
    builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, types, n_tokens);
    builder_numbers(&built, "ggml.scores", GGUF_TYPE_F32, scores, n_tokens);
    builder_strings(&built, "ggml.merges", merges, n_merges);
    tokenizer *t = builder_tokenizer(&built, NULL);
    if (t) encode(t, data, n, TOKENIZE_ADD_BOS | TOKENIZE_SPECIAL, false);
    tokenizer_destroy(t);
}

static void render(const char *data, size_t n)
{
    char *text = memory_string(data, n, NULL);
    const chat_template *c = chat_template_find(text, NULL, NULL);
    const chat_part part = {data, n};
    const chat_message messages[] = {{"user", &part, 1}, {"assistant", &part, 1}};
    token_list list = {0};
    int64_t split;
    if (c && chat_encode(c, fixed[0], text, messages, 2, true, true, &list, &split, NULL) == QUARRY_OK && (split < 0 || split > list.n))
        abort();
    if (c) memory_free(chat_render(c, text, messages, 2, true, true, NULL));
    token_list_free(&list);
    memory_free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const pres[N_KINDS] = {"gpt-2", "smollm", "qwen2", "llama-bpe", NULL};
    for (int i = 0; i < N_KINDS && !fixed[i]; i++) {
        fixed[i] = make_fixed(pres[i]);
        if (!fixed[i]) abort();
    }
    if (n < 2) return 0;
    int mode = data[0] % 16;
    const char *text = (const char *)data + 1;
    if (mode < 2 * N_KINDS) /* U+2581 is a space to SentencePiece */
        encode(fixed[mode % N_KINDS], text, n - 1, mode < N_KINDS ? TOKENIZE_PLAIN : TOKENIZE_SPECIAL,
               pres[mode % N_KINDS] || !memmem(text, n - 1, "\u2581", 3));
    else if (mode < 14)
        make_and_encode(text, n - 1, mode % 2);
    else
        render(text, n - 1);
    return 0;
}
