/* SPDX-License-Identifier: Apache-2.0
 *
 * Antidiagonal scores (XAttention; PBS-Attn+ on permuted keys). Groups of t = stride rows and keys:
 *
 *   z[a, b] = scale / t * sum_{i < t} q[a t + t-1-i] . k[b t + i]
 *
 * softmax over b, then sums (or maxima) over the query groups of a block and sums over the key
 * groups of a block. Rows and keys that do not exist count as zeros; a group exists if its first
 * row does. A query group sees the key groups that start no later than its last existing row (mode
 * NONE and normalize ROW), or before the own segments of its block (all else).
 *
 * Never an (N / t)^2 matrix: a band of query groups meets one chunk of key blocks after another,
 * and keeps for each chunk its maxima, for each (key block, query group) a sum of exponentials.
 * Masses: SUM is the mean over the groups that exist, so it sums to 1 where all see a key; MAX the
 * largest share that a group gives.
 *
 * ROW on permuted keys: a segment is history (permuted) to some groups of a band and own (original
 * order) to others. The band meets history first; then each of its own segments, as chunks that
 * only the groups see whose own span it is of. They count in the total of a group and go nowhere.
 */
#include <math.h>
#include <string.h>

#include "../core/arena.h"
#include "packed.h"
#include "select_methods.h"

/* Query groups of a band, which share one pass over the keys, and key groups of a chunk: at most,
 * or those of one block. */
enum { BAND_GROUPS = 256, CHUNK_GROUPS = 64 };

typedef struct scratch {
    float *panel;     /* [lanes, t D] */
    int32_t *seen;    /* [lanes] key groups [0, seen), of which [own, seen) come apart */
    int32_t *own;     /* [lanes] */
    int32_t *visible; /* [lanes] of one chunk */
    float *max;       /* [chunks, lanes] */
    float *sum;       /* [chunks, key blocks in a chunk, lanes]; shares in the end */
    void *kernel;
} scratch;

/* A few query blocks of a strip, and the shape of their groups. */
typedef struct band {
    const pbs_strip_job *job;
    scratch s;
    const int32_t *order;  /* of history's keys; NULL: the original one */
    int split;             /* own segments come apart, in the original order */
    int32_t first, blocks; /* query blocks [first, first + blocks) */
    int32_t per_block;     /* groups in a block, B / t */
    int32_t stride, lanes;
    int32_t chunk_blocks; /* key blocks in a chunk */
} band;

/* Key blocks [first, first + blocks) as chunk `index` of a band. */
typedef struct chunk {
    int32_t index, first, blocks;
    const int32_t *order;
    int own; /* only groups with these in their own span see them */
} chunk;

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

/* Key blocks of an own segment that make a chunk. */
static int32_t own_step(const band *w, const pbs_dims *d) {
    return pbs_min_i32(w->chunk_blocks, d->segment_size / d->block_k);
}

