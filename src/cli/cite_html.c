/* The report of `quarry ask --cite-html`: one file, no script, nothing fetched. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cite.h"

static const char head[] = "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
                           "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
                           "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
                           "<meta name=\"color-scheme\" content=\"light dark\">\n";

static const char style[] =
    "<style>\n"
    ":root { --ink: #1b1b1b; --paper: #fdfcf9; --faint: #6b6860; --rule: #dcd8cf; --mark: 255, 196, 0 }\n"
    "@media (prefers-color-scheme: dark) { :root { --ink: #e6e3dc; --paper: #191917; --faint: #9c988e; --rule: #3a3833; --mark: 214, 150, "
    "0 } }\n"
    "body { margin: 0 auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: "
    "var(--paper) }\n"
    "h1 { font-size: 1.35rem; margin: .5rem 0 1rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--rule) }\n"
    ".answer, .text { white-space: pre-wrap; overflow-wrap: anywhere } .answer { font-size: 1.15rem; margin: 0 0 1rem }\n"
    ".text { font-family: Georgia, serif } .faint { color: var(--faint); font-size: .875rem }\n"
    "ol.passages { padding-left: 1.75rem } ol.passages li { margin: .5rem 0; overflow-wrap: anywhere } a { color: inherit }\n"
    ".bar { display: block; height: .25rem; margin: .25rem 0; background: rgb(var(--mark)); border-radius: .125rem }\n"
    "mark { color: inherit; background: rgba(var(--mark), var(--a)); border-radius: .2rem; scroll-margin-top: 30vh }\n"
    "mark:target { outline: 2px solid rgb(var(--mark)) } sup a { padding: 0 .2rem; font-family: system-ui, sans-serif; text-decoration: "
    "none }\n"
    "</style>\n";

/* Text with what HTML reads as markup replaced, and bytes that are no character of a page as U+FFFD. */
static void put_text(FILE *out, const char *text, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes;) {
        const unsigned char c = (unsigned char)text[i];
        const size_t n = json_utf8_length(text + i, n_bytes - i);
        if (c == '&')
            fputs("&amp;", out);
        else if (c == '<')
            fputs("&lt;", out);
        else if (c == '>')
            fputs("&gt;", out);
        else if (c == '"')
            fputs("&quot;", out);
        else if (c == '\'')
            fputs("&#39;", out);
        else if (!n || (c < 0x20 && c != '\n' && c != '\t' && c != '\r') || c == 0x7F)
            fputs("\xef\xbf\xbd", out);
        else
            fwrite(text + i, 1, n, out);
        i += n ? n : 1;
    }
}

static void put_name(FILE *out, const cite_request *r, int document)
{
    const char *name = r->documents[document].name;
    if (name && *name)
        put_text(out, name, strlen(name));
    else
        fprintf(out, "document %d", document + 1);
}

/* Shares in thousandths: no number is written with the locale's comma. */
static int thousandths(double share)
{
    return (int)(share * 1000 + 0.5);
}

static void put_list(FILE *out, const cite_request *r, const cite_result *result)
{
    if (!result->n) {
        fputs("<p class=\"faint\">No passage stands out.</p>\n", out);
        return;
    }
    fputs("<p class=\"faint\">Passages that the answer was written from, with their share of the attention it paid to the documents:</p>\n"
          "<ol class=\"passages\">\n",
          out);
    for (int64_t i = 0; i < result->n; i++) {
        const quarry_citation *c = &result->items[i];
        const int share = thousandths(c->share);
        fprintf(out, "<li><a href=\"#passage-%lld\">", (long long)i + 1);
        put_name(out, r, c->document);
        fprintf(out, ", line%s %lld", c->first_line == c->last_line ? "" : "s", (long long)c->first_line);
        if (c->first_line != c->last_line) fprintf(out, "&ndash;%lld", (long long)c->last_line);
        fprintf(out, "</a> <span class=\"faint\">%d&#8239;%%</span><span class=\"bar\" style=\"width: %d.%d%%\"></span></li>\n",
                (share + 5) / 10, share / 10, share % 10);
    }
    fputs("</ol>\n", out);
}

/* The passage of a document that begins first at or after `at`; n if there is none. */
static int64_t next_passage(const cite_result *result, int document, size_t at)
{
    int64_t next = result->n;
    for (int64_t i = 0; i < result->n; i++) {
        const quarry_citation *c = &result->items[i];
        if (c->document != document || c->first_byte < at) continue;
        if (next == result->n || c->first_byte < result->items[next].first_byte) next = i;
    }
    return next;
}

static void put_document(FILE *out, const cite_request *r, const cite_result *result, int document)
{
    const quarry_document *d = &r->documents[document];
    size_t at = 0;
    fputs("<section>\n<h2>", out);
    put_name(out, r, document);
    fputs("</h2>\n<div class=\"text\">", out);
    for (int64_t i; (i = next_passage(result, document, at)) < result->n;) {
        const quarry_citation *c = &result->items[i];
        const int opacity = 150 + thousandths(c->share) * 65 / 100; /* even the faintest can be seen, and the text read on the strongest */
        put_text(out, d->text + at, c->first_byte - at);
        fprintf(out, "<mark id=\"passage-%lld\" style=\"--a: 0.%03d\">", (long long)i + 1, opacity);
        put_text(out, d->text + c->first_byte, c->end_byte - c->first_byte);
        fprintf(out, "<sup><a href=\"#passages\">%lld</a></sup></mark>", (long long)i + 1);
        at = c->end_byte;
    }
    put_text(out, d->text + at, d->n_bytes - at);
    fputs("</div>\n</section>\n", out);
}

static void put_page(FILE *out, const cite_request *r, const cite_result *result, const char *answer, size_t n_answer)
{
    fputs(head, out);
    fputs("<title>", out);
    put_text(out, r->question, strlen(r->question));
    fputs("</title>\n", out);
    fputs(style, out);
    fputs("</head>\n<body>\n<h1>", out);
    put_text(out, r->question, strlen(r->question));
    fputs("</h1>\n<div class=\"answer\">", out);
    put_text(out, answer, n_answer);
    fputs("</div>\n<div id=\"passages\">\n", out);
    put_list(out, r, result);
    fputs("</div>\n", out);
    for (int i = 0; i < r->n_documents; i++) put_document(out, r, result, i);
    fputs("<p class=\"faint\">quarry " QUARRY_VERSION "</p>\n</body>\n</html>\n", out);
}

int cite_write_html(const cite_request *request, const cite_result *result, const char *answer, size_t n_answer)
{
    char *page = NULL;
    size_t n_bytes = 0;
    quarry_error error = {0};
    FILE *out = open_memstream(&page, &n_bytes);
    if (!out) return cli_fail("out of memory");
    put_page(out, request, result, answer, n_answer);
    const bool failed = ferror(out);
    int code = CLI_OK;
    if (fclose(out) != 0 || failed)
        code = cli_fail("out of memory");
    else if (file_write_all(request->html, page, n_bytes, &error) != QUARRY_OK)
        code = cli_fail_error(&error);
    free(page);
    return code;
}
