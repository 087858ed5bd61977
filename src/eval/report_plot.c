/* Scatter plots with curves: bytes read on a logarithmic axis, what they buy on the other. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "eval/report.h"

enum { WIDTH = 520, HEIGHT = 380, LEFT = 66, RIGHT = 14, TOP = 14, BOTTOM = 50, N_COLOURS = 10, LABEL_BYTES = 64, LABEL_HEIGHT = 13 };

typedef struct box {
    double x0, y0, x1, y1;
} box;

/* A point as drawn. */
typedef struct dot {
    const plot_point *point;
    int curve;
    double x, y;
    char curve_name[LABEL_BYTES], budget[LABEL_BYTES]; /* the spec without its budget, and that */
} dot;

typedef struct frame {
    FILE *out;
    const plot *plot;
    double x0, x1, y0, y1; /* of the axes, logarithms where they are so */
    dot *dots;             /* [n], by curve and then x */
    int n, n_curves;
    box *taken; /* [n_taken], what labels must not cover */
    int n_taken;
} frame;

/* ---- curves ---- */

/* How much is read, whatever else a policy does. */
static bool is_budget(const char *option, size_t n)
{
    static const char *const keys[] = {"budget=", "mass=", "threshold="};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (n > strlen(keys[i]) && !strncmp(option, keys[i], strlen(keys[i]))) return true;
    return false;
}

/* "ivfpq:budget=0.03,tail=1" is the point "0.03" of the curve "ivfpq:tail=1". */
static void split_spec(const char *spec, dot *d)
{
    const char *option = strchr(spec, ':');
    char separator = ':';
    snprintf(d->curve_name, sizeof d->curve_name, "%.*s", option ? (int)(option - spec) : LABEL_BYTES - 1, spec);
    d->budget[0] = '\0';
    while (option && *option) {
        option++;
        const size_t n = strcspn(option, ",");
        char *to = is_budget(option, n) ? d->budget : d->curve_name;
        const size_t used = strlen(to);
        if (to == d->budget)
            snprintf(to + used, LABEL_BYTES - used, "%s%.*s", used ? " " : "", (int)n, option);
        else
            snprintf(to + used, LABEL_BYTES - used, "%c%.*s", separator, (int)n, option);
        if (to == d->curve_name) separator = ',';
        option += n;
    }
}

static int by_curve_and_x(const void *a, const void *b)
{
    const dot *x = a, *y = b;
    if (x->curve != y->curve) return x->curve - y->curve;
    return x->point->x < y->point->x ? -1 : x->point->x > y->point->x;
}

/* ---- axes ---- */

static double along_y(const frame *f, double y)
{
    return f->plot->log_y ? log10(y) : y;
}

static double place_x(const frame *f, double x)
{
    return LEFT + (log10(x) - f->x0) / (f->x1 - f->x0) * (WIDTH - LEFT - RIGHT);
}

static double place_y(const frame *f, double y)
{
    const double share = (along_y(f, y) - f->y0) / (f->y1 - f->y0);
    return HEIGHT - BOTTOM - fmin(fmax(share, 0), 1) * (HEIGHT - BOTTOM - TOP);
}

static void write_grid_x(const frame *f)
{
    static const double steps[] = {1, 2, 5};
    for (int e = -6; e <= 1; e++)
        for (int i = 0; i < 3; i++) {
            const double x = steps[i] * pow(10, e);
            if (log10(x) < f->x0 - 1e-9 || log10(x) > f->x1 + 1e-9) continue;
            fprintf(f->out,
                    "<path class=\"axis\" d=\"M%.1f %d V%d\"/><text class=\"tick\" x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%g</text>\n",
                    place_x(f, x), TOP, HEIGHT - BOTTOM, place_x(f, x), HEIGHT - BOTTOM + 18, x * 100);
        }
}

static void write_line_y(const frame *f, double y, double shown)
{
    fprintf(f->out, "<path class=\"axis\" d=\"M%d %.1f H%d\"/><text class=\"tick\" x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
            LEFT, place_y(f, y), WIDTH - RIGHT, LEFT - 6, place_y(f, y) + 4, shown);
}

/* Between lines of an axis of shares. */
static int percent_step(const frame *f)
{
    const double range = f->y1 - f->y0;
    return range > 0.5 ? 20 : range > 0.2 ? 10 : range > 0.1 ? 5 : 2;
}

static void write_axes(const frame *f)
{
    write_grid_x(f);
    if (f->plot->log_y)
        for (double e = ceil(f->y0 - 1e-9); e <= f->y1 + 1e-9; e++) write_line_y(f, pow(10, e), pow(10, e));
    else
        for (int percent = (int)lround(100 * f->y0); percent <= 100; percent += percent_step(f)) write_line_y(f, percent / 100.0, percent);
    fprintf(f->out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8);
    html_text(f->out, f->plot->x_label);
    fprintf(f->out, "</text><text transform=\"translate(13 %d) rotate(-90)\" text-anchor=\"middle\">", (TOP + HEIGHT - BOTTOM) / 2);
    html_text(f->out, f->plot->y_label);
    fputs("</text>\n", f->out);
}

