/* SPDX-License-Identifier: Apache-2.0
 *
 * What the emulated sm_90a refuses: each misuse ends the launch with its own words.
 */
#include "check.h"
#include "cuda/ptx.cuh"

#include <vector>

using namespace pbs;

namespace {

struct plan {
    alignas(1024) uint16_t tile[64 * 64];
    uint16_t other[64 * 64];
    uint64_t barrier, second;
};

/* One thread per lane of the launch runs f(plan). */
template <class F> const char *run(int threads, F &&f, int cluster = 1) {
    pbs_emu_set(0, emu::LAZY);
    return emu::launch({"misuse", cluster, threads, sizeof(plan), cluster, 0}, [&] {
        PBS_SHARED(plan, s);
        f(s);
    });
}

uint32_t at(const void *pointer) { return ptx::shared_address(pointer); }

/* 64 x 64, all of it the box. */
struct matrix {
    std::vector<uint16_t> words;
    tensor_map map;

    explicit matrix(int rows = 64) : words(64 * 64, 0x3f80) {
        const tensor_shape shape = {words.data(), 2, {64, 64}, {0, 128}, {64, rows}, SWIZZLE_128B};
        CHECK(make_tensor_map(&map, shape) == PBS_OK, "%s", pbs_last_error());
    }
};

void load(plan &s, const matrix &m, const void *to, int column = 0) {
    ptx::mbarrier_arrive_expect_tx(at(&s.barrier), 8192);
    ptx::tma_load(at(to), &m.map, at(&s.barrier), {column, 0}, 0);
}

void finish() {
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
}

uint64_t tile_at(const void *tile) { return matrix_descriptor(at(tile), 16, 1024, SWIZZLE_128B); }

} // namespace

EMU_TEST(mbarrier_refuses) {
    CHECK_FAILS(run(1, [](plan &s) { ptx::mbarrier_wait(at(&s.barrier), 0); }), "not initialised");
    CHECK_FAILS(run(1, [](plan &s) { ptx::mbarrier_init(at(&s.barrier), 0); }), "count 0");
    CHECK_FAILS(run(1, [](plan &s) { ptx::mbarrier_init(at(&s.barrier) + 4, 1); }),
                "not a multiple of 8");
    CHECK_FAILS(run(1,
                    [](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        ptx::mbarrier_init(at(&s.barrier), 1);
                    }),
                "holds an mbarrier already");
    CHECK_FAILS(
        run(1,
            [](plan &s) {
                ptx::mbarrier_init(at(&s.barrier), 1);
                ptx::mbarrier_arrive_expect_tx(at(&s.barrier), 16);
                ptx::mbarrier_arrive(at(&s.barrier));
            }),
        "beyond the count: mbarrier at byte 16384: phase 0, 0 of 1 arrivals missing, 16 bytes");
    CHECK_FAILS(run(1,
                    [](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        ptx::mbarrier_arrive_expect_tx(at(&s.barrier), 1 << 20);
                    }),
                "more than 2^20 - 1 bytes");
    CHECK_FAILS(run(1,
                    [](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        s.barrier = 1;
                        ptx::mbarrier_arrive(at(&s.barrier));
                    }),
                "was overwritten");
    CHECK_FAILS(run(1,
                    [](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        ptx::mbarrier_inval(at(&s.barrier));
                        ptx::mbarrier_arrive(at(&s.barrier));
                    }),
                "not initialised");
    CHECK_RUNS(run(1, [](plan &s) {
        ptx::mbarrier_init(at(&s.barrier), 1);
        ptx::mbarrier_wait(at(&s.barrier), 1); /* the phase before the first */
        ptx::mbarrier_arrive(at(&s.barrier));
        ptx::mbarrier_wait(at(&s.barrier), 0);
        ptx::mbarrier_inval(at(&s.barrier));
        ptx::mbarrier_init(at(&s.barrier), 2);
    }));
}

