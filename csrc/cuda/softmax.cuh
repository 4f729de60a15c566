/* SPDX-License-Identifier: Apache-2.0
 *
 * Online softmax on accumulator rows (tile.cuh says who holds what). A thread holds 2 M rows: row
 * 2 m + h is row g + 8 h of m_tile m, and it shares that row with the other lanes of its quad.
 *
 *   row_max   the largest logit so far times softmax_scale * log2 e: everything is in log2 units
 *   row_sum   this thread's share of the sum of 2^(s - row_max); the quad adds up once, at the end
 */
#ifndef PBS_CUDA_SOFTMAX_CUH
#define PBS_CUDA_SOFTMAX_CUH

#include "ptx.cuh"

namespace pbs {

constexpr float LN_2 = 0.6931471805599453f;

PBS_DEVICE float minus_infinity() { return -__builtin_inff(); }

template <int M> struct softmax_state {
    float row_max[2 * M];
    float row_sum[2 * M];
};

template <int M> PBS_DEVICE void softmax_start(softmax_state<M> &state) {
    PBS_UNROLL
    for (int r = 0; r < 2 * M; r++) {
        state.row_max[r] = minus_infinity();
        state.row_sum[r] = 0.0f;
    }
}

/* Over the four lanes that share a row. */
PBS_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

PBS_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* acc_s = 2^(scale_log2 * acc_s - row_max) under the new maxima; what was summed before, in row_sum
 * and acc_o, shrinks to them. MASKED: logits may be -inf, even all of a row so far; its maximum is
 * then taken as 0, so that 2^(-inf - 0) = 0 and not 2^(-inf + inf). */
template <bool MASKED, int M, int N, int D>
PBS_DEVICE void softmax_step(softmax_state<M> &state, float (&acc_s)[M][N][4],
                             float (&acc_o)[M][D][4], float scale_log2) {
    PBS_UNROLL
    for (int r = 0; r < 2 * M; r++) {
        const int m = r / 2, at = r % 2 * 2; /* elements at and at + 1 are of row r */
        float tile_max = fmaxf(acc_s[m][0][at], acc_s[m][0][at + 1]);
        PBS_UNROLL
        for (int n = 1; n < N; n++)
            tile_max = fmaxf(tile_max, fmaxf(acc_s[m][n][at], acc_s[m][n][at + 1]));
        const float row_max = fmaxf(state.row_max[r], quad_max(tile_max) * scale_log2);
        const float base = MASKED && row_max == minus_infinity() ? 0.0f : row_max;
        const float scores_scale = ptx::ex2(state.row_max[r] - base);
        float sum = 0.0f;
        PBS_UNROLL
        for (int n = 0; n < N; n++) {
            PBS_UNROLL
            for (int i = at; i < at + 2; i++) {
                acc_s[m][n][i] = ptx::ex2(fmaf(acc_s[m][n][i], scale_log2, -base));
                sum += acc_s[m][n][i];
            }
        }
        state.row_max[r] = row_max;
        state.row_sum[r] = state.row_sum[r] * scores_scale + sum;
        PBS_UNROLL
        for (int d = 0; d < D; d++) {
            acc_o[m][d][at] *= scores_scale;
            acc_o[m][d][at + 1] *= scores_scale;
        }
    }
}

/* Divides acc_o by the sums and gives lse in natural log. A row that has seen no key: 0 and -inf. A
 * sum that is NaN is not "no key". */
template <int M, int D>
PBS_DEVICE void softmax_finish(const softmax_state<M> &state, float (&acc_o)[M][D][4],
                               float (&lse)[2 * M]) {
    PBS_UNROLL
    for (int r = 0; r < 2 * M; r++) {
        const int m = r / 2, at = r % 2 * 2;
        const float row_sum = quad_sum(state.row_sum[r]);
        const bool no_key = row_sum == 0.0f;
        const float inverse = no_key ? 0.0f : 1.0f / row_sum;
        lse[r] = no_key ? minus_infinity() : (state.row_max[r] + ptx::lg2(row_sum)) * LN_2;
        PBS_UNROLL
        for (int d = 0; d < D; d++) {
            acc_o[m][d][at] *= inverse;
            acc_o[m][d][at + 1] *= inverse;
        }
    }
}

} // namespace pbs

#endif /* PBS_CUDA_SOFTMAX_CUH */
