#include <math.h>
#include <string.h>

#include "eval/report.h"

/* A number by its path "kld.mean" in a result; NAN if absent or null. */
static double number_at(const json_t *item, const char *path)
{
    char key[64];
    while (item) {
        const size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        item = json_object_get(item, key);
        if (!path[n]) break;
        path += n + 1;
    }
    return json_is_number(item) ? json_number_value(item) : NAN;
}

static const char *text_at(const json_t *item, const char *key)
{
    const char *text = json_string_value(json_object_get(item, key));
    return text ? text : "";
}

static json_t *results_of(const report_input *in)
{
    return json_object_get(in->envelope, "results");
}

/* FORMAT if a result of the task lacks one of the numbers. */
static quarry_code need_numbers(const report_input *in, const char *const *paths, int n_paths, quarry_error *error)
{
    size_t i;
    json_t *item;
    json_array_foreach(results_of(in), i, item)
    {
        if (!json_is_string(json_object_get(item, "attn")))
            return error_set(error, QUARRY_ERROR_FORMAT, "%s: result %zu has no \"attn\"", in->path, i);
        for (int p = 0; p < n_paths; p++)
            if (isnan(number_at(item, paths[p])))
                return error_set(error, QUARRY_ERROR_FORMAT, "%s: result %zu has no number \"%s\"", in->path, i, paths[p]);
    }
    return QUARRY_OK;
}

static bool is_task(const json_t *item, const char *task)
{
    return !task || !strcmp(text_at(item, "task"), task);
}

static bool any_of_task(const report_input *in, const char *task)
{
    size_t i;
    json_t *item;
    json_array_foreach(results_of(in), i, item) if (is_task(item, task)) return true;
    return false;
}

/* ---- plots ---- */

/* What a plot takes from a result. */
typedef struct plot_source {
    const char *task;         /* results with this "task"; NULL: all */
    const char *y, *y_of;     /* y, divided by y_of if not NULL */
    const char *low, *high;   /* of y, or NULL */
    const char *spread;       /* half the width instead, or NULL */
    const char *spread_other; /* in the place of a spread that is null */
} plot_source;

static plot_point make_point(const json_t *item, const plot_source *s)
{
    plot_point p = {.spec = text_at(item, "attn"), .x = number_at(item, "reading.bytes_share"), .y = number_at(item, s->y)};
    if (s->y_of) p.y /= number_at(item, s->y_of);
    p.low = p.high = p.y;
    if (!strcmp(p.spec, "full")) return p; /* the measure itself */
    if (s->spread) {
        double spread = number_at(item, s->spread);
        if (isnan(spread)) spread = number_at(item, s->spread_other);
        if (isfinite(spread)) p.low -= spread, p.high += spread;
    } else if (s->low && isfinite(number_at(item, s->low)) && isfinite(number_at(item, s->high))) {
        p.low = number_at(item, s->low);
        p.high = number_at(item, s->high);
    }
    return p;
}

static quarry_code write_plot(FILE *out, const report_input *in, const plot_source *s, const char *title, const char *y_label, bool log_y,
                              quarry_error *error)
{
    size_t i;
    json_t *item;
    plot p = {.title = title, .x_label = "bytes read per token, % of full attention's", .y_label = y_label, .log_y = log_y};
    p.points = memory_alloc(json_array_size(results_of(in)), sizeof *p.points, "points", error);
    if (!p.points) return QUARRY_ERROR_MEMORY;
    json_array_foreach(results_of(in), i, item) if (is_task(item, s->task)) p.points[p.n++] = make_point(item, s);
    const quarry_code code = plot_write(out, &p, error);
    memory_free(p.points);
    return code;
}

/* ---- tables ---- */

typedef struct column {
    const char *head, *path, *format;
    double scale;
} column;

