#include "base/threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "base/memory.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define SPIN_PAUSE() _mm_pause()
#else
#define SPIN_PAUSE() ((void)0)
#endif

enum {
    MAX_THREADS = 256,
    SPINS_BEFORE_SLEEP = 4000, /* about 50-100 us: longer than the serial gaps inside a decode step */
    SPINS_BEFORE_YIELD = 2000, /* the caller's wait: give the core away if a worker needs it to finish */
};

/* `ticket` holds a loop's generation in its upper half and the next unclaimed task in the lower half, so that a worker which wakes late
 * cannot claim a task of a loop it did not see. */
struct thread_pool {
    int n_threads;
    pthread_mutex_t caller; /* serialises loops of several callers */
    pthread_mutex_t lock;   /* guards sleeping */
    pthread_cond_t wake;
    _Atomic int n_sleeping;
    _Atomic uint64_t ticket;
    _Atomic int64_t n_done;
    _Atomic bool quit;
    _Atomic int64_t n_tasks; /* atomic only because a late worker may read them while the next loop is set up */
    _Atomic(task_fn) fn;
    _Atomic(void *) context;
    struct worker {
        thread_pool *pool;
        int index;
        pthread_t thread;
        /* Expected memory: written between loops, read by a thread with nothing to do. One that reads it half changed fetches in vain. */
        _Atomic(const char *) next;
        _Atomic size_t next_bytes;
    } worker[];
};

static uint32_t generation_of(uint64_t ticket)
{
    return (uint32_t)(ticket >> 32);
}

/* Claims and runs tasks of one generation until none is left. */
static void work(thread_pool *p, uint32_t generation, int thread)
{
    task_fn fn = atomic_load_explicit(&p->fn, memory_order_acquire);
    void *context = atomic_load_explicit(&p->context, memory_order_acquire);
    int64_t n = atomic_load_explicit(&p->n_tasks, memory_order_acquire);
    uint64_t t = atomic_load_explicit(&p->ticket, memory_order_acquire);
    while (generation_of(t) == generation && (int64_t)(uint32_t)t < n) {
        if (!atomic_compare_exchange_weak_explicit(&p->ticket, &t, t + 1, memory_order_acq_rel, memory_order_acquire)) continue;
        fn(context, (int64_t)(uint32_t)t, thread);
        atomic_fetch_add_explicit(&p->n_done, 1, memory_order_release);
        t = atomic_load_explicit(&p->ticket, memory_order_acquire);
    }
}

/* What an idle thread may fetch. */
typedef struct idle {
    const char *at, *end;
} idle;

static idle idle_begin(struct worker *w)
{
    const char *next = atomic_load_explicit(&w->next, memory_order_relaxed);
    return (idle){next, next ? next + atomic_load_explicit(&w->next_bytes, memory_order_relaxed) : NULL};
}

/* One step of waiting. */
static inline void idle_step(idle *i)
{
    enum { LINE = 64 };
    if (i->at < i->end) {
        __builtin_prefetch(i->at, 0, 2);
        i->at += LINE;
    } else {
        SPIN_PAUSE();
    }
}

static void *worker_main(void *argument)
{
    struct worker *w = argument;
    thread_pool *p = w->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t now = seen;
        idle wait = idle_begin(w);
        for (int i = 0; i < SPINS_BEFORE_SLEEP && now == seen && !atomic_load_explicit(&p->quit, memory_order_relaxed); i++) {
            idle_step(&wait);
            now = generation_of(atomic_load_explicit(&p->ticket, memory_order_acquire));
        }
        if (now == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->n_sleeping, 1);
            while (!atomic_load(&p->quit) && generation_of(atomic_load(&p->ticket)) == seen) pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->n_sleeping, 1);
            pthread_mutex_unlock(&p->lock);
            now = generation_of(atomic_load(&p->ticket));
        }
        if (atomic_load(&p->quit)) return NULL;
        seen = now;
        work(p, seen, w->index);
    }
}

thread_pool *thread_pool_create(int n_threads, quarry_error *error)
{
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        error_set(error, QUARRY_ERROR_ARGUMENT, "number of threads must be between 1 and %d, not %d", MAX_THREADS, n_threads);
        return NULL;
    }
    thread_pool *p = memory_zero(1, sizeof *p + (size_t)n_threads * sizeof p->worker[0], "thread pool", error);
    if (!p) return NULL;
    pthread_mutex_init(&p->caller, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->n_threads = 1;
    for (int i = 1; i < n_threads; i++) {
        p->worker[i].pool = p;
        p->worker[i].index = i;
        if (pthread_create(&p->worker[i].thread, NULL, worker_main, &p->worker[i]) != 0) {
            error_set(error, QUARRY_ERROR_MEMORY, "cannot start thread %d of %d; try fewer threads with -t", i + 1, n_threads);
            thread_pool_destroy(p);
            return NULL;
        }
        p->n_threads = i + 1;
    }
    return p;
}

void thread_pool_destroy(thread_pool *p)
{
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->quit, true);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->n_threads; i++) pthread_join(p->worker[i].thread, NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    pthread_mutex_destroy(&p->caller);
    memory_free(p);
}

int thread_pool_size(const thread_pool *p)
{
    return p->n_threads;
}

void thread_pool_run(thread_pool *p, int64_t n_tasks, task_fn fn, void *context)
{
    if (p->n_threads == 1 || n_tasks <= 1) {
        /* Still one caller at a time: tasks use the scratch of thread 0. */
        pthread_mutex_lock(&p->caller);
        for (int64_t i = 0; i < n_tasks; i++) fn(context, i, 0);
        pthread_mutex_unlock(&p->caller);
        return;
    }
    pthread_mutex_lock(&p->caller);
    /* Close the old generation's ticket before its fields change: a late worker that reads the new fields then finds nothing to claim. */
    uint32_t generation = generation_of(atomic_load(&p->ticket));
    atomic_store(&p->ticket, (uint64_t)generation << 32 | UINT32_MAX);
    generation = generation == UINT32_MAX ? 1 : generation + 1;
    atomic_store_explicit(&p->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&p->fn, fn, memory_order_release);
    atomic_store_explicit(&p->context, context, memory_order_release);
    atomic_store_explicit(&p->n_tasks, n_tasks, memory_order_release);
    atomic_store(&p->ticket, (uint64_t)generation << 32);
    if (atomic_load(&p->n_sleeping) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    work(p, generation, 0);
    idle wait = idle_begin(&p->worker[0]);
    for (int i = 0; atomic_load_explicit(&p->n_done, memory_order_acquire) < n_tasks; i++) {
        if (i < SPINS_BEFORE_YIELD)
            idle_step(&wait);
        else
            sched_yield();
    }
    pthread_mutex_unlock(&p->caller);
}

void thread_pool_expect(thread_pool *p, int thread, const void *data, size_t n_bytes)
{
    atomic_store_explicit(&p->worker[thread].next, data, memory_order_relaxed);
    atomic_store_explicit(&p->worker[thread].next_bytes, n_bytes, memory_order_relaxed);
}
