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
 * Never an (N / t)^2 matrix: a band of query groups meets one chunk of key blocks after another,
 * and keeps for each chunk its maxima, for each (key block, query group) a sum of exponentials.
 * Masses: SUM is the mean over the groups that exist, so it sums to 1 where all see a key; MAX the
 * largest share that a group gives.
 */
#include <math.h>

#include "../core/arena.h"
#include "packed.h"
#include "select_methods.h"

/* Query groups of a band, which share one pass over the keys, and key groups of a chunk: at most,
 * or those of one block. */
enum { BAND_GROUPS = 256, CHUNK_GROUPS = 64 };

typedef struct scratch {
    float *panel;     /* [lanes, t D] */
    int32_t *visible; /* [lanes] */
    float *max;       /* [chunks, lanes] */
    float *sum;       /* [Tk, lanes]; shares in the end */
    void *kernel;
} scratch;

/* A few query blocks of a strip, and the shape of their groups. */
typedef struct band {
    const pbs_strip_job *job;
    scratch s;
    int32_t first, blocks; /* query blocks [first, first + blocks) */
    int32_t per_block;     /* groups in a block, B / t */
    int32_t stride, lanes;
    int32_t chunk_blocks; /* key blocks in a chunk */
} band;

/* At most `groups` groups, at most `blocks` blocks, at least one block. */
static int32_t blocks_of_groups(int32_t groups, int32_t blocks, int32_t per_block) {
    return pbs_max_i32(1, pbs_min_i32(groups / per_block, blocks));
}

static void shape_band(const pbs_select_params *p, const pbs_dims *d, const pbs_cpu_kernels *k,
                       band *w) {
    int32_t pad = k->antidiagonal_lanes;
    w->stride = p->stride;
    w->per_block = d->block_q / p->stride;
    w->blocks =
        blocks_of_groups(BAND_GROUPS, pbs_min_i32(PBS_STRIP_ROWS, d->blocks_q), w->per_block);
    w->lanes = pbs_ceil_div(w->blocks * w->per_block, pad) * pad;
    w->chunk_blocks = blocks_of_groups(CHUNK_GROUPS, d->blocks_k, w->per_block);
}

static pbs_antidiagonal_job kernel_job(const band *w, const pbs_select_params *p,
                                       const pbs_dims *d) {
    pbs_antidiagonal_job job = {
        .head_dim = d->head_dim,
        .stride = w->stride,
        .lanes = w->lanes,
        .key_groups = w->chunk_blocks * w->per_block,
        .per_block = w->per_block,
        .scale_log2 = p->softmax_scale * PBS_LOG2_E / (float)w->stride,
        .visible = w->s.visible,
        .panel = w->s.panel,
        .scratch = w->s.kernel,
    };
    return job;
}

/* With L = lanes <= max(256, B / t) + padding, C = key groups of a chunk <= max(64, B / t):
 * 4 L (t D + Tk + chunks + 1) bytes, and about 4 C (L + 256) in the kernel. */
static size_t cut(const pbs_select_params *p, const pbs_dims *d, const pbs_cpu_kernels *k,
                  void *memory, band *w) {
    scratch *s = &w->s;
    shape_band(p, d, k, w);
    pbs_antidiagonal_job job = kernel_job(w, p, d);
    int32_t chunks = pbs_ceil_div(d->blocks_k, w->chunk_blocks);
    size_t row = (size_t)w->lanes * sizeof(float);
    pbs_arena arena = pbs_arena_at(memory);
    s->panel = (float *)pbs_arena_take(&arena, w->stride, d->head_dim, row);
    s->visible = (int32_t *)pbs_arena_take(&arena, w->lanes, 1, sizeof(int32_t));
    s->max = (float *)pbs_arena_take(&arena, chunks, 1, row);
    s->sum = (float *)pbs_arena_take(&arena, d->blocks_k, 1, row);
    s->kernel = pbs_arena_take(&arena, 1, 1, k->antidiagonal_scratch(&job));
    return arena.overflow ? SIZE_MAX : arena.used;
}

size_t pbs_antidiagonal_scratch(const pbs_select_params *p, const pbs_dims *d,
                                const pbs_cpu_kernels *k) {
    band w = {.job = NULL};
    return cut(p, d, k, NULL, &w);
}

static pbs_rows query_rows(const band *w) {
    const pbs_strip_job *job = w->job;
    const pbs_dims *d = job->d;
    pbs_rows rows = pbs_head_rows(&job->p->q, job->batch, job->head, job->seq.q_start);
    if (job->p->q_perm)
        rows.index = job->p->q_perm + ((int64_t)job->batch * d->heads_q + job->head) * d->max_q;
    return pbs_rows_from(rows, w->first * d->block_q);
}

