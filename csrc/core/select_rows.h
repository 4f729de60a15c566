/* SPDX-License-Identifier: Apache-2.0
 *
 * Which key blocks a row of select is about, for host and device.
 */
#ifndef PBS_CORE_SELECT_ROWS_H
#define PBS_CORE_SELECT_ROWS_H

#include "check.h"

/* First key of the own span of query block m: history ends there. */
PBS_HD int32_t pbs_own_start_of(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                int32_t m) {
    return pbs_own_start(s, m, d->block_q, d->block_k, d->segment_size,
                         p->q_perm ? d->segment_size : 0, pbs_own_of_mode(p->mode));
}

/* Key blocks [0, n) that query block m may select: those before its own segments; without segments
 * all causal ones, its own included. */
PBS_HD int32_t pbs_eligible_blocks(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                   int32_t m) {
    if (m * d->block_q >= s.q_len) return 0;
    if (p->mode == PBS_PERMUTE_NONE) return pbs_causal_blocks(s, m, d->block_q, d->block_k);
    return pbs_own_start_of(p, d, s, m) / d->block_k;
}

/* Key blocks [0, n) of history: what bits may hold. */
PBS_HD int32_t pbs_history_blocks(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                  int32_t m) {
    if (m * d->block_q >= s.q_len) return 0;
    return pbs_own_start_of(p, d, s, m) / d->block_k;
}

/* ANTIDIAGONAL: does the softmax of a query group run over its own span too? */
PBS_HD int pbs_shares_rows(const pbs_select_params *p) {
    return p->mode == PBS_PERMUTE_NONE || p->normalize == PBS_NORMALIZE_ROW;
}

/* ... and may that span, always in the original order, have another order than history? Sizes go by
 * this: pointers are not there yet. */
PBS_HD int pbs_may_split_rows(const pbs_select_params *p) {
    return p->normalize == PBS_NORMALIZE_ROW && pbs_permutes_keys(p->mode);
}

PBS_HD int pbs_splits_rows(const pbs_select_params *p) {
    return pbs_may_split_rows(p) && p->k_perm;
}

/* ANTIDIAGONAL: key groups [0, n) that the query group of rows [row, row + stride) of block m sees,
 * where stride divides the block: those that start no later than its last existing row, or, if the
 * own span does not count, those before the own segments. */
PBS_HD int32_t pbs_visible_groups(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                  int32_t m, int32_t row) {
    if (row >= s.q_len) return 0;
    int32_t end = s.q_offset + pbs_min_i32(row + p->stride, s.q_len);
    if (!pbs_shares_rows(p)) end = pbs_own_start_of(p, d, s, m);
    return pbs_ceil_div(pbs_max_i32(end, 0), p->stride);
}

/* The first of them that is of the own span: all before it are history. */
PBS_HD int32_t pbs_first_own_group(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                   int32_t m) {
    return pbs_own_start_of(p, d, s, m) / p->stride;
}

#endif /* PBS_CORE_SELECT_ROWS_H */
