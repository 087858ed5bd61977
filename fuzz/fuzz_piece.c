/* Reads any bytes as a piece of a stored context; then the same with checksums and key made right, so that what lies behind them is reached: a cache and an index are loaded from it, with rows in memory and cold ones, and asked. */
#define XXH_INLINE_ALL
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "store/piece_format.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define CHECK(condition)                                                                                                                   \
    if (!(condition)) abort()

enum { GROUP = 2, MOST = 4096 };

static void seal(uint8_t *bytes, uint64_t start, uint64_t end)
{
    put64(bytes + end - 8, XXH3_64bits(bytes + start, (size_t)(end - 8 - start)));
}

/* Makes the checksums of everything that is where the header says; false if it is not a piece at all. */
static bool repair(uint8_t *bytes, size_t n, piece_header *h)
{
    attn_saved_segment segments[64];
    int32_t tokens[MOST];
    piece_layout l;
    seal(bytes, 0, PIECE_HEADER);
    if (piece_header_parse(h, bytes, "fuzz", NULL) != QUARRY_OK || h->n_segments > 64 || h->subject.end > MOST) return false;
    const int64_t n_tokens = h->subject.end - h->subject.first;
    uint64_t table;
    const uint64_t end = piece_front(h, &table);
    if (end > n) return false;
    for (int64_t i = 0; i < n_tokens; i++) tokens[i] = (int32_t)get32(bytes + PIECE_HEADER + 4 * i);
    for (int64_t i = 0; i < h->n_segments; i++) {
        const uint8_t *at = bytes + table + i * PIECE_SEGMENT;
        segments[i] = (attn_saved_segment){(int64_t)get64(at), (int64_t)get64(at + 8), get64(at + 16)};
        if (segments[i].n < 0 || segments[i].n > MOST) return false;
    }
    seal(bytes, PIECE_HEADER, end);
    h->key = piece_key_of(&h->subject, tokens);
    memcpy(bytes + 16, h->key.bytes, sizeof h->key);
    seal(bytes, 0, PIECE_HEADER);
    const bool fits = piece_layout_make(&l, h, segments, NULL) == QUARRY_OK && l.total == n;
    for (int64_t r = 0; fits && r < l.n_regions; r++)
        for (int part = 0; part < l.regions[r].n_parts; part++) {
            const piece_region *region = &l.regions[r];
            const uint64_t record = region->record_at + (uint64_t)part * region->record_bytes,
                           rows = region->rows_at + (uint64_t)part * region->rows_bytes;
            for (int64_t b = 0; b < region->n_blocks; b++)
                put64(bytes + record + region->extra + b * 8,
                      XXH3_64bits(bytes + rows + (uint64_t)b * l.block_bytes, (size_t)l.block_bytes));
            seal(bytes, record, record + region->record_bytes);
        }
    if (fits) seal(bytes, l.state_at, l.state_end);
    memory_free(l.regions);
    return fits;
}

/* Every row of the cold segments, one part after the other. */
static void read_cold(const kv_seq *kv)
{
    kv_cold *cold = kv_cold_of(kv);
    const int n_parts = kv_shape_of(kv)->n_layer * kv_shape_of(kv)->n_head_kv;
    for (int64_t s = 0; s < kv_cold_in(kv)->n_segments; s++) {
        const int64_t n = kv_cold_length(cold, s), per = kv_cold_block_rows(cold);
        uint8_t *out = malloc((size_t)((n + per - 1) / per) * kv_cold_block_bytes(cold));
        CHECK(out);
        for (int part = 0; part < n_parts; part++) CHECK(kv_cold_read(cold, part, s, 0, n, out, NULL) == QUARRY_OK);
        free(out);
    }
}

