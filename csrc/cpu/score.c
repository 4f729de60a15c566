/* SPDX-License-Identifier: Apache-2.0
 *
 * score over batches, heads and chunks of keys:
 *   probe    [b, hp]         rows as fp32 in the workspace
 *   stats    [b, hp, chunk]  row max and row sum of one chunk
 *   reduce   [b, hp]         the same over all chunks, in chunk order
 *   columns  [b, hp, chunk]  shares of the keys
 * the last three for a group of heads at a time. Chunks have one fixed size, and what is kept
 * between stats and columns is what would be computed again, so nothing depends on the number of
 * threads.
 */
#include <math.h>

#include "cpu.h"
#include "packed.h"
#include "threads.h"

enum { CHUNK_KEYS = 512, STEPS = CHUNK_KEYS / PBS_SCORE_STEP, MEAN_ROWS = 256 };

/* What stats may keep for columns, a thread's share of a cache; and how many chunks a thread gets
 * of a group of heads, so that few wait for the last one. */
enum { KEPT_PER_THREAD = 8 << 20, CHUNKS_PER_THREAD = 8 };

typedef struct score_run {
    const pbs_score_params *p;
    const pbs_dims *d;
    const pbs_cpu_kernels *k;
    int32_t first_head;
    int32_t probe_rows, chunks;
    float *probe;             /* [B, Hp, probe_rows, D] */
    float *row_max, *row_sum; /* [B, Hp, 1 + chunks, probe_rows]; slice 0 = over all chunks */
    float *step_max;          /* [B, Hp, chunks, STEPS, probe_rows] */
    int32_t first_of_group;   /* heads [first_of_group, ... + group) are under way */
    int32_t group;
    int64_t kept_chunks; /* of the group's; the others are computed twice */
    float *kept;         /* [kept_chunks, STEPS, probe_rows, PBS_SCORE_STEP] */
    char *scratch;       /* [num_threads, scratch_bytes] */
    size_t scratch_bytes;
} score_run;

/* Heads that are scored at a time: few, so that what is kept of them stays in a cache. */
static void cut_group(score_run *run, int64_t heads, size_t chunk_bytes) {
    int64_t threads = run->p->exec.num_threads, room = KEPT_PER_THREAD / (int64_t)chunk_bytes;
    int64_t group = 1;
    if (run->chunks > 0) group = (CHUNKS_PER_THREAD * threads + run->chunks - 1) / run->chunks;
    run->group = (int32_t)(group < heads ? group : heads);
    int64_t chunks = (int64_t)run->group * run->chunks;
    run->kept_chunks = chunks < threads * room ? chunks : threads * room;
}

static size_t cut(score_run *run, void *workspace) {
    const pbs_dims *d = run->d;
    pbs_arena arena = pbs_arena_at(workspace);
    int last_block = run->p->order == PBS_ORDER_LAST_BLOCK;
    run->probe_rows = last_block ? pbs_min_i32(d->block_q, d->max_q) : 1;
    run->chunks = pbs_ceil_div(pbs_complete_keys(d->max_k, d->segment_size), CHUNK_KEYS);
    if (run->p->order == PBS_ORDER_RANDOM || run->probe_rows == 0) return 0;
    int64_t heads = (int64_t)d->batch * d->heads_p;
    size_t row = (size_t)run->probe_rows * sizeof(float);
    size_t scratch = run->k->score_scratch(d->head_dim, run->probe_rows);
    run->scratch_bytes = (scratch + PBS_ALIGN - 1) / PBS_ALIGN * PBS_ALIGN;
    run->probe = (float *)pbs_arena_take(&arena, heads, d->head_dim, row);
    run->row_max = (float *)pbs_arena_take(&arena, heads, run->chunks + 1, row);
    run->row_sum = (float *)pbs_arena_take(&arena, heads, run->chunks + 1, row);
    run->step_max = (float *)pbs_arena_take(&arena, heads, (int64_t)run->chunks * STEPS, row);
    run->scratch = (char *)pbs_arena_take(&arena, run->p->exec.num_threads, 1, run->scratch_bytes);
    size_t chunk = CHUNK_KEYS * row;
    cut_group(run, heads, chunk);
    run->kept = (float *)pbs_arena_take(&arena, run->kept_chunks, 1, chunk);
    return pbs_arena_bytes(&arena);
}

size_t pbs_cpu_score_bytes(const pbs_score_params *p, const pbs_dims *d, const void *k) {
    score_run run = {.p = p, .d = d, .k = k};
    return cut(&run, NULL);
}

