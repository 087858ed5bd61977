#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "cli/cli.h"

enum { HELP_COLUMN = 32, NEAREST_LENGTH = 40, NEAREST_FLAGS = 128 };

/* ---- the nearest word ---- */

/* Edits (insert, delete, replace, swap neighbours) between two words. Long words count as far. */
static int edit_distance(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    if (n > NEAREST_LENGTH || m > NEAREST_LENGTH) return NEAREST_LENGTH;
    int rows[3][NEAREST_LENGTH + 1], *before = rows[0], *above = rows[1], *row = rows[2];
    for (size_t j = 0; j <= m; j++) above[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best) best = above[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before[j - 2] + 1 < best) best = before[j - 2] + 1;
            row[j] = best;
        }
        int *spare = before;
        before = above;
        above = row;
        row = spare;
    }
    return above[m];
}

const char *cli_nearest(const char *word, const char *const *words, int n)
{
    const char *nearest = NULL;
    int best = 1 + ((int)strnlen(word, NEAREST_LENGTH) + 1) / 3;
    for (int i = 0; i < n; i++) {
        int distance = edit_distance(word, words[i]);
        if (distance < best) {
            best = distance;
            nearest = words[i];
        }
    }
    return nearest;
}

/* ---- parsing ---- */

/* Calls visit for each spelling in "-m, --model" until it returns true. */
static bool flags_visit(const char *flags, bool (*visit)(const char *flag, size_t n, void *data), void *data)
{
    while (*flags) {
        size_t n = strcspn(flags, ",");
        if (visit(flags, n, data)) return true;
        flags += n;
        flags += strspn(flags, ", ");
    }
    return false;
}

typedef struct wanted_flag {
    const char *text;
    size_t n;
} wanted_flag;

static bool flag_matches(const char *flag, size_t n, void *data)
{
    const wanted_flag *w = data;
    return n == w->n && !memcmp(flag, w->text, n);
}

static const cli_option *find_option(const cli_command *command, const char *text, size_t n, const cli_group **group)
{
    wanted_flag wanted = {text, n};
    for (*group = command->groups; (*group)->title; (*group)++)
        for (const cli_option *o = (*group)->options; o->flags; o++)
            if (flags_visit(o->flags, flag_matches, &wanted)) return o;
    return NULL;
}

typedef struct flag_copies {
    char text[NEAREST_FLAGS][NEAREST_LENGTH];
    const char *words[NEAREST_FLAGS];
    int n;
} flag_copies;

static bool flag_copy(const char *flag, size_t n, void *data)
{
    flag_copies *c = data;
    if (c->n == NEAREST_FLAGS) return true;
    snprintf(c->text[c->n], NEAREST_LENGTH, "%.*s", (int)n, flag);
    c->words[c->n] = c->text[c->n];
    c->n++;
    return false;
}

static int unknown_flag(const cli_command *command, const char *text, size_t n)
{
    flag_copies copies = {0};
    char word[NEAREST_LENGTH];
    for (const cli_group *g = command->groups; g->title; g++)
        for (const cli_option *o = g->options; o->flags; o++) flags_visit(o->flags, flag_copy, &copies);
    flag_copy("--help", 6, &copies);
    snprintf(word, sizeof word, "%.*s", (int)n, text);
    const char *nearest = n > 2 ? cli_nearest(word, copies.words, copies.n) : NULL; /* any letter is near any other */
    if (nearest) return cli_fail_usage(command, "unknown option '%.*s'; did you mean '%s'?", (int)n, text, nearest);
    return cli_fail_usage(command, "unknown option '%.*s'", (int)n, text);
}

static bool list_push(cli_list *list, const char *item)
{
    if (memory_grow(&list->items, (size_t)list->n + 1, sizeof *list->items, "arguments", NULL)) return false;
    list->items[list->n++] = item;
    return true;
}

/* Stores one value; flag is as the user wrote it. */
static int store_value(const cli_command *command, const cli_option *o, void *field, const char *flag, const char *value)
{
    char *end = NULL;
    double number = 0;
    errno = 0;
    switch (o->kind) {
    case CLI_SWITCH: *(bool *)field = true; return CLI_OK;
    case CLI_TEXT:
    case CLI_MAYBE: *(const char **)field = value; return CLI_OK;
    case CLI_LIST: return list_push(field, value) ? CLI_OK : cli_fail("out of memory");
    case CLI_INT:
    case CLI_COUNT: {
        int64_t integer = strtoll(value, &end, 10);
        number = (double)integer;
        if (end == value || *end || errno) return cli_fail_usage(command, "%s: '%s' is not a whole number", flag, value);
        *(int64_t *)field = integer;
        break;
    }
    case CLI_NUMBER:
        number = strtod(value, &end);
        if (end == value || *end || !isfinite(number)) return cli_fail_usage(command, "%s: '%s' is not a number", flag, value);
        *(double *)field = number;
        break;
    case CLI_BYTES: {
        static const char units[] = "KMGT";
        number = strtod(value, &end);
        const char *unit = end > value && *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
        for (const char *u = units; unit && u <= unit; u++) number *= 1024;
        if (end == value || !isfinite(number) || (*end && (!unit || end[1] || !*unit)))
            return cli_fail_usage(command, "%s: '%s' is not a size, as 512M or 2G", flag, value);
        if (number >= o->min && number <= o->max) *(int64_t *)field = (int64_t)number;
        break;
    }
    }
    bool ranged = o->min != 0 || o->max != 0;
    if (ranged && (number < o->min || number > o->max))
        return cli_fail_usage(command, "%s: %s is outside %.15g to %.15g", flag, value, o->min, o->max);
    return CLI_OK;
}

