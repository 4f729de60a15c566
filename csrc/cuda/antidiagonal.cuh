/* SPDX-License-Identifier: Apache-2.0
 *
 * Antidiagonal scores on the tensor cores; csrc/cpu/antidiagonal.c says what they are. A group is
 * t = stride rows, P = B / t groups make a block, and
 *
 *   z[a, b] = scale / t * sum over i < t of q[a t + t-1-i] . k[b t + i]
 *
 * is a product of two matrices with rows of t D elements, the query's rows in reverse: tiles of
 * TILE_M query groups by TILE_N key groups, TILE_DEPTH elements at a time. A thread copies 8
 * elements at a time, and those lie in one row, wherever it is; so permuted rows and keys, strides
 * and head_dims all come in the same way.
 *
 * One pass over the keys, and never an (N / t)^2 matrix: of every tile only
 *
 *   lse[n, a] = log of the sum of e^z[a, b] over the groups b of key block n that a sees
 *
 * stays, [Tk, groups] floats in a slot of the workspace (2 MB at 1M tokens). Then the softmax of
 * group a gives block n the share e^(lse[n, a] - lse[a]), and the strip takes their sums or maxima.
 *
 * Where shares are of a whole row, own key blocks have their lse like all others. The own span has
 * the original order, so behind permuted history it takes a pass of its own.
 */
#ifndef PBS_CUDA_ANTIDIAGONAL_CUH
#define PBS_CUDA_ANTIDIAGONAL_CUH

#include "select.cuh"
#include "tile.cuh"

