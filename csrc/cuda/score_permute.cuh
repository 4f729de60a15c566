/* SPDX-License-Identifier: Apache-2.0
 *
 * The second pass of score and permute in one launch, as prefill runs them: a block of threads
 * scores the keys of its segment, ranks them and gathers their rows. The scores never leave shared
 * memory. Results are those of score_columns and permute_segment, bit for bit.
 *
 *   segment  [b, hk, segment, hp]   as permute_segment; behind score_stats
 */
#ifndef PBS_CUDA_SCORE_PERMUTE_CUH
#define PBS_CUDA_SCORE_PERMUTE_CUH

#include "permute.cuh"
#include "score.cuh"

namespace pbs {

enum {
    KEYS_PER_WARP = 16, /* half of score_columns: the gather wants two blocks on an SM */
    SEGMENT_WARPS = SUM_THREADS / 32,
};
static_assert(KEYS_PER_WARP * SEGMENT_WARPS == TILE_ROWS, "a tile of keys is one round");

/* Tiles of keys lie where later the sums are, and behind: TILE_ROWS rows as fragments. */
struct scored_plan {
    probe_row rows[MOST_PROBE_ROWS];
    segment_plan segment;
};

PBS_DEVICE uint4 *key_fragments(scored_plan &plan) {
    return reinterpret_cast<uint4 *>(&plan.segment.k);
}

/* How much of it there is to ask for. */
static inline size_t scored_bytes(int32_t head_dim) {
    const size_t tile = static_cast<size_t>(strips_of(head_dim)) * STRIP * TILE_ROWS * 2;
    const size_t before = sizeof(scored_plan) - 2 * sizeof(partial_sums);
    return before + tile > sizeof(scored_plan) ? before + tile : sizeof(scored_plan);
}

/* Scores of the segment -> plan.segment.key. */
template <class T>
PBS_DEVICE void score_segment(const score_run &run, const segment_item &segment, const pbs_seq &s,
                              scored_plan &plan) {
    const score_item item = {segment.b, segment.hk, segment.hp, segment.head};
    const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / 32;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t rows = probe_rows_of(run, s);
    const head_rows keys = rows_of(run.k, segment.b, segment.hk, s.kv_start);
    uint4 *tile = key_fragments(plan);
    const uint4 *mine = tile + fragment_rows(warp * KEYS_PER_WARP, strips_of(run.d.head_dim));
    for (int32_t first = segment.first; first < segment.end; first += TILE_ROWS) {
        const int32_t count = pbs_min_i32(segment.end - first, TILE_ROWS);
        fragment_load(tile, keys, first, count / BLOCK_ROWS, run.d.head_dim, warp, SEGMENT_WARPS,
                      lane);
        ptx::cp_async_commit();
        if (first == segment.first)
            join_rows(run, item, pbs_complete_keys(s.kv_len, run.d.segment_size), rows, SUM_THREADS,
                      plan.rows);
        ptx::cp_async_wait<0>();
        __syncthreads(); /* the keys have arrived for all */
        float score[1][2];
        const bool works = warp * KEYS_PER_WARP < count;
        if (works) score_keys<T>(run, item, rows, mine, plan.rows, lane, score);
        uint32_t *key = plan.segment.key + (first - segment.first) + warp * KEYS_PER_WARP;
        if (works && lane % 4 == 0) {
            key[lane / 4] = descending_key(rows ? score[0][0] : 0.0f);
            key[lane / 4 + 8] = descending_key(rows ? score[0][1] : 0.0f);
        }
        __syncthreads(); /* nobody reads them any more; all scores of the tile are there */
    }
}

template <class T>
PBS_KERNEL(SUM_THREADS, 2)
score_permute(const score_run score, const permute_run run) {
    PBS_SHARED(scored_plan, shared);
    begin_kernel();
    segment_item item;
    pbs_seq s;
    if (!start_segment(run, item, s)) return;
    if (item.moves) {
        score_segment<T>(score, item, s, shared);
        order_by_key(run, item, shared.segment);
    } else {
        order_as_given(run, item, shared.segment);
    }
    gather_segment<T>(run, item, s, shared.segment);
}

} // namespace pbs

#endif /* PBS_CUDA_SCORE_PERMUTE_CUH */
