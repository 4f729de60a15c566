/* SPDX-License-Identifier: Apache-2.0
 *
 * attend for sm_80 and later: FlashAttention-2's schedule on mma.sync, cp.async and ldmatrix.
 *
 * Problem   BLOCK_M query rows of one head against the tiles of BLOCK_N keys that their walk lists
 *           (attend.cuh): exact attention by online softmax, K and V from global memory once each.
 * Warps     each owns 16 or 32 rows (M m_tiles) for all of S = Q K^T, softmax and O += P V: no
 *           exchange between warps but the tiles. 32 rows read every K and V fragment half as often
 *           per product, which is what ldmatrix-bound tensor cores want; 16 where registers say no.
 * Shared    Q, one K and one V tile; the other block of the SM covers what a copy still makes us
 *           wait for. Q's tile takes the output in the end, each warp its own rows.
 *
 *   copies      K(0) Q |  V(n)             |  K(n+1)                 | V(n+1)
 *   barriers           ^ K(n) landed       ^ V(n) landed             ^ K(n+1) landed
 *                      | V(n-1) is free    | K(n) is free            | V(n) is free
 *   compute            |  S = Q K(n)^T     |  softmax    O += P V(n) | S = Q K(n+1)^T
 *
 * Bound     tensor cores, 4 BLOCK_M BLOCK_N D flop a step, as long as two blocks share an SM; with
 *           16 rows a warp, ldmatrix: 512 bytes for two mma at 128 bytes a clock.
 *
 * Means     tiles of block means are tiles of keys with other logits, in a kernel of their own
 *           (CORRECTED): a third loop takes registers, and calls without a correction need all they
 *           have.
 *
 * Registers acc_o and acc_s take M (D / 2 + BLOCK_N / 2) of them. What is the same for all threads
 *           (job, walk, rows) therefore lies in shared memory; attend_instances.inc has the table.
 */
#ifndef PBS_CUDA_ATTEND_SM80_CUH
#define PBS_CUDA_ATTEND_SM80_CUH

#include "attend.cuh"
#include "softmax.cuh"
#include "tile.cuh"

namespace pbs {

/* ---- plan ------------------------------------------------------------------------------------ */
/* A shape names HEAD_DIM (of the tiles: head_dim is padded to it with zeros), BLOCK_M, BLOCK_N,
 * WARPS, BLOCKS_PER_SM and CORRECTED: does the walk end in tiles of means? */
template <class S> struct attend_plan {
    tile<S::BLOCK_M, S::HEAD_DIM> q; /* in the end: out */
    tile<S::BLOCK_N, S::HEAD_DIM> k;
    tile<S::BLOCK_N, S::HEAD_DIM> v;
    attend_job job;
    int32_t row[S::BLOCK_M]; /* original index of each row, -1 = there is none */
};

template <class S> struct attend_shape {
    static constexpr int THREADS = 32 * S::WARPS;
    static constexpr int WARP_ROWS = S::BLOCK_M / S::WARPS;
    static constexpr int M = WARP_ROWS / 16;          /* m_tiles of a warp */
    static constexpr int N_KEYS = S::BLOCK_N / 8;     /* n_tiles of S */
    static constexpr int N_COLUMNS = S::HEAD_DIM / 8; /* n_tiles of O */
    static_assert(S::BLOCK_M % (16 * S::WARPS) == 0, "a warp owns whole m_tiles");
    static_assert(64 % S::BLOCK_N == 0, "tiles divide the smallest block_k");
    static_assert(S::BLOCK_M == 64 || S::BLOCK_M == 128, "a query block is whole row blocks");
    static_assert(S::BLOCK_M <= THREADS, "one thread looks up one row");
    static_assert(sizeof(attend_plan<S>) <= 99 << 10, "what a block may have on sm_86 and sm_89");
};

/* What a thread keeps over all steps: rows 16 m + g + 8 h of its warp's, columns by quad lane. */
template <class S> struct attend_state {
    float acc_o[attend_shape<S>::M][attend_shape<S>::N_COLUMNS][4];
    softmax_state<attend_shape<S>::M> softmax;
    tile_operand<S::HEAD_DIM> q, k, v;
};

/* ---- copies ---------------------------------------------------------------------------------- */
/* MASKED tiles may reach beyond the last key that any row sees: zeros there, which 0 * V needs. */
template <bool MASKED, class S>
PBS_DEVICE void load_keys(tile<S::BLOCK_N, S::HEAD_DIM> &to, head_rows rows, int32_t key,
                          const attend_args &a, int32_t end) {
    const int32_t count = MASKED ? end - key : S::BLOCK_N;
    tile_fill<attend_shape<S>::THREADS>(to, rows.first + key * rows.stride, rows.stride, count,
                                        a.dims.head_dim, threadIdx.x);
    ptx::cp_async_commit();
}

PBS_DEVICE const key_source &source_of(const attend_job &job, int32_t key) {
    return key < job.span.own_begin ? job.history : job.own;
}

/* What a tile holds: keys that every row sees, keys that some row may not see, block means. */
enum tile_kind { CLEAN, CAUSAL, MEANS };

/* Zeros for the means that no row sees: nobody has written them. */
template <class S>
PBS_DEVICE void load_means(tile<S::BLOCK_N, S::HEAD_DIM> &to, head_rows rows, int32_t key,
                           const attend_args &a, int32_t end) {
    load_keys<true, S>(to, rows, mean_at(key), a, end);
}

/* K of the tile that comes next, in a walk whose tile is of this kind. */
template <tile_kind KIND, class S>
PBS_DEVICE void load_next(const attend_args &a, attend_plan<S> &plan, int32_t key) {
    const attend_job &job = plan.job;
    if (KIND != MEANS && key >= 0)
        load_keys<KIND == CAUSAL, S>(plan.k, source_of(job, key).k, key, a, job.span.end);
    else if (S::CORRECTED && key != WALK_END)
        load_means<S>(plan.k, job.means.k, key, a, job.mean_end);
}

/* ---- one step -------------------------------------------------------------------------------- */
/* -inf where a row does not see a key: key > q_offset + row. */
template <class S>
PBS_DEVICE void mask_scores(const attend_plan<S> &plan, int32_t key,
                            float (&acc_s)[attend_shape<S>::M][attend_shape<S>::N_KEYS][4]) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    PBS_UNROLL
    for (int m = 0; m < attend_shape<S>::M; m++) {
        PBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const int32_t row =
                plan.row[warp * attend_shape<S>::WARP_ROWS + 16 * m + 8 * h + lane / 4];
            /* Columns of the tile that the row sees, counted from this lane's first one. */
            const int32_t limit =
                plan.job.seq.q_offset + row + 1 - key - 2 * static_cast<int32_t>(lane % 4);
            PBS_UNROLL
            for (int n = 0; n < attend_shape<S>::N_KEYS; n++) {
                PBS_UNROLL
                for (int e = 0; e < 2; e++)
                    if (8 * n + e >= limit) acc_s[m][n][2 * h + e] = minus_infinity();
            }
        }
    }
}

