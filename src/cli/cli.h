/* cli: the program `quarry`, one file per command; parses flags and prints, no arithmetic.
 *
 * A command is a table (cli_command): its groups of options fill a settings struct, and the same table writes --help. To add one: write
 * src/cli/NAME.c that defines `const cli_command command_NAME`, declare it below, and list it in main.c.
 *
 *     typedef struct bench_settings {
 *         cli_model_options model;
 *         int64_t depth;
 *     } bench_settings;
 *     static const cli_option bench_options[] = {
 *         {"-d, --depth", "N", CLI_INT, offsetof(bench_settings, depth), "0", "tokens already in the cache", 0, 1e9},
 *         {0}};
 *     static const cli_group bench_groups[] = {
 *         {"Model", cli_model_table, offsetof(bench_settings, model)},
 *         {"Measurement", bench_options, 0},
 *         {0}};
 *     static int bench_run(const void *settings, const cli_list *arguments) { … return CLI_OK; }
 *     const cli_command command_bench = {"bench", "[options]", "measure speed", NULL, bench_groups, sizeof(bench_settings), bench_run};
 */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#include <stdarg.h>
#include <stddef.h>

#include "base/base.h"

/* Exit codes. */
enum { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2, CLI_INTERRUPTED = 130, CLI_PIPE_CLOSED = 141 };

/* ---- options.c: tables of options ---- */

/* Strings in the order given; they belong to argv. */
typedef struct cli_list {
    const char **items;
    int n;
} cli_list;

/* What a flag's field is. */
typedef enum cli_kind {
    CLI_SWITCH, /* bool, no argument */
    CLI_INT,    /* int64_t */
    CLI_COUNT,  /* int64_t, the value only after "=", its argument is "[=N]"; the flag alone gives -1 */
    CLI_NUMBER, /* double */
    CLI_BYTES,  /* int64_t, "512M": K, M, G and T are powers of 1,024 */
    CLI_TEXT,   /* const char *, belongs to argv; NULL when not given and no default */
    CLI_MAYBE,  /* the same, "" when no word follows that is not a flag; its argument is "[NAME]" */
    CLI_LIST,   /* cli_list, the flag may be repeated */
} cli_kind;

typedef struct cli_option {
    const char *flags;    /* spellings: "-m, --model" */
    const char *argument; /* "FILE"; NULL for a switch */
    cli_kind kind;
    size_t offset;       /* of the field in the group's struct */
    const char *initial; /* default as a user would write it, shown by --help; NULL: zero, NULL, empty */
    const char *help;    /* one sentence, wrapped by --help */
    double min, max;     /* numbers: allowed range, both 0: any */
} cli_option;            /* tables end with flags == NULL */

typedef struct cli_group {
    const char *title;
    const cli_option *options;
    size_t offset; /* of the group's struct in the command's settings */
} cli_group;       /* tables end with title == NULL */

typedef struct cli_command {
    const char *name;     /* one word, or two: "eval kld" */
    const char *synopsis; /* "[options] QUESTION" */
    const char *summary;  /* one line */
    const char *details;  /* paragraphs for the end of --help; may be NULL */
    const cli_group *groups;
    size_t settings_size;
    int (*run)(const void *settings, const cli_list *arguments); /* arguments: what is not a flag; returns an exit code */
} cli_command;

extern const cli_command command_ask, command_run, command_info, command_tokenize, command_eval_kld, command_eval_needle,
    command_eval_ruler, command_eval_doc, command_eval_ppl, command_eval_report, command_bench, command_calibrate, command_context_create,
    command_context_list, command_context_info, command_context_verify, command_context_rm, command_context_export;

/* Parses argv[n] (after the command's name) and runs the command; --help prints instead. -h/--help is understood by every command. */
int cli_command_main(const cli_command *command, int n, char **argv);
void cli_command_help(const cli_command *command);

/* The word of words[n] nearest to the given one by edits, or NULL if none is near enough to be meant. */
const char *cli_nearest(const char *word, const char *const *words, int n);

/* ---- command_line.c ---- */

/* A command with what in its settings is not as by default, as one could type it: files by their name without folders, nothing about threads, output or journals, for these
 * change no result. Free with memory_free; NULL out of memory. */
char *cli_command_line(const cli_command *command, const void *settings, const cli_list *arguments);

/* ---- common.c: options that commands share, and what they stand for ---- */

typedef struct cli_model_options {
    const char *path, *chat_template;
    int64_t n_threads;
    bool no_mmap, mlock;
} cli_model_options;

typedef struct cli_session_options {
    const char *attn;
    int64_t n_ctx, n_batch, read_window;
    int64_t kv_ram; /* of commands that read through the store: CLI_KV_RAM */
    bool extend, kv_f32;
} cli_session_options;

