/* SPDX-License-Identifier: Apache-2.0
 *
 * select on a device. A block of threads takes one head and a strip of query blocks:
 *
 *   scorer   fills the strip [rows, Tk] with fp32 log masses (mean_pool.cuh, antidiagonal.cuh)
 *   rule     one warp a row: log masses -> bits (rule.cuh)
 *   finish   token 0's block is forced, the own span cleared, what is left counted
 *
 * The strip lies in shared memory where it fits, else in a slot of the workspace; blocks of threads
 * then go round until all strips are done. A scorer is a struct with
 *
 *   row(args, r)      row r of the block's strip, to be filled up to its eligible blocks
 *   score(args, job)  all threads; row r is complete for warp r % SELECT_WARPS at the end
 */
#ifndef PBS_CUDA_SELECT_CUH
#define PBS_CUDA_SELECT_CUH

#include "../core/bits.h"
#include "../core/select_rows.h"
#include "kernel.cuh"
#include "rows.cuh"
#include "rule.cuh"

#if defined(__USE_FAST_MATH__) || defined(__FAST_MATH__)
#error "select compares sums of exponentials: not with approximate ones"
#endif

namespace pbs {

constexpr int SELECT_THREADS = 256, SELECT_WARPS = SELECT_THREADS / 32;

struct select_args {
    pbs_select_params p;
    pbs_dims d;
    int32_t rows;   /* query blocks of a strip */
    int32_t strips; /* of a head */
    int64_t items;  /* strips of all heads */
    float *strip;   /* [slots, rows, Tk], or NULL: strips lie in shared memory */
    float *scratch; /* [slots, scratch_floats], a scorer's own */
    int64_t scratch_floats;
};

/* The strip of one block of threads. */
struct strip_job {
    pbs_seq seq;
    int32_t batch, head;
    int32_t row_begin, rows; /* query blocks [row_begin, row_begin + rows) */
};

/* Row r of the strip of this block of threads, which lies at `shared` unless it does not fit. */
PBS_DEVICE float *strip_row(const select_args &a, float *shared, int32_t r) {
    float *strip = shared;
    if (a.strip) strip = a.strip + static_cast<int64_t>(blockIdx.x) * a.rows * a.d.blocks_k;
    return strip + static_cast<int64_t>(r) * a.d.blocks_k;
}

PBS_DEVICE float *scratch_of(const select_args &a) {
    return a.scratch + static_cast<int64_t>(blockIdx.x) * a.scratch_floats;
}

PBS_DEVICE int32_t warp_id() { return static_cast<int32_t>(threadIdx.x / 32); }

/* Row `row` of the order perm (NULL: natural), which lies in the sequence whatever perm holds. */
PBS_DEVICE int32_t permuted(const int32_t *perm, int32_t row, int32_t len) {
    return perm ? pbs_max_i32(0, pbs_min_i32(perm[row], len - 1)) : row;
}

PBS_DEVICE const int32_t *query_order(const select_args &a, const strip_job &job) {
    const int64_t head = static_cast<int64_t>(job.batch) * a.d.heads_q + job.head;
    return a.p.q_perm ? a.p.q_perm + head * a.d.max_q : nullptr;
}

/* Which of [B, Hp] owns the keys' order and pools. */
PBS_DEVICE int64_t owner_of(const select_args &a, const strip_job &job) {
    return static_cast<int64_t>(job.batch) * a.d.heads_p + pbs_owner_head(&a.d, job.head);
}

PBS_DEVICE const int32_t *key_order(const select_args &a, const strip_job &job) {
    return a.p.k_perm ? a.p.k_perm + owner_of(a, job) * a.d.max_k : nullptr;
}

/* Items count heads up and strips down: later rows see more, so the long ones go first. */
PBS_DEVICE strip_job job_of(const select_args &a, int64_t item) {
    strip_job job;
    const int64_t head = item / a.strips;
    const int32_t strip = a.strips - 1 - static_cast<int32_t>(item % a.strips);
    job.batch = static_cast<int32_t>(head / a.d.heads_q);
    job.head = static_cast<int32_t>(head % a.d.heads_q);
    job.seq = pbs_dims_seq_clamped(&a.d, job.batch);
    job.row_begin = strip * a.rows;
    job.rows = pbs_min_i32(a.rows, a.d.blocks_q - job.row_begin);
    return job;
}

PBS_DEVICE int32_t eligible_of(const select_args &a, const strip_job &job, int32_t r) {
    return pbs_eligible_blocks(&a.p, &a.d, job.seq, job.row_begin + r);
}

/* Most eligible blocks of any row: they only grow with the rows, up to the last that exists. */
PBS_DEVICE int32_t strip_cols(const select_args &a, const strip_job &job) {
    const int32_t exist = pbs_ceil_div(job.seq.q_len, a.d.block_q) - job.row_begin;
    const int32_t last = pbs_min_i32(job.rows, exist) - 1;
    return last < 0 ? 0 : eligible_of(a, job, last);
}

/* Permuted block of original token 0: somewhere in the first segment. One warp, whose 32 places
 * always lie in one block. */
PBS_DEVICE int32_t first_block(const select_args &a, const strip_job &job) {
    const int32_t *k_perm = key_order(a, job);
    const int32_t end = pbs_min_i32(a.d.segment_size, job.seq.kv_len);
    for (int32_t at = 0; k_perm && at < end; at += 32) {
        const int32_t i = at + lane_id();
        if (__any_sync(WHOLE_WARP, i < end && k_perm[i] == 0)) return at / a.d.block_k;
    }
    return 0;
}

/* Row r from its log masses to its bits. One warp. */
PBS_DEVICE void finish_row(const select_args &a, const strip_job &job, int32_t r, float *log_mass,
                           int32_t first) {
    const int32_t m = job.row_begin + r, n = eligible_of(a, job, r);
    const int32_t history = pbs_history_blocks(&a.p, &a.d, job.seq, m);
    const int64_t head = static_cast<int64_t>(job.batch) * a.d.heads_q + job.head;
    const int64_t row = head * a.d.blocks_q + m;
    if (a.p.mass) {
        float *mass = a.p.mass + row * a.d.blocks_k;
        for (int32_t i = lane_id(); i < a.d.blocks_k; i += 32)
            mass[i] = i < n ? expf(log_mass[i]) : 0.0f;
    }
    const float tau = a.p.tau_heads ? a.p.tau_heads[job.head] : a.p.tau;
    const rule_cut cut = apply_rule(a.p.rule, tau, log_mass, n);
    int32_t count = 0, ties = 0;
    for (int32_t w = 0; w < a.d.words; w++) {
        uint32_t word = 32 * w < n ? kept_word(log_mass, n, w, cut, ties) : 0;
        if (w == first / 32) word |= 1u << first % 32;
        word &= pbs_bits_below(history, w);
        count += __popc(word);
        if (lane_id() == 0) a.p.bits[row * a.d.words + w] = word;
    }
    if (lane_id() == 0) a.p.count[row] = count;
}

template <class S> PBS_KERNEL(SELECT_THREADS, 2) select_kernel(const select_args a) {
    begin_kernel();
    for (int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
        const strip_job job = job_of(a, item);
        S::score(a, job);
        const int32_t first = first_block(a, job);
        for (int32_t r = warp_id(); r < job.rows; r += SELECT_WARPS)
            finish_row(a, job, r, S::row(a, r), first);
        __syncthreads(); /* the next strip may come into the same memory */
    }
}

} // namespace pbs

#endif /* PBS_CUDA_SELECT_CUH */
