#include "text/pretokenize.h"

#include <string.h>

#include "text/unicode.h"

typedef struct character {
    unicode_class class;
    uint32_t cp;
    size_t n; /* bytes; 0 at the end of the text */
} character;

static character character_at(const char *text, size_t n, size_t i)
{
    if (i >= n) return (character){UNICODE_END, 0, 0};
    character c;
    c.n = utf8_decode(text + i, n - i, &c.cp);
    c.class = c.cp == UTF8_INVALID ? UNICODE_OTHER : unicode_class_of(c.cp);
    return c;
}

#define IN(class) (1u << (class))
#define SYMBOLS (IN(UNICODE_OTHER) | IN(UNICODE_MARK))

/* End of the run of characters of the given classes that starts at i. */
static size_t run_end(const char *text, size_t n, size_t i, unsigned classes)
{
    for (;;) {
        character c = character_at(text, n, i);
        if (!(IN(c.class) & classes)) return i;
        i += c.n;
    }
}

/* Length of 's 't 'm 'd 're 've 'll at text[i], 0 if none. Ignoring case, U+017F (long s) is an s. */
static size_t contraction_length(const char *text, size_t n, size_t i, bool ignore_case)
{
    if (text[i] != '\'' || i + 1 >= n) return 0;
    unsigned fold = ignore_case ? 0x20 : 0;
    char a = (char)((unsigned char)text[i + 1] | fold);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if (i + 2 >= n) return 0;
    if (ignore_case && memcmp(text + i + 1, "\xC5\xBF", 2) == 0) return 3;
    char b = (char)((unsigned char)text[i + 2] | fold);
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* The white space at text[i]: \s+(?!\S)|\s+, that is, all of it at the end of the text, else all but the last character, which stays with what follows;
 * with stop_at_newline \s*[\r\n]+ comes first. In front of a character of the class `ends` the text counts as ended. */
static size_t space_end(const char *text, size_t n, size_t i, bool stop_at_newline, unicode_class ends)
{
    size_t last = i, newline = i, end = i;
    for (;;) {
        character c = character_at(text, n, end);
        if (c.class != UNICODE_SPACE) {
            if (stop_at_newline && newline > i) return newline;
            return c.class == UNICODE_END || c.class == ends || last == i ? end : last;
        }
        last = end;
        end += c.n;
        if (c.cp == '\r' || c.cp == '\n') newline = end;
    }
}

static size_t gpt2_next(const char *text, size_t n, size_t i, bool digits_apart)
{
    size_t contraction = contraction_length(text, n, i, false);
    if (contraction) return i + contraction;
    size_t start = text[i] == ' ' ? i + 1 : i;
    character c = character_at(text, n, start);
    if (c.class == UNICODE_LETTER) return run_end(text, n, start, IN(UNICODE_LETTER));
    if (IN(c.class) & SYMBOLS) return run_end(text, n, start, SYMBOLS);
    if (c.class == UNICODE_NUMBER) {
        if (!digits_apart) return run_end(text, n, start, IN(UNICODE_NUMBER));
        return start > i ? start : start + c.n;
    }
    return space_end(text, n, i, false, digits_apart ? UNICODE_NUMBER : UNICODE_END);
}

static size_t llama3_next(const char *text, size_t n, size_t i, int max_digits)
{
    size_t contraction = contraction_length(text, n, i, true);
    if (contraction) return i + contraction;
    character c = character_at(text, n, i);
    if (c.class == UNICODE_LETTER) return run_end(text, n, i, IN(UNICODE_LETTER));
    if (c.class == UNICODE_NUMBER) {
        size_t end = i;
        for (int k = 0; k < max_digits && c.class == UNICODE_NUMBER; k++) {
            end += c.n;
            c = character_at(text, n, end);
        }
        return end;
    }
    character next = character_at(text, n, i + c.n);
    if (next.class == UNICODE_LETTER && c.cp != '\r' && c.cp != '\n') return run_end(text, n, i + c.n, IN(UNICODE_LETTER));
    if (IN(c.class) & SYMBOLS || (c.cp == ' ' && IN(next.class) & SYMBOLS)) {
        size_t end = run_end(text, n, i + c.n, SYMBOLS);
        while (end < n && (text[end] == '\r' || text[end] == '\n')) end++;
        return end;
    }
    return space_end(text, n, i, true, UNICODE_END);
}

size_t pretokenizer_next(pretokenizer kind, const char *text, size_t n, size_t start)
{
    switch (kind) {
    case PRETOKENIZER_GPT2: return gpt2_next(text, n, start, false);
    case PRETOKENIZER_SMOLLM: return gpt2_next(text, n, start, true);
    case PRETOKENIZER_QWEN2: return llama3_next(text, n, start, 1);
    default: return llama3_next(text, n, start, 3);
    }
}

bool pretokenizer_find(const char *name, pretokenizer *kind, bool *ignore_merges, bool *add_bos)
{
    /* Only names whose pattern is the same; "default" (and no name) is what the byte-level tokenizers of Hugging Face do by default. */
    static const struct {
        const char *name;
        pretokenizer kind;
        bool ignore_merges, add_bos;
    } known[] = {
        {"smollm", PRETOKENIZER_SMOLLM, false, false},
        {"starcoder", PRETOKENIZER_SMOLLM, false, false},
        {"refact", PRETOKENIZER_SMOLLM, false, false},
        {"command-r", PRETOKENIZER_SMOLLM, false, false},
        {"codeshell", PRETOKENIZER_SMOLLM, false, false},
        {"exaone", PRETOKENIZER_SMOLLM, false, false},
        {"minerva-7b", PRETOKENIZER_SMOLLM, false, false},
        {"qwen2", PRETOKENIZER_QWEN2, false, false},
        {"deepseek-r1-qwen", PRETOKENIZER_QWEN2, false, false},
        {"megrez", PRETOKENIZER_QWEN2, false, false},
        {"stablelm2", PRETOKENIZER_QWEN2, false, false},
        {"hunyuan", PRETOKENIZER_QWEN2, false, false},
        {"llama-bpe", PRETOKENIZER_LLAMA3, true, true},
        {"llama3", PRETOKENIZER_LLAMA3, true, true},
        {"llama-v3", PRETOKENIZER_LLAMA3, true, true},
        {"falcon3", PRETOKENIZER_LLAMA3, true, true},
        {"falcon-h1", PRETOKENIZER_LLAMA3, true, true},
        {"pixtral", PRETOKENIZER_LLAMA3, true, true},
        {"lfm2", PRETOKENIZER_LLAMA3, true, true},
        {"dbrx", PRETOKENIZER_LLAMA3, false, false},
        {"smaug-bpe", PRETOKENIZER_LLAMA3, false, false},
        {"gpt-2", PRETOKENIZER_GPT2, false, false},
        {"default", PRETOKENIZER_GPT2, false, false},
        {"phi-2", PRETOKENIZER_GPT2, false, false},
        {"mpt", PRETOKENIZER_GPT2, false, false},
        {"olmo", PRETOKENIZER_GPT2, false, false},
        {"jais", PRETOKENIZER_GPT2, false, false},
        {"exaone4", PRETOKENIZER_GPT2, false, false},
        {"trillion", PRETOKENIZER_GPT2, false, false},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) != 0) continue;
        *kind = known[i].kind;
        *ignore_merges = known[i].ignore_merges;
        *add_bos = known[i].add_bos;
        return true;
    }
    return false;
}
