#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdatomic.h>

#include "store/piece_format.h"
#include "store/tier.h"

/* ---- opening ---- */

quarry_code piece_damaged(const piece_file *p, const char *what, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged: %s", file_map_path(p->file), what);
}

/* Bytes [at, end) of the file into a new buffer; their checksum is in the last 8. */
static quarry_code read_section(const piece_file *p, uint64_t at, uint64_t end, const char *what, uint8_t **out, quarry_error *error)
{
    const size_t n = (size_t)(end - at);
    if (!(*out = memory_alloc(n, 1, "saved context", error))) return QUARRY_ERROR_MEMORY;
    quarry_code code = file_map_read(p->file, at, n, *out, error);
    if (code == QUARRY_OK && get64(*out + n - 8) != XXH3_64bits(*out, n - 8)) code = piece_damaged(p, what, error);
    return code;
}

/* The table of segments, before anything is known of it but its place: tokens and table are checked together. */
static quarry_code read_front(piece_file *p, quarry_error *error)
{
    const piece_header *h = &p->header;
    const int64_t n = h->subject.end - h->subject.first;
    uint64_t table;
    const uint64_t end = piece_front(h, &table);
    uint8_t *front = NULL;
    if (end > file_map_size(p->file)) return piece_damaged(p, "it is cut short", error);
    quarry_code code = read_section(p, PIECE_HEADER, end, "the checksum of its tokens is wrong", &front, error);
    p->tokens = memory_alloc((size_t)n, sizeof *p->tokens, "saved context", error);
    p->segments = memory_alloc((size_t)h->n_segments, sizeof *p->segments, "saved context", error);
    if (code == QUARRY_OK && (!p->tokens || !p->segments)) code = QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < n && code == QUARRY_OK; i++) p->tokens[i] = (int32_t)get32(front + 4 * i);
    for (int64_t i = 0; i < h->n_segments && code == QUARRY_OK; i++) {
        const uint8_t *at = front + (table - PIECE_HEADER) + i * PIECE_SEGMENT;
        p->segments[i] = (attn_saved_segment){(int64_t)get64(at), (int64_t)get64(at + 8), get64(at + 16)};
    }
    memory_free(front);
    return code;
}

/* Segments follow each other and end where the header says. */
static bool segments_sound(const piece_file *p)
{
    const piece_header *h = &p->header;
    int64_t at = h->n_segments ? p->segments[0].first : h->segments_end;
    if (at < ATTN_SINKS || at > h->subject.end + ATTN_SINKS || (h->subject.first == 0 && at != ATTN_SINKS)) return false;
    for (int64_t i = 0; i < h->n_segments; i++) {
        const attn_saved_segment *s = &p->segments[i];
        if (s->first != at || s->n < 1 || s->n > UINT16_MAX + 1 || s->n > h->subject.end - at || s->part_bytes > INT32_MAX) return false;
        at += s->n;
    }
    return at == h->segments_end;
}

static quarry_code open_parts(piece_file *p, const char *path, quarry_error *error)
{
    uint8_t header[PIECE_HEADER];
    if (!(p->file = file_map_open(path, false, error))) return QUARRY_ERROR_IO;
    file_map_hold(p->file);
    if (file_map_size(p->file) < PIECE_HEADER) return error_set(error, QUARRY_ERROR_FORMAT, "%s: not a saved context", path);
    quarry_code code = file_map_read(p->file, 0, PIECE_HEADER, header, error);
    if (code == QUARRY_OK) code = piece_header_parse(&p->header, header, path, error);
    if (code == QUARRY_OK) code = read_front(p, error);
    if (code != QUARRY_OK) return code;
    if (!segments_sound(p)) return piece_damaged(p, "its segments are impossible", error);
    code = piece_layout_make(&p->layout, &p->header, p->segments, error);
    if (code == QUARRY_ERROR_FORMAT) return piece_damaged(p, "impossible sizes", error);
    if (code != QUARRY_OK) return code;
    if (p->layout.total != file_map_size(p->file)) return piece_damaged(p, "its size is wrong", error);
    const store_key key = piece_key_of(&p->header.subject, p->tokens);
    return store_key_same(&key, &p->header.key) ? QUARRY_OK : piece_damaged(p, "it is not what its key says", error);
}

