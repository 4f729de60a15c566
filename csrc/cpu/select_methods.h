/* SPDX-License-Identifier: Apache-2.0
 *
 * What a way to score blocks sees and must fill: log_mass of every eligible block of a strip of
 * query blocks of one head. Everything else in the strip is -inf already.
 */
#ifndef PBS_CPU_SELECT_METHODS_H
#define PBS_CPU_SELECT_METHODS_H

#include "../core/select_rows.h"
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

#define PBS_SELECT_METHOD(method, scratch_bytes, strip_fn)                      \
    size_t scratch_bytes(const pbs_select_params *params, const pbs_dims *dims, \
                         const pbs_cpu_kernels *kernels);                       \
    void strip_fn(const pbs_strip_job *job);
#include "select_methods.inc"
#undef PBS_SELECT_METHOD

#endif /* PBS_CPU_SELECT_METHODS_H */
