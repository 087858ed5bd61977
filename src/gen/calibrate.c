#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "gen/gen.h"
#include "vq/vq.h"

enum { BATCH = 512, LONGEST_WINDOW = 8192 };

/* What is gathered: a policy that only observes. */
typedef struct gathering {
    attn_policy base;
    const codebook_header *header;
    double *moments; /* [layer][head][d][d] of queries at the distance */
    uint16_t *keys;  /* [layer][head][n][d] f16, before RoPE unless exact_rope */
    int64_t n;       /* tokens in all */
} gathering;

static void observe(attn_policy *policy, int layer, int head, const float *q, int64_t first, int64_t n)
{
    gathering *g = (gathering *)policy;
    const attn_shape *shape = &policy->shape;
    const int d = shape->kv.head_dim, group = shape->n_head / shape->kv.n_head_kv;
    double *moments = g->moments + ((size_t)layer * (size_t)shape->kv.n_head_kv + (size_t)head) * (size_t)(d * d);
    for (int64_t i = 0; i < n * group; i++) {
        float x[1024];
        memcpy(x, q + i * d, (size_t)d * sizeof *x);
        if (!g->header->exact_rope) attn_rotate(&shape->rope, policy->kernels, g->header->distance - (first + i / group), x);
        for (int a = 0; a < d; a++)
            for (int b = 0; b < d; b++) moments[a * d + b] += (double)x[a] * x[b];
    }
}

static const attn_policy_type gathering_type = {.name = "calibrate", .observe = observe};

typedef struct keys_job {
    gathering *g;
    const kv_seq *kv;
    int64_t first, n, at; /* positions of the window's piece; where they go */
} keys_job;

static void keys_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const keys_job *job = context;
    const attn_shape *shape = &job->g->base.shape;
    const int d = shape->kv.head_dim, layer = (int)(task / shape->kv.n_head_kv), head = (int)(task % shape->kv.n_head_kv);
    for (int64_t i = 0; i < job->n; i++) {
        float key[1024];
        kv_read_key(job->g->base.kernels, kv_row(job->kv, layer, head, job->first + i), &shape->kv, key);
        if (!job->g->header->exact_rope) attn_rotate(&shape->rope, job->g->base.kernels, -(job->first + i), key);
        job->g->base.kernels->vector->to_f16(key, d, job->g->keys + (task * job->g->n + job->at + i) * d);
    }
}

/* One window, densely, from position 0. */
static quarry_code gather_window(quarry_model *m, gathering *g, forward_scratch *scratch, const int32_t *tokens, int64_t n, int64_t at,
                                 const quarry_watch *watch, quarry_error *error)
{
    kv_seq *kv = kv_create(&g->base.shape.kv, error);
    quarry_code code = kv ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    for (int64_t first = 0; first < n && code == QUARRY_OK; first += BATCH) {
        forward_row rows[BATCH];
        const int64_t count = n - first < BATCH ? n - first : BATCH;
        if (watch && watch->progress && !watch->progress(at + first, g->n, watch->data)) {
            code = error_set(error, QUARRY_ERROR_CANCELLED, "cancelled");
            break;
        }
        for (int64_t i = 0; i < count; i++)
            rows[i] = (forward_row){.kv = kv, .policy = &g->base, .pos = first + i, .token = tokens[first + i], .dense = true};
        model_lock(m);
        code = model_forward(m, scratch, rows, count, NULL, NULL, NULL, error);
        keys_job job = {g, kv, first, count, at + first};
        const kv_shape *s = &g->base.shape.kv;
        if (code == QUARRY_OK) thread_pool_run(model_pool(m), (int64_t)s->n_layer * s->n_head_kv, keys_task, &job);
        model_unlock(m);
    }
    kv_destroy(kv);
    return code;
}

static quarry_code gather(quarry_model *m, gathering *g, const int32_t *tokens, const quarry_watch *watch, quarry_error *error)
{
    const int64_t trained = model_shape_of(m)->n_ctx_train, window = trained < LONGEST_WINDOW ? trained : LONGEST_WINDOW;
    forward_scratch *scratch = forward_scratch_create(m, error);
    quarry_code code = scratch ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    for (int64_t at = 0; at < g->n && code == QUARRY_OK; at += window)
        code = gather_window(m, g, scratch, tokens + at, g->n - at < window ? g->n - at : window, at, watch, error);
    forward_scratch_destroy(scratch);
    return code;
}