piece_file *piece_open(const char *path, quarry_error *error)
{
    piece_file *p = memory_zero(1, sizeof *p, "saved context", error);
    if (p) atomic_init(&p->n_refs, 1);
    if (!p || open_parts(p, path, error) == QUARRY_OK) return p;
    piece_close(p);
    return NULL;
}

void piece_close(piece_file *p)
{
    if (!p || atomic_fetch_sub(&p->n_refs, 1) != 1) return;
    file_map_close(p->file);
    memory_free(p->layout.regions);
    memory_free(p->tokens);
    memory_free(p->segments);
    memory_free(p);
}

piece_file *piece_hold(piece_file *p)
{
    atomic_fetch_add(&p->n_refs, 1);
    return p;
}

const piece_subject *piece_subject_of(const piece_file *p)
{
    return &p->header.subject;
}

const store_key *piece_key_in(const piece_file *p)
{
    return &p->header.key;
}

const int32_t *piece_tokens(const piece_file *p)
{
    return p->tokens;
}

const char *piece_about(const piece_file *p)
{
    return p->header.about;
}

int64_t piece_created(const piece_file *p)
{
    return p->header.created;
}

uint64_t piece_bytes(const piece_file *p)
{
    return p->layout.total;
}

/* ---- parts ---- */

quarry_code piece_read_record(const piece_file *p, const piece_region *r, int part, uint8_t **record, arena *scratch, quarry_error *error)
{
    const size_t n = (size_t)r->record_bytes;
    if (!(*record = arena_alloc(scratch, n, 1, error))) return QUARRY_ERROR_MEMORY;
    quarry_code code = file_map_read(p->file, r->record_at + (uint64_t)part * n, n, *record, error);
    if (code == QUARRY_OK && get64(*record + n - 8) != XXH3_64bits(*record, n - 8))
        code = piece_damaged(p, "the checksum of a record of its index is wrong", error);
    return code;
}

/* Reads the first n_rows rows of a part, and checks them against its record. */
static quarry_code read_rows(const piece_file *p, const piece_region *r, int part, const uint8_t *record, int64_t n_rows, uint8_t **rows,
                             arena *scratch, quarry_error *error)
{
    const piece_layout *l = &p->layout;
    const int64_t n_blocks = (n_rows + l->block_rows - 1) / l->block_rows;
    const size_t n = (size_t)n_blocks * l->block_bytes;
    if (!(*rows = arena_alloc(scratch, n, 1, error))) return QUARRY_ERROR_MEMORY;
    quarry_code code = file_map_read(p->file, r->rows_at + (uint64_t)part * r->rows_bytes, n, *rows, error);
    for (int64_t b = 0; b < n_blocks && code == QUARRY_OK; b++)
        if (get64(record + r->extra + b * 8) != XXH3_64bits(*rows + (uint64_t)b * l->block_bytes, l->block_bytes))
            code = piece_damaged(p, "the checksum of a block of its keys and values is wrong", error);
    return code;
}

/* ---- loading a chain ---- */

typedef struct loader {
    piece_file *const *pieces;
    int n_pieces;
    kv_seq *kv;
    attn_policy *policy; /* NULL: the index is not wanted */
    tier *tier;          /* NULL: rows of segments are loaded too */
    arena *scratch;
    int64_t first_segment; /* of the piece at hand, in the policy */
    const piece_file *piece;
    atomic_int failed; /* quarry_code of the first failure */
    quarry_error *error;
    thread_pool *pool;
} loader;

/* Keeps the first failure of a parallel loop. */
static void fail(loader *l, quarry_code code, const quarry_error *error)
{
    int none = QUARRY_OK;
    if (atomic_compare_exchange_strong(&l->failed, &none, (int)code) && l->error) *l->error = *error;
}

