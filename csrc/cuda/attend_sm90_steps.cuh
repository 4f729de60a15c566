/* SPDX-License-Identifier: Apache-2.0
 *
 * What a consumer group of attend_sm90.cuh does with a tile: products, masks, online softmax, and
 * the way out. 128 threads own 64 rows; a thread holds two of them, row g and row g + 8 of its
 * warp's 16, and of an accumulator the elements of row r are those with e / 2 % 2 == r
 * (descriptor.cuh).
 */
#ifndef PBS_CUDA_ATTEND_SM90_STEPS_CUH
#define PBS_CUDA_ATTEND_SM90_STEPS_CUH

#include "attend_sm90_plan.cuh"
#include "softmax.cuh"

namespace pbs {
namespace sm90 {

enum tile_kind { CLEAN, CAUSAL, MEANS };

/* What a thread keeps over the steps of a row block. */
template <class S> struct consumer {
    float acc_o[S::HEAD_DIM / 2];
    uint32_t p[S::BLOCK_N / 4]; /* of the tile whose P V is due, packed */
    float row_max[2];           /* log2 units, see softmax.cuh */
    float row_sum[2];           /* this thread's share */
    float scores_scale[2];      /* of O before the tile of p: softmax_step */
};

/* Of the group, for the life of the kernel. */
template <class S> struct consumer_rings {
    ring<S::Q_STAGES> q;
    ring<S::KV_STAGES> k, v;
};

PBS_DEVICE bool group_leader() { return threadIdx.x % GROUP_THREADS == 0; }

/* ---- the way in ------------------------------------------------------------------------------ */
/* Rows in an order of their own, which no box can hold: the group's 64 of Q by index, 16 bytes a
 * thread, zeros where there is none. */
template <class S>
PBS_DEVICE void gather_q(matrix<GROUP_ROWS, S::HEAD_DIM> &to, const attend_args &a,
                         const attend_job &job, int group) {
    using tile = matrix<GROUP_ROWS, S::HEAD_DIM>;
    constexpr int32_t PIECES = S::HEAD_DIM / PIECE;
    const uint32_t base = ptx::shared_address(to.element);
    PBS_NO_UNROLL
    for (int32_t i = threadIdx.x % GROUP_THREADS; i < GROUP_ROWS * PIECES; i += GROUP_THREADS) {
        const int32_t row = original_row(a, job, group * GROUP_ROWS + i / PIECES);
        const int32_t column = i % PIECES * PIECE;
        uint32_t words[4] = {0, 0, 0, 0};
        if (row >= 0 && column < a.dims.head_dim) {
            const uint4 piece = *piece_of(job.q, row, i % PIECES);
            words[0] = piece.x, words[1] = piece.y, words[2] = piece.z, words[3] = piece.w;
        }
        ptx::st_shared_x4(base + tile::offset(i / PIECES, column), words);
    }
    ptx::fence_proxy_async();
    ptx::bar_sync(GROUP_BARRIER + group, GROUP_THREADS);
}

/* ---- products -------------------------------------------------------------------------------- */
/* acc_s[64, BLOCK_N] = Q K^T: both K-major, 16 of D a wgmma. */
template <class T, class S, int N>
PBS_DEVICE void issue_qk(float (&acc_s)[N], const matrix<GROUP_ROWS, S::HEAD_DIM> &q,
                         const matrix<S::BLOCK_N, S::HEAD_DIM> &k) {
    using q_tile = matrix<GROUP_ROWS, S::HEAD_DIM>;
    using k_tile = matrix<S::BLOCK_N, S::HEAD_DIM>;
    const uint64_t a =
        matrix_descriptor(ptx::shared_address(q.element), 16, q_tile::EIGHT_ROWS, q_tile::MODE);
    const uint64_t b =
        matrix_descriptor(ptx::shared_address(k.element), 16, k_tile::EIGHT_ROWS, k_tile::MODE);
    ptx::wgmma_fence();
    PBS_UNROLL
    for (int j = 0; j < S::HEAD_DIM / 16; j++) {
        const uint32_t a_step = k_major_step(q_tile::MODE, GROUP_ROWS, j);
        const uint32_t b_step = k_major_step(k_tile::MODE, S::BLOCK_N, j);
        ptx::wgmma_ss<T, 0>(acc_s, descriptor_at(a, a_step), descriptor_at(b, b_step), j > 0);
    }
    ptx::wgmma_commit();
}

/* acc_o[64, D] += P V: P from registers, V as stored, MN-major, 16 keys a wgmma. */
template <class T, class S>
PBS_DEVICE void issue_pv(consumer<S> &c, const matrix<S::BLOCK_N, S::HEAD_DIM> &v) {
    using tile = matrix<S::BLOCK_N, S::HEAD_DIM>;
    const uint64_t b = matrix_descriptor(ptx::shared_address(v.element), tile::CHUNK_BYTES,
                                         tile::EIGHT_ROWS, tile::MODE);
    ptx::wgmma_fence();
    PBS_UNROLL
    for (int j = 0; j < S::BLOCK_N / 16; j++)
        ptx::wgmma_rs<T, 1>(c.acc_o, &c.p[4 * j], descriptor_at(b, mn_major_step(tile::MODE, j)),
                            1);
    ptx::wgmma_commit();
}

/* ---- logits ---------------------------------------------------------------------------------- */
/* Row of this thread within the row block. */
PBS_DEVICE int32_t thread_row(int group, int r) {
    return static_cast<int32_t>(group * GROUP_ROWS +
                                accumulator_row(threadIdx.x % GROUP_THREADS, 2 * r));
}

/* -inf where a row does not see a key: key > q_offset + row. */
template <int N>
PBS_DEVICE void mask_scores(float (&acc_s)[N], const attend_args &a, const attend_job &job,
                            int group, int32_t key) {
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        /* Columns of the tile that the row sees, counted from this thread's first one. */
        const int32_t row = original_row(a, job, thread_row(group, r));
        const int32_t limit = job.seq.q_offset + row + 1 - key -
                              static_cast<int32_t>(accumulator_column(threadIdx.x % 128, 0));
        PBS_UNROLL
        for (int e = 2 * r; e < N; e += 4) {
            if (e / 4 * 8 >= limit) acc_s[e] = minus_infinity();
            if (e / 4 * 8 + 1 >= limit) acc_s[e + 1] = minus_infinity();
        }
    }
}

/* Products with means to logits in log2 units: a mean counts as often as its block has keys. */
template <int N>
PBS_DEVICE void weigh_means(float (&acc_s)[N], const uint32_t (&dropped)[4], const attend_args &a) {
    const uint32_t first = accumulator_column(threadIdx.x % 128, 0);
    PBS_UNROLL
    for (int e = 0; e < N; e++) {
        const int column = e / 4 * 8 + e % 2;
        const bool on = dropped[column / 32] >> first >> column % 32 & 1;
        const float logit = fmaf(acc_s[e], a.softmax_scale_log2, a.mean_bias);
        acc_s[e] = on ? logit : minus_infinity();
    }
}

/* acc_s = 2^(scale_log2 * acc_s - row_max) under the new maxima; scores_scale[r]: what was summed
 * before is worth now. Only if not CLEAN may logits be -inf; see softmax_step of softmax.cuh. */
template <tile_kind KIND, class S, int N>
PBS_DEVICE void softmax_step(consumer<S> &c, float (&acc_s)[N], float scale_log2) {
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        float tile_max = fmaxf(acc_s[2 * r], acc_s[2 * r + 1]);
        PBS_UNROLL
        for (int e = 2 * r + 4; e < N; e += 4)
            tile_max = fmaxf(tile_max, fmaxf(acc_s[e], acc_s[e + 1]));
        float row_max = fmaxf(c.row_max[r], quad_max(tile_max) * scale_log2);
        /* Any base serves that keeps 2^(s - base) in range, and a new one costs all of O. */
        if (S::SLACK > 0 && row_max - c.row_max[r] <= S::SLACK) row_max = c.row_max[r];
        const float base = KIND != CLEAN && row_max == minus_infinity() ? 0.0f : row_max;
        c.scores_scale[r] = ptx::ex2(c.row_max[r] - base);
        float sum = 0.0f;
        PBS_UNROLL
        for (int e = 2 * r; e < N; e += 4) {
            acc_s[e] = ptx::ex2(fmaf(acc_s[e], scale_log2, -base));
            acc_s[e + 1] = ptx::ex2(fmaf(acc_s[e + 1], scale_log2, -base));
            sum += acc_s[e] + acc_s[e + 1];
        }
        c.row_max[r] = row_max;
        c.row_sum[r] = c.row_sum[r] * c.scores_scale[r] + sum;
    }
}