namespace pbs {

constexpr int TILE_M = 64, TILE_N = 128, TILE_DEPTH = 64;
constexpr int WARP_M = 32, WARP_N = 32; /* of a warp: 2 x 4 warps */
constexpr int MOST_GROUPS = 256;        /* of a strip: one block of 256 at stride 1 */
constexpr int MOST_ROWS = 16;           /* query blocks of a strip, if they have few groups */

struct antidiagonal_stage {
    tile<TILE_M, TILE_DEPTH> q;
    tile<TILE_N, TILE_DEPTH> k;
};

/* What the softmax needs of every query group; the strip follows. */
struct antidiagonal_groups {
    float row_max[MOST_GROUPS];
    float row_inverse[MOST_GROUPS]; /* 1 / sum of e^(lse - row_max); 0 if it sees nothing */
    int32_t seen[MOST_GROUPS];      /* key blocks [0, n) of which it sees something */
    float part_max[SELECT_THREADS];
    double part_sum[SELECT_THREADS];
};

/* Three lives, one after another, with barriers between. */
union antidiagonal_plan {
    antidiagonal_stage stage[2];
    float z[TILE_M][TILE_N + 1]; /* threads walk down a column: + 1 for the banks */
    antidiagonal_groups groups;
};
static_assert(sizeof(antidiagonal_plan) <= 48 << 10, "no more than a kernel has without asking");

/* The groups of a strip. */
struct group_band {
    int32_t per_block; /* P */
    int32_t groups;    /* of the strip: columns of lse */
    int32_t pieces;    /* of a row: D / 8 */
    int32_t end;       /* one past the last query row of the strip that exists */
    int32_t first;     /* first query row of the strip */
};

PBS_DEVICE group_band band_of(const select_args &a, const strip_job &job) {
    group_band w;
    w.per_block = a.d.block_q / a.p.stride;
    w.groups = a.rows * w.per_block;
    w.pieces = a.d.head_dim / PIECE;
    w.first = job.row_begin * a.d.block_q;
    w.end = pbs_min_i32(w.first + job.rows * a.d.block_q, job.seq.q_len);
    return w;
}

/* Key groups [0, n) that query group g of the strip sees. */
PBS_DEVICE int32_t visible_of(const select_args &a, const strip_job &job, const group_band &w,
                              int32_t g) {
    const int32_t row = w.first + g * a.p.stride;
    return row < w.end
               ? pbs_visible_groups(&a.p, &a.d, job.seq, job.row_begin + g / w.per_block, row)
               : 0;
}

/* Of the key groups that it sees, the first that is of its own span. */
PBS_DEVICE int32_t first_own_of(const select_args &a, const strip_job &job, const group_band &w,
                                int32_t g) {
    return pbs_first_own_group(&a.p, &a.d, job.seq, job.row_begin + g / w.per_block);
}

/* Rows of one operand: row r of a tile, inner step i is row first + r t + i or, reversed,
 * first + r t + t-1-i; zeros from `end` on. */
struct group_rows {
    head_rows rows;
    const int32_t *perm;
    int32_t first, end, len;
    bool reversed;
};

/* Elements [TILE_DEPTH step, + TILE_DEPTH) of the groups' rows. A thread's piece is the same in all
 * rows that it copies. */
template <int ROWS>
PBS_DEVICE void load_groups(tile<ROWS, TILE_DEPTH> &to, const group_rows &from, int32_t stride,
                            int32_t pieces, int32_t step) {
    constexpr int PER_ROW = TILE_DEPTH / PIECE, ROW_STEP = SELECT_THREADS / PER_ROW;
    static_assert(ROW_STEP % 8 == 0 && ROWS % ROW_STEP == 0, "steps keep the swizzle");
    const int32_t thread = static_cast<int32_t>(threadIdx.x), c = thread % PER_ROW;
    const int32_t at = step * PER_ROW + c, inner = at / pieces, piece = at % pieces;
    const uint32_t to_row =
        ptx::shared_address(&to) + chunk_offset<TILE_DEPTH>(thread / PER_ROW, c);
    /* Unsigned: rows of groups that do not exist may lie beyond 2^31. */
    const uint32_t first = static_cast<uint32_t>(from.first) +
                           static_cast<uint32_t>(thread / PER_ROW * stride) +
                           static_cast<uint32_t>(from.reversed ? stride - 1 - inner : inner);
    const uint32_t end = inner < stride ? static_cast<uint32_t>(from.end) : 0;
    PBS_UNROLL
    for (int r = 0; r < ROWS; r += ROW_STEP) {
        const uint32_t row = first + static_cast<uint32_t>(r * stride);
        const int32_t source =
            row < end ? permuted(from.perm, static_cast<int32_t>(row), from.len) : 0;
        ptx::cp_async_16(to_row + static_cast<uint32_t>(r * TILE_DEPTH * 2),
                         piece_of(from.rows, source, piece), row < end ? CHUNK_BYTES : 0);
    }
}

/* plan.z = scaled products of a tile of query groups and one of key groups, up to rows and cols at
 * least: warps beyond them only help to load. */
template <class T>
PBS_DEVICE void group_products(const select_args &a, const group_band &w, const group_rows &q,
                               const group_rows &k, int32_t rows, int32_t cols) {
    PBS_SHARED(antidiagonal_plan, plan);
    const int32_t steps = pbs_ceil_div(a.p.stride * w.pieces, TILE_DEPTH / PIECE);
    const int lane = lane_id(), m0 = warp_id() % 2 * WARP_M, n0 = warp_id() / 2 * WARP_N;
    const bool busy = m0 < rows && n0 < cols;
    float acc[WARP_M / 16][WARP_N / 8][4];
    clear(acc);
    load_groups(plan.stage[0].q, q, a.p.stride, w.pieces, 0);
    load_groups(plan.stage[0].k, k, a.p.stride, w.pieces, 0);
    ptx::cp_async_commit();
    PBS_NO_UNROLL
    for (int32_t step = 0; step < steps; step++) {
        antidiagonal_stage &now = plan.stage[step % 2], &next = plan.stage[(step + 1) % 2];
        if (step + 1 < steps) {
            load_groups(next.q, q, a.p.stride, w.pieces, step + 1);
            load_groups(next.k, k, a.p.stride, w.pieces, step + 1);
        }
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        if (busy) gemm_nt<T>(acc, operand_a(now.q, m0, lane), operand_b(now.k, n0, lane));
        __syncthreads(); /* this stage is filled, or z is written, next */
    }
    const float scale = a.p.softmax_scale / static_cast<float>(a.p.stride);
    PBS_UNROLL
    for (int m = 0; m < WARP_M / 16; m++) {
        PBS_UNROLL
        for (int n = 0; n < WARP_N / 8; n++) {
            PBS_UNROLL
            for (int i = 0; i < 4; i++)
                plan.z[m0 + 16 * m + lane / 4 + i / 2 * 8][n0 + 8 * n + lane % 4 * 2 + i % 2] =
                    acc[m][n][i] * scale;
        }
    }
    __syncthreads();
}

/* log of the sum of e^z over the first `seen` of a few key groups. */
PBS_DEVICE float log_sum(const float *z, int32_t seen) {
    float most = -INFINITY, sum = 0.0f;
    for (int32_t b = 0; b < seen; b++) most = fmaxf(most, z[b]);
    for (int32_t b = 0; b < seen; b++) sum += expf(z[b] - most);
    return seen > 0 ? most + logf(sum) : -INFINITY;
}

PBS_DEVICE float log_add(float x, float y) {
    const float most = fmaxf(x, y);
    return most > -INFINITY ? most + logf(expf(x - most) + expf(y - most)) : x + y;
}

/* Which of the key groups that a query group sees a pass is about. */
enum key_pass { ALL_KEYS, HISTORY_KEYS, OWN_KEYS };

/* plan.z -> lse of every (query group, key block) of the tile. A block of more than TILE_N groups
 * comes in several tiles; the same thread then adds to what it wrote. A key block is history or own
 * as a whole: OWN_KEYS leaves history alone, and writes again what HISTORY_KEYS wrote of a group's
 * own blocks because they are history to later groups. */
PBS_DEVICE void keep_sums(const select_args &a, const strip_job &job, const group_band &w,
                          int32_t g0, int32_t b0, key_pass pass) {
    PBS_SHARED(antidiagonal_plan, plan);
    const int32_t width = pbs_min_i32(w.per_block, TILE_N), parts = TILE_N / width;
    const int32_t thread = static_cast<int32_t>(threadIdx.x), r = thread % TILE_M, g = g0 + r;
    const int32_t visible = g < w.groups ? visible_of(a, job, w, g) - b0 : 0;
    const int32_t own = g < w.groups && pass == OWN_KEYS ? first_own_of(a, job, w, g) - b0 : 0;
    for (int32_t part = thread / TILE_M; part < parts; part += SELECT_THREADS / TILE_M) {
        const int32_t b = part * width, n = (b0 + b) / w.per_block;
        if (g >= w.groups || n >= a.d.blocks_k) break;
        if (b < own) continue;
        float *lse = scratch_of(a) + static_cast<int64_t>(n) * w.groups + g;
        const float sum = log_sum(&plan.z[r][b], pbs_min_i32(visible - b, width));
        *lse = (b0 + b) % w.per_block ? log_add(*lse, sum) : sum;
    }
    __syncthreads(); /* z makes room for the next tile */
}

/* lse of query groups [g0, g0 + TILE_M) against all key blocks of the pass that any of them sees.
 */
template <class T>
PBS_DEVICE void meet_keys(const select_args &a, const strip_job &job, const group_band &w,
                          int32_t g0, key_pass pass) {
    const group_rows q = {rows_of(a.p.q, job.batch, job.head, job.seq.q_start),
                          query_order(a, job),
                          w.first + g0 * a.p.stride,
                          w.end,
                          job.seq.q_len,
                          true};
    group_rows k = {rows_of(a.p.k.view, job.batch, job.head / a.d.group, job.seq.kv_start),
                    pass == OWN_KEYS ? nullptr : key_order(a, job),
                    0,
                    job.seq.kv_len,
                    job.seq.kv_len,
                    false};
    /* Later groups see more, up to the last that exists. */
    const int32_t exist = pbs_ceil_div(w.end - w.first, a.p.stride);
    const int32_t last = pbs_min_i32(g0 + TILE_M, exist) - 1;
    if (last < g0) return;
    const int32_t end =
        pass == HISTORY_KEYS ? first_own_of(a, job, w, last) : visible_of(a, job, w, last);
    for (int32_t b0 = pass == OWN_KEYS ? first_own_of(a, job, w, g0) : 0; b0 < end; b0 += TILE_N) {
        k.first = b0 * a.p.stride;
        group_products<T>(a, w, q, k, last + 1 - g0, end - b0);
        keep_sums(a, job, w, g0, b0, pass);
    }
}

/* What block_mass reads of all groups: each is a few threads' work, part p of `parts`. */
PBS_DEVICE void normalize_groups(const select_args &a, const strip_job &job, const group_band &w) {
    PBS_SHARED(antidiagonal_plan, plan);
    antidiagonal_groups &s = plan.groups;
    const int32_t thread = static_cast<int32_t>(threadIdx.x), parts = SELECT_THREADS / w.groups;
    const int32_t g = thread % w.groups, part = thread / w.groups;
    const int32_t seen = part < parts ? pbs_ceil_div(visible_of(a, job, w, g), w.per_block) : 0;
    const float *lse = scratch_of(a) + g;
    float most = -INFINITY;
    for (int32_t n = part; n < seen; n += parts)
        most = fmaxf(most, lse[static_cast<int64_t>(n) * w.groups]);
    s.part_max[thread] = most;
    __syncthreads();
    for (int32_t p = 0; p < parts; p++) most = fmaxf(most, s.part_max[p * w.groups + g]);
    double sum = 0.0;
    for (int32_t n = part; n < seen; n += parts) {
        const float x = lse[static_cast<int64_t>(n) * w.groups];
        if (x != -INFINITY) sum += static_cast<double>(expf(x - most));
    }
    s.part_sum[thread] = sum;
    __syncthreads();
    if (thread < w.groups) {
        for (int32_t p = 1; p < parts; p++) sum += s.part_sum[p * w.groups + g];
        s.seen[g] = seen;
        s.row_max[g] = most;
        s.row_inverse[g] = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum); /* NaN: all shares */
    }
    __syncthreads();
}