static void *field_of(void *settings, const cli_group *group, const cli_option *o)
{
    return (char *)settings + group->offset + o->offset;
}

static int set_defaults(const cli_command *command, void *settings)
{
    for (const cli_group *g = command->groups; g->title; g++)
        for (const cli_option *o = g->options; o->flags; o++) {
            if (!o->initial) continue;
            int code = store_value(command, o, field_of(settings, g, o), o->flags, o->initial);
            if (code) return code;
        }
    return CLI_OK;
}

/* One flag at argv[*i], with its value if it takes one; *i moves to the last word used. */
static int parse_flag(const cli_command *command, void *settings, int n, char **argv, int *i)
{
    const char *word = argv[*i], *value = NULL;
    const char *equals = strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    const cli_group *group;
    const cli_option *o = find_option(command, word, length, &group);
    if (!o) return unknown_flag(command, word, length);
    char flag[NEAREST_LENGTH];
    snprintf(flag, sizeof flag, "%.*s", (int)length, word);
    if (o->kind == CLI_SWITCH) {
        if (equals) return cli_fail_usage(command, "%s takes no value", flag);
    } else if (equals) {
        value = equals + 1;
    } else if (o->kind == CLI_COUNT) {
        *(int64_t *)field_of(settings, group, o) = -1;
        return CLI_OK;
    } else if (o->kind == CLI_MAYBE && (*i + 1 == n || argv[*i + 1][0] == '-')) {
        value = "";
    } else if (*i + 1 < n) {
        value = argv[++*i];
    } else {
        return cli_fail_usage(command, "%s needs a value: %s %s", flag, flag, o->argument);
    }
    return store_value(command, o, field_of(settings, group, o), flag, value);
}

static int parse(const cli_command *command, void *settings, int n, char **argv, cli_list *arguments, bool *help)
{
    int code = set_defaults(command, settings);
    bool flags_end = false;
    for (int i = 0; i < n && !code; i++) {
        const char *word = argv[i];
        if (!flags_end && (!strcmp(word, "-h") || !strcmp(word, "--help"))) {
            *help = true;
            return CLI_OK;
        }
        if (!flags_end && !strcmp(word, "--"))
            flags_end = true;
        else if (!flags_end && word[0] == '-' && word[1])
            code = parse_flag(command, settings, n, argv, &i);
        else if (!list_push(arguments, word))
            code = cli_fail("out of memory");
    }
    return code;
}

static void free_lists(const cli_command *command, void *settings)
{
    for (const cli_group *g = command->groups; g->title; g++)
        for (const cli_option *o = g->options; o->flags; o++)
            if (o->kind == CLI_LIST) memory_free(((cli_list *)field_of(settings, g, o))->items);
}

int cli_command_main(const cli_command *command, int n, char **argv)
{
    cli_list arguments = {0};
    bool help = false;
    void *settings = memory_zero(1, command->settings_size, "settings", NULL);
    if (!settings) return cli_fail("out of memory");
    int code = parse(command, settings, n, argv, &arguments, &help);
    if (!code) {
        if (help)
            cli_command_help(command);
        else
            code = command->run(settings, &arguments);
    }
    free_lists(command, settings);
    memory_free(arguments.items);
    memory_free(settings);
    return code;
}

/* ---- help ---- */

static int help_width(void)
{
    struct winsize size;
    if (isatty(STDOUT_FILENO) && !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col >= 60)
        return size.ws_col < 120 ? size.ws_col : 120;
    return 100;
}

/* Prints text with lines broken at spaces, continuing at the given column; the cursor stands at `at`. */
static void print_wrapped(const char *text, int at, int column, int width)
{
    while (*text) {
        int n_spaces = (int)strspn(text, " "), n = (int)strcspn(text + n_spaces, " \n");
        if (*text == '\n' || (at > column && at + n_spaces + n > width)) {
            text += *text == '\n' ? 1 : n_spaces;
            cli_print("\n");
            at = 0;
            continue;
        }
        if (at < column) {
            cli_print("%*s", column - at, "");
            at = column;
        } else if (at > column || !column) {
            cli_print("%*s", n_spaces, "");
            at += n_spaces;
        }
        cli_print("%.*s", n, text + n_spaces);
        at += n;
        text += n_spaces + n;
    }
    cli_print("\n");
}

static void print_option(const cli_option *o, int width)
{
    char left[128];
    int at =
        snprintf(left, sizeof left, "  %s%s%s", o->flags, o->argument && o->kind != CLI_COUNT ? " " : "", o->argument ? o->argument : "");
    cli_print("%s", left);
    if (at + 2 > HELP_COLUMN) {
        cli_print("\n");
        at = 0;
    }
    char help[512];
    if (o->initial)
        snprintf(help, sizeof help, "%s (default: %s)", o->help, o->initial);
    else
        snprintf(help, sizeof help, "%s", o->help);
    print_wrapped(help, at, HELP_COLUMN, width);
}

void cli_command_help(const cli_command *command)
{
    static const cli_option help_option = {"-h, --help", NULL, CLI_SWITCH, 0, NULL, "this help", 0, 0};
    int width = help_width();
    cli_print("quarry %s: %s\n\nUsage: quarry %s %s\n", command->name, command->summary, command->name, command->synopsis);
    for (const cli_group *g = command->groups; g->title; g++) {
        cli_print("\n%s:\n", g->title);
        for (const cli_option *o = g->options; o->flags; o++) print_option(o, width);
    }
    cli_print("\n");
    print_option(&help_option, width);
    if (command->details) {
        cli_print("\n");
        print_wrapped(command->details, 0, 0, width);
    }
}
