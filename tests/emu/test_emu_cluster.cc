/* SPDX-License-Identifier: Apache-2.0
 *
 * Clusters of 2 with multicast: right in any order, and three injected bugs.
 */
#include "check.h"
#include "toy_cluster.cuh"

#include <vector>

using namespace toy_cluster;

namespace {

constexpr int SEEDS = 8 / EMU_TEST_THIN;
constexpr int TILES = 5;

struct tiles {
    std::vector<uint16_t> rows;
    std::vector<uint32_t> expected;

    tiles() : rows(TILES * SIDE * SIDE) {
        emu_test::rng r(3);
        for (uint16_t &x : rows) x = static_cast<uint16_t>(r.next());
        for (int block = 0; block < BLOCKS; block++)
            for (int i = 0; i < TILES * 2 * SIDE; i++) { /* half rows */
                uint32_t total = 0;
                for (int c = 0; c < HALF; c++)
                    total += rows[static_cast<size_t>(i * HALF + c)] *
                             static_cast<uint32_t>(i % 2 * HALF + c + 1);
                expected.push_back(total);
            }
    }

    template <int bug> const char *run(std::vector<uint32_t> &sums) const {
        const tensor_shape shape = {
            rows.data(),  2,           {SIDE, TILES * SIDE, 1, 1, 1}, {0, ROW_BYTES, 0},
            {SIDE, HALF}, SWIZZLE_128B};
        tensor_map map;
        CHECK(make_tensor_map(&map, shape) == PBS_OK, "%s", pbs_last_error());
        sums.assign(expected.size(), 0);
        return emu::launch({"sum_tiles", BLOCKS, THREADS, sizeof(smem_plan), BLOCKS, 0},
                           [&] { sum_tiles<bug>(map, sums.data(), TILES); });
    }
};

template <int bug> void check_caught(const char *name, int least, const char *words) {
    const tiles x;
    for (int delivery = 0; delivery < 3; delivery++) {
        int count = 0;
        std::string error;
        for (int seed = 0; seed < SEEDS; seed++) {
            std::vector<uint32_t> sums;
            pbs_emu_set(static_cast<uint64_t>(seed), delivery);
            const char *said = x.run<bug>(sums);
            if (said) error = said;
            count += said || sums != x.expected;
        }
        CHECK(count >= least / EMU_TEST_THIN, "%s, delivery %d: seen in %d of %d seeds", name,
              delivery, count, SEEDS);
        CHECK(error.empty() || error.find(words) != std::string::npos,
              "%s: \"%s\" expected, got: %s", name, words, error.c_str());
    }
}

} // namespace

EMU_TEST(sm90_cluster) {
    const tiles x;
    for (int seed = 0; seed < 60 / EMU_TEST_THIN; seed++)
        for (int delivery = 0; delivery < 3; delivery++) {
            std::vector<uint32_t> sums;
            pbs_emu_set(static_cast<uint64_t>(seed), delivery);
            CHECK_RUNS(x.run<CORRECT>(sums));
            CHECK(sums == x.expected, "seed %d, delivery %d: wrong sums", seed, delivery);
        }
}

EMU_TEST(sm90_cluster_bugs) {
    check_caught<NO_CLUSTER_BARRIER>("NO_CLUSTER_BARRIER", 4, "is not initialised");
    check_caught<EMPTY_IN_OWN_BLOCK>("EMPTY_IN_OWN_BLOCK", 4, "");
    check_caught<NO_BARRIER_BEFORE_EXIT>("NO_BARRIER_BEFORE_EXIT", 6, "has ended");
}
