/* A2ATS (arXiv 2502.12665): one code per far token, out of a codebook that calibration made; a token's score is that of its centroid, as if it stood at one distance from
 * every query (windowed RoPE). Each query head takes its best tokens, the group reads their union, exactly and with exact RoPE; the rest is dropped.
 *
 * Lists of the tokens of a centroid are linked from the newest to the oldest, so that truncation only unlinks heads of lists. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "attn/policies.h"
#include "vq/vq.h"

enum { TILE = 32 /* centroids scored at a time */, ROWS = 8 /* keys coded at a time */, DIMS = 64 /* of a tile, made f32 at a time */ };

/* Centroids stay as they are stored: f16 ones in tiles, [tile][d][TILE], so that a tile becomes f32 in one go, where it is needed and nowhere else. */
typedef struct a2ats_tables {
    codebook_header header;
    atomic_int references; /* policies that share it: of a session and its forks */
    int64_t tiles;         /* of a head */
    float *metric;         /* [layer][head][d][d] L L' */
    float *half;           /* [layer][head][tiles][TILE] |C|^2 / 2 under the metric; INFINITY where there is no centroid */
    uint16_t *f16;         /* [layer][head][tiles][d][TILE] C L^-1; or */
    int8_t *int8;          /* [layer][head][tiles][TILE][d], */
    float *scale, *mean;   /* [layer][head][tiles][TILE], [layer][head][d] */
} a2ats_tables;

typedef struct a2ats {
    attn_policy base;
    double budget;
    a2ats_tables *tables;
    int64_t capacity; /* far tokens that there is room for */
    int32_t *newest;  /* [layer][head][n_centroids] far token, -1: none */
    int32_t *count;   /* [layer][head][n_centroids] */
    uint16_t *code;   /* [layer][head][capacity], from token ATTN_SINKS on */
    int32_t *next;    /* [layer][head][capacity] the token before it in its list, -1: none */
} a2ats;

void attn_rotate(const attn_rope *rope, const math_kernels *kernels, int64_t by, float *x)
{
    float cs[1024];
    for (int i = 0; i < rope->n_rot / 2; i++) {
        const double angle = (double)by * rope->inverse[i];
        cs[2 * i] = (float)cos(angle);
        cs[2 * i + 1] = (float)sin(angle);
    }
    if (rope->n_rot) kernels->vector->rope(x, cs, rope->n_rot, rope->halves);
}

/* ---- tables ---- */

static void tables_release(a2ats_tables *t)
{
    if (!t || atomic_fetch_sub(&t->references, 1) > 1) return;
    void *const arrays[] = {t->metric, t->half, t->f16, t->int8, t->scale, t->mean, t};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) memory_free(arrays[i]);
}

static size_t tables_bytes(const a2ats_tables *t)
{
    const size_t heads = (size_t)t->header.n_layer * (size_t)t->header.n_head_kv, d = (size_t)t->header.head_dim;
    const size_t k = (size_t)t->tiles * TILE, stored = t->f16 ? k * d * sizeof *t->f16 : k * d + (k + d) * sizeof(float);
    return sizeof *t + heads * (stored + (d * d + k) * sizeof(float));
}

