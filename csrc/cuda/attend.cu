/* SPDX-License-Identifier: Apache-2.0
 *
 * attend: order the query blocks by the length of their walks, then run the kernel that
 * attend_instances_sm90.inc names, on 9.0, or else attend_instances.inc, for dtype, head_dim and
 * block_q. A correction without packed means begins with making them.
 */
#include "cuda.h"

#include "attend_sm80.cuh"
#include "launch.cuh"
#include "means.cuh"
#include "order.cuh"

namespace pbs {
namespace {

/* All but the pointers into the workspace. */
attend_args args_of(const pbs_attend_params *p, const pbs_dims *d) {
    attend_args a = {};
    a.dims = *d;
    a.q = p->q;
    a.k = p->k.view;
    a.v = p->v.view;
    a.out = p->out;
    a.lse = p->lse;
    a.bits = p->bits;
    a.q_perm = p->q_perm;
    a.softmax_scale_log2 = p->softmax_scale * PBS_LOG2_E;
    a.heads_sel = p->heads_sel;
    a.own = p->own;
    a.mean_bias = log2f(static_cast<float>(d->block_k)); /* block_k is a power of two */
    const bool natural = p->own == PBS_OWN_MASK || p->own == PBS_OWN_ALL;
    if (!p->packed || natural) return a;
    const bool segments = p->own == PBS_OWN_SEGMENT || p->own == PBS_OWN_NONE;
    a.packed = static_cast<const unsigned char *>(p->packed);
    a.natural = packed_layout_of(d, 0, p->correction);
    a.permuted = packed_layout_of(d, segments, p->correction);
    a.takes_permuted = segments && p->packed_bytes >= a.permuted.bytes;
    return a;
}

size_t cut(attend_run *run, void *workspace) {
    const pbs_dims &d = run->args.dims;
    const int64_t heads = static_cast<int64_t>(d.batch) * d.heads_q;
    pbs_arena arena = pbs_arena_at(workspace);
    run->order.order =
        static_cast<int32_t *>(pbs_arena_take(&arena, heads, d.blocks_q, sizeof(int32_t)));
    run->order.bucket =
        static_cast<uint8_t *>(pbs_arena_take(&arena, heads, d.blocks_q, sizeof(uint8_t)));
    run->args.order = run->order.order;
    run->order.taken = static_cast<int32_t *>(pbs_arena_take(&arena, 1, 1, sizeof(int32_t)));
    if (run->corrects && !run->args.packed) {
        const int64_t owners = static_cast<int64_t>(d.batch) * d.heads_k;
        const size_t row = static_cast<size_t>(d.head_dim) * sizeof(uint16_t);
        run->args.k_mean = static_cast<uint16_t *>(pbs_arena_take(&arena, owners, d.blocks_k, row));
        run->args.v_mean = static_cast<uint16_t *>(pbs_arena_take(&arena, owners, d.blocks_k, row));
    }
    return pbs_arena_bytes(&arena);
}

attend_run run_of(const pbs_attend_params *p, const pbs_dims *d) {
    return {args_of(p, d), {}, p->correction == PBS_CORRECTION_MEAN};
}

pbs_status launch_means(const pbs_exec &exec, const attend_run &run) {
    const attend_args &a = run.args;
    if (!run.corrects || a.packed) return PBS_OK;
    const means_run means = {a.k, a.v, a.dims, a.k_mean, a.v_mean};
    const int64_t blocks = static_cast<int64_t>(a.dims.batch) * a.dims.heads_k * a.dims.blocks_k;
    if (a.dims.dtype == PBS_DTYPE_BF16)
        return PBS_LAUNCH(exec, (block_means<bf16>), blocks, SUM_THREADS, sizeof(means_plan),
                          means);
    return PBS_LAUNCH(exec, (block_means<fp16>), blocks, SUM_THREADS, sizeof(means_plan), means);
}

template <int D, int M, int N, int W, int BLOCKS, bool MEANS> struct shape {
    static constexpr int HEAD_DIM = D, BLOCK_M = M, BLOCK_N = N, WARPS = W, BLOCKS_PER_SM = BLOCKS;
    static constexpr bool CORRECTED = MEANS;
};

template <class T, class S> pbs_status launch_attend(const pbs_exec &exec, const attend_run &run) {
    const int64_t parts = run.args.dims.block_q / S::BLOCK_M;
    return PBS_LAUNCH(exec, (attend_kernel<T, S>), run.order.items * parts,
                      attend_shape<S>::THREADS, sizeof(attend_plan<S>), run.args);
}

pbs_status launch_instance(const pbs_exec &exec, const attend_run &run) {
    const pbs_dims &d = run.args.dims;
#define INSTANCE(dtype_, T, D, M, N, WARPS, BLOCKS, MEANS_BLOCKS)                           \
    if (d.dtype == dtype_ && d.head_dim <= D && d.block_q % M == 0)                         \
        return run.corrects                                                                 \
                   ? launch_attend<T, shape<D, M, N, WARPS, MEANS_BLOCKS, true>>(exec, run) \
                   : launch_attend<T, shape<D, M, N, WARPS, BLOCKS, false>>(exec, run);
#include "attend_instances.inc"
#undef INSTANCE
    return pbs_fail(PBS_ERR_UNSUPPORTED,
                    "dtype %d, head_dim %d: attend on CUDA takes fp16 (2) and bf16 (3) up to %d",
                    static_cast<int>(d.dtype), d.head_dim, PBS_MAX_HEAD_DIM);
}

pbs_status check(const pbs_attend_params *p) {
    PBS_TRY(pbs_cuda_check_aligned("q", &p->q));
    PBS_TRY(pbs_cuda_check_aligned("k", &p->k.view));
    PBS_TRY(pbs_cuda_check_aligned("v", &p->v.view));
    return pbs_cuda_check_aligned("out", &p->out);
}

} // namespace
} // namespace pbs

