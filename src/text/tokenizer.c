#include "text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- lists ---- */

void token_list_free(token_list *list)
{
    memory_free(list->ids);
    *list = (token_list){0};
}

quarry_code token_list_push(token_list *list, int32_t id, quarry_error *error)
{
    if (list->n == list->capacity) {
        int64_t capacity = list->capacity < 64 ? 64 : list->capacity + list->capacity / 2;
        quarry_code code = memory_grow(&list->ids, (size_t)capacity, sizeof *list->ids, "tokens", error);
        if (code != QUARRY_OK) return code;
        list->capacity = capacity;
    }
    list->ids[list->n++] = id;
    return QUARRY_OK;
}

/* ---- creation ---- */

/* Model and pre-tokenizer; QUARRY_ERROR_UNSUPPORTED names both. */
static quarry_code read_kind(tokenizer *t, const gguf_file *g, quarry_error *error)
{
    const char *model = gguf_string(g, "tokenizer.ggml.model", NULL), *pre = gguf_string(g, "tokenizer.ggml.pre", NULL);
    if (!model) return error_set(error, QUARRY_ERROR_FORMAT, "%s: no tokenizer (tokenizer.ggml.model is missing)", gguf_path(g));
    if (!pre) pre = "default";
    t->sentencepiece = strcmp(model, "llama") == 0;
    t->add_space_prefix = t->sentencepiece;
    t->add_bos = t->sentencepiece;
    if (!t->sentencepiece && (strcmp(model, "gpt2") != 0 || !pretokenizer_find(pre, &t->pre, &t->ignore_merges, &t->add_bos)))
        return error_set(error, QUARRY_ERROR_UNSUPPORTED,
                         "%s: tokenizer model \"%.60s\" with pre-tokenizer \"%.60s\" is not supported; supported are \"llama\", and "
                         "\"gpt2\" with smollm, qwen2, llama-bpe or gpt-2",
                         gguf_path(g), model, pre);
    const char *shown = t->sentencepiece ? "" : pre;
    size_t n = strlen(model) + strlen(shown) + 2;
    t->name = memory_alloc(n, 1, "tokenizer name", error);
    if (!t->name) return QUARRY_ERROR_MEMORY;
    snprintf(t->name, n, *shown ? "%s/%s" : "%s%s", model, shown);
    return QUARRY_OK;
}

/* A special token's id; an id outside the vocabulary counts as absent. */
static int32_t read_id(const tokenizer *t, const gguf_file *g, const char *key, int32_t def)
{
    int64_t id = gguf_int(g, key, def);
    if (id < 0 || id >= t->vocab.n) id = def;
    return id < t->vocab.n ? (int32_t)id : -1;
}

static void read_special_ids(tokenizer *t, const gguf_file *g)
{
    t->bos = read_id(t, g, "tokenizer.ggml.bos_token_id", t->sentencepiece ? 1 : -1);
    t->eos = read_id(t, g, "tokenizer.ggml.eos_token_id", t->sentencepiece ? 2 : -1);
    t->unknown = read_id(t, g, "tokenizer.ggml.unknown_token_id", t->sentencepiece ? 0 : -1);
    t->add_bos = gguf_bool(g, "tokenizer.ggml.add_bos_token", t->add_bos) && t->bos >= 0;
    t->add_eos = gguf_bool(g, "tokenizer.ggml.add_eos_token", false) && t->eos >= 0;
    t->add_space_prefix = gguf_bool(g, "tokenizer.ggml.add_space_prefix", t->add_space_prefix) && t->sentencepiece;
    int32_t ends[] = {t->eos, read_id(t, g, "tokenizer.ggml.eot_token_id", -1), read_id(t, g, "tokenizer.ggml.eom_token_id", -1)};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (ends[i] >= 0) t->vocab.ends[ends[i]] = true;
    const char *model_name = gguf_string(g, "general.name", NULL);
    t->strip_after_special = t->sentencepiece && model_name && (strcasestr(model_name, "phi-3") || strcasestr(model_name, "phi3"));
}

/* Most vocabularies have spaces only at the front of pieces, so that a text falls into words; Gemma's has one piece that crosses a space. */
static void find_bytes_before_spaces(tokenizer *t)
{
    for (int64_t id = 0; id < t->vocab.n; id++) {
        size_t n;
        const char *bytes = vocab_bytes(&t->vocab, (int32_t)id, &n);
        for (size_t i = 1; i < n; i++)
            if (bytes[i] == ' ' && t->vocab.type[id] != PIECE_CONTROL && t->vocab.type[id] != PIECE_USER)
                t->before_space[(unsigned char)bytes[i - 1]] = true;
    }
}