template <int N> PBS_DEVICE void scale_rows(float (&acc)[N], const float (&by)[2]) {
    PBS_UNROLL
    for (int e = 0; e < N; e++) acc[e] *= by[e / 2 % 2];
}

/* The rows of O under the new maxima; none of the warp's has changed: nothing to do. */
template <class S> PBS_DEVICE void rescale(consumer<S> &c) {
    const bool same = c.scores_scale[0] == 1.0f && c.scores_scale[1] == 1.0f;
    if (S::SLACK == 0 || __any_sync(0xffffffffu, !same)) scale_rows(c.acc_o, c.scores_scale);
}

/* Accumulator layout is operand layout: neighbours become the halves of a word. */
template <class T, class S, int N> PBS_DEVICE void pack_p(consumer<S> &c, const float (&acc_s)[N]) {
    PBS_UNROLL
    for (int i = 0; i < N / 2; i++) c.p[i] = ptx::pack<T>(acc_s[2 * i], acc_s[2 * i + 1]);
}

/* ---- the way out ----------------------------------------------------------------------------- */
/* acc_o becomes O, row_sum the lse in natural log; a row that has seen no key: 0 and -inf. */
template <class S> PBS_DEVICE void softmax_finish(consumer<S> &c) {
    float inverse[2];
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        const float sum = quad_sum(c.row_sum[r]);
        const bool no_key = sum == 0.0f;
        inverse[r] = no_key ? 0.0f : 1.0f / sum;
        c.row_sum[r] = no_key ? minus_infinity() : (c.row_max[r] + ptx::lg2(sum)) * LN_2;
    }
    scale_rows(c.acc_o, inverse);
}

