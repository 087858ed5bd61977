/* The outputs of evaluations, as one page of HTML that fetches nothing. */
#include <stdlib.h>
#include <string.h>

#include "eval/report.h"

enum { MOST_RESULTS = 1000 }; /* of one file; more would not be read by anybody */

static quarry_code input_check(const report_input *in, quarry_error *error)
{
    size_t i;
    json_t *item;
    const json_t *results = json_object_get(in->envelope, "results");
    if (!json_is_string(json_object_get(in->envelope, "command")) || !json_is_array(results) || json_array_size(results) == 0)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: is not what a 'quarry eval' command prints with --json", in->path);
    if (json_array_size(results) > MOST_RESULTS)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: has %zu results, at most %d make a report", in->path, json_array_size(results),
                         MOST_RESULTS);
    json_array_foreach(results, i, item) if (!json_is_object(item)) return error_set(error, QUARRY_ERROR_FORMAT,
                                                                                     "%s: result %zu is not an object", in->path, i);
    return QUARRY_OK;
}

quarry_code report_check(const char *name, const char *text, size_t n_bytes, json_t **envelope, quarry_error *error)
{
    json_error_t why;
    *envelope = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &why);
    if (!*envelope)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: is not what a 'quarry eval' command prints with --json: line %d: %s", name,
                         why.line, why.text);
    return input_check(&(report_input){name, *envelope}, error);
}

static quarry_code input_read(report_input *in, const char *path, quarry_error *error)
{
    size_t n_bytes;
    quarry_error why;
    char *text = file_read_all(path, &n_bytes, &why);
    in->path = path;
    if (!text) return error_set(error, why.code, "%s", why.message);
    const quarry_code code = report_check(path, text, n_bytes, &in->envelope, error);
    memory_free(text);
    return code;
}

quarry_code report_render(FILE *out, const char *const *names, json_t *const *envelopes, int n, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    html_begin(out, "Retrieval policies: an evaluation");
    for (int i = 0; i < n && code == QUARRY_OK; i++) code = section_write(out, &(report_input){names[i], envelopes[i]}, error);
    html_end(out);
    return code;
}

static quarry_code report_save(const char *path, const char *const *names, json_t *const *envelopes, int n, quarry_error *error)
{
    char *page = NULL;
    size_t n_bytes = 0;
    FILE *out = open_memstream(&page, &n_bytes);
    if (!out) return error_memory(error, path, 0);
    quarry_code code = report_render(out, names, envelopes, n, error);
    const bool failed = ferror(out);
    if ((fclose(out) != 0 || failed) && code == QUARRY_OK) code = error_memory(error, path, n_bytes);
    if (code == QUARRY_OK) code = file_write_all(path, page, n_bytes, error);
    free(page);
    return code;
}

quarry_code report_write(const char *const *paths, int n, const char *out, quarry_error *error)
{
    report_input in = {0};
    quarry_code code = QUARRY_OK;
    json_t **envelopes = memory_zero((size_t)n, sizeof *envelopes, "report", error);
    if (!envelopes) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < n && code == QUARRY_OK; i++) {
        in.envelope = NULL;
        code = input_read(&in, paths[i], error);
        envelopes[i] = in.envelope;
    }
    if (code == QUARRY_OK) code = report_save(out, paths, envelopes, n, error);
    for (int i = 0; i < n; i++) json_decref(envelopes[i]);
    memory_free(envelopes);
    return code;
}
