/* SPDX-License-Identifier: Apache-2.0
 *
 * Means of key blocks: what permute pools, and what attend reads instead of blocks that are left
 * out (PBS_CORRECTION_MEAN).
 */
#ifndef PBS_CPU_MEANS_H
#define PBS_CPU_MEANS_H

#include "packed.h"

/* mean [D]: sum of the rows in order times 1 / count; zeros if there are none. */
void pbs_mean_of_rows(const pbs_cpu_kernels *kernels, const pbs_rows *rows, int32_t count,
                      int32_t head_dim, float *mean);

typedef struct pbs_means_run {
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    const pbs_packed *packed;
    const float *k_pool, *v_pool; /* [B, pool_heads, Tk, D]; read: blocks that are whole */
    int32_t pool_heads;           /* a multiple of packed->mean_heads */
    char *scratch;                /* [num_threads, scratch_bytes] */
    size_t scratch_bytes;         /* pbs_means_scratch() or more */
} pbs_means_run;

size_t pbs_means_scratch(const pbs_dims *dims); /* a multiple of 64 */
/* Pools, rounded to the dtype of k, into the mean panels of packed. */
void pbs_pack_means(const pbs_exec *exec, pbs_means_run *run);

#endif /* PBS_CPU_MEANS_H */
