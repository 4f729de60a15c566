/* SPDX-License-Identifier: Apache-2.0
 *
 * The emulation's own test kernel: attention in the shape of a real Hopper kernel, small enough to
 * read. out[h, i] = softmax_j(scale q[h, i] . k[h, j]) v[h, j], no causal mask, bf16.
 *
 *   384 threads: warpgroup 0 loads (one thread of it), warpgroups 1 and 2 own 64 rows of q each.
 *   Persistent: a block takes every gridDim.x-th tile of 128 rows; stages and phases run on.
 *   K and V: STAGES tiles of BLOCK_N keys each, with a full and an empty barrier per stage.
 *   Q: one tile of 64 rows per consumer group; the output replaces it, then q_empty is told.
 *
 *     load      K(last)  Q  K(last-1)  V(last)  K(last-2)  V(last-1) ...
 *     compute   S = QK(n), O += P V(n+1) in flight together; softmax of S while PV runs
 *
 * Keys run from the last block, the only masked one, to the first. Every bug of enum bug_name is
 * one condition in this text; bug 0 is the correct kernel, which nvcc compiles for sm_90a as well.
 */
#ifndef EMU_TOY_SM90_CUH
#define EMU_TOY_SM90_CUH

#include "cuda/ptx.cuh"

namespace toy90 {

enum bug_name {
    CORRECT,
    NO_FIRST_K_WAIT,
    NO_V_WAIT,
    PRODUCER_PHASE_0,
    CONSUMER_PHASE_1,
    NO_EMPTY_WAIT,
    HALF_THE_BYTES,
    NO_BARRIER_AFTER_INIT,
    WRONG_SWIZZLE,
    STRIDES_SWAPPED,
    NOT_TRANSPOSED,
    WRONG_MASK_COLUMN,
    NO_WGMMA_WAIT,
    NO_WGMMA_FENCE,
    P_REWRITTEN,
    O_SCALED_EARLY,
    V_RELEASED_EARLY,
    WRONG_STMATRIX_LANES,
    OUT_NOT_SWIZZLED,
    NO_PROXY_FENCE,
    NO_BARRIER_BEFORE_STORE,
    NO_STORE_WAIT,
    TOO_MANY_REGISTERS,
};

using namespace pbs;

constexpr int GROUP_ROWS = 64, CONSUMERS = 2, BLOCK_M = GROUP_ROWS * CONSUMERS, STAGES = 2;
constexpr int THREADS = 128 * (1 + CONSUMERS);

/* A row of D elements is cut into chunks as wide as the swizzle; a tile is [chunk][row][CHUNK]. */
template <int D> struct tile {
    static constexpr swizzle MODE = D % 64 == 0 ? SWIZZLE_128B : SWIZZLE_64B;
    static constexpr int CHUNK = D % 64 == 0 ? 64 : 32;
    static constexpr int CHUNKS = D / CHUNK;
    static constexpr int BLOCK_N = D > 128 ? 64 : 128;
};

template <int D> struct smem_plan {
    uint16_t q[CONSUMERS][GROUP_ROWS * D]; /* and out, in its place */
    uint16_t k[STAGES][tile<D>::BLOCK_N * D];
    uint16_t v[STAGES][tile<D>::BLOCK_N * D];
    uint64_t q_full[CONSUMERS], q_empty[CONSUMERS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

struct params {
    int32_t heads, len_q, len_k, m_blocks;
    float scale_log2;
};

/* Which stage comes next, and the parity of its phase. */
struct pipeline {
    int stage;
    uint32_t phase;
};
PBS_DEVICE void advance(pipeline &p) {
    if (++p.stage == STAGES) p.stage = 0, p.phase ^= 1;
}

/* ---- producer: one thread ------------------------------------------------------------------- */
template <int D, int bug>
PBS_DEVICE void load_tile(smem_plan<D> &s, uint16_t (&to)[STAGES][tile<D>::BLOCK_N * D],
                          uint64_t (&full)[STAGES], uint64_t (&empty)[STAGES], pipeline &p,
                          const tensor_map *map, int32_t n_block, int32_t head) {
    constexpr uint32_t bytes = sizeof s.k[0] / (bug == HALF_THE_BYTES ? 2 : 1);
    const uint32_t barrier = ptx::shared_address(&full[p.stage]);
    if (bug != NO_EMPTY_WAIT) ptx::mbarrier_wait(ptx::shared_address(&empty[p.stage]), p.phase);
    ptx::mbarrier_arrive_expect_tx(barrier, bytes);
    ptx::tma_load(ptx::shared_address(to[p.stage]), map, barrier,
                  {0, n_block * tile<D>::BLOCK_N, 0, head}, ptx::policy_evict_last());
    advance(p);
}

template <int D, int bug>
PBS_DEVICE void produce(smem_plan<D> &s, const tensor_map *q, const tensor_map *k,
                        const tensor_map *v, const params &p) {
    const int32_t n_blocks = (p.len_k + tile<D>::BLOCK_N - 1) / tile<D>::BLOCK_N;
    const uint32_t first = bug == PRODUCER_PHASE_0 ? 0 : 1; /* a new barrier counts as empty */
    pipeline at_k = {0, first}, at_v = {0, first};
    uint32_t q_phase = 1;
    for (int32_t t = blockIdx.x; t < p.heads * p.m_blocks; t += gridDim.x, q_phase ^= 1) {
        const int32_t head = t / p.m_blocks, m_block = t % p.m_blocks;
        for (int32_t n = n_blocks; n >= 0; n--) {
            if (n > 0) load_tile<D, bug>(s, s.k, s.k_full, s.k_empty, at_k, k, n - 1, head);
            for (int g = 0; n == n_blocks && g < CONSUMERS; g++) {
                const uint32_t barrier = ptx::shared_address(&s.q_full[g]);
                ptx::mbarrier_wait(ptx::shared_address(&s.q_empty[g]), q_phase);
                ptx::mbarrier_arrive_expect_tx(barrier, sizeof s.q[g]);
                ptx::tma_load(ptx::shared_address(s.q[g]), q, barrier,
                              {0, m_block * BLOCK_M + g * GROUP_ROWS, 0, head},
                              ptx::policy_evict_first());
            }
            if (n < n_blocks) load_tile<D, bug>(s, s.v, s.v_full, s.v_empty, at_v, v, n, head);
        }
    }
}

/* ---- consumer steps: 128 threads ------------------------------------------------------------ */
/* acc_s[64, BLOCK_N] = Q K^T: both K-major, 16 of D a step. */
template <int D, int bug, int N>
PBS_DEVICE void issue_qk(float (&acc_s)[N], uint32_t q, uint32_t k, swizzle mode) {
    constexpr uint32_t width = swizzle_width(tile<D>::MODE);
    if (bug != NO_WGMMA_FENCE) ptx::wgmma_fence();
    PBS_UNROLL
    for (int j = 0; j < D / 16; j++) {
        const uint32_t chunk = j * 16 / tile<D>::CHUNK, inside = j * 16 % tile<D>::CHUNK * 2;
        const uint64_t a = matrix_descriptor(q + chunk * GROUP_ROWS * width + inside, 16, 8 * width,
                                             tile<D>::MODE);
        const uint64_t b =
            matrix_descriptor(k + chunk * tile<D>::BLOCK_N * width + inside, 16, 8 * width, mode);
        ptx::wgmma_ss<bf16, 0>(acc_s, a, b, j > 0);
    }
    ptx::wgmma_commit();
}

/* acc_o[64, D] += P V: V as stored, MN-major, 16 keys a step. */
template <int D, int bug, int O, int P>
PBS_DEVICE void issue_pv(float (&acc_o)[O], const uint32_t (&p)[P], uint32_t v, bool first) {
    constexpr uint32_t width = swizzle_width(tile<D>::MODE);
    constexpr uint32_t chunk = tile<D>::BLOCK_N * width, keys = 8 * width;
    if (bug != NO_WGMMA_FENCE) ptx::wgmma_fence();
    PBS_UNROLL
    for (int j = 0; j < tile<D>::BLOCK_N / 16; j++) {
        const uint64_t b =
            matrix_descriptor(v + j * 2 * keys, bug == STRIDES_SWAPPED ? keys : chunk,
                              bug == STRIDES_SWAPPED ? chunk : keys, tile<D>::MODE);
        ptx::wgmma_rs<bf16, bug != NOT_TRANSPOSED>(acc_o, &p[4 * j], b, j > 0 || !first);
    }
    ptx::wgmma_commit();
}

template <int D, int bug, int N>
PBS_DEVICE void mask_keys(float (&acc_s)[N], int32_t n_block, int32_t len_k) {
    const int32_t left = len_k - n_block * tile<D>::BLOCK_N;
    PBS_UNROLL
    for (int e = 0; e < N; e++) {
        const int32_t column = accumulator_column(threadIdx.x % 128, e);
        if ((bug == WRONG_MASK_COLUMN ? column ^ 2 : column) >= left) acc_s[e] = -INFINITY;
    }
}

/* acc_s becomes 2^(scale s - row_max); scores_scale[r] is what older sums of row r are worth now.
 * A thread holds elements of two rows; four threads share a row. */
template <int N>
PBS_DEVICE void online_softmax(float (&acc_s)[N], float (&row_max)[2], float (&row_sum)[2],
                               float (&scores_scale)[2], float scale_log2) {
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        float largest = row_max[r];
        PBS_UNROLL
        for (int e = 0; e < N; e++)
            if (e / 2 % 2 == r) largest = fmaxf(largest, acc_s[e] * scale_log2);
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        scores_scale[r] = ptx::ex2(row_max[r] - largest);
        row_max[r] = largest;
        row_sum[r] *= scores_scale[r];
        PBS_UNROLL
        for (int e = 0; e < N; e++)
            if (e / 2 % 2 == r) {
                acc_s[e] = ptx::ex2(acc_s[e] * scale_log2 - largest);
                row_sum[r] += acc_s[e];
            }
    }
}

template <int O> PBS_DEVICE void rescale(float (&acc_o)[O], const float (&scores_scale)[2]) {
    PBS_UNROLL
    for (int e = 0; e < O; e++) acc_o[e] *= scores_scale[e / 2 % 2];
}

/* Accumulator layout = operand layout: neighbours become the halves of a word. */
template <int N, int P> PBS_DEVICE void pack_p(uint32_t (&p)[P], const float (&acc_s)[N]) {
    PBS_UNROLL
    for (int i = 0; i < P; i++) p[i] = ptx::pack<bf16>(acc_s[2 * i], acc_s[2 * i + 1]);
}

/* out = acc_o / row_sum into this group's tile (where Q was), then to global memory. */
template <int D, int bug, int O>
PBS_DEVICE void store_out(smem_plan<D> &s, int group, float (&acc_o)[O], float (&row_sum)[2],
                          const tensor_map *out, int32_t row, int32_t head) {
    constexpr uint32_t width = swizzle_width(tile<D>::MODE);
    const uint32_t to = ptx::shared_address(s.q[group]);
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
        row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
    }
    const float inverse[2] = {1.0f / row_sum[0], 1.0f / row_sum[1]};
    rescale(acc_o, inverse);

    /* 16 columns a step: matrices are rows 0-7 and 8-15 of the warp, then the next 8 columns. */
    const uint32_t lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
    const uint32_t half = bug == WRONG_STMATRIX_LANES ? lane / 16 % 2 * 8 : lane / 8 % 2 * 8;
    const uint32_t right = bug == WRONG_STMATRIX_LANES ? lane / 8 % 2 * 8 : lane / 16 * 8;
    PBS_UNROLL
    for (int j = 0; j < D / 16; j++) {
        uint32_t r[4];
        PBS_UNROLL
        for (int i = 0; i < 4; i++)
            r[i] = ptx::pack<bf16>(acc_o[8 * j + 2 * i], acc_o[8 * j + 2 * i + 1]);
        const uint32_t column = j * 16 + right, chunk = column / tile<D>::CHUNK;
        const uint32_t offset = chunk * GROUP_ROWS * width + (warp_row + half + lane % 8) * width +
                                column % tile<D>::CHUNK * 2;
        ptx::stmatrix_x4(to + (bug == OUT_NOT_SWIZZLED ? offset : swizzled(tile<D>::MODE, offset)),
                         r);
    }
    if (bug != NO_PROXY_FENCE) ptx::fence_proxy_async();
    if (bug != NO_BARRIER_BEFORE_STORE) ptx::bar_sync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
        ptx::tma_store(out, to, {0, row, 0, head});
        ptx::tma_store_commit();
        if (bug != NO_STORE_WAIT) ptx::tma_store_wait_read<0>();
        ptx::mbarrier_arrive(ptx::shared_address(&s.q_empty[group]));
    }
}