static void load(piece_file *piece, const piece_header *h, bool cold)
{
    const kv_shape *kv_of = &h->subject.kv;
    static const double inverse[4] = {1, 0.1, 0.01, 0.001};
    if (kv_of->head_dim % ATTN_HEAD_MULTIPLE || kv_of->head_dim > 256 ||
        (int64_t)(kv_of->n_layer + kv_of->n_local) * kv_of->n_head_kv > 64 || kv_of->n_layer < 1)
        return;
    const attn_shape shape = {
        .kv = *kv_of, .n_head = GROUP * kv_of->n_head_kv, .scale = 0.25f, .rope = {.n_rot = 8, .halves = true, .inverse = inverse}};
    char spec[ATTN_OPTION_TEXT] = "ivfpq";
    const char *options = strncmp(h->subject.index, "ivfpq 2 ", 8) ? NULL : h->subject.index + 8;
    if (options && strlen(options) < 200) { /* "size=64 values=0.8 …" as a specification */
        snprintf(spec, sizeof spec, "ivfpq:%s", options);
        for (char *c = spec; *c; c++)
            if (*c == ' ') *c = ',';
    }
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    attn_policy *p = attn_policy_create(spec, &shape, kernels, NULL);
    kv_seq *kv = kv_create(kv_of, NULL);
    thread_pool *pool = thread_pool_create(1, NULL);
    arena scratch = {0};
    store_key damaged;
    CHECK(kv && pool);
    if (p && pieces_load(&piece, 1, cold, kv, p, pool, &scratch, &damaged, NULL) == QUARRY_OK && kv_length(kv) == h->subject.end) {
        if (kv_cold_of(kv)) {
            const size_t rows = h->subject.end % 2 ? SIZE_MAX : 30000, keys = h->subject.end % 3 ? SIZE_MAX : 9000;
            CHECK(kv_cold_set_cache(kv_cold_of(kv), rows, keys, NULL) == QUARRY_OK);
            read_cold(kv);
        }
        float q[GROUP * 256];
        for (int i = 0; i < GROUP * kv_of->head_dim; i++) q[i] = (float)(i * 29 % 13 - 6);
        for (int part = 0; part < kv_of->n_layer * kv_of->n_head_kv; part++) {
            attn_selection out;
            attn_cost cost = {0};
            float m[GROUP] = {0, 1}, l[GROUP] = {1, 2};
            const attention_state near = {.m = m, .l = l};
            arena_reset(&scratch);
            CHECK(p->type->select(p, part / kv_of->n_head_kv, part % kv_of->n_head_kv, kv, q, kv_length(kv) - 1, &near, &scratch, &out,
                                  &cost, NULL) == QUARRY_OK);
            if (kv_cold_of(kv))
                CHECK(p->type->fetch(p, part / kv_of->n_head_kv, part % kv_of->n_head_kv, kv, &out, &scratch, NULL) == QUARRY_OK);
            for (int64_t i = 0; !out.all && i < out.n; i++) {
                CHECK(out.ids[i] >= ATTN_SINKS && out.ids[i] < p->n_far);
                CHECK(!kv_cold_of(kv) || (out.rows && out.rows[i]));
            }
        }
        CHECK(attn_index_seal(p, kv, pool, &scratch, NULL) == QUARRY_OK);
    }
    attn_policy_destroy(p);
    kv_destroy(kv);
    thread_pool_destroy(pool);
    arena_free(&scratch);
}

static piece_file *open_bytes(const uint8_t *bytes, size_t n, int *fd)
{
    char path[64];
    quarry_error error = {0};
    *fd = memfd_create("piece", 0);
    CHECK(*fd >= 0 && write(*fd, bytes, n) == (ssize_t)n);
    snprintf(path, sizeof path, "/proc/self/fd/%d", *fd);
    piece_file *p = piece_open(path, &error);
    CHECK(p || (error.code != QUARRY_OK && !strchr(error.message, '\n')));
    return p;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    int fd;
    piece_close(open_bytes(data, n, &fd));
    close(fd);
    if (n < PIECE_HEADER) return 0;
    uint8_t *bytes = malloc(n);
    piece_header h;
    CHECK(bytes);
    memcpy(bytes, data, n);
    if (repair(bytes, n, &h)) {
        piece_file *p = open_bytes(bytes, n, &fd);
        if (p) {
            thread_pool *pool = thread_pool_create(1, NULL);
            arena scratch = {0};
            CHECK(pool && piece_verify(p, pool, &scratch, NULL) == QUARRY_OK);
            thread_pool_destroy(pool);
            arena_free(&scratch);
            load(p, &h, false);
            load(p, &h, true);
        }
        piece_close(p);
        close(fd);
    }
    free(bytes);
    return 0;
}
