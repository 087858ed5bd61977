#include "kv/kv.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

/* All layers of a page are one allocation: it is large enough for huge pages, without which gathering scattered rows mostly waits for the
 * translation of their addresses. */
typedef struct kv_page {
    _Atomic int64_t n_refs;
} kv_page; /* layers follow at PAGE_HEADER */

enum { PAGE_HEADER = 64 };

struct kv_seq {
    kv_shape shape;
    size_t row_bytes, layer_bytes; /* of a page's part in one layer */
    int64_t length;
    int64_t n_pages, capacity;
    kv_page **pages; /* [capacity] */
};

static size_t page_bytes(const kv_shape *shape)
{
    return PAGE_HEADER + kv_row_bytes(shape->type, shape->head_dim) * KV_PAGE * (size_t)shape->n_head_kv * (size_t)shape->n_layer;
}

static kv_page *page_create(const kv_seq *kv, quarry_error *error)
{
    kv_page *page = memory_aligned(page_bytes(&kv->shape), 1, "KV page", error);
    if (page) atomic_init(&page->n_refs, 1);
    return page;
}

static void page_release(kv_page *page)
{
    if (page && atomic_fetch_sub(&page->n_refs, 1) == 1) memory_free(page);
}

kv_seq *kv_create(const kv_shape *shape, quarry_error *error)
{
    kv_seq *kv = memory_zero(1, sizeof *kv, "KV cache", error);
    if (!kv) return NULL;
    kv->shape = *shape;
    kv->row_bytes = kv_row_bytes(shape->type, shape->head_dim);
    kv->layer_bytes = kv->row_bytes * (size_t)shape->n_head_kv * KV_PAGE;
    return kv;
}

void kv_destroy(kv_seq *kv)
{
    if (!kv) return;
    for (int64_t i = 0; i < kv->n_pages; i++) page_release(kv->pages[i]);
    memory_free(kv->pages);
    memory_free(kv);
}

kv_seq *kv_fork(const kv_seq *kv, quarry_error *error)
{
    kv_seq *fork = kv_create(&kv->shape, error);
    if (!fork) return NULL;
    size_t n = (size_t)kv->n_pages;
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
    for (int64_t i = n_pages; i < kv->n_pages; i++) page_release(kv->pages[i]);
    if (n_pages < kv->n_pages) kv->n_pages = n_pages;
}

/* The first n rows of every layer and head. */
static void copy_rows(const kv_seq *kv, kv_page *to, const kv_page *from, int64_t n)
{
    for (int i = 0; i < kv->shape.n_layer * kv->shape.n_head_kv; i++) {
        size_t at = PAGE_HEADER + (size_t)i * KV_PAGE * kv->row_bytes;
        memcpy((char *)to + at, (const char *)from + at, (size_t)n * kv->row_bytes);
    }
}

/* The page that holds row `length` if that row is not its first: rows before it are kept, so a shared page must be copied before more are written. */
static quarry_code unshare_last(kv_seq *kv, quarry_error *error)
{
    int64_t index = kv->length / KV_PAGE;
    if (kv->length % KV_PAGE == 0 || index >= kv->n_pages) return QUARRY_OK;
    kv_page **slot = &kv->pages[index];
    if (atomic_load(&(*slot)->n_refs) == 1) return QUARRY_OK;
    kv_page *copy = page_create(kv, error);
    if (!copy) return QUARRY_ERROR_MEMORY;
    copy_rows(kv, copy, *slot, kv->length % KV_PAGE);
    page_release(*slot);
    *slot = copy;
    return QUARRY_OK;
}

quarry_code kv_reserve(kv_seq *kv, int64_t n, quarry_error *error)
{
    int64_t want = (n + KV_PAGE - 1) / KV_PAGE, had = kv->n_pages;
    quarry_code code = unshare_last(kv, error);
    if (code != QUARRY_OK) return code;
    if (want > kv->capacity) {
        int64_t capacity = want + want / 2;
        if ((code = memory_grow(&kv->pages, (size_t)capacity, sizeof *kv->pages, "KV page table", error)) != QUARRY_OK) return code;
        kv->capacity = capacity;
    }
    for (; kv->n_pages < want; kv->n_pages++) {
        kv->pages[kv->n_pages] = page_create(kv, error);
        if (kv->pages[kv->n_pages]) continue;
        pages_drop(kv, had);
        return QUARRY_ERROR_MEMORY;
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
    char *rows = (char *)kv->pages[pos / KV_PAGE] + PAGE_HEADER + (size_t)layer * kv->layer_bytes;
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

bool kv_bytes_for(const kv_shape *shape, int64_t n, size_t *n_bytes)
{
    return size_multiply((size_t)((n + KV_PAGE - 1) / KV_PAGE), memory_aligned_bytes(page_bytes(shape)), n_bytes);
}

size_t kv_bytes(const kv_seq *kv)
{
    return (size_t)kv->n_pages * memory_aligned_bytes(page_bytes(&kv->shape));
}
