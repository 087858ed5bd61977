#include <string.h>

#include "eval/common.h"

/* The bytes of tokens[n], one after the other; free with memory_free. */
static char *tokens_text(const quarry_model *model, const int32_t *tokens, int64_t n, size_t *n_bytes, quarry_error *error)
{
    size_t length;
    *n_bytes = 0;
    for (int64_t i = 0; i < n; i++) quarry_token_text(model, tokens[i], &length), *n_bytes += length;
    char *text = memory_alloc(*n_bytes, 1, "document", error);
    if (!text) return NULL;
    *n_bytes = 0;
    for (int64_t i = 0; i < n; i++) {
        const char *piece = quarry_token_text(model, tokens[i], &length);
        memcpy(text + *n_bytes, piece, length);
        *n_bytes += length;
    }
    return text;
}

quarry_code cite_first_holds(const quarry_model *model, const quarry_session *session, const int32_t *document, int64_t n_document,
                             const needle *s, bool *holds, quarry_error *error)
{
    quarry_citation *first = NULL;
    quarry_document d = {0};
    char *text = tokens_text(model, document, n_document, &d.n_bytes, error);
    if (!text) return QUARRY_ERROR_MEMORY;
    d.text = text;
    const int64_t n = quarry_session_citations(session, &d, 1, 1, &first, error);
    *holds = n > 0 && needle_answered(s, text + first->first_byte, first->end_byte - first->first_byte);
    if (n >= 0) quarry_free(first);
    memory_free(text);
    return n < 0 ? (quarry_code)n : QUARRY_OK;
}