/* out[n][stride] from centroid TILE * tile on = products of q[n][d] with a tile of the head's centroids. */
static void score_tile(const a2ats_tables *t, const math_kernels *kernels, size_t at, int64_t tile, const float *q, int64_t n, float *out,
                       int64_t stride)
{
    const int64_t d = t->header.head_dim, first = (int64_t)at * t->tiles + tile;
    if (t->int8) {
        float bias[ATTN_MAX_GROUP];
        for (int64_t i = 0; i < n; i++) bias[i] = kernels->vector->dot(q + i * d, t->mean + (int64_t)at * d, d);
        kernels->retrieval->dot_i8(q, (int)n, (int)d, t->int8 + first * TILE * d, t->scale + first * TILE, bias, TILE, out, stride);
        return;
    }
    for (int64_t i = 0; i < d; i += DIMS) {
        float part[DIMS * TILE];
        const int64_t dims = d - i < DIMS ? d - i : DIMS;
        kernels->vector->from_f16(t->f16 + (first * d + i) * TILE, dims * TILE, part);
        kernels->retrieval->product(q + i, d, 1, part, TILE, out, stride, n, TILE, dims, i > 0);
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
    float *rows = work, *whitened = rows + k * d, *transposed = whitened + k * d, *half = t->half + first * TILE;
    vq_transpose(head->lower, d, d, (int)d, transposed, d);
    kernels->retrieval->product(head->lower, d, 1, transposed, d, t->metric + (int64_t)at * d * d, d, d, d, d, false);
    codebook_expand(&t->header, kernels, head, rows);
    kernels->retrieval->product(rows, d, 1, t->metric + (int64_t)at * d * d, d, whitened, d, k, d, d, false);
    for (int64_t j = 0; j < t->tiles * TILE; j++) half[j] = j < k ? kernels->vector->dot(rows + j * d, whitened + j * d, d) / 2 : INFINITY;
    if (t->int8) {
        memcpy(t->int8 + first * TILE * d, head->int8, (size_t)(k * d));
        memcpy(t->scale + first * TILE, head->scale, (size_t)k * sizeof *t->scale);
        memcpy(t->mean + (int64_t)at * d, head->mean, (size_t)d * sizeof *t->mean);
        return;
    }
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = 0; i < d; i++) t->f16[(first * d + j / TILE * d + i) * TILE + j % TILE] = head->f16[j * d + i];
}

static bool tables_allocate(a2ats_tables *t, quarry_error *error)
{
    const size_t heads = (size_t)t->header.n_layer * (size_t)t->header.n_head_kv, d = (size_t)t->header.head_dim;
    const size_t cells = (size_t)t->tiles * TILE;
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
    t->tiles = (h->n_centroids + TILE - 1) / TILE;
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

static a2ats_tables *tables_read(const char *path, const attn_shape *shape, const math_kernels *kernels, quarry_error *error)
{
    size_t n_bytes = 0;
    char *bytes = file_read_all(path, &n_bytes, error);
    a2ats_tables *t = bytes ? memory_zero(1, sizeof *t, "codebook", error) : NULL;
    if (t) {
        atomic_init(&t->references, 1);
        quarry_code code = codebook_header_parse(&t->header, (const uint8_t *)bytes, n_bytes, path, error);
        if (code == QUARRY_OK) code = check_model(&t->header, shape, path, error);
        if (code == QUARRY_OK) code = read_records(t, kernels, (const uint8_t *)bytes, n_bytes, path, error);
        if (code != QUARRY_OK) {
            tables_release(t);
            t = NULL;
        }
    }
    memory_free(bytes);
    return t;
}

/* ---- the state ---- */

static size_t n_heads(const a2ats *p)
{
    return (size_t)p->base.shape.kv.n_layer * (size_t)p->base.shape.kv.n_head_kv;
}

static size_t head_index(const a2ats *p, int layer, int head)
{
    return (size_t)layer * (size_t)p->base.shape.kv.n_head_kv + (size_t)head;
}

static void a2ats_destroy(attn_policy *policy)
{
    a2ats *p = (a2ats *)policy;
    tables_release(p->tables);
    memory_free(p->newest);
    memory_free(p->count);
    memory_free(p->code);
    memory_free(p->next);
    memory_free(p);
}

/* Takes over tables, also when it fails. */
static a2ats *a2ats_new(const attn_shape *shape, const math_kernels *kernels, double budget, a2ats_tables *tables, quarry_error *error)
{
    a2ats *p = memory_zero(1, sizeof *p, "retrieval policy", error);
    if (!p) {
        tables_release(tables);
        return NULL;
    }
    p->base = (attn_policy){.type = &attn_a2ats, .shape = *shape, .kernels = kernels, .n_far = ATTN_SINKS};
    p->budget = budget;
    p->tables = tables;
    const size_t cells = n_heads(p) * (size_t)tables->header.n_centroids;
    p->newest = memory_alloc(cells, sizeof *p->newest, "retrieval policy", error);
    p->count = p->newest ? memory_zero(cells, sizeof *p->count, "retrieval policy", error) : NULL;
    if (!p->count) {
        a2ats_destroy(&p->base);
        return NULL;
    }
    memset(p->newest, 0xff, cells * sizeof *p->newest);
    return p;
}

static attn_policy *a2ats_create(const attn_shape *shape, const math_kernels *kernels, const char *spec, quarry_error *error)
{
    double budget = 0.03;
    char path[ATTN_OPTION_TEXT] = "";
    const attn_option table[] = {{"codebook", path, 0, 0}, {"budget", &budget, 0, 1}};
    if (attn_options_parse("a2ats", spec, table, 2, error) != QUARRY_OK) return NULL;
    if (!*path) {
        error_set(error, QUARRY_ERROR_ARGUMENT, "policy a2ats needs codebook=FILE, a file that 'quarry calibrate' makes");
        return NULL;
    }
    if (shape->n_head / shape->kv.n_head_kv > ATTN_MAX_GROUP || shape->rope.n_rot > 1024) {
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "policy a2ats: at most %d query heads share a KV head, of 1024 rotated dimensions",
                  ATTN_MAX_GROUP);
        return NULL;
    }
    a2ats_tables *tables = tables_read(path, shape, kernels, error);
    a2ats *p = tables ? a2ats_new(shape, kernels, budget, tables, error) : NULL;
    return p ? &p->base : NULL;
}

