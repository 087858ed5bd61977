#include <stdio.h>
#include <string.h>

#include "gen/session.h"

/* The one user message:  [# NAME\n\n]document 1 \n\n # NAME\n\n document 2 … \n\n question
 * in parts that are tokenised apart, the question's part last. What stands before and in a document does not depend on those after it. */
typedef struct message_parts {
    chat_part *parts;
    char *headings; /* one after the other */
    char *question; /* "\n\n" before it when there are documents */
} message_parts;

static void parts_free(message_parts *m)
{
    memory_free(m->parts);
    memory_free(m->headings);
    memory_free(m->question);
}

/* "# NAME\n\n"; for one without a name nothing if it is the first, else "# Document 2\n\n"; from the second on a blank line comes first. Returns its length; out may be NULL. */
static size_t heading_write(char *out, size_t capacity, const quarry_document *documents, int i)
{
    const char *name = documents[i].name, *gap = i ? "\n\n" : "";
    int n = 0;
    if (name && *name)
        n = snprintf(out, capacity, "%s# %s\n\n", gap, name);
    else if (i)
        n = snprintf(out, capacity, "%s# Document %d\n\n", gap, i + 1);
    return n > 0 ? (size_t)n : 0;
}

static quarry_code parts_make(message_parts *m, const quarry_document *documents, int n_documents, const char *question, int *n_parts,
                              quarry_error *error)
{
    size_t n_headings = 0, n_question = strlen(question), at = 0;
    for (int i = 0; i < n_documents; i++) n_headings += heading_write(NULL, 0, documents, i);
    m->parts = memory_zero((size_t)n_documents * 2 + 1, sizeof *m->parts, "prompt", error);
    m->headings = memory_alloc(n_headings + 1, 1, "prompt", error);
    m->question = memory_alloc(n_question + 3, 1, "prompt", error);
    if (!m->parts || !m->headings || !m->question) return QUARRY_ERROR_MEMORY;
    int n = 0;
    for (int i = 0; i < n_documents; i++) {
        const size_t length = heading_write(m->headings + at, n_headings + 1 - at, documents, i);
        if (length) m->parts[n++] = (chat_part){m->headings + at, length};
        at += length;
        m->parts[n++] = (chat_part){documents[i].text, documents[i].n_bytes};
    }
    snprintf(m->question, n_question + 3, "%s%s", n_documents ? "\n\n" : "", question);
    m->parts[n++] = (chat_part){m->question, strlen(m->question)};
    *n_parts = n;
    return QUARRY_OK;
}

static bool is_blank(const char *text)
{
    return text[strspn(text, " \t\r\n\v\f")] == 0;
}

/* A copy of tokens[n], for the caller to free with quarry_free. */
static int32_t *copy_tokens(const int32_t *tokens, int64_t n, quarry_error *error)
{
    int32_t *copy = memory_alloc((size_t)n, sizeof *copy, "prompt", error);
    if (copy && n) memcpy(copy, tokens, (size_t)n * sizeof *copy);
    return copy;
}

static quarry_code find_ends(const quarry_model *model, quarry_prompt *prompt, const quarry_document *documents, int n_documents,
                             quarry_error *error)
{
    prompt_span *spans = memory_alloc((size_t)n_documents, sizeof *spans, "prompt", error);
    size_t *starts = memory_alloc((size_t)prompt->n_context, sizeof *starts, "prompt", error);
    prompt->ends = memory_alloc((size_t)n_documents, sizeof *prompt->ends, "prompt", error);
    quarry_code code = spans && starts && prompt->ends ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    if (code == QUARRY_OK) code = prompt_locate(model, prompt->context, prompt->n_context, documents, n_documents, spans, starts, error);
    for (int i = 0; i < n_documents && code == QUARRY_OK; i++) prompt->ends[i] = spans[i].end;
    memory_free(spans);
    memory_free(starts);
    return code;
}

