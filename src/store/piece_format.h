/* Where things lie in a piece: shared by its writer and its reader. */
#ifndef STORE_PIECE_FORMAT_H
#define STORE_PIECE_FORMAT_H

#include "store/piece.h"

enum {
    PIECE_HEADER = 4096,
    PIECE_VERSION = 1,
    PIECE_ALIGN = 64,    /* of what is read in small parts */
    PIECE_SECTOR = 4096, /* of rows: a block of them is a whole number of these */
    PIECE_SEGMENT = 24,  /* bytes of an entry of the table of segments */
};

typedef struct piece_header {
    store_key key;
    piece_subject subject;
    int64_t n_segments, segments_end; /* position behind the last one of the context so far: where loose rows begin */
    uint64_t state_bytes;
    int64_t created;
    char about[PIECE_ABOUT_TEXT];
} piece_header;

/* Rows of every part, that is (layer, KV head), and a record of each. A record: what is `extra`, checksums of the blocks of rows, zeros, its own checksum in the last 8 bytes. */
typedef struct piece_region {
    int n_parts;
    int64_t n_rows, n_blocks;                              /* of a part */
    uint64_t extra;                                        /* bytes: of a segment its order [n_rows] u16 and attn_saving's part_bytes */
    uint64_t record_at, record_bytes, rows_at, rows_bytes; /* those of part i are at …_at + i * …_bytes */
} piece_region;

/* A segment's region for each, then loose rows, then those of layers with a window. */
typedef struct piece_layout {
    int64_t block_rows;
    uint64_t block_bytes, row_bytes;
    uint64_t table_at, table_end, state_at, state_end,
        total; /* what ends at table_end, and at state_end, has its checksum in the last 8 bytes */
    int64_t n_regions;
    piece_region *regions; /* [n_regions]; free with memory_free */
    int64_t local_first;   /* position of the first row of layers with a window */
} piece_layout;

/* A piece that is open; the owners share it. */
struct piece_file {
    _Atomic int n_refs;
    file_map *file;
    piece_header header;
    piece_layout layout;
    int32_t *tokens;
    attn_saved_segment *segments; /* [n_segments] */
};

/* FORMAT: names the file and what is damaged. */
quarry_code piece_damaged(const piece_file *p, const char *what, quarry_error *error);
/* The record of a part, tested, in memory of the arena. */
quarry_code piece_read_record(const piece_file *p, const piece_region *r, int part, uint8_t **record, arena *scratch, quarry_error *error);

/* Rows of a block. */
int64_t piece_block_rows(uint64_t row_bytes);
void piece_header_pack(const piece_header *h, uint8_t out[PIECE_HEADER]);
/* bytes[PIECE_HEADER] */
quarry_code piece_header_parse(piece_header *h, const uint8_t *bytes, const char *name, quarry_error *error);
/* MEMORY, or FORMAT (without a message) if the sizes are impossible. */
quarry_code piece_layout_make(piece_layout *l, const piece_header *h, const attn_saved_segment *segments, quarry_error *error);

/* Where the table of segments begins, and the front ends: all that can be known before the table is read. */
static inline uint64_t piece_front(const piece_header *h, uint64_t *table_at)
{
    const uint64_t tokens = (uint64_t)(h->subject.end - h->subject.first) * 4, table = (uint64_t)h->n_segments * PIECE_SEGMENT + 8;
    *table_at = (PIECE_HEADER + tokens + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
    return (*table_at + table + PIECE_ALIGN - 1) / PIECE_ALIGN * PIECE_ALIGN;
}

/* Sinks among the loose rows. */
static inline int64_t piece_loose_sinks(const piece_header *h)
{
    return h->subject.first > 0 ? 0 : h->subject.end < ATTN_SINKS ? h->subject.end : ATTN_SINKS;
}

/* Position of row i of the loose ones. */
static inline int64_t piece_loose_position(const piece_header *h, int64_t i)
{
    const int64_t sinks = piece_loose_sinks(h);
    return i < sinks ? i : h->segments_end + i - sinks;
}

#endif