EMU_TEST(tma_refuses) {
    const matrix m, low(32);
    const auto loads = [&](void (*misuse)(plan &, const matrix &)) {
        return run(1, [&](plan &s) {
            ptx::mbarrier_init(at(&s.barrier), 1);
            misuse(s, m);
            ptx::mbarrier_wait(at(&s.barrier), 0);
        });
    };
    CHECK_RUNS(loads([](plan &s, const matrix &x) { load(s, x, s.tile); }));
    CHECK_FAILS(loads([](plan &s, const matrix &x) { load(s, x, s.tile + 64); }),
                "not a multiple of 1024");
    CHECK_FAILS(loads([](plan &s, const matrix &x) { load(s, x, &s.other[1024]); }), "outside");
    CHECK_FAILS(loads([](plan &s, const matrix &x) { load(s, x, s.tile, 4); }),
                "does not start on 16 bytes");
    CHECK_FAILS(loads([](plan &s, const matrix &x) {
                    load(s, x, s.tile);
                    ptx::tma_load(at(s.tile), &x.map, at(&s.barrier), {0, 0}, 0);
                }),
                "a bulk copy of thread 0 is under way to it");
    CHECK_FAILS(loads([](plan &s, const matrix &x) {
                    load(s, x, s.tile);
                    s.tile[100] = 0;
                }),
                "written in flight");
    CHECK_FAILS(loads([](plan &s, const matrix &x) {
                    ptx::mbarrier_arrive_expect_tx(at(&s.barrier), 8192);
                    ptx::tma_load(at(s.tile), &x.map, at(&s.barrier), {0, 0, 0}, 0);
                }),
                "3 coordinates for a map of rank 2");
    CHECK_FAILS(run(1,
                    [&](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        load(s, m, s.tile);
                    }),
                "1 bulk copies are under way");
    CHECK_FAILS(run(1,
                    [&](plan &s) {
                        ptx::st_shared(at(s.tile), 0);
                        ptx::tma_store(&m.map, at(s.tile), {0, 0});
                    }),
                "thread 0 wrote it without fence.proxy.async");
    CHECK_FAILS(run(1,
                    [&](plan &s) {
                        ptx::tma_store(&m.map, at(s.tile), {0, 0});
                        ptx::tma_store_commit();
                    }),
                "whose read nobody waited for");
    CHECK_FAILS(run(1,
                    [&](plan &s) {
                        ptx::tma_store(&m.map, at(s.tile), {0, 0});
                        ptx::tma_store_commit();
                        s.tile[7] = 1;
                        ptx::tma_store_wait_read<0>();
                    }),
                "were written before the store had read them");
    CHECK_FAILS(run(1,
                    [&](plan &s) {
                        ptx::tma_store(&m.map, at(s.tile), {0, 0});
                        ptx::tma_store_commit();
                        ptx::st_shared(at(s.tile), 0);
                    }),
                "which a bulk store has yet to read");
}

EMU_TEST(tensor_map_rules) {
    alignas(16) static uint16_t words[64];
    const tensor_shape right = {words, 3, {64, 9, 1}, {0, 144, 7}, {64, 8, 1}, SWIZZLE_128B};
    tensor_map map;
    const auto refused = [&](void (*wrong)(tensor_shape &)) {
        tensor_shape shape = right;
        wrong(shape);
        return make_tensor_map(&map, shape) == PBS_ERR_UNSUPPORTED;
    };
    CHECK(make_tensor_map(&map, right) == PBS_OK, "a stride that is never stepped may be any");
    CHECK(box_bytes(right) == 1024, "bytes of a box");
    CHECK(refused([](tensor_shape &s) { s.base = words + 4; }), "base");
    CHECK(refused([](tensor_shape &s) { s.rank = 6; }), "rank");
    CHECK(refused([](tensor_shape &s) { s.size[1] = 0; }), "size 0");
    CHECK(refused([](tensor_shape &s) { s.size[1] = (INT64_C(1) << 32) + 1; }), "size");
    CHECK(refused([](tensor_shape &s) { s.stride[1] = 136; }), "stride");
    CHECK(refused([](tensor_shape &s) { s.stride[1] = INT64_C(1) << 40; }), "long stride");
    CHECK(refused([](tensor_shape &s) { s.box[1] = 257; }), "box");
    CHECK(refused([](tensor_shape &s) { s.box[0] = 72; }), "a row wider than the swizzle");
    CHECK(refused([](tensor_shape &s) { s.mode = SWIZZLE_64B; }), "a row wider than the swizzle");
}

