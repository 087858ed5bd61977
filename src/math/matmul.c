#include "math/matmul.h"

#include <stdatomic.h>
#include <string.h>

#include "math/matmul_internal.h"

static size_t panel_bytes(const weight *w)
{
    if (!w->packed) return (size_t)PANEL_ROWS * (size_t)w->n_in * block_info_get(w->type)->n_bytes;
    panel_layout layout;
    panel_layout_get(w->type, &layout);
    return (size_t)(w->n_in / layout.n_weights) * layout.n_bytes;
}

static int64_t panel_count(const weight *w)
{
    return (w->n_out + PANEL_ROWS - 1) / PANEL_ROWS;
}

struct pack_loop {
    const weight *w;
    const uint8_t *source;
    uint8_t *data;
};

static void pack_panel(void *context, int64_t panel, int thread)
{
    (void)thread;
    const struct pack_loop *loop = context;
    const weight *w = loop->w;
    const block_info *info = block_info_get(w->type);
    panel_layout layout;
    panel_layout_get(w->type, &layout);
    size_t n_bytes = panel_bytes(w);
    uint8_t *out = loop->data + (size_t)panel * n_bytes;
    int64_t n_blocks = w->n_in / layout.n_weights;
    if (panel * PANEL_ROWS + PANEL_ROWS > w->n_out) memset(out, 0, n_bytes); /* rows beyond n_out are zero weights */
    for (int row = 0; row < PANEL_ROWS && panel * PANEL_ROWS + row < w->n_out; row++) {
        const uint8_t *source = loop->source + (size_t)((panel * PANEL_ROWS + row) * n_blocks) * info->n_bytes;
        for (int64_t b = 0; b < n_blocks; b++)
            panel_put_block(w->type, &layout, out + (size_t)b * layout.n_bytes, row, source + (size_t)b * info->n_bytes);
    }
}

size_t weight_packed_bytes(block_type type, int64_t n_out, int64_t n_in)
{
    const weight w = {.type = type, .n_out = n_out, .n_in = n_in, .packed = true};
    return block_traits_get(type) ? (size_t)panel_count(&w) * panel_bytes(&w) : 0;
}

quarry_code weight_make(weight *w, const matmul_kernels *kernels, thread_pool *pool, block_type type, int64_t n_out, int64_t n_in,
                        const void *source, quarry_error *error)
{
    return weight_make_in(w, NULL, kernels, pool, type, n_out, n_in, source, error);
}

quarry_code weight_make_in(weight *w, arena *memory, const matmul_kernels *kernels, thread_pool *pool, block_type type, int64_t n_out,
                           int64_t n_in, const void *source, quarry_error *error)
{
    (void)kernels; /* all instruction sets share one layout */
    *w = (weight){.type = type, .n_out = n_out, .n_in = n_in, .data = source};
    const block_info *info = block_info_get(type);
    if (!info) return error_set(error, QUARRY_ERROR_UNSUPPORTED, "block type %d is not supported", (int)type);
    if (n_out < 1 || n_in < 1 || n_out > INT64_MAX / 8 / n_in)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "a matrix of %lld x %lld weights cannot be", (long long)n_out, (long long)n_in);
    if (n_in % info->n_weights != 0)
        return error_set(error, QUARRY_ERROR_UNSUPPORTED, "rows of %lld weights are no multiple of the %u in a %s block", (long long)n_in,
                         (unsigned)info->n_weights, info->name);
    if (!block_traits_get(type)) {
        w->n_bytes = (size_t)n_out * (size_t)n_in * info->n_bytes;
        return QUARRY_OK;
    }
    w->packed = true;
    w->n_bytes = weight_packed_bytes(type, n_out, n_in);
    uint8_t *data = memory ? arena_alloc(memory, w->n_bytes, 1, error) : memory_aligned(w->n_bytes, 1, "weights", error);
    if (!data) {
        *w = (weight){0};
        return QUARRY_ERROR_MEMORY;
    }
    w->owned = !memory;
    w->data = data;
    thread_pool_run(pool, panel_count(w), pack_panel, &(struct pack_loop){w, source, data});
    return QUARRY_OK;
}

