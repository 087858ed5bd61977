/* Tables of a2ats: codebooks as they are stored, scores and codes made from them. */
#include <math.h>
#include <string.h>

#include "attn/a2ats.h"
#include "vq/vq.h"

enum { DIMS = 64 }; /* of a tile, made f32 at a time */

void a2ats_tables_release(a2ats_tables *t)
{
    if (!t || atomic_fetch_sub(&t->references, 1) > 1) return;
    void *const arrays[] = {t->metric, t->half, t->f16, t->int8, t->scale, t->mean, t};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) memory_free(arrays[i]);
}

void a2ats_tables_tally(const a2ats_tables *t, memory_tally *tally)
{
    const size_t heads = (size_t)t->header.n_layer * (size_t)t->header.n_head_kv, d = (size_t)t->header.head_dim;
    const size_t rows = heads * (size_t)t->tiles * A2ATS_TILE;
    memory_tally_add(tally, t, sizeof *t);
    memory_tally_add(tally, t->metric, heads * d * d * sizeof *t->metric);
    memory_tally_add(tally, t->half, rows * sizeof *t->half);
    memory_tally_add(tally, t->f16, rows * d * sizeof *t->f16);
    memory_tally_add(tally, t->int8, rows * d);
    memory_tally_add(tally, t->scale, rows * sizeof *t->scale);
    memory_tally_add(tally, t->mean, heads * d * sizeof *t->mean);
}

/* out[n][stride] from centroid A2ATS_TILE * tile on = products of q[n][d] with a tile of the head's centroids. */
static void score_tile(const a2ats_tables *t, const math_kernels *kernels, size_t at, int64_t tile, const float *q, int64_t n, float *out,
                       int64_t stride)
{
    const int64_t d = t->header.head_dim, first = (int64_t)at * t->tiles + tile;
    if (t->int8) {
        float bias[ATTN_MAX_GROUP];
        for (int64_t i = 0; i < n; i++) bias[i] = kernels->vector->dot(q + i * d, t->mean + (int64_t)at * d, d);
        kernels->retrieval->dot_i8(q, (int)n, (int)d, t->int8 + first * A2ATS_TILE * d, t->scale + first * A2ATS_TILE, bias, A2ATS_TILE,
                                   out, stride);
        return;
    }
    for (int64_t i = 0; i < d; i += DIMS) {
        float part[DIMS * A2ATS_TILE];
        const int64_t dims = d - i < DIMS ? d - i : DIMS;
        kernels->vector->from_f16(t->f16 + (first * d + i) * A2ATS_TILE, dims * A2ATS_TILE, part);
        kernels->retrieval->product(q + i, d, 1, part, A2ATS_TILE, out, stride, n, A2ATS_TILE, dims, i > 0);
    }
}

static quarry_code check_model(const codebook_header *h, const attn_shape *shape, const char *path, quarry_error *error)
{
    if (h->fingerprint != shape->fingerprint)
        return error_set(error, QUARRY_ERROR_ARGUMENT,
                         "%s was calibrated for another model (fingerprint %016llx, this model's is %016llx); run 'quarry calibrate'", path,
                         (unsigned long long)h->fingerprint, (unsigned long long)shape->fingerprint);
    if (h->n_layer != shape->kv.n_layer || h->n_head_kv != shape->kv.n_head_kv || h->head_dim != shape->kv.head_dim)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "%s is for %d layers of %d KV heads of %d, this model has %d of %d of %d", path,
                         h->n_layer, h->n_head_kv, h->head_dim, shape->kv.n_layer, shape->kv.n_head_kv, shape->kv.head_dim);
    return QUARRY_OK;
}

/* What a record is turned into; all memory is there, padding is zero. work[2 k d + d d] */
static void make_head(a2ats_tables *t, const math_kernels *kernels, size_t at, const codebook_head *head, float *work)
{
    const int64_t d = t->header.head_dim, k = t->header.n_centroids, first = (int64_t)at * t->tiles;
    float *rows = work, *whitened = rows + k * d, *transposed = whitened + k * d, *half = t->half + first * A2ATS_TILE;
    vq_transpose(head->lower, d, d, (int)d, transposed, d);
    kernels->retrieval->product(head->lower, d, 1, transposed, d, t->metric + (int64_t)at * d * d, d, d, d, d, false);
    codebook_expand(&t->header, kernels, head, rows);
    kernels->retrieval->product(rows, d, 1, t->metric + (int64_t)at * d * d, d, whitened, d, k, d, d, false);
    for (int64_t j = 0; j < t->tiles * A2ATS_TILE; j++)
        half[j] = j < k ? kernels->vector->dot(rows + j * d, whitened + j * d, d) / 2 : INFINITY;
    if (t->int8) {
        memcpy(t->int8 + first * A2ATS_TILE * d, head->int8, (size_t)(k * d));
        memcpy(t->scale + first * A2ATS_TILE, head->scale, (size_t)k * sizeof *t->scale);
        memcpy(t->mean + (int64_t)at * d, head->mean, (size_t)d * sizeof *t->mean);
        return;
    }
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = 0; i < d; i++) t->f16[(first * d + j / A2ATS_TILE * d + i) * A2ATS_TILE + j % A2ATS_TILE] = head->f16[j * d + i];
}

