#include <malloc.h>
#include <stdio.h>
#include <string.h>

#include "cli/cli.h"

static const cli_command *const commands[] = {
    &command_ask,
    &command_run,
    &command_info,
    &command_tokenize,
    &command_bench,
    &command_context_create,
    &command_context_list,
    &command_context_info,
    &command_context_verify,
    &command_context_rm,
    &command_context_export,
    &command_eval_kld,
    &command_eval_needle,
    &command_eval_ruler,
    &command_eval_doc,
    &command_eval_ppl,
    &command_eval_report,
    &command_calibrate,
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static bool is_help(const char *word)
{
    return !strcmp(word, "-h") || !strcmp(word, "--help");
}

/* The second word of a command of a family ("eval"), else NULL. */
static const char *member_of(const cli_command *command, const char *family)
{
    const size_t n = strlen(family);
    return !strncmp(command->name, family, n) && command->name[n] == ' ' ? command->name + n + 1 : NULL;
}

/* family NULL: of all commands */
static void print_help(const char *family)
{
    cli_print("quarry %s: ask long documents; attention searches the context instead of reading it all\n\n", quarry_version());
    cli_print("Usage: quarry %s%s [options]\n\n", family ? family : "COMMAND", family ? " TASK" : "");
    for (int i = 0; i < N_COMMANDS; i++)
        if (!family || member_of(commands[i], family)) cli_print("  %-16s %s\n", commands[i]->name, commands[i]->summary);
    cli_print("\n  %-16s %s\n", "-h, --help", "this help; 'quarry COMMAND --help' for a command's options");
    if (!family) cli_print("  %-16s %s\n", "--version", "the version of program and library");
}

/* The command named by argv[0], or by argv[0] and argv[1]; *n_words tells which. */
static const cli_command *find_command(int argc, char **argv, int *n_words)
{
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *name = commands[i]->name, *member = member_of(commands[i], argv[0]);
        *n_words = member ? 2 : 1;
        if (!strcmp(name, argv[0]) || (member && argc > 1 && !strcmp(member, argv[1]))) return commands[i];
    }
    return NULL;
}

/* "eval" alone, "eval --help" or "eval klt": what the family of commands has to say, as an exit code; -1 if there is no such family. */
static int run_family(int argc, char **argv)
{
    const cli_command family = {.name = argv[0]};
    char list[256] = "";
    const char *nearest = NULL, *words[N_COMMANDS];
    int n_words = 0;
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *member = member_of(commands[i], argv[0]);
        const size_t used = strlen(list);
        if (!member) continue;
        snprintf(list + used, sizeof list - used, "%s%s", n_words ? ", " : "", member);
        words[n_words++] = member;
    }
    if (!n_words) return -1;
    if (argc > 1 && is_help(argv[1])) {
        print_help(argv[0]);
        return CLI_OK;
    }
    if (argc > 1) nearest = cli_nearest(argv[1], words, n_words);
    if (nearest)
        return cli_fail_usage(&family, "unknown command '%s %s'; did you mean 'quarry %s %s'?", argv[0], argv[1], argv[0], nearest);
    return cli_fail_usage(&family, "'quarry %s' is followed by one of: %s", argv[0], list);
}

/* Looks for a word as it is, for one that is a family's second ("kld"), and for two. */
static int unknown_command(int argc, char **argv)
{
    const char *words[2 * N_COMMANDS + 2], *meant[2 * N_COMMANDS + 2] = {"--help", "--version"};
    char both[64];
    int n = 2, i = 0;
    memcpy(words, meant, 2 * sizeof *words);
    for (int c = 0; c < N_COMMANDS; c++) {
        const char *name = commands[c]->name, *space = strchr(name, ' ');
        words[n] = meant[n] = name;
        n++;
        if (!space) continue;
        words[n] = space + 1;
        meant[n++] = name;
    }
    const char *nearest = cli_nearest(argv[0], words, n);
    if (!nearest && argc > 1) {
        snprintf(both, sizeof both, "%s %s", argv[0], argv[1]);
        nearest = cli_nearest(both, words, n);
    }
    if (!nearest) return cli_fail_usage(NULL, "unknown command '%s'", argv[0]);
    while (words[i] != nearest) i++;
    return cli_fail_usage(NULL, "unknown command '%s'; did you mean 'quarry %s'?", argv[0], meant[i]);
}

static int run(int argc, char **argv)
{
    if (argc < 2) return cli_fail_usage(NULL, "no command");
    argc--;
    argv++;
    if (is_help(argv[0])) {
        print_help(NULL);
        return CLI_OK;
    }
    if (!strcmp(argv[0], "--version")) {
        cli_print("quarry %s\n", quarry_version());
        return CLI_OK;
    }
    int n_words;
    const cli_command *command = find_command(argc, argv, &n_words);
    if (command) return cli_command_main(command, argc - n_words, argv + n_words);
    const int code = run_family(argc, argv);
    return code < 0 ? unknown_command(argc, argv) : code;
}

int main(int argc, char **argv)
{
    /* What is freed goes back to the system: left alone, glibc would, after the first large block, keep all up to that size. One arena: threads allocate next to
     * nothing, and an arena of each would reserve 64 MiB of address space. */
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_ARENA_MAX, 1);
    cli_interrupt_install();
    int code = run(argc, argv);
    int output = cli_output_end();
    return code ? code : output;
}