static void place(const loader *l, int layer, int head, int64_t pos, const uint8_t *row)
{
    memcpy(kv_row(l->kv, layer, head, pos), row, l->piece->layout.row_bytes);
}

/* One part of one segment: its order and its rows, and what the policy keeps. */
static quarry_code load_part(loader *l, int64_t segment, int part, arena *scratch, quarry_error *error)
{
    const piece_file *p = l->piece;
    const piece_region *r = &p->layout.regions[segment];
    const int heads = p->header.subject.kv.n_head_kv, layer = part / heads, head = part % heads;
    uint8_t *record, *rows;
    quarry_code code = piece_read_record(p, r, part, &record, scratch, error);
    if (code == QUARRY_OK && !l->tier) code = read_rows(p, r, part, record, r->n_rows, &rows, scratch, error);
    if (code != QUARRY_OK) return code;
    uint16_t *order = arena_alloc(scratch, (size_t)r->n_rows, sizeof *order, error);
    uint8_t *seen = arena_alloc(scratch, (size_t)r->n_rows, 1, error);
    if (!order || !seen) return QUARRY_ERROR_MEMORY;
    memset(seen, 0, (size_t)r->n_rows);
    for (int64_t i = 0; i < r->n_rows; i++) {
        order[i] = get16(record + 2 * i);
        if (order[i] >= r->n_rows || seen[order[i]]) return piece_damaged(p, "the order of its rows is none", error);
        seen[order[i]] = 1;
        if (!l->tier) place(l, layer, head, p->segments[segment].first + order[i], rows + (uint64_t)i * p->layout.row_bytes);
    }
    if (l->tier) tier_take_sums(l->tier, l->first_segment + segment, part, record + r->extra);
    if (!l->policy) return QUARRY_OK;
    const attn_saving *saving = l->policy->type->saving;
    code = saving->load_part(l->policy, l->first_segment + segment, layer, head, order, record + 2 * r->n_rows);
    if (code == QUARRY_ERROR_FORMAT) return piece_damaged(p, "a record of its index is impossible", error);
    if (code == QUARRY_OK && !l->tier) saving->load_rows(l->policy, l->first_segment + segment, layer, head, l->kv, scratch);
    return code == QUARRY_ERROR_MEMORY ? error_memory(error, "saved context", 0) : code;
}

static void segment_task(void *context, int64_t task, int thread)
{
    loader *l = context;
    const int n_parts = l->piece->layout.regions[0].n_parts;
    quarry_error error;
    if (atomic_load(&l->failed)) return;
    arena_reset(&l->scratch[thread]);
    quarry_code code = load_part(l, task / n_parts, (int)(task % n_parts), &l->scratch[thread], &error);
    if (code != QUARRY_OK) fail(l, code, &error);
}

/* Rows of one part that are in order: loose ones (region n_segments), or a window's (the next one). `least`: of the window's, those before are not wanted. */
static quarry_code load_in_order(loader *l, int64_t region, int part, int64_t n_rows, int64_t least, arena *scratch, quarry_error *error)
{
    const piece_file *p = l->piece;
    const piece_region *r = &p->layout.regions[region];
    const bool local = region > p->header.n_segments;
    const int heads = p->header.subject.kv.n_head_kv, layer = part / heads + (local ? p->header.subject.kv.n_layer : 0);
    uint8_t *record, *rows;
    quarry_code code = piece_read_record(p, r, part, &record, scratch, error);
    if (code == QUARRY_OK) code = read_rows(p, r, part, record, n_rows, &rows, scratch, error);
    if (code != QUARRY_OK) return code;
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t pos = local ? p->layout.local_first + i : piece_loose_position(&p->header, i);
        if (pos >= least) place(l, layer, part % heads, pos, rows + (uint64_t)i * p->layout.row_bytes);
    }
    return QUARRY_OK;
}

