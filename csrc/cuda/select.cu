/* SPDX-License-Identifier: Apache-2.0
 *
 * select: which scorer, how many query blocks to a strip, and where the strips lie.
 */
#include "cuda.h"

#include "../core/arena.h"
#include "antidiagonal.cuh"
#include "launch.cuh"
#include "mean_pool.cuh"

using namespace pbs;

namespace {

/* Every device since sm_80 gives a block this much shared memory. */
constexpr size_t MOST_SHARED = 99 << 10;
/* Slots of workspace: two blocks for each of 132 multiprocessors, less where rows are long. */
constexpr int64_t MOST_SLOTS = 264;
constexpr size_t MOST_SLOT_BYTES = 256 << 20;

struct select_run {
    select_args args;
    int64_t blocks;
    size_t shared;
};

/* Shared memory, and floats of workspace for each slot. */
struct scorer_needs {
    int32_t rows;
    size_t with_strip, without; /* bytes of shared memory */
    int64_t scratch_floats;
};

scorer_needs needs_of(const pbs_select_params *p, const pbs_dims *d) {
    scorer_needs needs = {};
    const size_t row = sizeof(float) * static_cast<size_t>(d->blocks_k);
    switch (p->method) {
    case PBS_SELECT_MEAN_POOL:
        needs.rows = MEAN_POOL_ROWS;
        needs.without = mean_pool_shared(d);
        needs.with_strip = needs.without + MEAN_POOL_ROWS * row;
        break;
    case PBS_SELECT_ANTIDIAGONAL:
        needs.rows = antidiagonal_rows(p, d);
        needs.without = sizeof(antidiagonal_plan);
        needs.with_strip = sizeof(antidiagonal_groups) + static_cast<size_t>(needs.rows) * row;
        if (needs.with_strip < needs.without) needs.with_strip = needs.without;
        needs.scratch_floats =
            static_cast<int64_t>(needs.rows) * (d->block_q / p->stride) * d->blocks_k;
        break;
    }
    return needs;
}

size_t cut(const pbs_select_params *p, const pbs_dims *d, void *workspace, select_run *run) {
    const scorer_needs needs = needs_of(p, d);
    const bool strip_shared = needs.with_strip <= MOST_SHARED;
    const int64_t strip_floats = strip_shared ? 0 : static_cast<int64_t>(needs.rows) * d->blocks_k;
    const int64_t slot_floats = strip_floats + needs.scratch_floats;
    pbs_arena arena = pbs_arena_at(workspace);
    select_args *a = &run->args;
    a->p = *p;
    a->d = *d;
    a->rows = needs.rows;
    a->strips = pbs_ceil_div(d->blocks_q, needs.rows);
    a->items = static_cast<int64_t>(d->batch) * d->heads_q * a->strips;
    a->scratch_floats = needs.scratch_floats;
    run->shared = strip_shared ? needs.with_strip : needs.without;
    run->blocks = a->items < INT32_MAX ? a->items : INT32_MAX;
    if (slot_floats) {
        const int64_t fit = static_cast<int64_t>(MOST_SLOT_BYTES / sizeof(float)) / slot_floats;
        const int64_t slots = fit < 1 ? 1 : fit < MOST_SLOTS ? fit : MOST_SLOTS;
        if (run->blocks > slots) run->blocks = slots;
    }
    a->strip =
        strip_floats
            ? static_cast<float *>(pbs_arena_take(&arena, run->blocks, strip_floats, sizeof(float)))
            : nullptr;
    a->scratch = static_cast<float *>(
        pbs_arena_take(&arena, run->blocks, needs.scratch_floats, sizeof(float)));
    return pbs_arena_bytes(&arena);
}

template <class T> pbs_status launch_select(const select_run &run) {
    const pbs_exec &exec = run.args.p.exec;
    switch (run.args.p.method) {
    case PBS_SELECT_MEAN_POOL:
        return PBS_LAUNCH(exec, (select_kernel<mean_pool<T>>), run.blocks, SELECT_THREADS,
                          run.shared, run.args);
    case PBS_SELECT_ANTIDIAGONAL:
    default:
        return PBS_LAUNCH(exec, (select_kernel<antidiagonal<T>>), run.blocks, SELECT_THREADS,
                          run.shared, run.args);
    }
}

} // namespace

size_t pbs_cuda_select_bytes(const pbs_select_params *p, const pbs_dims *d, const void *) {
    select_run run;
    return cut(p, d, nullptr, &run);
}

pbs_status pbs_cuda_select(const pbs_select_params *p, const pbs_dims *d, const void *) {
    select_run run;
    PBS_TRY(pbs_cuda_check_aligned("q", &p->q));
    if (p->method == PBS_SELECT_ANTIDIAGONAL)
        PBS_TRY(pbs_cuda_check_aligned("k", &p->k.view));
    else if (reinterpret_cast<uintptr_t>(p->k_pool) % 16)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "k_pool: %p; 16-byte alignment is needed",
                        static_cast<const void *>(p->k_pool));
    cut(p, d, p->workspace, &run);
    return d->dtype == PBS_DTYPE_BF16 ? launch_select<bf16>(run) : launch_select<fp16>(run);
}
