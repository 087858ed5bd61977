#include <stdio.h>
#include <string.h>

#include "cli/cli.h"

typedef struct line {
    char *text;
    size_t n;
    bool failed;
} line;

static void line_add(line *l, const char *text, size_t n)
{
    if (l->failed || memory_grow(&l->text, l->n + n + 1, 1, "command line", NULL) != QUARRY_OK) {
        l->failed = true;
        return;
    }
    memcpy(l->text + l->n, text, n);
    l->n += n;
    l->text[l->n] = '\0';
}

/* A word as a shell reads it back. */
static void line_add_word(line *l, const char *word)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=:,./%@";
    line_add(l, " ", l->n > 0);
    if (*word && word[strspn(word, plain)] == '\0') {
        line_add(l, word, strlen(word));
        return;
    }
    line_add(l, "'", 1);
    for (; *word; word++) line_add(l, *word == '\'' ? "'\\''" : word, *word == '\'' ? 4 : 1);
    line_add(l, "'", 1);
}

static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static void line_add_flag(line *l, const cli_option *o, const char *value)
{
    const char *comma = strstr(o->flags, ", ");
    char flag[64];
    snprintf(flag, sizeof flag, "%.*s", comma ? (int)(comma - o->flags) : (int)strlen(o->flags), o->flags);
    line_add_word(l, flag);
    if (value) line_add_word(l, o->argument && !strcmp(o->argument, "FILE") ? file_name(value) : value);
}

static void line_add_option(line *l, const cli_option *o, const void *field)
{
    char value[64] = "";
    const char *text = value;
    switch (o->kind) {
    case CLI_SWITCH:
        if (*(const bool *)field) line_add_flag(l, o, NULL);
        return;
    case CLI_LIST:
        for (int i = 0; i < ((const cli_list *)field)->n; i++) line_add_flag(l, o, ((const cli_list *)field)->items[i]);
        return;
    case CLI_TEXT: text = *(const char *const *)field; break;
    case CLI_NUMBER: snprintf(value, sizeof value, "%.15g", *(const double *)field); break;
    default: snprintf(value, sizeof value, "%lld", (long long)*(const int64_t *)field);
    }
    if (text && strcmp(text, o->initial ? o->initial : "") != 0) line_add_flag(l, o, text);
}

static bool changes_no_result(const cli_group *group, const cli_option *o)
{
    return group->options == cli_output_table || !strcmp(o->flags, "--journal") || !strcmp(o->flags, "-t, --threads") ||
           !strcmp(o->flags, "--no-mmap") || !strcmp(o->flags, "--mlock");
}

char *cli_command_line(const cli_command *command, const void *settings, const cli_list *arguments)
{
    line l = {0};
    char name[64];
    snprintf(name, sizeof name, "quarry %s", command->name);
    line_add(&l, name, strlen(name));
    for (const cli_group *g = command->groups; g->title; g++)
        for (const cli_option *o = g->options; o->flags; o++)
            if (!changes_no_result(g, o)) line_add_option(&l, o, (const char *)settings + g->offset + o->offset);
    for (int i = 0; i < arguments->n; i++) line_add_word(&l, file_name(arguments->items[i]));
    if (!l.failed) return l.text;
    memory_free(l.text);
    return NULL;
}
