/* A pool of threads that share parallel loops. Workers spin briefly after a loop and then sleep, so a decode step pays no system
 * calls and an idle or outnumbered process gives its cores away. */
#ifndef BASE_THREADS_H
#define BASE_THREADS_H

#include <stdint.h>

#include "base/error.h"

typedef struct thread_pool thread_pool;

/* n_threads includes the caller of thread_pool_run; 1 creates no thread. */
thread_pool *thread_pool_create(int n_threads, quarry_error *error);
void thread_pool_destroy(thread_pool *pool);
int thread_pool_size(const thread_pool *pool);

/* One task of a loop; thread is in [0, size) and picks per-thread scratch. */
typedef void (*task_fn)(void *context, int64_t task, int thread);

/* Runs task 0 … n_tasks-1, each once, claimed in order by whichever thread is free (so one may wait for an earlier one); returns when all
 * are done. What a task computes must
 * not depend on its thread, so results do not depend on the number of threads. Callers on several threads are served one after the other. A
 * task must not call it. */
void thread_pool_run(thread_pool *pool, int64_t n_tasks, task_fn fn, void *context);

/* Names memory that the thread soon reads: until another call it fetches that into its caches whenever it waits for the others. For the
 * caller of loops, between them. The memory may go at any time. */
void thread_pool_expect(thread_pool *pool, int thread, const void *data, size_t n_bytes);

#endif
