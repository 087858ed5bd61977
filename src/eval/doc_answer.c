/* Is an answer among the words of a text? */
#include <locale.h>
#include <string.h>
#include <wctype.h>

#include "eval/eval.h"

/* The character at text, and its bytes in *n; those that are not UTF-8 count one by one, as U+FFFD. */
static uint32_t next_character(const char *text, size_t *n)
{
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *s = (const unsigned char *)text;
    const size_t length = *s < 0x80 ? 1 : *s >= 0xf0 ? 4 : *s >= 0xe0 ? 3 : *s >= 0xc0 ? 2 : 0;
    uint32_t c = length == 1 ? *s : *s & (0x7fu >> length);
    *n = 1;
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80) return 0xfffd;
        c = c << 6 | (s[i] & 0x3f);
    }
    if (length == 0 || c < least[length] || c > 0x10ffff) return 0xfffd;
    *n = length;
    return c;
}

/* Python's str.split takes these. */
static bool is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* ASCII, as SQuAD; and what models print in its place: quotation marks, dashes, and the marks of Chinese and Japanese. */
static bool is_punctuation(uint32_t c)
{
    if (c < 0x80) return c > 0x20 && c < 0x7f && strchr("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", (int)c);
    return (c >= 0x2010 && c <= 0x2027) || (c >= 0x2030 && c <= 0x205e) || (c >= 0x3001 && c <= 0x3003) || (c >= 0x3008 && c <= 0x3011) ||
           (c >= 0xff01 && c <= 0xff0f) || (c >= 0xff1a && c <= 0xff20) || (c >= 0xff3b && c <= 0xff40) || (c >= 0xff5b && c <= 0xff65);
}

/* Of a script without spaces between words. */
static bool is_word(uint32_t c)
{
    return (c >= 0x3040 && c <= 0x30ff) || (c >= 0x3400 && c <= 0x4dbf) || (c >= 0x4e00 && c <= 0x9fff) || (c >= 0xf900 && c <= 0xfaff) ||
           (c >= 0x20000 && c <= 0x323af);
}

static size_t put_character(char *out, uint32_t c)
{
    const size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char head[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)(head[n] | c);
    return n;
}

/* The word out[first, n) ends: a space follows, unless it is empty or an article. Returns the new length. */
static size_t end_word(char *out, size_t first, size_t n)
{
    static const char *const articles[] = {"a", "an", "the"};
    for (size_t i = 0; i < sizeof articles / sizeof *articles; i++)
        if (n - first == strlen(articles[i]) && memcmp(out + first, articles[i], n - first) == 0) n = first;
    if (n > first) out[n++] = ' ';
    return n;
}

char *doc_normalise(const char *text, quarry_error *error)
{
    /* A byte gives at most a character of a word and two spaces, U+FFFD three bytes and none; lower case may take a byte more than upper case, not two. */
    char *out = memory_alloc(strlen(text) + 1, 5, "answer", error);
    const locale_t unicode = out ? newlocale(LC_CTYPE_MASK, "C.UTF-8", (locale_t)0) : (locale_t)0; /* absent: ASCII letters only */
    size_t n = 1, first = 1, length;
    if (!out) return NULL;
    out[0] = ' ';
    for (; *text; text += length) {
        const uint32_t c = next_character(text, &length);
        const bool alone = is_word(c);
        if (is_punctuation(c)) continue;
        if (is_space(c) || alone) first = n = end_word(out, first, n);
        if (is_space(c)) continue;
        const uint32_t lower = unicode ? (uint32_t)towlower_l((wint_t)c, unicode) : c >= 'A' && c <= 'Z' ? c + 32 : c;
        n += put_character(out + n, lower);
        if (alone) first = n = end_word(out, first, n);
    }
    n = end_word(out, first, n);
    out[n] = '\0';
    if (unicode) freelocale(unicode);
    return out;
}

quarry_code doc_answered(const doc_question *q, const char *text, bool *right, quarry_error *error)
{
    char *words = doc_normalise(text, error);
    *right = false;
    if (!words) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < q->n_answers; i++) *right = *right || strstr(words, q->answers[i]);
    memory_free(words);
    return QUARRY_OK;
}