static bool tables_allocate(a2ats_tables *t, quarry_error *error)
{
    const size_t heads = (size_t)t->header.n_layer * (size_t)t->header.n_head_kv, d = (size_t)t->header.head_dim;
    const size_t cells = (size_t)t->tiles * A2ATS_TILE;
    t->metric = memory_aligned(heads, d * d * sizeof *t->metric, "codebook", error);
    t->half = t->metric ? memory_aligned(heads, cells * sizeof *t->half, "codebook", error) : NULL;
    if (!t->half) return false;
    if (t->header.type == CODEBOOK_F16) return (t->f16 = memory_zero(heads, cells * d * sizeof *t->f16, "codebook", error)) != NULL;
    t->int8 = memory_zero(heads, cells * d, "codebook", error);
    t->scale = t->int8 ? memory_zero(heads, cells * sizeof *t->scale, "codebook", error) : NULL;
    t->mean = t->scale ? memory_zero(heads, d * sizeof *t->mean, "codebook", error) : NULL;
    return t->mean != NULL;
}

static quarry_code read_records(a2ats_tables *t, const math_kernels *kernels, const uint8_t *bytes, size_t n_bytes, const char *path,
                                quarry_error *error)
{
    const codebook_header *h = &t->header;
    const size_t heads = (size_t)h->n_layer * (size_t)h->n_head_kv, record = codebook_record_bytes(h), d = (size_t)h->head_dim;
    if (n_bytes != CODEBOOK_HEADER + heads * record)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged codebook: %zu bytes, %zu expected", path, n_bytes,
                         CODEBOOK_HEADER + heads * record);
    t->tiles = (h->n_centroids + A2ATS_TILE - 1) / A2ATS_TILE;
    if (!tables_allocate(t, error)) return QUARRY_ERROR_MEMORY;
    codebook_head head = {.lower = memory_alloc(d * d, sizeof(float), "codebook", error)};
    void *stored = head.lower ? memory_alloc(codebook_centroid_bytes(h), 1, "codebook", error) : NULL;
    float *work = stored ? memory_alloc(2 * (size_t)h->n_centroids * d + d * d, sizeof *work, "codebook", error) : NULL;
    quarry_code code = work ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    if (stored) codebook_head_place(h, stored, &head);
    for (size_t i = 0; i < heads && code == QUARRY_OK; i++) {
        if (codebook_record_parse(h, bytes + CODEBOOK_HEADER + i * record, &head))
            make_head(t, kernels, i, &head, work);
        else
            code = error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged codebook: the checksum of layer %zu, head %zu is wrong", path,
                             i / (size_t)h->n_head_kv, i % (size_t)h->n_head_kv);
    }
    memory_free(head.lower);
    memory_free(stored);
    memory_free(work);
    return code;
}

a2ats_tables *a2ats_tables_read(const char *path, const attn_shape *shape, const math_kernels *kernels, quarry_error *error)
{
    size_t n_bytes = 0;
    char *bytes = file_read_all(path, &n_bytes, error);
    a2ats_tables *t = bytes ? memory_zero(1, sizeof *t, "codebook", error) : NULL;
    if (t) {
        atomic_init(&t->references, 1);
        t->file_bytes = n_bytes;
        quarry_code code = codebook_header_parse(&t->header, (const uint8_t *)bytes, n_bytes, path, error);
        if (code == QUARRY_OK) code = check_model(&t->header, shape, path, error);
        if (code == QUARRY_OK) code = read_records(t, kernels, (const uint8_t *)bytes, n_bytes, path, error);
        if (code != QUARRY_OK) {
            a2ats_tables_release(t);
            t = NULL;
        }
    }
    memory_free(bytes);
    return t;
}

void a2ats_tables_score(const a2ats_tables *t, const math_kernels *kernels, size_t at, const float *q, int64_t n, float *scores)
{
    const int64_t stride = t->tiles * A2ATS_TILE;
    for (int64_t tile = 0; tile < t->tiles; tile++) score_tile(t, kernels, at, tile, q, n, scores + tile * A2ATS_TILE, stride);
}

/* The largest x M c - c M c / 2, which takes no centroids but those that score. */
void a2ats_tables_code(const a2ats_tables *t, const math_kernels *kernels, size_t at, const float *keys, int64_t n, int32_t *nearest)
{
    const int64_t d = t->header.head_dim;
    const float *half = t->half + (int64_t)at * t->tiles * A2ATS_TILE;
    float turned[A2ATS_ROWS * 1024], score[A2ATS_ROWS * A2ATS_TILE], best[A2ATS_ROWS];
    kernels->retrieval->product(keys, d, 1, t->metric + (int64_t)at * d * d, d, turned, d, n, d, d, false);
    for (int64_t i = 0; i < n; i++) {
        nearest[i] = 0;
        best[i] = -INFINITY;
    }
    for (int64_t tile = 0; tile < t->tiles; tile++) {
        score_tile(t, kernels, at, tile, turned, n, score, A2ATS_TILE);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < A2ATS_TILE; j++) {
                const float x = score[i * A2ATS_TILE + j] - half[tile * A2ATS_TILE + j];
                if (!(x > best[i])) continue;
                best[i] = x;
                nearest[i] = (int32_t)(tile * A2ATS_TILE + j);
            }
    }
}
