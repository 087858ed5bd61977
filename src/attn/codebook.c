/* The codebook file: a header of 128 bytes, then a record for every (layer, KV head), each with its own checksum (XXH3, 64 bits), all little-endian.
 *
 *     header   "QUARRYCB" version, fingerprint, parameters …             checksum at 120
 *     record   L [d][d] f32   C L^-1 [n_centroids][d]   iterations u32   0 u32   checksum u64
 *
 * C L^-1 is f16, or its mean [d] f32, then a scale for each centroid [n_centroids] f32, then int8 [n_centroids][d].
 *
 * A file that is being made has fewer records and another name. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <math.h>
#include <string.h>

#include "attn/attn.h"
#include "vq/vq.h"

enum { VERSION = 2 };

static const char magic[8] = {'Q', 'U', 'A', 'R', 'R', 'Y', 'C', 'B'};

void codebook_header_pack(const codebook_header *h, uint8_t out[CODEBOOK_HEADER])
{
    const uint64_t longs[] = {h->fingerprint, h->text_digest, h->seed, (uint64_t)h->n_text, (uint64_t)h->n_random};
    const int32_t ints[] = {h->n_layer,    h->n_head_kv, h->head_dim,   h->n_centroids,
                            h->iterations, h->distance,  h->exact_rope, (int32_t)h->type};
    memset(out, 0, CODEBOOK_HEADER);
    memcpy(out, magic, sizeof magic);
    put32(out + 8, VERSION);
    for (int i = 0; i < 5; i++) put64(out + 16 + 8 * i, longs[i]);
    for (int i = 0; i < 8; i++) put32(out + 56 + 4 * i, (uint32_t)ints[i]);
    put_float(out + 88, h->exponent);
    put_float(out + 92, h->shrink);
    put64(out + 120, XXH3_64bits(out, 120));
}

quarry_code codebook_header_parse(codebook_header *h, const uint8_t *bytes, size_t n_bytes, const char *name, quarry_error *error)
{
    if (n_bytes < CODEBOOK_HEADER || memcmp(bytes, magic, sizeof magic) != 0)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: not a codebook (make one with 'quarry calibrate')", name);
    if (get32(bytes + 8) != VERSION)
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s: codebook of version %u, this program reads version %d", name,
                         get32(bytes + 8), VERSION);
    if (get64(bytes + 120) != XXH3_64bits(bytes, 120))
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged codebook: the checksum of its header is wrong", name);
    *h = (codebook_header){
        .fingerprint = get64(bytes + 16),
        .text_digest = get64(bytes + 24),
        .seed = get64(bytes + 32),
        .n_text = (int64_t)get64(bytes + 40),
        .n_random = (int64_t)get64(bytes + 48),
        .n_layer = (int32_t)get32(bytes + 56),
        .n_head_kv = (int32_t)get32(bytes + 60),
        .head_dim = (int32_t)get32(bytes + 64),
        .n_centroids = (int32_t)get32(bytes + 68),
        .iterations = (int32_t)get32(bytes + 72),
        .distance = (int32_t)get32(bytes + 76),
        .exact_rope = get32(bytes + 80) != 0,
        .type = (codebook_type)get32(bytes + 84),
        .exponent = get_float(bytes + 88),
        .shrink = get_float(bytes + 92),
    };
    if (h->n_layer < 1 || h->n_layer > 65536 || h->n_head_kv < 1 || h->n_head_kv > 65536 || codebook_record_bytes(h) == 0 ||
        h->distance < 0 || h->type > CODEBOOK_INT8 || !isfinite(h->exponent) || !isfinite(h->shrink))
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: damaged codebook: impossible sizes", name);
    return QUARRY_OK;
}

size_t codebook_centroid_bytes(const codebook_header *h)
{
    const size_t d = (size_t)h->head_dim, k = (size_t)h->n_centroids;
    return h->type == CODEBOOK_F16 ? k * d * sizeof(uint16_t) : (d + k) * sizeof(float) + k * d;
}

size_t codebook_record_bytes(const codebook_header *h)
{
    if (h->head_dim < 1 || h->head_dim > 1024 || h->n_centroids < 1 || h->n_centroids > 65536) return 0;
    const size_t d = (size_t)h->head_dim;
    return d * d * sizeof(float) + codebook_centroid_bytes(h) + 16;
}

void codebook_head_place(const codebook_header *h, void *memory, codebook_head *head)
{
    if (h->type == CODEBOOK_F16) {
        head->f16 = memory;
        return;
    }
    head->mean = memory;
    head->scale = head->mean + h->head_dim;
    head->int8 = (int8_t *)(head->scale + h->n_centroids);
}

/* The first of a head's arrays of centroids: the others follow it. */
static void *centroids_of(const codebook_header *h, const codebook_head *head)
{
    return h->type == CODEBOOK_F16 ? (void *)head->f16 : (void *)head->mean;
}

void codebook_record_pack(const codebook_header *h, const codebook_head *head, uint8_t *out)
{
    const size_t lower = (size_t)h->head_dim * (size_t)h->head_dim * sizeof(float), all = codebook_record_bytes(h);
    memcpy(out, head->lower, lower);
    memcpy(out + lower, centroids_of(h, head), codebook_centroid_bytes(h));
    put32(out + all - 16, (uint32_t)head->iterations);
    put32(out + all - 12, 0);
    put64(out + all - 8, XXH3_64bits(out, all - 8));
}

static bool all_finite(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return false;
    return true;
}

bool codebook_record_parse(const codebook_header *h, const uint8_t *bytes, codebook_head *head)
{
    const size_t d = (size_t)h->head_dim, k = (size_t)h->n_centroids, lower = d * d * sizeof(float), all = codebook_record_bytes(h);
    if (get64(bytes + all - 8) != XXH3_64bits(bytes, all - 8)) return false;
    memcpy(head->lower, bytes, lower);
    memcpy(centroids_of(h, head), bytes + lower, codebook_centroid_bytes(h));
    head->iterations = (int32_t)get32(bytes + all - 16);
    if (!all_finite(head->lower, d * d)) return false;
    if (h->type == CODEBOOK_INT8) return all_finite(head->mean, d + k);
    for (size_t i = 0; i < k * d; i++)
        if ((head->f16[i] & 0x7c00) == 0x7c00) return false;
    return true;
}

void codebook_quantise(const codebook_header *h, const math_kernels *kernels, float *rows, codebook_head *head)
{
    const int64_t d = h->head_dim, k = h->n_centroids;
    if (h->type == CODEBOOK_F16) {
        kernels->vector->to_f16(rows, k * d, head->f16);
        return;
    }
    for (int64_t i = 0; i < d; i++) {
        double sum = 0;
        for (int64_t j = 0; j < k; j++) sum += rows[j * d + i];
        head->mean[i] = (float)(sum / (double)k);
    }
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = 0; i < d; i++) rows[j * d + i] -= head->mean[i];
        head->scale[j] = vq_quantise_i8(rows + j * d, (int)d, head->int8 + j * d);
    }
}

void codebook_expand(const codebook_header *h, const math_kernels *kernels, const codebook_head *head, float *rows)
{
    const int64_t d = h->head_dim, k = h->n_centroids;
    if (h->type == CODEBOOK_F16)
        kernels->vector->from_f16(head->f16, k * d, rows);
    else
        for (int64_t i = 0; i < k * d; i++) rows[i] = head->mean[i % d] + head->scale[i / d] * (float)head->int8[i];
}