/* Room for n far tokens in every head; on failure nothing changed. */
static quarry_code grow(a2ats *p, int64_t n, quarry_error *error)
{
    if (n <= p->capacity) return QUARRY_OK;
    const int64_t capacity = n + n / 2 + 64, used = p->base.n_far - ATTN_SINKS;
    uint16_t *code = memory_alloc(n_heads(p) * (size_t)capacity, sizeof *code, "codes of keys", error);
    int32_t *next = code ? memory_alloc(n_heads(p) * (size_t)capacity, sizeof *next, "codes of keys", error) : NULL;
    if (!next) {
        memory_free(code);
        return QUARRY_ERROR_MEMORY;
    }
    for (size_t i = 0; i < n_heads(p) && used; i++) {
        memcpy(code + i * (size_t)capacity, p->code + i * (size_t)p->capacity, (size_t)used * sizeof *code);
        memcpy(next + i * (size_t)capacity, p->next + i * (size_t)p->capacity, (size_t)used * sizeof *next);
    }
    memory_free(p->code);
    memory_free(p->next);
    p->code = code;
    p->next = next;
    p->capacity = capacity;
    return QUARRY_OK;
}

static attn_policy *a2ats_fork(const attn_policy *policy, quarry_error *error)
{
    const a2ats *from = (const a2ats *)policy;
    atomic_fetch_add(&from->tables->references, 1);
    a2ats *p = a2ats_new(&from->base.shape, from->base.kernels, from->budget, from->tables, error);
    if (!p) return NULL;
    const size_t cells = n_heads(p) * (size_t)p->tables->header.n_centroids;
    if (from->capacity) {
        p->code = memory_alloc(n_heads(p) * (size_t)from->capacity, sizeof *p->code, "codes of keys", error);
        p->next = p->code ? memory_alloc(n_heads(p) * (size_t)from->capacity, sizeof *p->next, "codes of keys", error) : NULL;
        if (!p->next) {
            a2ats_destroy(&p->base);
            return NULL;
        }
        const size_t used = (size_t)(from->base.n_far - ATTN_SINKS), capacity = (size_t)from->capacity;
        for (size_t i = 0; i < n_heads(p); i++) {
            memcpy(p->code + i * capacity, from->code + i * capacity, used * sizeof *p->code);
            memcpy(p->next + i * capacity, from->next + i * capacity, used * sizeof *p->next);
        }
        p->capacity = from->capacity;
    }
    memcpy(p->newest, from->newest, cells * sizeof *p->newest);
    memcpy(p->count, from->count, cells * sizeof *p->count);
    p->base.n_far = from->base.n_far;
    return &p->base;
}

static quarry_code a2ats_reserve(attn_policy *policy, int64_t n, quarry_error *error)
{
    return grow((a2ats *)policy, policy->n_far - ATTN_SINKS + n, error);
}

