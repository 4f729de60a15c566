/* SPDX-License-Identifier: Apache-2.0
 *
 * Antidiagonal scores (XAttention; PBS-Attn+ on permuted keys). Groups of t = stride rows and keys:
 *
 *   z[a, b] = scale / t * sum_{i < t} q[a t + t-1-i] . k[b t + i]
 *
 * softmax over b, then sums (or maxima) over the query groups of a block and sums over the key
 * groups of a block. Rows and keys that do not exist count as zeros; a group exists if its first
 * row does. A query group sees the key groups that start no later than its last existing row (mode
 * NONE), or before the own segments of its block (all other modes).
 *
 * Never an (N / t)^2 matrix: one key block at a time, keeping for each (query group, key block)
 * the local maximum and the local sum of exponentials. Masses: SUM is the mean over the groups that
 * exist, so it sums to 1 where all see a key; MAX the largest share that a group gives.
 */
#include <math.h>

#include "../core/arena.h"
#include "packed.h"
#include "select_methods.h"

enum { MAX_GROUP_ROWS = 128 }; /* query groups that share one pass over the keys */

typedef struct scratch {
    float *q;         /* [groups, t D] rows of a group, last first */
    float *k;         /* [B / t, t D] keys of one block */
    float *z;         /* [groups, B / t] */
    float *local_max; /* [groups, Tk] */
    float *local_sum; /* [groups, Tk] of e^(z - local_max) */
} scratch;

/* A few query blocks of a strip, and the shape of their groups. */
typedef struct band {
    const pbs_strip_job *job;
    scratch s;
    int32_t first, blocks; /* query blocks [first, first + blocks) */
    int32_t per_block;     /* groups in a block, B / t */
    int32_t stride, depth; /* t, t D */
} band;

static int32_t blocks_per_band(const pbs_select_params *p, const pbs_dims *d) {
    return pbs_max_i32(1, pbs_min_i32(PBS_STRIP_ROWS, MAX_GROUP_ROWS * p->stride / d->block_q));
}

static size_t cut(const pbs_select_params *p, const pbs_dims *d, void *memory, scratch *s) {
    int32_t per_block = d->block_q / p->stride, groups = per_block * blocks_per_band(p, d);
    size_t depth = (size_t)p->stride * (size_t)d->head_dim * sizeof(float);
    pbs_arena arena = pbs_arena_at(memory);
    s->q = (float *)pbs_arena_take(&arena, groups, 1, depth);
    s->k = (float *)pbs_arena_take(&arena, per_block, 1, depth);
    s->z = (float *)pbs_arena_take(&arena, groups, per_block, sizeof(float));
    s->local_max = (float *)pbs_arena_take(&arena, groups, d->blocks_k, sizeof(float));
    s->local_sum = (float *)pbs_arena_take(&arena, groups, d->blocks_k, sizeof(float));
    return arena.overflow ? SIZE_MAX : arena.used;
}

size_t pbs_antidiagonal_scratch(const pbs_select_params *p, const pbs_dims *d) {
    scratch s;
    return cut(p, d, NULL, &s);
}

/* Row i as fp32, zeros if it does not exist. */
static void load_or_zero(const pbs_rows *rows, int32_t i, int32_t count, int32_t dim, float *to) {
    if (i < count)
        pbs_load_row(rows, i, dim, to);
    else
        memset(to, 0, (size_t)dim * sizeof *to);
}

static void load_queries(const band *w) {
    const pbs_strip_job *job = w->job;
    const pbs_dims *d = job->d;
    pbs_rows rows = pbs_head_rows(&job->p->q, job->batch, job->head, job->seq.q_start);
    if (job->p->q_perm)
        rows.index = job->p->q_perm + ((int64_t)job->batch * d->heads_q + job->head) * d->max_q;
    float *to = w->s.q;
    for (int32_t a = 0; a < w->blocks * w->per_block; a++)
        for (int32_t i = 0; i < w->stride; i++, to += d->head_dim) {
            int32_t row = w->first * d->block_q + a * w->stride + w->stride - 1 - i;
            load_or_zero(&rows, row, job->seq.q_len, d->head_dim, to);
        }
}

static void load_keys(const band *w, int32_t n) {
    const pbs_strip_job *job = w->job;
    const pbs_dims *d = job->d;
    pbs_rows rows =
        pbs_head_rows(&job->p->k.view, job->batch, job->head / d->group, job->seq.kv_start);
    int64_t owner = (int64_t)job->batch * d->heads_p + pbs_owner_head(d, job->head);
    if (job->p->k_perm) rows.index = job->p->k_perm + owner * d->max_k;
    for (int32_t j = 0; j < d->block_k; j++)
        load_or_zero(&rows, n * d->block_k + j, job->seq.kv_len, d->head_dim,
                     w->s.k + (int64_t)j * d->head_dim);
}

