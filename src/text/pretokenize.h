/* Pre-tokenizers: where a text is cut into words before byte-level BPE. Hand-written scanners for the published patterns, without
 * recursion or backtracking: each piece is read at most three times, on any input. */
#ifndef TEXT_PRETOKENIZE_H
#define TEXT_PRETOKENIZE_H

#include <stdbool.h>
#include <stddef.h>

typedef enum pretokenizer {
    PRETOKENIZER_GPT2,   /* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
    PRETOKENIZER_SMOLLM, /* every \p{N} apart, then GPT2 on what lies between */
    PRETOKENIZER_QWEN2, /* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
    PRETOKENIZER_LLAMA3, /* the same with \p{N}{1,3} */
} pretokenizer;

/* The pre-tokenizer that a value of tokenizer.ggml.pre names; false if none of ours. *ignore_merges: a word that is a token is taken whole; *add_bos: the default. */
bool pretokenizer_find(const char *name, pretokenizer *kind, bool *ignore_merges, bool *add_bos);

/* End of the piece that starts at text[start], start < n. Bytes that are no UTF-8 count as symbols, one each. */
size_t pretokenizer_next(pretokenizer kind, const char *text, size_t n, size_t start);

#endif
