#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdatomic.h>

#include "store/piece_format.h"

/* One piece on its way to its file. */
typedef struct writer {
    const piece_source *source;
    piece_header header;
    piece_layout layout;
    attn_saved_segment *segments; /* [n_segments] */
    uint8_t *records;             /* from table_end on, up to state_at */
    arena *scratch;
    atomic_bool out_of_memory;
} writer;

/* Position of row i of a part of region r. */
static int64_t position_of(const writer *w, int64_t r, const uint16_t *order, int64_t i)
{
    if (r < w->header.n_segments) return w->segments[r].first + (order ? order[i] : i);
    return r == w->header.n_segments ? piece_loose_position(&w->header, i) : w->layout.local_first + i;
}

static const uint16_t *order_of(const writer *w, int64_t r, int layer, int head)
{
    const attn_policy *p = w->source->policy;
    if (r >= w->header.n_segments || !p->type->saving->order) return NULL;
    return p->type->saving->order(p, w->source->first_segment + r, layer, head);
}

/* Rows of part `part` of region r in the file's order, with zeros behind them, to out[rows_bytes]. */
static void gather(const writer *w, int64_t r, int part, uint8_t *out)
{
    const piece_region *region = &w->layout.regions[r];
    const int heads = w->header.subject.kv.n_head_kv, local = r > w->header.n_segments ? w->header.subject.kv.n_layer : 0;
    const int layer = local + part / heads, head = part % heads;
    const uint16_t *order = order_of(w, r, layer, head);
    const size_t row = w->layout.row_bytes, used = (size_t)region->n_rows * row;
    for (int64_t i = 0; i < region->n_rows; i++)
        memcpy(out + (size_t)i * row, kv_row(w->source->kv, layer, head, position_of(w, r, order, i)), row);
    memset(out + used, 0, (size_t)region->rows_bytes - used);
}

/* The part that a task is about. */
static bool find_part(const writer *w, int64_t task, int64_t *r, int *part)
{
    for (*r = 0; *r < w->layout.n_regions; ++*r) {
        if (task < w->layout.regions[*r].n_parts) {
            *part = (int)task;
            return true;
        }
        task -= w->layout.regions[*r].n_parts;
    }
    return false;
}

static int64_t count_parts(const writer *w)
{
    int64_t n = 0;
    for (int64_t r = 0; r < w->layout.n_regions; r++) n += w->layout.regions[r].n_parts;
    return n;
}

/* Makes one record. */
static void record_task(void *context, int64_t task, int thread)
{
    writer *w = context;
    int64_t r;
    int part;
    if (!find_part(w, task, &r, &part)) return;
    const piece_region *region = &w->layout.regions[r];
    const attn_policy *p = w->source->policy;
    arena *scratch = &w->scratch[thread];
    arena_reset(scratch);
    uint8_t *rows = arena_alloc(scratch, (size_t)region->rows_bytes, 1, NULL);
    if (!rows) {
        atomic_store(&w->out_of_memory, true);
        return;
    }
    uint8_t *const record = w->records + (region->record_at - w->layout.table_end) + (uint64_t)part * region->record_bytes;
    uint8_t *out = record, *const checksum = record + region->record_bytes - 8;
    if (r < w->header.n_segments) {
        const int layer = part / w->header.subject.kv.n_head_kv, head = part % w->header.subject.kv.n_head_kv;
        const uint16_t *order = order_of(w, r, layer, head);
        for (int64_t i = 0; i < region->n_rows; i++, out += 2) put16(out, order ? order[i] : (uint16_t)i);
        p->type->saving->save_part(p, w->source->first_segment + r, layer, head, out);
        out += w->segments[r].part_bytes;
    }
    gather(w, r, part, rows);
    for (int64_t b = 0; b < region->n_blocks; b++, out += 8)
        put64(out, XXH3_64bits(rows + (uint64_t)b * w->layout.block_bytes, w->layout.block_bytes));
    memset(out, 0, (size_t)(checksum - out));
    put64(checksum, XXH3_64bits(record, (size_t)(checksum - record)));
}

