#include "cli/cite.h"

#include <stdio.h>
#include <string.h>

enum { SNIPPET_BYTES = 300 };

static bool is_space(char c)
{
    return c && strchr(" \t\r\n\v\f", c);
}

/* The passage's first words in one line, white space made single spaces: whole words, up to SNIPPET_BYTES; returns its length. */
static size_t snippet(const char *text, size_t n_bytes, char out[SNIPPET_BYTES + 4])
{
    size_t n = 0, word = 0;
    for (size_t i = 0; i < n_bytes; i++) {
        if (is_space(text[i])) {
            if (n && out[n - 1] != ' ') out[n++] = ' ';
            word = n;
        } else {
            out[n++] = text[i];
        }
        if (n < SNIPPET_BYTES) continue;
        if (word) n = word;
        while (n && ((unsigned char)out[n] & 0xC0) == 0x80) n--; /* no part of a character */
        while (n && out[n - 1] == ' ') n--;
        memcpy(out + n, "…", strlen("…"));
        return n + strlen("…");
    }
    return n;
}

static const char *document_name(const cite_request *r, const quarry_citation *c, char buffer[32])
{
    const char *name = r->documents[c->document].name;
    if (name && *name) return name;
    snprintf(buffer, 32, "document %d", c->document + 1);
    return buffer;
}

void cite_print(const cite_request *request, const cite_result *result)
{
    char unnamed[32], words[SNIPPET_BYTES + 4];
    cli_print("\n%s\n", result->n ? "The answer was written from:" : "No passage stands out.");
    for (int64_t i = 0; i < result->n; i++) {
        const quarry_citation *c = &result->items[i];
        const size_t n = snippet(request->documents[c->document].text + c->first_byte, c->end_byte - c->first_byte, words);
        cli_print("\n[%lld] %s, line", (long long)i + 1, document_name(request, c, unnamed));
        if (c->first_line == c->last_line)
            cli_print(" %lld", (long long)c->first_line);
        else
            cli_print("s %lld-%lld", (long long)c->first_line, (long long)c->last_line);
        cli_print(" (%.0f %%)\n    ", 100 * c->share);
        cli_write(words, n);
        cli_print("\n");
    }
}

json_t *cite_json(const cite_request *request, const cite_result *result)
{
    char unnamed[32];
    json_t *list = json_array();
    for (int64_t i = 0; list && i < result->n; i++) {
        const quarry_citation *c = &result->items[i];
        const char *name = document_name(request, c, unnamed);
        json_t *item = json_pack("{s:o, s:I, s:I, s:I, s:I, s:f, s:o}", "document", json_text(name, strlen(name)), "first_line",
                                 (json_int_t)c->first_line, "last_line", (json_int_t)c->last_line, "first_byte", (json_int_t)c->first_byte,
                                 "end_byte", (json_int_t)c->end_byte, "share", c->share, "text",
                                 json_text(request->documents[c->document].text + c->first_byte, c->end_byte - c->first_byte));
        if (json_array_append_new(list, item)) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}