template <class S>
PBS_DEVICE void store_lse(const consumer<S> &c, const attend_args &a, const attend_job &job,
                          int group) {
    if (!job.lse || threadIdx.x % 4 != 0) return;
    PBS_UNROLL
    for (int r = 0; r < 2; r++) {
        const int32_t row = original_row(a, job, thread_row(group, r));
        if (row >= 0) job.lse[row * a.lse.stride[2]] = c.row_sum[r];
    }
}

/* O into the tile where Q was, 16 columns a step: a lane names one row of one 8x8 matrix, and these
 * are rows 0-7 and 8-15 of the warp, then the same of the next 8 columns. */
template <class T, class S>
PBS_DEVICE void stage_out(const consumer<S> &c, matrix<GROUP_ROWS, S::HEAD_DIM> &to) {
    using tile = matrix<GROUP_ROWS, S::HEAD_DIM>;
    const uint32_t thread = threadIdx.x % GROUP_THREADS, lane = thread % 32;
    const uint32_t row = thread / 32 * 16 + lane % 16, right = lane / 16 * 8;
    const uint32_t base = ptx::shared_address(to.element);
    PBS_UNROLL
    for (int j = 0; j < S::HEAD_DIM / 16; j++) {

        uint32_t words[4];
        PBS_UNROLL
        for (int i = 0; i < 4; i++)
            words[i] = ptx::pack<T>(c.acc_o[8 * j + 2 * i], c.acc_o[8 * j + 2 * i + 1]);
        ptx::stmatrix_x4(base + tile::offset(row, j * 16 + right), words);
    }
}

/* The rows that exist, 16 bytes a thread: where others of the tensor stand between or behind. */
template <class S>
PBS_DEVICE void copy_out(const matrix<GROUP_ROWS, S::HEAD_DIM> &from, const attend_args &a,
                         const attend_job &job, int group) {
    using tile = matrix<GROUP_ROWS, S::HEAD_DIM>;
    const unsigned char *staged = reinterpret_cast<const unsigned char *>(from.element);
    const int32_t pieces = a.dims.head_dim / PIECE;
    for (int32_t i = threadIdx.x % GROUP_THREADS; i < GROUP_ROWS * pieces; i += GROUP_THREADS) {
        const int32_t row = original_row(a, job, group * GROUP_ROWS + i / pieces);
        const int32_t column = i % pieces * PIECE;
        if (row < 0) continue;
        *reinterpret_cast<uint4 *>(job.out.first + row * job.out.stride + column) =
            *reinterpret_cast<const uint4 *>(staged + tile::offset(i / pieces, column));
    }
}

/* May the copy engine store the group's 64 rows? It drops those behind the tensor, but not those
 * behind the sequence, and knows no other order. */
PBS_DEVICE bool stands_alone(const attend_args &a, const attend_job &job, int group) {
    if (a.q_perm) return false;
    return job.first + (group + 1) * GROUP_ROWS <= job.seq.q_len ||
           job.seq.q_start + job.seq.q_len >= a.dims.seqlen_q;
}

/* One thread. */
template <class S>
PBS_DEVICE void send_out(const matrix<GROUP_ROWS, S::HEAD_DIM> &from, const arguments &a,
                         const attend_job &job, int group) {
    using tile = matrix<GROUP_ROWS, S::HEAD_DIM>;
    const int32_t row = static_cast<int32_t>(job.seq.q_start) + job.first + group * GROUP_ROWS;
    const int32_t head = coordinate(a.attend.out, 1, job.item.hq);
    const int32_t batch = coordinate(a.attend.out, 0, job.item.b);
    PBS_UNROLL
    for (int c = 0; c < tile::CHUNKS; c++)
        ptx::tma_store(&a.map.out, ptx::shared_address(from.element) + c * tile::CHUNK_BYTES,
                       {c * tile::CHUNK, row, head, batch});
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
}

/* The group's 64 rows of O. Once its leader is back the row block and the tile of Q are free: what
 * all threads read of them, they read before the last barrier here. */
template <class T, class S>
PBS_DEVICE void store_rows(const arguments &a, const row_block &block, int group, consumer<S> &c,
                           matrix<GROUP_ROWS, S::HEAD_DIM> &tile) {
    const attend_job &job = block.job;
    const bool boxes = stands_alone(a.attend, job, group);
    softmax_finish(c);
    store_lse(c, a.attend, job, group);
    stage_out<T>(c, tile);
    ptx::fence_proxy_async();
    ptx::bar_sync(GROUP_BARRIER + group, GROUP_THREADS); /* all 64 rows are there */
    if (boxes) {
        if (group_leader()) send_out<S>(tile, a, job, group);
        return;
    }
    copy_out<S>(tile, a.attend, job, group);
    ptx::bar_sync(GROUP_BARRIER + group, GROUP_THREADS); /* all have read them */
}

} // namespace sm90
} // namespace pbs

#endif /* PBS_CUDA_ATTEND_SM90_STEPS_CUH */