/* nearest[n] of keys[n][d], n <= ROWS, under the metric M: the largest x M c - c M c / 2, which takes no centroids but those that score. */
static void code_keys(const a2ats_tables *t, const math_kernels *kernels, size_t at, const float *keys, int64_t n, int32_t *nearest)
{
    const int64_t d = t->header.head_dim;
    const float *half = t->half + (int64_t)at * t->tiles * TILE;
    float turned[ROWS * 1024], score[ROWS * TILE], best[ROWS];
    kernels->retrieval->product(keys, d, 1, t->metric + (int64_t)at * d * d, d, turned, d, n, d, d, false);
    for (int64_t i = 0; i < n; i++) {
        nearest[i] = 0;
        best[i] = -INFINITY;
    }
    for (int64_t tile = 0; tile < t->tiles; tile++) {
        score_tile(t, kernels, at, tile, turned, n, score, TILE);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < TILE; j++) {
                const float x = score[i * TILE + j] - half[tile * TILE + j];
                if (!(x > best[i])) continue;
                best[i] = x;
                nearest[i] = (int32_t)(tile * TILE + j);
            }
    }
}

static void a2ats_append(attn_policy *policy, int layer, int head, const kv_seq *kv, int64_t n, arena *scratch)
{
    (void)scratch;
    a2ats *p = (a2ats *)policy;
    const a2ats_tables *t = p->tables;
    const int64_t d = t->header.head_dim;
    const size_t at = head_index(p, layer, head), k = (size_t)t->header.n_centroids;
    uint16_t *code = p->code + at * (size_t)p->capacity;
    int32_t *next = p->next + at * (size_t)p->capacity, *newest = p->newest + at * k, *count = p->count + at * k;
    for (int64_t first = policy->n_far, end = first + n; first < end; first += ROWS) {
        const int64_t rows = end - first < ROWS ? end - first : ROWS;
        float keys[ROWS * 1024];
        int32_t nearest[ROWS];
        for (int64_t i = 0; i < rows; i++) {
            kv_read_key(p->base.kernels, kv_row(kv, layer, head, first + i), &policy->shape.kv, keys + i * d);
            if (!t->header.exact_rope) attn_rotate(&policy->shape.rope, p->base.kernels, -(first + i), keys + i * d);
        }
        code_keys(t, p->base.kernels, at, keys, rows, nearest);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t far = first + i - ATTN_SINKS;
            code[far] = (uint16_t)nearest[i];
            next[far] = newest[nearest[i]];
            newest[nearest[i]] = (int32_t)(first + i);
            count[nearest[i]]++;
        }
    }
}

static void a2ats_commit(attn_policy *p, int64_t n)
{
    p->n_far += n;
}

static void a2ats_truncate(attn_policy *policy, int64_t n)
{
    a2ats *p = (a2ats *)policy;
    const size_t k = (size_t)p->tables->header.n_centroids;
    const int64_t end = n > ATTN_SINKS ? n : ATTN_SINKS;
    for (size_t at = 0; at < n_heads(p); at++)
        for (int64_t i = policy->n_far - ATTN_SINKS - 1; i >= end - ATTN_SINKS; i--) {
            const size_t cell = at * k + p->code[at * (size_t)p->capacity + (size_t)i];
            p->newest[cell] = p->next[at * (size_t)p->capacity + (size_t)i];
            p->count[cell]--;
        }
    if (end < policy->n_far) policy->n_far = end;
}

static size_t a2ats_bytes(const attn_policy *policy)
{
    const a2ats *p = (const a2ats *)policy;
    return sizeof *p + n_heads(p) * ((size_t)p->capacity * 6 + (size_t)p->tables->header.n_centroids * 8) + tables_bytes(p->tables);
}

/* ---- select ---- */

static bool ranks_before(const float *score, int32_t a, int32_t b)
{
    return score[a] > score[b] || (score[a] == score[b] && a < b);
}

static void sift(const float *score, int32_t *heap, int64_t n, int64_t i)
{
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && ranks_before(score, heap[child + 1], heap[child])) child++;
        if (!ranks_before(score, heap[child], heap[i])) return;
        const int32_t held = heap[i];
        heap[i] = heap[child];
        heap[child] = held;
    }
}

