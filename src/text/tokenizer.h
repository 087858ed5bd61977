/* Inside of the tokenizer. Private to text. */
#ifndef TEXT_TOKENIZER_H
#define TEXT_TOKENIZER_H

#include "text/pretokenize.h"
#include "text/text.h"
#include "text/vocab.h"

struct tokenizer {
    char *name;
    vocab vocab;
    bool sentencepiece;
    pretokenizer pre;
    bool ignore_merges;    /* byte-level: a word that is a token is taken whole */
    bool add_space_prefix; /* SentencePiece: text at the start and after a special token gets a space in front */
    bool before_space
        [256]; /* SentencePiece: some piece has this byte in front of a space; after all others a space starts a word that merges apart */
    bool add_bos, add_eos;
    bool strip_after_special;  /* white space after a special token belongs to it (phi-3) */
    int32_t bos, eos, unknown; /* -1 if none */
};

/* One element of the list of pieces that merging joins. */
typedef struct symbol {
    uint32_t begin, n;  /* bytes of the word */
    int32_t id;         /* -1: no piece has these bytes */
    int32_t prev, next; /* -1: none */
    uint32_t rank;      /* priority of joining this symbol and the next, VOCAB_NO_RANK if they do not join */
    int32_t joined;     /* what that makes */
} symbol;

/* Working memory of one call; zero-initialise, free with merger_free. */
typedef struct merger {
    symbol *symbols;
    uint64_t *heap;
    size_t symbol_capacity, heap_capacity, n_heap;
    char *text; /* SentencePiece: the text with the space in front */
    size_t text_capacity;
} merger;

void merger_free(merger *m);
/* Appends the pieces of one word, n <= INT32_MAX. */
quarry_code merger_encode(merger *m, const tokenizer *t, const char *word, size_t n, token_list *list, quarry_error *error);

/* As tokenizer_encode without BOS and EOS. *at_start says whether the text follows a special token or nothing (SentencePiece writes a space there), and is updated for what comes next. */
quarry_code tokenizer_encode_part(const tokenizer *t, const char *text, size_t n_bytes, bool with_special, bool *at_start, token_list *list,
                                  quarry_error *error);

#endif