/* Rows of the probe of a sequence: none without rows or complete segments. */
static int32_t probe_rows_of(const score_run *run, pbs_seq s) {
    if (pbs_complete_keys(s.kv_len, run->d->segment_size) == 0) return 0;
    return pbs_min_i32(run->probe_rows, s.q_len);
}

/* sum[d] = mean of rows [0, count), summed in groups of MEAN_ROWS so that fp32 suffices. */
static void mean_of_rows(const score_run *run, const pbs_rows *rows, int32_t count, float *mean) {
    float part[PBS_MAX_HEAD_DIM];
    int32_t dim = run->d->head_dim;
    for (int32_t d = 0; d < dim; d++) mean[d] = 0.0f;
    for (int32_t first = 0; first < count; first += MEAN_ROWS) {
        pbs_rows group = pbs_rows_from(*rows, first);
        for (int32_t d = 0; d < dim; d++) part[d] = 0.0f;
        run->k->pool_add(&group, pbs_min_i32(MEAN_ROWS, count - first), dim, part);
        for (int32_t d = 0; d < dim; d++) mean[d] += part[d];
    }
    for (int32_t d = 0; d < dim; d++) mean[d] *= 1.0f / (float)count;
}

/* Adds one query head's probe rows to probe [rows, D]. */
static void add_probe(const score_run *run, int32_t b, int32_t hq, int32_t hp, pbs_seq s,
                      float *probe) {
    const pbs_dims *d = run->d;
    float row[PBS_MAX_HEAD_DIM];
    pbs_rows rows = pbs_head_rows(&run->p->q, b, hq, s.q_start);
    if (run->p->order == PBS_ORDER_MEAN_QUERY) {
        mean_of_rows(run, &rows, s.q_len, row);
        for (int32_t i = 0; i < d->head_dim; i++) probe[i] += row[i];
        return;
    }
    int32_t count = probe_rows_of(run, s), first = s.q_len - count;
    if (run->p->order == PBS_ORDER_RANDOM_QUERY)
        first = pbs_random_row(run->p->seed, run->first_head + hp, s.q_len);
    for (int32_t r = 0; r < count; r++) {
        pbs_load_row(&rows, first + r, d->head_dim, row);
        for (int32_t i = 0; i < d->head_dim; i++) probe[(int64_t)r * d->head_dim + i] += row[i];
    }
}

/* Item [b, hp]: the mean over the query heads that share the permutation. */
static void probe_item(void *context, int64_t item, int32_t slot) {
    const score_run *run = (const score_run *)context;
    const pbs_dims *d = run->d;
    int32_t b = (int32_t)(item / d->heads_p), hp = (int32_t)(item % d->heads_p);
    (void)slot;
    pbs_seq s = pbs_dims_seq(d, b);
    int64_t elements = (int64_t)probe_rows_of(run, s) * d->head_dim;
    if (elements == 0) return;
    float *probe = run->probe + item * run->probe_rows * d->head_dim;
    for (int64_t i = 0; i < elements; i++) probe[i] = 0.0f;
    int32_t heads = d->heads_q / d->heads_p; /* 1, or the group */
    for (int32_t g = 0; g < heads; g++) add_probe(run, b, hp * heads + g, hp, s, probe);
    for (int64_t i = 0; i < elements; i++) probe[i] *= 1.0f / (float)heads;
}

static pbs_score_job job_of(const score_run *run, int64_t head, int32_t chunk, int32_t slot) {
    const pbs_dims *d = run->d;
    int32_t b = (int32_t)(head / d->heads_p), hp = (int32_t)(head % d->heads_p);
    pbs_seq s = pbs_dims_seq(d, b);
    int32_t first = chunk * CHUNK_KEYS;
    int32_t left = pbs_complete_keys(s.kv_len, d->segment_size) - first;
    pbs_score_job job = {
        .probe = run->probe + head * run->probe_rows * d->head_dim,
        .probe_rows = probe_rows_of(run, s),
        .k = pbs_head_rows(&run->p->k.view, b, pbs_key_head(d, hp), s.kv_start),
        .count = pbs_max_i32(pbs_min_i32(left, CHUNK_KEYS), 0),
        .head_dim = d->head_dim,
        .scale_log2 = run->p->softmax_scale * PBS_LOG2_E,
        .score = run->p->score + head * d->max_k + first,
        .scratch = run->scratch + (size_t)slot * run->scratch_bytes,
    };
    job.step_max = run->step_max + (head * run->chunks + chunk) * STEPS * run->probe_rows;
    int64_t place = (head - run->first_of_group) * run->chunks + chunk;
    if (place < run->kept_chunks) job.kept = run->kept + place * CHUNK_KEYS * run->probe_rows;
    if (job.count) job.k = pbs_rows_from(job.k, first);
    return job;
}