static const column kld_columns[] = {
    {"mean KLD", "kld.mean", "%.5f", 1},
    {"s.e.", "kld.standard_error", "%.5f", 1},
    {"s.e. by sample", "kld.clustered_error", "%.5f", 1},
    {"99 %", "kld.p99", "%.4f", 1},
    {"max", "kld.max", "%.4f", 1},
    {"dNLL", "dnll.mean", "%.5f", 1},
    {"s.e.", "dnll.standard_error", "%.5f", 1},
    {"top-1 %", "top1_agreement", "%.2f", 100},
    {"perplexity", "perplexity", "%.3f", 1},
    {"kept", "kept", "%.0f", 1},
    {"of", "full_correct", "%.0f", 1},
    {"mass %", "mass", "%.2f", 100},
    {"recall %", "recall", "%.2f", 100},
    {"rows %", "reading.rows_share", "%.2f", 100},
    {"index %", "reading.index_share", "%.2f", 100},
    {"tables %", "reading.tables_share", "%.2f", 100},
    {"tail %", "reading.tail_share", "%.2f", 100},
    {"bytes %", "reading.bytes_share", "%.2f", 100},
};
static const column needle_columns[] = {
    {"correct", "correct", "%.0f", 1},
    {"kept", "kept", "%.0f", 1},
    {"of", "full_correct", "%.0f", 1},
    {"kept, from %", "kept_low", "%.1f", 100},
    {"to %", "kept_high", "%.1f", 100},
    {"mean KLD", "kld.mean", "%.5f", 1},
    {"s.e.", "kld.standard_error", "%.5f", 1},
    {"rows %", "reading.rows_share", "%.2f", 100},
    {"bytes %", "reading.bytes_share", "%.2f", 100},
};
static const column score_columns[] = {
    {"tokens", "length", "%.0f", 1},
    {"questions", "n", "%.0f", 1},
    {"score %", "score", "%.1f", 100},
    {"from %", "score_low", "%.1f", 100},
    {"to %", "score_high", "%.1f", 100},
    {"full attention %", "score_full", "%.1f", 100},
    {"rows %", "reading.rows_share", "%.2f", 100},
    {"bytes %", "reading.bytes_share", "%.2f", 100},
};
static const column ppl_columns[] = {
    {"perplexity", "perplexity", "%.4f", 1},
    {"NLL", "nll", "%.5f", 1},
    {"s.e.", "nll_error", "%.5f", 1},
    {"tokens", "n", "%.0f", 1},
    {"rows %", "reading.rows_share", "%.2f", 100},
    {"bytes %", "reading.bytes_share", "%.2f", 100},
};

enum { MOST_COLUMNS = 20, MOST_CELLS = 4096 };

/* Columns that no result has are left out. with_task: the task stands beside the policy. */
static void write_table(FILE *out, const report_input *in, const char *task, const char *caption, const column *columns, int n_columns,
                        bool with_task)
{
    const char *heads[MOST_COLUMNS + 2] = {"policy", "task"};
    const column *shown[MOST_COLUMNS];
    int n_shown = 0;
    const int first = with_task ? 2 : 1;
    size_t i;
    json_t *item;
    for (int c = 0; c < n_columns; c++) {
        bool has = false;
        json_array_foreach(results_of(in), i, item) has = has || (is_task(item, task) && isfinite(number_at(item, columns[c].path)));
        if (!has) continue;
        heads[first + n_shown] = columns[c].head;
        shown[n_shown++] = &columns[c];
    }
    html_table_begin(out, caption, heads, first + n_shown);
    json_array_foreach(results_of(in), i, item)
    {
        if (!is_task(item, task)) continue;
        html_row_begin(out, text_at(item, "attn"));
        if (with_task) html_cell(out, text_at(item, "task"));
        for (int c = 0; c < n_shown; c++) html_number(out, shown[c]->format, number_at(item, shown[c]->path), shown[c]->scale);
        html_row_end(out);
    }
    html_table_end(out);
}

