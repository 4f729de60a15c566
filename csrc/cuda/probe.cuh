/* SPDX-License-Identifier: Apache-2.0
 *
 * The probe of score: the query rows whose attention says which keys matter, in the workspace as
 * fragments (fragments.cuh). And the arguments that all kernels of score share.
 *
 * A probe row that is a row of q is exact in 16 bits: one part, which stats reads where it lies and
 * copies for columns. A mean (GROUP, MEAN_QUERY) is fp32: three parts, x 2^e = high + middle + low,
 * each of 16 bits, e such that the row's largest value is near 2^12, where fp16 does not underflow.
 * Three products then give fp32 accuracy; a launch of its own makes them.
 */
#ifndef PBS_CUDA_PROBE_CUH
#define PBS_CUDA_PROBE_CUH

#include "../core/random.h"
#include "fragments.cuh"
#include "kernel.cuh"
#include "row_sums.cuh"

namespace pbs {

enum {
    SCORE_THREADS = 128,
    SCORE_WARPS = SCORE_THREADS / 32,
    WARP_ROWS = 32,                      /* of A in a warp's product */
    TILE_ROWS = SCORE_WARPS * WARP_ROWS, /* probe rows of a stats block, keys of a columns block */
    TILE_COLUMNS = 64,                   /* rows of B in a product */
    CHUNK_KEYS = 512,                    /* of a stats block, at least */
    MOST_PROBE_ROWS = 256,               /* padded */
    MOST_CHUNKS = 32,                    /* of a sequence: who needs the sums joins them itself */
    MEAN_ROWS = 1024,                    /* query rows of one partial sum */
    ROW_EXPONENT = 12,                   /* of the largest value of a row of three parts */
};

/* What columns need to know of a probe row: p = 2^(s * scale_log2 - row_max) * weight. */
struct alignas(16) probe_row {
    float scale_log2;
    float row_max;
    float weight; /* 1 / row_sum; 0 for rows that do not exist */
    float unused;
};

/* Arguments of every kernel. */
struct score_run {
    pbs_view q, k;
    pbs_dims d;
    float scale_log2;
    pbs_order order;
    uint64_t seed;
    int32_t first_head;
    int32_t probe_rows;  /* at most, per head */
    int32_t padded_rows; /* a multiple of TILE_COLUMNS */
    int32_t parts;       /* 1 or 3 */
    int32_t chunks;      /* of keys, at most */
    int32_t slabs;       /* of query rows, for the mean */
    float *mean;         /* [B, Hq, slabs, D] */
    uint4 *probe;        /* [B, Hp, parts, padded_rows, strips * 32] as fragments */
    float *unit;         /* [B, Hp, padded_rows] 2^-e */
    float2 *stats;       /* [B, Hp, chunks, padded_rows] row max, row sum */
    float *score;        /* [B, Hp, Nk] */
};

/* Keys of a chunk, for so many that are scored: the sequence alone decides, as sums depend on it.
 */
PBS_HD int32_t chunk_keys_of(int32_t scored) {
    int32_t keys = CHUNK_KEYS;
    while (pbs_ceil_div(scored, keys) > MOST_CHUNKS) keys *= 2;
    return keys;
}

/* Rows of the probe of a sequence: none without rows or complete segments. */
PBS_DEVICE int32_t probe_rows_of(const score_run &run, const pbs_seq &s) {
    if (pbs_complete_keys(s.kv_len, run.d.segment_size) == 0) return 0;
    return pbs_min_i32(run.probe_rows, s.q_len);
}

/* Pieces of one part of one head's probe. */
PBS_HD int64_t probe_part_pieces(const score_run &run) {
    return fragment_rows(run.padded_rows, strips_of(run.d.head_dim));
}

PBS_DEVICE const uint4 *probe_of(const score_run &run, int64_t head, int32_t part) {
    return run.probe + (head * run.parts + part) * probe_part_pieces(run);
}

/* head: b * Hp + hp. */
struct score_item {
    int32_t b, hk, hp;
    int64_t head;
};

/* Block index -> (b, hk, rest, hp of the group): rest counts chunks or tiles of keys. */
PBS_DEVICE score_item score_item_of(const score_run &run, int32_t index, int32_t count,
                                    int32_t *rest) {
    const int32_t each = run.d.heads_p / run.d.heads_k;
    score_item item;
    const int32_t g = index % each;
    index /= each;
    *rest = index % count;
    index /= count;
    item.hk = index % run.d.heads_k;
    item.b = index / run.d.heads_k;
    item.hp = item.hk * each + g;
    item.head = static_cast<int64_t>(item.b) * run.d.heads_p + item.hp;
    return item;
}

/* ---- mean ------------------------------------------------------------------------------------ */
template <class T> PBS_KERNEL(SUM_THREADS, 4) score_mean(const score_run run) {
    PBS_SHARED(partial_sums, shared);
    begin_kernel();
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int32_t index = static_cast<int32_t>(blockIdx.x), slab = index % run.slabs;
    const int32_t head = index / run.slabs, b = head / run.d.heads_q, hq = head % run.d.heads_q;
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, b);
    const head_rows rows = rows_of(run.q, b, hq, s.q_start);
    const row_team team = row_team_of(run.d.head_dim, thread);
    const int32_t end = pbs_min_i32((slab + 1) * MEAN_ROWS, s.q_len);
    float sum[PIECE] = {};
    if (team.row < team.in_flight)
        for (int32_t row = slab * MEAN_ROWS + team.row; row < end; row += team.in_flight)
            add_piece<T>(sum, *piece_of(rows, row, team.piece));
    put_partial(shared, team, sum);
    __syncthreads();
    add_partials(shared, team, thread, 1.0f, run.mean + int64_t{index} * run.d.head_dim);
}

