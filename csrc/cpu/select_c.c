/* SPDX-License-Identifier: Apache-2.0
 *
 * select: pooled queries against pooled keys, c = scale * a b^T, and log softmax of a row; groups
 * of queries against groups of keys (antidiagonal scores).
 */
#include <float.h>
#include <math.h>

#include "convert.h"
#include "isa_c.h"

void pbs_gemm_nt_c(int32_t rows, int32_t cols, int32_t depth, float scale, const float *a,
                   int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < cols; j++)
            c[i * ldc + j] = scale * pbs_dot(a + i * lda, b + j * ldb, depth);
}

void pbs_log_softmax_c(float *x, int32_t n) {
    float max = -INFINITY;
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) max = fmaxf(max, x[i]);
    for (int32_t i = 0; i < n; i++) sum += (double)expf(x[i] - max);
    float log_sum = logf((float)sum);
    for (int32_t i = 0; i < n; i++) x[i] = x[i] - max - log_sum;
}

/* Row i as fp32, zeros if it does not exist. */
static void load_or_zero(const pbs_rows *rows, int32_t i, int32_t count, int32_t dim, float *to) {
    if (i < count)
        pbs_load_row(rows, i, dim, to);
    else
        memset(to, 0, (size_t)dim * sizeof *to);
}

/* One key group, then z [key_groups, lanes]. */
size_t pbs_antidiagonal_scratch_c(const pbs_antidiagonal_job *job) {
    return sizeof(float) * ((size_t)job->stride * (size_t)job->head_dim +
                            (size_t)job->key_groups * (size_t)job->lanes);
}

/* Panel: [lanes][stride D], the rows of a group last first. */
void pbs_antidiagonal_pack_c(const pbs_antidiagonal_job *job) {
    int32_t t = job->stride, dim = job->head_dim;
    float *to = job->panel;
    for (int32_t a = 0; a < job->lanes; a++)
        for (int32_t i = 0; i < t; i++, to += dim)
            load_or_zero(&job->q, a * t + t - 1 - i, job->q_count, dim, to);
}

/* One lane's column of z, of which it sees only the first ones. */
static void sum_lane(const pbs_antidiagonal_job *job, int32_t a, const float *z) {
    int32_t cols = job->per_block, seen = job->visible[a];
    float max = -FLT_MAX;
    for (int32_t b = 0; b < seen; b++)
        max = fmaxf(max, ceilf(z[(int64_t)b * job->lanes + a] * job->scale_log2));
    for (int32_t n = 0; n < job->key_groups / cols; n++) {
        float sum = 0.0f;
        for (int32_t b = n * cols; b < (n + 1) * cols && b < seen; b++)
            sum += exp2f(z[(int64_t)b * job->lanes + a] * job->scale_log2 - max);
        job->sum[(int64_t)n * job->lanes + a] = sum;
    }
    job->max[a] = max;
}

void pbs_antidiagonal_sums_c(const pbs_antidiagonal_job *job) {
    int32_t t = job->stride, dim = job->head_dim, depth = t * dim;
    float *keys = (float *)job->scratch, *z = keys + depth;
    for (int32_t b = 0; b < job->key_groups; b++) {
        for (int32_t i = 0; i < t; i++)
            load_or_zero(&job->k, b * t + i, job->k_count, dim, keys + (int64_t)i * dim);
        for (int32_t a = 0; a < job->lanes; a++)
            z[(int64_t)b * job->lanes + a] = pbs_dot(job->panel + (int64_t)a * depth, keys, depth);
    }
    for (int32_t a = 0; a < job->lanes; a++) sum_lane(job, a, z);
}

void pbs_antidiagonal_shares_c(const pbs_antidiagonal_shares *job) {
    for (int32_t a = 0; a < job->lanes; a++) {
        float most = -FLT_MAX;
        double total = 0.0;
        for (int32_t c = 0; c < job->chunks; c++)
            most = fmaxf(most, job->max[(int64_t)c * job->lanes + a]);
        for (int32_t n = 0; n < job->blocks; n++) {
            int32_t c = n / job->chunk_blocks;
            float *sum = job->sum + (int64_t)n * job->lanes + a;
            *sum *= exp2f(job->max[(int64_t)c * job->lanes + a] - most);
            total += (double)*sum;
        }
        for (int32_t n = 0; n < job->blocks && total != 0.0; n++) {
            float *sum = job->sum + (int64_t)n * job->lanes + a;
            *sum = (float)((double)*sum / total);
        }
    }
}