#define COLUMNS(list) list, (int)(sizeof(list) / sizeof *(list))

/* ---- sections ---- */

static quarry_code write_kld(FILE *out, const report_input *in, quarry_error *error)
{
    static const char *const needed[] = {"kld.mean", "dnll.mean", "reading.bytes_share"};
    static const struct {
        const char *task, *title;
    } panels[] = {{"prose", "Prose: KL divergence to full attention"},
                  {"needle", "Digits of right answers: KL divergence to full attention"}};
    quarry_code code = need_numbers(in, needed, 3, error);
    fputs("<div class=\"panels\">\n", out);
    for (int i = 0; i < 2 && code == QUARRY_OK; i++)
        code = write_plot(
            out, in,
            &(plot_source){.task = panels[i].task, .y = "kld.mean", .spread = "kld.clustered_error", .spread_other = "kld.standard_error"},
            panels[i].title, "mean KLD, nats", true, error);
    if (code == QUARRY_OK && any_of_task(in, "needle"))
        code = write_plot(out, in,
                          &(plot_source){.task = "needle", .y = "kept", .y_of = "full_correct", .low = "kept_low", .high = "kept_high"},
                          "Right answers kept", "kept, % of full attention's", false, error);
    fputs("</div>\n", out);
    for (int i = 0; i < 2 && code == QUARRY_OK; i++)
        if (any_of_task(in, panels[i].task)) write_table(out, in, panels[i].task, panels[i].title, COLUMNS(kld_columns), false);
    return code;
}

/* "grid" of a result: [{"length", "depth", "asked", "correct"}] */
static quarry_code write_heat(FILE *out, const report_input *in, const json_t *item, quarry_error *error)
{
    const json_t *grid = json_object_get(item, "grid");
    const int n = (int)json_array_size(grid);
    if (json_array_size(grid) > MOST_CELLS)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: a grid has %zu cells, at most %d can be drawn", in->path, json_array_size(grid),
                         MOST_CELLS);
    heat_cell *cells = memory_alloc((size_t)n, sizeof *cells, "heat map", error);
    if (!cells) return QUARRY_ERROR_MEMORY;
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < n; i++) {
        const json_t *c = json_array_get(grid, (size_t)i);
        const double asked = number_at(c, "asked"), correct = number_at(c, "correct");
        cells[i] = (heat_cell){number_at(c, "length"), number_at(c, "depth"), (int64_t)fmin(asked, 1e15), (int64_t)fmin(correct, 1e15)};
        if (!(asked >= 0 && correct >= 0 && correct <= asked) || isnan(cells[i].length) || isnan(cells[i].depth)) {
            code = error_set(error, QUARRY_ERROR_FORMAT, "%s: cell %d of a grid is not {length, depth, asked, correct}", in->path, i);
            break;
        }
    }
    if (code == QUARRY_OK) code = heat_write(out, text_at(item, "attn"), cells, n, error);
    memory_free(cells);
    return code;
}

static quarry_code write_needle(FILE *out, const report_input *in, quarry_error *error)
{
    static const char *const needed[] = {"kept", "full_correct", "reading.bytes_share"};
    size_t i;
    json_t *item;
    quarry_code code = need_numbers(in, needed, 3, error);
    fputs("<div class=\"panels\">\n", out);
    if (code == QUARRY_OK)
        code = write_plot(out, in, &(plot_source){.y = "kept", .y_of = "full_correct", .low = "kept_low", .high = "kept_high"},
                          "Needles still found", "kept, % of full attention's", false, error);
    fputs("</div>\n<div class=\"panels\">\n", out);
    json_array_foreach(results_of(in), i, item) if (code == QUARRY_OK) code = write_heat(out, in, item, error);
    fputs("</div>\n", out);
    if (code == QUARRY_OK) write_table(out, in, NULL, "Needles", COLUMNS(needle_columns), false);
    return code;
}