/* Tokens of lines of random UUIDs after tokens[n_text]; all in *out (memory_free). */
static quarry_code add_random(const quarry_model *m, codebook_header *h, const int32_t *tokens, int32_t **out, quarry_error *error)
{
    enum { LINE = 37 }; /* 32 digits, 4 dashes, end of line; never fewer than 8 tokens */
    const int64_t lines = h->n_random / 8 + 1;
    char *text = memory_alloc((size_t)lines, LINE, "random text", error);
    int32_t *random_tokens = NULL;
    if (!text) return QUARRY_ERROR_MEMORY;
    random_state random;
    random_seed(&random, h->seed);
    for (int64_t i = 0; i < lines * LINE; i++) {
        const int64_t k = i % LINE;
        text[i] = k == LINE - 1 ? '\n' : k == 8 || k == 13 || k == 18 || k == 23 ? '-' : "0123456789abcdef"[random_below(&random, 16)];
    }
    const int64_t n = quarry_tokenize(m, text, (size_t)(lines * LINE), false, &random_tokens, error);
    memory_free(text);
    if (n < 0) return (quarry_code)n;
    if (n < h->n_random) h->n_random = n;
    *out = memory_alloc((size_t)(h->n_text + h->n_random), sizeof **out, "calibration tokens", error);
    if (*out) {
        if (h->n_text) memcpy(*out, tokens, (size_t)h->n_text * sizeof **out);
        if (h->n_random) memcpy(*out + h->n_text, random_tokens, (size_t)h->n_random * sizeof **out);
    }
    quarry_free(random_tokens);
    return *out ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

/* ---- clustering ---- */

typedef struct cluster_job {
    const gathering *g;
    int64_t first;    /* head of task 0 */
    uint8_t *records; /* [tasks] */
    int32_t *used;    /* [tasks] iterations */
    quarry_code *codes;
    quarry_error *errors; /* [tasks] */
} cluster_job;

static quarry_code cluster_head(const gathering *g, int64_t at, uint8_t *record, int32_t *used, arena *scratch, quarry_error *error)
{
    const codebook_header *h = g->header;
    const int64_t d = h->head_dim, n = g->n, k = h->n_centroids, stride = vq_column_stride(n);
    const retrieval_kernels *retrieval = g->base.kernels->retrieval;
    float *work = arena_alloc(scratch, (size_t)(n * d + stride * d), sizeof *work, error);
    float *small = arena_alloc(scratch, (size_t)(2 * k * d + 2 * d * d), sizeof *small, error);
    float *keys = arena_alloc(scratch, (size_t)(n * d), sizeof *keys, error);
    int32_t *assign = arena_alloc(scratch, (size_t)n, sizeof *assign, error);
    void *stored = arena_alloc(scratch, codebook_centroid_bytes(h), 1, error);
    if (!work || !small || !keys || !assign || !stored) return QUARRY_ERROR_MEMORY;
    float *rows = work, *columns = rows + n * d, *centroids = small, *scoring = centroids + k * d, *lower = scoring + k * d;
    quarry_code code =
        vq_root((int)d, g->moments + at * d * d, (double)h->exponent, (double)h->shrink, lower, lower + d * d, scratch, error);
    if (code != QUARRY_OK) return code;
    g->base.kernels->vector->from_f16(g->keys + at * n * d, n * d, keys);
    retrieval->product(keys, d, 1, lower, d, rows, d, n, d, d, false);
    vq_transpose(rows, d, n, (int)d, columns, stride);
    const vq_points points = {.rows = rows, .columns = columns, .n = n, .row_stride = d, .column_stride = stride, .d = (int)d};
    codebook_head head = {.lower = lower};
    code = vq_kmeans_converge(g->base.kernels, &points, (int)k, h->iterations, h->seed + (uint64_t)at, centroids, assign, &head.iterations,
                              scratch, error);
    if (code != QUARRY_OK) return code;
    retrieval->product(centroids, d, 1, lower + d * d, d, scoring, d, k, d, d, false);
    codebook_head_place(h, stored, &head);
    codebook_quantise(h, g->base.kernels, scoring, &head);
    codebook_record_pack(h, &head, record);
    *used = head.iterations;
    return QUARRY_OK;
}

static void cluster_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const cluster_job *job = context;
    arena scratch = {0};
    job->codes[task] = cluster_head(job->g, job->first + task, job->records + (size_t)task * codebook_record_bytes(job->g->header),
                                    &job->used[task], &scratch, &job->errors[task]);
    arena_free(&scratch);
}

