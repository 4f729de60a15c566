/* SPDX-License-Identifier: Apache-2.0
 *
 * score, paper eq. 7: s_j = mean over probe rows of softmax_j(scale * q_r . k_j), in two passes.
 */
#include "convert.h"
#include "isa_c.h"

#include <math.h>

size_t pbs_score_scratch_c(int32_t head_dim, int32_t probe_rows) {
    (void)probe_rows;
    return (size_t)head_dim * sizeof(float); /* one key in fp32 */
}

/* row_max, row_sum: of 2^(s - row_max) over this chunk, s in log2 units. */
void pbs_score_stats_c(const pbs_score_job *job) {
    float *key = (float *)job->scratch;
    for (int32_t r = 0; r < job->probe_rows; r++) {
        job->row_max[r] = -INFINITY;
        job->row_sum[r] = 0.0f;
    }
    for (int32_t j = 0; j < job->count; j++) {
        pbs_load_row(&job->k, j, job->head_dim, key);
        for (int32_t r = 0; r < job->probe_rows; r++) {
            const float *query = job->probe + (int64_t)r * job->head_dim;
            float s = pbs_dot(query, key, job->head_dim) * job->scale_log2;
            if (s > job->row_max[r]) {
                job->row_sum[r] *= exp2f(job->row_max[r] - s);
                job->row_max[r] = s;
            }
            job->row_sum[r] += exp2f(s - job->row_max[r]);
        }
    }
}

/* row_max, row_sum: of all keys. */
void pbs_score_columns_c(const pbs_score_job *job) {
    float *key = (float *)job->scratch;
    for (int32_t j = 0; j < job->count; j++) {
        float share = 0.0f;
        pbs_load_row(&job->k, j, job->head_dim, key);
        for (int32_t r = 0; r < job->probe_rows; r++) {
            const float *query = job->probe + (int64_t)r * job->head_dim;
            float s = pbs_dot(query, key, job->head_dim) * job->scale_log2;
            share += exp2f(s - job->row_max[r]) / job->row_sum[r];
        }
        job->score[j] = share / (float)job->probe_rows;
    }
}
