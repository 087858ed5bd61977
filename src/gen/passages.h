/* Weights of tokens become passages of text: sentences, ranked. Shared by the files of this room. */
#ifndef GEN_PASSAGES_H
#define GEN_PASSAGES_H

#include "base/base.h"

/* One document as tokens: starts[i] is the byte of text[n_bytes] where token i begins (ascending), weights[i] >= 0 what it received. */
typedef struct passage_source {
    const char *text;
    size_t n_bytes;
    const size_t *starts; /* [n_tokens] */
    const double *weights;
    int64_t n_tokens;
} passage_source;

/* Where the sentence that begins at `first` ends, white space after it included; first < n_bytes. Sentences end at . ! ? and their kin before
 * white space, at blank lines, before items of lists, before and after headings; long ones also at a line's end, at white space, and at last anywhere between characters. */
size_t sentence_end(const char *text, size_t n_bytes, size_t first);

/* Up to max passages, largest share first, into a new array (memory_free); returns their number, or a negative code. A passage is a sentence and its neighbours
 * that received a fair part of what it did. */
int64_t passages_find(const passage_source *sources, int n_sources, int64_t max, quarry_citation **out, quarry_error *error);

#endif
