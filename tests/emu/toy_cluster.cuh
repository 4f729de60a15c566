/* SPDX-License-Identifier: Apache-2.0
 *
 * The emulation's second test kernel: clusters of 2 blocks that share the loading. Each block
 * loads half of every 64 x 64 tile into both (multicast); each sums all tiles.
 *
 * 160 threads: warps 0 to 3 sum, one lane of warp 4 loads. A stage is free when the 4 warps of both
 * blocks have read it, so empty[] counts 8, and each warp tells both blocks.
 */
#ifndef EMU_TOY_CLUSTER_CUH
#define EMU_TOY_CLUSTER_CUH

#include "cuda/ptx.cuh"

namespace toy_cluster {

enum bug_name { CORRECT, NO_CLUSTER_BARRIER, EMPTY_IN_OWN_BLOCK, NO_BARRIER_BEFORE_EXIT };

using namespace pbs;

constexpr int SIDE = 64, BLOCKS = 2, HALF = SIDE / BLOCKS, WARPS = 4, STAGES = 2;
constexpr int THREADS = 32 * (WARPS + 1);
constexpr uint32_t ROW_BYTES = 2 * SIDE, TILE_BYTES = SIDE * ROW_BYTES;

struct smem_plan {
    uint16_t tile[STAGES][SIDE * SIDE];
    uint64_t full[STAGES], empty[STAGES];
};

template <int bug> PBS_DEVICE void load(smem_plan &s, const tensor_map *map, int32_t tiles) {
    const int32_t rank = static_cast<int32_t>(ptx::cluster_rank());
    for (int32_t t = 0; t < tiles; t++) {
        const int stage = t % STAGES;
        const uint32_t phase = static_cast<uint32_t>(t / STAGES % 2);
        const uint32_t full = ptx::shared_address(&s.full[stage]);
        ptx::mbarrier_wait_cluster(ptx::shared_address(&s.empty[stage]), phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, TILE_BYTES);
        ptx::tma_load_multicast(ptx::shared_address(s.tile[stage]) + rank * HALF * ROW_BYTES, map,
                                full, 3, {0, t * SIDE + rank * HALF}, ptx::policy_evict_first());
    }
}

/* sums[rank][tile][thread]: half a row, each element times its column + 1 */
template <int bug> PBS_DEVICE void sum(smem_plan &s, uint32_t *sums, int32_t tiles) {
    const uint32_t rank = ptx::cluster_rank(), thread = threadIdx.x;
    const uint32_t row = thread / 2, first = thread % 2 * HALF;
    for (int32_t t = 0; t < tiles; t++) {
        const int stage = t % STAGES;
        ptx::mbarrier_wait_cluster(ptx::shared_address(&s.full[stage]),
                                   static_cast<uint32_t>(t / STAGES % 2));
        const char *tile = reinterpret_cast<const char *>(s.tile[stage]);
        uint32_t total = 0;
        for (uint32_t c = first; c < first + HALF; c++) {
            const uint32_t at = swizzled(SWIZZLE_128B, row * ROW_BYTES + 2 * c);
            total += *reinterpret_cast<const uint16_t *>(tile + at) * (c + 1);
        }
        sums[(rank * static_cast<uint32_t>(tiles) + static_cast<uint32_t>(t)) * 32 * WARPS +
             thread] = total;
        __syncwarp();
        const uint32_t empty = ptx::shared_address(&s.empty[stage]);
        for (uint32_t other = 0; thread % 32 == 0 && other < BLOCKS; other++)
            if (bug != EMPTY_IN_OWN_BLOCK || other == rank)
                ptx::mbarrier_arrive_cluster(ptx::mapa(empty, other));
    }
}

template <int bug>
PBS_KERNEL(THREADS, 1)
sum_tiles(const __grid_constant__ tensor_map map, uint32_t *sums, int32_t tiles) {
    PBS_SHARED(smem_plan, s);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            ptx::mbarrier_init(ptx::shared_address(&s.full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&s.empty[i]),
                               WARPS * (bug == EMPTY_IN_OWN_BLOCK ? 1 : BLOCKS));
        }
        ptx::fence_mbarrier_init();
    }
    if (bug == NO_CLUSTER_BARRIER) {
        __syncthreads();
    } else {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
    if (threadIdx.x >= 32 * WARPS) {
        if (ptx::elect()) load<bug>(s, &map, tiles);
        __syncwarp();
    } else {
        sum<bug>(s, sums, tiles);
    }
    /* The other block still arrives at this one's barriers. */
    if (bug != NO_BARRIER_BEFORE_EXIT) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

} // namespace toy_cluster

#endif /* EMU_TOY_CLUSTER_CUH */
