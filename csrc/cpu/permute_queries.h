/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PBS_CPU_PERMUTE_QUERIES_H
#define PBS_CPU_PERMUTE_QUERIES_H

#include "../core/check.h"
#include "kernels.h"

/* One complete row segment against the blocks of one complete key segment. */
typedef struct pbs_query_segment {
    pbs_rows q; /* the sequence's rows */
    pbs_rows k; /* the sequence's keys, with k_perm as index if the centroids are permuted */
    int32_t first_row;
    int32_t first_key;
    int32_t
        *q_perm;   /* of the sequence and head; [first_row, first_row + segment_size) is written */
    void *scratch; /* pbs_permute_queries_scratch() bytes */
} pbs_query_segment;

size_t pbs_permute_queries_scratch(const pbs_dims *dims);
void pbs_permute_query_segment(const pbs_dims *dims, const pbs_cpu_kernels *kernels,
                               const pbs_query_segment *job);

#endif /* PBS_CPU_PERMUTE_QUERIES_H */
