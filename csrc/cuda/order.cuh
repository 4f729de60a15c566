/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which attend takes its items (query blocks): the longest walk first, so that no long
 * one is left over at the end; equally long ones by (batch, head, block), whose neighbours share K
 * and V in L2. A stable counting sort by one block of threads, without atomics: every warp counts
 * the buckets of a slab of its own, then places it.
 *
 * With more than BUCKETS lengths, lengths that differ by less than 1 / BUCKETS of the longest count
 * as equal. The order changes when a result is made, never the result.
 */
#ifndef PBS_CUDA_ORDER_CUH
#define PBS_CUDA_ORDER_CUH

#include "attend_run.cuh"
#include "kernel.cuh"

namespace pbs {

constexpr int ORDER_BUCKETS = 256;
constexpr int ORDER_THREADS = 1024, ORDER_WARPS = ORDER_THREADS / 32;

/* Key blocks that an item reads; 0 for a query block without rows. count: listed blocks of every
 * item, or NULL: they are counted here. */
PBS_DEVICE int32_t item_length(const attend_args &a, const int32_t *count, int32_t item) {
    const pbs_dims &d = a.dims;
    const attend_item i = item_at(d, item);
    const pbs_seq s = pbs_dims_seq_clamped(&d, i.b);
    const int32_t first = i.m * d.block_q;
    if (first >= s.q_len) return 0;
    const key_span span = span_of(a, s, i.m, first, d.block_q, d.block_k);
    const int32_t own = pbs_ceil_div(pbs_max_i32(span.end - span.own_begin, 0), d.block_k);
    if (a.own == PBS_OWN_ALL) return own;
    return own + (count ? count[item] : pbs_count_bits(bits_of(a, i), span.hist_end));
}

struct order_plan {
    int32_t place[ORDER_WARPS][ORDER_BUCKETS]; /* how many; then where the next one goes */
    int32_t total[ORDER_BUCKETS];
};

/* The items of a warp, taken 32 at a time. */
struct order_slab {
    int32_t begin, end;
};

PBS_DEVICE order_slab slab_of(int32_t items, int32_t warp) {
    const int32_t each = pbs_ceil_div(pbs_ceil_div(items, ORDER_WARPS), 32) * 32;
    return {pbs_min_i32(warp * each, items), pbs_min_i32((warp + 1) * each, items)};
}

/* Lanes whose item is in the same bucket; `before`: those of them below this lane. */
struct order_peers {
    uint32_t all;
    int32_t before;
};

PBS_DEVICE order_peers peers_of(int32_t bucket) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t all = __match_any_sync(0xffffffffu, bucket);
    return {all, __popc(all & ((1u << lane) - 1))};
}

/* place[warp][bucket]: items of earlier buckets, and of this one in earlier slabs. */
PBS_DEVICE void scan_buckets(order_plan &plan) {
    const int32_t bucket = static_cast<int32_t>(threadIdx.x);
    if (bucket < ORDER_BUCKETS) {
        plan.total[bucket] = 0;
        for (int32_t w = 0; w < ORDER_WARPS; w++) plan.total[bucket] += plan.place[w][bucket];
    }
    __syncthreads();
    if (bucket >= ORDER_BUCKETS) return;
    int32_t before = 0;
    for (int32_t i = 0; i < bucket; i++) before += plan.total[i];
    for (int32_t w = 0; w < ORDER_WARPS; w++) {
        const int32_t here = plan.place[w][bucket];
        plan.place[w][bucket] = before;
        before += here;
    }
}

PBS_KERNEL(ORDER_THREADS, 1)
order_items(const __grid_constant__ attend_args a, const order_args o) {
    PBS_SHARED(order_plan, plan);
    begin_kernel();
    const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32;
    int32_t *place = plan.place[thread / 32];
    const order_slab slab = slab_of(o.items, thread / 32);
    if (thread == 0) *o.taken = 0;
    for (int32_t i = lane; i < ORDER_BUCKETS; i += 32) place[i] = 0;
    __syncwarp();
    for (int32_t first = slab.begin; first < slab.end; first += 32) {
        const int32_t item = first + lane;
        int32_t bucket = ORDER_BUCKETS; /* there is no such item */
        if (item < slab.end) {
            const int64_t longest = a.dims.blocks_k;
            const int64_t shorter = longest - item_length(a, o.count, item);
            bucket = static_cast<int32_t>(shorter * ORDER_BUCKETS / (longest + 1));
            o.bucket[item] = static_cast<uint8_t>(bucket);
        }
        const order_peers peers = peers_of(bucket);
        if (bucket < ORDER_BUCKETS && peers.before == 0) place[bucket] += __popc(peers.all);
        __syncwarp();
    }
    __syncthreads();
    scan_buckets(plan);
    __syncthreads();
    for (int32_t first = slab.begin; first < slab.end; first += 32) {
        const int32_t item = first + lane;
        const int32_t bucket = item < slab.end ? o.bucket[item] : ORDER_BUCKETS;
        const order_peers peers = peers_of(bucket);
        const int32_t at = bucket < ORDER_BUCKETS ? place[bucket] + peers.before : 0;
        __syncwarp(); /* all have read it */
        if (bucket < ORDER_BUCKETS && peers.before == 0) place[bucket] += __popc(peers.all);
        if (bucket < ORDER_BUCKETS) o.order[at] = item;
        __syncwarp();
    }
}

} // namespace pbs

#endif /* PBS_CUDA_ORDER_CUH */