int quarry_prompt_build(const quarry_model *model, const quarry_document *documents, int n_documents, const char *system,
                        const char *question, quarry_prompt *prompt, quarry_error *error)
{
    *prompt = (quarry_prompt){0};
    if (n_documents < 0 || (n_documents && !documents))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "n_documents is %d without documents", n_documents);
    if (!question || is_blank(question)) return error_set(error, QUARRY_ERROR_ARGUMENT, "the question is empty");
    for (int i = 0; i < n_documents; i++)
        if (!documents[i].text && documents[i].n_bytes) return error_set(error, QUARRY_ERROR_ARGUMENT, "document %d has no text", i + 1);
    const chat_template *chat = model_chat(model, error);
    if (!chat) return QUARRY_ERROR_UNSUPPORTED;

    message_parts message = {0};
    token_list list = {0};
    chat_message messages[2];
    int n_messages = 0, n_parts;
    int64_t split;
    chat_part system_part = {system, system ? strlen(system) : 0};
    quarry_code code = parts_make(&message, documents, n_documents, question, &n_parts, error);
    if (code) goto done;
    if (system) messages[n_messages++] = (chat_message){"system", &system_part, 1};
    messages[n_messages++] = (chat_message){"user", message.parts, n_parts};
    code = chat_encode(chat, model_tokenizer(model), model_chat_text(model), messages, n_messages, true, true, &list, &split, error);
    if (code) goto done;
    prompt->n_context = split;
    prompt->n_question = list.n - split;
    prompt->context = copy_tokens(list.ids, split, error);
    prompt->question = copy_tokens(list.ids + split, list.n - split, error);
    if (!prompt->context || !prompt->question) code = QUARRY_ERROR_MEMORY;
    if (code == QUARRY_OK) code = find_ends(model, prompt, documents, n_documents, error);
    if (code != QUARRY_OK) quarry_prompt_free(prompt);
done:
    token_list_free(&list);
    parts_free(&message);
    return code;
}

void quarry_prompt_free(quarry_prompt *prompt)
{
    if (!prompt) return;
    quarry_free(prompt->context);
    quarry_free(prompt->question);
    quarry_free(prompt->ends);
    *prompt = (quarry_prompt){0};
}

/* ---- where the documents are ---- */

/* Goes back from tokens[*at] over the document's text, from its end; false if they differ. The family may have left out white space at
 * the beginning of the message, and a tokenizer may have put a space there. */
static bool span_match(const tokenizer *t, const int32_t *tokens, int64_t *at, const quarry_document *d, size_t *starts)
{
    size_t rest = d->n_bytes;
    while (rest > 0 && *at > 0) {
        size_t n;
        const char *bytes = tokenizer_token_bytes(t, tokens[*at - 1], &n);
        if (bytes && n == rest + 1 && *bytes == ' ') bytes++, n--;
        if (!bytes || n > rest || memcmp(d->text + rest - n, bytes, n) != 0) break;
        rest -= n;
        starts[--*at] = rest;
    }
    while (rest > 0 && strchr(" \t\r\n\v\f", d->text[rest - 1]) && d->text[rest - 1]) rest--;
    return rest == 0;
}

quarry_code prompt_locate(const quarry_model *model, const int32_t *tokens, int64_t n_context, const quarry_document *documents,
                          int n_documents, prompt_span *spans, size_t *starts, quarry_error *error)
{
    const tokenizer *t = model_tokenizer(model);
    int64_t at = n_context; /* the context ends where the last document does */
    for (int i = n_documents - 1; i >= 0; i--) {
        spans[i].end = at;
        if (!span_match(t, tokens, &at, &documents[i], starts))
            return error_set(error, QUARRY_ERROR_ARGUMENT, "document %d is not what the session read there", i + 1);
        spans[i].first = at;
        size_t heading = heading_write(NULL, 0, documents, i), n = 0;
        for (; heading > 0 && at > 0; at--) {
            tokenizer_token_bytes(t, tokens[at - 1], &n);
            if (n > heading) break;
            heading -= n;
        }
    }
    return QUARRY_OK;
}
