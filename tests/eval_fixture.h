/* A model and a text for the tests of the evaluation tasks. */
#ifndef EVAL_FIXTURE_H
#define EVAL_FIXTURE_H

#include "eval/eval.h"
#include "test.h"

typedef struct fixture {
    quarry_model *model;
    int32_t *tokens;
    eval_text text;
} fixture;

/* Sentences that are all different, about 1,500 tokens. */
static int64_t make_text(const quarry_model *model, int32_t **tokens)
{
    static const char *const who[] = {"The miller",  "Her sister",  "An old sailor", "The gardener",
                                      "Our teacher", "A traveller", "The captain"};
    static const char *const did[] = {"walked down to", "wrote a letter about", "had long forgotten", "could not stop talking of",
                                      "sat quietly near"};
    static const char *const what[] = {"the river", "the church on the hill", "the winter market", "a house with green doors"};
    char text[8192];
    size_t n = 0;
    for (int i = 0; i < 120; i++)
        n += (size_t)snprintf(text + n, sizeof text - n, "%s %s %s.%s", who[i % 7], did[i % 5], what[i / 5 % 4], i % 6 == 5 ? "\n" : " ");
    return quarry_tokenize(model, text, n, false, tokens, NULL);
}

/* Opens the model at path and makes the text; 0, or -1 with the reason on standard error. */
static int fixture_open(fixture *f, const char *path)
{
    quarry_error error;
    if (!(f->model = quarry_model_open(path, &(quarry_model_params){.n_threads = 2}, &error))) {
        fprintf(stderr, "%s\n", error.message);
        return -1;
    }
    const int64_t n = make_text(f->model, &f->tokens);
    f->text = (eval_text){"sentences", f->tokens, n};
    return n > 0 ? 0 : -1;
}

/* Teardown of a group whose state is a fixture, or NULL. */
static int close_model(void **state)
{
    const fixture *f = *state;
    if (f) {
        quarry_free(f->tokens);
        quarry_model_close(f->model);
    }
    return 0;
}

#endif
