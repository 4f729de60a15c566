/* SPDX-License-Identifier: Apache-2.0
 *
 * All skeletons of one vocabulary, and the table that they make.
 */
#ifndef PBS_CPU_KERNEL_TABLE_H
#define PBS_CPU_KERNEL_TABLE_H

#include "cpu/kernel/attend.h"
#include "cpu/kernel/pack.h"
#include "cpu/kernel/score.h"
#include "cpu/kernel/select.h"

#define KERNEL_TABLE(isa_id, isa_name, runs, takes_dtype)                                    \
    {                                                                                        \
        .isa = isa_id, .name = isa_name, .runs_here = runs, .takes = takes_dtype,            \
        .panel_bytes = kernel_panel_bytes, .pack = kernel_pack, .pool_add = kernel_pool_add, \
        .score_scratch = kernel_score_scratch, .score_stats = kernel_score_stats,            \
        .score_columns = kernel_score_columns, .gemm_nt = kernel_gemm_nt,                    \
        .attend_scratch = kernel_attend_scratch, .attend_block = kernel_attend_block         \
    }

#endif /* PBS_CPU_KERNEL_TABLE_H */