/* ---- probe ----------------------------------------------------------------------------------- */
/* Row of q that is probe row r of an order that probes rows. */
PBS_DEVICE int32_t probed_row(const score_run &run, int32_t hp, const pbs_seq &s, int32_t r) {
    return run.order == PBS_ORDER_RANDOM_QUERY
               ? pbs_random_row(run.seed, run.first_head + hp, s.q_len)
               : s.q_len - probe_rows_of(run, s) + r;
}

/* x += one piece of probe row r of one query head. */
template <class T>
PBS_DEVICE void add_query(const score_run &run, const score_item &item, const pbs_seq &s,
                          int32_t hq, int32_t r, int32_t piece, float (&x)[PIECE]) {
    if (run.order == PBS_ORDER_MEAN_QUERY) {
        const int64_t head = static_cast<int64_t>(item.b) * run.d.heads_q + hq;
        const int32_t slabs = pbs_ceil_div(s.q_len, MEAN_ROWS);
        float sum[PIECE] = {};
        for (int32_t slab = 0; slab < slabs; slab++) {
            const float *part =
                run.mean + (head * run.slabs + slab) * run.d.head_dim + piece * PIECE;
            for (int i = 0; i < PIECE; i++) sum[i] += part[i];
        }
        for (int i = 0; i < PIECE; i++) x[i] += sum[i] / static_cast<float>(s.q_len);
        return;
    }
    const head_rows rows = rows_of(run.q, item.b, hq, s.q_start);
    add_piece<T>(x, *piece_of(rows, probed_row(run, item.hp, s, r), piece));
}

