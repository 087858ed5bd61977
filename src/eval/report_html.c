#include <math.h>
#include <string.h>

#include "eval/report.h"

static const char style[] =
    ":root{--ink:#1b1b1b;--paper:#fdfcf9;--faint:#66635b;--rule:#dcd8cf;--heat:0,114,178;"
    "--c0:#0072b2;--c1:#d55e00;--c2:#00805a;--c3:#a3457f;--c4:#8a6d00;--c5:#3f6fd1;--c6:#a33a2a;--c7:#5f5f5f;--c8:#6a4fb3;--c9:#00798a}\n"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e3dc;--paper:#191917;--faint:#a39f95;--rule:#3a3833;--heat:86,180,233;"
    "--c0:#56b4e9;--c1:#ff9447;--c2:#3fcf9d;--c3:#e693c8;--c4:#e5c84a;--c5:#93b4ff;--c6:#ff8f7a;--c7:#b5b5b5;--c8:#b9a3ff;--c9:#4fd0e0}}\n"
    "body{margin:0 auto;padding:1rem;max-width:60rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}\n"
    "h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem;border-top:1px solid var(--rule);padding-top:1rem}h3{font-size:1rem}\n"
    ".faint,figcaption{color:var(--faint);font-size:.875rem}code,pre{font:.85rem/1.4 ui-monospace,monospace;overflow-wrap:anywhere}"
    "pre{white-space:pre-wrap}\n"
    ".panels{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;flex:1 1 "
    "22rem;min-width:0;max-width:34rem}svg{width:100%;height:auto;display:block}\n"
    "figure.heat{flex:0 1 18rem}svg text{font:14px system-ui,sans-serif;fill:var(--ink)}svg .axis{stroke:var(--rule)}svg "
    ".tick{fill:var(--faint)}\n"
    ".scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}caption{text-align:left;"
    "color:var(--faint)}th,td{padding:.2rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}"
    "th:first-child,td.t{text-align:left}\n"
    "ul.legend{list-style:none;padding:0;margin:.3rem 0;display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.8rem}.legend "
    "i{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.35em}\n"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem "
    "1rem;font-size:.875rem}dd{margin:0;overflow-wrap:anywhere}dt{color:var(--"
    "faint)}\n";

void html_text(FILE *out, const char *text)
{
    for (; text && *text; text++) {
        const unsigned char c = (unsigned char)*text;
        switch (c) {
        case '&': fputs("&amp;", out); break;
        case '<': fputs("&lt;", out); break;
        case '>': fputs("&gt;", out); break;
        case '"': fputs("&quot;", out); break;
        case '\'': fputs("&#39;", out); break;
        default:
            if (c < 0x20 || c == 0x7f) /* no character of a page, or white space */
                fputs(c == '\n' || c == '\t' ? " " : "\xef\xbf\xbd", out);
            else
                fputc(c, out);
        }
    }
}

void html_begin(FILE *out, const char *title)
{
    fputs("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
          "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
          "<meta name=\"color-scheme\" content=\"light dark\">\n<title>",
          out);
    html_text(out, title);
    fprintf(out, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<h1>", style);
    html_text(out, title);
    fputs("</h1>\n", out);
}

void html_end(FILE *out)
{
    fputs("</body>\n</html>\n", out);
}

void html_table_begin(FILE *out, const char *caption, const char *const *heads, int n_heads)
{
    fputs("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"", out); /* so that a keyboard can scroll it */
    html_text(out, caption);
    fputs("\"><table><caption>", out);
    html_text(out, caption);
    fputs("</caption><thead><tr>", out);
    for (int i = 0; i < n_heads; i++) {
        fputs("<th scope=\"col\">", out);
        html_text(out, heads[i]);
        fputs("</th>", out);
    }
    fputs("</tr></thead><tbody>\n", out);
}

void html_row_begin(FILE *out, const char *head)
{
    fputs("<tr><th scope=\"row\">", out);
    html_text(out, head);
    fputs("</th>", out);
}

void html_cell(FILE *out, const char *text)
{
    fputs("<td>", out);
    html_text(out, text);
    fputs("</td>", out);
}

void html_number(FILE *out, const char *format, double value, double scale)
{
    char text[64];
    if (isfinite(value))
        snprintf(text, sizeof text, format, value * scale);
    else
        snprintf(text, sizeof text, "–");
    html_cell(out, text);
}

void html_row_end(FILE *out)
{
    fputs("</tr>\n", out);
}

void html_table_end(FILE *out)
{
    fputs("</tbody></table></div>\n", out);
}