/* eval ruler and eval doc: a score between 0 and 1. */
static quarry_code write_scores(FILE *out, const report_input *in, quarry_error *error)
{
    static const char *const needed[] = {"score"};
    quarry_code code = need_numbers(in, needed, 1, error);
    fputs("<div class=\"panels\">\n", out);
    if (code == QUARRY_OK)
        code = write_plot(
            out, in, &(plot_source){.task = any_of_task(in, "all") ? "all" : NULL, .y = "score", .low = "score_low", .high = "score_high"},
            "Score", "score, %", false, error);
    fputs("</div>\n", out);
    if (code == QUARRY_OK) write_table(out, in, NULL, "Scores, with 95 % intervals", COLUMNS(score_columns), true);
    return code;
}

static quarry_code write_ppl(FILE *out, const report_input *in, quarry_error *error)
{
    static const char *const needed[] = {"perplexity"};
    const quarry_code code = need_numbers(in, needed, 1, error);
    if (code == QUARRY_OK) write_table(out, in, NULL, "Perplexity", COLUMNS(ppl_columns), false);
    return code;
}

static const struct {
    const char *command, *title;
    quarry_code (*write)(FILE *out, const report_input *in, quarry_error *error);
} kinds[] = {
    {"eval kld", "Predictions beside full attention's", write_kld},
    {"eval needle", "Needles in a haystack", write_needle},
    {"eval ruler", "RULER", write_scores},
    {"eval doc", "Questions about documents", write_scores},
    {"eval ppl", "Perplexity", write_ppl},
};

quarry_code section_write(FILE *out, const report_input *in, quarry_error *error)
{
    const char *command = text_at(in->envelope, "command");
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        if (strcmp(command, kinds[i].command) != 0) continue;
        fputs("<section>\n<h2>", out);
        html_text(out, kinds[i].title);
        fputs("</h2>\n<p class=\"faint\">", out);
        html_text(out, text_at(json_object_get(in->envelope, "model"), "name"));
        fputs(" ", out);
        html_text(out, text_at(json_object_get(in->envelope, "model"), "quantization"));
        const double depth = number_at(in->envelope, "parameters.depth");
        if (isfinite(depth)) fprintf(out, ", %.0f tokens read before", depth);
        fputs("</p>\n", out);
        const quarry_code code = kinds[i].write(out, in, error);
        provenance_write(out, in);
        fputs("</section>\n", out);
        return code;
    }
    return error_set(error, QUARRY_ERROR_FORMAT, "%s: the output of '%.40s', of which there is no report", in->path, command);
}

static void write_term(FILE *out, const char *term, const char *text)
{
    if (!*text) return;
    fputs("<dt>", out);
    html_text(out, term);
    fputs("</dt><dd>", out);
    html_text(out, text);
    fputs("</dd>", out);
}

void provenance_write(FILE *out, const report_input *in)
{
    const json_t *model = json_object_get(in->envelope, "model"), *texts = json_object_get(in->envelope, "texts");
    size_t i;
    json_t *text;
    fputs("<h3>Where these figures come from</h3>\n<pre>", out);
    html_text(out, text_at(in->envelope, "line"));
    fputs("</pre>\n<dl>", out);
    write_term(out, "model", text_at(model, "file"));
    write_term(out, "SHA-256", text_at(model, "digest"));
    json_array_foreach(texts, i, text)
    {
        write_term(out, "text", text_at(text, "name"));
        write_term(out, "SHA-256", text_at(text, "digest"));
    }
    if (json_is_integer(json_object_get(in->envelope, "seed")))
        fprintf(out, "<dt>seed</dt><dd>%lld</dd>", (long long)json_integer_value(json_object_get(in->envelope, "seed")));
    write_term(out, "kernels", text_at(in->envelope, "isa"));
    write_term(out, "quarry", text_at(in->envelope, "version"));
    fputs("</dl>\n", out);
}
