/* SPDX-License-Identifier: Apache-2.0
 *
 * score, paper eq. 7: s_j = mean over probe rows of softmax_j(scale q_r . k_j), in two passes over
 * the keys, so that no [probe rows, keys] matrix ever stands in memory.
 *
 *   mean     [b, hq, slab]               partial sums of all query rows; MEAN_QUERY only
 *   probe    [b, hp, 8 rows]             probe rows as fragments, see probe.cuh
 *   stats    [b, hk, chunk, hp, 128 rows] row max and row sum of one chunk of keys: S = Q K^T
 *   reduce   [b, hp, 32 rows]            the same over all chunks, in a fixed order
 *   columns  [b, hk, 128 keys, hp]       shares of the keys: K Q^T, so that the sum over the probe
 *                                        runs inside a thread
 *
 * Heads that share keys are neighbours in the grid and find them in the L2 cache. Probe rows lie in
 * the workspace as fragments (fragments.cuh) and are read through L1; keys pass through shared
 * memory. Complete segments are multiples of 64 keys, so no tile of keys is ragged.
 */
#ifndef PBS_CUDA_SCORE_CUH
#define PBS_CUDA_SCORE_CUH

#include "probe.cuh"

namespace pbs {

/* Keys of a tile in shared memory, as fragments; head_dim decides how many bytes. */
struct key_tile {
    uint4 pieces[BLOCK_PIECES];
};

/* ---- stats ----------------------------------------------------------------------------------- */
/* Row max and row sum of the lane's 16 columns of a tile join those of the tiles before. Rows:
 * [m][half], row_max in log2 units. */
PBS_DEVICE void stats_update(const float (&acc)[2][8][4], const float (&scale)[2][2],
                             float (&row_max)[2][2], float (&row_sum)[2][2]) {
    PBS_UNROLL
    for (int m = 0; m < 2; m++) {
        PBS_UNROLL
        for (int half = 0; half < 2; half++) {
            float largest = acc[m][0][2 * half];
            PBS_UNROLL
            for (int n = 0; n < 8; n++)
                largest = fmaxf(largest, fmaxf(acc[m][n][2 * half], acc[m][n][2 * half + 1]));
            const float before = row_max[m][half];
            const float now = fmaxf(before, largest * scale[m][half]);
            float sum = 0.0f;
            PBS_UNROLL
            for (int n = 0; n < 8; n++)
                sum += ptx::ex2(acc[m][n][2 * half] * scale[m][half] - now) +
                       ptx::ex2(acc[m][n][2 * half + 1] * scale[m][half] - now);
            row_sum[m][half] = row_sum[m][half] * ptx::ex2(before - now) + sum;
            row_max[m][half] = now;
        }
    }
}

/* Joins (max, sum) of another set of keys to this one. */
PBS_DEVICE void stats_join(float &row_max, float &row_sum, float other_max, float other_sum) {
    const float now = fmaxf(row_max, other_max);
    row_sum = row_sum * ptx::ex2(row_max - now) + other_sum * ptx::ex2(other_max - now);
    row_max = now;
}

/* Three blocks on an SM, here and in score_columns: with four, and 128 registers, they spill. */
template <class T> PBS_KERNEL(SCORE_THREADS, 3) score_stats(const score_run run) {
    PBS_SHARED(key_tile, shared); /* two tiles of TILE_COLUMNS keys */
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t warp = static_cast<int32_t>(threadIdx.x / 32);
    const int32_t row_tiles = pbs_ceil_div(run.padded_rows, TILE_ROWS);
    const int32_t strips = strips_of(run.d.head_dim);
    const int32_t index = static_cast<int32_t>(blockIdx.x);
    int32_t chunk;
    const score_item item = score_item_of(run, index / row_tiles, run.chunks, &chunk);
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, item.b);
    const int32_t rows = probe_rows_of(run, s), first_key = chunk * CHUNK_KEYS;
    const int32_t first_row = index % row_tiles * TILE_ROWS;
    const int32_t tiles =
        pbs_min_i32(pbs_complete_keys(s.kv_len, run.d.segment_size) - first_key, CHUNK_KEYS) /
        TILE_COLUMNS;
    if (tiles <= 0 || first_row >= rows) return;

