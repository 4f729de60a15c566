/* SPDX-License-Identifier: Apache-2.0
 *
 * One call of attend between its driver (attend.cu) and the kernels that it may run.
 */
#ifndef PBS_CUDA_ATTEND_RUN_CUH
#define PBS_CUDA_ATTEND_RUN_CUH

#include "attend.cuh"

namespace pbs {

/* What order.cuh makes. */
struct order_args {
    int32_t items;
    const int32_t *count; /* [items] listed blocks, or NULL: nobody has counted them */
    uint8_t *bucket;      /* [items] */
    int32_t *order;       /* [items] out */
    int32_t *taken;       /* out: 0, what kernels that share out row blocks count from */
};

struct attend_run {
    attend_args args;
    order_args order;
    bool corrects;
};

/* The kernels of 9.0 (attend_sm90.cu), after the order is made. *taken: false, and nothing has
 * happened, where they do not serve this call. */
pbs_status launch_attend_sm90(const pbs_exec &exec, const attend_run &run, bool *taken);

} // namespace pbs

#endif /* PBS_CUDA_ATTEND_RUN_CUH */
