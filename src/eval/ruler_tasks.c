/* The generators. Templates, counts and frequencies are those of the paper and its public code; words, texts and the generators are ours. */
#include <ctype.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "eval/ruler.h"

enum { NIAH_S1, NIAH_S2, NIAH_S3, NIAH_MK1, NIAH_MK2, NIAH_MK3, NIAH_MV, NIAH_MQ, VT, CWE, FWE };

const ruler_task ruler_tasks[RULER_TASKS] = {
    [NIAH_S1] = {"niah_single_1", 128, false},
    [NIAH_S2] = {"niah_single_2", 128, true},
    [NIAH_S3] = {"niah_single_3", 128, true},
    [NIAH_MK1] = {"niah_multikey_1", 128, true},
    [NIAH_MK2] = {"niah_multikey_2", 128, false},
    [NIAH_MK3] = {"niah_multikey_3", 128, false},
    [NIAH_MV] = {"niah_multivalue", 128, true},
    [NIAH_MQ] = {"niah_multiquery", 128, true},
    [VT] = {"vt", 30, false},
    [CWE] = {"cwe", 120, true},
    [FWE] = {"fwe", 50, false},
};

/* ---- text that grows ---- */

typedef struct writer {
    char *text;
    size_t n, capacity;
    quarry_code code;
    quarry_error *error;
} writer;

__attribute__((format(printf, 2, 3))) static void put(writer *w, const char *format, ...)
{
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    const int n = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    if (w->code == QUARRY_OK && w->n + (size_t)n + 1 > w->capacity) {
        const size_t capacity = 2 * w->capacity + (size_t)n + 64;
        w->code = memory_grow(&w->text, capacity, 1, "sample", w->error);
        if (w->code == QUARRY_OK) w->capacity = capacity;
    }
    if (w->code == QUARRY_OK) {
        vsnprintf(w->text + w->n, (size_t)n + 1, format, again);
        w->n += (size_t)n;
    }
    va_end(again);
}

/* ---- the source ---- */

static bool ends_sentence(const char *text, size_t n, size_t i)
{
    return (text[i] == '.' || text[i] == '!' || text[i] == '?') && (i + 1 == n || isspace((unsigned char)text[i + 1]));
}

/* Sentences, white space as one space, of 3 words and more. */
static quarry_code cut_sentences(ruler_source *s, const char *text, size_t n, quarry_error *error)
{
    int64_t capacity = 0;
    for (size_t i = 0; i < n; i++) capacity += ends_sentence(text, n, i);
    s->text = memory_alloc(n + (size_t)capacity + 2, 1, "sentences", error);
    s->sentences = memory_alloc((size_t)capacity + 1, sizeof *s->sentences, "sentences", error);
    if (!s->text || !s->sentences) return QUARRY_ERROR_MEMORY;
    char *to = s->text, *start = to;
    int spaces = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '\0') continue;
        if (!isspace((unsigned char)text[i]))
            *to++ = text[i];
        else if (to > start && to[-1] != ' ') {
            *to++ = ' ';
            spaces++;
        }
        if (!ends_sentence(text, n, i)) continue;
        *to++ = '\0';
        if (spaces >= 2)
            s->sentences[s->n_sentences++] = start;
        else
            to = start;
        start = to;
        spaces = 0;
    }
    return QUARRY_OK;
}