void weight_free(weight *w)
{
    if (w->owned) memory_free((void *)(uintptr_t)w->data);
    *w = (weight){0};
}

void weight_row(const weight *w, int64_t row, float *out)
{
    if (!w->packed) {
        block_dequantize(w->type, (const uint8_t *)w->data + (size_t)(row * w->n_in) * block_info_get(w->type)->n_bytes, w->n_in, out);
        return;
    }
    panel_layout layout;
    panel_layout_get(w->type, &layout);
    const uint8_t *panel = (const uint8_t *)w->data + (size_t)(row / PANEL_ROWS) * panel_bytes(w);
    for (int64_t i = 0; i < w->n_in; i += layout.n_weights, panel += layout.n_bytes) {
        block_parts parts;
        panel_get(w->type, &layout, panel, (int)(row % PANEL_ROWS), &parts);
        block_parts_values(w->type, &parts, out + i);
    }
}

size_t activations_bytes(int64_t n_rows, int64_t n_in, bool precise)
{
    size_t n_bytes = (activation_bytes(n_rows, n_in, precise) + 63) / 64 * 64;
    if (!precise) n_bytes += (size_t)((n_rows + ACTIVATION_GROUP - 1) / ACTIVATION_GROUP) * rest_list_bytes(n_in);
    return n_bytes;
}

/* The lists of what one term leaves, behind the groups; NULL for precise activations. */
static const rest_list *activations_rests(const activations *a)
{
    if (a->precise) return NULL;
    return (const rest_list *)(const void *)((const uint8_t *)a->quantized + (activation_bytes(a->n_rows, a->n_in, false) + 63) / 64 * 64);
}

/* The rests of a group of n rows. Each row's depend on that row alone, so that a document gives the same in parts of any size. */
static void quantize_rests(const matmul_kernels *kernels, const float *x, int n, int64_t n_in, const uint8_t *group, rest_list *list)
{
    int64_t n_blocks = n_in / SUB_BLOCK, step = n * activation_row_bytes(false);
    const uint8_t *scales = group + n * SUB_BLOCK;
    double limit[ACTIVATION_GROUP] = {0};
    for (int64_t b = 0; b < n_blocks; b++) {
        const activation_scale *s = (const activation_scale *)(const void *)(scales + b * step);
        for (int t = 0; t < n; t++) limit[t] += (double)s[t].d * (double)s[t].d * REST_LIMIT / (double)n_blocks;
    }
    list->n = 0;
    for (int64_t b = 0; b < n_blocks; b++) {
        const activation_scale *s = (const activation_scale *)(const void *)(scales + b * step);
        for (int t = 0; t < n; t++) {
            if (!((double)s[t].d * (double)s[t].d > limit[t])) continue; /* NaN: no rest */
            const int8_t *q = (const int8_t *)group + b * step + t * SUB_BLOCK;
            float rest[SUB_BLOCK];
            for (int i = 0; i < SUB_BLOCK; i++) rest[i] = x[t * n_in + b * SUB_BLOCK + i] - s[t].d * (float)q[i];
            rest_block *block = &list->blocks[list->n++];
            kernels->quantize(rest, 1, SUB_BLOCK, (uint8_t *)block);
            block->block = (int32_t)b;
            block->row = t;
        }
    }
}

struct quantize_loop {
    const activations *a;
    const matmul_kernels *kernels;
};

static void quantize_group(void *context, int64_t group, int thread)
{
    (void)thread;
    const struct quantize_loop *loop = context;
    const activations *a = loop->a;
    int64_t rows = activation_group(a->precise), first = group * rows;
    int n = (int)(a->n_rows - first < rows ? a->n_rows - first : rows);
    uint8_t *out = (uint8_t *)a->quantized + activation_bytes(first, a->n_in, a->precise);
    const float *x = a->x + first * a->n_in;
    if (a->precise) {
        loop->kernels->quantize_pairs(x, n, a->n_in, out);
        return;
    }
    loop->kernels->quantize(x, n, a->n_in, out);
    rest_list *list = (rest_list *)(uintptr_t)rest_list_at(activations_rests(a), group, a->n_in);
    quantize_rests(loop->kernels, x, n, a->n_in, out, list);
}

