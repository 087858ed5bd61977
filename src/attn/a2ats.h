/* a2ats: what its tables are made of, apart from the policy's state. */
#ifndef ATTN_A2ATS_H
#define ATTN_A2ATS_H

#include <stdatomic.h>

#include "attn/policies.h"

enum { A2ATS_TILE = 32 /* centroids scored at a time */, A2ATS_ROWS = 8 /* keys coded at a time */ };

/* Centroids stay as they are stored: f16 ones in tiles, [tile][d][A2ATS_TILE], so that a tile becomes f32 in one go, where it is needed and nowhere else. */
typedef struct a2ats_tables {
    codebook_header header;
    atomic_int references; /* policies that share it: of a session and its forks */
    size_t file_bytes;
    int64_t tiles;       /* of a head */
    float *metric;       /* [layer][head][d][d] L L' */
    float *half;         /* [layer][head][tiles][A2ATS_TILE] |C|^2 / 2 under the metric; INFINITY where there is no centroid */
    uint16_t *f16;       /* [layer][head][tiles][d][A2ATS_TILE] C L^-1; or */
    int8_t *int8;        /* [layer][head][tiles][A2ATS_TILE][d], */
    float *scale, *mean; /* [layer][head][tiles][A2ATS_TILE], [layer][head][d] */
} a2ats_tables;

/* From a codebook file for this model; FORMAT, UNSUPPORTED, ARGUMENT (another model's). */
a2ats_tables *a2ats_tables_read(const char *path, const attn_shape *shape, const math_kernels *kernels, quarry_error *error);
void a2ats_tables_release(a2ats_tables *t); /* NULL allowed */
void a2ats_tables_tally(const a2ats_tables *t, memory_tally *tally);

/* `at` is a head's number in all layers. scores[n][tiles * A2ATS_TILE] = products of q[n][d] with the centroids, n <= ATTN_MAX_GROUP. */
void a2ats_tables_score(const a2ats_tables *t, const math_kernels *kernels, size_t at, const float *q, int64_t n, float *scores);
/* nearest[n] of keys[n][d], n <= A2ATS_ROWS, under the metric. */
void a2ats_tables_code(const a2ats_tables *t, const math_kernels *kernels, size_t at, const float *keys, int64_t n, int32_t *nearest);

#endif