/* ---- the file ---- */

static quarry_code fail_io(const char *path, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_IO, "%s: cannot write: %s", path, strerror(errno));
}

static quarry_code write_at(int fd, const char *path, const uint8_t *bytes, size_t n, size_t offset, quarry_error *error)
{
    for (size_t done = 0; done < n;) {
        const ssize_t wrote = pwrite(fd, bytes + done, n - done, (off_t)(offset + done));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return fail_io(path, error);
        done += (size_t)wrote;
    }
    return fsync(fd) ? fail_io(path, error) : QUARRY_OK;
}

static void count_head(const codebook_header *h, int32_t iterations, calibrate_result *result)
{
    result->average += (double)iterations / ((double)h->n_layer * h->n_head_kv);
    result->capped += iterations == h->iterations;
}

/* result->resumed = whole records of the same parameters at the beginning of an unfinished file; 0 when it is another's or none. */
static quarry_code resumable(int fd, const uint8_t *header, const codebook_header *h, int64_t heads, calibrate_result *result,
                             quarry_error *error)
{
    uint8_t found[CODEBOOK_HEADER];
    if (pread(fd, found, sizeof found, 0) != (ssize_t)sizeof found || memcmp(found, header, sizeof found) != 0) return QUARRY_OK;
    const size_t d = (size_t)h->head_dim, record = codebook_record_bytes(h);
    uint8_t *bytes = memory_alloc(record, 1, "codebook", error);
    codebook_head head = {.lower = bytes ? memory_alloc(d * d, sizeof(float), "codebook", error) : NULL};
    void *stored = head.lower ? memory_alloc(codebook_centroid_bytes(h), 1, "codebook", error) : NULL;
    if (stored) codebook_head_place(h, stored, &head);
    for (int64_t i = 0; stored && i < heads; i++) {
        if (pread(fd, bytes, record, (off_t)(CODEBOOK_HEADER + (size_t)i * record)) != (ssize_t)record) break;
        if (!codebook_record_parse(h, bytes, &head)) break;
        count_head(h, head.iterations, result);
        result->resumed++;
    }
    const quarry_code code = stored ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    memory_free(bytes);
    memory_free(head.lower);
    memory_free(stored);
    return code;
}

/* The heads that are missing, as many at a time as there are threads. */
static quarry_code cluster_all(quarry_model *m, const gathering *g, int64_t heads, int fd, const char *path, const quarry_watch *watch,
                               calibrate_result *result, quarry_error *error)
{
    const int threads = thread_pool_size(model_pool(m));
    const size_t record = codebook_record_bytes(g->header);
    const int64_t first = result->resumed;
    uint8_t *records = memory_alloc((size_t)threads, record, "codebook", error);
    quarry_code *codes = records ? memory_zero((size_t)threads, sizeof *codes, "codebook", error) : NULL;
    int32_t *used = codes ? memory_zero((size_t)threads, sizeof *used, "codebook", error) : NULL;
    quarry_error *errors = used ? memory_zero((size_t)threads, sizeof *errors, "codebook", error) : NULL;
    quarry_code code = errors ? QUARRY_OK : QUARRY_ERROR_MEMORY;
    for (int64_t at = first; at < heads && code == QUARRY_OK; at += threads) {
        const int64_t n = heads - at < threads ? heads - at : threads;
        if (watch && watch->progress && !watch->progress(at, heads, watch->data)) {
            code = error_set(error, QUARRY_ERROR_CANCELLED, "cancelled");
            break;
        }
        cluster_job job = {g, at, records, used, codes, errors};
        thread_pool_run(model_pool(m), n, cluster_task, &job);
        for (int64_t i = 0; i < n && code == QUARRY_OK; i++)
            if ((code = codes[i]) == QUARRY_OK)
                count_head(g->header, used[i], result);
            else if (error)
                *error = errors[i];
        if (code == QUARRY_OK) code = write_at(fd, path, records, (size_t)n * record, CODEBOOK_HEADER + (size_t)at * record, error);
    }
    memory_free(records);
    memory_free(codes);
    memory_free(used);
    memory_free(errors);
    return code;
}

