#define XXH_INLINE_ALL
#include <xxhash.h>

#include "store/piece_format.h"

static const char magic[8] = {'Q', 'U', 'A', 'R', 'R', 'Y', 'C', 'X'};

/* The fixed part of a header from its fingerprint on. */
enum { SUBJECT_BYTES = 48 };

static void subject_pack(const piece_subject *s, uint8_t out[SUBJECT_BYTES])
{
    const int shape[] = {s->kv.n_layer, s->kv.n_head_kv, s->kv.head_dim, (int)s->kv.type, s->kv.n_local, s->kv.window};
    put64(out, s->fingerprint);
    put64(out + 8, (uint64_t)s->first);
    put64(out + 16, (uint64_t)s->end);
    for (int i = 0; i < 6; i++) put32(out + 24 + 4 * i, (uint32_t)shape[i]);
}

store_key piece_key_of(const piece_subject *subject, const int32_t *tokens)
{
    uint8_t fixed[SUBJECT_BYTES], token[4];
    store_key key;
    XXH3_state_t state;
    XXH3_128bits_reset(&state);
    subject_pack(subject, fixed);
    XXH3_128bits_update(&state, subject->parent.bytes, STORE_KEY_BYTES);
    XXH3_128bits_update(&state, fixed, sizeof fixed);
    XXH3_128bits_update(&state, subject->index, strlen(subject->index) + 1);
    for (int64_t i = 0; i < subject->end - subject->first; i++) {
        put32(token, (uint32_t)tokens[i]);
        XXH3_128bits_update(&state, token, sizeof token);
    }
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(&state));
    memcpy(key.bytes, digest.digest, STORE_KEY_BYTES);
    return key;
}

/* ---- the header ---- */

enum {
    AT_VERSION = 8,
    AT_HEADER_BYTES = 12,
    AT_KEY = 16,
    AT_PARENT = 32,
    AT_SUBJECT = 48,
    AT_SEGMENTS = AT_SUBJECT + SUBJECT_BYTES, /* 96 */
    AT_SEGMENTS_END = 104,
    AT_STATE_BYTES = 112,
    AT_CREATED = 120,
    AT_INDEX = 128,
    AT_ABOUT = AT_INDEX + PIECE_INDEX_TEXT, /* 384 */
    AT_CHECKSUM = PIECE_HEADER - 8,
};

void piece_header_pack(const piece_header *h, uint8_t out[PIECE_HEADER])
{
    memset(out, 0, PIECE_HEADER);
    memcpy(out, magic, sizeof magic);
    put32(out + AT_VERSION, PIECE_VERSION);
    put32(out + AT_HEADER_BYTES, PIECE_HEADER);
    memcpy(out + AT_KEY, h->key.bytes, STORE_KEY_BYTES);
    memcpy(out + AT_PARENT, h->subject.parent.bytes, STORE_KEY_BYTES);
    subject_pack(&h->subject, out + AT_SUBJECT);
    put64(out + AT_SEGMENTS, (uint64_t)h->n_segments);
    put64(out + AT_SEGMENTS_END, (uint64_t)h->segments_end);
    put64(out + AT_STATE_BYTES, h->state_bytes);
    put64(out + AT_CREATED, (uint64_t)h->created);
    memcpy(out + AT_INDEX, h->subject.index, strlen(h->subject.index));
    memcpy(out + AT_ABOUT, h->about, strlen(h->about));
    put64(out + AT_CHECKSUM, XXH3_64bits(out, AT_CHECKSUM));
}

static bool text_get(char *text, size_t size, const uint8_t *in)
{
    memcpy(text, in, size);
    return memchr(text, 0, size) != NULL;
}

static bool sizes_sound(const piece_header *h)
{
    const piece_subject *s = &h->subject;
    const kv_shape *k = &s->kv;
    return s->first >= 0 && s->end > s->first && s->end <= INT32_MAX && k->n_layer >= 0 && k->n_layer <= 65536 && k->n_head_kv >= 1 &&
           k->n_head_kv <= 65536 && k->head_dim >= 1 && k->head_dim <= 65536 && (k->type == KV_F16 || k->type == KV_F32) &&
           k->n_local >= 0 && k->n_local <= 65536 && k->window >= 0 && h->n_segments >= 0 && h->n_segments <= s->end &&
           h->segments_end >= 0 && h->segments_end <= (s->end > ATTN_SINKS ? s->end : ATTN_SINKS) && h->state_bytes <= INT64_MAX &&
           store_key_none(&s->parent) == (s->first == 0);
}

