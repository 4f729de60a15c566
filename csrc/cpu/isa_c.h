/* SPDX-License-Identifier: Apache-2.0
 *
 * The portable kernels: plain loops over fp32, to be read beside the paper. Every vector kernel is
 * tested against the same brute force as these.
 */
#ifndef PBS_CPU_ISA_C_H
#define PBS_CPU_ISA_C_H

#include "kernels.h"

static inline float pbs_dot(const float *a, const float *b, int32_t n) {
    float sum = 0.0f;
    for (int32_t d = 0; d < n; d++) sum += a[d] * b[d];
    return sum;
}

/* score_c.c */
size_t pbs_score_scratch_c(int32_t head_dim, int32_t probe_rows);
void pbs_score_stats_c(const pbs_score_job *job);
void pbs_score_columns_c(const pbs_score_job *job);
/* permute_c.c. A panel is fp32 K [keys, head_dim], then fp32 V [keys, head_dim]. */
size_t pbs_panel_bytes_c(int32_t head_dim, int32_t keys);
void pbs_pack_c(const pbs_pack_job *job);
void pbs_pool_add_c(const pbs_rows *rows, int32_t count, int32_t head_dim, float *sum);
/* select_c.c */
void pbs_gemm_nt_c(int32_t rows, int32_t cols, int32_t depth, float scale, const float *a,
                   int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc);
void pbs_log_softmax_c(float *x, int32_t n);
size_t pbs_antidiagonal_scratch_c(const pbs_antidiagonal_job *job);
void pbs_antidiagonal_pack_c(const pbs_antidiagonal_job *job);
void pbs_antidiagonal_sums_c(const pbs_antidiagonal_job *job);
void pbs_antidiagonal_shares_c(const pbs_antidiagonal_shares *job);
/* attend_c.c */
size_t pbs_attend_scratch_c(int32_t head_dim, int32_t block_q);
void pbs_attend_block_c(const pbs_attend_job *job);

#endif /* PBS_CPU_ISA_C_H */
