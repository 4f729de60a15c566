/* SPDX-License-Identifier: Apache-2.0
 *
 * permute: the driver. Workspace and launches; the kernels are in permute.cuh and
 * permute_queries.cuh.
 */
#include "../core/arena.h"
#include "cuda.h"
#include "launch.cuh"
#include "permute.cuh"
#include "permute_queries.cuh"

namespace pbs {

/* Permuted queries need the centroids of key blocks, wherever the caller wants none. */
static size_t cut(permute_run *run, void *workspace) {
    const pbs_dims *d = &run->d;
    pbs_arena arena = pbs_arena_at(workspace);
    if (!pbs_permutes_queries(run->mode)) return 0;
    /* Taken even if the caller wants k_pool: sizes may be asked for before outputs exist. */
    float *k_pool = static_cast<float *>(
        pbs_arena_take(&arena, static_cast<int64_t>(d->batch) * d->heads_p, d->blocks_k,
                       static_cast<size_t>(d->head_dim) * sizeof(float)));
    if (!run->k_pool) run->k_pool = k_pool;
    return pbs_arena_bytes(&arena);
}

static permute_run run_of(const pbs_permute_params *p, const pbs_dims *d) {
    permute_run run = {};
    run.q = p->q;
    run.k = p->k.view;
    run.v = p->v.view;
    run.d = *d;
    run.mode = p->mode;
    run.score = p->score;
    run.k_perm_in = p->k_perm_in;
    run.permute_heads = p->permute_heads;
    run.k_perm = p->k_perm;
    run.q_perm = p->q_perm;
    run.k_pool = p->k_pool;
    run.v_pool = p->v_pool;
    run.pool_len = p->pool_len;
    run.packed = static_cast<packed_header *>(p->packed);
    run.layout = packed_layout_of(d, pbs_permutes_keys(p->mode), p->correction);
    return run;
}

pbs_status prepare(const pbs_permute_params *p, const pbs_dims *d, permute_run *run) {
    *run = run_of(p, d);
    cut(run, p->workspace);
    PBS_TRY(pbs_cuda_check_aligned("k", &run->k));
    if (p->packed || p->v_pool) PBS_TRY(pbs_cuda_check_aligned("v", &run->v));
    return pbs_permutes_queries(p->mode) ? pbs_cuda_check_aligned("q", &run->q) : PBS_OK;
}

template <class T> static pbs_status launch_segments(const permute_run &run, const pbs_exec &exec) {
    return PBS_LAUNCH(exec, (permute_segment<T>), segment_blocks(run), SUM_THREADS,
                      sizeof(segment_plan), run);
}

template <class T> static pbs_status launch_queries(const permute_run &run, const pbs_exec &exec) {
    const int64_t segments = pbs_ceil_div(run.d.max_q, run.d.segment_size);
    return PBS_LAUNCH(exec, (permute_queries<T>),
                      static_cast<int64_t>(run.d.batch) * run.d.heads_q * segments, SUM_THREADS,
                      sizeof(queries_plan), run);
}

/* perm [heads, len] = 0 ... len - 1 each. */
PBS_KERNEL(SUM_THREADS, 4) fill_identity(int32_t *perm, int64_t count, int32_t len) {
    begin_kernel();
    const int64_t at = static_cast<int64_t>(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (at < count) perm[at] = static_cast<int32_t>(at % len);
}

} // namespace pbs

size_t pbs_cuda_packed_bytes(const pbs_dims *d, pbs_permute_mode mode, pbs_correction correction,
                             const void *kernels) {
    (void)kernels;
    return pbs::packed_layout_of(d, pbs_permutes_keys(mode), correction).bytes;
}

size_t pbs_cuda_permute_bytes(const pbs_permute_params *p, const pbs_dims *d, const void *kernels) {
    (void)kernels;
    pbs::permute_run run = pbs::run_of(p, d);
    return pbs::cut(&run, nullptr);
}

pbs_status pbs_cuda_permute(const pbs_permute_params *p, const pbs_dims *d, const void *kernels) {
    (void)kernels;
    pbs::permute_run run = {};
    PBS_TRY(pbs::prepare(p, d, &run));
    PBS_TRY(d->dtype == PBS_DTYPE_BF16 ? pbs::launch_segments<pbs::bf16>(run, p->exec)
                                       : pbs::launch_segments<pbs::fp16>(run, p->exec));
    return pbs_cuda_permute_queries(p, d);
}

pbs_status pbs_cuda_permute_queries(const pbs_permute_params *p, const pbs_dims *d) {
    pbs::permute_run run = {};
    if (!pbs_permutes_queries(p->mode)) return PBS_OK;
    PBS_TRY(pbs::prepare(p, d, &run));
    return d->dtype == PBS_DTYPE_BF16 ? pbs::launch_queries<pbs::bf16>(run, p->exec)
                                      : pbs::launch_queries<pbs::fp16>(run, p->exec);
}

pbs_status pbs_cuda_fill_identity(const pbs_exec *exec, int32_t *perm, int64_t heads, int32_t len) {
    const int64_t count = heads * len, threads = pbs::SUM_THREADS;
    return PBS_LAUNCH(*exec, pbs::fill_identity, (count + threads - 1) / threads, pbs::SUM_THREADS,
                      0, perm, count, len);
}
