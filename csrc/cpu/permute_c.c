/* SPDX-License-Identifier: Apache-2.0
 *
 * permute: rows, in permuted or original order, into panels and into sums.
 */
#include "convert.h"
#include "isa_c.h"

size_t pbs_panel_bytes_c(int32_t head_dim, int32_t keys) {
    return 2 * (size_t)keys * (size_t)head_dim * sizeof(float);
}

static void pack_rows(const pbs_rows *rows, const pbs_pack_job *job, float *panel) {
    for (int32_t j = 0; j < job->count; j++)
        pbs_load_row(rows, j, job->head_dim, panel + (int64_t)j * job->head_dim);
    for (int64_t i = (int64_t)job->count * job->head_dim; i < (int64_t)job->keys * job->head_dim;
         i++)
        panel[i] = 0.0f;
}

void pbs_pack_c(const pbs_pack_job *job) {
    float *panel = (float *)job->panel;
    if (job->k.base) pack_rows(&job->k, job, panel);
    if (job->v.base) pack_rows(&job->v, job, panel + (int64_t)job->keys * job->head_dim);
}

void pbs_pool_add_c(const pbs_rows *rows, int32_t count, int32_t head_dim, float *sum) {
    float row[PBS_MAX_HEAD_DIM];
    for (int32_t i = 0; i < count; i++) {
        pbs_load_row(rows, i, head_dim, row);
        for (int32_t d = 0; d < head_dim; d++) sum[d] += row[d];
    }
}
