/* SPDX-License-Identifier: Apache-2.0
 *
 * Segment and block arithmetic: the only place with these formulas, for host and device.
 *
 *   one sequence, B = 4, S = 8, q_len = 6, kv_len = 22, so q_offset = 16
 *   keys     0..7 | 8..15 | 16..21        two complete segments and a tail
 *   queries                 16 17 18 19 | 20 21     query blocks 0 and 1
 *   history of both = key blocks 0..3; own span = keys 16.. up to the last visible one
 */
#ifndef PBS_CORE_GEOMETRY_H
#define PBS_CORE_GEOMETRY_H

#include "pbs/pbs.h"

#if defined(__CUDACC__)
#define PBS_HD static __host__ __device__ inline
#else
#define PBS_HD static inline
#endif

/* softmax_scale * log2(e): kernels work in powers of two. */
#define PBS_LOG2_E 1.44269504088896340736f

/* One sequence of a batch. Row i of q has absolute position q_offset + i, negative when
 * q_len > kv_len: such rows see no key. */
typedef struct pbs_seq {
    int64_t q_start;
    int64_t kv_start;
    int32_t q_len;
    int32_t kv_len;
    int32_t q_offset;
} pbs_seq;

PBS_HD int32_t pbs_ceil_div(int32_t a, int32_t b) { return a / b + (a % b != 0); }

PBS_HD int32_t pbs_min_i32(int32_t a, int32_t b) { return a < b ? a : b; }

PBS_HD int32_t pbs_max_i32(int32_t a, int32_t b) { return a > b ? a : b; }

/* Largest multiple of step that is <= a, for a >= 0; 0 for negative a (no key lies before 0). */
PBS_HD int32_t pbs_floor_to(int32_t a, int32_t step) { return a > 0 ? a / step * step : 0; }

PBS_HD pbs_seq pbs_seq_at(const pbs_geometry *g, int32_t b, int32_t seqlen_q, int32_t seqlen_k) {
    pbs_seq s;
    s.q_start = g->q_start ? g->q_start[b] : 0;
    s.kv_start = g->kv_start ? g->kv_start[b] : 0;
    s.q_len = g->q_len ? g->q_len[b] : (int32_t)(seqlen_q - s.q_start);
    s.kv_len = g->kv_len ? g->kv_len[b] : (int32_t)(seqlen_k - s.kv_start);
    s.q_offset = s.kv_len - s.q_len;
    return s;
}

/* Keys in complete segments: the ones that are scored and permuted. */
PBS_HD int32_t pbs_complete_keys(int32_t kv_len, int32_t segment_size) {
    return kv_len / segment_size * segment_size;
}

/* Keys visible to the last existing row of query block m: [0, visible). */
PBS_HD int32_t pbs_visible_keys(pbs_seq s, int32_t m, int32_t block_q) {
    int32_t last_row = pbs_min_i32((m + 1) * block_q, s.q_len) - 1;
    return pbs_max_i32(s.q_offset + last_row + 1, 0);
}

/* First key of the own span of query block m; everything before it is history. With permuted
 * queries (row_segment = segment_size; 0 = off) rows of a block come from anywhere in their row
 * segment, so the span starts where that segment's first row stands. */
PBS_HD int32_t pbs_own_start(pbs_seq s, int32_t m, int32_t block_q, int32_t block_k,
                             int32_t segment_size, int32_t row_segment, pbs_own own) {
    int32_t row = m * block_q;
    if (row_segment) row = row / row_segment * row_segment;
    int32_t first = s.q_offset + row;
    switch (own) {
    case PBS_OWN_SEGMENT:
    case PBS_OWN_NONE: return pbs_floor_to(first, segment_size);
    case PBS_OWN_BLOCK: return pbs_floor_to(first, block_k);
    case PBS_OWN_MASK: return pbs_visible_keys(s, m, block_q); /* no own span */
    case PBS_OWN_ALL:
    default: return 0;
    }
}

/* One past the last key of the own span: keys visible to some row of the block. */
PBS_HD int32_t pbs_own_end(pbs_seq s, int32_t m, int32_t block_q, int32_t row_segment) {
    if (!row_segment) return pbs_visible_keys(s, m, block_q);
    int32_t segment = m * block_q / row_segment; /* any row of the row segment may be here */
    return pbs_visible_keys(s, segment, row_segment);
}

/* Causal key blocks of query block m: 100% of density. T (T + 1) / 2 over a one-shot prefill. */
PBS_HD int32_t pbs_causal_blocks(pbs_seq s, int32_t m, int32_t block_q, int32_t block_k) {
    return pbs_ceil_div(pbs_visible_keys(s, m, block_q), block_k);
}

/* Key blocks of the own span of query block m, never those above the diagonal: what a density or
 * an export adds to the history bits. */
PBS_HD int32_t pbs_own_blocks(pbs_seq s, int32_t m, int32_t block_q, int32_t block_k,
                              int32_t own_start) {
    int32_t n = pbs_causal_blocks(s, m, block_q, block_k) - own_start / block_k;
    return n > 0 ? n : 0;
}

#endif /* PBS_CORE_GEOMETRY_H */