EMU_TEST(wgmma_refuses) {
    const auto multiply = [](int threads, void (*f)(plan &, float(&)[32])) {
        return run(threads, [=](plan &s) {
            float d[32] = {};
            ptx::st_shared_x4(at(s.tile) + 16 * threadIdx.x, {0, 0, 0, 0});
            if (threadIdx.x != 64) ptx::fence_proxy_async();
            __syncthreads();
            f(s, d);
        });
    };
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.tile), tile_at(s.tile), 0);
                         }),
                "wgmma without a wgmma.fence");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(s.tile), 0);
                             finish();
                         }),
                "thread 64 wrote it without fence.proxy.async");
    CHECK_FAILS(multiply(96, [](plan &, float(&)[32]) { ptx::wgmma_fence(); }),
                "less than 128 threads");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             const void *mine = threadIdx.x == 5 ? s.tile : s.other;
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(mine), 0);
                             finish();
                         }),
                "another shape or descriptor");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             float e[32];
                             ptx::wgmma_fence();
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(s.other), 0);
                             ptx::wgmma_ss<bf16, 0>(threadIdx.x == 5 ? e : d, tile_at(s.other),
                                                    tile_at(s.other), 1);
                             finish();
                         }),
                "accumulators are others");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             const uint64_t outside = tile_at(&s.other[32 * 64]);
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), outside, 0);
                             finish();
                         }),
                "outside the block's");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(s.other), 0);
                             ptx::wgmma_commit();
                         }),
                "1 wgmma that nobody waited for");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             if (threadIdx.x < 100)
                                 ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(s.other), 0);
                             ptx::wgmma_commit();
                             if (threadIdx.x < 100) ptx::wgmma_wait<0>();
                         }),
                "100 of 128 threads have issued wgmma 0");
    CHECK_FAILS(multiply(128,
                         [](plan &s, float(&d)[32]) {
                             ptx::wgmma_fence();
                             ptx::wgmma_ss<bf16, 0>(d, tile_at(s.other), tile_at(s.other), 0);
                             ptx::wgmma_commit();
                             d[3] += 1;
                             d[4] = 1;
                             ptx::wgmma_wait<0>();
                         }),
                "accumulator 4 was touched"); /* a NaN plus 1 is the same NaN */
}

EMU_TEST(warps_and_clusters_refuse) {
    CHECK_FAILS(run(128, [](plan &) { ptx::setmaxnreg_dec<256>(); }), "");
    CHECK_FAILS(run(384, [](plan &) { ptx::setmaxnreg_dec<176>(); }), "to 176: the warp has 168");
    CHECK_FAILS(run(384, [](plan &) { ptx::setmaxnreg_inc<160>(); }), "to 160: the warp has 168");
    CHECK_FAILS(run(128,
                    [](plan &) {
                        if (threadIdx.x < 64) ptx::setmaxnreg_dec<64>();
                    }),
                "have different counts");
    CHECK_FAILS(run(32,
                    [](plan &) {
                        if (threadIdx.x < 31) ptx::elect();
                    }),
                "elect.sync");
    CHECK_FAILS(run(
                    32, [](plan &s) { ptx::mapa(at(s.tile), 2); }, 2),
                "rank 2 in a cluster of 2");
    CHECK_FAILS(run(
                    32, [](plan &) { ptx::cluster_wait(); }, 2),
                "has not arrived");
    CHECK_FAILS(run(
                    32,
                    [](plan &) {
                        if (threadIdx.x == 0) ptx::cluster_arrive();
                        if (threadIdx.x == 0) ptx::cluster_arrive();
                    },
                    2),
                "a second time in one phase");
    CHECK_FAILS(run(
                    1,
                    [](plan &s) {
                        ptx::mbarrier_init(at(&s.barrier), 1);
                        ptx::mbarrier_init(at(&s.second), 9999);
                        ptx::cluster_arrive();
                        ptx::cluster_wait();
                        if (ptx::cluster_rank() == 0) return;
                        for (int i = 0; i < 5000; i++) ptx::mbarrier_arrive(at(&s.second));
                        ptx::mbarrier_arrive_cluster(ptx::mapa(at(&s.barrier), 0));
                    },
                    2),
                "has ended");
}
