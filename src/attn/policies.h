/* The policies of this room, one file each. */
#ifndef ATTN_POLICIES_H
#define ATTN_POLICIES_H

#include "attn/attn.h"

extern const attn_policy_type attn_ivfpq, attn_full, attn_window, attn_oracle, attn_quest, attn_meanstd, attn_pqcache, attn_snapkv,
    attn_magicpig, attn_clusters, attn_a2ats, attn_rekv;

#endif
