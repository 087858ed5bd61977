/* Cuts any text into tokens and sentences and ranks them: sentences must cover the text, passages lie in it apart from each other, shares add up to 1 at most. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "gen/passages.h"

#define CHECK(condition)                                                                                                                   \
    if (!(condition)) abort()

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
    enum { MOST = 8 };
    char *text = malloc(n_bytes + !n_bytes);
    size_t *starts = malloc((n_bytes + 1) * sizeof *starts);
    double *weights = malloc((n_bytes + 1) * sizeof *weights), sum = 0;
    int64_t n_tokens = 0;
    memcpy(text, data, n_bytes);
    for (size_t at = 0; at < n_bytes; at += 1 + data[at] % 7) {
        starts[n_tokens] = at;
        weights[n_tokens++] = data[at] % 3 ? 0 : (double)data[at];
    }
    for (size_t at = 0, end; at < n_bytes; at = end) {
        end = sentence_end(text, n_bytes, at);
        CHECK(end > at && end <= n_bytes);
    }
    const passage_source sources[2] = {{text, n_bytes, starts, weights, n_tokens}, {text, n_bytes / 2, starts, weights, 0}};
    quarry_citation *c = NULL;
    const int64_t n = passages_find(sources, 2, MOST, &c, NULL);
    CHECK(n >= 0 && n <= MOST);
    for (int64_t i = 0; i < n; i++) {
        CHECK(c[i].document == 0 && c[i].first_byte <= c[i].end_byte && c[i].end_byte <= n_bytes);
        CHECK(1 <= c[i].first_line && c[i].first_line <= c[i].last_line);
        for (int64_t k = 0; k < i; k++)
            CHECK(c[k].share >= c[i].share && (c[k].end_byte <= c[i].first_byte || c[i].end_byte <= c[k].first_byte));
        sum += c[i].share;
    }
    CHECK(sum < 1 + 1e-9);
    memory_free(c);
    free(text);
    free(starts);
    free(weights);
    return 0;
}
