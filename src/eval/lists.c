#include "eval/eval.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int64_t list_parse_numbers(const char *text, const char *what, int64_t min, int64_t max, int64_t **out, quarry_error *error)
{
    size_t pieces = 1;
    for (const char *c = text; *c; c++) pieces += *c == ',';
    int64_t *numbers = memory_alloc(pieces, sizeof *numbers, what, error);
    if (!numbers) return QUARRY_ERROR_MEMORY;
    int64_t n = 0;
    for (const char *c = text;; c++) {
        char *end;
        errno = 0;
        const long long value = strtoll(c, &end, 10);
        if (end == c || (*end && *end != ',') || errno == ERANGE || value < min || value > max) {
            memory_free(numbers);
            return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: \"%.60s\" should be numbers from %lld to %lld, separated by commas", what,
                             text, (long long)min, (long long)max);
        }
        numbers[n++] = value;
        c = end;
        if (!*c) break;
    }
    *out = numbers;
    return n;
}

/* Length of the spec that text begins with: up to the comma after which something starts that is no "option=value". */
static size_t policy_length(const char *text)
{
    size_t end = strcspn(text, ",");
    while (text[end]) {
        const char *next = text + end + 1;
        if (next[strcspn(next, "=:,")] != '=') break;
        end += 1 + strcspn(next, ",");
    }
    return end;
}

quarry_code policy_list_add(policy_list *list, const char *text, quarry_error *error)
{
    for (const char *c = text;;) {
        const size_t n = policy_length(c);
        if (n == 0) return error_set(error, QUARRY_ERROR_ARGUMENT, "--attn: an empty policy name in \"%.60s\"", text);
        const quarry_code code = memory_grow(&list->specs, (size_t)list->n + 1, sizeof *list->specs, "policies", error);
        if (code != QUARRY_OK) return code;
        if (!(list->specs[list->n] = memory_string(c, n, error))) return QUARRY_ERROR_MEMORY;
        list->n++;
        if (!c[n]) return QUARRY_OK;
        c += n + 1;
    }
}

void policy_list_free(policy_list *list)
{
    for (int i = 0; i < list->n; i++) memory_free(list->specs[i]);
    memory_free(list->specs);
    *list = (policy_list){0};
}
