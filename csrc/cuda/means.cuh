/* SPDX-License-Identifier: Apache-2.0
 *
 * Means of key blocks in natural order, [B, Hk, Tk, D] in the dtype of the keys: what the
 * correction of attend reads where no packed buffer brings them. The sums are those of permute.cuh,
 * so are the bits. Bound by memory: K and V are read once, one block of threads to a key block.
 */
#ifndef PBS_CUDA_MEANS_CUH
#define PBS_CUDA_MEANS_CUH

#include "row_sums.cuh"

namespace pbs {

/* Rows of K and of V that a thread has under way. */
constexpr int MEANS_DEPTH = 4;

struct means_run {
    pbs_view k, v;
    pbs_dims d;
    uint16_t *k_mean, *v_mean; /* [B, Hk, Tk, D]; only rows of whole blocks are written */
};

struct means_plan {
    partial_sums k, v;
};

/* One block of threads per [b, hk, key block]. */
template <class T> PBS_KERNEL(SUM_THREADS, 3) block_means(const means_run run) {
    PBS_SHARED(means_plan, shared);
    begin_kernel();
    const pbs_dims &d = run.d;
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int64_t block = blockIdx.x;
    const int32_t first = static_cast<int32_t>(block % d.blocks_k) * d.block_k;
    const int32_t head = static_cast<int32_t>(block / d.blocks_k);
    const int32_t b = head / d.heads_k, hk = head % d.heads_k;
    const pbs_seq s = pbs_dims_seq_clamped(&d, b);
    if (s.kv_len - first < d.block_k) return;
    const head_rows k = rows_of(run.k, b, hk, s.kv_start), v = rows_of(run.v, b, hk, s.kv_start);
    const row_team team = row_team_of(d.head_dim, thread);
    float k_sum[PIECE] = {}, v_sum[PIECE] = {};
    const int32_t mine = team.row < team.in_flight ? team.row : d.block_k;
    for (int32_t row = mine; row < d.block_k; row += MEANS_DEPTH * team.in_flight) {
        uint4 k_piece[MEANS_DEPTH] = {}, v_piece[MEANS_DEPTH] = {};
        PBS_UNROLL
        for (int i = 0; i < MEANS_DEPTH; i++) {
            const int32_t r = row + i * team.in_flight;
            if (r >= d.block_k) continue;
            k_piece[i] = *piece_of(k, first + r, team.piece);
            v_piece[i] = *piece_of(v, first + r, team.piece);
        }
        PBS_UNROLL
        for (int i = 0; i < MEANS_DEPTH; i++) {
            add_piece<T>(k_sum, k_piece[i]);
            add_piece<T>(v_sum, v_piece[i]);
        }
    }
    put_partial(shared.k, team, k_sum);
    put_partial(shared.v, team, v_sum);
    __syncthreads();
    const int32_t other = (thread + SUM_THREADS / 2) % SUM_THREADS;
    const float factor = 1.0f / static_cast<float>(d.block_k);
    add_partials<T>(shared.k, team, thread, factor, nullptr, run.k_mean + block * d.head_dim);
    add_partials<T>(shared.v, team, other, factor, nullptr, run.v_mean + block * d.head_dim);
}

} // namespace pbs

#endif /* PBS_CUDA_MEANS_CUH */
