#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "cli/cli.h"

/* ---- messages ---- */

static void print_message(const char *format, va_list args)
{
    fflush(stdout); /* what was said before comes first when both go to one terminal */
    fputs("quarry: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

int cli_fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message(format, args);
    va_end(args);
    return CLI_FAILED;
}

int cli_fail_error(const quarry_error *error)
{
    if (error->code == QUARRY_ERROR_CANCELLED) return cli_fail_interrupted();
    return cli_fail("%s", error->message);
}

int cli_fail_interrupted(void)
{
    cli_fail("interrupted");
    return CLI_INTERRUPTED;
}

int cli_fail_usage(const cli_command *command, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message(format, args);
    va_end(args);
    fprintf(stderr, "Try 'quarry %s%s--help'.\n", command ? command->name : "", command ? " " : "");
    return CLI_USAGE;
}

/* ---- interrupts ---- */

/* A signal handler has no other way to reach the program's state. */
static volatile sig_atomic_t interrupted, working, bar_shown;

static void on_interrupt(int signal_number)
{
    if (working) {
        interrupted = 1;
        signal(signal_number, SIG_DFL);
        return;
    }
    static const char clear[] = "\r\033[K", text[] = "quarry: interrupted\n";
    if (bar_shown && write(STDERR_FILENO, clear, sizeof clear - 1) < 0) _exit(CLI_INTERRUPTED);
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) _exit(CLI_INTERRUPTED);
    _exit(CLI_INTERRUPTED);
}

void cli_interrupt_install(void)
{
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART}, old;
    sigemptyset(&action.sa_mask);
    /* A program started with the signal ignored (nohup, a background job of a script) keeps it so. */
    if (!sigaction(SIGINT, NULL, &old) && old.sa_handler != SIG_IGN) sigaction(SIGINT, &action, NULL);
}

void cli_work_begin(void)
{
    working = 1;
}

void cli_work_end(void)
{
    working = 0;
}

bool cli_interrupted(void)
{
    return interrupted != 0;
}

/* ---- progress ---- */

enum { BAR_WIDTH = 24, FIGURES_WIDTH = 70 };
static const double BAR_SECONDS = 0.1, LINE_SECONDS = 10;

double cli_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void format_left(double seconds, char *out, size_t capacity)
{
    long s = seconds < 1e6 ? lround(ceil(seconds)) : 999999;
    if (s < 60)
        snprintf(out, capacity, "%ld s", s);
    else if (s < 3600)
        snprintf(out, capacity, "%ld min %ld s", s / 60, s % 60);
    else
        snprintf(out, capacity, "%ld h %ld min", s / 3600, s / 60 % 60);
}

/* Cells that fit beside the figures, so that the line does not wrap. */
static int bar_width(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) || !size.ws_col || size.ws_col >= BAR_WIDTH + FIGURES_WIDTH) return BAR_WIDTH;
    return size.ws_col > FIGURES_WIDTH ? size.ws_col - FIGURES_WIDTH : 0;
}

static const char *unit_of(const cli_progress *p)
{
    return p->unit ? p->unit : "tokens";
}

static void draw_bar(const cli_progress *p, int64_t done, int64_t total, const char *speed)
{
    char bar[3 * BAR_WIDTH + 1], *b = bar; /* each cell is one UTF-8 character of three bytes */
    int width = bar_width();
    for (int i = 0; i < width; i++) {
        memcpy(b, i < done * width / total ? "█" : "░", 3);
        b += 3;
    }
    *b = 0;
    fprintf(stderr, "\r\033[K%s %s %3lld %%  %lld/%lld %s  %s", p->label, bar, (long long)(100 * done / total), (long long)done,
            (long long)total, unit_of(p), speed);
    fflush(stderr);
}

static bool on_progress(int64_t done, int64_t total, void *data)
{
    cli_progress *p = data;
    if (interrupted) return false;
    if (p->quiet || total <= 0) return true;
    bool terminal = isatty(STDERR_FILENO);
    double now = cli_seconds();
    if (now - p->last < (terminal ? BAR_SECONDS : LINE_SECONDS)) return true;
    p->last = now;
    char left[40], speed[96] = "";
    if (done > 0) {
        double rate = (double)done / fmax(now - p->start, 1e-9);
        format_left((double)(total - done) / rate, left, sizeof left);
        snprintf(speed, sizeof speed, "%.*f %s/s  %s left", p->unit ? 1 : 0, rate, unit_of(p), left);
    }
    if (terminal) {
        p->shown = true;
        bar_shown = 1;
        draw_bar(p, done, total, speed);
    } else {
        fprintf(stderr, "%s: %lld of %lld %s  %s\n", p->label, (long long)done, (long long)total, unit_of(p), speed);
    }
    return true;
}

quarry_watch cli_progress_start(cli_progress *progress, const char *label, bool quiet)
{
    double now = cli_seconds();
    *progress = (cli_progress){.label = label, .quiet = quiet, .start = now, .last = now};
    return (quarry_watch){on_progress, progress};
}

void cli_progress_end(cli_progress *progress)
{
    if (!progress->shown) return;
    fputs("\r\033[K", stderr);
    progress->shown = false;
    bar_shown = 0;
}

/* ---- output ---- */

static int output_errno; /* of the first write to standard output that failed */

static bool output_ok(bool ok)
{
    if (!ok && !output_errno) output_errno = errno ? errno : EIO;
    return !output_errno;
}

bool cli_write(const char *text, size_t n_bytes)
{
    if (output_errno) return false;
    errno = 0;
    return output_ok(!n_bytes || fwrite(text, n_bytes, 1, stdout) == 1);
}

bool cli_print(const char *format, ...)
{
    if (output_errno) return false;
    va_list args;
    va_start(args, format);
    errno = 0;
    bool ok = vprintf(format, args) >= 0;
    va_end(args);
    return output_ok(ok);
}

bool cli_flush(void)
{
    if (output_errno) return false;
    errno = 0;
    return output_ok(!fflush(stdout));
}

int cli_output_end(void)
{
    cli_flush();
    if (!output_errno) return CLI_OK;
    if (output_errno == EPIPE) return CLI_PIPE_CLOSED;
    return cli_fail("cannot write to standard output: %s", strerror(output_errno));
}

const char *cli_bytes(double n_bytes, char buffer[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    while (unit < 4 && n_bytes >= 1024) {
        n_bytes /= 1024;
        unit++;
    }
    snprintf(buffer, 32, unit && n_bytes < 100 ? "%.1f %s" : "%.0f %s", n_bytes, units[unit]);
    return buffer;
}
