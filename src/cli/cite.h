/* Citations of an answer: as text, as JSON, as a page of HTML. */
#ifndef CLI_CITE_H
#define CLI_CITE_H

#include "cli/json.h"

/* What is to be cited, and where to. */
typedef struct cite_request {
    const quarry_document *documents; /* [n_documents] */
    int n_documents;
    const char *question;
    int64_t max;      /* passages at most */
    bool text;        /* list them on standard output */
    const char *html; /* file for the report; NULL: none */
} cite_request;

typedef struct cite_result {
    quarry_citation *items; /* [n], freed with quarry_free */
    int64_t n;
} cite_result;

/* Passages to standard output, after an answer. */
void cite_print(const cite_request *request, const cite_result *result);
/* An array of objects; NULL out of memory. */
json_t *cite_json(const cite_request *request, const cite_result *result);
/* Writes request->html, complete or not at all: question, answer[n_answer], documents with the passages marked. Nothing in it is fetched from elsewhere. Returns an exit code. */
int cite_write_html(const cite_request *request, const cite_result *result, const char *answer, size_t n_answer);

#endif