static int compare_words(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Distinct lower-case words of 4 to 10 letters, in alphabetical order. */
static quarry_code cut_words(ruler_source *s, const char *text, size_t n, quarry_error *error)
{
    enum { LEAST = 4, MOST = 10 };
    int64_t capacity = 0, kept = 0;
    for (size_t i = 0; i < n; i++) capacity += isspace((unsigned char)text[i]) != 0;
    s->word_text = memory_alloc(n + 1, 1, "words", error);
    s->words = memory_alloc((size_t)capacity + 1, sizeof *s->words, "words", error);
    if (!s->word_text || !s->words) return QUARRY_ERROR_MEMORY;
    char *to = s->word_text;
    for (size_t i = 0; i < n;) {
        size_t first = i;
        bool plain = true;
        for (; i < n && !isspace((unsigned char)text[i]); i++) plain &= text[i] >= 'a' && text[i] <= 'z';
        if (plain && i - first >= LEAST && i - first <= MOST) {
            memcpy(to, text + first, i - first);
            to[i - first] = '\0';
            s->words[s->n_words++] = to;
            to += i - first + 1;
        }
        while (i < n && isspace((unsigned char)text[i])) i++;
    }
    qsort(s->words, (size_t)s->n_words, sizeof *s->words, compare_words);
    for (int64_t i = 0; i < s->n_words; i++)
        if (i == 0 || strcmp(s->words[i], s->words[kept - 1]) != 0) s->words[kept++] = s->words[i];
    s->n_words = kept;
    return QUARRY_OK;
}

quarry_code ruler_source_make(ruler_source *s, const char *text, size_t n_bytes, quarry_error *error)
{
    *s = (ruler_source){0};
    quarry_code code = cut_sentences(s, text, n_bytes, error);
    if (code == QUARRY_OK) code = cut_words(s, text, n_bytes, error);
    if (code != QUARRY_OK) ruler_source_free(s);
    return code;
}

void ruler_source_free(ruler_source *s)
{
    memory_free(s->text);
    memory_free(s->sentences);
    memory_free(s->words);
    memory_free(s->word_text);
    *s = (ruler_source){0};
}

/* ---- needles ---- */

static void draw_uuid(random_state *r, char *out)
{
    uint64_t a = random_u64(r), b = random_u64(r);
    snprintf(out, 37, "%08x-%04x-4%03x-%04x-%012llx", (unsigned)(a >> 32), (unsigned)(a >> 16 & 0xffff), (unsigned)(a & 0xfff),
             (unsigned)(b >> 48 & 0x3fff) | 0x8000, (unsigned long long)(b & 0xffffffffffffULL));
}

enum { ITEM_BYTES = 40 };

typedef struct niah {
    bool essay, needles_only, uuid_keys, uuid_values;
    int n_keys, n_values, n_queries;
} niah;

static const niah niahs[] = {
    [NIAH_S1] = {false, false, false, false, 1, 1, 1}, [NIAH_S2] = {true, false, false, false, 1, 1, 1},
    [NIAH_S3] = {true, false, false, true, 1, 1, 1},   [NIAH_MK1] = {true, false, false, false, 4, 1, 1},
    [NIAH_MK2] = {false, true, false, false, 1, 1, 1}, [NIAH_MK3] = {false, true, true, true, 1, 1, 1},
    [NIAH_MV] = {true, false, false, false, 1, 4, 1},  [NIAH_MQ] = {true, false, false, false, 4, 1, 4},
};

/* Key i of a sample. Words: a pair that no other i below 2^20 has, so that the distinct need not be looked for. */
static void make_key(const niah *t, uint64_t seed, int64_t i, char *out)
{
    random_state r;
    random_seed(&r, seed * 1000003 + (uint64_t)i);
    if (t->uuid_keys)
        draw_uuid(&r, out);
    else
        haystack_key((uint64_t)i, seed, out, ITEM_BYTES);
}

static void make_value(const niah *t, uint64_t seed, int64_t i, char *out)
{
    random_state r;
    random_seed(&r, (seed * 1000003 + (uint64_t)i) ^ 0x9e3779b97f4a7c15); /* not what draws a key */
    if (t->uuid_values)
        draw_uuid(&r, out);
    else
        snprintf(out, ITEM_BYTES, "%07u", 1000000u + (unsigned)random_below(&r, 9000000));
}

static void put_needle(writer *w, const niah *t, uint64_t seed, int64_t key, int64_t value)
{
    char k[ITEM_BYTES], v[ITEM_BYTES];
    make_key(t, seed, key, k);
    make_value(t, seed, value, v);
    put(w, "One of the special magic %s for %s is: %s.", t->uuid_values ? "uuids" : "numbers", k, v);
}

/* The unit of a haystack: a sentence of the source from `first` on, or noise, or another needle. */
static void put_unit(writer *w, const niah *t, const ruler_source *s, int64_t first, uint64_t seed, int64_t i)
{
    if (t->needles_only)
        put_needle(w, t, seed, 1 + i, 1 + i);
    else if (t->essay)
        put(w, "%s", s->sentences[(first + i) % s->n_sentences]);
    else
        put(w, "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.");
}

static void keep_answer(ruler_sample *out, writer *w, const char *text)
{
    if (w->code != QUARRY_OK) return;
    if (!(out->answers[out->n_answers] = memory_string(text, strlen(text), w->error)))
        w->code = QUARRY_ERROR_MEMORY;
    else
        out->n_answers++;
}

static void write_niah(int task, const ruler_source *s, int64_t n_units, uint64_t seed, ruler_sample *out, writer *context,
                       writer *question, writer *prefix)
{
    const niah *t = &niahs[task];
    enum { MOST = 4, DEPTHS = 40 };
    const int n_needles = t->n_keys * t->n_values;
    const char *items = t->uuid_values ? "uuid" : "number", *between = t->essay ? " " : "\n";
    const bool one = t->n_queries * t->n_values == 1;
    int64_t at[MOST];
    bool taken[DEPTHS] = {false};
    char text[ITEM_BYTES], queries[MOST * (ITEM_BYTES + 8)] = "";
    random_state r;
    random_seed(&r, seed);
    const int64_t first = t->essay ? (int64_t)random_below(&r, (uint64_t)s->n_sentences) : 0;
    for (int i = 0; i < n_needles; i++) { /* depths on a grid of 40, no two the same */
        int depth;
        do depth = (int)random_below(&r, DEPTHS);
        while (taken[depth]);
        taken[depth] = true;
        at[i] = (int64_t)((double)depth / (DEPTHS - 1) * (double)n_units);
    }
    put(context,
        one ? "A special magic %s is hidden within the following text. Make sure to memorize it. I will quiz you about the %s afterwards.\n"
            : "Some special magic %ss are hidden within the following text. Make sure to memorize it. I will quiz you about the %ss "
              "afterwards.\n",
        items, items);
    for (int64_t i = 0; i <= n_units; i++) {
        for (int j = 0; j < n_needles; j++) {
            if (at[j] != i) continue;
            if (t->needles_only)
                put_needle(context, t, seed, 0, 0);
            else
                put_needle(context, t, seed, j / t->n_values, j);
            put(context, "%s", between);
        }
        if (i == n_units) break;
        put_unit(context, t, s, first, seed, i);
        put(context, "%s", i + 1 < n_units ? between : "\n");
    }
    for (int j = 0; j < t->n_queries; j++) {
        make_key(t, seed, j, text);
        snprintf(queries + strlen(queries), sizeof queries - strlen(queries), "%s%s",
                 j == 0                  ? ""
                 : j + 1 == t->n_queries ? ", and "
                                         : ", ",
                 text);
        for (int v = 0; v < t->n_values; v++) {
            make_value(t, seed, j * t->n_values + v, text);
            keep_answer(out, context, text);
        }
    }
    put(question,
        one ? "What is the special magic %s for %s mentioned in the provided text?"
            : "What are all the special magic %ss for %s mentioned in the provided text?",
        items, queries);
    put(prefix,
        one ? " The special magic %s for %s mentioned in the provided text is"
            : " The special magic %ss for %s mentioned in the provided text are",
        items, queries);
}

/* ---- variable tracking ---- */

enum { HOPS = 4, NAME = 5 };

static void put_chain(writer *w, char names[HOPS + 1][NAME + 1], unsigned value, int64_t n_units, random_state *r)
{
    int64_t at[HOPS + 1];
    for (int i = 0; i <= HOPS; i++) { /* in order: a variable is assigned after the one it takes */
        at[i] = (int64_t)random_below(r, (uint64_t)n_units + 1);
        for (int j = i; j > 0 && at[j] < at[j - 1]; j--) {
            const int64_t swap = at[j];
            at[j] = at[j - 1];
            at[j - 1] = swap;
        }
    }
    for (int64_t i = 0; i <= n_units; i++) {
        for (int j = 0; j <= HOPS; j++) {
            if (at[j] != i) continue;
            if (j == 0)
                put(w, "VAR %s = %u\n", names[0], value);
            else
                put(w, "VAR %s = VAR %s\n", names[j], names[j - 1]);
        }
        if (i < n_units) put(w, "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n");
    }
}

static void draw_names(char names[HOPS + 1][NAME + 1], random_state *r)
{
    for (int i = 0; i <= HOPS; i++) {
        bool again;
        do {
            again = false;
            for (int j = 0; j < NAME; j++) names[i][j] = (char)('A' + (int)random_below(r, 26));
            names[i][NAME] = '\0';
            for (int j = 0; j < i; j++) again |= strcmp(names[i], names[j]) == 0;
        } while (again);
    }
}

static void put_vt(writer *w, char names[HOPS + 1][NAME + 1], unsigned value, int64_t n_units, random_state *r)
{
    put(w, "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n");
    put_chain(w, names, value, n_units, r);
}

static const char vt_prefix[] =
    " Answer: According to the chain(s) of variable assignment in the text above, %d variables are assigned the value %u, they are: ";

/* With one worked example in front, as published. */
static void write_vt(int64_t n_units, uint64_t seed, ruler_sample *out, writer *context, writer *question, writer *prefix)
{
    enum { EXAMPLE_UNITS = 5 };
    char names[HOPS + 1][NAME + 1];
    random_state r;
    random_seed(&r, seed);
    unsigned value = 10000 + (unsigned)random_below(&r, 90000);
    draw_names(names, &r);
    put_vt(context, names, value, EXAMPLE_UNITS, &r);
    put(context, "Question: Find all variables that are assigned the value %u in the text above.", value);
    put(context, vt_prefix, HOPS + 1, value);
    for (int i = 0; i <= HOPS; i++) put(context, "%s%s", names[i], i < HOPS ? " " : "\n\n");
    value = 10000 + (unsigned)random_below(&r, 90000);
    draw_names(names, &r);
    put_vt(context, names, value, n_units, &r);
    put(question, "Question: Find all variables that are assigned the value %u in the text above.", value);
    put(prefix, vt_prefix, HOPS + 1, value);
    for (int i = 0; i <= HOPS; i++) keep_answer(out, context, names[i]);
}

/* ---- common words ---- */

enum { COMMON = 10 };

static void shuffle(int32_t *x, int64_t n, random_state *r)
{
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)random_below(r, (uint64_t)i + 1);
        const int32_t swap = x[i];
        x[i] = x[j];
        x[j] = swap;
    }
}