static int32_t first_row(const band *w, int32_t a) {
    return w->first * w->job->d->block_q + a * w->stride;
}

/* Key groups [0, n) that query group a of the band sees. */
static int32_t visible_groups(const band *w, int32_t a) {
    const pbs_strip_job *job = w->job;
    int32_t m = w->first + a / w->per_block;
    return pbs_visible_groups(job->p, job->d, job->seq, m, first_row(w, a));
}

/* Query groups [from, groups) against key block n. */
static void meet_block(const band *w, int32_t n, int32_t from) {
    const pbs_dims *d = w->job->d;
    int32_t groups = w->blocks * w->per_block, cols = w->per_block;
    float scale = w->job->p->softmax_scale / (float)w->stride;
    load_keys(w, n);
    w->job->k->gemm_nt(groups - from, cols, w->depth, scale, w->s.q + (int64_t)from * w->depth,
                       w->depth, w->s.k, w->depth, w->s.z, cols);
    for (int32_t a = from; a < groups; a++) {
        const float *z = w->s.z + (int64_t)(a - from) * cols;
        int32_t seen = pbs_min_i32(visible_groups(w, a) - n * cols, cols);
        float max = -INFINITY, sum = 0.0f;
        for (int32_t b = 0; b < seen; b++) max = fmaxf(max, z[b]);
        for (int32_t b = 0; b < seen; b++) sum += expf(z[b] - max);
        w->s.local_max[(int64_t)a * d->blocks_k + n] = max;
        w->s.local_sum[(int64_t)a * d->blocks_k + n] = sum;
    }
}

/* Adds the shares of one query group to mass [cols]. */
static void add_shares(const band *w, int32_t a, int32_t cols, float *mass) {
    const float *local_max = w->s.local_max + (int64_t)a * w->job->d->blocks_k;
    const float *local_sum = w->s.local_sum + (int64_t)a * w->job->d->blocks_k;
    float max = -INFINITY;
    double sum = 0.0;
    if (visible_groups(w, a) == 0) return;
    for (int32_t n = 0; n < cols; n++) max = fmaxf(max, local_max[n]);
    for (int32_t n = 0; n < cols; n++)
        if (local_sum[n] != 0.0f) sum += (double)(local_sum[n] * expf(local_max[n] - max));
    for (int32_t n = 0; n < cols; n++) {
        if (local_sum[n] == 0.0f) continue; /* sees nothing of this block */
        float share = (float)((double)(local_sum[n] * expf(local_max[n] - max)) / sum);
        mass[n] = w->job->p->reduce == PBS_REDUCE_MAX ? fmaxf(mass[n], share) : mass[n] + share;
    }
}

static void finish_block(const band *w, int32_t m, int32_t cols) {
    const pbs_strip_job *job = w->job;
    float *mass = job->strip->log_mass + (m - job->row_begin) * job->strip->log_mass_stride;
    int32_t groups = 0;
    for (int32_t n = 0; n < cols; n++) mass[n] = 0.0f;
    for (int32_t i = 0; i < w->per_block; i++) {
        int32_t a = (m - w->first) * w->per_block + i;
        if (first_row(w, a) >= job->seq.q_len) break;
        groups++;
        add_shares(w, a, cols, mass);
    }
    float each = job->p->reduce == PBS_REDUCE_SUM && groups ? 1.0f / (float)groups : 1.0f;
    for (int32_t n = 0; n < cols; n++) mass[n] = logf(mass[n] * each);
}

void pbs_antidiagonal_strip(const pbs_strip_job *job) {
    const pbs_dims *d = job->d;
    int32_t step = blocks_per_band(job->p, d), end = job->row_begin + job->strip->rows;
    band w = {.job = job, .per_block = d->block_q / job->p->stride, .stride = job->p->stride};
    w.depth = w.stride * d->head_dim;
    cut(job->p, d, job->scratch, &w.s);
    for (w.first = job->row_begin; w.first < end; w.first += step) {
        w.blocks = pbs_min_i32(step, end - w.first);
        int32_t cols = 0, from = 0;
        for (int32_t i = 0; i < w.blocks; i++)
            cols = pbs_max_i32(cols, pbs_eligible_blocks(job->p, d, job->seq, w.first + i));
        if (cols == 0) continue;
        load_queries(&w);
        for (int32_t n = 0; n < cols; n++) {
            /* Eligible blocks only grow with m, up to the end of the sequence. */
            while (pbs_eligible_blocks(job->p, d, job->seq, w.first + from) <= n) from++;
            meet_block(&w, n, from * w.per_block);
        }
        for (int32_t i = 0; i < w.blocks; i++)
            finish_block(&w, w.first + i, pbs_eligible_blocks(job->p, d, job->seq, w.first + i));
    }
}
