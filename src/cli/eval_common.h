/* What the commands `quarry eval TASK` share: texts and policies from the command line, the frame of a measurement, and how results are printed. */
#ifndef CLI_EVAL_COMMON_H
#define CLI_EVAL_COMMON_H

#include "cli/cli.h"
#include "cli/json.h"
#include "eval/eval.h"

typedef struct eval_options {
    cli_list files, attn;
    int64_t n_batch, read_window;
    bool extend;
} eval_options;

extern const cli_option eval_way_table[];     /* of the commands that can read otherwise than with full attention */
extern const cli_option eval_options_table[]; /* the first is -f: commands with another kind of file begin after it */

/* The settings of every evaluation begin with this. */
typedef struct eval_settings {
    cli_model_options model;
    eval_options input;
    cli_output_options output;
    const char *journal;
} eval_settings;

/* What a task needs: an open model, its texts as tokens, the policies; and where its results go. */
typedef struct eval_input {
    quarry_model *model;
    quarry_model_info info;
    policy_list policies;
    const char *const *attn; /* [n_attn] of the policies: all, or those after the first, which is then the reference */
    int n_attn;
    eval_text *texts;
    int n_texts;
    char (*digests)[DIGEST_CHARS]; /* [n_texts] of the files' bytes */
    bool keep_bytes;               /* set by those that need the texts as they are, too: */
    char *bytes;                   /* [n_bytes] one after the other, each with a newline after it */
    size_t n_bytes;
    json_t *envelope; /* what --json prints, and the header of the journal; NULL if neither is asked for */
    journal *journal; /* NULL if not asked for */
} eval_input;

/* Opens the model, reads the texts of -f and of the arguments, and lists the policies (default: the default policy). in is zero but for keep_bytes. An exit code; eval_input_close
 * also after a failure. */
int eval_input_open(eval_input *in, const eval_settings *settings, const cli_list *arguments, const cli_command *command);
void eval_input_close(eval_input *in);
/* Its parts, for commands with another kind of file: the model, the policies and room for n_texts, then one text after the other. Exit codes. */
int eval_input_begin(eval_input *in, const eval_settings *settings, int n_texts);
int eval_input_add(eval_input *in, const char *path, const char *text, size_t n_bytes);

/* How documents are read. A reference that reads them with full attention cannot read more than the model was trained for: beyond it the first policy is the reference.
 * longest: tokens. */
eval_way eval_input_way(eval_input *in, const eval_options *options, int64_t longest);

/* Fills in->envelope and opens in->journal, if they are asked for: what every evaluation prints with --json, less "results" (docs/eval.md), is the header of its journal as well.
 * Takes over parameters. seed < 0: nothing is drawn. An exit code. */
int eval_input_record(eval_input *in, const cli_command *command, const eval_settings *settings, const cli_list *arguments, int64_t seed,
                      json_t *parameters);
/* The policies, and how documents are read, for parameters. */
json_t *eval_json_policies(const eval_input *in);
void eval_json_way(json_t *parameters, const eval_options *options);

/* Around a measurement: progress and interrupts. The end returns an exit code, after a message if measured is not QUARRY_OK. */
quarry_watch eval_measure_begin(cli_progress *progress, const eval_settings *settings);
int eval_measure_end(cli_progress *progress, quarry_code measured, const quarry_error *error);

/* The envelope with its results, a list that is taken over. An exit code. */
int eval_print_json(eval_input *in, json_t *results);

/* A number, or null for NAN. */
json_t *eval_json_number(double value);
json_t *eval_json_reading(const eval_reading *r);
json_t *eval_json_summary(const metric_summary *s);
json_t *eval_json_mean(const kld_summary *s);
json_t *eval_json_score(const score_result *r);

/* The error of a mean as it is best known. */
double eval_best_error(const kld_summary *s);

/* Columns that the longest policy spec takes in a table. */
int eval_attn_width(const policy_list *policies);
void eval_print_model(const eval_input *in);

#endif