/* A numbered list of n words, the first COMMON of order[] so often and the others so often. */
static void put_list(writer *w, const ruler_source *s, const int32_t *order, int64_t n, int often, int seldom, random_state *r)
{
    const int64_t total = COMMON * often + (n - COMMON) * seldom;
    int32_t *list = memory_alloc((size_t)total, sizeof *list, "word list", w->error);
    if (!list) {
        w->code = QUARRY_ERROR_MEMORY;
        return;
    }
    int64_t k = 0;
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < (i < COMMON ? often : seldom); j++) list[k++] = order[i];
    shuffle(list, total, r);
    put(w, "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
           "often.\n");
    for (int64_t i = 0; i < total; i++) put(w, "%lld. %s%s", (long long)i + 1, s->words[list[i]], i + 1 < total ? " " : "\n");
    memory_free(list);
}

static const char cwe_question[] = "Question: What are the 10 most common words in the above list?";
static const char cwe_prefix[] = " Answer: The top 10 words that appear most often in the list are:";

static void write_cwe(const ruler_source *s, int64_t n_units, int64_t n_tokens, uint64_t seed, ruler_sample *out, writer *context,
                      writer *question, writer *prefix)
{
    const bool small = n_tokens < 4096;
    const int64_t n_example = small ? 20 : 40;
    int32_t *order = memory_alloc((size_t)s->n_words, sizeof *order, "words", context->error);
    random_state r;
    random_seed(&r, seed);
    if (!order) {
        context->code = QUARRY_ERROR_MEMORY;
        return;
    }
    for (int64_t i = 0; i < s->n_words; i++) order[i] = (int32_t)i;
    shuffle(order, s->n_words, &r);
    const int32_t *example = order + s->n_words - n_example; /* words that the question does not have */
    put_list(context, s, example, n_example, small ? 3 : 10, small ? 1 : 3, &r);
    put(context, "%s%s", cwe_question, cwe_prefix);
    for (int i = 0; i < COMMON; i++) put(context, " %d. %s", i + 1, s->words[example[i]]);
    put(context, "\n\n");
    put_list(context, s, order, n_units, small ? 6 : 30, small ? 1 : 3, &r);
    put(question, "%s", cwe_question);
    put(prefix, "%s", cwe_prefix);
    for (int i = 0; i < COMMON; i++) keep_answer(out, context, s->words[order[i]]);
    memory_free(order);
}

