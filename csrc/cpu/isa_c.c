/* SPDX-License-Identifier: Apache-2.0 */
#include "isa_c.h"
#include "state.h"

static int runs_everywhere(void) { return 1; }

static int takes_all(pbs_dtype dtype) { return dtype >= PBS_DTYPE_FP32 && dtype <= PBS_DTYPE_BF16; }

extern const pbs_cpu_kernels pbs_kernels_c;

const pbs_cpu_kernels pbs_kernels_c = {
    .isa = PBS_ISA_C,
    .name = "c",
    .runs_here = runs_everywhere,
    .takes = takes_all,
    .enter = pbs_enter_mxcsr,
    .leave = pbs_leave_mxcsr,
    .panel_bytes = pbs_panel_bytes_c,
    .pack = pbs_pack_c,
    .pool_add = pbs_pool_add_c,
    .score_scratch = pbs_score_scratch_c,
    .score_stats = pbs_score_stats_c,
    .score_columns = pbs_score_columns_c,
    .gemm_nt = pbs_gemm_nt_c,
    .log_softmax = pbs_log_softmax_c,
    .antidiagonal_lanes = 1,
    .antidiagonal_scratch = pbs_antidiagonal_scratch_c,
    .antidiagonal_pack = pbs_antidiagonal_pack_c,
    .antidiagonal_sums = pbs_antidiagonal_sums_c,
    .antidiagonal_shares = pbs_antidiagonal_shares_c,
    .attend_scratch = pbs_attend_scratch_c,
    .attend_block = pbs_attend_block_c,
};
