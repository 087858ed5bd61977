#include "gen/passages.h"

#include <stdlib.h>
#include <string.h>

enum {
    CUT_AT_LINE = 400, /* bytes from which on a sentence ends with its line, */
    CUT_AT_SPACE = 600,
    CUT_ANYWHERE = 800,
    PASSAGE_BYTES = 1000, /* a passage of several sentences is no longer */
};

#define LEAST_SHARE 0.01   /* of a passage */
#define NEIGHBOUR_PART 0.5 /* of the best sentence's weight that its neighbours need to join it */

/* ---- sentences ---- */

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}

static bool starts_with(const char *text, size_t n, const char *word)
{
    const size_t length = strlen(word);
    return n >= length && memcmp(text, word, length) == 0;
}

static bool is_letter(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* True if the full stop at `at` belongs to a title, an initial or the number of an item, which begins the sentence. */
static bool is_abbreviation(const char *text, size_t first, size_t at)
{
    static const char *const words[] = {"Mr", "Mrs", "Ms", "Dr", "St", "Messrs", "No", "vs", "cf", "e.g", "i.e"};
    size_t start = at;
    while (start > first && text[start - 1] >= '0' && text[start - 1] <= '9') start--;
    if (start < at && (start == first || text[start - 1] == '\n')) return true;
    start = at;
    while (start > first && (is_letter(text[start - 1]) || text[start - 1] == '.')) start--;
    const size_t n = at - start;
    if (n == 1 && text[start] != 'I') return is_letter(text[start]);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (n == strlen(words[i]) && memcmp(text + start, words[i], n) == 0) return true;
    return false;
}

/* Bytes of the sentence mark at text[at] with the closing quotes and brackets after it; 0 if there is none. */
static size_t mark_length(const char *text, size_t n_bytes, size_t first, size_t at)
{
    static const char *const wide[] = {"。", "！", "？"}, *const closing[] = {"\"", "'", ")", "]", "_", "*", "”", "’", "»"};
    const char *here = text + at;
    const size_t n = n_bytes - at;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (starts_with(here, n, wide[i])) return strlen(wide[i]);
    if ((*here != '.' && *here != '!' && *here != '?') || (*here == '.' && is_abbreviation(text, first, at))) return 0;
    size_t length = 1;
    for (size_t i = 0; i < sizeof closing / sizeof *closing && length < n; i++) {
        if (!starts_with(here + length, n - length, closing[i])) continue;
        length += strlen(closing[i]);
        i = (size_t)-1; /* from the first again: several may close */
    }
    return length == n || is_space(here[length]) ? length : 0;
}

/* True if the line that begins at text[at] is blank or opens an item, a heading, a table's row or a quotation. */
static bool line_stands_apart(const char *text, size_t n_bytes, size_t at)
{
    while (at < n_bytes && (text[at] == ' ' || text[at] == '\t' || text[at] == '\r')) at++;
    if (at == n_bytes || text[at] == '\n') return true;
    if (strchr("#|>", text[at])) return true;
    if (strchr("-*+", text[at])) return at + 1 < n_bytes && text[at + 1] == ' ';
    size_t digits = 0;
    while (at + digits < n_bytes && digits < 4 && text[at + digits] >= '0' && text[at + digits] <= '9') digits++;
    return digits && at + digits + 1 < n_bytes && (text[at + digits] == '.' || text[at + digits] == ')') && text[at + digits + 1] == ' ';
}

static size_t skip_space(const char *text, size_t n_bytes, size_t at)
{
    while (at < n_bytes && is_space(text[at])) at++;
    return at;
}

size_t sentence_end(const char *text, size_t n_bytes, size_t first)
{
    const size_t start = skip_space(text, n_bytes, first);
    for (size_t at = start; at < n_bytes; at++) {
        const size_t length = at - first, mark = mark_length(text, n_bytes, first, at);
        if (mark) return skip_space(text, n_bytes, at + mark);
        if (text[at] == '\n' && (length >= CUT_AT_LINE || text[start] == '#' || line_stands_apart(text, n_bytes, at + 1)))
            return skip_space(text, n_bytes, at);
        if (is_space(text[at]) && length >= CUT_AT_SPACE) return skip_space(text, n_bytes, at);
        if (length >= CUT_ANYWHERE && ((unsigned char)text[at] & 0xC0) != 0x80) return at;
    }
    return n_bytes;
}

/* ---- sentences with weights ---- */

typedef struct sentence {
    int source;
    size_t first, end;
    double weight;
    bool taken;
} sentence;

typedef struct sentence_list {
    sentence *items;
    size_t n, capacity;
} sentence_list;

static quarry_code sentence_push(sentence_list *list, const sentence *s, quarry_error *error)
{
    if (list->n == list->capacity) {
        const size_t capacity = list->capacity ? 2 * list->capacity : 256;
        const quarry_code code = memory_grow(&list->items, capacity, sizeof *list->items, "sentences", error);
        if (code != QUARRY_OK) return code;
        list->capacity = capacity;
    }
    list->items[list->n++] = *s;
    return QUARRY_OK;
}

/* A token counts where its first character that is no white space lies: most begin with the space before a word. */
static quarry_code sentences_weigh(sentence_list *list, const passage_source *source, int index, quarry_error *error)
{
    int64_t token = 0;
    for (size_t first = 0, end; first < source->n_bytes; first = end) {
        end = sentence_end(source->text, source->n_bytes, first);
        sentence s = {.source = index, .first = first, .end = end};
        for (; token < source->n_tokens; token++) {
            const size_t limit = token + 1 < source->n_tokens ? source->starts[token + 1] : source->n_bytes;
            size_t at = skip_space(source->text, limit, source->starts[token]);
            if (at == limit) at = source->starts[token]; /* nothing but white space: with what precedes it */
            if (at >= end) break;
            s.weight += source->weights[token];
        }
        const quarry_code code = sentence_push(list, &s, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

/* ---- passages ---- */

/* The heaviest sentence that is not taken; n if none has weight. Of equals the first. */
static size_t heaviest(const sentence_list *list)
{
    size_t best = list->n;
    for (size_t i = 0; i < list->n; i++)
        if (!list->items[i].taken && list->items[i].weight > (best < list->n ? list->items[best].weight : 0)) best = i;
    return best;
}

static bool joins(const sentence *s, const sentence *best)
{
    return !s->taken && s->source == best->source && s->weight >= NEIGHBOUR_PART * best->weight;
}

/* The sentence and its neighbours, marked as taken; the bytes without white space at the ends. share is the weight. */
static quarry_citation passage_take(sentence_list *list, size_t best, const passage_source *sources)
{
    sentence *s = list->items;
    size_t low = best, high = best;
    for (bool grew = true; grew;) {
        grew = false;
        if (low > 0 && joins(&s[low - 1], &s[best]) && s[high].end - s[low - 1].first <= PASSAGE_BYTES) low--, grew = true;
        if (high + 1 < list->n && joins(&s[high + 1], &s[best]) && s[high + 1].end - s[low].first <= PASSAGE_BYTES) high++, grew = true;
    }
    quarry_citation c = {.document = s[best].source, .first_byte = s[low].first, .end_byte = s[high].end};
    for (size_t i = low; i <= high; i++) {
        c.share += s[i].weight;
        s[i].taken = true;
    }
    const char *text = sources[c.document].text;
    c.first_byte = skip_space(text, c.end_byte, c.first_byte);
    while (c.end_byte > c.first_byte && is_space(text[c.end_byte - 1])) c.end_byte--;
    return c;
}

static int64_t line_of(const char *text, size_t at)
{
    int64_t line = 1;
    for (const char *p = text; (p = memchr(p, '\n', at - (size_t)(p - text))); p++) line++;
    return line;
}

static int by_share(const void *a, const void *b)
{
    const quarry_citation *x = a, *y = b;
    if (x->share != y->share) return x->share > y->share ? -1 : 1;
    if (x->document != y->document) return x->document - y->document;
    return x->first_byte < y->first_byte ? -1 : x->first_byte > y->first_byte;
}

int64_t passages_find(const passage_source *sources, int n_sources, int64_t max, quarry_citation **out, quarry_error *error)
{
    sentence_list list = {0};
    quarry_citation *found = NULL;
    int64_t n = 0;
    double total = 0;
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < n_sources && code == QUARRY_OK; i++) code = sentences_weigh(&list, &sources[i], i, error);
    if (code != QUARRY_OK) goto done;
    for (size_t i = 0; i < list.n; i++) total += list.items[i].weight;
    if (max > (int64_t)list.n) max = (int64_t)list.n;
    if (!(found = memory_alloc(max > 0 ? (size_t)max : 0, sizeof *found, "citations", error))) {
        code = QUARRY_ERROR_MEMORY;
        goto done;
    }
    for (size_t best; n < max && (best = heaviest(&list)) < list.n;) {
        quarry_citation c = passage_take(&list, best, sources);
        c.share /= total;
        if (c.share < LEAST_SHARE) break;
        c.first_line = line_of(sources[c.document].text, c.first_byte);
        c.last_line = line_of(sources[c.document].text, c.end_byte > c.first_byte ? c.end_byte - 1 : c.end_byte);
        found[n++] = c;
    }
    qsort(found, (size_t)n, sizeof *found, by_share);
    *out = found;
done:
    memory_free(list.items);
    return code == QUARRY_OK ? n : code;
}
