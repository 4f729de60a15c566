/* SPDX-License-Identifier: Apache-2.0
 *
 * score, alone and in one with permute: the driver. Workspace and launches; the kernels are in
 * score.cuh and score_permute.cuh.
 */
#include "../core/arena.h"
#include "cuda.h"
#include "launch.cuh"
#include "score_permute.cuh"

#include <stddef.h>

namespace pbs {

static size_t cut(score_run *run, void *workspace) {
    const pbs_dims *d = &run->d;
    pbs_arena arena = pbs_arena_at(workspace);
    const bool last_block = run->order == PBS_ORDER_LAST_BLOCK;
    const bool mean = run->order == PBS_ORDER_MEAN_QUERY;
    run->probe_rows = pbs_min_i32(last_block ? d->block_q : 1, d->max_q);
    run->padded_rows = pbs_ceil_div(run->probe_rows, TILE_COLUMNS) * TILE_COLUMNS;
    run->parts = mean || d->heads_p != d->heads_q ? 3 : 1;
    run->chunks = pbs_min_i32(
        pbs_ceil_div(pbs_complete_keys(d->max_k, d->segment_size), CHUNK_KEYS), MOST_CHUNKS);
    run->slabs = mean ? pbs_ceil_div(d->max_q, MEAN_ROWS) : 0;
    if (run->order == PBS_ORDER_RANDOM || run->padded_rows == 0 || run->chunks == 0) return 0;
    const int64_t heads = static_cast<int64_t>(d->batch) * d->heads_p;
    const int64_t heads_q = static_cast<int64_t>(d->batch) * d->heads_q;
    const size_t rows = static_cast<size_t>(run->padded_rows);
    const size_t part = static_cast<size_t>(probe_part_pieces(*run)) * sizeof(uint4);
    run->probe = static_cast<uint4 *>(pbs_arena_take(&arena, heads, run->parts, part));
    run->unit = static_cast<float *>(pbs_arena_take(&arena, heads, 1, rows * sizeof(float)));
    run->stats =
        static_cast<float2 *>(pbs_arena_take(&arena, heads, run->chunks, rows * sizeof(float2)));
    run->mean = static_cast<float *>(pbs_arena_take(
        &arena, heads_q, run->slabs, static_cast<size_t>(d->head_dim) * sizeof(float)));
    return pbs_arena_bytes(&arena);
}

static score_run run_of(const pbs_score_params *p, const pbs_dims *d) {
    score_run run = {};
    run.q = p->q;
    run.k = p->k.view;
    run.d = *d;
    run.scale_log2 = p->softmax_scale * PBS_LOG2_E;
    run.order = p->order;
    run.seed = p->seed;
    run.score = p->score;
    return run;
}

static size_t row_bytes(const pbs_dims &d) {
    return static_cast<size_t>(strips_of(d.head_dim)) * STRIP * sizeof(uint16_t);
}

/* The first pass: row max and row sum of every probe row, chunk by chunk. */
template <class T> static pbs_status score_rows(const score_run &run, const pbs_exec &exec) {
    const pbs_dims &d = run.d;
    const int64_t heads = static_cast<int64_t>(d.batch) * d.heads_p;
    const int64_t slabs = static_cast<int64_t>(d.batch) * d.heads_q * run.slabs;
    const int64_t blocks = heads * run.chunks * pbs_ceil_div(run.padded_rows, TILE_ROWS);
    const size_t tiles = 2 * TILE_COLUMNS * row_bytes(d);
    if (run.parts == 1)
        return PBS_LAUNCH(exec, (score_stats<T, true>), blocks, SCORE_THREADS, tiles, run);
    PBS_TRY(PBS_LAUNCH(exec, (score_mean<T>), slabs, SUM_THREADS, sizeof(partial_sums), run));
    PBS_TRY(PBS_LAUNCH(exec, (score_probe<T>), heads * (run.padded_rows / BLOCK_ROWS), SUM_THREADS,
                       0, run));
    return PBS_LAUNCH(exec, (score_stats<T, false>), blocks, SCORE_THREADS, tiles, run);
}

template <class T>
static pbs_status score_by_probe(const score_run &run, const pbs_exec &exec, bool probed) {
    const int64_t heads = static_cast<int64_t>(run.d.batch) * run.d.heads_p;
    if (probed) PBS_TRY(score_rows<T>(run, exec));
    return PBS_LAUNCH(exec, (score_columns<T>), heads * pbs_ceil_div(run.d.max_k, TILE_ROWS),
                      SCORE_THREADS, offsetof(columns_plan, keys) + TILE_ROWS * row_bytes(run.d),
                      run);
}

/* Both passes and permute, the second with it. */
template <class T>
static pbs_status score_and_permute(const score_run &run, const permute_run &permute,
                                    const pbs_exec &exec, bool probed) {
    if (probed) PBS_TRY(score_rows<T>(run, exec));
    return PBS_LAUNCH(exec, (score_permute<T>), segment_blocks(permute), SUM_THREADS,
                      scored_bytes(run.d.head_dim), run, permute);
}

static pbs_status check(const pbs_score_params *p) {
    PBS_TRY(pbs_cuda_check_aligned("q", &p->q));
    return pbs_cuda_check_aligned("k", &p->k.view);
}

} // namespace pbs

size_t pbs_cuda_score_bytes(const pbs_score_params *p, const pbs_dims *d, const void *kernels) {
    (void)kernels;
    pbs::score_run run = pbs::run_of(p, d);
    return pbs::cut(&run, nullptr);
}

pbs_status pbs_cuda_score(const pbs_score_params *p, const pbs_dims *d, const void *kernels,
                          int32_t first_head) {
    (void)kernels;
    pbs::score_run run = pbs::run_of(p, d);
    run.first_head = first_head;
    if (p->order == PBS_ORDER_RANDOM) {
        const int64_t heads = static_cast<int64_t>(d->batch) * d->heads_p;
        return PBS_LAUNCH(p->exec, pbs::score_random,
                          heads * pbs_ceil_div(d->max_k, pbs::SUM_THREADS), pbs::SUM_THREADS, 0,
                          run);
    }
    PBS_TRY(pbs::check(p));
    const bool probed = pbs::cut(&run, p->workspace) > 0;
    return d->dtype == PBS_DTYPE_BF16 ? pbs::score_by_probe<pbs::bf16>(run, p->exec, probed)
                                      : pbs::score_by_probe<pbs::fp16>(run, p->exec, probed);
}

pbs_status pbs_cuda_score_permute(const pbs_score_params *p, const pbs_permute_params *permute,
                                  const pbs_dims *d, const void *kernels, int32_t first_head) {
    if (p->order == PBS_ORDER_RANDOM) { /* nothing to share */
        PBS_TRY(pbs_cuda_score(p, d, kernels, first_head));
        return pbs_cuda_permute(permute, d, kernels);
    }
    pbs::permute_run segments = {};
    pbs::score_run run = pbs::run_of(p, d);
    run.first_head = first_head;
    PBS_TRY(pbs::check(p));
    PBS_TRY(pbs::prepare(permute, d, &segments));
    const bool probed = pbs::cut(&run, p->workspace) > 0;
    PBS_TRY(d->dtype == PBS_DTYPE_BF16
                ? pbs::score_and_permute<pbs::bf16>(run, segments, p->exec, probed)
                : pbs::score_and_permute<pbs::fp16>(run, segments, p->exec, probed));
    return pbs_cuda_permute_queries(permute, d);
}
