/* SPDX-License-Identifier: Apache-2.0
 *
 * Alg. 2 on a device: mean queries against mean keys, softmax over the eligible blocks, all in fp32
 * as on the CPU (csrc/cpu/mean_pool.c): 16-bit products would move blocks across the threshold.
 *
 *   shared memory   keys [TILE_KEYS, 8 + 4] | queries [MEAN_POOL_ROWS, D] | strip [rows, Tk]
 *
 * 8 dimensions of TILE_KEYS pooled keys at a time; thread i multiplies keys i and i + 256 with
 * every query of the strip: 128 products for 18 wide reads, 16 of which are the same for all lanes.
 */
#ifndef PBS_CUDA_MEAN_POOL_CUH
#define PBS_CUDA_MEAN_POOL_CUH

#include "row_sums.cuh"
#include "select.cuh"

namespace pbs {

constexpr int MEAN_POOL_ROWS = 16;
constexpr int TILE_KEYS = 2 * SELECT_THREADS;
constexpr int FLOATS = 4;     /* in a wide read */
constexpr int POOL_DEPTH = 4; /* rows that a lane has asked for at a time */

struct mean_pool_plan {
    /* A row of 12: eight lanes that read wide meet 32 different banks. */
    float keys[TILE_KEYS][PIECE + FLOATS];
};

/* queries of a strip begin where the plan ends. */
PBS_DEVICE float *mean_pool_queries() {
    PBS_SHARED(mean_pool_plan, plan);
    return reinterpret_cast<float *>(&plan + 1);
}

PBS_DEVICE float *mean_pool_row(const select_args &a, int32_t r) {
    return strip_row(a, mean_pool_queries() + MEAN_POOL_ROWS * a.d.head_dim, r);
}

PBS_DEVICE float4 wide(const float *at) { return *reinterpret_cast<const float4 *>(at); }

/* mean [D] over the existing rows of query block m, zeros if there are none. One warp: D / 8 lanes
 * to a row, as many rows at once as that allows. */
template <class T>
PBS_DEVICE void pool_queries(const select_args &a, const strip_job &job, int32_t m, float *mean) {
    const int32_t first = m * a.d.block_q, pieces = a.d.head_dim / PIECE;
    const int32_t count = pbs_min_i32(a.d.block_q, job.seq.q_len - first);
    const int32_t at_once = 32 / pieces, sub = lane_id() / pieces, piece = lane_id() % pieces;
    const head_rows rows = rows_of(a.p.q, job.batch, job.head, job.seq.q_start);
    const int32_t *q_perm = query_order(a, job);
    float part[PIECE] = {}, sum[PIECE];
    for (int32_t i = sub < at_once ? sub : count; i < count; i += POOL_DEPTH * at_once) {
        uint4 piece_of_row[POOL_DEPTH] = {};
        PBS_UNROLL
        for (int u = 0; u < POOL_DEPTH; u++) {
            const int32_t row = i + u * at_once;
            if (row < count)
                piece_of_row[u] =
                    *piece_of(rows, permuted(q_perm, first + row, job.seq.q_len), piece);
        }
        PBS_UNROLL
        for (int u = 0; u < POOL_DEPTH; u++) add_piece<T>(part, piece_of_row[u]);
    }
    PBS_UNROLL
    for (int e = 0; e < PIECE; e++) {
        sum[e] = part[e];
        for (int32_t s = 1; s < at_once; s++)
            sum[e] += __shfl_sync(WHOLE_WARP, part[e], s * pieces + piece);
    }
    if (lane_id() >= pieces) return;
    const float each = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
    PBS_UNROLL
    for (int e = 0; e < PIECE; e++) mean[piece * PIECE + e] = sum[e] * each;
}

/* 8 dimensions from d on of key blocks [n0, n0 + TILE_KEYS), zeros from cols on. */
PBS_DEVICE void load_keys(mean_pool_plan &plan, const float *k_pool, int32_t head_dim, int32_t n0,
                          int32_t cols, int32_t d) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), half = thread % 2 * FLOATS;
    PBS_UNROLL
    for (int32_t key = thread / 2; key < TILE_KEYS; key += SELECT_THREADS / 2) {
        const bool exists = n0 + key < cols;
        const int64_t n = exists ? n0 + key : 0;
        ptx::cp_async_16(ptx::shared_address(&plan.keys[key][half]),
                         k_pool + n * head_dim + d + half, exists ? 16 : 0);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}