    const head_rows keys = rows_of(run.k, item.b, item.hk, s.kv_start);
    const int32_t tile_pieces = strips * (TILE_COLUMNS / BLOCK_ROWS) * BLOCK_PIECES;
    const int32_t row = first_row + warp * WARP_ROWS + lane / 4; /* of acc[0], first half */
    const bool works = first_row + warp * WARP_ROWS < rows;
    const int64_t at = item.head * run.padded_rows + row;
    float scale[2][2], row_max[2][2], row_sum[2][2];
    for (int i = 0; i < 4; i++) {
        scale[i / 2][i % 2] = works ? run.scale_log2 * run.unit[at + 8 * i] : 0.0f;
        row_max[i / 2][i % 2] = -INFINITY;
        row_sum[i / 2][i % 2] = 0.0f;
    }

    fragment_load(shared.pieces, keys, first_key, TILE_COLUMNS / BLOCK_ROWS, run.d.head_dim, warp,
                  SCORE_WARPS, lane);
    ptx::cp_async_commit();
    for (int32_t tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles)
            fragment_load(shared.pieces + (tile + 1) % 2 * tile_pieces, keys,
                          first_key + (tile + 1) * TILE_COLUMNS, TILE_COLUMNS / BLOCK_ROWS,
                          run.d.head_dim, warp, SCORE_WARPS, lane);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads(); /* this tile has arrived for all */
        if (works) {
            float acc[2][8][4];
            clear(acc);
            for (int32_t part = run.parts - 1; part >= 0; part--) /* the small ones first */
                fragment_product<T>(acc,
                                    probe_of(run, item.head, part) +
                                        fragment_rows(first_row + warp * WARP_ROWS, strips),
                                    shared.pieces + tile % 2 * tile_pieces, strips, lane);
            stats_update(acc, scale, row_max, row_sum);
        }
        __syncthreads(); /* nobody reads it any more */
    }
    if (!works) return;
    PBS_UNROLL
    for (int i = 0; i < 4; i++) {
        float most = row_max[i / 2][i % 2], sum = row_sum[i / 2][i % 2];
        for (int lanes = 1; lanes < 4; lanes *= 2)
            stats_join(most, sum, __shfl_xor_sync(0xffffffffu, most, lanes),
                       __shfl_xor_sync(0xffffffffu, sum, lanes));
        if (lane % 4 == 0)
            run.stats[(item.head * run.chunks + chunk) * run.padded_rows + row + 8 * i] =
                make_float2(most, sum);
    }
}

/* ---- reduce ---------------------------------------------------------------------------------- */
enum { REDUCE_WARPS = SUM_THREADS / 32 };

struct reduce_plan {
    float row_max[REDUCE_WARPS][32], row_sum[REDUCE_WARPS][32];
};

/* A lane is a row; warp w takes chunks w, w + 8, ..., then the first warp joins the eight. */
PBS_KERNEL(SUM_THREADS, 4) score_reduce(const score_run run) {
    PBS_SHARED(reduce_plan, shared);
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t warp = static_cast<int32_t>(threadIdx.x / 32), groups = run.padded_rows / 32;
    const int32_t index = static_cast<int32_t>(blockIdx.x), r = index % groups * 32 + lane;
    const int64_t head = index / groups;
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, index / groups / run.d.heads_p);
    const int32_t chunks =
        pbs_ceil_div(pbs_complete_keys(s.kv_len, run.d.segment_size), CHUNK_KEYS);
    const bool exists = r < probe_rows_of(run, s);
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int32_t chunk = warp; exists && chunk < chunks; chunk += REDUCE_WARPS) {
        const float2 part = run.stats[(head * run.chunks + chunk) * run.padded_rows + r];
        stats_join(row_max, row_sum, part.x, part.y);
    }
    shared.row_max[warp][lane] = row_max;
    shared.row_sum[warp][lane] = row_sum;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < REDUCE_WARPS && w < chunks; w++)
        stats_join(row_max, row_sum, shared.row_max[w][lane], shared.row_sum[w][lane]);
    const int64_t at = head * run.padded_rows + r;
    run.rows[at] = {run.scale_log2 * run.unit[at], exists ? row_max : 0.0f,
                    exists ? 1.0f / row_sum : 0.0f, 0.0f};
}