/* Whole decades around the values of y, or the share from a round one on; halves of a decade around x. */
static void frame_axes(frame *f)
{
    f->x0 = f->y0 = INFINITY;
    f->x1 = f->y1 = -INFINITY;
    for (int i = 0; i < f->n; i++) {
        const plot_point *p = f->dots[i].point;
        f->x0 = fmin(f->x0, log10(p->x));
        f->x1 = fmax(f->x1, log10(p->x));
        f->y0 = fmin(f->y0, along_y(f, f->plot->log_y ? p->y : p->low));
        f->y1 = fmax(f->y1, along_y(f, p->y));
    }
    f->x0 = fmax(floor(f->x0 * 4 - 0.2) / 4, -6);
    f->x1 = fmin(fmax(ceil(f->x1 * 4 + 0.2) / 4, f->x0 + 0.25), 1);
    if (f->plot->log_y) {
        f->y0 = floor(f->y0);
        f->y1 = fmax(ceil(f->y1), f->y0 + 1);
    } else {
        f->y1 = 1;
        f->y0 = fmin(fmax(f->y0, 0), 0.9);
        f->y0 = floor(100 * f->y0 / percent_step(f)) * percent_step(f) / 100;
    }
}

/* ---- points and labels ---- */

static void take(frame *f, box b)
{
    f->taken[f->n_taken++] = b;
}

static bool is_free(const frame *f, const box *b)
{
    if (b->x0 < LEFT || b->x1 > WIDTH - RIGHT || b->y0 < TOP || b->y1 > HEIGHT - BOTTOM) return false;
    for (int i = 0; i < f->n_taken; i++) {
        const box *t = &f->taken[i];
        if (b->x0 < t->x1 && t->x0 < b->x1 && b->y0 < t->y1 && t->y0 < b->y1) return false;
    }
    return true;
}

/* Beside the point where there is room; else not at all: the point's title and the table have it. */
static void write_label(frame *f, const dot *d, const char *text)
{
    static const struct {
        double x, y, anchor; /* anchor: share of the width left of x */
    } places[] = {{7, 0, 0}, {-7, 0, 1}, {0, -11, 0.5}, {0, 12, 0.5}, {6, -10, 0}, {6, 10, 0}, {-6, -10, 1}, {-6, 10, 1}};
    const double width = 7.2 * (double)strlen(text);
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        const double x = d->x + places[i].x - places[i].anchor * width, y = d->y + places[i].y;
        const box b = {x, y - LABEL_HEIGHT / 2.0, x + width, y + LABEL_HEIGHT / 2.0};
        if (!is_free(f, &b)) continue;
        take(f, b);
        fprintf(f->out, "<text x=\"%.1f\" y=\"%.1f\" style=\"fill:var(--c%d);font-size:13px\">", x, y + 4, d->curve % N_COLOURS);
        html_text(f->out, text);
        fputs("</text>\n", f->out);
        return;
    }
}

static void write_curves(const frame *f)
{
    for (int i = 0; i < f->n; i++) {
        const bool begins = i == 0 || f->dots[i - 1].curve != f->dots[i].curve;
        const bool goes_on = i + 1 < f->n && f->dots[i + 1].curve == f->dots[i].curve;
        if (begins && !goes_on) continue;
        if (begins)
            fprintf(f->out, "<path fill=\"none\" stroke-width=\"1.5\" style=\"stroke:var(--c%d)\" d=\"M", f->dots[i].curve % N_COLOURS);
        fprintf(f->out, "%.1f %.1f ", f->dots[i].x, f->dots[i].y);
        if (!goes_on) fputs("\"/>\n", f->out);
    }
}

/* Shapes tell curves apart where colours do not. */
static void write_mark(const frame *f, const dot *d)
{
    const double x = d->x, y = d->y;
    switch (d->curve % 4) {
    case 0: fprintf(f->out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\">", x, y); break;
    case 1: fprintf(f->out, "<path d=\"M%.1f %.1f h7 v7 h-7 z\">", x - 3.5, y - 3.5); break;
    case 2: fprintf(f->out, "<path d=\"M%.1f %.1f l5 9 h-10 z\">", x, y - 5.5); break;
    default: fprintf(f->out, "<path d=\"M%.1f %.1f l5 5 l-5 5 l-5 -5 z\">", x, y - 5);
    }
    fputs("<title>", f->out);
    html_text(f->out, d->point->spec);
    fprintf(f->out, ": %.3g %% of the bytes, ", 100 * d->point->x);
    if (f->plot->log_y)
        fprintf(f->out, "%.3g", d->point->y);
    else
        fprintf(f->out, "%.1f %%", 100 * d->point->y);
    fprintf(f->out, "</title>%s\n", d->curve % 4 ? "</path>" : "</circle>");
}

