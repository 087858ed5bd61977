#include <stdio.h>
#include <string.h>

#include "cli/cli.h"

static const cli_command *const commands[] = {
    &command_ask,         &command_run,        &command_info,     &command_tokenize, &command_bench,       &command_eval_kld,
    &command_eval_needle, &command_eval_ruler, &command_eval_doc, &command_eval_ppl, &command_eval_report, &command_calibrate,
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void print_help(void)
{
    cli_print(
        "quarry %s: ask long documents; attention searches the context instead of reading it all\n\nUsage: quarry COMMAND [options]\n\n",
        quarry_version());
    for (int i = 0; i < N_COMMANDS; i++) cli_print("  %-14s %s\n", commands[i]->name, commands[i]->summary);
    cli_print("\n  %-14s %s\n  %-14s %s\n", "-h, --help", "this help; 'quarry COMMAND --help' for a command's options", "--version",
              "the version of program and library");
}

/* The command named by argv[0], or by argv[0] and argv[1]; *n_words tells which. */
static const cli_command *find_command(int argc, char **argv, int *n_words)
{
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *name = commands[i]->name;
        size_t n = strlen(argv[0]);
        *n_words = strchr(name, ' ') ? 2 : 1;
        if (*n_words == 1 && !strcmp(name, argv[0])) return commands[i];
        if (*n_words == 2 && argc > 1 && !strncmp(name, argv[0], n) && name[n] == ' ' && !strcmp(name + n + 1, argv[1])) return commands[i];
    }
    return NULL;
}

/* "eval" alone, or "eval klt": the commands of that family. Returns false if there is none. */
static bool list_family(int argc, char **argv)
{
    char family[256] = "";
    const char *nearest = NULL, *words[N_COMMANDS];
    int n_words = 0;
    size_t n = strlen(argv[0]);
    for (int i = 0; i < N_COMMANDS; i++) {
        const char *name = commands[i]->name;
        if (strncmp(name, argv[0], n) != 0 || name[n] != ' ') continue;
        size_t used = strlen(family);
        snprintf(family + used, sizeof family - used, "%s'quarry %s'", n_words ? " or " : "", name);
        words[n_words++] = name + n + 1;
    }
    if (!n_words) return false;
    if (argc > 1) nearest = cli_nearest(argv[1], words, n_words);
    if (nearest)
        cli_fail_usage(NULL, "unknown command '%s %s'; did you mean 'quarry %s %s'?", argv[0], argv[1], argv[0], nearest);
    else
        cli_fail_usage(NULL, "'%s' is a family of commands: %s", argv[0], family);
    return true;
}

static int unknown_command(int argc, char **argv)
{
    const char *words[N_COMMANDS + 2];
    int n = 0;
    for (; n < N_COMMANDS; n++) words[n] = commands[n]->name;
    words[n++] = "--help";
    words[n++] = "--version";
    if (list_family(argc, argv)) return CLI_USAGE;
    const char *nearest = cli_nearest(argv[0], words, n);
    if (nearest) return cli_fail_usage(NULL, "unknown command '%s'; did you mean 'quarry %s'?", argv[0], nearest);
    return cli_fail_usage(NULL, "unknown command '%s'", argv[0]);
}

static int run(int argc, char **argv)
{
    if (argc < 2) return cli_fail_usage(NULL, "no command");
    argc--;
    argv++;
    if (!strcmp(argv[0], "-h") || !strcmp(argv[0], "--help")) {
        print_help();
        return CLI_OK;
    }
    if (!strcmp(argv[0], "--version")) {
        cli_print("quarry %s\n", quarry_version());
        return CLI_OK;
    }
    int n_words;
    const cli_command *command = find_command(argc, argv, &n_words);
    if (!command) return unknown_command(argc, argv);
    return cli_command_main(command, argc - n_words, argv + n_words);
}

int main(int argc, char **argv)
{
    cli_interrupt_install();
    int code = run(argc, argv);
    int output = cli_output_end();
    return code ? code : output;
}
