/* Questions about documents, as JSON Lines. */
#include <string.h>

#include "eval/eval.h"

/* What parsing keeps beside the set: which document a path or text is. */
typedef struct doc_reader {
    doc_set *set;
    json_t *seen; /* "P" and path, or "T" and text: index of the document */
    int64_t line;
    quarry_error *error;
} doc_reader;

#define FAIL(r, format, ...)                                                                                                               \
    error_set((r)->error, QUARRY_ERROR_FORMAT, "%s: line %lld: " format, (r)->set->path, (long long)(r)->line, ##__VA_ARGS__)

static bool is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!memchr(" \t\r\n\v\f", text[i], 6)) return false;
    return true;
}

/* *text is a string of the object that is not blank, or NULL if it has no such key. */
static quarry_code take_string(const doc_reader *r, const json_t *object, const char *key, const char **text)
{
    const json_t *value = json_object_get(object, key);
    *text = json_string_value(value);
    if (!value) return QUARRY_OK;
    if (!*text) return FAIL(r, "\"%s\" is not a string", key);
    if (is_blank(*text, strlen(*text))) return FAIL(r, "\"%s\" is empty", key);
    return QUARRY_OK;
}

/* ---- documents ---- */

/* A path as the file means it, relative to its own folder. */
static char *resolve(const char *file, const char *path, quarry_error *error)
{
    const char *slash = strrchr(file, '/');
    const size_t n_folder = slash && *path != '/' ? (size_t)(slash - file) + 1 : 0, n_path = strlen(path);
    char *full = memory_alloc(n_folder + n_path + 1, 1, "path", error);
    if (!full) return NULL;
    memcpy(full, file, n_folder);
    memcpy(full + n_folder, path, n_path + 1);
    return full;
}

static quarry_code add_document(const doc_reader *r, const char *path, const char *text, int *index)
{
    doc_set *set = r->set;
    const quarry_code code = memory_grow(&set->documents, (size_t)set->n_documents + 1, sizeof *set->documents, "documents", r->error);
    if (code != QUARRY_OK) return code;
    doc_document *d = &set->documents[set->n_documents];
    *d = (doc_document){.line = r->line, .n_bytes = text ? strlen(text) : 0};
    if (path && !(d->path = resolve(set->path, path, r->error))) return QUARRY_ERROR_MEMORY;
    if (text && !(d->text = memory_string(text, d->n_bytes, r->error))) return QUARRY_ERROR_MEMORY;
    *index = set->n_documents++;
    return QUARRY_OK;
}

/* Lines with the same path, or the same text, share a document. */
static quarry_code take_document(const doc_reader *r, const json_t *object, int *index)
{
    const char *path, *text;
    quarry_code code = take_string(r, object, "document", &path);
    if (code == QUARRY_OK) code = take_string(r, object, "text", &text);
    if (code != QUARRY_OK) return code;
    if (!path == !text)
        return path ? FAIL(r, "has both \"document\" and \"text\"") : FAIL(r, "has neither \"document\" (a path) nor \"text\"");
    if (path && strcmp(path, "-") == 0) return FAIL(r, "\"document\" is \"-\", not a file");
    const char *what = path ? path : text;
    const size_t n = strlen(what);
    char *key = memory_alloc(n + 2, 1, "document", r->error);
    if (!key) return QUARRY_ERROR_MEMORY;
    key[0] = path ? 'P' : 'T';
    memcpy(key + 1, what, n + 1);
    const json_t *known = json_object_get(r->seen, key);
    if (known)
        *index = (int)json_integer_value(known);
    else if ((code = add_document(r, path, text, index)) == QUARRY_OK && json_object_set_new(r->seen, key, json_integer(*index)))
        code = error_memory(r->error, "documents", n);
    memory_free(key);
    return code;
}

/* ---- questions ---- */

static quarry_code add_answer(const doc_reader *r, doc_question *q, const char *text)
{
    const quarry_code code = memory_grow(&q->answers, (size_t)q->n_answers + 1, sizeof *q->answers, "answers", r->error);
    if (code != QUARRY_OK) return code;
    char *words = doc_normalise(text, r->error);
    if (!words) return QUARRY_ERROR_MEMORY;
    q->answers[q->n_answers++] = words;
    if (strcmp(words, " ") == 0) return FAIL(r, "the answer '%.80s' has no word that is compared: articles and punctuation are not", text);
    return QUARRY_OK;
}