static void write_points(frame *f)
{
    for (int i = 0; i < f->n; i++) take(f, (box){f->dots[i].x - 5, f->dots[i].y - 5, f->dots[i].x + 5, f->dots[i].y + 5});
    for (int i = 0; i < f->n; i++) {
        const dot *d = &f->dots[i];
        fprintf(f->out, "<g style=\"fill:var(--c%d);stroke:var(--c%d)\">", d->curve % N_COLOURS, d->curve % N_COLOURS);
        if (d->point->low < d->point->high && (d->point->high > 0 || !f->plot->log_y))
            fprintf(f->out, "<path d=\"M%.1f %.1f V%.1f\"/>", d->x,
                    d->point->low > 0 || !f->plot->log_y ? place_y(f, d->point->low) : HEIGHT - BOTTOM, place_y(f, d->point->high));
        write_mark(f, d);
        fputs("</g>\n", f->out);
    }
    for (int i = 0; i < f->n; i++) {
        const bool last = i + 1 == f->n || f->dots[i + 1].curve != f->dots[i].curve;
        if (last) write_label(f, &f->dots[i], f->dots[i].curve_name);
    }
    for (int i = 0; i < f->n; i++)
        if (f->dots[i].budget[0]) write_label(f, &f->dots[i], strchr(f->dots[i].budget, '=') + 1);
}

static void write_legend(const frame *f)
{
    fputs("<ul class=\"legend\">", f->out);
    for (int i = 0; i < f->n; i++) {
        if (i > 0 && f->dots[i - 1].curve == f->dots[i].curve) continue;
        fprintf(f->out, "<li><i style=\"background:var(--c%d)\"></i>", f->dots[i].curve % N_COLOURS);
        html_text(f->out, f->dots[i].curve_name);
        fputs("</li>", f->out);
    }
    fputs("</ul>\n", f->out);
}

static bool can_draw(const plot *p, const plot_point *point)
{
    return isfinite(point->x) && isfinite(point->y) && point->x > 0 && (!p->log_y || point->y > 0);
}

/* Curves are counted before what cannot be drawn goes, so that a policy has one colour in all panels of the same results. */
static void collect_dots(frame *f)
{
    int n_drawn = 0;
    for (f->n = 0; f->n < f->plot->n; f->n++) {
        dot *d = &f->dots[f->n];
        *d = (dot){.point = &f->plot->points[f->n], .curve = f->n_curves};
        split_spec(d->point->spec, d);
        for (int j = 0; j < f->n && d->curve == f->n_curves; j++)
            if (!strcmp(f->dots[j].curve_name, d->curve_name)) d->curve = f->dots[j].curve;
        f->n_curves += d->curve == f->n_curves;
    }
    for (int i = 0; i < f->n; i++)
        if (can_draw(f->plot, f->dots[i].point)) f->dots[n_drawn++] = f->dots[i];
    f->n = n_drawn;
}

static void write_figure(frame *f)
{
    fprintf(f->out, "<figure><svg viewBox=\"0 0 %d %d\" role=\"img\"><title>", WIDTH, HEIGHT);
    html_text(f->out, f->plot->title);
    fputs("</title><desc>", f->out);
    html_text(f->out, f->plot->y_label);
    fputs(" against ", f->out);
    html_text(f->out, f->plot->x_label);
    fprintf(f->out, ", %d points; the table below has the figures.</desc>\n", f->n);
    write_axes(f);
    write_curves(f);
    write_points(f);
    fputs("</svg><figcaption>", f->out);
    html_text(f->out, f->plot->title);
    fputs("</figcaption>", f->out);
    write_legend(f);
    fputs("</figure>\n", f->out);
}

quarry_code plot_write(FILE *out, const plot *p, quarry_error *error)
{
    frame f = {.out = out, .plot = p};
    quarry_code code = QUARRY_ERROR_MEMORY;
    const size_t n = (size_t)p->n;
    f.dots = memory_alloc(n, sizeof *f.dots, "points", error);
    f.taken = f.dots ? memory_alloc(3 * n, sizeof *f.taken, "labels", error) : NULL;
    if (!f.taken) goto done;
    collect_dots(&f);
    code = QUARRY_OK;
    if (f.n == 0) goto done;
    qsort(f.dots, (size_t)f.n, sizeof *f.dots, by_curve_and_x);
    frame_axes(&f);
    for (int i = 0; i < f.n; i++) {
        f.dots[i].x = place_x(&f, f.dots[i].point->x);
        f.dots[i].y = place_y(&f, f.dots[i].point->y);
    }
    write_figure(&f);
done:
    memory_free(f.taken);
    memory_free(f.dots);
    return code;
}
