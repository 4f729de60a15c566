/* SPDX-License-Identifier: Apache-2.0
 *
 * attend for Hopper (sm_90a): FlashAttention-3's schedule on wgmma and the copy engine, over the
 * tiles that a walk lists (attend.cuh).
 *
 * Problem   128 query rows of one head against tiles of 128 keys (64 at D 256): exact attention by
 *           online softmax. A tile comes from the caller's K and V (own span, natural order), from
 *           packed rows (history) or from block means (a correction); wgmma knows no difference.
 * Roles     384 threads, one block an SM, for the life of the kernel:
 *             warpgroup 0     one warp takes row blocks, walks their bits and feeds the copy engine
 *             warpgroup 1, 2  64 rows each: S = Q K^T, softmax, O += P V, O to global memory
 * Registers 168 a thread at the launch; then 56 for who loads, 224 for who computes:
 *           O takes D / 2, S BLOCK_N / 2, packed P BLOCK_N / 4. With 40 the walk spills.
 * Shared    Q_STAGES tiles of Q, each taking its output in the end, KV_STAGES tiles of K and of V,
 *           each with a barrier of its own that says full and one that says empty:
 *           attend_instances_sm90.inc has the bytes.
 *
 *   load      Q  K(0)  K(1) V(0)  K(2) V(1)   ...            | Q' K'(0) ...
 *   wgmma     S(0)     S(1) PV(0) S(2) PV(1)  ...  PV(last)  | S'(0)
 *   softmax       P(0)      P(1)       P(2)   ...            |     P'(0)
 *
 * S(n) and P V(n - 1) are in flight together; softmax of S(n) begins when S(n) is there, and runs
 * beside P V(n - 1). Between the two groups a turn (named barriers) has one issue its products
 * while the other is in its softmax.
 *
 * Bound     tensor cores at D 128 and 256: 4 BLOCK_M BLOCK_N D flop a step; exp2 at D 64.
 */
#ifndef PBS_CUDA_ATTEND_SM90_CUH
#define PBS_CUDA_ATTEND_SM90_CUH

#include "attend_sm90_load.cuh"
#include "attend_sm90_steps.cuh"