quarry_code piece_header_parse(piece_header *h, const uint8_t *bytes, const char *name, quarry_error *error)
{
    if (memcmp(bytes, magic, sizeof magic) != 0) return error_set(error, QUARRY_ERROR_FORMAT, "%s: not a saved context", name);
    if (get32(bytes + AT_VERSION) != PIECE_VERSION)
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s: a saved context of version %u; this program reads version %d", name,
                         get32(bytes + AT_VERSION), PIECE_VERSION);
    if (get64(bytes + AT_CHECKSUM) != XXH3_64bits(bytes, AT_CHECKSUM))
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged: the checksum of its header is wrong", name);
    const uint8_t *s = bytes + AT_SUBJECT;
    *h = (piece_header){
        .subject.fingerprint = get64(s),
        .subject.first = (int64_t)get64(s + 8),
        .subject.end = (int64_t)get64(s + 16),
        .subject.kv = {(int)get32(s + 24), (int)get32(s + 28), (int)get32(s + 32), (kv_type)get32(s + 36), (int)get32(s + 40),
                       (int)get32(s + 44)},
        .n_segments = (int64_t)get64(bytes + AT_SEGMENTS),
        .segments_end = (int64_t)get64(bytes + AT_SEGMENTS_END),
        .state_bytes = get64(bytes + AT_STATE_BYTES),
        .created = (int64_t)get64(bytes + AT_CREATED),
    };
    memcpy(h->key.bytes, bytes + AT_KEY, STORE_KEY_BYTES);
    memcpy(h->subject.parent.bytes, bytes + AT_PARENT, STORE_KEY_BYTES);
    const bool texts =
        text_get(h->subject.index, PIECE_INDEX_TEXT, bytes + AT_INDEX) && text_get(h->about, PIECE_ABOUT_TEXT, bytes + AT_ABOUT);
    if (!texts || get32(bytes + AT_HEADER_BYTES) != PIECE_HEADER || !sizes_sound(h))
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged: impossible sizes", name);
    return QUARRY_OK;
}

/* ---- the layout ---- */

/* Moves *at on by n * bytes, rounded up to `align`, and gives where that began; false beyond 2^62. */
static bool take(uint64_t *at, uint64_t n, uint64_t bytes, uint64_t align, uint64_t *where)
{
    const uint64_t most = UINT64_C(1) << 62;
    uint64_t size;
    if (where) *where = *at;
    if (__builtin_mul_overflow(n, bytes, &size) || size > most || *at > most) return false;
    *at = (*at + size + align - 1) / align * align;
    return true;
}

/* Rows of a block: as many as make whole sectors. */
int64_t piece_block_rows(uint64_t row_bytes)
{
    uint64_t a = PIECE_SECTOR, b = row_bytes;
    while (b) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return (int64_t)(PIECE_SECTOR / a);
}

quarry_code piece_layout_make(piece_layout *l, const piece_header *h, const attn_saved_segment *segments, quarry_error *error)
{
    const piece_subject *s = &h->subject;
    const int parts = s->kv.n_layer * s->kv.n_head_kv, local_parts = s->kv.n_local * s->kv.n_head_kv;
    const int64_t kept = kv_local_kept(&s->kv, s->end), sinks = piece_loose_sinks(h);
    uint64_t at;
    *l = (piece_layout){.row_bytes = kv_row_bytes(s->kv.type, s->kv.head_dim), .n_regions = h->n_segments + 2};
    l->block_rows = piece_block_rows(l->row_bytes);
    l->block_bytes = (uint64_t)l->block_rows * l->row_bytes;
    l->local_first = kept > s->first ? kept : s->first;
    if (!(l->regions = memory_zero((size_t)l->n_regions, sizeof *l->regions, "saved context", error))) return QUARRY_ERROR_MEMORY;
    bool fits = true;
    at = l->table_end = piece_front(h, &l->table_at);
    for (int64_t i = 0; i < l->n_regions && fits; i++) {
        piece_region *r = &l->regions[i];
        const bool segment = i < h->n_segments, local = i == h->n_segments + 1;
        r->n_parts = local ? local_parts : parts;
        r->n_rows = segment ? segments[i].n
                    : local ? s->end - l->local_first
                            : sinks + (s->end > h->segments_end ? s->end - h->segments_end : 0);
        r->n_blocks = (r->n_rows + l->block_rows - 1) / l->block_rows;
        r->extra = segment ? (uint64_t)r->n_rows * 2 + segments[i].part_bytes : 0;
        fits = take(&r->record_bytes, r->extra + (uint64_t)r->n_blocks * 8 + 8, 1, PIECE_ALIGN, NULL) &&
               take(&r->rows_bytes, (uint64_t)r->n_blocks, l->block_bytes, PIECE_SECTOR, NULL) &&
               take(&at, (uint64_t)r->n_parts, r->record_bytes, PIECE_ALIGN, &r->record_at);
    }
    fits = fits && take(&at, h->state_bytes + 8, 1, PIECE_ALIGN, &l->state_at);
    at = (at + PIECE_SECTOR - 1) / PIECE_SECTOR * PIECE_SECTOR; /* rows follow */
    l->state_end = at;
    for (int64_t i = 0; i < l->n_regions && fits; i++)
        fits = take(&at, (uint64_t)l->regions[i].n_parts, l->regions[i].rows_bytes, PIECE_SECTOR, &l->regions[i].rows_at);
    l->total = at;
    return fits ? QUARRY_OK : QUARRY_ERROR_FORMAT;
}