/* slice 0: of all keys; 1 + chunk: of one chunk. */
static int64_t stats_at(const score_run *run, int64_t head, int32_t slice) {
    return (head * (run->chunks + 1) + slice) * run->probe_rows;
}

static void stats_item(void *context, int64_t item, int32_t slot) {
    const score_run *run = (const score_run *)context;
    int64_t head = run->first_of_group + item / run->chunks;
    int32_t chunk = (int32_t)(item % run->chunks);
    pbs_score_job job = job_of(run, head, chunk, slot);
    if (job.count == 0 || job.probe_rows == 0) return;
    job.row_max = run->row_max + stats_at(run, head, 1 + chunk);
    job.row_sum = run->row_sum + stats_at(run, head, 1 + chunk);
    run->k->score_stats(&job);
}

static void reduce_item(void *context, int64_t item, int32_t slot) {
    const score_run *run = (const score_run *)context;
    int64_t head = run->first_of_group + item;
    pbs_seq s = pbs_dims_seq(run->d, (int32_t)(head / run->d->heads_p));
    int32_t rows = probe_rows_of(run, s);
    int32_t chunks = pbs_ceil_div(pbs_complete_keys(s.kv_len, run->d->segment_size), CHUNK_KEYS);
    (void)slot;
    for (int32_t r = 0; r < rows; r++) {
        float max = -INFINITY, sum = 0.0f;
        for (int32_t c = 1; c <= chunks; c++)
            max = fmaxf(max, run->row_max[stats_at(run, head, c) + r]);
        for (int32_t c = 1; c <= chunks; c++) {
            int64_t at = stats_at(run, head, c) + r;
            sum += run->row_sum[at] * exp2f(run->row_max[at] - max);
        }
        run->row_max[stats_at(run, head, 0) + r] = max;
        run->row_sum[stats_at(run, head, 0) + r] = sum;
    }
}

static void columns_item(void *context, int64_t item, int32_t slot) {
    const score_run *run = (const score_run *)context;
    int64_t head = run->first_of_group + item / run->chunks;
    pbs_score_job job = job_of(run, head, (int32_t)(item % run->chunks), slot);
    if (job.count == 0 || job.probe_rows == 0) return;
    job.row_max = run->row_max + stats_at(run, head, 0);
    job.row_sum = run->row_sum + stats_at(run, head, 0);
    run->k->score_columns(&job);
}

/* Keys that no probe scores: the tail, sequences without rows; and the order without a probe. */
static void rest_item(void *context, int64_t item, int32_t slot) {
    const score_run *run = (const score_run *)context;
    const pbs_dims *d = run->d;
    int32_t b = (int32_t)(item / d->heads_p), hp = (int32_t)(item % d->heads_p);
    pbs_seq s = pbs_dims_seq(d, b);
    float *score = run->p->score + item * d->max_k;
    int32_t complete = pbs_complete_keys(s.kv_len, d->segment_size), scored = complete;
    (void)slot;
    if (run->p->order == PBS_ORDER_RANDOM)
        for (int32_t j = 0; j < complete; j++)
            score[j] = pbs_random_score(run->p->seed, run->first_head + hp, j);
    else if (probe_rows_of(run, s) == 0)
        scored = 0;
    for (int32_t j = scored; j < d->max_k; j++) score[j] = 0.0f;
}

pbs_status pbs_cpu_score(const pbs_score_params *p, const pbs_dims *d, const void *k,
                         int32_t first_head) {
    score_run run = {.p = p, .d = d, .k = k, .first_head = first_head};
    int64_t heads = (int64_t)d->batch * d->heads_p;
    pbs_run(&p->exec, k, heads, rest_item, &run);
    if (cut(&run, p->workspace) == 0) return PBS_OK;
    pbs_run(&p->exec, k, heads, probe_item, &run);
    for (int64_t head = 0; head < heads; head += run.group) {
        int64_t group = heads - head < run.group ? heads - head : run.group;
        run.first_of_group = (int32_t)head;
        pbs_run(&p->exec, k, group * run.chunks, stats_item, &run);
        pbs_run(&p->exec, k, group, reduce_item, &run);
        pbs_run(&p->exec, k, group * run.chunks, columns_item, &run);
    }
    return PBS_OK;
}
