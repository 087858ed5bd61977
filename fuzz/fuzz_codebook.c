/* Reads any bytes as a codebook file; then the same with checksums made right, so that what lies behind them is reached: a policy opened with it codes keys and chooses among them. */
#define XXH_INLINE_ALL
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "attn/attn.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define CHECK(condition)                                                                                                                   \
    if (!(condition)) abort()

enum { TOKENS = 150, GROUP = 2, LATER = 40 };

static void repair(const codebook_header *h, uint8_t *bytes, size_t n)
{
    const size_t record = codebook_record_bytes(h);
    for (size_t end = CODEBOOK_HEADER + record; end <= n; end += record) {
        const uint64_t sum = XXH3_64bits(bytes + end - record, record - 8);
        memcpy(bytes + end - 8, &sum, sizeof sum);
    }
}

static void choose(const attn_policy *p, const kv_seq *kv, arena *scratch)
{
    float q[GROUP * 1024];
    bool seen[TOKENS] = {false};
    const attn_shape *shape = &p->shape;
    for (int i = 0; i < GROUP * shape->kv.head_dim; i++) q[i] = (float)(i * 29 % 13 - 6);
    for (int layer = 0; layer < shape->kv.n_layer; layer++) {
        attn_selection out;
        attn_cost cost = {0};
        float m[GROUP] = {0, 1}, l[GROUP] = {1, 2};
        const attention_state near = {.m = m, .l = l};
        arena_reset(scratch);
        CHECK(p->type->select(p, layer, 0, kv, q, TOKENS - 1, &near, scratch, &out, &cost, NULL) == QUARRY_OK);
        memset(seen, 0, sizeof seen);
        for (int64_t i = 0; !out.all && i < out.n; i++) {
            CHECK(out.ids[i] >= ATTN_SINKS && out.ids[i] < p->n_far && !seen[out.ids[i]]);
            seen[out.ids[i]] = true;
        }
    }
}

static void use(const attn_shape *shape, const char *spec)
{
    const math_kernels *kernels = math_kernels_get(cpu_detect());
    quarry_error error = {0};
    attn_policy *p = attn_policy_create(spec, shape, kernels, &error);
    if (!p) {
        CHECK(error.code != QUARRY_OK && !strchr(error.message, '\n'));
        return;
    }
    kv_seq *kv = kv_create(&shape->kv, NULL);
    thread_pool *pool = thread_pool_create(1, NULL);
    arena scratch = {0};
    CHECK(kv && pool && kv_reserve(kv, TOKENS, NULL) == QUARRY_OK);
    for (int t = 0; t < TOKENS; t++)
        for (int i = 0; i < shape->kv.n_layer * shape->kv.n_head_kv; i++) {
            float k[1024], v[1024] = {0};
            for (int j = 0; j < shape->kv.head_dim; j++) k[j] = (float)((t * 31 + i * 17 + j * 7) % 23 - 11) / 4;
            kv_write(kernels, kv_row(kv, i / shape->kv.n_head_kv, i % shape->kv.n_head_kv, t), &shape->kv, k, v);
        }
    kv_commit(kv, TOKENS - LATER);
    CHECK(attn_index_seal(p, kv, pool, &scratch, NULL) == QUARRY_OK);
    choose(p, kv, &scratch);
    p->type->truncate(p, 30);
    kv_commit(kv, TOKENS);
    CHECK(attn_index_seal(p, kv, pool, &scratch, NULL) == QUARRY_OK);
    choose(p, kv, &scratch);
    attn_policy_destroy(p);
    kv_destroy(kv);
    thread_pool_destroy(pool);
    arena_free(&scratch);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const double inverse[4] = {1, 0.1, 0.01, 0.001};
    codebook_header h;
    quarry_error error = {0};
    if (codebook_header_parse(&h, data, n, "fuzz", &error) != QUARRY_OK) CHECK(error.code != QUARRY_OK && !strchr(error.message, '\n'));
    if (n < CODEBOOK_HEADER) return 0;
    uint8_t *bytes = malloc(n);
    CHECK(bytes);
    memcpy(bytes, data, n);
    const uint64_t sum = XXH3_64bits(bytes, CODEBOOK_HEADER - 8);
    memcpy(bytes + CODEBOOK_HEADER - 8, &sum, sizeof sum);
    if (codebook_header_parse(&h, bytes, n, "fuzz", NULL) == QUARRY_OK && h.head_dim % ATTN_HEAD_MULTIPLE == 0 &&
        (int64_t)h.n_layer * h.n_head_kv <= 16) {
        const attn_shape shape = {.kv = {.n_layer = h.n_layer, .n_head_kv = h.n_head_kv, .head_dim = h.head_dim, .type = KV_F32},
                                  .n_head = GROUP * h.n_head_kv,
                                  .scale = 0.25f,
                                  .rope = {.n_rot = 8, .halves = true, .inverse = inverse},
                                  .fingerprint = h.fingerprint};
        static const char *const options[] = {"budget=0.1", "threshold=0.01,shared=1", "mass=0.8,max=0.5", "budget=0.1,tail=1"};
        char spec[128];
        const int fd = memfd_create("codebook", 0);
        repair(&h, bytes, n);
        CHECK(fd >= 0 && write(fd, bytes, n) == (ssize_t)n);
        snprintf(spec, sizeof spec, "a2ats:%s,codebook=/proc/self/fd/%d", options[h.seed % 4], fd);
        use(&shape, spec);
        close(fd);
    }
    free(bytes);
    return 0;
}