/* What is to be written, and where it will lie. */
static quarry_code plan(writer *w, quarry_error *error)
{
    const piece_source *s = w->source;
    const attn_saving *saving = s->policy->type->saving;
    piece_header *h = &w->header;
    h->subject = s->subject;
    h->key = piece_key_of(&s->subject, s->tokens);
    h->created = s->created;
    h->n_segments = saving->n_segments(s->policy) - s->first_segment;
    h->state_bytes = saving->state_bytes(s->policy);
    strncat(h->about, s->about ? s->about : "", PIECE_ABOUT_TEXT - 1);
    if (!(w->segments = memory_zero((size_t)h->n_segments, sizeof *w->segments, "saved context", error))) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < h->n_segments; i++) w->segments[i] = saving->segment(s->policy, s->first_segment + i);
    const int64_t all = s->first_segment + h->n_segments;
    const attn_saved_segment last = all ? saving->segment(s->policy, all - 1) : (attn_saved_segment){.n = ATTN_SINKS};
    h->segments_end = last.first + last.n;
    return piece_layout_make(&w->layout, h, w->segments, error);
}

/* Header, tokens and table. */
static quarry_code write_front(writer *w, file_writer *file, quarry_error *error)
{
    const piece_subject *s = &w->header.subject;
    const size_t size = (size_t)w->layout.table_end;
    uint8_t *front = memory_zero(size, 1, "saved context", error), *out;
    if (!front) return QUARRY_ERROR_MEMORY;
    piece_header_pack(&w->header, front);
    out = front + PIECE_HEADER;
    for (int64_t i = 0; i < s->end - s->first; i++, out += 4) put32(out, (uint32_t)w->source->tokens[i]);
    out = front + w->layout.table_at;
    for (int64_t i = 0; i < w->header.n_segments; i++, out += PIECE_SEGMENT) {
        put64(out, (uint64_t)w->segments[i].first);
        put64(out + 8, (uint64_t)w->segments[i].n);
        put64(out + 16, w->segments[i].part_bytes);
    }
    put64(front + size - 8, XXH3_64bits(front + PIECE_HEADER, size - 8 - PIECE_HEADER));
    quarry_code code = file_write_append(file, front, size, error);
    memory_free(front);
    return code;
}

static quarry_code write_state(writer *w, file_writer *file, quarry_error *error)
{
    const size_t size = (size_t)(w->layout.state_end - w->layout.state_at);
    uint8_t *state = memory_zero(size, 1, "saved context", error);
    if (!state) return QUARRY_ERROR_MEMORY;
    w->source->policy->type->saving->save_state(w->source->policy, state);
    put64(state + size - 8, XXH3_64bits(state, size - 8));
    quarry_code code = file_write_append(file, state, size, error);
    memory_free(state);
    return code;
}

static quarry_code write_rows(writer *w, file_writer *file, quarry_error *error)
{
    quarry_code code = QUARRY_OK;
    for (int64_t r = 0; r < w->layout.n_regions && code == QUARRY_OK; r++) {
        const piece_region *region = &w->layout.regions[r];
        arena_reset(&w->scratch[0]);
        uint8_t *rows = arena_alloc(&w->scratch[0], (size_t)region->rows_bytes, 1, error);
        if (!rows) return QUARRY_ERROR_MEMORY;
        for (int part = 0; part < region->n_parts && code == QUARRY_OK; part++) {
            gather(w, r, part, rows);
            code = file_write_append(file, rows, (size_t)region->rows_bytes, error);
        }
    }
    return code;
}

static quarry_code write_all(writer *w, file_writer *file, thread_pool *pool, quarry_error *error)
{
    const size_t n_records = (size_t)(w->layout.state_at - w->layout.table_end);
    if (!(w->records = memory_alloc(n_records, 1, "saved context", error))) return QUARRY_ERROR_MEMORY;
    thread_pool_run(pool, count_parts(w), record_task, w);
    if (atomic_load(&w->out_of_memory)) return error_memory(error, "saved context", n_records);
    quarry_code code = write_front(w, file, error);
    if (code == QUARRY_OK) code = file_write_append(file, w->records, n_records, error);
    if (code == QUARRY_OK) code = write_state(w, file, error);
    return code == QUARRY_OK ? write_rows(w, file, error) : code;
}

quarry_code piece_write(file_writer *file, const piece_source *source, thread_pool *pool, arena *scratch, quarry_error *error)
{
    writer w = {.source = source, .scratch = scratch};
    quarry_code code = plan(&w, error);
    if (code == QUARRY_ERROR_FORMAT) code = error_set(error, QUARRY_ERROR_UNSUPPORTED, "the context is too large for a file");
    if (code == QUARRY_OK) code = write_all(&w, file, pool, error);
    memory_free(w.segments);
    memory_free(w.layout.regions);
    memory_free(w.records);
    return code;
}