/* Keys from block n on. */
static pbs_rows key_rows(const band *w, int32_t n) {
    const pbs_strip_job *job = w->job;
    const pbs_dims *d = job->d;
    pbs_rows rows =
        pbs_head_rows(&job->p->k.view, job->batch, job->head / d->group, job->seq.kv_start);
    int64_t owner = (int64_t)job->batch * d->heads_p + pbs_owner_head(d, job->head);
    if (job->p->k_perm) rows.index = job->p->k_perm + owner * d->max_k;
    return pbs_rows_from(rows, n * d->block_k);
}

static int32_t first_row(const band *w, int32_t a) {
    return w->first * w->job->d->block_q + a * w->stride;
}

/* Key groups [0, n) that query group a of the band sees. */
static int32_t visible_groups(const band *w, int32_t a) {
    const pbs_strip_job *job = w->job;
    int32_t m = w->first + a / w->per_block;
    if (a >= w->blocks * w->per_block) return 0; /* padding */
    return pbs_visible_groups(job->p, job->d, job->seq, m, first_row(w, a));
}

/* All query groups against key blocks [0, cols): the shares of each. */
static void meet_keys(const band *w, int32_t cols) {
    const pbs_strip_job *strip = w->job;
    const pbs_dims *d = strip->d;
    pbs_antidiagonal_job job = kernel_job(w, strip->p, d);
    pbs_antidiagonal_shares shares = {w->lanes, cols, 0, w->chunk_blocks, w->s.max, w->s.sum};
    job.q = query_rows(w);
    job.q_count = strip->seq.q_len - first_row(w, 0);
    strip->k->antidiagonal_pack(&job);
    for (int32_t n = 0; n < cols; n += w->chunk_blocks, shares.chunks++) {
        job.k = key_rows(w, n);
        job.k_count = strip->seq.kv_len - n * d->block_k;
        job.key_groups = pbs_min_i32(w->chunk_blocks, cols - n) * w->per_block;
        for (int32_t a = 0; a < w->lanes; a++)
            w->s.visible[a] = pbs_max_i32(
                0, pbs_min_i32(visible_groups(w, a) - n * w->per_block, job.key_groups));
        job.max = w->s.max + (int64_t)shares.chunks * w->lanes;
        job.sum = w->s.sum + (int64_t)n * w->lanes;
        strip->k->antidiagonal_sums(&job);
    }
    strip->k->antidiagonal_shares(&shares);
}

/* Sum or maximum of share [groups]; NaN if one is. */
static float reduce(pbs_reduce how, const float *share, int32_t groups) {
    float sum = 0.0f, max = 0.0f;
    for (int32_t a = 0; a < groups; a++) {
        sum += share[a];
        if (share[a] > max) max = share[a];
    }
    return how == PBS_REDUCE_MAX && sum == sum ? max : sum;
}

static void finish_block(const band *w, int32_t m, int32_t cols) {
    const pbs_strip_job *job = w->job;
    float *mass = job->strip->log_mass + (m - job->row_begin) * job->strip->log_mass_stride;
    int32_t a = (m - w->first) * w->per_block, left = job->seq.q_len - m * job->d->block_q;
    int32_t groups = pbs_min_i32(w->per_block, pbs_ceil_div(pbs_max_i32(left, 0), w->stride));
    float each = job->p->reduce == PBS_REDUCE_SUM && groups ? 1.0f / (float)groups : 1.0f;
    for (int32_t n = 0; n < cols; n++) {
        const float *share = w->s.sum + (int64_t)n * w->lanes + a;
        mass[n] = logf(reduce(job->p->reduce, share, groups) * each);
    }
}

void pbs_antidiagonal_strip(const pbs_strip_job *job) {
    int32_t end = job->row_begin + job->strip->rows;
    band w = {.job = job};
    cut(job->p, job->d, job->k, job->scratch, &w);
    int32_t step = w.blocks;
    for (w.first = job->row_begin; w.first < end; w.first += step) {
        w.blocks = pbs_min_i32(step, end - w.first);
        int32_t cols = 0;
        for (int32_t i = 0; i < w.blocks; i++)
            cols = pbs_max_i32(cols, pbs_eligible_blocks(job->p, job->d, job->seq, w.first + i));
        if (cols == 0) continue;
        meet_keys(&w, cols);
        for (int32_t i = 0; i < w.blocks; i++)
            finish_block(&w, w.first + i,
                         pbs_eligible_blocks(job->p, job->d, job->seq, w.first + i));
    }
}
