/* SPDX-License-Identifier: Apache-2.0
 *
 * What a way to score blocks sees and must fill: log_mass of every eligible block of a strip of
 * query blocks of one head. Everything else in the strip is -inf already.
 */
#ifndef PBS_CPU_SELECT_METHODS_H
#define PBS_CPU_SELECT_METHODS_H

#include "../core/check.h"
#include "kernels.h"

enum { PBS_STRIP_ROWS = 16 };

typedef struct pbs_strip_job {
    const pbs_select_params *p;
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    pbs_seq seq;
    int32_t batch, head;
    int32_t row_begin; /* first query block of the strip; rows <= PBS_STRIP_ROWS */
    const pbs_strip *strip;
    void *scratch;
} pbs_strip_job;

/* Key blocks [0, n) that query block m may select: those before its own segments; without segments
 * all causal ones, its own included. */
static inline int32_t pbs_own_start_of(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                       int32_t m) {
    return pbs_own_start(s, m, d->block_q, d->block_k, d->segment_size,
                         p->q_perm ? d->segment_size : 0, pbs_own_of_mode(p->mode));
}

static inline int32_t pbs_eligible_blocks(const pbs_select_params *p, const pbs_dims *d, pbs_seq s,
                                          int32_t m) {
    if (m * d->block_q >= s.q_len) return 0;
    if (p->mode == PBS_PERMUTE_NONE) return pbs_causal_blocks(s, m, d->block_q, d->block_k);
    return pbs_own_start_of(p, d, s, m) / d->block_k;
}

#define PBS_SELECT_METHOD(method, scratch_bytes, strip_fn)                       \
    size_t scratch_bytes(const pbs_select_params *params, const pbs_dims *dims); \
    void strip_fn(const pbs_strip_job *job);
#include "select_methods.inc"
#undef PBS_SELECT_METHOD

#endif /* PBS_CPU_SELECT_METHODS_H */
