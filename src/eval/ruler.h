/* RULER (Hsieh et al., arXiv 2404.06654): the eleven synthetic tasks that need no data set, generated anew to the published definitions. */
#ifndef EVAL_RULER_H
#define EVAL_RULER_H

#include "eval/common.h"

enum { RULER_TASKS = 11, RULER_ANSWERS = 10, RULER_TOKENS_PER_ANSWER = 128 };

/* What texts give: sentences for haystacks, words for lists. Owned copies. */
typedef struct ruler_source {
    char *text;
    const char **sentences; /* [n_sentences], NUL-terminated, in text */
    const char **words;     /* [n_words], distinct, lower case, 4 to 10 letters */
    char *word_text;
    int64_t n_sentences, n_words;
} ruler_source;

/* A question over a context. Strings are owned. */
typedef struct ruler_sample {
    char *context;  /* what is read: the task and the haystack */
    char *question; /* follows the context, in the same turn */
    char *prefix;   /* the beginning of the answer */
    char *answers[RULER_ANSWERS];
    int n_answers;
} ruler_sample;

typedef struct ruler_task {
    const char *name;
    int n_predict; /* most tokens of an answer */
    bool needs_text;
} ruler_task;

extern const ruler_task ruler_tasks[RULER_TASKS];

quarry_code ruler_source_make(ruler_source *s, const char *text, size_t n_bytes, quarry_error *error);
void ruler_source_free(ruler_source *s);

/* Generates a sample with so many units of haystack: sentences, needles, list entries or coded words, by task. n_tokens: the length aimed at, which
 * sets the frequencies of cwe and the vocabulary of fwe. The same seed gives the same keys and answers with any number of units. *n_used is how many units there were (fewer
 * when the source has no more). Errors: MEMORY, ARGUMENT (the source is too small). */
quarry_code ruler_generate(int task, const ruler_source *source, int64_t n_units, int64_t n_tokens, uint64_t seed, ruler_sample *out,
                           int64_t *n_used, quarry_error *error);
void ruler_sample_free(ruler_sample *s);

/* Share of the answers that occur in text, letter case ignored. */
double ruler_score(const ruler_sample *s, const char *text);

#endif