tokenizer *tokenizer_create(const gguf_file *g, quarry_error *error)
{
    tokenizer *t = memory_zero(1, sizeof *t, "tokenizer", error);
    if (!t) return NULL;
    quarry_code code;
    if ((code = read_kind(t, g, error)) != QUARRY_OK) goto done;
    if ((code = vocab_create(&t->vocab, g, t->sentencepiece, error)) != QUARRY_OK) goto done;
    read_special_ids(t, g);
    if (t->sentencepiece) find_bytes_before_spaces(t);
    code = gguf_metadata_error(g, error);
done:
    if (code == QUARRY_OK) return t;
    tokenizer_destroy(t);
    return NULL;
}

void tokenizer_destroy(tokenizer *t)
{
    if (!t) return;
    vocab_free(&t->vocab);
    memory_free(t->name);
    memory_free(t);
}

void tokenizer_tally(const tokenizer *t, memory_tally *tally)
{
    memory_tally_add(tally, t, sizeof *t);
    vocab_tally(&t->vocab, tally);
}

/* ---- encoding ---- */

static quarry_code encode_words(const tokenizer *t, merger *m, const char *text, size_t n, token_list *list, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (size_t i = 0; i < n && code == QUARRY_OK;) {
        size_t end = pretokenizer_next(t->pre, text, n, i);
        code = merger_encode(m, t, text + i, end - i, list, error);
        i = end;
    }
    return code;
}

/* SentencePiece: m->text becomes the text with U+2581 as spaces (they are the same to it), after a space if prefix. */
static quarry_code normalize_spaces(merger *m, const char *text, size_t n, bool prefix, size_t *n_out, quarry_error *error)
{
    if (n + 1 > m->text_capacity) {
        quarry_code code = memory_grow(&m->text, n + 1, 1, "text being tokenised", error);
        if (code != QUARRY_OK) return code;
        m->text_capacity = n + 1;
    }
    size_t count = 0;
    if (prefix) m->text[count++] = ' ';
    for (size_t i = 0; i < n; i++) {
        bool space = n - i >= 3 && memcmp(text + i, "\u2581", 3) == 0;
        m->text[count++] = space ? ' ' : text[i];
        if (space) i += 2;
    }
    *n_out = count;
    return QUARRY_OK;
}

static quarry_code encode_sentencepiece(const tokenizer *t, merger *m, const char *text, size_t n, bool prefix, token_list *list,
                                        quarry_error *error)
{
    size_t n_text;
    quarry_code code = normalize_spaces(m, text, n, prefix, &n_text, error);
    for (size_t i = 0; i < n_text && code == QUARRY_OK;) {
        size_t end = i + 1;
        while (end < n_text && (m->text[end] != ' ' || t->before_space[(unsigned char)m->text[end - 1]])) end++;
        code = merger_encode(m, t, m->text + i, end - i, list, error);
        i = end;
    }
    return code;
}

static quarry_code encode_run(const tokenizer *t, merger *m, const char *text, size_t n, bool *at_start, token_list *list,
                              quarry_error *error)
{
    if (n == 0) return QUARRY_OK;
    bool prefix = *at_start && t->add_space_prefix;
    *at_start = false;
    return t->sentencepiece ? encode_sentencepiece(t, m, text, n, prefix, list, error) : encode_words(t, m, text, n, list, error);
}

static bool takes_space_after(const tokenizer *t, int32_t id)
{
    if (!t->strip_after_special || id == t->bos) return false;
    static const char *const exceptions[] = {"<unk>", "<s>", "<|endoftext|>"};
    size_t n;
    const char *bytes = vocab_bytes(&t->vocab, id, &n);
    for (size_t i = 0; i < sizeof exceptions / sizeof *exceptions; i++)
        if (strlen(exceptions[i]) == n && memcmp(bytes, exceptions[i], n) == 0) return false;
    return true;
}

static quarry_code encode_part(const tokenizer *t, merger *m, const char *text, size_t n, bool with_special, bool *at_start,
                               token_list *list, quarry_error *error)
{
    quarry_code code;
    size_t run = 0, length = 0;
    for (size_t i = 0; i < n;) {
        int32_t id = vocab_special(&t->vocab, text + i, n - i, with_special, &length);
        if (id < 0) {
            i++;
            continue;
        }
        if ((code = encode_run(t, m, text + run, i - run, at_start, list, error)) != QUARRY_OK) return code;
        if ((code = token_list_push(list, id, error)) != QUARRY_OK) return code;
        *at_start = true;
        i += length;
        while (takes_space_after(t, id) && i < n && (text[i] == ' ' || (text[i] >= '\t' && text[i] <= '\r'))) i++;
        run = i;
    }
    return encode_run(t, m, text + run, n - run, at_start, list, error);
}

