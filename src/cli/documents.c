#include "cli/documents.h"

#include <stdio.h>
#include <string.h>

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

bool cli_is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strchr(" \t\r\n\v\f", text[i]) || !text[i]) return false;
    return true;
}

void cli_documents_free(quarry_document *documents, int n)
{
    for (int i = 0; documents && i < n; i++) memory_free((void *)documents[i].text);
    memory_free(documents);
}

int cli_documents_read(quarry_document **documents, const cli_list *paths, const cli_command *command)
{
    *documents = memory_zero((size_t)paths->n, sizeof **documents, "documents", NULL);
    if (!*documents) return cli_fail("out of memory");
    bool stdin_read = false;
    for (int i = 0; i < paths->n; i++) {
        quarry_document *d = &(*documents)[i];
        const char *path = paths->items[i];
        bool is_stdin = !strcmp(path, "-");
        if (is_stdin && stdin_read) return cli_fail_usage(command, "--doc -: standard input can be read once");
        stdin_read = stdin_read || is_stdin;
        char *text;
        int code = cli_read_file(&text, &d->n_bytes, path);
        if (code) return code;
        d->text = text;
        d->name = is_stdin ? "standard input" : base_name(path);
        if (cli_is_blank(text, d->n_bytes)) return cli_fail("%s: the document is empty", is_stdin ? "standard input" : path);
    }
    return CLI_OK;
}

char *cli_documents_names(const quarry_document *documents, int n)
{
    size_t size = 1, at = 0;
    for (int i = 0; i < n; i++) size += strlen(documents[i].name) + 1;
    char *names = memory_alloc(size, 1, "documents", NULL);
    for (int i = 0; names && i < n; i++) at += (size_t)snprintf(names + at, size - at, "%s%s", i ? "\n" : "", documents[i].name);
    return names;
}
