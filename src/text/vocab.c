#include "text/vocab.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "text/unicode.h"

#define TOKENS "tokenizer.ggml.tokens"
#define SCORES "tokenizer.ggml.scores"
#define TYPES "tokenizer.ggml.token_type"
#define MERGES "tokenizer.ggml.merges"

/* Tokens whose text says that an answer ends there, whatever their type. Those of the second list are ordinary text in some vocabularies: they count unless the file says so. */
static const char *const end_texts[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>",        "<end_of_turn>",      "<|endoftext|>",
    "<|eom_id|>", "<EOT>",      "_<EOT>",  "[EOT]",      "<|end_of_text|>", "<end_of_utterance>", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
};
static const char *const typed_end_texts[] = {"</s>", "<eos>", "[EOS]"};

/* ---- bytes ---- */

/* The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 for itself, the others in order from U+0100; -1 if none. */
static int alphabet_byte(uint32_t cp)
{
    if ((cp >= '!' && cp <= '~') || (cp >= 0xA1 && cp <= 0xFF && cp != 0xAD)) return (int)cp;
    if (cp < 0x100) return -1;
    if (cp <= 0x120) return (int)(cp - 0x100);
    if (cp <= 0x142) return (int)(cp - 0x121) + 0x7F;
    return cp == 0x143 ? 0xAD : -1;
}

/* Decodes a byte-level piece into out[n] and returns its length; one with a character outside the alphabet stays as it is, and *literal is set. */
static size_t decode_alphabet(const char *text, size_t n, char *out, bool *literal)
{
    size_t n_out = 0;
    *literal = false;
    for (size_t i = 0; i < n && !*literal;) {
        uint32_t cp;
        i += utf8_decode(text + i, n - i, &cp);
        int byte = cp == UTF8_INVALID ? -1 : alphabet_byte(cp);
        out[n_out++] = (char)byte;
        *literal = byte < 0;
    }
    if (!*literal) return n_out;
    memcpy(out, text, n);
    return n;
}

static size_t decode_spaces(const char *text, size_t n, char *out)
{
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) {
        bool space = n - i >= 3 && memcmp(text + i, "\u2581", 3) == 0;
        out[n_out++] = space ? ' ' : text[i];
        if (space) i += 2;
    }
    return n_out;
}

