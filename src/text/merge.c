/* Byte-pair merging: the pair of neighbours with the lowest rank, leftmost first, is joined until none joins. A binary heap holds the
 * candidates, so a word of n bytes takes O(n log n) whatever it is; entries that were overtaken are dropped when they come up. */
#include "text/tokenizer.h"

#include <string.h>

#include "text/unicode.h"

void merger_free(merger *m)
{
    memory_free(m->symbols);
    memory_free(m->heap);
    memory_free(m->text);
    *m = (merger){0};
}

/* ---- heap of rank << 32 | index of the left symbol ---- */

static void heap_push(merger *m, uint64_t key)
{
    size_t i = m->n_heap++;
    for (; i > 0 && m->heap[(i - 1) / 2] > key; i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = key;
}

static uint64_t heap_pop(merger *m)
{
    uint64_t top = m->heap[0], key = m->heap[--m->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= m->n_heap) break;
        if (child + 1 < m->n_heap && m->heap[child + 1] < m->heap[child]) child++;
        if (m->heap[child] >= key) break;
        m->heap[i] = m->heap[child];
        i = child;
    }
    m->heap[i] = key;
    return top;
}

/* ---- merging ---- */

/* Finds out how symbol i joins the next one. */
static void pair_update(merger *m, const tokenizer *t, const char *word, int32_t i)
{
    symbol *left = &m->symbols[i];
    left->rank = VOCAB_NO_RANK;
    if (left->next < 0) return;
    const symbol *right = &m->symbols[left->next];
    if (t->sentencepiece) {
        left->joined = vocab_find(&t->vocab, word + left->begin, (size_t)left->n + right->n, false);
        if (left->joined >= 0) left->rank = t->vocab.order[left->joined];
    } else {
        const merge *found = vocab_merge(&t->vocab, left->id, right->id);
        if (found) {
            left->joined = found->id;
            left->rank = (uint32_t)found->rank;
        }
    }
    if (left->rank != VOCAB_NO_RANK) heap_push(m, (uint64_t)left->rank << 32 | (uint32_t)i);
}

static void symbols_merge(merger *m, const tokenizer *t, const char *word, size_t n_symbols)
{
    m->n_heap = 0;
    for (size_t i = 0; i + 1 < n_symbols; i++) pair_update(m, t, word, (int32_t)i);
    while (m->n_heap > 0) {
        uint64_t key = heap_pop(m);
        int32_t i = (int32_t)(key & UINT32_MAX);
        symbol *left = &m->symbols[i];
        if (left->n == 0 || left->rank != key >> 32) continue;
        symbol *right = &m->symbols[left->next];
        left->id = left->joined;
        left->n += right->n;
        left->next = right->next;
        right->n = 0;
        if (left->next >= 0) m->symbols[left->next].prev = i;
        pair_update(m, t, word, i);
        if (left->prev >= 0) pair_update(m, t, word, left->prev);
    }
}

/* ---- words ---- */

static quarry_code merger_reserve(merger *m, size_t n_symbols, quarry_error *error)
{
    if (n_symbols <= m->symbol_capacity) return QUARRY_OK;
    size_t capacity = n_symbols + n_symbols / 2 + 64;
    quarry_code code = memory_grow(&m->symbols, capacity, sizeof *m->symbols, "words being tokenised", error);
    /* n - 1 pairs at first, and at most two more for each of at most n - 1 merges that takes one away */
    if (code == QUARRY_OK) code = memory_grow(&m->heap, 2 * capacity, sizeof *m->heap, "words being tokenised", error);
    if (code == QUARRY_OK) m->symbol_capacity = capacity;
    return code;
}

/* Byte-level BPE starts from bytes, SentencePiece from characters. */
static size_t symbols_start(merger *m, const tokenizer *t, const char *word, size_t n)
{
    int32_t count = 0;
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        size_t length = t->sentencepiece ? utf8_decode(word + i, n - i, &cp) : 1;
        int32_t id = t->sentencepiece ? vocab_find(&t->vocab, word + i, length, false) : t->vocab.byte_ids[(unsigned char)word[i]];
        /* a byte that the vocabulary cannot write is left out, as Hugging Face does without an unknown token */
        if (t->sentencepiece || id >= 0) {
            m->symbols[count] = (symbol){
                .begin = (uint32_t)i, .n = (uint32_t)length, .id = id, .prev = count - 1, .next = count + 1, .rank = VOCAB_NO_RANK};
            count++;
        }
        i += length;
    }
    if (count > 0) m->symbols[count - 1].next = -1;
    return (size_t)count;
}

/* A symbol that is no piece is a single character: its bytes. */
static quarry_code push_bytes(const tokenizer *t, const char *bytes, size_t n, token_list *list, quarry_error *error)
{
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->vocab.byte_ids[(unsigned char)bytes[i]];
        if (id < 0) id = t->unknown;
        quarry_code code = id < 0 ? QUARRY_OK : token_list_push(list, id, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}

quarry_code merger_encode(merger *m, const tokenizer *t, const char *word, size_t n, token_list *list, quarry_error *error)
{
    if (t->ignore_merges) {
        int32_t id = vocab_find(&t->vocab, word, n, false);
        if (id >= 0) return token_list_push(list, id, error);
    }
    quarry_code code = merger_reserve(m, n, error);
    if (code != QUARRY_OK) return code;
    size_t n_symbols = symbols_start(m, t, word, n);
    if (n_symbols == 0) return QUARRY_OK;
    symbols_merge(m, t, word, n_symbols);
    for (int32_t i = 0; i >= 0; i = m->symbols[i].next) {
        const symbol *s = &m->symbols[i];
        code = s->id >= 0 ? token_list_push(list, s->id, error) : push_bytes(t, word + s->begin, s->n, list, error);
        if (code != QUARRY_OK) return code;
    }
    return QUARRY_OK;
}