void activations_quantize(activations *a, const matmul_kernels *kernels, thread_pool *pool)
{
    enum { WORTH_A_LOOP = 1 << 15 }; /* floats; less takes no longer than waking a thread */
    struct quantize_loop loop = {a, kernels};
    if (a->n_in % SUB_BLOCK != 0) return; /* then all weights are floats and read a->x */
    int64_t rows = activation_group(a->precise), n_groups = (a->n_rows + rows - 1) / rows;
    if (a->n_rows * a->n_in >= WORTH_A_LOOP) {
        thread_pool_run(pool, n_groups, quantize_group, &loop);
        return;
    }
    for (int64_t i = 0; i < n_groups; i++) quantize_group(&loop, i, 0);
}

/* Panels are counted over all products of a loop. Each thread has an equal range of them: one row of activations is bound by memory, and memory is
 * fastest in long stretches in order (in tasks of at most 128 KB a decode step takes over a tenth longer). A thread that is done takes from the
 * ends of the others' ranges. */
typedef struct panel_range {
    _Alignas(64) _Atomic uint64_t left; /* next panel | end << 32 */
} panel_range;

enum {
    MAX_RANGES = 64,
    FEW_ROWS = 4, /* of activations: so few wait for the weights to come from memory, more for arithmetic */
};

struct matmul_loop {
    const matmul_kernels *kernels;
    const activations *a;
    const matmul_job *jobs;
    int n_jobs, n_ranges;
    int64_t step; /* the most panels taken at once */
    panel_range ranges[MAX_RANGES];
};

/* Takes panels: most of what is left from the front, or half of it from the end; 0: nothing is left. */
static int64_t range_take(panel_range *range, int64_t step, bool from_end, int64_t *first)
{
    uint64_t left = atomic_load_explicit(&range->left, memory_order_relaxed);
    for (;;) {
        int64_t begin = (int64_t)(uint32_t)left, end = (int64_t)(left >> 32),
                n = from_end ? (end - begin + 1) / 2 : (3 * (end - begin) + 3) / 4;
        if (n <= 0) return 0;
        if (n > step) n = step;
        *first = from_end ? end - n : begin;
        uint64_t rest = from_end ? (uint64_t)(end - n) << 32 | (uint64_t)begin : (uint64_t)end << 32 | (uint64_t)(begin + n);
        if (atomic_compare_exchange_weak_explicit(&range->left, &left, rest, memory_order_relaxed, memory_order_relaxed)) return n;
    }
}

/* Where range i of n begins. */
static int64_t range_first(int64_t n_panels, int i, int n)
{
    return n_panels * i / n;
}

static int range_count(const thread_pool *pool)
{
    return thread_pool_size(pool) < MAX_RANGES ? thread_pool_size(pool) : MAX_RANGES;
}

/* y[n][16 of n_out] from out[n][16]. */
static void store_rows(const matmul_job *job, int64_t panel, int64_t first, int64_t n, const float *out)
{
    int64_t row = panel * PANEL_ROWS, n_rows = job->w->n_out - row < PANEL_ROWS ? job->w->n_out - row : PANEL_ROWS;
    for (int64_t t = 0; t < n; t++, out += PANEL_ROWS) {
        float *y = job->y + (first + t) * job->w->n_out + row;
        for (int64_t i = 0; i < n_rows; i++) {
            float value = out[i];
            if (job->bias) value += job->bias[row + i];
            y[i] = job->accumulate ? y[i] + value : value;
        }
    }
}