static quarry_code take_answers(const doc_reader *r, const json_t *object, doc_question *q)
{
    const json_t *list = json_object_get(object, "answers");
    const char *one;
    size_t i;
    json_t *item;
    quarry_code code = take_string(r, object, "answer", &one);
    if (code != QUARRY_OK) return code;
    if (!list == !one)
        return one ? FAIL(r, "has both \"answer\" and \"answers\"") : FAIL(r, "has no \"answers\" (an array of strings) and no \"answer\"");
    if (one) return add_answer(r, q, one);
    if (!json_is_array(list) || json_array_size(list) == 0) return FAIL(r, "\"answers\" is not an array of at least one string");
    json_array_foreach(list, i, item)
    {
        if (!json_is_string(item)) return FAIL(r, "answer %zu is not a string", i + 1);
        if ((code = add_answer(r, q, json_string_value(item))) != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

static quarry_code take_object(const doc_reader *r, const json_t *object)
{
    const char *question;
    doc_set *set = r->set;
    quarry_code code = memory_grow(&set->questions, (size_t)set->n_questions + 1, sizeof *set->questions, "questions", r->error);
    if (code != QUARRY_OK) return code;
    doc_question *q = &set->questions[set->n_questions++];
    *q = (doc_question){.line = r->line};
    if ((code = take_string(r, object, "question", &question)) != QUARRY_OK) return code;
    if (!question) return FAIL(r, "has no \"question\"");
    if (!(q->question = memory_string(question, strlen(question), r->error))) return QUARRY_ERROR_MEMORY;
    if ((code = take_document(r, object, &q->document)) != QUARRY_OK) return code;
    return take_answers(r, object, q);
}

static quarry_code take_line(const doc_reader *r, const char *text, size_t n)
{
    json_error_t why;
    if (is_blank(text, n)) return QUARRY_OK;
    json_t *object = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
    quarry_code code;
    if (!object)
        code = FAIL(r, "is not JSON: %s (byte %d)", why.text, why.position);
    else if (!json_is_object(object))
        code = FAIL(r, "is not an object {\"document\", \"question\", \"answers\"}");
    else
        code = take_object(r, object);
    json_decref(object);
    return code;
}

quarry_code doc_parse(doc_set *set, const char *path, const char *text, size_t n_bytes, quarry_error *error)
{
    doc_reader r = {.set = set, .error = error};
    quarry_code code = QUARRY_OK;
    *set = (doc_set){0};
    if (!(set->path = memory_string(path, strlen(path), error))) return QUARRY_ERROR_MEMORY;
    if (!(r.seen = json_object())) return error_memory(error, "documents", 0);
    for (const char *at = text, *end = text + n_bytes; at < end && code == QUARRY_OK;) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        const size_t n = (size_t)((newline ? newline : end) - at);
        r.line++;
        code = take_line(&r, at, n);
        at += n + (newline != NULL);
    }
    if (code == QUARRY_OK && set->n_questions == 0) code = error_set(error, QUARRY_ERROR_FORMAT, "%s: has no question in it", path);
    json_decref(r.seen);
    return code;
}

quarry_code doc_load(doc_set *set, quarry_error *error)
{
    for (int i = 0; i < set->n_documents; i++) {
        quarry_error why;
        doc_document *d = &set->documents[i];
        if (d->text) continue;
        if (!(d->text = file_read_all(d->path, &d->n_bytes, &why)))
            return why.code == QUARRY_ERROR_MEMORY
                       ? error_set(error, why.code, "%s", why.message)
                       : error_set(error, why.code, "%s: line %lld: %s", set->path, (long long)d->line, why.message);
        if (is_blank(d->text, d->n_bytes))
            return error_set(error, QUARRY_ERROR_FORMAT, "%s: line %lld: %s is empty", set->path, (long long)d->line, d->path);
    }
    return QUARRY_OK;
}

void doc_set_free(doc_set *set)
{
    for (int i = 0; i < set->n_documents; i++) {
        memory_free(set->documents[i].path);
        memory_free(set->documents[i].text);
    }
    for (int i = 0; i < set->n_questions; i++) {
        for (int k = 0; k < set->questions[i].n_answers; k++) memory_free(set->questions[i].answers[k]);
        memory_free(set->questions[i].answers);
        memory_free(set->questions[i].question);
    }
    memory_free(set->path);
    memory_free(set->documents);
    memory_free(set->questions);
    *set = (doc_set){0};
}
