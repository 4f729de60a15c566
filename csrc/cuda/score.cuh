/* SPDX-License-Identifier: Apache-2.0
 *
 * score, paper eq. 7: s_j = mean over probe rows of softmax_j(scale q_r . k_j), in two passes over
 * the keys, so that no [probe rows, keys] matrix ever stands in memory.
 *
 *   mean     [b, hq, slab]               partial sums of all query rows; MEAN_QUERY only
 *   probe    [b, hp, 8 rows]             means of rows as fragments, see probe.cuh; not if rows are
 *                                        probed as they are
 *   stats    [b, hk, chunk, hp, 128 rows] row max and row sum of one chunk of keys: S = Q K^T
 *   columns  [b, hk, 128 keys, hp]       chunks joined, shares of the keys: K Q^T, so that the sum
 *                                        over the probe runs inside a thread; prefill does this in
 *                                        the launch that also permutes (score_permute.cuh)
 *
 * Heads that share keys are neighbours in the grid and find them in the L2 cache. Probe rows are
 * read through L1; keys pass through shared memory. Complete segments are multiples of 64 keys, so
 * no tile of keys is ragged.
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

/* acc = 32 probe rows from `row` on times the 64 keys of a tile. PLAIN: the probe is rows of q. */
template <class T, bool PLAIN>
PBS_DEVICE void stats_product(const score_run &run, const score_item &item, const plain_rows &probe,
                              int32_t row, const uint4 *keys, int lane, float (&acc)[2][8][4]) {
    const int32_t strips = strips_of(run.d.head_dim);
    clear(acc);
    if (PLAIN) {
        fragment_product<T>(acc, probe, keys, strips, lane);
    } else {
        for (int32_t part = run.parts - 1; part >= 0; part--) { /* the small ones first */
            const uint4 *first = probe_of(run, item.head, part) + fragment_rows(row, strips);
            fragment_product<T>(acc, fragment_matrix{first, strips}, keys, strips, lane);
        }
    }
}

/* Three blocks on an SM, here and in score_columns: with four, and 128 registers, they spill. */
template <class T, bool PLAIN> PBS_KERNEL(SCORE_THREADS, 3) score_stats(const score_run run) {
    PBS_SHARED(key_tile, shared); /* two tiles of TILE_COLUMNS keys */
    begin_kernel();
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t warp = static_cast<int32_t>(threadIdx.x / 32);
    const int32_t row_tiles = pbs_ceil_div(run.padded_rows, TILE_ROWS);
    const int32_t strips = strips_of(run.d.head_dim);
    const int32_t index = static_cast<int32_t>(blockIdx.x);
    int32_t chunk;
    const score_item item = score_item_of(run, index / row_tiles, run.chunks, &chunk);
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, item.b);
    const int32_t scored = pbs_complete_keys(s.kv_len, run.d.segment_size);
    const int32_t rows = probe_rows_of(run, s), chunk_keys = chunk_keys_of(scored);
    const int32_t first_key = chunk * chunk_keys, first_row = index % row_tiles * TILE_ROWS;
    const int32_t tiles = pbs_min_i32(scored - first_key, chunk_keys) / TILE_COLUMNS;
    if (tiles <= 0 || rows == 0) return;

    const int32_t row = first_row + warp * WARP_ROWS; /* of acc[0], first half, lane 0 */
    plain_rows probe = {};
    if (PLAIN) {
        probe = plain_probe(run, item, s, first_row);
        const int32_t blocks = pbs_min_i32(run.padded_rows - first_row, TILE_ROWS) / BLOCK_ROWS;
        if (chunk == 0) copy_probe(run, item, probe, first_row, blocks, warp, SCORE_WARPS, lane);
        probe.first += warp * WARP_ROWS;
    }
    if (first_row >= rows) return;
    const head_rows keys = rows_of(run.k, item.b, item.hk, s.kv_start);
    const int32_t tile_pieces = strips * (TILE_COLUMNS / BLOCK_ROWS) * BLOCK_PIECES;
    const bool works = row < rows;
    const int64_t at = item.head * run.padded_rows + row + lane / 4;
    float scale[2][2], row_max[2][2], row_sum[2][2];
    for (int i = 0; i < 4; i++) {
        const float unit = PLAIN || !works ? 1.0f : run.unit[at + 8 * i];
        scale[i / 2][i % 2] = run.scale_log2 * unit;
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
            stats_product<T, PLAIN>(run, item, probe, row, shared.pieces + tile % 2 * tile_pieces,
                                    lane, acc);
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
            run.stats[(item.head * run.chunks + chunk) * run.padded_rows + row + lane / 4 + 8 * i] =
                make_float2(most, sum);
    }
}

