/* Rows that stay in the pieces: the source of cold ones (kv/cold.h). A block that is read is tested by its checksum, which is in memory. */
#ifndef STORE_TIER_H
#define STORE_TIER_H

#include "store/piece.h"

typedef struct tier tier;

/* Cold rows of a cache of this shape, without segments; *t is their source, and lives as long as they. */
kv_cold *tier_open(const kv_shape *shape, size_t derived_bytes, tier **t, quarry_error *error);
tier *tier_of(const kv_cold *cold); /* the source of rows that tier_open made */
/* The piece in which a block was found damaged; NULL: none. */
const piece_file *tier_damaged(const tier *t);
/* The segments of a piece more, in the tier and in the rows, whose checksums must then be told. Holds the piece. */
quarry_code tier_add(tier *t, kv_cold *cold, piece_file *p, quarry_error *error);
/* (parallel) Checksums of the blocks of a part of a segment, as its record has them (u64, little-endian). */
void tier_take_sums(tier *t, int64_t segment, int part, const uint8_t *sums);

#endif