/* Chunks that the own segments of a band make at most. */
static int32_t most_own_chunks(const band *w, const pbs_select_params *p, const pbs_dims *d) {
    if (!pbs_may_split_rows(p)) return 0;
    int32_t segments = pbs_min_i32(pbs_ceil_div(w->blocks * d->block_q, d->segment_size) + 1,
                                   pbs_ceil_div(d->max_k, d->segment_size));
    return segments * pbs_ceil_div(d->segment_size / d->block_k, own_step(w, d));
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
 * 4 L (t D + Tk + chunks + 3) bytes, and about 4 C (L + 256) in the kernel; if own segments come
 * apart, 4 L C for each of their chunks, which are few. */
static size_t cut(const pbs_select_params *p, const pbs_dims *d, const pbs_cpu_kernels *k,
                  void *memory, band *w) {
    scratch *s = &w->s;
    shape_band(p, d, k, w);
    pbs_antidiagonal_job job = kernel_job(w, p, d);
    int32_t chunks = pbs_ceil_div(d->blocks_k, w->chunk_blocks) + most_own_chunks(w, p, d);
    size_t row = (size_t)w->lanes * sizeof(float);
    pbs_arena arena = pbs_arena_at(memory);
    s->panel = (float *)pbs_arena_take(&arena, w->stride, d->head_dim, row);
    s->seen = (int32_t *)pbs_arena_take(&arena, w->lanes, 1, sizeof(int32_t));
    s->own = (int32_t *)pbs_arena_take(&arena, w->lanes, 1, sizeof(int32_t));
    s->visible = (int32_t *)pbs_arena_take(&arena, w->lanes, 1, sizeof(int32_t));
    s->max = (float *)pbs_arena_take(&arena, chunks, 1, row);
    s->sum = (float *)pbs_arena_take(&arena, chunks, w->chunk_blocks, row);
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
static pbs_rows key_rows(const band *w, const int32_t *order, int32_t n) {
    const pbs_strip_job *job = w->job;
    const pbs_dims *d = job->d;
    pbs_rows rows =
        pbs_head_rows(&job->p->k.view, job->batch, job->head / d->group, job->seq.kv_start);
    rows.index = order;
    return pbs_rows_from(rows, n * d->block_k);
}

static int32_t first_row(const band *w, int32_t a) {
    return w->first * w->job->d->block_q + a * w->stride;
}

/* Key blocks [0, n) that may leave as masses of query block m. */
static int32_t eligible_blocks(const band *w, int32_t m) {
    return pbs_eligible_blocks(w->job->p, w->job->d, w->job->seq, m);
}

/* Key blocks that its last row sees something of. */
static int32_t seen_blocks(const band *w, int32_t m) {
    const pbs_strip_job *job = w->job;
    if (m * job->d->block_q >= job->seq.q_len) return 0;
    return pbs_causal_blocks(job->seq, m, job->d->block_q, job->d->block_k);
}

/* What every query group of the band sees; lanes that are none see nothing. */
static void find_groups(const band *w) {
    const pbs_strip_job *job = w->job;
    for (int32_t a = 0; a < w->lanes; a++) {
        int32_t m = w->first + a / w->per_block, seen = 0;
        if (a < w->blocks * w->per_block)
            seen = pbs_visible_groups(job->p, job->d, job->seq, m, first_row(w, a));
        w->s.seen[a] = w->s.own[a] = seen;
        if (w->split && seen) w->s.own[a] = pbs_first_own_group(job->p, job->d, job->seq, m);
    }
}

/* Key groups [0, n) of a chunk that query group a of the band sees. */
static int32_t visible_groups(const band *w, const chunk *c, int32_t a) {
    int32_t begin = c->first * w->per_block, end = c->own ? w->s.seen[a] : w->s.own[a];
    if (c->own && w->s.own[a] > begin) return 0; /* history to this one */
    return pbs_max_i32(0, pbs_min_i32(end - begin, c->blocks * w->per_block));
}

/* All query groups against a chunk: its maxima, and a sum for each block of it. */
static void meet_chunk(const band *w, pbs_antidiagonal_job *job, const chunk *c) {
    const pbs_strip_job *strip = w->job;
    job->k = key_rows(w, c->order, c->first);
    job->k_count = strip->seq.kv_len - c->first * strip->d->block_k;
    job->key_groups = c->blocks * w->per_block;
    for (int32_t a = 0; a < w->lanes; a++) w->s.visible[a] = visible_groups(w, c, a);
    job->max = w->s.max + (int64_t)c->index * w->lanes;
    job->sum = w->s.sum + (int64_t)c->index * w->chunk_blocks * w->lanes;
    strip->k->antidiagonal_sums(job);
    float *rest = job->sum + (int64_t)c->blocks * w->lanes;
    memset(rest, 0, (size_t)(w->chunk_blocks - c->blocks) * (size_t)w->lanes * sizeof *rest);
}

/* The own segments of the band, from the first one's first block to the last causal one: a chunk is
 * of one segment, so what a group sees of it starts at its first key. Returns all chunks so far. */
static int32_t meet_own(const band *w, pbs_antidiagonal_job *job, int32_t index) {
    const pbs_dims *d = w->job->d;
    int32_t step = own_step(w, d), per_segment = d->segment_size / d->block_k;
    int32_t n = pbs_history_blocks(w->job->p, d, w->job->seq, w->first), end = 0;
    for (int32_t i = 0; i < w->blocks; i++) /* blocks that do not exist see none */
        end = pbs_max_i32(end, seen_blocks(w, w->first + i));
    while (n < end) {
        int32_t left = per_segment - n % per_segment;
        chunk c = {index++, n, pbs_min_i32(pbs_min_i32(step, left), end - n), NULL, 1};
        meet_chunk(w, job, &c);
        n += c.blocks;
    }
    return index;
}

/* All query groups against key blocks [0, cols), and against their own segments if these come
 * apart: the shares of each. */
static void meet_keys(const band *w, int32_t cols) {
    const pbs_strip_job *strip = w->job;
    pbs_antidiagonal_job job = kernel_job(w, strip->p, strip->d);
    int32_t chunks = 0;
    job.q = query_rows(w);
    job.q_count = strip->seq.q_len - first_row(w, 0);
    strip->k->antidiagonal_pack(&job);
    find_groups(w);
    for (int32_t n = 0; n < cols; n += w->chunk_blocks) {
        chunk c = {chunks++, n, pbs_min_i32(w->chunk_blocks, cols - n), w->order, 0};
        meet_chunk(w, &job, &c);
    }
    if (w->split) chunks = meet_own(w, &job, chunks);
    pbs_antidiagonal_shares shares = {
        w->lanes, chunks * w->chunk_blocks, chunks, w->chunk_blocks, w->s.max, w->s.sum};
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

static const int32_t *key_order(const pbs_strip_job *job) {
    const pbs_dims *d = job->d;
    int64_t owner = (int64_t)job->batch * d->heads_p + pbs_owner_head(d, job->head);
    return job->p->k_perm ? job->p->k_perm + owner * d->max_k : NULL;
}

/* Do keys stand where they stood? Of the whole head, for its strips to agree. */
static int is_natural(const int32_t *order, int32_t keys) {
    int32_t j = 0;
    while (j < keys && order[j] == j) j++;
    return j == keys;
}

/* A head that was not permuted is the natural order, bit for bit. */
static void look_at_order(band *w) {
    const pbs_strip_job *job = w->job;
    w->order = key_order(job);
    w->split = pbs_splits_rows(job->p) && !is_natural(w->order, job->seq.kv_len);
    if (pbs_splits_rows(job->p) && !w->split) w->order = NULL;
}

/* Key blocks that the band meets as history, or as all that counts; 0: there is none to choose. */
static int32_t blocks_to_meet(const band *w) {
    int32_t eligible = 0, seen = 0;
    for (int32_t m = w->first; m < w->first + w->blocks; m++) {
        eligible = pbs_max_i32(eligible, eligible_blocks(w, m));
        seen = pbs_max_i32(seen, seen_blocks(w, m));
    }
    return eligible == 0 || w->split || !pbs_shares_rows(w->job->p) ? eligible : seen;
}

void pbs_antidiagonal_strip(const pbs_strip_job *job) {
    int32_t end = job->row_begin + job->strip->rows;
    band w = {.job = job};
    cut(job->p, job->d, job->k, job->scratch, &w);
    look_at_order(&w);
    int32_t step = w.blocks;
    for (w.first = job->row_begin; w.first < end; w.first += step) {
        w.blocks = pbs_min_i32(step, end - w.first);
        int32_t cols = blocks_to_meet(&w);
        if (cols == 0) continue;
        meet_keys(&w, cols);
        for (int32_t m = w.first; m < w.first + w.blocks; m++)
            finish_block(&w, m, eligible_blocks(&w, m));
    }
}