/* Of the last piece all loose rows, of an earlier one the sinks; and what the last token's windows see. */
static void loose_task(void *context, int64_t task, int thread)
{
    loader *l = context;
    const piece_file *p = l->piece;
    const piece_region *loose = &p->layout.regions[p->header.n_segments], *local = loose + 1;
    const bool last = p == l->pieces[l->n_pieces - 1], is_local = task >= loose->n_parts;
    const int64_t least = is_local ? kv_local_kept(&p->header.subject.kv, kv_length(l->kv)) : 0;
    const int64_t n = is_local ? local->n_rows : last ? loose->n_rows : piece_loose_sinks(&p->header);
    quarry_error error;
    if (atomic_load(&l->failed) || n == 0 || (is_local && p->header.subject.end <= least)) return;
    arena_reset(&l->scratch[thread]);
    quarry_code code = load_in_order(l, p->header.n_segments + is_local, (int)(is_local ? task - loose->n_parts : task), n, least,
                                     &l->scratch[thread], &error);
    if (code != QUARRY_OK) fail(l, code, &error);
}

static void open_task(void *context, int64_t task, int thread)
{
    loader *l = context;
    const int heads = l->policy->shape.kv.n_head_kv;
    arena_reset(&l->scratch[thread]);
    l->policy->type->saving->load_rows(l->policy, l->first_segment, (int)(task / heads), (int)(task % heads), l->kv, &l->scratch[thread]);
}

static quarry_code load_piece(loader *l)
{
    const piece_file *p = l->piece;
    const piece_region *r = p->layout.regions;
    const int64_t n_segments = p->header.n_segments;
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; l->policy && i < n_segments && code == QUARRY_OK; i++)
        code = l->policy->type->saving->load_segment(l->policy, p->segments[i].n, p->segments[i].part_bytes, l->tier != NULL, l->error);
    if (code == QUARRY_ERROR_FORMAT) return piece_damaged(p, "a segment of its index is impossible", l->error);
    if (code != QUARRY_OK) return code;
    if (n_segments) thread_pool_run(l->pool, n_segments * r[0].n_parts, segment_task, l);
    thread_pool_run(l->pool, r[n_segments].n_parts + r[n_segments + 1].n_parts, loose_task, l);
    l->first_segment += n_segments;
    return (quarry_code)atomic_load(&l->failed);
}

static quarry_code load_state(loader *l)
{
    const piece_file *p = l->pieces[l->n_pieces - 1];
    uint8_t *state = NULL;
    quarry_code code = read_section(p, p->layout.state_at, p->layout.state_end, "the checksum of its state is wrong", &state, l->error);
    if (code == QUARRY_OK) {
        code = l->policy->type->saving->load_state(l->policy, state, (size_t)p->header.state_bytes, p->header.subject.end, l->error);
        if (code == QUARRY_ERROR_FORMAT) piece_damaged(p, "the state of its index is impossible", l->error);
    }
    memory_free(state);
    if (code != QUARRY_OK) return code;
    thread_pool_run(l->pool, (int64_t)l->policy->shape.kv.n_layer * l->policy->shape.kv.n_head_kv, open_task, l);
    l->policy->type->saving->load_commit(l->policy);
    return QUARRY_OK;
}

static quarry_code check_chain(loader *l)
{
    for (int i = 0; i < l->n_pieces; i++) {
        const piece_file *p = l->piece = l->pieces[i], *before = i ? l->pieces[i - 1] : NULL;
        const piece_subject *s = &p->header.subject, *b = before ? &before->header.subject : NULL;
        const int64_t from = p->header.n_segments ? p->segments[0].first : p->header.segments_end;
        const bool follows = !before ? s->first == 0
                                     : s->first == b->end && store_key_same(&s->parent, &before->header.key) &&
                                           s->fingerprint == b->fingerprint && !memcmp(&s->kv, &b->kv, sizeof s->kv) &&
                                           !strcmp(s->index, b->index) && from == before->header.segments_end;
        if (!follows) return piece_damaged(p, "it does not follow the piece before it", l->error);
    }
    return QUARRY_OK;
}

