/* SPDX-License-Identifier: Apache-2.0
 *
 * Key-aware query permutation (paper 4.3): each key block's centroid in turn takes the block_size
 * free rows of the segment that are most cosine-similar to it; ties go to the earlier row, and rows
 * stay ascending inside a block. One block of threads per [b, hq, row segment].
 *
 * Centroids are k_pool's rows. The centroid's own norm cannot change an order, so it is left out.
 */
#ifndef PBS_CUDA_PERMUTE_QUERIES_CUH
#define PBS_CUDA_PERMUTE_QUERIES_CUH

#include <math.h>

#include "../core/bits.h"
#include "permute.cuh"

namespace pbs {

enum { ROW_LANES = 8, MAX_WORDS = PBS_MAX_SEGMENT_SIZE / 32 };

struct queries_plan {
    float centroid[PBS_MAX_HEAD_DIM];
    uint32_t key[PBS_MAX_SEGMENT_SIZE];
    uint32_t taken[MAX_WORDS]; /* rows that are in a block, one bit each */
    uint32_t mine[MAX_WORDS];  /* rows of this block */
};

/* Cosine similarity of one row to the centroid, times the centroid's norm; 0 for a zero row. Eight
 * neighbouring lanes share the row and all get the sum. */
template <class T>
PBS_DEVICE float similarity_of(const head_rows &q, int64_t row, int32_t head_dim,
                               const float *centroid, int32_t lane) {
    float dot = 0.0f, square = 0.0f;
    for (int32_t piece = lane; piece < head_dim / PIECE; piece += ROW_LANES) {
        float x[PIECE];
        to_floats<T>(*piece_of(q, row, piece), x);
        PBS_UNROLL
        for (int i = 0; i < PIECE; i++) {
            dot += x[i] * centroid[piece * PIECE + i];
            square += x[i] * x[i];
        }
    }
    for (int lanes = 1; lanes < ROW_LANES; lanes *= 2) {
        dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
        square += __shfl_xor_sync(0xffffffffu, square, lanes);
    }
    const float norm = sqrtf(square);
    return norm > 0.0f ? dot / norm : norm == 0.0f ? 0.0f : norm; /* NaN stays NaN */
}

PBS_DEVICE bool bit_of(const uint32_t *words, int32_t i) { return words[i / 32] >> (i % 32) & 1; }

template <class T> PBS_KERNEL(SUM_THREADS, 3) permute_queries(const permute_run run) {
    PBS_SHARED(queries_plan, shared);
    begin_kernel();
    const pbs_dims &d = run.d;
    const int32_t thread = static_cast<int32_t>(threadIdx.x), size = d.segment_size;
    const int32_t segments = pbs_ceil_div(d.max_q, size), index = static_cast<int32_t>(blockIdx.x);
    const int32_t first = index % segments * size;
    const int64_t head = index / segments;
    const int32_t b = index / segments / d.heads_q, hq = index / segments % d.heads_q;
    const int32_t hp = pbs_owner_head(&d, hq);
    const pbs_seq s = pbs_dims_seq_clamped(&d, b);
    int32_t *q_perm = run.q_perm + head * d.max_q;
    if (!head_on(run, hp) || first + size > s.q_len || s.kv_len <= size) {
        const int32_t end = pbs_min_i32(first + size, d.max_q);
        for (int32_t i = first + thread; i < end; i += SUM_THREADS) q_perm[i] = i;
        return;
    }
    /* With more than one segment of keys, the segment where a whole row segment starts is whole. */
    const int32_t first_block = pbs_floor_to(s.q_offset + first, size) / d.block_k;
    const float *centroids =
        run.k_pool +
        ((static_cast<int64_t>(b) * d.heads_p + hp) * d.blocks_k + first_block) * d.head_dim;
    const head_rows q = rows_of(run.q, b, hq, s.q_start);
    for (int32_t w = thread; w < size / 32; w += SUM_THREADS) shared.taken[w] = 0;
    for (int32_t n = 0; n < size / d.block_k; n++) {
        for (int32_t c = thread; c < d.head_dim; c += SUM_THREADS)
            shared.centroid[c] = centroids[static_cast<int64_t>(n) * d.head_dim + c];
        __syncthreads();
        for (int32_t i = thread / ROW_LANES; i < size; i += SUM_THREADS / ROW_LANES) {
            const float similarity =
                similarity_of<T>(q, first + i, d.head_dim, shared.centroid, thread % ROW_LANES);
            if (thread % ROW_LANES == 0)
                shared.key[i] = bit_of(shared.taken, i) ? KEY_LAST : descending_key(similarity);
        }
        __syncthreads();
        for (int32_t i = thread; i < size; i += SUM_THREADS) { /* whole warps: size % 64 == 0 */
            const uint32_t best =
                __ballot_sync(0xffffffffu, rank_of(shared.key, size, i) < d.block_q);
            if (i % 32 == 0) shared.mine[i / 32] = best;
        }
        __syncthreads();
        for (int32_t i = thread; i < size; i += SUM_THREADS)
            if (bit_of(shared.mine, i))
                q_perm[first + n * d.block_q + pbs_count_bits(shared.mine, i)] = first + i;
        for (int32_t w = thread; w < size / 32; w += SUM_THREADS) shared.taken[w] |= shared.mine[w];
    }
}

} // namespace pbs

#endif /* PBS_CUDA_PERMUTE_QUERIES_CUH */