/* One thread, for all. */
template <tile_kind KIND, class S> PBS_DEVICE void walk_on(attend_job &job, int32_t block_k) {
    if (KIND == MEANS) {
        walk_means<S::BLOCK_N>(job.walk, job.bits, job.mean_end);
        return;
    }
    walk_next<S::BLOCK_N>(job.walk, job.bits, job.span, block_k);
    if (S::CORRECTED) walk_to_means<S::BLOCK_N>(job.walk, job.bits, job.mean_end);
}

/* Products with means to logits in log2 units: a mean counts as often as its block has keys; -inf
 * for blocks that are listed, or not before mean_end. */
template <class S>
PBS_DEVICE void weigh_means(const attend_args &a, const attend_job &job, int32_t key,
                            float (&acc_s)[attend_shape<S>::M][attend_shape<S>::N_KEYS][4]) {
    const int32_t lane_column = 2 * static_cast<int32_t>(threadIdx.x % 4);
    PBS_UNROLL
    for (int w = 0; w < S::BLOCK_N / 32; w++) {
        const int32_t word = mean_at(key) / 32 + w;
        const uint32_t below = pbs_bits_below(job.mean_end, word);
        const uint32_t dropped = (below ? ~job.bits[word] & below : 0) >> lane_column;
        PBS_UNROLL
        for (int n = 4 * w; n < 4 * w + 4; n++) {
            PBS_UNROLL
            for (int i = 0; i < 4; i++) {
                const bool on = dropped >> (n % 4 * 8 + i % 2) & 1;
                PBS_UNROLL
                for (int m = 0; m < attend_shape<S>::M; m++) {
                    const float logit = fmaf(acc_s[m][n][i], a.softmax_scale_log2, a.mean_bias);
                    acc_s[m][n][i] = on ? logit : minus_infinity();
                }
            }
        }
    }
}

/* The tile at `key`, whose K is on its way; leaves key at the next tile, K on its way. */
template <tile_kind KIND, class T, class S>
PBS_DEVICE void attend_step(const attend_args &a, attend_plan<S> &plan, int32_t &key,
                            attend_state<S> &state) {
    attend_job &job = plan.job;
    float acc_s[attend_shape<S>::M][attend_shape<S>::N_KEYS][4];

    ptx::cp_async_wait<0>();
    __syncthreads(); /* K(n) is there for all; all are done with V(n - 1) */
    if (KIND == MEANS)
        load_means<S>(plan.v, job.means.v, key, a, job.mean_end);
    else
        load_keys<KIND == CAUSAL, S>(plan.v, source_of(job, key).v, key, a, job.span.end);
    if (threadIdx.x == 0) walk_on<KIND, S>(job, a.dims.block_k);

    clear(acc_s);
    gemm_nt<T>(acc_s, state.q, state.k); /* S = Q K^T */
    if (KIND == CAUSAL) mask_scores(plan, key, acc_s);
    if (KIND == MEANS) weigh_means<S>(a, job, key, acc_s);

    ptx::cp_async_wait<0>();
    __syncthreads(); /* V(n) is there for all, and where n + 1 is; all are done with K(n) */
    key = job.walk.key;
    load_next<KIND, S>(a, plan, key);

    const float scale_log2 = KIND == MEANS ? 1.0f : a.softmax_scale_log2;
    softmax_step<KIND != CLEAN>(state.softmax, acc_s, state.acc_o, scale_log2); /* S -> P */
    gemm_pn<T>(state.acc_o, acc_s, state.v);                                    /* O += P V */
}