/* What the host can know: the device compares the fingerprint, and answers NaN to a wrong one. */
pbs_status pbs_cuda_check_packed(const pbs_attend_params *p, const pbs_dims *d,
                                 const void *kernels) {
    (void)kernels;
    if (!p->packed) return PBS_OK;
    if (reinterpret_cast<uintptr_t>(p->packed) % PBS_ARENA_ALIGN)
        return pbs_fail(PBS_ERR_VALUE, "packed: %p; 64-byte alignment is needed", p->packed);
    const size_t least = pbs::packed_layout_of(d, 0, p->correction).bytes;
    if (p->packed_bytes < least)
        return pbs_fail(PBS_ERR_WORKSPACE, "packed_bytes: %zu; at least %zu are needed",
                        p->packed_bytes, least);
    return PBS_OK;
}

size_t pbs_cuda_attend_bytes(const pbs_attend_params *p, const pbs_dims *d, const void *kernels) {
    (void)kernels;
    pbs::attend_run run = pbs::run_of(p, d);
    return pbs::cut(&run, nullptr);
}

pbs_status pbs_cuda_attend(const pbs_attend_params *p, const pbs_dims *d, const void *kernels,
                           const int32_t *count) {
    PBS_TRY(pbs::check(p));
    const int64_t items = static_cast<int64_t>(d->batch) * d->heads_q * d->blocks_q;
    if (items == 0) return PBS_OK;
    if (items > INT32_MAX / 4) /* a query block is up to 4 blocks of the grid */
        return pbs_fail(PBS_ERR_UNSUPPORTED, "%lld query blocks in one call; at most %d",
                        static_cast<long long>(items), INT32_MAX / 4);
    pbs::attend_run run = pbs::run_of(p, d);
    pbs::cut(&run, p->workspace);
    run.order.items = static_cast<int32_t>(items);
    run.order.count = count;
    PBS_TRY(PBS_LAUNCH(p->exec, pbs::order_items, 1, pbs::ORDER_THREADS, sizeof(pbs::order_plan),
                       run.args, run.order));
    PBS_TRY(pbs::launch_means(p->exec, run));
    bool taken = false;
    if (pbs_cuda_isa(kernels) == PBS_ISA_SM90)
        PBS_TRY(pbs::launch_attend_sm90(p->exec, run, &taken));
    if (taken) return PBS_OK;
    return pbs::launch_instance(p->exec, run);
}