/* The rows of all segments stay where they are. */
static quarry_code set_cold(loader *l, const piece_subject *last)
{
    const piece_header *h = &l->pieces[l->n_pieces - 1]->header;
    kv_cold *cold = tier_open(&last->kv, l->policy->type->saving->derived_bytes(l->policy), &l->tier, l->error);
    if (!cold) return QUARRY_ERROR_MEMORY;
    kv_cold_span span = {ATTN_SINKS, h->segments_end, 0, last->end};
    quarry_code code = QUARRY_OK;
    for (int i = 0; i < l->n_pieces; i++) span.n_segments += l->pieces[i]->header.n_segments;
    for (int i = 0; i < l->n_pieces && code == QUARRY_OK; i++) code = tier_add(l->tier, cold, l->pieces[i], l->error);
    if (code == QUARRY_OK) code = kv_set_cold(l->kv, cold, &span, l->error);
    kv_cold_release(cold);
    return code;
}

static quarry_code load_all(loader *l, const piece_subject *last, bool cold)
{
    quarry_code code = cold ? set_cold(l, last) : QUARRY_OK;
    if (code == QUARRY_OK) code = kv_restore(l->kv, last->end, l->error);
    for (int i = 0; i < l->n_pieces && code == QUARRY_OK; i++) {
        l->piece = l->pieces[i];
        code = load_piece(l);
    }
    return code == QUARRY_OK && l->policy ? load_state(l) : code;
}

quarry_code pieces_load(piece_file *const *pieces, int n, bool cold, kv_seq *kv, attn_policy *policy, thread_pool *pool, arena *scratch,
                        store_key *damaged, quarry_error *error)
{
    loader l = {.pieces = pieces,
                .n_pieces = n,
                .piece = pieces[n - 1],
                .kv = kv,
                .policy = policy->type->saving ? policy : NULL,
                .scratch = scratch,
                .error = error,
                .pool = pool};
    const piece_subject *last = piece_subject_of(l.piece);
    if (memcmp(&last->kv, kv_shape_of(kv), sizeof last->kv) != 0)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s: of another model or another type of cache", file_map_path(l.piece->file));
    int64_t n_segments = 0;
    for (int i = 0; i < n; i++) n_segments += pieces[i]->header.n_segments;
    quarry_code code = check_chain(&l);
    if (code == QUARRY_OK) code = load_all(&l, last, cold && l.policy && n_segments > 0);
    if (code == QUARRY_ERROR_FORMAT) *damaged = l.piece->header.key;
    return code;
}

/* ---- verifying ---- */

static void verify_task(void *context, int64_t task, int thread)
{
    loader *l = context;
    const piece_file *p = l->piece;
    const piece_region *r = p->layout.regions;
    uint8_t *record, *rows;
    quarry_error error;
    if (atomic_load(&l->failed)) return;
    for (; task >= r->n_parts; r++) task -= r->n_parts;
    arena_reset(&l->scratch[thread]);
    quarry_code code = piece_read_record(p, r, (int)task, &record, &l->scratch[thread], &error);
    if (code == QUARRY_OK) code = read_rows(p, r, (int)task, record, r->n_rows, &rows, &l->scratch[thread], &error);
    if (code != QUARRY_OK) fail(l, code, &error);
}

quarry_code piece_verify(const piece_file *p, thread_pool *pool, arena *scratch, quarry_error *error)
{
    loader l = {.piece = p, .scratch = scratch, .error = error};
    int64_t n = 0;
    uint8_t *state;
    for (int64_t i = 0; i < p->layout.n_regions; i++) n += p->layout.regions[i].n_parts;
    thread_pool_run(pool, n, verify_task, &l);
    if (atomic_load(&l.failed)) return (quarry_code)atomic_load(&l.failed);
    quarry_code code = read_section(p, p->layout.state_at, p->layout.state_end, "the checksum of its state is wrong", &state, error);
    memory_free(state);
    return code;
}
