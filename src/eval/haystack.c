#include "eval/eval.h"

#include <stdio.h>
#include <string.h>

/* Words that are a few tokens in every vocabulary and do not occur together in prose. */
static const char *const adjectives[] = {"amber",  "ancient", "brave",  "bright", "copper", "crimson", "curious", "distant",
                                         "eager",  "frosty",  "gentle", "golden", "hollow", "humble",  "ivory",   "jolly",
                                         "lively", "lucky",   "mellow", "mighty", "nimble", "pale",    "quiet",   "rapid",
                                         "rustic", "silent",  "silver", "steady", "tender", "velvet",  "vivid",   "wooden"};
static const char *const nouns[] = {"anchor",  "basket",  "beacon", "bridge",  "candle",  "canyon", "castle", "compass",
                                    "falcon",  "feather", "garden", "hammer",  "harbor",  "island", "kettle", "ladder",
                                    "lantern", "marble",  "meadow", "mirror",  "orchard", "pebble", "puzzle", "ribbon",
                                    "saddle",  "shelter", "signal", "spindle", "temple",  "tunnel", "violin", "window"};

enum { N_ADJECTIVES = sizeof adjectives / sizeof *adjectives, N_NOUNS = sizeof nouns / sizeof *nouns };

void haystack_key(uint64_t i, uint64_t seed, char *out, size_t capacity)
{
    enum { PAIRS = N_ADJECTIVES * N_NOUNS };
    const uint64_t pair = (i * 389 + seed * 157) % PAIRS, round = i / PAIRS; /* 389 has no factor in common with 32 x 32 */
    const int n = snprintf(out, capacity, "%s-%s", adjectives[pair / N_NOUNS], nouns[pair % N_NOUNS]);
    if (round > 0 && n > 0 && (size_t)n < capacity) snprintf(out + n, capacity - (size_t)n, "-%s", nouns[(round - 1) % N_NOUNS]);
}

static bool needle_is_new(const needle *needles, int n)
{
    for (int i = 0; i < n; i++)
        if (strcmp(needles[i].key, needles[n].key) == 0 || strcmp(needles[i].number, needles[n].number) == 0) return false;
    return true;
}

void needle_draw(needle *needles, int n, random_state *random)
{
    for (int i = 0; i < n; i++) {
        needle *s = &needles[i];
        do {
            const char *noun = nouns[random_below(random, N_NOUNS)], *adjective = adjectives[random_below(random, N_ADJECTIVES)];
            snprintf(s->key, sizeof s->key, "%s-%s", adjective, noun); /* drawn in statements: compilers differ in the order of arguments */
            snprintf(s->number, sizeof s->number, "%07u", 1000000u + (unsigned)random_below(random, 9000000));
        } while (!needle_is_new(needles, i));
        s->depth = (i + random_unit(random)) / n;
        s->at = -1;
    }
}

int needle_sentence(const needle *s, char *out, size_t capacity)
{
    return snprintf(out, capacity, " One of the special magic numbers for %s is: %s.", s->key, s->number);
}

int needle_question(const needle *s, char *out, size_t capacity)
{
    return snprintf(out, capacity, "\n\nWhat is the special magic number for %s mentioned in the provided text?", s->key);
}

int needle_answer_sentence(const needle *s, char *out, size_t capacity)
{
    return snprintf(out, capacity, "The special magic number for %s mentioned in the provided text is: %s", s->key, s->number);
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Length of the number at the beginning of text[n], commas between its digits included; 0 if it is another number. */
static size_t number_match(const char *number, const char *text, size_t n)
{
    size_t i = 0;
    for (size_t d = 0; number[d]; d++, i++) {
        if (d && i < n && text[i] == ',') i++;
        if (i >= n || text[i] != number[d]) return 0;
    }
    return i < n && is_digit(text[i]) ? 0 : i;
}

bool needle_answered(const needle *s, const char *answer, size_t n_bytes)
{
    for (size_t i = 0; i < n_bytes; i++)
        if ((i == 0 || !is_digit(answer[i - 1])) && number_match(s->number, answer + i, n_bytes - i)) return true;
    return false;
}

static bool piece_is_title(const char *piece, size_t n)
{
    static const char *const titles[] = {"Mr", "Mrs", "Ms", "Dr", "St", "Messrs"};
    if (n && *piece == ' ') piece++, n--;
    for (size_t i = 0; i < sizeof titles / sizeof *titles; i++)
        if (n == strlen(titles[i]) && memcmp(piece, titles[i], n) == 0) return true;
    return false;
}

static bool piece_ends_sentence(const char *piece, size_t n)
{
    while (n && strchr("\"'_)", piece[n - 1])) n--; /* closing quotes belong to the sentence */
    return n && (piece[n - 1] == '.' || piece[n - 1] == '!' || piece[n - 1] == '?');
}

void sentence_starts(const int32_t *tokens, int64_t n, token_text_fn text, const void *data, bool *starts)
{
    for (int64_t i = 0; i < n; i++) {
        size_t n_here, n_before, n_title = 0;
        const char *here = text(data, tokens[i], &n_here);
        starts[i] = false;
        if (i == 0 || n_here == 0 || (*here != ' ' && *here != '\n')) continue;
        const char *before = text(data, tokens[i - 1], &n_before);
        const char *title = i > 1 ? text(data, tokens[i - 2], &n_title) : "";
        starts[i] = piece_ends_sentence(before, n_before) && !piece_is_title(title, n_title);
    }
}

/* The sentence start in [first, end) nearest to target; target itself if there is none. */
static int64_t start_nearest(const bool *starts, int64_t first, int64_t end, int64_t target)
{
    for (int64_t r = 0; target - r >= first || target + r < end; r++) {
        if (target - r >= first && target - r < end && starts[target - r]) return target - r;
        if (target + r < end && starts[target + r]) return target + r;
    }
    return target;
}

bool haystack_build(const int32_t *text, const bool *starts, int64_t n_text, int64_t first, needle *needles, const token_list *sentences,
                    int n_needles, int32_t *out, int64_t n_tokens)
{
    int64_t n_hay = n_tokens, place[NEEDLE_MAX];
    int order[NEEDLE_MAX];
    if (n_needles > NEEDLE_MAX) return false;
    for (int i = 0; i < n_needles; i++) n_hay -= sentences[i].n;
    if (n_hay <= 0 || first < 0 || first > n_text || n_hay > n_text - first) return false;

    for (int i = 0; i < n_needles; i++) {
        const int64_t target = first + (int64_t)(needles[i].depth * (double)n_hay);
        place[i] = start_nearest(starts, first, first + n_hay, target);
        int j = i;
        for (; j > 0 && place[order[j - 1]] > place[i]; j--) order[j] = order[j - 1];
        order[j] = i;
    }

    int64_t from = first, to = 0;
    for (int i = 0; i <= n_needles; i++) {
        const int64_t end = i < n_needles ? place[order[i]] : first + n_hay;
        memcpy(out + to, text + from, (size_t)(end - from) * sizeof *out);
        to += end - from;
        from = end;
        if (i == n_needles) break;
        needles[order[i]].at = to;
        memcpy(out + to, sentences[order[i]].ids, (size_t)sentences[order[i]].n * sizeof *out);
        to += sentences[order[i]].n;
    }
    return true;
}
