/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which attend takes its query blocks: every item once, longer walks first, equal ones
 * as they stand; lengths counted once more, key by key.
 */
#include "check.h"

#include "cuda/order.cuh"

#include <algorithm>
#include <vector>

namespace {

using emu_test::rng;

struct problem {
    pbs::attend_args args = {};
    std::vector<uint32_t> bits;
    std::vector<int32_t> q_len, kv_len;
    int32_t items = 0;
};

/* Three sequences of different lengths, the second without rows. */
void make(problem &p, pbs_own own, int32_t heads, int32_t seqlen, int32_t block, uint64_t seed) {
    rng r(seed);
    pbs_dims &d = p.args.dims;
    d.batch = 3;
    d.heads_q = d.heads_k = d.heads_p = heads;
    d.group = 1;
    d.seqlen_q = d.seqlen_k = d.max_q = d.max_k = seqlen;
    d.block_q = d.block_k = block;
    d.segment_size = 2 * block;
    d.blocks_q = d.blocks_k = pbs_ceil_div(seqlen, block);
    d.words = pbs_ceil_div(d.blocks_k, 32);
    p.q_len = {seqlen, 0, seqlen / 2};
    p.kv_len = {seqlen, seqlen, seqlen - 7};
    d.geometry.q_len = p.q_len.data();
    d.geometry.kv_len = p.kv_len.data();
    p.args.own = own;
    p.args.heads_sel = heads;
    p.items = d.batch * heads * d.blocks_q;
    p.bits.resize(static_cast<size_t>(p.items) * static_cast<size_t>(d.words));
    for (uint32_t &word : p.bits) word = r.next() & r.next();
    p.args.bits = p.bits.data();
}

/* Key blocks in which some key is read by some row of the item. */
struct walk {
    int32_t own, listed;
};

walk walk_of(const problem &p, int32_t item) {
    const pbs_dims &d = p.args.dims;
    const int32_t m = item % d.blocks_q, b = item / d.blocks_q / d.heads_q;
    const int32_t offset = p.kv_len[b] - p.q_len[b], first = m * d.block_q;
    const int32_t rows = std::min(first + d.block_q, p.q_len[b]);
    if (first >= rows) return {0, 0};
    const int32_t own = p.args.own == PBS_OWN_ALL
                            ? 0
                            : (offset + first) / d.segment_size * d.segment_size / d.block_k;
    walk found = {0, 0};
    for (int32_t n = 0; n * d.block_k < offset + rows; n++) {
        const uint32_t word = p.bits[static_cast<size_t>(item * d.words + n / 32)];
        found.own += n >= own && p.args.own != PBS_OWN_NONE;
        found.listed += n < own && (word >> n % 32 & 1);
    }
    return found;
}

void check_order(problem &p, bool counted) {
    const size_t items = static_cast<size_t>(p.items);
    std::vector<uint8_t> bucket(items, 0xff);
    std::vector<int32_t> order(items, -1), want(items), count(items);
    int32_t taken = -1;
    for (int32_t i = 0; i < p.items; i++) count[static_cast<size_t>(i)] = walk_of(p, i).listed;
    const pbs::order_args o = {p.items, counted ? count.data() : nullptr, bucket.data(),
                               order.data(), &taken};
    CHECK_RUNS(emu::launch("order_items", 1, pbs::ORDER_THREADS, sizeof(pbs::order_plan),
                           [&] { pbs::order_items(p.args, o); }));
    CHECK(taken == 0, "%d row blocks are gone before the first", taken);
    std::vector<int32_t> key(order.size());
    const int64_t longest = p.args.dims.blocks_k;
    for (int32_t i = 0; i < p.items; i++) {
        const walk w = walk_of(p, i);
        const int64_t shorter = longest - w.own - w.listed;
        want[static_cast<size_t>(i)] = i;
        key[static_cast<size_t>(i)] = static_cast<int32_t>(
            longest < pbs::ORDER_BUCKETS ? shorter : shorter * pbs::ORDER_BUCKETS / (longest + 1));
    }
    std::stable_sort(want.begin(), want.end(), [&](int32_t i, int32_t j) {
        return key[static_cast<size_t>(i)] < key[static_cast<size_t>(j)];
    });
    CHECK(order == want, "own %d, %d items, up to %d blocks", static_cast<int>(p.args.own), p.items,
          p.args.dims.blocks_k);
}

} // namespace

EMU_TEST(order_of_items) {
    for (int own : {PBS_OWN_SEGMENT, PBS_OWN_NONE, PBS_OWN_ALL})
        for (int32_t seqlen : {1, 128, 1000, 3000, 20000}) {
            problem p;
            make(p, static_cast<pbs_own>(own), seqlen > 9000 ? 1 : 5, seqlen, 64,
                 static_cast<uint64_t>(seqlen + own));
            for (bool counted : {false, true}) check_order(p, counted);
        }
}
