#include <string.h>

#include "gen/gen.h"

/* One stop string with its Knuth-Morris-Pratt table, so that a match is found whatever pieces the text comes in. */
typedef struct stop_string {
    char *text;
    int32_t n;
    int32_t *fallback; /* [n]: length of the longest proper border of text[0 … i] */
    int32_t matched;   /* the text so far ends with text[0 … matched-1] */
} stop_string;

struct stop_matcher {
    stop_string *strings;
    int n_strings;
    char *buffer; /* [n_shown: given out by the last call][n_held: may begin a stop string] */
    size_t n_shown, n_held, capacity;
};

static quarry_code string_init(stop_string *s, const char *text, quarry_error *error)
{
    size_t n = strlen(text);
    if (n > INT32_MAX) return error_set(error, QUARRY_ERROR_ARGUMENT, "a stop string of %zu bytes is too long", n);
    s->text = memory_string(text, n, error);
    s->fallback = memory_zero(n, sizeof *s->fallback, "stop string", error);
    s->n = (int32_t)n;
    if (!s->text || !s->fallback) return QUARRY_ERROR_MEMORY;
    for (int32_t i = 1, border = 0; i < s->n; i++) {
        while (border && s->text[i] != s->text[border]) border = s->fallback[border - 1];
        if (s->text[i] == s->text[border]) border++;
        s->fallback[i] = border;
    }
    return QUARRY_OK;
}

stop_matcher *stop_matcher_create(const char *const *stop, int n_stop, quarry_error *error)
{
    stop_matcher *m = memory_zero(1, sizeof *m, "stop strings", error);
    if (!m) return NULL;
    m->strings = memory_zero((size_t)n_stop, sizeof *m->strings, "stop strings", error);
    if (!m->strings) goto failed;
    m->n_strings = n_stop;
    for (int i = 0; i < n_stop; i++) {
        if (!stop[i] || !*stop[i]) {
            error_set(error, QUARRY_ERROR_ARGUMENT, "stop string %d is empty", i + 1);
            goto failed;
        }
        if (string_init(&m->strings[i], stop[i], error)) goto failed;
    }
    return m;
failed:
    stop_matcher_destroy(m);
    return NULL;
}

void stop_matcher_destroy(stop_matcher *m)
{
    if (!m) return;
    for (int i = 0; i < m->n_strings; i++) {
        memory_free(m->strings[i].text);
        memory_free(m->strings[i].fallback);
    }
    memory_free(m->strings);
    memory_free(m->buffer);
    memory_free(m);
}

/* Takes one more character; true when it completes the string. */
static bool string_step(stop_string *s, char c)
{
    if (s->matched == s->n) s->matched = s->fallback[s->n - 1];
    while (s->matched && s->text[s->matched] != c) s->matched = s->fallback[s->matched - 1];
    if (s->text[s->matched] == c) s->matched++;
    return s->matched == s->n;
}

bool stop_matcher_push(stop_matcher *m, const char *text, size_t n, const char **out, size_t *n_out, quarry_error *error)
{
    *out = NULL;
    *n_out = 0;
    size_t needed = m->n_held + n;
    if (needed + 1 > m->capacity) {
        if (memory_grow(&m->buffer, needed + 256, 1, "text", error)) return false;
        m->capacity = needed + 256;
    }
    memmove(m->buffer, m->buffer + m->n_shown, m->n_held);
    m->n_shown = 0;
    if (n) memcpy(m->buffer + m->n_held, text, n);
    size_t first = m->n_held;
    *out = m->buffer;
    for (size_t i = first; i < needed; i++) {
        int32_t longest = 0;
        for (int k = 0; k < m->n_strings; k++) {
            stop_string *s = &m->strings[k];
            if (string_step(s, m->buffer[i]) && s->n > longest) longest = s->n;
        }
        if (longest) {
            *n_out = i + 1 - (size_t)longest;
            m->n_shown = *n_out;
            m->n_held = 0;
            return true;
        }
    }
    int32_t held = 0;
    for (int k = 0; k < m->n_strings; k++)
        if (m->strings[k].matched > held) held = m->strings[k].matched;
    m->n_held = (size_t)held;
    m->n_shown = *n_out = needed - m->n_held;
    return false;
}

void stop_matcher_flush(stop_matcher *m, const char **out, size_t *n_out)
{
    *out = m->buffer ? m->buffer + m->n_shown : "";
    *n_out = m->n_held;
    m->n_held = 0;
    for (int k = 0; k < m->n_strings; k++) m->strings[k].matched = 0;
}
