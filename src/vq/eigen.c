#include <float.h>
#include <math.h>
#include <string.h>

#include "vq/vq.h"

/* The Householder vector v that zeroes x[0 .. n-2], leaving alpha at x[n-1]: (I - beta v v') x = alpha e_{n-1}. v overwrites x. */
static double householder(double *x, int n, double *alpha)
{
    double norm2 = 0, tail2 = 0;
    for (int i = 0; i < n; i++) norm2 += x[i] * x[i];
    for (int i = 0; i < n - 1; i++) tail2 += x[i] * x[i];
    *alpha = x[n - 1];
    if (tail2 <= DBL_MIN) {
        memset(x, 0, (size_t)n * sizeof *x);
        return 0;
    }
    double norm = sqrt(norm2);
    *alpha = x[n - 1] > 0 ? -norm : norm;
    x[n - 1] -= *alpha;
    return 2 / (tail2 + x[n - 1] * x[n - 1]);
}

/* a (symmetric, both halves) -> diagonal, off (off[i] couples i-1 and i), and orthogonal z: a = z T z'. The Householder vectors stay in
 * the rows of a while z is built from them. */
static void tridiagonalise(int d, double *a, double *diagonal, double *off, double *z, double *beta, double *p)
{
    for (int m = d - 1; m > 0; m--) {
        double *v = a + (size_t)m * d, dot = 0;
        diagonal[m] = v[m];
        beta[m] = householder(v, m, &off[m]);
        if (beta[m] == 0) continue;
        memset(p, 0, (size_t)m * sizeof *p);
        for (int i = 0; i < m; i++) {
            const double *row = a + (size_t)i * d;
            double factor = beta[m] * v[i];
            for (int j = 0; j < m; j++) p[j] += factor * row[j];
        }
        for (int i = 0; i < m; i++) dot += p[i] * v[i];
        for (int i = 0; i < m; i++) p[i] -= 0.5 * beta[m] * dot * v[i];
        for (int i = 0; i < m; i++) {
            double *row = a + (size_t)i * d, vi = v[i], pi = p[i];
            for (int j = 0; j < m; j++) row[j] -= vi * p[j] + pi * v[j];
        }
    }
    diagonal[0] = a[0];
    off[0] = 0;
    memset(z, 0, (size_t)d * (size_t)d * sizeof *z);
    for (int i = 0; i < d; i++) z[(size_t)i * d + i] = 1;
    /* z = P_{d-1} … P_2, smallest reflection first, so that each touches the leading block only */
    for (int m = 2; m < d; m++) {
        const double *v = a + (size_t)m * d;
        if (beta[m] == 0) continue;
        memset(p, 0, (size_t)m * sizeof *p);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < m; j++) p[j] += v[i] * z[(size_t)i * d + j];
        for (int i = 0; i < m; i++) {
            double factor = beta[m] * v[i];
            for (int j = 0; j < m; j++) z[(size_t)i * d + j] -= factor * p[j];
        }
    }
}

static void rotate_rows(double *low, double *high, int d, double c, double s)
{
    for (int k = 0; k < d; k++) {
        double x = low[k], y = high[k];
        high[k] = s * x + c * y;
        low[k] = c * x - s * y;
    }
}

/* Implicit QL steps with Wilkinson's shift; rows of z follow the rotations. */
static bool ql(int d, double *diagonal, double *off, double *z)
{
    for (int i = 0; i + 1 < d; i++) off[i] = off[i + 1]; /* off[i] couples i and i + 1 */
    off[d - 1] = 0;
    for (int l = 0; l < d; l++) {
        for (int sweep = 0;; sweep++) {
            int m = l;
            while (m < d - 1 && fabs(off[m]) > DBL_EPSILON * (fabs(diagonal[m]) + fabs(diagonal[m + 1])) && fabs(off[m]) > DBL_MIN) m++;
            if (m == l) break;
            if (sweep == 60) return false;
            double g = (diagonal[l + 1] - diagonal[l]) / (2 * off[l]), r = hypot(g, 1);
            g = diagonal[m] - diagonal[l] + off[l] / (g + copysign(r, g));
            double s = 1, c = 1, p = 0;
            int i = m - 1;
            for (; i >= l; i--) {
                double f = s * off[i], b = c * off[i];
                r = hypot(f, g);
                off[i + 1] = r;
                if (r == 0) {
                    diagonal[i + 1] -= p;
                    off[m] = 0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = diagonal[i + 1] - p;
                r = (diagonal[i] - g) * s + 2 * c * b;
                p = s * r;
                diagonal[i + 1] = g + p;
                g = c * r - b;
                rotate_rows(z + (size_t)i * d, z + (size_t)(i + 1) * d, d, c, s);
            }
            if (i >= l) continue;
            diagonal[l] -= p;
            off[l] = g;
            off[m] = 0;
        }
    }
    return true;
}

quarry_code vq_eigen(int d, const float *a, float *values, float *vectors, arena *scratch, quarry_error *error)
{
    size_t n = (size_t)d, cells = n * n;
    double *work = arena_alloc(scratch, 2 * cells + 5 * n, sizeof *work, error);
    if (!work) return QUARRY_ERROR_MEMORY;
    double *full = work, *z = full + cells, *diagonal = z + cells, *off = diagonal + n, *beta = off + n, *p = beta + n;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) full[i * n + j] = 0.5 * ((double)a[i * n + j] + a[j * n + i]);
    for (size_t i = 0; i < cells; i++)
        if (!isfinite(full[i])) return error_set(error, QUARRY_ERROR_ARGUMENT, "eigenvalues of a matrix that holds %g", full[i]);
    tridiagonalise(d, full, diagonal, off, z, beta, p);
    /* QL rotates columns of z: on the transpose they are contiguous */
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) full[j * n + i] = z[i * n + j];
    if (!ql(d, diagonal, off, full))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "eigenvalues of a %d x %d matrix do not converge", d, d);
    for (int i = 0; i < d; i++) { /* selection sort: d rows move once */
        int least = i;
        for (int j = i + 1; j < d; j++)
            if (diagonal[j] < diagonal[least]) least = j;
        values[i] = (float)diagonal[least];
        for (int k = 0; k < d; k++) {
            vectors[(size_t)i * n + (size_t)k] = (float)full[(size_t)least * n + (size_t)k];
            full[(size_t)least * n + (size_t)k] = full[(size_t)i * n + (size_t)k];
        }
        diagonal[least] = diagonal[i];
    }
    return QUARRY_OK;
}