/* ---- columns --------------------------------------------------------------------------------- */
/* share[m][half] += what 64 probe rows give to the lane's keys. */
PBS_DEVICE void add_shares(const float (&acc)[2][8][4], const probe_row *rows, int lane,
                           float (&share)[2][2]) {
    PBS_UNROLL
    for (int n = 0; n < 8; n++) {
        PBS_UNROLL
        for (int j = 0; j < 2; j++) {
            const probe_row row = rows[8 * n + 2 * (lane % 4) + j];
            PBS_UNROLL
            for (int i = 0; i < 4; i++)
                share[i / 2][i % 2] +=
                    ptx::ex2(acc[i / 2][n][2 * (i % 2) + j] * row.scale_log2 - row.row_max) *
                    row.weight;
        }
    }
}

template <class T> PBS_KERNEL(SCORE_THREADS, 3) score_columns(const score_run run) {
    PBS_SHARED(key_tile, shared); /* TILE_ROWS keys */
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
    const int32_t strips = strips_of(run.d.head_dim);
    int32_t tile;
    const score_item item = score_item_of(run, static_cast<int32_t>(blockIdx.x),
                                          pbs_ceil_div(run.d.max_k, TILE_ROWS), &tile);
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, item.b);
    const int32_t rows = probe_rows_of(run, s), first = tile * TILE_ROWS;
    const int32_t scored = rows ? pbs_complete_keys(s.kv_len, run.d.segment_size) : 0;
    float *score = run.score + item.head * run.d.max_k;
    if (first + thread >= scored && first + thread < run.d.max_k) score[first + thread] = 0.0f;
    if (first >= scored) return;

    fragment_load(shared.pieces, rows_of(run.k, item.b, item.hk, s.kv_start), first,
                  pbs_min_i32(scored - first, TILE_ROWS) / BLOCK_ROWS, run.d.head_dim, warp,
                  SCORE_WARPS, lane);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int32_t key = first + warp * WARP_ROWS;
    if (key >= scored) return;
    const uint4 *keys = shared.pieces + fragment_rows(warp * WARP_ROWS, strips);
    float share[2][2] = {};
    for (int32_t at = 0; at < rows; at += TILE_COLUMNS) {
        float acc[2][8][4];
        clear(acc);
        for (int32_t part = run.parts - 1; part >= 0; part--)
            fragment_product<T>(acc, keys,
                                probe_of(run, item.head, part) + fragment_rows(at, strips), strips,
                                lane);
        add_shares(acc, run.rows + item.head * run.padded_rows + at, lane, share);
    }
    PBS_UNROLL
    for (int i = 0; i < 4; i++) {
        float sum = share[i / 2][i % 2];
        for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (lane % 4 == 0) score[key + lane / 4 + 8 * i] = sum / static_cast<float>(rows);
    }
}

/* ---- no probe -------------------------------------------------------------------------------- */
/* PBS_ORDER_RANDOM: one thread a key. */
PBS_KERNEL(SUM_THREADS, 4) score_random(const score_run run) {
    const int32_t tiles = pbs_ceil_div(run.d.max_k, SUM_THREADS);
    const int32_t index = static_cast<int32_t>(blockIdx.x), head = index / tiles;
    const int32_t b = head / run.d.heads_p, hp = head % run.d.heads_p;
    const int32_t j = index % tiles * SUM_THREADS + static_cast<int32_t>(threadIdx.x);
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, b);
    if (j >= run.d.max_k) return;
    const bool scored = j < pbs_complete_keys(s.kv_len, run.d.segment_size);
    run.score[static_cast<int64_t>(head) * run.d.max_k + j] =
        scored ? pbs_random_score(run.seed, run.first_head + hp, j) : 0.0f;
}

} // namespace pbs

#endif /* PBS_CUDA_SCORE_CUH */
