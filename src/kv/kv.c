#include "kv/kv.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

typedef struct kv_page {
    _Atomic int64_t n_refs;
} kv_page; /* rows follow at PAGE_HEADER */

enum { PAGE_HEADER = 64 };

struct kv_seq {
    kv_shape shape;
    size_t row_bytes, page_bytes; /* page_bytes without the header */
    int64_t length;
    int64_t n_pages, capacity; /* per layer */
    kv_page **pages;           /* [capacity][n_layer] */
};

static kv_page *page_create(const kv_seq *kv, quarry_error *error)
{
    kv_page *page = memory_aligned(PAGE_HEADER + kv->page_bytes, 1, "KV page", error);
    if (page) atomic_init(&page->n_refs, 1);
    return page;
}

static void page_release(kv_page *page)
{
    if (page && atomic_fetch_sub(&page->n_refs, 1) == 1) memory_free(page);
}

static kv_page **page_slot(const kv_seq *kv, int64_t index, int layer)
{
    return &kv->pages[index * kv->shape.n_layer + layer];
}

kv_seq *kv_create(const kv_shape *shape, quarry_error *error)
{
    kv_seq *kv = memory_zero(1, sizeof *kv, "KV cache", error);
    if (!kv) return NULL;
    kv->shape = *shape;
    kv->row_bytes = kv_row_bytes(shape->type, shape->head_dim);
    kv->page_bytes = kv->row_bytes * (size_t)shape->n_head_kv * KV_PAGE;
    return kv;
}

void kv_destroy(kv_seq *kv)
{
    if (!kv) return;
    for (int64_t i = 0; i < kv->n_pages * kv->shape.n_layer; i++) page_release(kv->pages[i]);
    memory_free(kv->pages);
    memory_free(kv);
}

kv_seq *kv_fork(const kv_seq *kv, quarry_error *error)
{
    kv_seq *fork = kv_create(&kv->shape, error);
    if (!fork) return NULL;
    size_t n = (size_t)(kv->n_pages * kv->shape.n_layer);
    if (memory_grow(&fork->pages, n, sizeof *fork->pages, "KV page table", error) != QUARRY_OK) {
        kv_destroy(fork);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        fork->pages[i] = kv->pages[i];
        atomic_fetch_add(&fork->pages[i]->n_refs, 1);
    }
    fork->n_pages = fork->capacity = kv->n_pages;
    fork->length = kv->length;
    return fork;
}

const kv_shape *kv_shape_of(const kv_seq *kv)
{
    return &kv->shape;
}

int64_t kv_length(const kv_seq *kv)
{
    return kv->length;
}

static void pages_drop(kv_seq *kv, int64_t n_pages)
{
    for (int64_t i = n_pages * kv->shape.n_layer; i < kv->n_pages * kv->shape.n_layer; i++) page_release(kv->pages[i]);
    if (n_pages < kv->n_pages) kv->n_pages = n_pages;
}

/* The page that holds row `length` if that row is not its first: rows before it are kept, so a shared page must be copied before more are written. */
static quarry_code unshare_last(kv_seq *kv, quarry_error *error)
{
    int64_t index = kv->length / KV_PAGE;
    if (kv->length % KV_PAGE == 0 || index >= kv->n_pages) return QUARRY_OK;
    for (int layer = 0; layer < kv->shape.n_layer; layer++) {
        kv_page **slot = page_slot(kv, index, layer);
        if (atomic_load(&(*slot)->n_refs) == 1) continue;
        kv_page *copy = page_create(kv, error);
        if (!copy) return QUARRY_ERROR_MEMORY; /* the pages copied so far are as good as the shared ones */
        memcpy((char *)copy + PAGE_HEADER, (char *)*slot + PAGE_HEADER, kv->page_bytes);
        page_release(*slot);
        *slot = copy;
    }
    return QUARRY_OK;
}

quarry_code kv_reserve(kv_seq *kv, int64_t n, quarry_error *error)
{
    int64_t want = (n + KV_PAGE - 1) / KV_PAGE, had = kv->n_pages;
    quarry_code code = unshare_last(kv, error);
    if (code != QUARRY_OK) return code;
    if (want > kv->capacity) {
        int64_t capacity = want + want / 2;
        size_t slots;
        if (!size_multiply((size_t)capacity, (size_t)kv->shape.n_layer, &slots)) return error_memory(error, "KV page table", SIZE_MAX);
        if ((code = memory_grow(&kv->pages, slots, sizeof *kv->pages, "KV page table", error)) != QUARRY_OK) return code;
        kv->capacity = capacity;
    }
    for (; kv->n_pages < want; kv->n_pages++) {
        for (int layer = 0; layer < kv->shape.n_layer; layer++) {
            kv_page *page = page_create(kv, error);
            if (!page) {
                while (layer-- > 0) page_release(*page_slot(kv, kv->n_pages, layer));
                pages_drop(kv, had);
                return QUARRY_ERROR_MEMORY;
            }
            *page_slot(kv, kv->n_pages, layer) = page;
        }
    }
    return QUARRY_OK;
}

void kv_commit(kv_seq *kv, int64_t n)
{
    assert(n >= kv->length && n <= kv->n_pages * KV_PAGE);
    kv->length = n;
}

void kv_truncate(kv_seq *kv, int64_t n)
{
    if (n < kv->length) kv->length = n;
    pages_drop(kv, (kv->length + KV_PAGE - 1) / KV_PAGE);
}

void *kv_row(const kv_seq *kv, int layer, int head, int64_t pos)
{
    assert(pos >= 0 && pos < kv->n_pages * KV_PAGE);
    char *rows = (char *)*page_slot(kv, pos / KV_PAGE, layer) + PAGE_HEADER;
    return rows + ((size_t)head * KV_PAGE + (size_t)(pos % KV_PAGE)) * kv->row_bytes;
}

void kv_write(const math_kernels *kernels, void *row, const kv_shape *shape, const float *k, const float *v)
{
    int d = shape->head_dim;
    if (shape->type == KV_F16) {
        kernels->vector->to_f16(k, d, row);
        kernels->vector->to_f16(v, d, (uint16_t *)row + d);
    } else {
        memcpy(row, k, (size_t)d * sizeof *k);
        memcpy((float *)row + d, v, (size_t)d * sizeof *v);
    }
}

static void read_half(const math_kernels *kernels, const void *row, const kv_shape *shape, int first, float *out)
{
    if (shape->type == KV_F16)
        kernels->vector->from_f16((const uint16_t *)row + first, shape->head_dim, out);
    else
        memcpy(out, (const float *)row + first, (size_t)shape->head_dim * sizeof *out);
}

void kv_read_key(const math_kernels *kernels, const void *row, const kv_shape *shape, float *key)
{
    read_half(kernels, row, shape, 0, key);
}

void kv_read_value(const math_kernels *kernels, const void *row, const kv_shape *shape, float *value)
{
    read_half(kernels, row, shape, shape->head_dim, value);
}

size_t kv_bytes(const kv_seq *kv)
{
    return (size_t)(kv->n_pages * kv->shape.n_layer) * (PAGE_HEADER + kv->page_bytes);
}
