/* Needles found, by how long the text was and how deep the needle lay. */
#include <stdlib.h>
#include <string.h>

#include "eval/report.h"

enum { CELL_WIDTH = 56, CELL_HEIGHT = 26, LEFT = 44, TOP = 6, BOTTOM = 40, MOST = 64 };

/* values[n] sorted, each once; returns how many are left. */
static int distinct(double *values, int n)
{
    int kept = 0;
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && values[j - 1] > values[j]; j--) {
            const double t = values[j];
            values[j] = values[j - 1];
            values[j - 1] = t;
        }
    for (int i = 0; i < n; i++)
        if (i == 0 || values[i] != values[kept - 1]) values[kept++] = values[i];
    return kept;
}

static void write_cell(FILE *out, int column, int row, int64_t correct, int64_t asked)
{
    const int x = LEFT + column * CELL_WIDTH, y = TOP + row * CELL_HEIGHT;
    fprintf(out, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" style=\"fill:rgba(var(--heat),%.2f);stroke:var(--rule)\"/>", x, y,
            CELL_WIDTH - 2, CELL_HEIGHT - 2, 0.75 * (double)correct / (double)asked);
    fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%lld/%lld</text>\n", x + CELL_WIDTH / 2 - 1, y + 16, (long long)correct,
            (long long)asked);
}

static void write_map(FILE *out, const char *policy, const heat_cell *cells, int n, const double *lengths, int n_lengths,
                      const double *depths, int n_depths)
{
    fprintf(out, "<figure class=\"heat\"><svg viewBox=\"0 0 %d %d\" role=\"img\"><title>Needles answered: ", LEFT + n_lengths * CELL_WIDTH,
            TOP + n_depths * CELL_HEIGHT + BOTTOM);
    html_text(out, policy);
    fputs("</title><desc>Rows: where in the text the needle lay, in per cent; columns: tokens of the text; each cell: answered of "
          "asked.</desc>\n",
          out);
    for (int r = 0; r < n_depths; r++)
        for (int c = 0; c < n_lengths; c++) {
            int64_t asked = 0, correct = 0;
            for (int i = 0; i < n; i++)
                if (cells[i].length == lengths[c] && cells[i].depth == depths[r]) asked += cells[i].asked, correct += cells[i].correct;
            if (asked > 0) write_cell(out, c, r, correct, asked);
        }
    for (int r = 0; r < n_depths; r++)
        fprintf(out, "<text class=\"tick\" x=\"%d\" y=\"%d\" text-anchor=\"end\">%.0f %%</text>\n", LEFT - 6, TOP + r * CELL_HEIGHT + 16,
                100 * depths[r]);
    for (int c = 0; c < n_lengths; c++)
        fprintf(out, "<text class=\"tick\" x=\"%d\" y=\"%d\" text-anchor=\"middle\">%.0f</text>\n",
                LEFT + c * CELL_WIDTH + CELL_WIDTH / 2 - 1, TOP + n_depths * CELL_HEIGHT + 14, lengths[c]);
    fprintf(out, "<text x=\"%d\" y=\"%d\">tokens</text></svg><figcaption>", LEFT, TOP + n_depths * CELL_HEIGHT + 32);
    html_text(out, policy);
    fputs("</figcaption></figure>\n", out);
}

quarry_code heat_write(FILE *out, const char *policy, const heat_cell *cells, int n, quarry_error *error)
{
    if (n == 0) return QUARRY_OK;
    double *values = memory_alloc(2 * (size_t)n, sizeof *values, "heat map", error);
    if (!values) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < n; i++) {
        values[i] = cells[i].length;
        values[n + i] = cells[i].depth;
    }
    const int n_lengths = distinct(values, n), n_depths = distinct(values + n, n);
    if (n_lengths <= MOST && n_depths <= MOST) write_map(out, policy, cells, n, values, n_lengths, values + n, n_depths);
    memory_free(values);
    return QUARRY_OK;
}
