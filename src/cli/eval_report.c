#include "cli/cli.h"
#include "eval/eval.h"

typedef struct report_settings {
    const char *out;
} report_settings;

static const cli_option report_table[] = {
    {"-o, --output", "FILE", CLI_TEXT, offsetof(report_settings, out), "report.html", "the page to write", 0, 0}, {0}};

static const cli_group report_groups[] = {{"Output", report_table, 0}, {0}};

static int report_run(const void *settings, const cli_list *arguments)
{
    const report_settings *s = settings;
    quarry_error error;
    if (arguments->n == 0) return cli_fail_usage(&command_eval_report, "no results: name files that 'quarry eval ... --json' printed");
    if (report_write(arguments->items, arguments->n, s->out, &error) != QUARRY_OK) return cli_fail_error(&error);
    return CLI_OK;
}

const cli_command command_eval_report = {
    "eval report",
    "[options] FILE...",
    "make a page with plots of what evaluations printed",
    "Reads what eval kld, needle, ruler, doc and ppl printed with --json, and writes one HTML file with tables, plots and the origin of "
    "every figure. The "
    "page has no script and fetches nothing.",
    report_groups,
    sizeof(report_settings),
    report_run,
};
