/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which attend takes its items (query blocks): the longest walk first, so that no long
 * one is left over at the end; equally long ones by (batch, head, block), whose neighbours share K
 * and V in L2. A stable counting sort in two launches, without atomics:
 *
 *   order_count   length of every item -> its bucket; how many a group has of each bucket
 *   order_place   place = items of earlier buckets + of its own bucket before it
 *
 * With more than BUCKETS lengths, lengths that differ by less than 1 / BUCKETS of the longest count
 * as equal. The order changes when a result is made, never the result.
 */
#ifndef PBS_CUDA_ORDER_CUH
#define PBS_CUDA_ORDER_CUH

#include "attend_run.cuh"

namespace pbs {

constexpr int ORDER_BUCKETS = 256;
constexpr int ORDER_THREADS = ORDER_BUCKETS; /* a thread is an item of the group, and a bucket */

static inline int32_t order_groups(int32_t items) { return pbs_ceil_div(items, ORDER_THREADS); }

/* Key blocks that an item reads; 0 for a query block without rows. */
PBS_DEVICE int32_t item_length(const attend_args &a, int32_t item) {
    const pbs_dims &d = a.dims;
    const attend_item i = item_at(d, item);
    const pbs_seq s = pbs_dims_seq_clamped(&d, i.b);
    const int32_t first = i.m * d.block_q;
    if (first >= s.q_len) return 0;
    const key_span span = span_of(a, s, i.m, first, d.block_q, d.block_k);
    int32_t length = pbs_ceil_div(pbs_max_i32(span.end - span.own_begin, 0), d.block_k);
    if (a.own == PBS_OWN_ALL) return length;
    return length + pbs_count_bits(bits_of(a, i), span.hist_end);
}

struct order_plan {
    int32_t bucket[ORDER_THREADS]; /* of the group's items; BUCKETS = there is no such item */
    int32_t start[ORDER_BUCKETS];
};

PBS_KERNEL(ORDER_THREADS, 1)
order_count(const __grid_constant__ attend_args a, order_args o) {
    PBS_SHARED(order_plan, plan);
    const int32_t thread = threadIdx.x, item = blockIdx.x * ORDER_THREADS + thread;
    int32_t bucket = ORDER_BUCKETS;
    if (item < o.items) {
        const int64_t longest = a.dims.blocks_k, shorter = longest - item_length(a, item);
        bucket = static_cast<int32_t>(shorter * ORDER_BUCKETS / (longest + 1));
        o.bucket[item] = static_cast<uint8_t>(bucket);
    }
    plan.bucket[thread] = bucket;
    __syncthreads();
    int32_t count = 0;
    for (int32_t i = 0; i < ORDER_THREADS; i++) count += plan.bucket[i] == thread;
    o.count[static_cast<int64_t>(blockIdx.x) * ORDER_BUCKETS + thread] = count;
}

PBS_KERNEL(ORDER_THREADS, 1) order_place(order_args o) {
    PBS_SHARED(order_plan, plan);
    const int32_t thread = threadIdx.x, group = blockIdx.x, groups = gridDim.x;
    const int32_t item = group * ORDER_THREADS + thread;
    if (item == 0) *o.taken = 0;
    int32_t before = 0, total = 0; /* items of bucket `thread`: in earlier groups, in all */
    for (int32_t g = 0; g < groups; g++) {
        if (g == group) before = total;
        total += o.count[static_cast<int64_t>(g) * ORDER_BUCKETS + thread];
    }
    plan.bucket[thread] = item < o.items ? o.bucket[item] : ORDER_BUCKETS;
    plan.start[thread] = total;
    __syncthreads();
    int32_t start = before;
    for (int32_t i = 0; i < thread; i++) start += plan.start[i];
    __syncthreads();
    plan.start[thread] = start;
    __syncthreads();
    if (item >= o.items) return;
    const int32_t bucket = plan.bucket[thread];
    int32_t place = plan.start[bucket];
    for (int32_t i = 0; i < thread; i++) place += plan.bucket[i] == bucket;
    o.order[place] = item;
}

} // namespace pbs

#endif /* PBS_CUDA_ORDER_CUH */
