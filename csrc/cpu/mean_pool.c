/* SPDX-License-Identifier: Apache-2.0
 *
 * Alg. 2: mean queries against mean keys, softmax over the eligible blocks, all in fp32.
 */
#include <math.h>

#include "../core/arena.h"
#include "packed.h"
#include "select_methods.h"

size_t pbs_mean_pool_scratch(const pbs_select_params *p, const pbs_dims *d,
                             const pbs_cpu_kernels *k) {
    pbs_arena arena = pbs_arena_at(NULL);
    (void)p;
    (void)k;
    pbs_arena_take(&arena, PBS_STRIP_ROWS, d->head_dim, sizeof(float));
    return arena.used;
}

/* mean [D] over the existing rows of query block m. */
static void pool_queries(const pbs_strip_job *job, int32_t m, float *mean) {
    const pbs_dims *d = job->d;
    int32_t first = m * d->block_q, count = pbs_min_i32(d->block_q, job->seq.q_len - first);
    for (int32_t i = 0; i < d->head_dim; i++) mean[i] = 0.0f;
    if (count <= 0) return;
    pbs_rows rows = pbs_head_rows(&job->p->q, job->batch, job->head, job->seq.q_start);
    if (job->p->q_perm)
        rows.index = job->p->q_perm + ((int64_t)job->batch * d->heads_q + job->head) * d->max_q;
    rows = pbs_rows_from(rows, first);
    job->k->pool_add(&rows, count, d->head_dim, mean);
    for (int32_t i = 0; i < d->head_dim; i++) mean[i] *= 1.0f / (float)count;
}

void pbs_mean_pool_strip(const pbs_strip_job *job) {
    const pbs_dims *d = job->d;
    const pbs_strip *strip = job->strip;
    float *mean = (float *)job->scratch;
    int32_t dim = d->head_dim, rows = strip->rows, cols = 0;
    for (int32_t r = 0; r < rows; r++) {
        int32_t m = job->row_begin + r;
        pool_queries(job, m, mean + (int64_t)r * dim);
        cols = pbs_max_i32(cols, pbs_eligible_blocks(job->p, d, job->seq, m));
    }
    if (cols == 0) return;
    int64_t owner = (int64_t)job->batch * d->heads_p + pbs_owner_head(d, job->head);
    const float *k_pool = job->p->k_pool + owner * d->blocks_k * dim;
    job->k->gemm_nt(rows, cols, dim, job->p->softmax_scale, mean, dim, k_pool, dim, strip->log_mass,
                    strip->log_mass_stride);
    for (int32_t r = 0; r < rows; r++) {
        float *row = strip->log_mass + r * strip->log_mass_stride;
        int32_t n = pbs_eligible_blocks(job->p, d, job->seq, job->row_begin + r);
        job->k->log_softmax(row, n);
        for (int32_t i = n; i < cols; i++) row[i] = -INFINITY;
    }
}