namespace pbs {
namespace sm90 {

/* ---- turns ----------------------------------------------------------------------------------- */
/* A group waits for its turn, issues its products and gives the turn to the other. The steps of a
 * row block are the same in both, so turns alternate; group 0 begins. */
template <class S> PBS_DEVICE void turn_wait(int group) {
    if (S::PING_PONG) ptx::bar_sync(TURN_BARRIER + group, CONSUMERS * GROUP_THREADS);
}
template <class S> PBS_DEVICE void turn_pass(int group) {
    if (S::PING_PONG) ptx::bar_arrive(TURN_BARRIER + 1 - group, CONSUMERS * GROUP_THREADS);
}
/* Before the first step, and after the last: what group 1 gave is taken. */
template <class S> PBS_DEVICE void turns_begin(int group) {
    if (group == 1) turn_pass<S>(group);
}
template <class S> PBS_DEVICE void turns_end(int group) {
    if (group == 0) turn_wait<S>(group);
}

/* O under the maxima of the tile before, while S = Q K^T of this one is under way. */
template <class S> PBS_DEVICE void rescale_beside(consumer<S> &c) {
    rescale(c);
    ptx::fence_registers(c.acc_o);
}

/* ---- a consumer's steps ---------------------------------------------------------------------- */
/* Logits of acc_s[64, BLOCK_N], the products of the tile at `key`. */
template <tile_kind KIND, int N>
PBS_DEVICE void adjust_scores(float (&acc_s)[N], const arguments &a, const row_block &block,
                              int group, int32_t key, const uint32_t (&dropped)[4]) {
    if (KIND == CAUSAL) mask_scores(acc_s, a.attend, block.job, group, key);
    if (KIND == MEANS) weigh_means(acc_s, dropped, a.attend);
}

/* The tile at `key`: S and P of it, and O += P V of the tile before, if there is one. Returns the
 * key of the next. What the stage of K says is read before its products are issued: who frees the
 * stage knows that they are over, and so that all have read. */
template <tile_kind KIND, bool FIRST, class T, class S>
PBS_DEVICE int32_t attend_step(const arguments &a, plan<S> &s, const row_block &block, int group,
                               int32_t key, consumer_rings<S> &at, consumer<S> &c) {
    float acc_s[S::BLOCK_N / 2];
    uint32_t dropped[4] = {0, 0, 0, 0};

    wait(s.k_full, at.k);
    const int32_t next = s.step[at.k.stage].next;
    PBS_UNROLL
    for (int w = 0; KIND == MEANS && w < S::BLOCK_N / 32; w++)
        dropped[w] = s.step[at.k.stage].dropped[w];

    if (!FIRST) turn_wait<S>(group);
    ptx::fence_registers(acc_s);
    ptx::fence_registers(c.acc_o);
    ptx::fence_registers(c.p);
    issue_qk<T, S>(acc_s, s.q[at.q.stage][group], s.k[at.k.stage]); /* S = Q K(n)^T */
    if (!FIRST) {
        if (S::RESCALE_FIRST) rescale_beside(c);
        wait(s.v_full, at.v);
        issue_pv<T>(c, s.v[at.v.stage]); /* O += P V(n - 1) */
        turn_pass<S>(group);
    }
    ptx::wgmma_wait<FIRST ? 0 : 1>(); /* S is there */
    ptx::fence_registers(acc_s);
    if (group_leader()) arrive(s.k_empty, at.k);
    advance(at.k);

    adjust_scores<KIND>(acc_s, a, block, group, key, dropped);
    const float scale_log2 = KIND == MEANS ? 1.0f : a.attend.softmax_scale_log2;
    softmax_step<KIND>(c, acc_s, scale_log2); /* S -> P */

    if (!FIRST) {
        ptx::wgmma_wait<0>(); /* O is there */
        ptx::fence_registers(c.acc_o);
        ptx::fence_registers(c.p);
        if (group_leader()) arrive(s.v_empty, at.v);
        advance(at.v);
        if (!S::RESCALE_FIRST) rescale(c);
    }
    pack_p<T>(c, acc_s);
    return next;
}

/* O += P V of the last tile. */
template <class T, class S>
PBS_DEVICE void finish_steps(plan<S> &s, consumer_rings<S> &at, consumer<S> &c) {
    wait(s.v_full, at.v);
    if (S::RESCALE_FIRST) rescale(c);
    ptx::fence_registers(c.acc_o);
    ptx::fence_registers(c.p);
    issue_pv<T>(c, s.v[at.v.stage]);
    ptx::wgmma_wait<0>();
    ptx::fence_registers(c.acc_o);
    ptx::fence_registers(c.p);
    if (group_leader()) arrive(s.v_empty, at.v);
    advance(at.v);
}

/* All tiles of a row block: those that some row does not see whole, those that all rows do, means.
 */
template <class T, class S>
PBS_DEVICE void attend_tiles(const arguments &a, plan<S> &s, const row_block &block, int group,
                             consumer_rings<S> &at, consumer<S> &c) {
    int32_t key = block.key;
    const int32_t clean_end = block.job.span.clean_end;
    if (key == WALK_END) return;
    if (S::CORRECTED && key < 0)
        key = attend_step<MEANS, true, T>(a, s, block, group, key, at, c);
    else
        key = attend_step<CAUSAL, true, T>(a, s, block, group, key, at, c);
    PBS_NO_UNROLL
    while (key >= clean_end) key = attend_step<CAUSAL, false, T>(a, s, block, group, key, at, c);
    PBS_NO_UNROLL
    while (key >= 0) key = attend_step<CLEAN, false, T>(a, s, block, group, key, at, c);
    PBS_NO_UNROLL
    while (S::CORRECTED && key != WALK_END)
        key = attend_step<MEANS, false, T>(a, s, block, group, key, at, c);
    finish_steps<T>(s, at, c);
}

/* ---- the other role -------------------------------------------------------------------------- */
template <class S> PBS_DEVICE void start(consumer<S> &c, const attend_job &job) {
    PBS_UNROLL
    for (int e = 0; e < S::HEAD_DIM / 2; e++) c.acc_o[e] = 0.0f;
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        c.row_max[r] = minus_infinity();
        /* K and V of another call: NaN says so, the host cannot. */
        c.row_sum[r] = job.usable ? 0.0f : __int_as_float(0x7fc00000);
    }
}

template <class T, class S> PBS_DEVICE void consume(const arguments &a, plan<S> &s, int group) {
    consumer_rings<S> at = {ring_start<S::Q_STAGES>(false), ring_start<S::KV_STAGES>(false),
                            ring_start<S::KV_STAGES>(false)};
    turns_begin<S>(group);
    for (;; advance(at.q)) {
        wait(s.q_full, at.q);
        const row_block &block = s.block[at.q.stage];
        if (block.no_more) break;
        consumer<S> c;
        start(c, block.job);
        if (a.attend.q_perm) gather_q<S>(s.q[at.q.stage][group], a.attend, block.job, group);
        attend_tiles<T>(a, s, block, group, at, c);
        store_rows<T>(a, block, group, c, s.q[at.q.stage][group]);
        if (group_leader()) arrive(s.q_empty, at.q);
    }
    turns_end<S>(group);
}

/* ---- kernel ---------------------------------------------------------------------------------- */
/* One thread, before anybody else looks at a barrier. */
template <class S> PBS_DEVICE void make_barriers(plan<S> &s) {
    for (int i = 0; i < S::Q_STAGES; i++) {
        ptx::mbarrier_init(ptx::shared_address(&s.q_full[i]), 1);
        ptx::mbarrier_init(ptx::shared_address(&s.q_empty[i]), CONSUMERS);
    }
    for (int i = 0; i < S::KV_STAGES; i++) {
        ptx::mbarrier_init(ptx::shared_address(&s.k_full[i]), 1);
        ptx::mbarrier_init(ptx::shared_address(&s.k_empty[i]), CONSUMERS);
        ptx::mbarrier_init(ptx::shared_address(&s.v_full[i]), 1);
        ptx::mbarrier_init(ptx::shared_address(&s.v_empty[i]), CONSUMERS);
    }
    ptx::mbarrier_init(ptx::shared_address(&s.v_landed), 1);
    ptx::fence_mbarrier_init();
}

template <class T, class S>
PBS_KERNEL(THREADS, 1)
attend_kernel(const __grid_constant__ arguments a) {
    PBS_SHARED(plan<S>, s);
    static_assert(sizeof(plan<S>) <= SHARED_LIMIT, "what a block may have on 9.0");
    const int warp = static_cast<int>(threadIdx.x / 32);
    if (threadIdx.x == 0) make_barriers(s);
    begin_kernel();
    __syncthreads();
    if (warp < GROUP_THREADS / 32) {
        ptx::setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (warp == 0) produce(a, s);
    } else {
        ptx::setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume<T>(a, s, warp / (GROUP_THREADS / 32) - 1);
    }
}

} // namespace sm90
} // namespace pbs

#endif /* PBS_CUDA_ATTEND_SM90_CUH */