/* ---- epilogue -------------------------------------------------------------------------------- */
/* O / row_sum through the warp's own rows of Q's tile, so that rows leave in whole chunks. */
template <class T, class S>
PBS_DEVICE void store_rows(const attend_args &a, attend_plan<S> &plan, attend_state<S> &state) {
    using shape = attend_shape<S>;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * shape::WARP_ROWS;
    unsigned char *staged = reinterpret_cast<unsigned char *>(plan.q.element);
    float lse[2 * shape::M];
    softmax_finish(state.softmax, state.acc_o, lse);
    PBS_UNROLL
    for (int r = 0; r < 2 * shape::M; r++) {
        const int row = first + 8 * r + lane / 4, at = r % 2 * 2;
        PBS_UNROLL
        for (int n = 0; n < shape::N_COLUMNS; n++) {
            const float(&o)[4] = state.acc_o[r / 2][n];
            *reinterpret_cast<uint32_t *>(staged + chunk_offset<S::HEAD_DIM>(row, n) +
                                          lane % 4 * 4) = ptx::pack<T>(o[at], o[at + 1]);
        }
        if (plan.job.lse && lane % 4 == 0 && plan.row[row] >= 0)
            plan.job.lse[plan.row[row] * a.lse.stride[2]] = lse[r];
    }
    __syncwarp();
    constexpr int PER_ROW = fill_plan<S::HEAD_DIM, shape::THREADS>::PER_ROW;
    for (int i = lane / PER_ROW; i < shape::WARP_ROWS; i += 32 / PER_ROW) {
        const int32_t row = plan.row[first + i];
        uint16_t *out = plan.job.out.first + row * plan.job.out.stride;
        for (int c = lane % PER_ROW; row >= 0 && c < a.dims.head_dim / CHUNK; c += PER_ROW)
            *reinterpret_cast<chunk *>(out + c * CHUNK) =
                *reinterpret_cast<const chunk *>(staged + chunk_offset<S::HEAD_DIM>(first + i, c));
    }
}

/* ---- kernel ---------------------------------------------------------------------------------- */
/* Blocks of one query block are neighbours in the grid: they read the same list. */
template <class T, class S>
PBS_KERNEL(attend_shape<S>::THREADS, S::BLOCKS_PER_SM)
attend_kernel(const __grid_constant__ attend_args a) {
    using shape = attend_shape<S>;
    PBS_SHARED(attend_plan<S>, plan);
    begin_kernel();
    const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int parts = a.dims.block_q / S::BLOCK_M;

    if (thread == 0)
        make_job<S::BLOCK_M, S::BLOCK_N, S::CORRECTED>(
            a, a.order[blockIdx.x / parts], static_cast<int32_t>(blockIdx.x % parts), plan.job);
    __syncthreads();
    if (plan.job.first >= plan.job.seq.q_len) return;
    int32_t key = plan.job.walk.key;
    load_next<CAUSAL, S>(a, plan, key);
    if (thread < S::BLOCK_M) plan.row[thread] = original_row(a, plan.job, thread);
    __syncthreads();
    tile_gather<shape::THREADS>(plan.q, plan.job.q.first, plan.job.q.stride, plan.row,
                                a.dims.head_dim, thread);
    ptx::cp_async_commit();

    attend_state<S> state;
    clear(state.acc_o);
    softmax_start(state.softmax);
    state.q = operand_a(plan.q, warp * shape::WARP_ROWS, lane);
    state.k = operand_b(plan.k, 0, lane);
    state.v = operand_b_trans(plan.v, 0, lane);
    if (!plan.job.usable) { /* K and V of another call: NaN says so, the host cannot */
        PBS_UNROLL
        for (int r = 0; r < 2 * shape::M; r++)
            state.softmax.row_sum[r] = __int_as_float(0x7fc00000);
    }

    /* Tiles that some row does not see whole, then those that all rows do, then means. */
    while (key >= plan.job.span.clean_end) attend_step<CAUSAL, T>(a, plan, key, state);
    while (key >= 0) attend_step<CLEAN, T>(a, plan, key, state);
    while (S::CORRECTED && key != WALK_END) attend_step<MEANS, T>(a, plan, key, state);

    ptx::cp_async_wait<0>(); /* without a single tile, Q is still on its way */
    __syncthreads();
    store_rows<T>(a, plan, state);
}

} // namespace pbs

#endif /* PBS_CUDA_ATTEND_SM80_CUH */