static void run_panels(const struct matmul_loop *loop, const matmul_job *job, int64_t begin, int64_t end)
{
    enum { CHUNK = 48 }; /* rows of activations, a multiple of every group: with one panel they stay in the second-level cache */
    const activations *a = loop->a;
    const weight *w = job->w;
    size_t n_bytes = panel_bytes(w);
    float out[CHUNK * PANEL_ROWS];
    int64_t step = a->precise ? CHUNK / 2 : CHUNK;
    for (int64_t first = 0; first < a->n_rows; first += step) {
        int64_t n = a->n_rows - first < step ? a->n_rows - first : step;
        const uint8_t *quantized = (const uint8_t *)a->quantized + activation_bytes(first, a->n_in, a->precise);
        const rest_list *rests = a->precise ? NULL : rest_list_at(activations_rests(a), first / ACTIVATION_GROUP, a->n_in);
        for (int64_t p = begin; p < end; p++) {
            const uint8_t *data = (const uint8_t *)w->data + (size_t)p * n_bytes;
            int64_t n_w = w->n_out - p * PANEL_ROWS;
            if (w->packed) {
                loop->kernels->panel(w->type, data, a->n_in, quantized, rests, n, out);
            } else {
                loop->kernels->floats(w->type, data, n_w < PANEL_ROWS ? (int)n_w : PANEL_ROWS, a->n_in, a->x + first * a->n_in, n, out);
            }
            store_rows(job, p, first, n, out);
        }
    }
}

static void run_range(void *context, int64_t task, int thread)
{
    (void)thread;
    struct matmul_loop *loop = context;
    for (int i = 0; i < loop->n_ranges; i++) {
        panel_range *range = &loop->ranges[(task + i) % loop->n_ranges];
        int64_t begin, n;
        while ((n = range_take(range, loop->step, i > 0, &begin)) > 0) {
            int64_t end = begin + n;
            for (const matmul_job *job = loop->jobs; end > 0; job++) {
                int64_t n_panels = panel_count(job->w);
                if (begin < n_panels) run_panels(loop, job, begin > 0 ? begin : 0, end < n_panels ? end : n_panels);
                begin -= n_panels;
                end -= n_panels;
            }
        }
    }
}

void matmul_run(const matmul_kernels *kernels, thread_pool *pool, const activations *a, const matmul_job *jobs, int n_jobs)
{
    /* Many rows: two panels or more, which a few hundred KB of activations pass over. */
    enum { STEPS_PER_THREAD = 8, MOST_BYTES = 128 << 10 };
    struct matmul_loop loop = {
        .kernels = kernels, .a = a, .jobs = jobs, .n_jobs = n_jobs, .n_ranges = range_count(pool), .step = INT64_MAX};
    int64_t n_panels = 0;
    for (int i = 0; i < n_jobs; i++) n_panels += panel_count(jobs[i].w);
    if (a->n_rows > FEW_ROWS) {
        int64_t most = (int64_t)(MOST_BYTES / panel_bytes(jobs->w)), share = n_panels / (loop.n_ranges * STEPS_PER_THREAD);
        loop.step = share < most ? share : most;
        if (loop.step < 1) loop.step = 1;
    }
    for (int i = 0; i < loop.n_ranges; i++)
        atomic_init(&loop.ranges[i].left,
                    (uint64_t)range_first(n_panels, i, loop.n_ranges) | (uint64_t)range_first(n_panels, i + 1, loop.n_ranges) << 32);
    thread_pool_run(pool, loop.n_ranges, run_range, &loop);
}

void matmul_expect(thread_pool *pool, int64_t n_rows, const matmul_job *jobs, int n_jobs)
{
    enum { FETCH = 128 << 10 }; /* more than a wait has time for, less than a second-level cache */
    int64_t n_panels = 0;
    int n_ranges = range_count(pool);
    if (n_rows > FEW_ROWS) n_jobs = 0;
    for (int i = 0; i < n_jobs; i++) n_panels += panel_count(jobs[i].w);
    for (int t = 0; t < n_ranges; t++) {
        int64_t first = range_first(n_panels, t, n_ranges);
        const matmul_job *job = jobs;
        for (; job < jobs + n_jobs && first >= panel_count(job->w); job++) first -= panel_count(job->w);
        if (job == jobs + n_jobs) {
            thread_pool_expect(pool, t, NULL, 0);
            continue;
        }
        size_t at = (size_t)first * panel_bytes(job->w), n = job->w->n_bytes - at;
        thread_pool_expect(pool, t, (const char *)job->w->data + at, n < FETCH ? n : FETCH);
    }
}
