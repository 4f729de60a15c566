/* SPDX-License-Identifier: Apache-2.0
 *
 * Host twin of csrc/cuda/ptx_sm90.cuh and ptx_wgmma.cuh: the same names and signatures, carried out
 * by mbarrier.cc, tma.cc, wgmma.cc and cluster.cc. What each does is said there.
 */
#ifndef EMU_PTX_HOST_SM90_H
#define EMU_PTX_HOST_SM90_H

#include "cuda/tensor_map.cuh"
#include "hopper_ops.h"

namespace pbs {
namespace ptx {

/* ---- mbarrier -------------------------------------------------------------------------------- */
static inline void mbarrier_init(uint32_t barrier, uint32_t count) {
    emu::mbarrier_init(barrier, count);
}
static inline void mbarrier_inval(uint32_t barrier) { emu::mbarrier_inval(barrier); }
static inline void fence_mbarrier_init() {}
static inline void mbarrier_arrive(uint32_t barrier) {
    emu::mbarrier_arrive("mbarrier.arrive", barrier, false, 0);
}
static inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    emu::mbarrier_arrive("mbarrier.arrive.expect_tx", barrier, true, bytes);
}
static inline void mbarrier_arrive_cluster(uint32_t barrier) {
    emu::mbarrier_arrive("mbarrier.arrive.shared::cluster", barrier, false, 0);
}
static inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    emu::mbarrier_wait(barrier, parity);
}
static inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    emu::mbarrier_wait(barrier, parity);
}
static inline void fence_proxy_async() { emu::fence_proxy_async(); }

/* ---- copies of boxes ------------------------------------------------------------------------- */
static inline uint64_t policy_evict_first() { return 0; }
static inline uint64_t policy_evict_last() { return 0; }
static inline void prefetch_tensor_map(const tensor_map *map) { emu::check_tensor_map(map->words); }
template <int rank>
void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier, const int32_t (&at)[rank],
              uint64_t) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    emu::tma_load(to, map->words, barrier, 0, rank, at);
}
template <int rank>
void tma_load_multicast(uint32_t to, const tensor_map *map, uint32_t barrier, uint16_t blocks,
                        const int32_t (&at)[rank], uint64_t) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    emu::tma_load(to, map->words, barrier, blocks | 1u << 16, rank, at);
}
template <int rank>
void tma_store(const tensor_map *map, uint32_t from, const int32_t (&at)[rank]) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    emu::tma_store(map->words, from, rank, at);
}
static inline void tma_store_commit() { emu::tma_store_commit(); }
template <int pending> void tma_store_wait_read() { emu::tma_store_wait(pending, true); }
template <int pending> void tma_store_wait() { emu::tma_store_wait(pending, false); }
static inline void prefetch_l2(const void *) {}

/* ---- stores to shared memory ----------------------------------------------------------------- */
static inline void st_shared(uint32_t to, uint32_t value) { emu::st_shared(to, &value, 1); }
static inline void st_shared_x4(uint32_t to, const uint32_t (&r)[4]) { emu::st_shared(to, r, 4); }
static inline void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) { emu::stmatrix_x4(row, r); }

/* ---- warps, warpgroups, clusters ------------------------------------------------------------- */
static inline uint32_t elect() { return emu::elect(); }
template <int registers> void setmaxnreg_dec() { emu::setmaxnreg(registers, false); }
template <int registers> void setmaxnreg_inc() { emu::setmaxnreg(registers, true); }
static inline void bar_sync(uint32_t barrier, uint32_t threads) {
    emu::barrier_sync(static_cast<int>(barrier), static_cast<int>(threads), false);
}
static inline void bar_arrive(uint32_t barrier, uint32_t threads) {
    emu::barrier_arrive(static_cast<int>(barrier), static_cast<int>(threads));
}
static inline uint32_t cluster_rank() { return emu::cluster_rank(); }
static inline uint32_t mapa(uint32_t address, uint32_t rank) { return emu::mapa(address, rank); }
static inline void cluster_arrive() { emu::cluster_arrive(); }
static inline void cluster_wait() { emu::cluster_wait(); }

/* ---- tensor cores ---------------------------------------------------------------------------- */
template <class T> inline constexpr bool is_bf16 = false;
template <> inline constexpr bool is_bf16<bf16> = true;

static inline void wgmma_fence() { emu::wgmma_fence(); }
static inline void wgmma_commit() { emu::wgmma_commit(); }
template <int pending> void wgmma_wait() { emu::wgmma_wait(pending); }
template <int count> void fence_registers(float (&)[count]) {}
template <int count> void fence_registers(uint32_t (&)[count]) {}

template <class T, int transpose_b, int count>
void wgmma_ss(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {
    static_assert(count == 32 || count == 48 || count == 64 || count == 128, "N 64, 96, 128, 256");
    emu::wgmma_issue({2 * count, is_bf16<T>, transpose_b != 0, accumulate != 0, false, a, b}, d,
                     nullptr);
}
template <class T, int transpose_b, int count>
void wgmma_rs(float (&d)[count], const uint32_t *a, uint64_t b, int accumulate) {
    static_assert(count == 32 || count == 48 || count == 64 || count == 128, "N 64, 96, 128, 256");
    emu::wgmma_issue({2 * count, is_bf16<T>, transpose_b != 0, accumulate != 0, true, 0, b}, d, a);
}

} // namespace ptx
} // namespace pbs

#endif /* EMU_PTX_HOST_SM90_H */
