/* SPDX-License-Identifier: Apache-2.0
 *
 * The order in which threads and blocks run: the seed's choice, the same each time, and any that a
 * device may take.
 */
#include "check.h"
#include "emu.h"

#include <algorithm>
#include <set>
#include <string.h>
#include <thread>
#include <vector>

namespace {

constexpr int SEEDS = 20;

/* Who passes each of 50 points, one after the other: block * 1000 + thread. */
std::vector<int> order(uint64_t seed, int64_t blocks, int together) {
    std::vector<int> passed;
    pbs_emu_set(seed, emu::LAZY);
    CHECK_RUNS(emu::launch({"order", blocks, 128, 0, 1, together}, [&] {
        for (int i = 0; i < 50; i++) {
            passed.push_back(static_cast<int>(blockIdx.x * 1000 + threadIdx.x));
            __syncwarp();
        }
    }));
    return passed;
}

/* How far one warp is before another, in points, at most. */
int farthest(const std::vector<int> &passed) {
    int count[4] = {}, most = 0;
    for (const int who : passed) {
        count[who / 32]++;
        for (const int other : count) most = std::max(most, (count[who / 32] - other) / 32);
    }
    return most;
}

} // namespace

EMU_TEST(order_of_threads) {
    std::set<std::vector<int>> orders;
    std::set<int> first;
    int most = 0, least = 50;
    for (int seed = 0; seed < SEEDS; seed++) {
        const std::vector<int> passed = order(static_cast<uint64_t>(seed), 1, 1);
        CHECK(passed.size() == 128 * 50, "%zu points", passed.size());
        CHECK(passed == order(static_cast<uint64_t>(seed), 1, 1), "seed %d: not the same", seed);
        orders.insert(passed);
        first.insert(passed[0]);
        most = std::max(most, farthest(passed));
        least = std::min(least, farthest(passed));
    }
    CHECK(orders.size() == SEEDS, "%zu orders of %d seeds", orders.size(), SEEDS);
    CHECK(first.size() > 4, "%zu threads are first", first.size());
    CHECK(most == 50 && least < 40, "one warp runs ahead by %d points, and by %d", most, least);
}

EMU_TEST(order_of_blocks) {
    std::set<int> first;
    for (int seed = 0; seed < SEEDS; seed++) {
        const std::vector<int> apart = order(static_cast<uint64_t>(seed), 7, 1);
        int changes = 0;
        for (size_t i = 1; i < apart.size(); i++) changes += apart[i] / 1000 != apart[i - 1] / 1000;
        CHECK(changes == 6, "seed %d: %d changes of the block", seed, changes);
        first.insert(apart[0] / 1000);
        const std::vector<int> mixed = order(static_cast<uint64_t>(seed), 7, 3);
        CHECK(mixed.size() == 7 * 128 * 50, "%zu points", mixed.size());
        changes = 0;
        for (size_t i = 1; i < mixed.size(); i++) changes += mixed[i] / 1000 != mixed[i - 1] / 1000;
        CHECK(changes > 6, "seed %d: blocks do not run together", seed);
    }
    CHECK(first == (std::set<int>{0, 6}), "blocks run upwards or downwards");
}

/* Blocks that run together have their own shared memory and barriers. */
EMU_TEST(blocks_together) {
    for (int seed = 0; seed < SEEDS; seed++) {
        int wrong = 0;
        pbs_emu_set(static_cast<uint64_t>(seed), emu::LAZY);
        CHECK_RUNS(emu::launch({"test", 10, 96, 400, 1, 3}, [&] {
            unsigned *shared = static_cast<unsigned *>(emu::shared_memory(400));
            wrong += shared[threadIdx.x] != 0xFFFDFFFDu; /* fresh */
            shared[threadIdx.x] = blockIdx.x;
            for (int i = 0; i < 5; i++) wrong += __syncthreads_count(1) != 96;
            wrong += shared[95 - threadIdx.x] != blockIdx.x;
        }));
        CHECK(wrong == 0, "seed %d: %d wrong", seed, wrong);
    }
}

/* A launch that may overtake the one before it: every thread waits, or it is a fault. */
EMU_TEST(launches_that_overtake) {
    const int64_t before = pbs_emu_launches();
    CHECK_RUNS(emu::launch({"test", 3, 64, 0, 1, 0, true}, [&] { emu::wait_for_launches(); }));
    const char *error = emu::launch({"test", 3, 64, 0, 1, 0, true}, [&] {
        if (blockIdx.x != 1 || threadIdx.x != 7) emu::wait_for_launches();
    });
    CHECK(error && strstr(error, "block 1, thread 7") && strstr(error, "griddepcontrol.wait"),
          "\"%s\"", error ? error : "no error");
    CHECK(pbs_emu_launches() == before + 1, "launches that came to an end");
}

/* Each OS thread has a machine of its own. */
EMU_TEST(two_launches_at_once) {
    std::vector<int> sums(2);
    const auto launches = [&](size_t i) {
        for (int n = 0; n < 20; n++)
            if (emu::launch("test", 4, 128, 0, [&] {
                    const int sum = __shfl_xor_sync(0xffffffffu, 1, 1) + __syncthreads_count(1);
                    if (threadIdx.x == 0) sums[i] += sum;
                }))
                sums[i] = -1000000;
    };
    std::thread other(launches, 1);
    launches(0);
    other.join();
    CHECK(sums[0] == 80 * 129 && sums[1] == 80 * 129, "%d %d", sums[0], sums[1]);
}