static quarry_code make_file(quarry_model *m, gathering *g, const int32_t *tokens, const char *partial, const char *path,
                             const quarry_watch *watch_tokens, const quarry_watch *watch_heads, calibrate_result *result,
                             quarry_error *error)
{
    const codebook_header *h = g->header;
    const int64_t heads = (int64_t)h->n_layer * h->n_head_kv;
    const size_t record = codebook_record_bytes(h);
    uint8_t header[CODEBOOK_HEADER];
    codebook_header_pack(h, header);
    const int fd = open(partial, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return fail_io(partial, error);
    quarry_code code = resumable(fd, header, h, heads, result, error);
    const int first = result->resumed;
    if (code == QUARRY_OK && ftruncate(fd, first ? (off_t)(CODEBOOK_HEADER + (size_t)first * record) : 0)) code = fail_io(partial, error);
    if (code == QUARRY_OK && first == 0) code = write_at(fd, partial, header, sizeof header, 0, error);
    if (code == QUARRY_OK && first < heads) code = gather(m, g, tokens, watch_tokens, error);
    if (code == QUARRY_OK) code = cluster_all(m, g, heads, fd, partial, watch_heads, result, error);
    if (close(fd) && code == QUARRY_OK) code = fail_io(partial, error);
    if (code == QUARRY_OK && rename(partial, path)) code = fail_io(path, error);
    return code;
}

quarry_code calibrate(quarry_model *model, codebook_header *header, const int32_t *tokens, int64_t n_tokens, const char *path,
                      const quarry_watch *watch_tokens, const quarry_watch *watch_heads, calibrate_result *result, quarry_error *error)
{
    const attn_shape shape = model_attn_shape(model, KV_F32);
    gathering g = {.base = {.type = &gathering_type, .shape = shape, .kernels = model_kernels(model)}, .header = header};
    *result = (calibrate_result){0};
    header->fingerprint = shape.fingerprint;
    header->n_layer = shape.kv.n_layer;
    header->n_head_kv = shape.kv.n_head_kv;
    header->head_dim = shape.kv.head_dim;
    header->n_text = n_tokens;
    int32_t *all = NULL;
    char *partial = memory_alloc(strlen(path) + sizeof ".partial", 1, "file name", error);
    quarry_code code = partial ? add_random(model, header, tokens, &all, error) : QUARRY_ERROR_MEMORY;
    if (code == QUARRY_OK && codebook_record_bytes(header) == 0)
        code = error_set(error, QUARRY_ERROR_UNSUPPORTED, "no codebook of %d centroids of %d dimensions", header->n_centroids,
                         header->head_dim);
    g.n = header->n_text + header->n_random;
    if (code == QUARRY_OK && g.n < header->n_centroids)
        code = error_set(error, QUARRY_ERROR_ARGUMENT, "%lld tokens of calibration text are too few for %d centroids", (long long)g.n,
                         header->n_centroids);
    if (code == QUARRY_OK) {
        const size_t heads = (size_t)shape.kv.n_layer * (size_t)shape.kv.n_head_kv, d = (size_t)shape.kv.head_dim;
        strcat(strcpy(partial, path), ".partial");
        g.moments = memory_zero(heads * d * d, sizeof *g.moments, "moments of queries", error);
        g.keys = g.moments ? memory_alloc(heads * (size_t)g.n, d * sizeof *g.keys, "keys", error) : NULL;
        code = g.keys ? make_file(model, &g, all, partial, path, watch_tokens, watch_heads, result, error) : QUARRY_ERROR_MEMORY;
    }
    memory_free(g.moments);
    memory_free(g.keys);
    memory_free(all);
    memory_free(partial);
    return code;
}
