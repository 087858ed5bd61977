/* The pieces of a tokenizer and the ways to find them: by bytes, by what a merge makes, as special tokens inside a text. Private to text. */
#ifndef TEXT_VOCAB_H
#define TEXT_VOCAB_H

#include "base/base.h"
#include "gguf/gguf.h"

/* tokenizer.ggml.token_type, and one of our own: text outside the byte alphabet, which no merging reaches. */
typedef enum piece_type {
    PIECE_NORMAL = 1,
    PIECE_UNKNOWN = 2,
    PIECE_CONTROL = 3,
    PIECE_USER = 4,
    PIECE_UNUSED = 5,
    PIECE_BYTE = 6,
    PIECE_LITERAL = 7
} piece_type;

typedef struct special {
    const char *text;
    size_t n;
    int32_t id;
} special;

typedef struct merge {
    int32_t left, right; /* left < 0: empty slot */
    int32_t rank, id;
} merge;

typedef struct vocab {
    bool sentencepiece;
    int64_t n;
    char *bytes;     /* all pieces, decoded, one after the other */
    size_t *begin;   /* [n + 1], into bytes */
    uint8_t *type;   /* [n], piece_type */
    bool *ends;      /* [n]: end of generation */
    uint32_t *order; /* [n]: merge priority of SentencePiece, lower first (from the scores); NULL for byte-level BPE */
    int32_t *slots;  /* [n_slots] ids by hash of the bytes, -1 empty; n_slots is a power of two */
    size_t n_slots;
    size_t longest; /* bytes of the longest piece that text can become */
    merge *merges;  /* [n_merge_slots] by hash of (left, right) */
    size_t n_merge_slots;
    special *specials; /* [n_specials] sorted by text */
    size_t n_specials;
    size_t special_first[257]; /* specials that begin with byte b: [special_first[b], special_first[b + 1]) */
    int32_t byte_ids[256];     /* piece of a single byte, or -1 */
} vocab;

#define VOCAB_NO_RANK UINT32_MAX

/* sentencepiece: pieces write a space as U+2581 and bytes as <0xNN>; otherwise they are in GPT-2's byte alphabet. path is for messages. */
quarry_code vocab_create(vocab *v, const gguf_file *g, bool sentencepiece, quarry_error *error);
void vocab_free(vocab *v);
void vocab_tally(const vocab *v, memory_tally *tally);

static inline const char *vocab_bytes(const vocab *v, int32_t id, size_t *n)
{
    *n = v->begin[id + 1] - v->begin[id];
    return v->bytes + v->begin[id];
}

/* A piece that text can become (control: also those it cannot), by its bytes; -1 if none. The lowest id of several. */
int32_t vocab_find(const vocab *v, const char *bytes, size_t n, bool control);
/* Byte-level BPE: what joining two pieces makes; NULL if they do not join. */
const merge *vocab_merge(const vocab *v, int32_t left, int32_t right);
/* The longest special token at text[0], n >= 1; -1 if none. Without control only user-defined tokens. */
int32_t vocab_special(const vocab *v, const char *text, size_t n, bool control, size_t *length);

#endif
