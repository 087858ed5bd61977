/* What the commands `quarry eval TASK` share: texts and policies from the command line, and how both are printed. */
#ifndef CLI_EVAL_COMMON_H
#define CLI_EVAL_COMMON_H

#include "cli/cli.h"
#include "cli/json.h"
#include "eval/eval.h"

typedef struct eval_options {
    cli_list files, attn;
    int64_t n_batch;
} eval_options;

extern const cli_option eval_options_table[];

/* What a task needs: an open model, its texts as tokens, the policies. */
typedef struct eval_input {
    quarry_model *model;
    quarry_model_info info;
    policy_list policies;
    eval_text *texts;
    int n_texts;
} eval_input;

/* Opens the model, reads the texts of -f and of the arguments, and lists the policies (default: the default policy). An exit code; eval_input_close also after a
 * failure. */
int eval_input_open(eval_input *in, const cli_model_options *model, const eval_options *options, const cli_output_options *output,
                    const cli_list *arguments, const cli_command *command);
void eval_input_close(eval_input *in);

json_t *eval_json_reading(const eval_reading *r);
json_t *eval_json_summary(const metric_summary *s);

/* Columns that the longest policy spec takes in a table. */
int eval_attn_width(const policy_list *policies);
void eval_print_model(const eval_input *in);

#endif