quarry_code tokenizer_encode_part(const tokenizer *t, const char *text, size_t n_bytes, bool with_special, bool *at_start, token_list *list,
                                  quarry_error *error)
{
    if (n_bytes >= INT32_MAX)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "text of %zu bytes is too long for one call, at most %d", n_bytes, INT32_MAX - 1);
    merger m = {0};
    quarry_code code = encode_part(t, &m, text, n_bytes, with_special, at_start, list, error);
    merger_free(&m);
    return code;
}

quarry_code tokenizer_encode(const tokenizer *t, const char *text, size_t n_bytes, int flags, token_list *list, quarry_error *error)
{
    int64_t n_before = list->n;
    bool at_start = true;
    quarry_code code = QUARRY_OK;
    if (flags & TOKENIZE_ADD_BOS && t->add_bos) code = token_list_push(list, t->bos, error);
    if (code == QUARRY_OK) code = tokenizer_encode_part(t, text, n_bytes, flags & TOKENIZE_SPECIAL, &at_start, list, error);
    if (code == QUARRY_OK && flags & TOKENIZE_ADD_BOS && t->add_eos) code = token_list_push(list, t->eos, error);
    if (code != QUARRY_OK) list->n = n_before;
    return code;
}

/* ---- pieces ---- */

const char *tokenizer_token_bytes(const tokenizer *t, int32_t id, size_t *n_bytes)
{
    *n_bytes = 0;
    return id < 0 || id >= t->vocab.n ? NULL : vocab_bytes(&t->vocab, id, n_bytes);
}

bool tokenizer_is_special(const tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->vocab.n && (t->vocab.type[id] == PIECE_CONTROL || t->vocab.type[id] == PIECE_UNKNOWN);
}

bool tokenizer_is_end(const tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->vocab.n && t->vocab.ends[id];
}

int32_t tokenizer_find(const tokenizer *t, const char *piece)
{
    return vocab_find(&t->vocab, piece, strlen(piece), true);
}

int64_t tokenizer_size(const tokenizer *t)
{
    return t->vocab.n;
}

int32_t tokenizer_bos(const tokenizer *t)
{
    return t->bos;
}

int32_t tokenizer_eos(const tokenizer *t)
{
    return t->eos;
}

const char *tokenizer_name(const tokenizer *t)
{
    return t->name;
}

/* ---- decoding ---- */

void detokenizer_start(detokenizer *d)
{
    *d = (detokenizer){.at_start = true};
}

#define REPLACEMENT "\xEF\xBF\xBD"

/* How many bytes a character with this first byte has; 0: it begins none. */
static int character_length(unsigned char c)
{
    return c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
}

/* May byte c follow n >= 1 pending bytes? The second byte rules out overlong forms, surrogates and what lies above U+10FFFF. */
static bool continues(const char *pending, int n, unsigned char c)
{
    if ((c & 0xC0) != 0x80) return false;
    unsigned char first = (unsigned char)pending[0];
    if (n > 1) return true;
    return !((first == 0xE0 && c < 0xA0) || (first == 0xED && c > 0x9F) || (first == 0xF0 && c < 0x90) || (first == 0xF4 && c > 0x8F));
}

/* A replacement character, unless the bytes still to come would then not fit. */
static size_t put_replacement(char *out, size_t n_out, size_t capacity, size_t to_come)
{
    if (n_out + 3 + to_come > capacity) return n_out;
    memcpy(out + n_out, REPLACEMENT, 3);
    return n_out + 3;
}

size_t detokenizer_push(detokenizer *d, const tokenizer *t, int32_t id, char *out, size_t capacity)
{
    size_t n, n_out = 0;
    const char *bytes = tokenizer_token_bytes(t, id, &n);
    if (!bytes || n == 0 || tokenizer_is_special(t, id)) return 0;
    size_t i = d->at_start && t->add_space_prefix && bytes[0] == ' ';
    d->at_start = false;
    while (i < n) {
        unsigned char c = (unsigned char)bytes[i];
        if (d->n_pending > 0 && !continues(d->pending, d->n_pending, c)) {
            n_out = put_replacement(out, n_out, capacity, n - i);
            d->n_pending = 0;
        }
        i++;
        if (d->n_pending == 0 && character_length(c) == 0) {
            n_out = put_replacement(out, n_out, capacity, n - i);
            continue;
        }
        d->pending[d->n_pending++] = (char)c;
        if (d->n_pending < character_length((unsigned char)d->pending[0])) continue;
        if (n_out + (size_t)d->n_pending <= capacity) {
            memcpy(out + n_out, d->pending, (size_t)d->n_pending);
            n_out += (size_t)d->n_pending;
        }
        d->n_pending = 0;
    }
    return n_out;
}

size_t detokenizer_finish(detokenizer *d, char *out, size_t capacity)
{
    size_t n_out = d->n_pending > 0 ? put_replacement(out, 0, capacity, 0) : 0;
    d->n_pending = 0;
    return n_out;
}