/* acc[c][r] += query r . key threadIdx.x + 256 c over the 8 dimensions that are loaded. */
PBS_DEVICE void multiply(const mean_pool_plan &plan, const float *queries, int32_t head_dim,
                         float (&acc)[2][MEAN_POOL_ROWS]) {
    PBS_NO_UNROLL /* 16 queries' reads in flight are enough, and all there are registers for */
        for (int half = 0; half < PIECE; half += FLOATS) {
        const float4 k[2] = {wide(&plan.keys[threadIdx.x][half]),
                             wide(&plan.keys[threadIdx.x + SELECT_THREADS][half])};
        PBS_UNROLL
        for (int r = 0; r < MEAN_POOL_ROWS; r++) {
            const float4 q = wide(queries + r * head_dim + half);
            PBS_UNROLL
            for (int c = 0; c < 2; c++) {
                acc[c][r] = fmaf(q.x, k[c].x, acc[c][r]);
                acc[c][r] = fmaf(q.y, k[c].y, acc[c][r]);
                acc[c][r] = fmaf(q.z, k[c].z, acc[c][r]);
                acc[c][r] = fmaf(q.w, k[c].w, acc[c][r]);
            }
        }
    }
}

/* Logits of key blocks [n0, n0 + TILE_KEYS) into the strip. */
PBS_DEVICE void mean_pool_tile(const select_args &a, const strip_job &job, int32_t n0,
                               int32_t cols) {
    PBS_SHARED(mean_pool_plan, plan);
    const float *queries = mean_pool_queries();
    const float *k_pool = a.p.k_pool + owner_of(a, job) * a.d.blocks_k * a.d.head_dim;
    const bool busy = n0 + 32 * warp_id() < cols;
    float acc[2][MEAN_POOL_ROWS] = {};
    for (int32_t d = 0; d < a.d.head_dim; d += PIECE) {
        load_keys(plan, k_pool, a.d.head_dim, n0, cols, d);
        __syncthreads();
        if (busy) multiply(plan, queries + d, a.d.head_dim, acc);
        __syncthreads();
    }
    const int32_t n = n0 + static_cast<int32_t>(threadIdx.x);
    float *to = mean_pool_row(a, 0) + n;
    PBS_UNROLL
    for (int r = 0; r < MEAN_POOL_ROWS; r++, to += a.d.blocks_k) {
        if (r >= job.rows) break;
        PBS_UNROLL
        for (int c = 0; c < 2; c++)
            if (n + c * SELECT_THREADS < cols)
                to[c * SELECT_THREADS] = acc[c][r] * a.p.softmax_scale;
    }
}

/* x [n] -> x - log of the sum of e^x, the sum in double as on the CPU. One warp. */
PBS_DEVICE void log_softmax(float *x, int32_t n) {
    float most = -INFINITY;
    double sum = 0.0;
    for (int32_t i = lane_id(); i < n; i += 32) most = fmaxf(most, x[i]);
    most = warp_max(most);
    for (int32_t i = lane_id(); i < n; i += 32) sum += static_cast<double>(expf(x[i] - most));
    const float log_sum = logf(static_cast<float>(warp_sum(sum)));
    for (int32_t i = lane_id(); i < n; i += 32) x[i] = x[i] - most - log_sum;
}

template <class T> struct mean_pool {
    PBS_DEVICE float *row(const select_args &a, int32_t r) { return mean_pool_row(a, r); }

    PBS_DEVICE void score(const select_args &a, const strip_job &job) {
        const int32_t cols = strip_cols(a, job);
        float *queries = mean_pool_queries();
        for (int32_t r = warp_id(); r < job.rows && cols; r += SELECT_WARPS)
            pool_queries<T>(a, job, job.row_begin + r, queries + r * a.d.head_dim);
        for (int32_t n0 = 0; n0 < cols; n0 += TILE_KEYS) mean_pool_tile(a, job, n0, cols);
        __syncthreads();
        for (int32_t r = warp_id(); r < job.rows; r += SELECT_WARPS)
            log_softmax(mean_pool_row(a, r), eligible_of(a, job, r));
    }
};

/* Without the strip. */
inline size_t mean_pool_shared(const pbs_dims *d) {
    return sizeof(mean_pool_plan) +
           sizeof(float) * MEAN_POOL_ROWS * static_cast<size_t>(d->head_dim);
}

} // namespace pbs

#endif /* PBS_CUDA_MEAN_POOL_CUH */
