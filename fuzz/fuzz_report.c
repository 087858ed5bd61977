/* Makes a report of any bytes: all of it or an error, and no markup that came from the input. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "eval/eval.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const name = "<input>";
    json_t *envelope = NULL;
    quarry_error error;
    if (report_check(name, (const char *)data, n, &envelope, &error) == QUARRY_OK) {
        char *text = NULL;
        size_t n_bytes;
        FILE *out = open_memstream(&text, &n_bytes);
        if (!out) abort();
        const quarry_code code = report_render(out, &name, &envelope, 1, &error);
        fclose(out);
        if (code != QUARRY_OK && (error.code != code || !strstr(error.message, name))) abort();
        if (code == QUARRY_OK && (strstr(text, "<script") || strstr(text, "<img"))) abort();
        free(text);
    }
    json_decref(envelope);
    return 0;
}
