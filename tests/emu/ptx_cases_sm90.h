/* SPDX-License-Identifier: Apache-2.0
 *
 * The cases of ptx_sm90.cuh: mbarrier, the copy engine, clusters, register counts.
 */
#ifndef EMU_PTX_CASES_SM90_H
#define EMU_PTX_CASES_SM90_H

#include "ptx_cases.h"

namespace ptx_cases {

/* ---- mbarrier ------------------------------------------------------------------------------- */
struct barrier_plan {
    uint32_t words[64];
    uint64_t barrier;
};

/* 64 threads hand words on, three phases; then the barrier's bytes serve another purpose. */
PBS_KERNEL(64, 1) mbarrier(const __grid_constant__ case_args a) {
    PBS_SHARED(barrier_plan, s);
    const uint32_t t = threadIdx.x, barrier = ptx::shared_address(&s.barrier);
    if (t == 0) {
        ptx::mbarrier_init(barrier, 64);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    uint32_t word = a.in[t];
    for (uint32_t phase = 0; phase < 3; phase++) {
        s.words[t] = word;
        ptx::mbarrier_arrive(barrier);
        ptx::mbarrier_wait(barrier, phase % 2);
        word = s.words[(t + 7) % 64] * 3 + 1;
        __syncthreads();
    }
    a.out[t] = word;
    if (t == 0) {
        ptx::mbarrier_inval(barrier);
        s.barrier = a.in[63];
        a.out[64] = static_cast<uint32_t>(s.barrier);
    }
}

/* ---- the copy engine ------------------------------------------------------------------------ */
constexpr uint32_t BOX_BYTES = 16384; /* at most */
struct box_plan {
    alignas(1024) uint32_t box[BOX_BYTES / 4];
    uint64_t full;
};

PBS_DEVICE void start_box(box_plan &s) {
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(ptx::shared_address(&s.full), 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
}

PBS_DEVICE void dump_box(const box_plan &s, uint32_t *out, uint32_t bytes) {
    for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = s.box[i];
    __syncthreads();
}

template <int rank> PBS_KERNEL(128, 1) tma_load(const __grid_constant__ case_args a) {
    PBS_SHARED(box_plan, s);
    start_box(s);
    const uint32_t full = ptx::shared_address(&s.full);
    for (int i = 0; i < PLACES; i++) {
        int32_t at[rank];
        for (int d = 0; d < rank; d++) at[d] = a.at[i][d];
        if (threadIdx.x == 0) {
            ptx::prefetch_tensor_map(&a.map);
            ptx::mbarrier_arrive_expect_tx(full, a.bytes);
            ptx::tma_load(ptx::shared_address(s.box), &a.map, full, at,
                          i % 2 ? ptx::policy_evict_first() : ptx::policy_evict_last());
        }
        ptx::mbarrier_wait(full, static_cast<uint32_t>(i % 2));
        dump_box(s, a.out + static_cast<uint32_t>(i) * a.bytes / 4, a.bytes);
    }
}

/* Block i % 2 of the cluster loads place i into both. */
template <int rank> PBS_KERNEL(128, 1) tma_load_multicast(const __grid_constant__ case_args a) {
    PBS_SHARED(box_plan, s);
    start_box(s);
    const uint32_t full = ptx::shared_address(&s.full), me = ptx::cluster_rank();
    for (int i = 0; i < PLACES; i++) {
        int32_t at[rank];
        for (int d = 0; d < rank; d++) at[d] = a.at[i][d];
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(full, a.bytes);
        ptx::cluster_arrive();
        ptx::cluster_wait();
        if (threadIdx.x == 0 && me == static_cast<uint32_t>(i % 2))
            ptx::tma_load_multicast(ptx::shared_address(s.box), &a.map, full, 3, at,
                                    ptx::policy_evict_last());
        ptx::mbarrier_wait_cluster(full, static_cast<uint32_t>(i % 2));
        dump_box(s, a.out + (me * PLACES + static_cast<uint32_t>(i)) * a.bytes / 4, a.bytes);
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

/* Places may overlap: each store is complete before the next. */
template <int rank> PBS_KERNEL(128, 1) tma_store(const __grid_constant__ case_args a) {
    PBS_SHARED(box_plan, s);
    for (int i = 0; i < PLACES; i++) {
        int32_t at[rank];
        for (int d = 0; d < rank; d++) at[d] = a.at[i][d];
        for (uint32_t w = threadIdx.x; w < a.bytes / 16; w += blockDim.x) {
            const uint32_t *from = a.in + (static_cast<uint32_t>(i) * a.bytes / 4 + 4 * w) % 4096;
            const uint32_t r[4] = {from[0], from[1], from[2], from[3]};
            ptx::st_shared_x4(ptx::shared_address(&s.box[4 * w]), r);
        }
        ptx::fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            ptx::tma_store(&a.map, ptx::shared_address(s.box), at);
            ptx::tma_store_commit();
            ptx::tma_store_wait_read<0>();
            ptx::tma_store_wait<0>();
        }
        __syncthreads();
    }
}

/* ---- stores to shared memory ---------------------------------------------------------------- */
PBS_KERNEL(32, 1) st_shared(const __grid_constant__ case_args a) {
    PBS_SHARED(words_plan, s);
    const uint32_t t = threadIdx.x;
    const uint32_t r[4] = {a.in[5 * t], a.in[5 * t + 1], a.in[5 * t + 2], a.in[5 * t + 3]};
    ptx::prefetch_l2(a.in);
    ptx::st_shared_x4(ptx::shared_address(&s.words[4 * (t ^ 1)]), r);
    ptx::st_shared(ptx::shared_address(&s.words[128 + (t ^ 3)]), a.in[5 * t + 4]);
    __syncthreads();
    for (uint32_t i = 0; i < 5; i++) a.out[5 * t + i] = s.words[5 * t + i];
}

PBS_KERNEL(32, 1) stmatrix(const __grid_constant__ case_args a) {
    PBS_SHARED(words_plan, s);
    const uint32_t t = threadIdx.x;
    const uint32_t r[4] = {a.in[4 * t], a.in[4 * t + 1], a.in[4 * t + 2], a.in[4 * t + 3]};
    ptx::stmatrix_x4(ptx::shared_address(&s.words[4 * (31 - t)]), r);
    __syncthreads();
    for (uint32_t i = 0; i < 4; i++) a.out[4 * t + i] = s.words[4 * t + i];
}

/* ---- warps, warpgroups, clusters ------------------------------------------------------------ */
/* One lane of each warp; which one is the machine's affair. */
PBS_KERNEL(128, 1) elect(const __grid_constant__ case_args a) {
    const uint32_t chosen = ptx::elect();
    const uint32_t votes = __ballot_sync(0xffffffffu, chosen != 0);
    a.out[threadIdx.x] = static_cast<uint32_t>(__popc(votes)) + a.in[threadIdx.x];
}

PBS_KERNEL(384, 1) setmaxnreg(const __grid_constant__ case_args a) {
    uint32_t word = a.in[threadIdx.x];
    if (threadIdx.x < 128) {
        ptx::setmaxnreg_dec<40>();
        word += 1;
    } else {
        ptx::setmaxnreg_inc<232>();
        word += 2;
    }
    a.out[threadIdx.x] = word;
}

/* Warps 0 and 1 fill, warps 2 and 3 read: arrive does not wait, sync does. */
PBS_KERNEL(128, 1) named_barriers(const __grid_constant__ case_args a) {
    PBS_SHARED(words_plan, s);
    const uint32_t t = threadIdx.x;
    for (uint32_t i = 0; i < 4; i++) {
        if (t < 64) {
            if (i > 0) ptx::bar_sync(2, 128);
            s.words[t] = a.in[64 * i + t];
            ptx::bar_arrive(1, 128);
        } else {
            ptx::bar_sync(1, 128);
            a.out[64 * i + t - 64] = s.words[127 - t];
            if (i < 3) ptx::bar_arrive(2, 128);
        }
    }
}

/* Each block's barrier counts the other block's 32 arrivals. */
PBS_KERNEL(32, 1) cluster(const __grid_constant__ case_args a) {
    PBS_SHARED(barrier_plan, s);
    const uint32_t t = threadIdx.x, rank = ptx::cluster_rank();
    const uint32_t barrier = ptx::shared_address(&s.barrier);
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
    if (t == 0) {
        ptx::mbarrier_init(barrier, 32);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    a.out[64 + 32 * rank + t] = a.in[32 * rank + t];
    ptx::mbarrier_arrive_cluster(ptx::mapa(barrier, rank ^ 1));
    ptx::mbarrier_wait_cluster(barrier, 0);
    a.out[32 * rank + t] = rank * 100 + t;
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

/* ---- the list ------------------------------------------------------------------------------- */
/* A tensor of odd sizes, rows one chunk longer than the swizzle is wide, and four places of its
 * box: inside, beyond the end, before the start, all outside. */
inline ptx_case box_case(const char *name, void (*kernel)(const case_args), int rank, swizzle mode,
                         bool stores, int cluster) {
    ptx_case c = simple(name, kernel, 128, sizeof(box_plan), 0, 0, BITS, EXACT);
    const int32_t inner = static_cast<int32_t>(swizzle_width(mode) / 2);
    const int64_t size[5] = {inner + 8, 11, 3, 5, 2};
    const int32_t box[5] = {inner, 8, 2, 3, 2};
    c.sm90 = true;
    c.stores = stores;
    c.cluster = cluster;
    c.mode = mode;
    c.shape.rank = rank;
    c.shape.mode = mode;
    int64_t stride = 2;
    for (int i = 0; i < 5; i++) {
        c.shape.size[i] = size[i];
        c.shape.box[i] = box[i];
        c.shape.stride[i] = stride;
        stride *= size[i];
        c.at[0][i] = i < 2 ? 0 : 1;
        c.at[1][i] = i == 0 ? (inner > 8 ? 16 : 8) : static_cast<int32_t>(size[i]) - 1;
        c.at[2][i] = i == 0 ? -8 : -1;
        c.at[3][i] = i == 1 ? 100 : 0;
    }
    uint32_t tensor = 1;
    for (int i = 0; i < rank; i++) tensor *= static_cast<uint32_t>(size[i]);
    c.in_words = tensor / 2 > 4096 ? tensor / 2 : 4096;
    c.out_words =
        stores ? tensor / 2 : PLACES * box_bytes(c.shape) / 4 * static_cast<uint32_t>(cluster);
    return c;
}

inline ptx_case on_sm90(ptx_case c, int cluster) {
    c.sm90 = true;
    c.cluster = cluster;
    return c;
}

inline void add_sm90(std::vector<ptx_case> &list) {
    constexpr size_t words = sizeof(words_plan), barrier = sizeof(barrier_plan);
    list.push_back(on_sm90(simple("mbarrier", mbarrier, 64, barrier, 64, 65, BITS, EXACT), 1));
    list.push_back(on_sm90(simple("st_shared", st_shared, 32, words, 160, 160, BITS, EXACT), 1));
    list.push_back(on_sm90(simple("stmatrix_x4", stmatrix, 32, words, 128, 128, BITS, EXACT), 1));
    list.push_back(on_sm90(simple("elect", elect, 128, 0, 128, 128, BITS, EXACT), 1));
    list.push_back(on_sm90(simple("setmaxnreg", setmaxnreg, 384, 0, 384, 384, BITS, EXACT), 1));
    list.push_back(on_sm90(
        simple("bar_sync, bar_arrive", named_barriers, 128, words, 256, 256, BITS, EXACT), 1));
    list.push_back(on_sm90(simple("cluster, mapa", cluster, 32, barrier, 64, 128, BITS, EXACT), 2));

    const swizzle modes[] = {SWIZZLE_NONE, SWIZZLE_128B, SWIZZLE_64B, SWIZZLE_32B};
    for (const swizzle mode : modes) {
        list.push_back(box_case("tma_load 2d", tma_load<2>, 2, mode, false, 1));
        list.push_back(box_case("tma_load 3d", tma_load<3>, 3, mode, false, 1));
        list.push_back(box_case("tma_load 4d", tma_load<4>, 4, mode, false, 1));
        list.push_back(box_case("tma_load 5d", tma_load<5>, 5, mode, false, 1));
        list.push_back(box_case("tma_store 2d", tma_store<2>, 2, mode, true, 1));
        list.push_back(box_case("tma_store 3d", tma_store<3>, 3, mode, true, 1));
        list.push_back(box_case("tma_store 4d", tma_store<4>, 4, mode, true, 1));
        list.push_back(box_case("tma_store 5d", tma_store<5>, 5, mode, true, 1));
    }
    const swizzle all = SWIZZLE_128B;
    list.push_back(box_case("tma_load_multicast 2d", tma_load_multicast<2>, 2, all, false, 2));
    list.push_back(box_case("tma_load_multicast 3d", tma_load_multicast<3>, 3, all, false, 2));
    list.push_back(box_case("tma_load_multicast 4d", tma_load_multicast<4>, 4, all, false, 2));
    list.push_back(box_case("tma_load_multicast 5d", tma_load_multicast<5>, 5, all, false, 2));
}

} // namespace ptx_cases

#endif /* EMU_PTX_CASES_SM90_H */