template <int D, int bug>
PBS_DEVICE void consume(smem_plan<D> &s, int group, const tensor_map *out, const params &p) {
    constexpr int N = tile<D>::BLOCK_N / 2, O = D / 2;
    const int32_t n_blocks = (p.len_k + tile<D>::BLOCK_N - 1) / tile<D>::BLOCK_N;
    const uint32_t q = ptx::shared_address(s.q[group]);
    const swizzle k_mode = bug == WRONG_SWIZZLE ? SWIZZLE_64B : tile<D>::MODE;
    const bool leader = threadIdx.x % 128 == 0; /* frees stages for its group */
    const uint32_t first = bug == CONSUMER_PHASE_1 ? 1 : 0;
    pipeline at_k = {0, first}, at_v = {0, first};
    uint32_t q_phase = 0;
    for (int32_t t = blockIdx.x; t < p.heads * p.m_blocks; t += gridDim.x, q_phase ^= 1) {
        const int32_t head = t / p.m_blocks;
        const int32_t row = t % p.m_blocks * BLOCK_M + group * GROUP_ROWS;
        float acc_s[N], acc_o[O];
        uint32_t probs[N / 2];
        float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0}, scores_scale[2];

        /* The last block of keys: S and softmax alone. */
        ptx::mbarrier_wait(ptx::shared_address(&s.q_full[group]), q_phase);
        if (bug != NO_FIRST_K_WAIT)
            ptx::mbarrier_wait(ptx::shared_address(&s.k_full[at_k.stage]), at_k.phase);
        ptx::fence_registers(acc_s);
        issue_qk<D, CORRECT>(acc_s, q, ptx::shared_address(s.k[at_k.stage]), k_mode);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(acc_s);
        if (leader) ptx::mbarrier_arrive(ptx::shared_address(&s.k_empty[at_k.stage]));
        advance(at_k);
        mask_keys<D, bug>(acc_s, n_blocks - 1, p.len_k);
        online_softmax(acc_s, row_max, row_sum, scores_scale, p.scale_log2);
        pack_p(probs, acc_s);

        /* S of block n beside P V of block n + 1. */
        PBS_NO_UNROLL
        for (int32_t n = n_blocks - 2; n >= 0; n--) {
            ptx::mbarrier_wait(ptx::shared_address(&s.k_full[at_k.stage]), at_k.phase);
            ptx::fence_registers(acc_s);
            ptx::fence_registers(acc_o);
            ptx::fence_registers(probs);
            issue_qk<D, bug>(acc_s, q, ptx::shared_address(s.k[at_k.stage]), k_mode);
            if (bug != NO_V_WAIT)
                ptx::mbarrier_wait(ptx::shared_address(&s.v_full[at_v.stage]), at_v.phase);
            issue_pv<D, bug>(acc_o, probs, ptx::shared_address(s.v[at_v.stage]), n == n_blocks - 2);
            if (bug != NO_WGMMA_WAIT) ptx::wgmma_wait<1>();
            ptx::fence_registers(acc_s);
            if (leader) ptx::mbarrier_arrive(ptx::shared_address(&s.k_empty[at_k.stage]));
            advance(at_k);
            if (bug == V_RELEASED_EARLY && leader)
                ptx::mbarrier_arrive(ptx::shared_address(&s.v_empty[at_v.stage]));
            online_softmax(acc_s, row_max, row_sum, scores_scale, p.scale_log2);
            if (bug == O_SCALED_EARLY) rescale(acc_o, scores_scale);
            if (bug == P_REWRITTEN) pack_p(probs, acc_s);
            ptx::wgmma_wait<0>();
            ptx::fence_registers(acc_o);
            ptx::fence_registers(probs);
            if (bug != V_RELEASED_EARLY && leader)
                ptx::mbarrier_arrive(ptx::shared_address(&s.v_empty[at_v.stage]));
            advance(at_v);
            if (bug != O_SCALED_EARLY) rescale(acc_o, scores_scale);
            if (bug != P_REWRITTEN) pack_p(probs, acc_s);
        }

        /* P V of the first block of keys. */
        ptx::mbarrier_wait(ptx::shared_address(&s.v_full[at_v.stage]), at_v.phase);
        ptx::fence_registers(acc_o);
        ptx::fence_registers(probs);
        issue_pv<D, bug == NO_WGMMA_FENCE ? CORRECT : bug>(
            acc_o, probs, ptx::shared_address(s.v[at_v.stage]), n_blocks == 1);
        ptx::wgmma_wait<0>();
        ptx::fence_registers(acc_o);
        if (leader) ptx::mbarrier_arrive(ptx::shared_address(&s.v_empty[at_v.stage]));
        advance(at_v);
        store_out<D, bug>(s, group, acc_o, row_sum, out, row, head);
    }
}