/* Log mass of key block n for query block r of the strip: groups in ascending order. -inf where
 * none sees it; NaN if one group's shares are, be it the largest share that is wanted. */
PBS_DEVICE float block_mass(const select_args &a, const group_band &w, int32_t r, int32_t n) {
    PBS_SHARED(antidiagonal_plan, plan);
    const antidiagonal_groups &s = plan.groups;
    float sum = 0.0f, most = 0.0f;
    int32_t exist = 0;
    for (int32_t i = 0; i < w.per_block; i++, exist++) {
        const int32_t g = r * w.per_block + i;
        if (w.first + g * a.p.stride >= w.end) break;
        float x = -INFINITY; /* what the group does not see is no share, or NaN like its others */
        if (n < s.seen[g]) x = scratch_of(a)[static_cast<int64_t>(n) * w.groups + g];
        const float share = (x == -INFINITY ? 0.0f : expf(x - s.row_max[g])) * s.row_inverse[g];
        sum += share;
        most = fmaxf(most, share);
    }
    if (a.p.reduce == PBS_REDUCE_MAX && sum == sum) return logf(most);
    return logf(exist ? sum * (1.0f / static_cast<float>(exist)) : sum);
}

template <class T> struct antidiagonal {
    PBS_DEVICE float *row(const select_args &a, int32_t r) {
        PBS_SHARED(antidiagonal_plan, plan);
        return strip_row(a, reinterpret_cast<float *>(&plan.groups + 1), r);
    }

    PBS_DEVICE void score(const select_args &a, const strip_job &job) {
        const group_band w = band_of(a, job);
        const int32_t cols = strip_cols(a, job);
        const int first_pass = pbs_splits_rows(&a.p) ? HISTORY_KEYS : ALL_KEYS;
        const int last_pass = pbs_splits_rows(&a.p) ? OWN_KEYS : ALL_KEYS;
        PBS_NO_UNROLL
        for (int pass = first_pass; pass <= last_pass; pass++)
            for (int32_t g0 = 0; g0 < job.rows * w.per_block; g0 += TILE_M)
                meet_keys<T>(a, job, w, g0, static_cast<key_pass>(pass));
        normalize_groups(a, job, w);
        for (int32_t at = static_cast<int32_t>(threadIdx.x); at < job.rows * cols;
             at += SELECT_THREADS) {
            const int32_t r = at / cols, n = at % cols;
            row(a, r)[n] = block_mass(a, w, r, n);
        }
        __syncthreads();
    }
};

/* Query blocks of a strip: as many as fill TILE_M groups. A power of two, so that their groups are
 * one too and divide the threads. */
inline int32_t antidiagonal_rows(const pbs_select_params *p, const pbs_dims *d) {
    const int32_t per_block = d->block_q / p->stride;
    return pbs_max_i32(1, pbs_min_i32(MOST_ROWS, TILE_M / per_block));
}

} // namespace pbs

#endif /* PBS_CUDA_ANTIDIAGONAL_CUH */