/* ---- frequent words ---- */

/* n_units coded words: rank k of the vocabulary occurs n_units k^-2 / zeta(2) times; the first rank is dots. */
static void write_fwe(int64_t n_units, int64_t n_tokens, uint64_t seed, ruler_sample *out, writer *context, writer *question,
                      writer *prefix)
{
    enum { LETTERS = 6, ASKED = 3, LEAST = 8 };
    const double zeta = 1.6449340668482264; /* zeta(2) */
    const int64_t vocabulary = n_tokens / 50 > LEAST ? n_tokens / 50 : LEAST;
    char(*words)[LETTERS + 1] = memory_zero((size_t)vocabulary, sizeof *words, "coded words", context->error);
    int32_t *list = memory_alloc((size_t)n_units + 1, sizeof *list, "coded words", context->error);
    random_state r;
    random_seed(&r, seed);
    if (!words || !list) context->code = QUARRY_ERROR_MEMORY;
    for (int64_t i = 1; i < vocabulary && context->code == QUARRY_OK; i++) {
        bool again;
        do {
            again = false;
            for (int j = 0; j < LETTERS; j++) words[i][j] = (char)('a' + (int)random_below(&r, 26));
            for (int64_t j = 1; j < i; j++) again |= strcmp(words[i], words[j]) == 0;
        } while (again);
    }
    if (context->code == QUARRY_OK) {
        int64_t n = 0;
        strcpy(words[0], "...");
        for (int64_t k = 0; k < vocabulary; k++)
            for (int64_t j = 0; j < (int64_t)((double)n_units / zeta / (double)((k + 1) * (k + 1))) && n < n_units; j++)
                list[n++] = (int32_t)k;
        shuffle(list, n, &r);
        put(context,
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
            "words. ");
        for (int64_t i = 0; i < n; i++) put(context, "%s%s", words[list[i]], i + 1 < n ? " " : "\n");
        for (int i = 1; i <= ASKED; i++) keep_answer(out, context, words[i]);
    }
    put(question,
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in "
        "the above coded text?");
    put(prefix, " Answer: According to the coded text above, the three most frequently appeared words are:");
    memory_free(words);
    memory_free(list);
}

