/* SPDX-License-Identifier: Apache-2.0
 *
 * All skeletons of one vocabulary, and the table that they make.
 */
#ifndef PBS_CPU_KERNEL_TABLE_H
#define PBS_CPU_KERNEL_TABLE_H

#if VEC_TILES
#include "cpu/kernel/attend_tiles.h"
#else
#include "cpu/kernel/attend.h"
#endif
#include "cpu/kernel/antidiagonal.h"
#include "cpu/kernel/pack.h"
#include "cpu/kernel/score.h"
#include "cpu/kernel/select.h"
#include "cpu/state.h"

static void kernel_enter(pbs_cpu_state *saved) {
    pbs_enter_mxcsr(saved);
#if VEC_TILES
    tiles_enter(saved->tiles);
#endif
}

static void kernel_leave(const pbs_cpu_state *saved) {
#if VEC_TILES
    tiles_leave(saved->tiles);
#endif
    pbs_leave_mxcsr(saved);
}

#define KERNEL_TABLE(isa_id, isa_name, runs, takes_dtype)                                          \
    {                                                                                              \
        .isa = isa_id, .name = isa_name, .runs_here = runs, .takes = takes_dtype,                  \
        .enter = kernel_enter, .leave = kernel_leave, .panel_bytes = kernel_panel_bytes,           \
        .pack = kernel_pack, .pool_add = kernel_pool_add, .score_scratch = kernel_score_scratch,   \
        .score_stats = kernel_score_stats, .score_columns = kernel_score_columns,                  \
        .gemm_nt = kernel_gemm_nt, .log_softmax = kernel_log_softmax, .antidiagonal_lanes = GROUP, \
        .antidiagonal_scratch = kernel_antidiagonal_scratch,                                       \
        .antidiagonal_pack = kernel_antidiagonal_pack,                                             \
        .antidiagonal_sums = kernel_antidiagonal_sums,                                             \
        .antidiagonal_shares = kernel_antidiagonal_shares,                                         \
        .attend_scratch = kernel_attend_scratch, .attend_block = kernel_attend_block               \
    }

#endif /* PBS_CPU_KERNEL_TABLE_H */
