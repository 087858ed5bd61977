/* Needles in a text, and the question about one, as tokens of a model. */
#include <string.h>

#include "eval/common.h"

enum { SENTENCE_BYTES = 320 };

static const char *token_text(const void *data, int32_t token, size_t *n_bytes)
{
    return tokenizer_token_bytes(data, token, n_bytes);
}

quarry_code haystack_source_open(haystack_source *s, const quarry_model *model, const eval_text *texts, int n_texts, quarry_error *error)
{
    *s = (haystack_source){.model = model, .texts = texts, .n_texts = n_texts};
    if (!(s->starts = memory_zero((size_t)n_texts, sizeof *s->starts, "sentences", error))) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < n_texts; i++) {
        if (!(s->starts[i] = memory_alloc((size_t)texts[i].n_tokens, sizeof **s->starts, "sentences", error))) return QUARRY_ERROR_MEMORY;
        sentence_starts(texts[i].tokens, texts[i].n_tokens, token_text, model_tokenizer(model), s->starts[i]);
    }
    return QUARRY_OK;
}

void haystack_source_close(haystack_source *s)
{
    for (int i = 0; s->starts && i < s->n_texts; i++) memory_free(s->starts[i]);
    memory_free(s->starts);
}

static quarry_code encode_plain(const quarry_model *model, const char *text, int n_bytes, token_list *list, quarry_error *error)
{
    list->n = 0;
    return tokenizer_encode(model_tokenizer(model), text, (size_t)n_bytes, TOKENIZE_PLAIN, list, error);
}

/* Bytes at the end of the answer that are ": NUMBER". */
static int number_bytes(const needle *s)
{
    return (int)strlen(s->number) + 2;
}

/* A model without turns does not answer a question but continues an answer that has begun. */
static bool continues_text(const quarry_model *model)
{
    const chat_template *chat = model_chat(model, NULL);
    return chat && strcmp(chat_template_name(chat), "plain") == 0;
}

quarry_code question_encode(const quarry_model *model, const needle *s, token_list *before, token_list *question, quarry_error *error)
{
    char text[SENTENCE_BYTES];
    int n_bytes = needle_question(s, text, sizeof text);
    if (continues_text(model)) {
        text[n_bytes++] = ' ';
        n_bytes += needle_answer_sentence(s, text + n_bytes, sizeof text - (size_t)n_bytes) - number_bytes(s);
    }
    const chat_part parts[2] = {{"", 0}, {text, (size_t)n_bytes}};
    const chat_message message = {"user", parts, 2};
    token_list all = {0};
    int64_t split;
    const chat_template *chat = model_chat(model, error);
    if (!chat) return eval_failed(error);
    quarry_code code = chat_encode(chat, model_tokenizer(model), model_chat_text(model), &message, 1, true, true, &all, &split, error);
    before->n = question->n = 0;
    for (int64_t i = 0; i < all.n && code == QUARRY_OK; i++) code = token_list_push(i < split ? before : question, all.ids[i], error);
    token_list_free(&all);
    return code;
}

quarry_code answer_encode(const quarry_model *model, const needle *s, token_list *answer, int64_t *first_digit, quarry_error *error)
{
    char text[SENTENCE_BYTES];
    const int n_sentence = needle_answer_sentence(s, text, sizeof text), said = continues_text(model) ? n_sentence - number_bytes(s) : 0;
    const quarry_code code = encode_plain(model, text + said, n_sentence - said, answer, error);
    if (code != QUARRY_OK) return code;
    size_t n_digits = 0, n_bytes;
    for (*first_digit = answer->n; *first_digit > 0 && n_digits < NEEDLE_DIGITS; n_digits += n_bytes)
        tokenizer_token_bytes(model_tokenizer(model), answer->ids[--*first_digit], &n_bytes);
    return QUARRY_OK;
}

quarry_code haystack_draw(const haystack_source *s, int text_index, needle *needles, int n_needles, const token_list *before,
                          random_state *random, int32_t *tokens, int64_t n_tokens, quarry_error *error)
{
    const eval_text *text = &s->texts[text_index];
    const bool *starts = s->starts[text_index];
    token_list sentences[NEEDLE_MAX] = {{0}};
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < n_needles; i++) {
        char sentence[SENTENCE_BYTES];
        code = encode_plain(s->model, sentence, needle_sentence(&needles[i], sentence, sizeof sentence), &sentences[i], error);
        if (code != QUARRY_OK) goto done;
    }
    const int64_t spare = text->n_tokens - n_tokens;
    int64_t first = spare > 0 ? (int64_t)random_below(random, (uint64_t)spare) : 0;
    while (first > 0 && first < spare && !starts[first]) first++;
    for (int64_t i = 0; i < before->n && i < n_tokens; i++) tokens[i] = before->ids[i];
    if (before->n >= n_tokens || !haystack_build(text->tokens, starts, text->n_tokens, first, needles, sentences, n_needles,
                                                 tokens + before->n, n_tokens - before->n))
        code = text->n_tokens < n_tokens
                   ? error_set(error, QUARRY_ERROR_ARGUMENT, "%s: has %lld tokens, but a haystack takes %lld", text->name,
                               (long long)text->n_tokens, (long long)n_tokens)
                   : error_set(error, QUARRY_ERROR_ARGUMENT, "%s: a haystack of %lld tokens has no room for %d needles", text->name,
                               (long long)n_tokens, n_needles);
done:
    for (int i = 0; i < n_needles; i++) token_list_free(&sentences[i]);
    return code;
}
