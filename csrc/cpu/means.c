/* SPDX-License-Identifier: Apache-2.0
 *
 * Panels of means: a block's mean key and mean value are packed as any key and value are, so that
 * attend reads them through the same kernels. A panel holds the means of 64 or 128 blocks, more
 * than a segment has: they are packed when all pools are there.
 */
#include "means.h"

#include "threads.h"

void pbs_mean_of_rows(const pbs_cpu_kernels *k, const pbs_rows *rows, int32_t count,
                      int32_t head_dim, float *mean) {
    for (int32_t i = 0; i < head_dim; i++) mean[i] = 0.0f;
    if (count <= 0) return;
    k->pool_add(rows, count, head_dim, mean);
    for (int32_t i = 0; i < head_dim; i++) mean[i] *= 1.0f / (float)count;
}

/* Rounded rows of one panel, K or V. */
size_t pbs_means_scratch(const pbs_dims *d) {
    if (d->dtype == PBS_DTYPE_FP32) return 0;
    return (size_t)pbs_panel_keys(d->block_k) * (size_t)d->head_dim * pbs_dtype_size(d->dtype);
}

/* `count` means of a pool in the dtype of k: the pool itself where that is fp32. */
static pbs_rows rounded(const pbs_dims *d, const float *pool, int32_t count, char *scratch) {
    pbs_rows rows = {.base = pool, .stride = d->head_dim, .dtype = d->dtype};
    if (d->dtype == PBS_DTYPE_FP32) return rows;
    pbs_store(scratch, d->dtype, count * d->head_dim, pool);
    rows.base = scratch;
    return rows;
}

/* Item [b, head of means, panel]. */
static void means_item(void *context, int64_t item, int32_t slot) {
    const pbs_means_run *run = (const pbs_means_run *)context;
    const pbs_dims *d = run->d;
    const pbs_packed *packed = run->packed;
    int64_t head = item / packed->mean_panels, panel = item % packed->mean_panels;
    int32_t keys = packed->panel_keys, first = (int32_t)panel * keys;
    int32_t whole = pbs_dims_seq(d, (int32_t)(head / packed->mean_heads)).kv_len / d->block_k;
    if (first >= whole) return;
    int64_t at = (head * (run->pool_heads / packed->mean_heads) * d->blocks_k + first) *
                 (int64_t)d->head_dim;
    char *scratch = run->scratch + (size_t)slot * run->scratch_bytes;
    pbs_pack_job job = {
        .count = pbs_min_i32(keys, whole - first),
        .keys = keys,
        .head_dim = d->head_dim,
        .panel = pbs_mean_panels(packed, head) + panel * packed->panel_bytes,
    };
    job.k = rounded(d, run->k_pool + at, job.count, scratch);
    job.v.dtype = d->dtype; /* no base: not packed yet */
    run->k->pack(&job);
    job.v = rounded(d, run->v_pool + at, job.count, scratch);
    job.k.base = NULL;
    run->k->pack(&job);
}

void pbs_pack_means(const pbs_exec *exec, pbs_means_run *run) {
    int64_t heads = (int64_t)run->d->batch * run->packed->mean_heads;
    pbs_run(exec, run->k, heads * run->packed->mean_panels, means_item, run);
}
