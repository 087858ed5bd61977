/* Two vectors about the keys of each page of 16 tokens, from which a method scores the page. Included by such methods only. */
#ifndef ATTN_PAGES_H
#define ATTN_PAGES_H

#include "attn/scored.h"

enum { PAGE_TOKENS = 16 };

static inline size_t pages_unit_bytes(const scored *p)
{
    return 2 * (size_t)p->d * sizeof(float);
}

static inline float *pages_at(const scored_part *part, int64_t page)
{
    return (float *)(part->units + (size_t)page * part->p->unit_bytes);
}

/* A published implementation keeps its two vectors in 16 bits. */
static inline void pages_count(const scored_part *part, int64_t n_pages, attn_cost *cost)
{
    cost->index_bytes += n_pages * 2 * part->p->d * (int64_t)sizeof(uint16_t);
}

#endif