/* ---- the door ---- */

quarry_code ruler_generate(int task, const ruler_source *source, int64_t n_units, int64_t n_tokens, uint64_t seed, ruler_sample *out,
                           int64_t *n_used, quarry_error *error)
{
    writer context = {.error = error}, question = {.error = error}, prefix = {.error = error};
    const int64_t spare = 40, most = task == CWE ? source->n_words - spare : INT64_MAX;
    *out = (ruler_sample){0};
    if (n_units > most) n_units = most;
    *n_used = n_units;
    if (ruler_tasks[task].needs_text && (source->n_sentences < 2 || most < COMMON + 1))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s needs a text with more sentences and words (-f FILE)", ruler_tasks[task].name);
    if (task == CWE && n_units <= COMMON) n_units = *n_used = COMMON + 1;
    switch (task) {
    case VT: write_vt(n_units, seed, out, &context, &question, &prefix); break;
    case CWE: write_cwe(source, n_units, n_tokens, seed, out, &context, &question, &prefix); break;
    case FWE: write_fwe(n_units, n_tokens, seed, out, &context, &question, &prefix); break;
    default: write_niah(task, source, n_units, seed, out, &context, &question, &prefix);
    }
    out->context = context.text;
    out->question = question.text;
    out->prefix = prefix.text;
    const quarry_code code = context.code != QUARRY_OK ? context.code : question.code != QUARRY_OK ? question.code : prefix.code;
    if (code != QUARRY_OK) ruler_sample_free(out);
    return code;
}

void ruler_sample_free(ruler_sample *s)
{
    memory_free(s->context);
    memory_free(s->question);
    memory_free(s->prefix);
    for (int i = 0; i < s->n_answers; i++) memory_free(s->answers[i]);
    *s = (ruler_sample){0};
}

static bool contains(const char *text, const char *word)
{
    const size_t n = strlen(word);
    for (; *text; text++) {
        size_t i = 0;
        while (i < n && text[i] && tolower((unsigned char)text[i]) == tolower((unsigned char)word[i])) i++;
        if (i == n) return true;
    }
    return false;
}

double ruler_score(const ruler_sample *s, const char *text)
{
    int found = 0;
    for (int i = 0; i < s->n_answers; i++) found += contains(text, s->answers[i]);
    return s->n_answers ? (double)found / s->n_answers : 0;
}
