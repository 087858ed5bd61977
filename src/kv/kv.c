#include "kv/kv.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

/* All layers of a page are one allocation: it is large enough for huge pages, without which gathering scattered rows mostly waits for the
 * translation of their addresses. */
typedef struct kv_page {
    _Atomic int64_t n_refs;
    bool sparse; /* few of its rows are used */
    char *rows;  /* apart, so that their memory is first touched, and so cleared by the system, by the threads that write them */
} kv_page;

/* KV_PAGE tokens: of the layers that keep them all (NULL: all are cold), and of the local ones (NULL where there are none, or none any more). */
typedef struct kv_slot {
    kv_page *all, *local;
} kv_slot;

struct kv_seq {
    kv_shape shape;
    size_t row_bytes, layer_bytes; /* of a page's part in one layer */
    int64_t length;
    int64_t n_slots, capacity;
    int64_t n_released; /* the first slots whose local pages are gone */
    kv_slot *slots;     /* [capacity] */
    kv_cold *cold;
    kv_cold_span span;
};

static size_t page_bytes(const kv_shape *shape, int n_layer)
{
    return kv_row_bytes(shape->type, shape->head_dim) * KV_PAGE * (size_t)shape->n_head_kv * (size_t)n_layer;
}

static void page_free(kv_page *page)
{
    memory_free(page->rows);
    memory_free(page);
}

static kv_page *page_create(const kv_seq *kv, int n_layer, bool sparse, quarry_error *error)
{
    kv_page *page = memory_zero(1, sizeof *page, "KV page", error);
    if (!page) return NULL;
    atomic_init(&page->n_refs, 1);
    page->sparse = sparse;
    if ((page->rows = (sparse ? memory_sparse : memory_aligned)(page_bytes(&kv->shape, n_layer), 1, "KV page", error))) return page;
    page_free(page);
    return NULL;
}

static void page_release(kv_page *page)
{
    if (page && atomic_fetch_sub(&page->n_refs, 1) == 1) page_free(page);
}

static void slot_release(const kv_slot *slot)
{
    page_release(slot->all);
    page_release(slot->local);
}

/* Whether all rows of page i are cold. */
static bool is_cold(const kv_seq *kv, int64_t i)
{
    return i * KV_PAGE >= kv->span.from && (i + 1) * KV_PAGE <= kv->span.end;
}

/* Whether some are, or page i is behind such: who keeps rows elsewhere wants no memory for those that are not there yet. */
static bool is_sparse(const kv_seq *kv, int64_t i)
{
    return kv->span.end > 0 && (i + 1) * KV_PAGE > kv->span.from && !is_cold(kv, i);
}

/* Pages of slot i. */
static bool slot_create(const kv_seq *kv, int64_t i, bool local, quarry_error *error)
{
    kv_slot *slot = &kv->slots[i];
    const bool all = !is_cold(kv, i);
    local = local && kv->shape.n_local;
    *slot = (kv_slot){0};
    if (all) slot->all = page_create(kv, kv->shape.n_layer, is_sparse(kv, i), error);
    if ((slot->all || !all) && local) slot->local = page_create(kv, kv->shape.n_local, false, error);
    if ((slot->all || !all) && (slot->local || !local)) return true;
    slot_release(slot);
    return false;
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
    for (int64_t i = 0; i < kv->n_slots; i++) slot_release(&kv->slots[i]);
    kv_cold_release(kv->cold);
    memory_free(kv->slots);
    memory_free(kv);
}