static int hex_digit(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The byte that "<0xNN>" writes, or -1. */
static int written_byte(const char *text, size_t n)
{
    if (n != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    int high = hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high << 4 | low;
}

/* ---- hashes ---- */

static uint64_t mix(uint64_t h)
{
    h ^= h >> 32;
    h *= 0x9FB21C651E98DF25u;
    return h ^ h >> 29;
}

static uint64_t hash_bytes(const char *bytes, size_t n)
{
    uint64_t h = n * 0x9E3779B97F4A7C15u;
    for (; n >= 8; bytes += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, bytes, 8);
        h = mix(h ^ word) * 0xD6E8FEB86659FD93u;
    }
    uint64_t word = 0;
    memcpy(&word, bytes, n);
    return mix(h ^ word);
}

static uint64_t hash_pair(int32_t left, int32_t right)
{
    return mix(((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0xD6E8FEB86659FD93u);
}

/* Slots for n entries, at most half full. */
static size_t slot_count(size_t n)
{
    size_t slots = 16;
    while (slots < 2 * n) slots *= 2;
    return slots;
}

/* SentencePiece merges text in which spaces are U+2581: user-defined pieces, which are kept as they are written, are not reached across a space. */
static bool text_can_become(const vocab *v, int64_t id)
{
    if (v->sentencepiece && v->type[id] == PIECE_USER) return !memchr(v->bytes + v->begin[id], ' ', v->begin[id + 1] - v->begin[id]);
    return v->type[id] == PIECE_NORMAL || v->type[id] == PIECE_USER || v->type[id] == PIECE_UNUSED;
}

int32_t vocab_find(const vocab *v, const char *bytes, size_t n, bool control)
{
    if (n == 0 || (!control && n > v->longest)) return -1;
    for (size_t i = hash_bytes(bytes, n) & (v->n_slots - 1);; i = (i + 1) & (v->n_slots - 1)) {
        int32_t id = v->slots[i];
        if (id < 0) return -1;
        size_t n_piece;
        const char *piece = vocab_bytes(v, id, &n_piece);
        if (n_piece == n && memcmp(piece, bytes, n) == 0 && (control || text_can_become(v, id))) return id;
    }
}

static quarry_code index_pieces(vocab *v, quarry_error *error)
{
    v->n_slots = slot_count((size_t)v->n);
    v->slots = memory_alloc(v->n_slots, sizeof *v->slots, "vocabulary index", error);
    if (!v->slots) return QUARRY_ERROR_MEMORY;
    for (size_t i = 0; i < v->n_slots; i++) v->slots[i] = -1;
    for (int64_t id = 0; id < v->n; id++) {
        size_t n;
        const char *bytes = vocab_bytes(v, (int32_t)id, &n);
        if (n == 0 || v->type[id] == PIECE_BYTE) continue;
        /* of equal pieces the first counts; a second would only make probing long */
        if (vocab_find(v, bytes, n, !text_can_become(v, id)) >= 0) continue;
        size_t i = hash_bytes(bytes, n) & (v->n_slots - 1);
        while (v->slots[i] >= 0) i = (i + 1) & (v->n_slots - 1);
        v->slots[i] = (int32_t)id;
        if (text_can_become(v, id) && n > v->longest) v->longest = n;
    }
    return QUARRY_OK;
}

/* ---- merges ---- */

const merge *vocab_merge(const vocab *v, int32_t left, int32_t right)
{
    for (size_t i = hash_pair(left, right) & (v->n_merge_slots - 1);; i = (i + 1) & (v->n_merge_slots - 1)) {
        const merge *m = &v->merges[i];
        if (m->left < 0) return NULL;
        if (m->left == left && m->right == right) return m;
    }
}

/* Parses merge number `rank`, "left right" in the byte alphabet. Merges of unknown pieces, or into one, can never apply. */
static bool parse_merge(const vocab *v, const char *text, size_t n, int64_t rank, char *buffer, merge *m)
{
    const char *space = n > 1 ? memchr(text + 1, ' ', n - 1) : NULL;
    if (!space) return false;
    size_t n_left = (size_t)(space - text);
    bool literal[2];
    size_t n_first = decode_alphabet(text, n_left, buffer, &literal[0]);
    size_t n_second = decode_alphabet(space + 1, n - n_left - 1, buffer + n_first, &literal[1]);
    if (literal[0] || literal[1]) return false;
    m->left = vocab_find(v, buffer, n_first, false);
    m->right = vocab_find(v, buffer + n_first, n_second, false);
    m->id = vocab_find(v, buffer, n_first + n_second, false);
    m->rank = (int32_t)rank;
    return m->left >= 0 && m->right >= 0 && m->id >= 0;
}

static quarry_code read_merges(vocab *v, const gguf_file *g, quarry_error *error)
{
    int64_t n = gguf_array(g, MERGES, GGUF_STRING);
    if (n < 0 || n > INT32_MAX)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: %s is missing or too long: a byte-level tokenizer needs merges", gguf_path(g),
                         MERGES);
    v->n_merge_slots = slot_count((size_t)n);
    v->merges = memory_alloc(v->n_merge_slots, sizeof *v->merges, "merges", error);
    if (!v->merges) return QUARRY_ERROR_MEMORY;
    for (size_t i = 0; i < v->n_merge_slots; i++) v->merges[i].left = -1;
    char *buffer = NULL;
    size_t capacity = 0;
    quarry_code code = QUARRY_OK;
    for (int64_t rank = 0; rank < n; rank++) {
        size_t n_text;
        const char *text = gguf_array_string(g, MERGES, rank, &n_text);
        if (!text) continue;
        if (n_text > capacity) {
            if ((code = memory_grow(&buffer, n_text + 64, 1, "merge", error)) != QUARRY_OK) goto done;
            capacity = n_text + 64;
        }
        merge m;
        if (!parse_merge(v, text, n_text, rank, buffer, &m) || vocab_merge(v, m.left, m.right)) continue;
        size_t i = hash_pair(m.left, m.right) & (v->n_merge_slots - 1);
        while (v->merges[i].left >= 0) i = (i + 1) & (v->n_merge_slots - 1);
        v->merges[i] = m;
    }
done:
    memory_free(buffer);
    return code;
}

/* ---- scores ---- */

/* Scores as integers whose order is the order of merging: highest score first, NaN last. */
static uint32_t score_order(float score)
{
    if (isnan(score)) return VOCAB_NO_RANK - 1;
    score += 0.0f; /* -0 is 0 */
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~(bits | 1u << 31);
}

static quarry_code read_scores(vocab *v, const gguf_file *g, quarry_error *error)
{
    gguf_value_kind kind = gguf_array(g, SCORES, GGUF_FLOAT) >= 0 ? GGUF_FLOAT : GGUF_INT;
    if (gguf_array(g, SCORES, kind) < v->n)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: %s has fewer entries than %s", gguf_path(g), SCORES, TOKENS);
    v->order = memory_alloc((size_t)v->n, sizeof *v->order, "token scores", error);
    if (!v->order) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < v->n; i++)
        v->order[i] = score_order(kind == GGUF_FLOAT ? (float)gguf_array_float(g, SCORES, i) : (float)gguf_array_int(g, SCORES, i));
    return QUARRY_OK;
}

/* ---- special tokens ---- */

static int special_compare(const void *left, const void *right)
{
    const special *a = left, *b = right;
    size_t n = a->n < b->n ? a->n : b->n;
    int order = memcmp(a->text, b->text, n);
    if (order != 0) return order;
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static bool is_special(const vocab *v, int64_t id)
{
    return v->begin[id + 1] > v->begin[id] && (v->type[id] == PIECE_CONTROL || v->type[id] == PIECE_USER || v->type[id] == PIECE_UNKNOWN);
}

static quarry_code index_specials(vocab *v, quarry_error *error)
{
    for (int64_t id = 0; id < v->n; id++) v->n_specials += is_special(v, id);
    v->specials = memory_alloc(v->n_specials, sizeof *v->specials, "special tokens", error);
    if (!v->specials) return QUARRY_ERROR_MEMORY;
    size_t n = 0;
    for (int64_t id = 0; id < v->n; id++)
        if (is_special(v, id)) v->specials[n++] = (special){v->bytes + v->begin[id], v->begin[id + 1] - v->begin[id], (int32_t)id};
    if (n > 0) qsort(v->specials, n, sizeof *v->specials, special_compare);
    size_t i = 0;
    for (int b = 0; b < 256; b++) {
        v->special_first[b] = i;
        while (i < n && (unsigned char)v->specials[i].text[0] == b) i++;
    }
    v->special_first[256] = n;
    return QUARRY_OK;
}

/* First of specials [from, to), which agree in bytes [0, depth) and are longer than that, whose byte at depth is >= byte. */
static size_t special_bound(const vocab *v, size_t from, size_t to, size_t depth, int byte)
{
    while (from < to) {
        size_t middle = from + (to - from) / 2;
        if ((unsigned char)v->specials[middle].text[depth] < byte)
            from = middle + 1;
        else
            to = middle;
    }
    return from;
}

int32_t vocab_special(const vocab *v, const char *text, size_t n, bool control, size_t *length)
{
    int32_t best = -1;
    size_t from = v->special_first[(unsigned char)text[0]], to = v->special_first[(unsigned char)text[0] + 1];
    for (size_t depth = 1; from < to; depth++) {
        for (bool first = true; from < to && v->specials[from].n == depth; from++) {
            int32_t id = v->specials[from].id;
            if (!first || (!control && v->type[id] != PIECE_USER)) continue;
            first = false;
            best = id;
            *length = depth;
        }
        if (depth == n) break;
        int byte = (unsigned char)text[depth];
        from = special_bound(v, from, to, depth, byte);
        to = special_bound(v, from, to, depth, byte + 1);
    }
    return best;
}

/* ---- reading ---- */

static void piece_read(vocab *v, int64_t id, const char *text, size_t n, size_t *end)
{
    char *out = v->bytes + *end;
    int byte = v->type[id] == PIECE_BYTE ? written_byte(text, n) : -1;
    v->begin[id] = *end;
    if (byte >= 0) {
        *out = (char)byte;
        *end += 1;
        if (v->byte_ids[byte] < 0) v->byte_ids[byte] = (int32_t)id;
    } else if (v->type[id] == PIECE_CONTROL || v->type[id] == PIECE_USER || v->type[id] == PIECE_UNKNOWN) {
        memcpy(out, text, n);
        *end += n;
    } else if (v->sentencepiece) {
        *end += decode_spaces(text, n, out);
    } else {
        bool literal;
        *end += decode_alphabet(text, n, out, &literal);
        if (literal) v->type[id] = PIECE_LITERAL;
    }
}

static bool equals_any(const char *bytes, size_t n, const char *const *texts, size_t n_texts)
{
    for (size_t i = 0; i < n_texts; i++)
        if (strlen(texts[i]) == n && memcmp(texts[i], bytes, n) == 0) return true;
    return false;
}

static void piece_type_read(vocab *v, int64_t id, int64_t type, const char *text, size_t n)
{
    v->type[id] = type >= PIECE_NORMAL && type <= PIECE_BYTE ? (uint8_t)type : PIECE_NORMAL;
    v->ends[id] = equals_any(text, n, end_texts, sizeof end_texts / sizeof *end_texts) ||
                  (v->type[id] != PIECE_NORMAL && equals_any(text, n, typed_end_texts, sizeof typed_end_texts / sizeof *typed_end_texts));
    if (v->ends[id]) v->type[id] = PIECE_CONTROL;
}

static quarry_code read_pieces(vocab *v, const gguf_file *g, quarry_error *error)
{
    v->n = gguf_array(g, TOKENS, GGUF_STRING);
    if (v->n <= 0 || v->n > INT32_MAX - 1)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: %s is missing, empty or too long", gguf_path(g), TOKENS);
    int64_t n_types = gguf_array(g, TYPES, GGUF_INT);
    if (n_types >= 0 && n_types < v->n)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: %s has fewer entries than %s", gguf_path(g), TYPES, TOKENS);
    size_t n_bytes = 0, n;
    for (int64_t id = 0; id < v->n; id++) n_bytes += gguf_array_string(g, TOKENS, id, &n) ? n : 0;
    v->bytes = memory_alloc(n_bytes, 1, "vocabulary", error);
    v->begin = memory_alloc((size_t)v->n + 1, sizeof *v->begin, "vocabulary", error);
    v->type = memory_alloc((size_t)v->n, sizeof *v->type, "vocabulary", error);
    v->ends = memory_zero((size_t)v->n, sizeof *v->ends, "vocabulary", error);
    if (!v->bytes || !v->begin || !v->type || !v->ends) return QUARRY_ERROR_MEMORY;
    size_t end = 0;
    for (int64_t id = 0; id < v->n; id++) {
        const char *text = gguf_array_string(g, TOKENS, id, &n);
        if (!text) text = "", n = 0;
        piece_type_read(v, id, n_types >= 0 ? gguf_array_int(g, TYPES, id) : PIECE_NORMAL, text, n);
        piece_read(v, id, text, n, &end);
    }
    v->begin[v->n] = end;
    return QUARRY_OK;
}

quarry_code vocab_create(vocab *v, const gguf_file *g, bool sentencepiece, quarry_error *error)
{
    *v = (vocab){.sentencepiece = sentencepiece};
    for (int b = 0; b < 256; b++) v->byte_ids[b] = -1;
    quarry_code code;
    if ((code = read_pieces(v, g, error)) != QUARRY_OK) goto done;
    if ((code = index_pieces(v, error)) != QUARRY_OK) goto done;
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        if (v->byte_ids[b] < 0) v->byte_ids[b] = vocab_find(v, &byte, 1, false);
    }
    if ((code = sentencepiece ? read_scores(v, g, error) : read_merges(v, g, error)) != QUARRY_OK) goto done;
    code = index_specials(v, error);
done:
    if (code != QUARRY_OK) vocab_free(v);
    return code;
}

void vocab_free(vocab *v)
{
    memory_free(v->bytes);
    memory_free(v->begin);
    memory_free(v->type);
    memory_free(v->ends);
    memory_free(v->order);
    memory_free(v->slots);
    memory_free(v->merges);
    memory_free(v->specials);
    *v = (vocab){0};
}

void vocab_tally(const vocab *v, memory_tally *tally)
{
    const size_t n = (size_t)v->n;
    memory_tally_add(tally, v->bytes, v->begin[n]);
    memory_tally_add(tally, v->begin, (n + 1) * sizeof *v->begin);
    memory_tally_add(tally, v->type, n * sizeof *v->type);
    memory_tally_add(tally, v->ends, n * sizeof *v->ends);
    memory_tally_add(tally, v->order, n * sizeof *v->order);
    memory_tally_add(tally, v->slots, v->n_slots * sizeof *v->slots);
    memory_tally_add(tally, v->merges, v->n_merge_slots * sizeof *v->merges);
    memory_tally_add(tally, v->specials, v->n_specials * sizeof *v->specials);
}
