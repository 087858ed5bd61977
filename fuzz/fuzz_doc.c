/* Any bytes as a file of questions: all of it or an error that names the file; a question's accepted answers are right answers to it. */
#include <stdlib.h>
#include <string.h>

#include "eval/eval.h"

#define CHECK(condition)                                                                                                                   \
    if (!(condition)) abort()

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    doc_set set;
    quarry_error error;
    const quarry_code code = doc_parse(&set, "folder/<input>", (const char *)data, n, &error);
    CHECK(code == QUARRY_OK || (error.code == code && strstr(error.message, "<input>")));
    CHECK(code != QUARRY_OK || set.n_questions > 0);
    for (int i = 0; code == QUARRY_OK && i < set.n_questions; i++) {
        const doc_question *q = &set.questions[i];
        CHECK(q->document >= 0 && q->document < set.n_documents && q->n_answers > 0 && q->line > 0);
        for (int k = 0; k < q->n_answers; k++) {
            const size_t length = strlen(q->answers[k]);
            bool right;
            CHECK(length > 2 && q->answers[k][0] == ' ' && q->answers[k][length - 1] == ' ');
            CHECK(doc_answered(q, q->answers[k], &right, &error) == QUARRY_OK && right);
        }
    }
    for (int i = 0; i < set.n_documents; i++) CHECK(!set.documents[i].path == !!set.documents[i].text);
    doc_set_free(&set);
    return 0;
}