/* The largest |x| of a warp's row -> 2^e, the power of two that brings it near 2^ROW_EXPONENT. */
PBS_DEVICE float row_unit(const float (&x)[PIECE]) {
    float largest = 0.0f;
    for (int i = 0; i < PIECE; i++) largest = fmaxf(largest, fabsf(x[i]));
    for (int lanes = 16; lanes > 0; lanes /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
    const int32_t exponent = static_cast<int32_t>(__float_as_uint(largest) >> 23); /* biased */
    /* Zero rows, and numbers whose inverse fp32 does not have: stay in range. */
    const int32_t near = pbs_min_i32(pbs_max_i32(exponent, ROW_EXPONENT + 1), 253);
    return __uint_as_float(static_cast<uint32_t>(2 * 127 + ROW_EXPONENT - near) << 23);
}

/* Means in three parts. One warp writes one row: lane = piece. Rows beyond the probe are zeros. */
template <class T> PBS_KERNEL(SUM_THREADS, 4) score_probe(const score_run run) {
    begin_kernel();
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t blocks = run.padded_rows / BLOCK_ROWS, strips = strips_of(run.d.head_dim);
    const int32_t index = static_cast<int32_t>(blockIdx.x);
    const int32_t r = index % blocks * BLOCK_ROWS + static_cast<int32_t>(threadIdx.x / 32);
    score_item item;
    item.head = index / blocks;
    item.b = index / blocks / run.d.heads_p;
    item.hp = index / blocks % run.d.heads_p;
    const pbs_seq s = pbs_dims_seq_clamped(&run.d, item.b);
    const bool exists = r < probe_rows_of(run, s) && lane < run.d.head_dim / PIECE;
    const int32_t each = run.d.heads_q / run.d.heads_p; /* 1, or the group */
    float x[PIECE] = {};
    for (int32_t g = 0; exists && g < each; g++)
        add_query<T>(run, item, s, item.hp * each + g, r, lane, x);
    for (int i = 0; i < PIECE; i++) x[i] /= static_cast<float>(each);
    const float up = row_unit(x);
    for (int i = 0; i < PIECE; i++) x[i] *= up;
    if (lane == 0) run.unit[item.head * run.padded_rows + r] = 1.0f / up;
    if (lane >= strips * STRIP_PIECES) return;
    const int64_t at = fragment_rows(r, strips) + lane / STRIP_PIECES * BLOCK_PIECES +
                       r % BLOCK_ROWS * STRIP_PIECES + lane % STRIP_PIECES;
    for (int32_t part = 0; part < run.parts; part++) {
        float high[PIECE];
        const uint4 piece = make_uint4(ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3]),
                                       ptx::pack<T>(x[4], x[5]), ptx::pack<T>(x[6], x[7]));
        to_floats<T>(piece, high);
        for (int i = 0; i < PIECE; i++) x[i] -= high[i]; /* exact: what is left for later parts */
        run.probe[(item.head * run.parts + part) * probe_part_pieces(run) + at] = piece;
    }
}

/* The probe as rows of q, from probe row `first` on; one part. */
PBS_DEVICE plain_rows plain_probe(const score_run &run, const score_item &item, const pbs_seq &s,
                                  int32_t first) {
    const int32_t row = probed_row(run, item.hp, s, 0), rows = probe_rows_of(run, s);
    return {rows_of(run.q, item.b, item.hp, s.q_start), row + first, row + rows,
            run.d.head_dim / PIECE};
}

/* Probe rows [first, first + 8 blocks) as fragments, by `warps` warps, for columns. */
PBS_DEVICE void copy_probe(const score_run &run, const score_item &item, const plain_rows &from,
                           int32_t first, int32_t blocks, int32_t warp, int32_t warps, int lane) {
    const int32_t strips = strips_of(run.d.head_dim);
    uint4 *to = run.probe + item.head * probe_part_pieces(run) + fragment_rows(first, strips);
    for (int32_t i = warp; i < blocks * strips; i += warps)
        to[i * BLOCK_PIECES + lane] = piece_at(from, i / strips, i % strips, lane);
}

/* ---- rows ------------------------------------------------------------------------------------ */
/* Probe row r: row max and row sum of its chunks joined, first to last. */
PBS_DEVICE probe_row join_chunks(const score_run &run, const score_item &item, int32_t scored,
                                 int32_t r) {
    const int32_t chunks = pbs_ceil_div(scored, chunk_keys_of(scored));
    const float2 *part = run.stats + item.head * run.chunks * run.padded_rows + r;
    float row_max = -INFINITY, row_sum = 0.0f;
    for (int32_t c = 0; c < chunks; c++)
        row_max = fmaxf(row_max, part[int64_t{c} * run.padded_rows].x);
    for (int32_t c = 0; c < chunks; c++) {
        const float2 chunk = part[int64_t{c} * run.padded_rows];
        row_sum += chunk.y * ptx::ex2(chunk.x - row_max);
    }
    const float unit =
        run.parts == 1 ? 1.0f : run.unit[item.head * run.padded_rows + r]; /* of three parts */
    return {run.scale_log2 * unit, row_max, 1.0f / row_sum, 0.0f};
}

/* All padded rows of the probe, those that do not exist with weight 0, by the whole block. */
PBS_DEVICE void join_rows(const score_run &run, const score_item &item, int32_t scored,
                          int32_t rows, int32_t threads, probe_row *to) {
    for (int32_t r = static_cast<int32_t>(threadIdx.x); r < run.padded_rows; r += threads) {
        to[r] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (r < rows) to[r] = join_chunks(run, item, scored, r);
    }
}

} // namespace pbs

#endif /* PBS_CUDA_PROBE_CUH */