/* ---- columns --------------------------------------------------------------------------------- */
/* share[m][half] += what 64 probe rows give to the lane's keys. */
template <int M>
PBS_DEVICE void add_shares(const float (&acc)[M][8][4], const probe_row *rows, int lane,
                           float (&share)[M][2]) {
    PBS_UNROLL
    for (int n = 0; n < 8; n++) {
        PBS_UNROLL
        for (int j = 0; j < 2; j++) {
            const probe_row row = rows[8 * n + 2 * (lane % 4) + j];
            PBS_UNROLL
            for (int i = 0; i < 2 * M; i++)
                share[i / 2][i % 2] +=
                    ptx::ex2(acc[i / 2][n][2 * (i % 2) + j] * row.scale_log2 - row.row_max) *
                    row.weight;
        }
    }
}

/* Scores of 16 M keys of a head, fragments from `keys` on: score[m][half] is that of key
 * 16 m + lane / 4 + 8 half, in all four lanes. rows: the joined rows of the probe. One warp. */
template <class T, int M>
PBS_DEVICE void score_keys(const score_run &run, const score_item &item, int32_t probe_rows,
                           const uint4 *keys, const probe_row *rows, int lane,
                           float (&score)[M][2]) {
    const int32_t strips = strips_of(run.d.head_dim);
    PBS_UNROLL
    for (int i = 0; i < 2 * M; i++) score[i / 2][i % 2] = 0.0f;
    for (int32_t at = 0; at < probe_rows; at += TILE_COLUMNS) {
        float acc[M][8][4];
        clear(acc);
        for (int32_t part = run.parts - 1; part >= 0; part--)
            fragment_product<T>(acc, fragment_matrix{keys, strips},
                                probe_of(run, item.head, part) + fragment_rows(at, strips), strips,
                                lane);
        add_shares(acc, rows + at, lane, score);
    }
    PBS_UNROLL
    for (int i = 0; i < 2 * M; i++) {
        float sum = score[i / 2][i % 2];
        for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        score[i / 2][i % 2] = sum / static_cast<float>(probe_rows);
    }
}

struct columns_plan {
    probe_row rows[MOST_PROBE_ROWS];
    uint4 keys[BLOCK_PIECES]; /* TILE_ROWS keys as fragments */
};

template <class T> PBS_KERNEL(SCORE_THREADS, 3) score_columns(const score_run run) {
    PBS_SHARED(columns_plan, shared);
    begin_kernel();
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
    int32_t tile;
    const score_item item = score_item_of(run, static_cast<int32_t>(blockIdx.x),
                                          pbs_ceil_div(run.d.max_k, TILE_ROWS), &tile);
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, item.b);
    const int32_t rows = probe_rows_of(run, s), first = tile * TILE_ROWS;
    const int32_t scored = rows ? pbs_complete_keys(s.kv_len, run.d.segment_size) : 0;
    float *score = run.score + item.head * run.d.max_k;
    if (first + thread >= scored && first + thread < run.d.max_k) score[first + thread] = 0.0f;
    if (first >= scored) return;

    fragment_load(shared.keys, rows_of(run.k, item.b, item.hk, s.kv_start), first,
                  pbs_min_i32(scored - first, TILE_ROWS) / BLOCK_ROWS, run.d.head_dim, warp,
                  SCORE_WARPS, lane);
    ptx::cp_async_commit();
    join_rows(run, item, scored, rows, SCORE_THREADS, shared.rows);
    ptx::cp_async_wait<0>();
    __syncthreads();
    const int32_t key = first + warp * WARP_ROWS;
    if (key >= scored) return;
    float found[WARP_ROWS / 16][2];
    score_keys<T>(run, item, rows,
                  shared.keys + fragment_rows(warp * WARP_ROWS, strips_of(run.d.head_dim)),
                  shared.rows, lane, found);
    if (lane % 4 != 0) return;
    PBS_UNROLL
    for (int i = 0; i < WARP_ROWS / 8; i++) score[key + lane / 4 + 8 * i] = found[i / 2][i % 2];
}

/* ---- no probe -------------------------------------------------------------------------------- */
/* PBS_ORDER_RANDOM: one thread a key. */
PBS_KERNEL(SUM_THREADS, 4) score_random(const score_run run) {
    begin_kernel();
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