/* The first `wanted` far tokens in order of score, then centroid, then from the newest; those not marked yet are marked and added to out. Returns how many list entries it walked. */
static int64_t take_best(const a2ats *p, size_t at, const float *score, int64_t wanted, int32_t *heap, uint64_t *marks, attn_selection *out)
{
    const int32_t k = p->tables->header.n_centroids;
    const int32_t *newest = p->newest + at * (size_t)k, *next = p->next + at * (size_t)p->capacity;
    int64_t n = 0, left = wanted;
    for (int32_t j = 0; j < k; j++)
        if (newest[j] >= 0) heap[n++] = j;
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift(score, heap, n, i);
    for (; n > 0 && left > 0; heap[0] = heap[--n], sift(score, heap, n, 0))
        for (int32_t token = newest[heap[0]]; token >= 0 && left > 0; token = next[token - ATTN_SINKS], left--) {
            const uint64_t bit = 1ULL << (token & 63);
            if (marks[token >> 6] & bit) continue;
            marks[token >> 6] |= bit;
            out->ids[out->n++] = token;
        }
    return wanted - left;
}

static quarry_code a2ats_select(const attn_policy *policy, int layer, int head, const kv_seq *kv, const float *q, int64_t pos,
                                const attention_state *near, arena *scratch, attn_selection *out, attn_cost *cost, quarry_error *error)
{
    (void)kv, (void)near;
    const a2ats *p = (const a2ats *)policy;
    const a2ats_tables *t = p->tables;
    const int64_t d = t->header.head_dim, k = t->header.n_centroids, stride = t->tiles * TILE;
    const int64_t group = policy->shape.n_head / policy->shape.kv.n_head_kv;
    const int64_t far = policy->n_far - ATTN_SINKS, wanted = (int64_t)(p->budget * (double)far);
    const size_t at = head_index(p, layer, head), words = (size_t)(policy->n_far + 63) / 64;
    *out = (attn_selection){0};
    if (wanted <= 0) return QUARRY_OK;
    const int64_t most = wanted * group < far ? wanted * group : far;
    out->ids = arena_alloc(scratch, (size_t)most, sizeof *out->ids, error);
    float *rotated = arena_alloc(scratch, (size_t)(group * (d + stride)), sizeof *rotated, error), *score = rotated + group * d;
    int32_t *heap = arena_alloc(scratch, (size_t)k, sizeof *heap, error);
    uint64_t *marks = arena_alloc(scratch, words, sizeof *marks, error);
    if (!out->ids || !rotated || !heap || !marks) return QUARRY_ERROR_MEMORY;
    memset(marks, 0, words * sizeof *marks);
    memcpy(rotated, q, (size_t)(group * d) * sizeof *q);
    for (int64_t g = 0; g < group && !t->header.exact_rope; g++)
        attn_rotate(&policy->shape.rope, policy->kernels, t->header.distance - pos, rotated + g * d);
    for (int64_t tile = 0; tile < t->tiles; tile++) score_tile(t, policy->kernels, at, tile, rotated, group, score + tile * TILE, stride);
    for (int64_t g = 0; g < group; g++)
        cost->index_bytes += take_best(p, at, score + g * stride, wanted, heap, marks, out) * (int64_t)sizeof *p->next;
    cost->table_bytes += (int64_t)codebook_centroid_bytes(&t->header) + k * (int64_t)sizeof *p->newest;
    return QUARRY_OK;
}

const attn_policy_type attn_a2ats = {
    .name = "a2ats",
    .summary = "reads the best far tokens of each query head by calibrated codes of keys before RoPE, drops the rest (arXiv 2502.12665)",
    .options = "codebook=FILE    what 'quarry calibrate' made for this model; needed\n"
               "budget=0.03      share of the far tokens that each query head reads\n",
    .create = a2ats_create,
    .destroy = a2ats_destroy,
    .fork = a2ats_fork,
    .reserve = a2ats_reserve,
    .append = a2ats_append,
    .commit = a2ats_commit,
    .select = a2ats_select,
    .truncate = a2ats_truncate,
    .bytes = a2ats_bytes,
};
