#include "eval/journal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

struct journal {
    char *path;
    int fd;
    json_t *records; /* key: record */
};

enum { JOURNAL_VERSION = 1 };

static quarry_code fail_io(const journal *j, const char *what, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_IO, "%s: %s: %s", j->path, what, strerror(errno));
}

static quarry_code write_all(const journal *j, const char *data, size_t n, quarry_error *error)
{
    for (size_t done = 0; done < n;) {
        const ssize_t wrote = write(j->fd, data + done, n - done);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return fail_io(j, "cannot write", error);
        done += (size_t)wrote;
    }
    return fsync(j->fd) ? fail_io(j, "cannot write", error) : QUARRY_OK;
}

/* Takes over the reference to line. */
static quarry_code write_line(const journal *j, json_t *line, quarry_error *error)
{
    char *text = line ? json_dumps(line, JSON_COMPACT | JSON_SORT_KEYS) : NULL;
    json_decref(line);
    if (!text) return error_memory(error, "journal line", 0);
    const size_t n = strlen(text);
    text[n] = '\n'; /* in the place of its NUL: one write per line */
    const quarry_code code = write_all(j, text, n + 1, error);
    free(text);
    return code;
}

/* The first member that differs between what the file says and what is asked for, or NULL. */
static const char *first_difference(const json_t *in_file, const json_t *wanted)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)wanted, key, value) if (!json_equal(value, json_object_get(in_file, key))) return key;
    json_object_foreach((json_t *)in_file, key, value) if (!json_object_get(wanted, key)) return key;
    return NULL;
}

static quarry_code check_header(const journal *j, const json_t *line, const json_t *wanted, quarry_error *error)
{
    const json_t *header = json_object_get(line, "header");
    if (!json_is_object(header)) return error_set(error, QUARRY_ERROR_FORMAT, "%s: line 1 is not the header of a journal", j->path);
    if (json_integer_value(json_object_get(line, "quarry_journal")) != JOURNAL_VERSION)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: a journal of another version; name a new file", j->path);
    const char *key = first_difference(header, wanted);
    if (!key) return QUARRY_OK;
    char *was = json_dumps(json_object_get(header, key), JSON_ENCODE_ANY | JSON_COMPACT | JSON_SORT_KEYS);
    char *is = json_dumps(json_object_get(wanted, key), JSON_ENCODE_ANY | JSON_COMPACT | JSON_SORT_KEYS);
    error_set(error, QUARRY_ERROR_ARGUMENT, "%s: is the journal of another measurement: %s is %.100s there, %.100s here; name a new file",
              j->path, key, was ? was : "absent", is ? is : "absent");
    free(was);
    free(is);
    return QUARRY_ERROR_ARGUMENT;
}

static quarry_code take_line(journal *j, int64_t number, const char *text, size_t n, const json_t *wanted, quarry_error *error)
{
    json_error_t why;
    quarry_code code = QUARRY_OK;
    json_t *line = json_loadb(text, n, JSON_REJECT_DUPLICATES, &why);
    json_t *record = json_object_get(line, "record");
    const char *key = json_string_value(json_object_get(line, "key"));
    if (number == 1)
        code = check_header(j, line, wanted, error);
    else if (!key || !json_is_object(record))
        code = error_set(error, QUARRY_ERROR_FORMAT, "%s: line %lld is not a record of a journal; remove the line or the file", j->path,
                         (long long)number);
    else if (json_object_set(j->records, key, record))
        code = error_memory(error, "journal", n);
    json_decref(line);
    return code;
}

/* What is in the file already; *end: where its last whole line ends. */
static quarry_code read_lines(journal *j, const json_t *wanted, off_t *end, quarry_error *error)
{
    size_t n_bytes;
    int64_t number = 0;
    quarry_code code = QUARRY_OK;
    char *text = file_read_all(j->path, &n_bytes, error);
    *end = 0;
    if (!text) return error ? error->code : QUARRY_ERROR_IO;
    for (const char *line = text; code == QUARRY_OK; line = text + *end) {
        const char *newline = memchr(line, '\n', n_bytes - (size_t)*end);
        if (!newline) break;
        code = take_line(j, ++number, line, (size_t)(newline - line), wanted, error);
        *end = newline + 1 - text;
    }
    static const char beginning[] = "{\"header\":"; /* as keys are sorted */
    const size_t n_beginning = n_bytes < sizeof beginning - 1 ? n_bytes : sizeof beginning - 1;
    if (code == QUARRY_OK && number == 0 && memcmp(text, beginning, n_beginning) != 0)
        code = error_set(error, QUARRY_ERROR_FORMAT, "%s: is not a journal, and is left alone", j->path);
    memory_free(text);
    return code;
}

static quarry_code journal_start(journal *j, const json_t *header, quarry_error *error)
{
    off_t end;
    if ((j->fd = open(j->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) < 0) return fail_io(j, "cannot open", error);
    if (flock(j->fd, LOCK_EX | LOCK_NB))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: another process is writing this journal", j->path);
    const quarry_code code = read_lines(j, header, &end, error);
    if (code != QUARRY_OK) return code;
    if (ftruncate(j->fd, end)) return fail_io(j, "cannot shorten", error);
    if (end > 0) return QUARRY_OK;
    return write_line(j, json_pack("{s:i, s:O}", "quarry_journal", JOURNAL_VERSION, "header", header), error);
}

journal *journal_open(const char *path, const json_t *header, quarry_error *error)
{
    journal *j = memory_zero(1, sizeof *j, "journal", error);
    if (!j) return NULL;
    j->fd = -1;
    j->path = memory_string(path, strlen(path), error);
    if (j->path && !(j->records = json_object())) error_memory(error, "journal", sizeof *j);
    if (!j->path || !j->records || journal_start(j, header, error) != QUARRY_OK) {
        journal_close(j);
        return NULL;
    }
    return j;
}

void journal_close(journal *j)
{
    if (!j) return;
    if (j->fd >= 0) close(j->fd);
    json_decref(j->records);
    memory_free(j->path);
    memory_free(j);
}

const json_t *journal_find(const journal *j, const char *key)
{
    return j ? json_object_get(j->records, key) : NULL;
}

quarry_code journal_add(journal *j, const char *key, json_t *record, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    if (!record) return error_memory(error, "journal record", 0);
    if (j) code = write_line(j, json_pack("{s:s, s:O}", "key", key, "record", record), error);
    if (j && code == QUARRY_OK && json_object_set(j->records, key, record)) code = error_memory(error, "journal", 0);
    json_decref(record);
    return code;
}

int64_t journal_count(const journal *j)
{
    return j ? (int64_t)json_object_size(j->records) : 0;
}
