/* SPDX-License-Identifier: Apache-2.0
 *
 * Work over the caller's threads. parallel_for gets one task per thread slot; each task drains a
 * shared counter, so uneven items balance themselves, and any way of running the tasks (one
 * thread, nested regions, several slots in one call) is correct. An item writes only what belongs
 * to it, and meets the floating-point state that the kernel table asks for (state.h): results
 * cannot depend on who ran it.
 */
#ifndef PBS_CPU_THREADS_H
#define PBS_CPU_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

#include "kernels.h"

/* slot in [0, num_threads): whose scratch this item may use. */
typedef void (*pbs_item_fn)(void *context, int64_t item, int32_t slot);

typedef struct pbs_work {
    const pbs_cpu_kernels *k;
    atomic_llong next;
    int64_t count;
    pbs_item_fn item;
    void *context;
} pbs_work;

/* Covers slots [begin, end) but drains on the first one's scratch only. */
static inline void pbs_drain(int64_t begin, int64_t end, void *arg) {
    pbs_work *work = (pbs_work *)arg;
    if (begin >= end) return;
    pbs_cpu_state saved;
    work->k->enter(&saved);
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed);
        if (item >= work->count) break;
        work->item(work->context, item, (int32_t)begin);
    }
    work->k->leave(&saved);
}

static inline void pbs_run(const pbs_exec *exec, const pbs_cpu_kernels *k, int64_t count,
                           pbs_item_fn item, void *context) {
    if (count <= 0) return;
    pbs_work work = {.k = k, .count = count, .item = item, .context = context};
    atomic_init(&work.next, 0);
    int64_t tasks = exec->num_threads < count ? exec->num_threads : count;
    if (exec->parallel_for && tasks > 1)
        exec->parallel_for(exec->pool, 0, tasks, pbs_drain, &work);
    else
        pbs_drain(0, 1, &work);
}

#endif /* PBS_CPU_THREADS_H */