/* ---- the kernel ----------------------------------------------------------------------------- */
template <int D, int bug>
PBS_KERNEL(THREADS, 1)
toy_attend(const __grid_constant__ tensor_map q, const __grid_constant__ tensor_map k,
           const __grid_constant__ tensor_map v, const __grid_constant__ tensor_map out,
           const params p) {
    PBS_SHARED(smem_plan<D>, s);
    if (threadIdx.x == 0) {
        for (int i = 0; i < CONSUMERS; i++) {
            ptx::mbarrier_init(ptx::shared_address(&s.q_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&s.q_empty[i]), 1);
        }
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(ptx::shared_address(&s.k_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&s.v_full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&s.k_empty[i]), CONSUMERS);
            ptx::mbarrier_init(ptx::shared_address(&s.v_empty[i]), CONSUMERS);
        }
        ptx::fence_mbarrier_init();
    }
    if (bug != NO_BARRIER_AFTER_INIT) __syncthreads();

    if (threadIdx.x < 128) {
        ptx::setmaxnreg_dec<bug == TOO_MANY_REGISTERS ? 48 : 40>();
        if (threadIdx.x == 0) produce<D, bug>(s, &q, &k, &v, p);
    } else {
        ptx::setmaxnreg_inc<232>();
        consume<D, bug>(s, threadIdx.x / 128 - 1, &out, p);
    }
}

} // namespace toy90

#endif /* EMU_TOY_SM90_CUH */
