/* How the rows that decode steps select lie in the cache, and come again:
 *
 *     bench_overlap MODEL TEXT DEPTH [STEPS]
 *
 * Reads DEPTH tokens of the text, feeds those that follow one by one under the default policy, and prints, as means over steps (from the 9th on) and parts (layer, KV head): rows selected; blocks of a stored
 * context's size that they lie in, with rows in the order of the text and in that of the index's clusters; the share that the step before, and one of the eight before, selected as well. What a cache of rows
 * on disk can hope for (docs/context-format.md). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gen/session.h"

enum { BLOCK = 4096, WARM = 8, STEPS = 64 };

typedef struct overlap {
    const attn_policy *policy;
    int64_t n, block; /* positions; rows of a block */
    int32_t *slot;    /* [parts][n] where the token's row lies in a stored context */
    int32_t *last;    /* [parts][n] step that selected it last, from 1 on */
    uint8_t *seen;    /* [n] scratch: one thread */
    int32_t step;
    double parts, rows, in_text, in_clusters, again, again_soon;
} overlap;

static void find_slots(overlap *o)
{
    const attn_policy *p = o->policy;
    const attn_saving *saving = p->type->saving;
    for (int part = 0; part < p->shape.kv.n_layer * p->shape.kv.n_head_kv; part++) {
        int32_t *slot = o->slot + part * o->n;
        for (int64_t i = 0; i < o->n; i++) slot[i] = (int32_t)i;
        for (int64_t i = 0; i < saving->n_segments(p); i++) {
            const attn_saved_segment s = saving->segment(p, i);
            const uint16_t *order = saving->order(p, i, part / p->shape.kv.n_head_kv, part % p->shape.kv.n_head_kv);
            for (int64_t k = 0; order && k < s.n; k++) slot[s.first + order[k]] = (int32_t)(s.first + k);
        }
    }
}

static double count_blocks(overlap *o, const attn_selection *selected, const int32_t *slot)
{
    double n = 0;
    memset(o->seen, 0, (size_t)o->n);
    for (int64_t i = 0; i < selected->n; i++) {
        uint8_t *seen = &o->seen[(slot ? slot[selected->ids[i]] : selected->ids[i]) / o->block];
        n += !*seen;
        *seen = 1;
    }
    return n;
}

static void on_reading(void *data, const attn_reading *r, arena *scratch)
{
    (void)scratch;
    overlap *o = data;
    const int part = r->layer * o->policy->shape.kv.n_head_kv + r->head;
    const attn_selection *selected = r->selected;
    if (selected->all) return;
    if (o->step > WARM) {
        o->parts++;
        o->rows += (double)selected->n;
        o->in_text += count_blocks(o, selected, NULL);
        o->in_clusters += count_blocks(o, selected, o->slot + part * o->n);
    }
    for (int64_t i = 0; i < selected->n; i++) {
        int32_t *last = &o->last[part * o->n + selected->ids[i]];
        if (o->step > WARM) {
            o->again += *last == o->step - 1;
            o->again_soon += *last && *last >= o->step - WARM;
        }
        *last = o->step;
    }
}

int main(int argc, char **argv)
{
    quarry_error error;
    if (argc < 4) return fprintf(stderr, "usage: %s MODEL TEXT DEPTH [STEPS]\n", argv[0]), 2;
    const int64_t depth = atoll(argv[3]), steps = argc > 4 ? atoll(argv[4]) : STEPS;
    quarry_model *m = quarry_model_open(argv[1], &(quarry_model_params){.n_threads = 1}, &error);
    size_t n_bytes;
    char *text = m ? file_read_all(argv[2], &n_bytes, &error) : NULL;
    int32_t *tokens = NULL;
    const int64_t n_tokens = text ? quarry_tokenize(m, text, n_bytes, true, &tokens, &error) : -1;
    quarry_session *s = n_tokens >= 0 ? quarry_session_open(m, NULL, &error) : NULL;
    if (s && n_tokens < depth + steps) return fprintf(stderr, "%s: has only %lld tokens\n", argv[2], (long long)n_tokens), 1;
    if (!s || quarry_session_read(s, tokens, depth, NULL, &error)) return fprintf(stderr, "%s\n", error.message), 1;
    overlap o = {.policy = s->policies[0], .n = depth + steps};
    const kv_shape *kv = &o.policy->shape.kv;
    const size_t cells = (size_t)(kv->n_layer * kv->n_head_kv) * (size_t)o.n;
    o.block = BLOCK / (int64_t)kv_row_bytes(kv->type, kv->head_dim);
    o.slot = malloc(cells * sizeof *o.slot);
    o.last = calloc(cells, sizeof *o.last);
    o.seen = malloc((size_t)o.n);
    if (!o.slot || !o.last || !o.seen || o.block < 1) return fprintf(stderr, "no memory, or rows larger than a block\n"), 1;
    find_slots(&o);
    session_set_observer(s, &(attn_observer){on_reading, &o});
    for (o.step = 1; o.step <= steps; o.step++)
        if (quarry_session_feed(s, tokens + depth + o.step - 1, 1, NULL, &error)) return fprintf(stderr, "%s\n", error.message), 1;
    printf("%s, %lld tokens: of a part's rows %.1f are selected, in %.1f blocks of %lld in the order of the text, in %.1f in that of "
           "clusters, of %lld; %.1f %% were by the step before, %.1f %% by one of %d\n",
           argv[2], (long long)depth, o.rows / o.parts, o.in_text / o.parts, (long long)o.block, o.in_clusters / o.parts,
           (long long)(depth / o.block), 100 * o.again / o.rows, 100 * o.again_soon / o.rows, WARM);
    quarry_session_close(s);
    quarry_free(tokens);
    memory_free(text);
    quarry_model_close(m);
    free(o.slot);
    free(o.last);
    free(o.seen);
    return 0;
}
