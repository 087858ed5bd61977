/* Inside report: HTML and SVG written piece by piece to a stream, whose state is looked at once, at the end. */
#ifndef EVAL_REPORT_H
#define EVAL_REPORT_H

#include <stdio.h>

#include "eval/common.h"

/* ---- report_html.c ---- */

void html_begin(FILE *out, const char *title);
void html_end(FILE *out);
/* Text of the input, escaped for element content and quoted attributes. NULL is nothing. */
void html_text(FILE *out, const char *text);

/* A table, cell by cell; numbers that are not finite become a dash. */
void html_table_begin(FILE *out, const char *caption, const char *const *heads, int n_heads);
void html_row_begin(FILE *out, const char *head);
void html_cell(FILE *out, const char *text);
/* value times scale, printed by a printf format for one double. */
void html_number(FILE *out, const char *format, double value, double scale);
void html_row_end(FILE *out);
void html_table_end(FILE *out);

/* ---- report_plot.c ---- */

typedef struct plot_point {
    const char *spec; /* policy: points whose specs differ in the budget only make a curve */
    double x, y;
    double low, high; /* of y; equal to it when unknown */
} plot_point;

typedef struct plot {
    const char *title, *x_label, *y_label;
    bool log_y;         /* else 0 to 1, shown in per cent; x is a logarithmic share */
    plot_point *points; /* [n]; those that cannot be drawn (y 0 on a logarithmic axis) are left out */
    int n;
} plot;

/* A figure with its legend. Nothing when no point can be drawn. */
quarry_code plot_write(FILE *out, const plot *p, quarry_error *error);

/* ---- report_heat.c ---- */

typedef struct heat_cell {
    double length, depth; /* tokens; 0 to 1 */
    int64_t asked, correct;
} heat_cell;
quarry_code heat_write(FILE *out, const char *policy, const heat_cell *cells, int n, quarry_error *error);

/* ---- report_sections.c ---- */

/* One file of the report: path for messages, and its envelope, checked. */
typedef struct report_input {
    const char *path;
    json_t *envelope;
} report_input;

/* The section of one input; FORMAT names the file and what it lacks. */
quarry_code section_write(FILE *out, const report_input *in, quarry_error *error);
void provenance_write(FILE *out, const report_input *in);

#endif