kv_seq *kv_fork(const kv_seq *kv, quarry_error *error)
{
    kv_seq *fork = kv_create(&kv->shape, error);
    if (!fork) return NULL;
    size_t n = (size_t)kv->n_slots;
    if (memory_grow(&fork->slots, n, sizeof *fork->slots, "KV page table", error) != QUARRY_OK) {
        kv_destroy(fork);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        fork->slots[i] = kv->slots[i];
        if (fork->slots[i].all) atomic_fetch_add(&fork->slots[i].all->n_refs, 1);
        if (fork->slots[i].local) atomic_fetch_add(&fork->slots[i].local->n_refs, 1);
    }
    fork->n_slots = fork->capacity = kv->n_slots;
    fork->n_released = kv->n_released;
    fork->length = kv->length;
    fork->cold = kv->cold ? kv_cold_hold(kv->cold) : NULL;
    fork->span = kv->span;
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

static void slots_drop(kv_seq *kv, int64_t n_slots)
{
    for (int64_t i = n_slots; i < kv->n_slots; i++) slot_release(&kv->slots[i]);
    if (n_slots < kv->n_slots) kv->n_slots = n_slots;
    if (n_slots < kv->n_released) kv->n_released = n_slots;
}

/* The rows [first, end) of every one of n_layer layers and head. */
static void copy_rows(const kv_seq *kv, int n_layer, kv_page *to, const kv_page *from, int64_t first, int64_t end)
{
    for (int i = 0; i < n_layer * kv->shape.n_head_kv; i++) {
        size_t at = ((size_t)i * KV_PAGE + (size_t)first) * kv->row_bytes;
        memcpy(to->rows + at, from->rows + at, (size_t)(end - first) * kv->row_bytes);
    }
}

/* Rows [0, end) of page i, of the layers that keep them all, but for the cold ones. */
static void copy_hot(const kv_seq *kv, int64_t i, kv_page *to, const kv_page *from, int64_t end)
{
    const int64_t before = kv->span.from - i * KV_PAGE, behind = kv->span.end - i * KV_PAGE;
    if (behind <= 0) {
        copy_rows(kv, kv->shape.n_layer, to, from, 0, end);
        return;
    }
    if (before > 0) copy_rows(kv, kv->shape.n_layer, to, from, 0, before < end ? before : end);
    if (behind < end) copy_rows(kv, kv->shape.n_layer, to, from, behind, end);
}

static bool is_shared(const kv_page *page)
{
    return page && atomic_load(&page->n_refs) > 1;
}

/* The pages that hold row `length` if that row is not their first: rows before it are kept, so a shared page must be copied before more are written. */
static quarry_code unshare_last(kv_seq *kv, quarry_error *error)
{
    const int64_t index = kv->length / KV_PAGE, n = kv->length % KV_PAGE;
    if (n == 0 || index >= kv->n_slots) return QUARRY_OK;
    kv_slot *slot = &kv->slots[index];
    if (is_shared(slot->all)) {
        kv_page *copy = page_create(kv, kv->shape.n_layer, slot->all->sparse, error);
        if (!copy) return QUARRY_ERROR_MEMORY;
        copy_hot(kv, index, copy, slot->all, n);
        page_release(slot->all);
        slot->all = copy;
    }
    if (is_shared(slot->local)) {
        kv_page *copy = page_create(kv, kv->shape.n_local, false, error);
        if (!copy) return QUARRY_ERROR_MEMORY;
        copy_rows(kv, kv->shape.n_local, copy, slot->local, 0, n);
        page_release(slot->local);
        slot->local = copy;
    }
    return QUARRY_OK;
}

/* What the next token does not see in local layers, but for some slack. */
static void release_local(kv_seq *kv)
{
    if (!kv->shape.n_local) return;
    const int64_t end = kv_local_kept(&kv->shape, kv->length) / KV_PAGE;
    for (; kv->n_released < end; kv->n_released++) {
        kv_slot *slot = &kv->slots[kv->n_released];
        page_release(slot->local);
        slot->local = NULL;
    }
}

quarry_code kv_restore(kv_seq *kv, int64_t n, quarry_error *error)
{
    assert(kv->length == 0 && kv->n_slots == 0);
    const int64_t n_slots = (n + KV_PAGE - 1) / KV_PAGE;
    quarry_code code = memory_grow(&kv->slots, (size_t)n_slots, sizeof *kv->slots, "KV page table", error);
    if (code != QUARRY_OK) return code;
    kv->capacity = n_slots;
    kv->n_released = kv_local_kept(&kv->shape, n) / KV_PAGE;
    for (; kv->n_slots < n_slots; kv->n_slots++)
        if (!slot_create(kv, kv->n_slots, kv->n_slots >= kv->n_released, error)) {
            slots_drop(kv, 0);
            return QUARRY_ERROR_MEMORY;
        }
    kv->length = n;
    return QUARRY_OK;
}

quarry_code kv_reserve(kv_seq *kv, int64_t n, quarry_error *error)
{
    int64_t want = (n + KV_PAGE - 1) / KV_PAGE, had = kv->n_slots;
    release_local(kv);
    quarry_code code = unshare_last(kv, error);
    if (code != QUARRY_OK) return code;
    if (want > kv->capacity) {
        int64_t capacity = want + want / 2;
        if ((code = memory_grow(&kv->slots, (size_t)capacity, sizeof *kv->slots, "KV page table", error)) != QUARRY_OK) return code;
        kv->capacity = capacity;
    }
    for (; kv->n_slots < want; kv->n_slots++) {
        if (slot_create(kv, kv->n_slots, true, error)) continue;
        slots_drop(kv, had);
        return QUARRY_ERROR_MEMORY;
    }
    return QUARRY_OK;
}

void kv_commit(kv_seq *kv, int64_t n)
{
    assert(n >= kv->length && n <= kv->n_slots * KV_PAGE);
    kv->length = n;
}

int64_t kv_least(const kv_seq *kv)
{
    const int64_t local = kv->n_released ? kv->n_released * KV_PAGE + kv->shape.window - 1 : 1;
    return local > kv->span.length ? local : kv->span.length;
}

/* What is not cold of page i, in one that takes no more memory than that. */
static kv_page *thin_out(const kv_seq *kv, int64_t i, quarry_error *error)
{
    kv_page *thin = page_create(kv, kv->shape.n_layer, true, error);
    const int64_t n = kv->length - i * KV_PAGE;
    if (thin) copy_hot(kv, i, thin, kv->slots[i].all, n < KV_PAGE ? n : KV_PAGE);
    return thin;
}

/* Whether page i, of which some rows stay, has such as become cold now that those up to old_end were. */
static bool to_be_thinned(const kv_seq *kv, int64_t i, int64_t old_end)
{
    const int64_t end = kv->span.end < (i + 1) * KV_PAGE ? kv->span.end : (i + 1) * KV_PAGE;
    return is_sparse(kv, i) && (!kv->slots[i].all->sparse || (end > i * KV_PAGE && end > old_end));
}

quarry_code kv_set_cold(kv_seq *kv, kv_cold *cold, const kv_cold_span *span, quarry_error *error)
{
    const kv_cold_span old = kv->span;
    const int64_t at[2] = {0, span->end / KV_PAGE}; /* the pages that may be sparse */
    kv_page *thin[2] = {NULL, NULL};
    bool ok = true;
    assert(span->from < KV_PAGE && span->end >= span->from && span->end >= old.end);
    kv->span = *span;
    for (int i = 0; i < 2 && ok; i++)
        if (at[i] < kv->n_slots && (i == 0 || at[i] > 0) && to_be_thinned(kv, at[i], old.end))
            ok = (thin[i] = thin_out(kv, at[i], error)) != NULL;
    if (!ok) {
        page_release(thin[0]);
        kv->span = old;
        return QUARRY_ERROR_MEMORY;
    }
    for (int i = 0; i < 2; i++) {
        if (!thin[i]) continue;
        page_release(kv->slots[at[i]].all);
        kv->slots[at[i]].all = thin[i];
    }
    for (int64_t i = 0; i < kv->n_slots; i++) {
        if (!is_cold(kv, i)) continue;
        page_release(kv->slots[i].all);
        kv->slots[i].all = NULL;
    }
    if (cold != kv->cold) {
        kv_cold_release(kv->cold);
        kv->cold = kv_cold_hold(cold);
    }
    return QUARRY_OK;
}

kv_cold *kv_cold_of(const kv_seq *kv)
{
    return kv->cold;
}

const kv_cold_span *kv_cold_in(const kv_seq *kv)
{
    return &kv->span;
}

void kv_truncate(kv_seq *kv, int64_t n)
{
    assert(n == 0 || n >= kv->length || n >= kv_least(kv));
    if (n < kv->length) kv->length = n;
    slots_drop(kv, (kv->length + KV_PAGE - 1) / KV_PAGE);
    if (kv->length > 0) return;
    kv_cold_release(kv->cold);
    kv->cold = NULL;
    kv->span = (kv_cold_span){0};
}

void *kv_row(const kv_seq *kv, int layer, int head, int64_t pos)
{
    assert(pos >= 0 && pos < kv->n_slots * KV_PAGE);
    const kv_slot *slot = &kv->slots[pos / KV_PAGE];
    bool local = layer >= kv->shape.n_layer;
    assert(local ? slot->local != NULL : pos < kv->span.from || pos >= kv->span.end);
    char *rows = (local ? slot->local : slot->all)->rows;
    rows += (size_t)(local ? layer - kv->shape.n_layer : layer) * kv->layer_bytes;
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

static size_t slot_bytes(const kv_shape *shape, bool local)
{
    int n_layer = local ? shape->n_local : shape->n_layer;
    return local && n_layer == 0 ? 0 : memory_aligned_bytes(page_bytes(shape, n_layer));
}

/* Most pages that local layers hold: one is kept until all of it is done with. */
static int64_t live_slots(const kv_shape *shape, int64_t n_step)
{
    return (shape->window + KV_SLACK + n_step) / KV_PAGE + 2;
}

bool kv_bytes_for(const kv_shape *shape, int64_t n, int64_t n_step, size_t *n_bytes)
{
    size_t n_slots = (size_t)((n + KV_PAGE - 1) / KV_PAGE), all, local;
    size_t n_live = (size_t)live_slots(shape, n_step);
    if (n_live > n_slots) n_live = n_slots;
    if (!size_multiply(n_slots, slot_bytes(shape, false), &all) || !size_multiply(n_live, slot_bytes(shape, true), &local)) return false;
    *n_bytes = all + local;
    return *n_bytes >= all;
}

size_t kv_local_coming(const kv_seq *kv, int64_t n, int64_t n_step)
{
    const int64_t now = kv->n_slots - kv->n_released, live = live_slots(&kv->shape, n_step);
    const int64_t more = n / KV_PAGE + 1 < live - now ? n / KV_PAGE + 1 : live - now;
    return n > 0 && more > 0 ? (size_t)more * slot_bytes(&kv->shape, true) : 0;
}

double kv_bytes_seen(const kv_shape *shape, int64_t n)
{
    double local = (double)(n < shape->window ? n : shape->window) * shape->n_local;
    return ((double)n * shape->n_layer + local) * shape->n_head_kv * (double)kv_row_bytes(shape->type, shape->head_dim);
}

/* Of a sparse page what is used, in the system's pages. */
static size_t sparse_bytes(const kv_seq *kv, int64_t i)
{
    enum { SYSTEM_PAGE = 4096 };
    const int64_t first = i * KV_PAGE, before = kv->span.from - first, n = kv->length - first;
    const int64_t end = n < KV_PAGE ? n : KV_PAGE, behind = kv->span.end > first ? kv->span.end - first : 0;
    const int64_t rows = (before > 0 ? before : 0) + (behind < end ? end - behind : 0);
    const size_t each = ((size_t)rows * kv->row_bytes + SYSTEM_PAGE - 1) / SYSTEM_PAGE * SYSTEM_PAGE;
    return each * (size_t)(kv->shape.n_layer * kv->shape.n_head_kv);
}

size_t kv_bytes(const kv_seq *kv)
{
    size_t n = (size_t)(kv->n_slots - kv->n_released) * slot_bytes(&kv->shape, true) + (kv->cold ? kv_cold_row_bytes(kv->cold) : 0);
    for (int64_t i = 0; i < kv->n_slots; i++)
        if (kv->slots[i].all) n += kv->slots[i].all->sparse ? sparse_bytes(kv, i) : slot_bytes(&kv->shape, false);
    return n;
}

static void page_tally(const kv_seq *kv, const kv_page *page, bool local, memory_tally *tally)
{
    if (page) memory_tally_add(tally, page->rows, slot_bytes(&kv->shape, local));
}

void kv_tally(const kv_seq *kv, memory_tally *tally)
{
    for (int64_t i = 0; i < kv->n_slots; i++) {
        page_tally(kv, kv->slots[i].all, false, tally);
        page_tally(kv, kv->slots[i].local, true, tally);
    }
    if (kv->cold) kv_cold_tally(kv->cold, tally, NULL);
}