/* The option of a table whose struct has the cli_session_options at `offset`. */
#define CLI_KV_RAM(offset)                                                                                                                 \
    {                                                                                                                                      \
        "--kv-ram", "SIZE", CLI_BYTES, (offset) + offsetof(cli_session_options, kv_ram), "0",                                              \
            "memory that keys and values may take, as 512M or 2G: the others stay in the store's files, from which attention reads what "  \
            "it selects; 0: no bound",                                                                                                     \
            0, 1e15                                                                                                                        \
    }

typedef struct cli_store_options {
    const char *folder;
    double max_gb;
    bool off;
} cli_store_options;

typedef struct cli_sampling_options {
    int64_t n_predict, top_k, repeat_last_n, seed;
    double temperature, top_p, min_p, repeat_penalty;
    cli_list logit_bias, stop;
    bool ignore_eos;
} cli_sampling_options;

typedef struct cli_output_options {
    bool quiet, json, verbose;
} cli_output_options;

typedef struct cli_input_options {
    const char *prompt, *file;
} cli_input_options;

extern const cli_option cli_model_table[], cli_store_table[], cli_sampling_table[], cli_input_table[];
extern const cli_option cli_session_table[]; /* the first is --attn, which `info` has in another form */
extern const cli_option cli_output_table[];  /* the first is --json: commands that print no JSON begin after it */

/* These return an exit code, after printing what is wrong. */

/* Opens the model of -m or of the environment variable QUARRY_MODEL. output may be NULL, and store, which remembers the model's fingerprint. */
int cli_model_open(quarry_model **model, const cli_model_options *options, const cli_output_options *output, quarry_store *store);
const char *cli_model_path(const cli_model_options *options); /* that file; NULL if none is named */
quarry_session_params cli_session_params(const cli_session_options *options);
int cli_session_open(quarry_session **session, quarry_model *model, const cli_session_options *options);

quarry_store_params cli_store_params(const cli_store_options *options, const cli_output_options *output);
/* Opens the store, unless it is switched off; one that cannot be opened is said, and *store is NULL. */
void cli_store_open(quarry_store **store, const cli_store_options *options, const cli_output_options *output);

/* Sampling parameters and the memory they point to. */
typedef struct cli_sampling {
    quarry_sampling params;
    char **stop;
    int32_t *bias_tokens;
    float *bias_values;
} cli_sampling;
int cli_sampling_make(cli_sampling *sampling, const cli_sampling_options *options, const quarry_model *model);
void cli_sampling_free(cli_sampling *sampling); /* also after a failed make */

/* Reads a whole file, or standard input for "-" (an error when that is a terminal, for nobody would know it waits); free with memory_free. */
int cli_read_file(char **text, size_t *n_bytes, const char *path);

/* The text of -p, of -f, of the one argument, or of standard input: exactly one of the first three or none. */
int cli_read_input(char **text, size_t *n_bytes, const cli_input_options *options, const cli_list *arguments, const cli_command *command);

/* ---- terminal.c: messages, interrupts, progress, output ---- */

/* Prints "quarry: …" and returns CLI_FAILED. */
int cli_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
int cli_fail_interrupted(void); /* "interrupted", CLI_INTERRUPTED */
/* The same for a library error; CANCELLED is an interrupt. */
int cli_fail_error(const quarry_error *error);
/* Prints "quarry: …" and where help is; returns CLI_USAGE. command may be NULL. */
int cli_fail_usage(const cli_command *command, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Ctrl-C: at once "interrupted" and exit 130, except between cli_work_begin and cli_work_end, where the first only sets cli_interrupted and the
 * second kills. Work begins before calls that ask a callback. */
void cli_interrupt_install(void);
void cli_work_begin(void);
void cli_work_end(void);
bool cli_interrupted(void);

/* Progress of reading: a bar if stderr is a terminal, else a line now and then, nothing if quiet. Cancels the work when interrupted. */
typedef struct cli_progress {
    const char *label; /* "reading" */
    const char *unit;  /* NULL: tokens */
    bool quiet;
    bool shown;         /* a bar is on the screen */
    double start, last; /* seconds */
} cli_progress;
quarry_watch cli_progress_start(cli_progress *progress, const char *label, bool quiet);
void cli_progress_end(cli_progress *progress); /* takes the bar away */

/* Standard output. After the first failed write the rest is dropped, and cli_output_end tells: CLI_OK, CLI_FAILED (printed why), or CLI_PIPE_CLOSED (quietly). */
bool cli_write(const char *text, size_t n_bytes); /* false: writing failed, stop working */
bool cli_print(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool cli_flush(void);
int cli_output_end(void);

double cli_seconds(void); /* monotonic */
/* "14.6 MiB" */
const char *cli_bytes(double n_bytes, char buffer[32]);

#endif
