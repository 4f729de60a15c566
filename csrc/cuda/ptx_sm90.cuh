/* SPDX-License-Identifier: Apache-2.0
 *
 * PTX of sm_90a alone: mbarrier, the copy engine (TMA), clusters, register counts; the tensor cores
 * are in ptx_wgmma.cuh. Included by ptx.cuh, whose rules hold here too.
 *
 * Every build parses these functions, but only sm_90a has the instructions: built for another GPU
 * each is a trap, so that a kernel which was launched on the wrong one says so. (bar, st.shared and
 * prefetch are everywhere.)
 */
#ifndef PBS_CUDA_PTX_SM90_CUH
#define PBS_CUDA_PTX_SM90_CUH

#include "platform.cuh"
#include "tensor_map.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PBS_ASM_SM90(...) asm volatile(__VA_ARGS__)
#elif defined(__CUDA_ARCH__)
#define PBS_ASM_SM90(...) asm volatile("trap;")
#else
#define PBS_ASM_SM90(...)
#endif

namespace pbs {
namespace ptx {

/* ---- mbarrier: 8 bytes of shared memory that count arrivals and bytes ----------------------- */
/* A phase ends when `count` arrivals and all expected bytes are in; the next begins at once. The
 * first phase has parity 0. One thread; others may use it after fence_mbarrier_init and a barrier.
 * 9.7.13.15.9 */
PBS_DEVICE void mbarrier_init(uint32_t barrier, uint32_t count) {
    PBS_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/* The 8 bytes may serve another purpose from here on. 9.7.13.15.10 */
PBS_DEVICE void mbarrier_inval(uint32_t barrier) {
    PBS_ASM_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Makes this thread's mbarrier_init visible to the copy engine and to the cluster. 9.7.13.4 */
PBS_DEVICE void fence_mbarrier_init() {
    PBS_ASM_SM90("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* One arrival; releases what this thread wrote or read before. 9.7.13.15.13 */
PBS_DEVICE void mbarrier_arrive(uint32_t barrier) {
    PBS_ASM_SM90("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* One arrival, and this phase waits for so many bytes of copies, too. 9.7.13.15.13 */
PBS_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    PBS_ASM_SM90(
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
        "r"(bytes)
        : "memory");
}

/* One arrival at the barrier of another block of the cluster: barrier is an address from mapa.
 * 9.7.13.15.13 */
PBS_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
    PBS_ASM_SM90("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
                 : "memory");
}

/* Waits until the phase of this parity is over: at once if the current one has the other. A new
 * barrier's first phase is 0, so waiting for parity 1 passes: that is how a producer begins.
 * 9.7.13.15.16 */
PBS_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    PBS_ASM_SM90("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* The same, where blocks of a cluster arrive: sees what they wrote. */
PBS_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    PBS_ASM_SM90("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
                 "@!over bra again;\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

/* What this thread wrote to shared memory by ordinary stores, the copy engine and the tensor cores
 * see from here on; every writing thread says so itself, before a barrier. 9.7.13.4 */
PBS_DEVICE void fence_proxy_async() { PBS_ASM_SM90("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- copies of boxes (tensor_map.cuh) ------------------------------------------------------- */
/* How long the L2 cache is to keep what a copy reads. 9.7.9.18 */
PBS_DEVICE uint64_t policy_evict_first() {
    uint64_t policy = 0;
    PBS_ASM_SM90("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
PBS_DEVICE uint64_t policy_evict_last() {
    uint64_t policy = 0;
    PBS_ASM_SM90("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* The map is fetched ahead of its first use. 9.7.9.15 */
PBS_DEVICE void prefetch_tensor_map(const tensor_map *map) {
    PBS_ASM_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Global -> shared: the box whose first element has the coordinates `at` (dimension 0 first;
 * outside the tensor: zeros), to an address that is a multiple of the swizzle's period and of 128.
 * Counts the whole box in bytes on barrier. One thread; ranks 2 to 5. 9.7.9.25.5.2 */
#define PBS_TMA_LOAD(dimensions, coordinates, ...)                                      \
    PBS_ASM_SM90("cp.async.bulk.tensor." dimensions                                     \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint " \
                 "[%0], [%1, {" coordinates "}], [%2], %3;" ::"r"(to),                  \
                 "l"(map), "r"(barrier), "l"(policy), __VA_ARGS__                       \
                 : "memory")
template <int rank>
PBS_DEVICE void tma_load(uint32_t to, const tensor_map *map, uint32_t barrier,
                         const int32_t (&at)[rank], uint64_t policy) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    if constexpr (rank == 2) PBS_TMA_LOAD("2d", "%4, %5", "r"(at[0]), "r"(at[1]));
    if constexpr (rank == 3) PBS_TMA_LOAD("3d", "%4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    if constexpr (rank == 4)
        PBS_TMA_LOAD("4d", "%4, %5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    if constexpr (rank == 5)
        PBS_TMA_LOAD("5d", "%4, %5, %6, %7, %8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                     "r"(at[4]));
}
#undef PBS_TMA_LOAD

/* The same box into every block of the cluster whose bit in `blocks` is set, at the same place of
 * its shared memory, each counting on its own barrier at the same place. 9.7.9.25.5.2 */
#define PBS_TMA_LOAD(dimensions, coordinates, ...)                                         \
    PBS_ASM_SM90("cp.async.bulk.tensor." dimensions                                        \
                 ".shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster" \
                 ".L2::cache_hint [%0], [%1, {" coordinates "}], [%2], %3, %4;" ::"r"(to), \
                 "l"(map), "r"(barrier), "h"(blocks), "l"(policy), __VA_ARGS__             \
                 : "memory")
template <int rank>
PBS_DEVICE void tma_load_multicast(uint32_t to, const tensor_map *map, uint32_t barrier,
                                   uint16_t blocks, const int32_t (&at)[rank], uint64_t policy) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    if constexpr (rank == 2) PBS_TMA_LOAD("2d", "%5, %6", "r"(at[0]), "r"(at[1]));
    if constexpr (rank == 3) PBS_TMA_LOAD("3d", "%5, %6, %7", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    if constexpr (rank == 4)
        PBS_TMA_LOAD("4d", "%5, %6, %7, %8", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    if constexpr (rank == 5)
        PBS_TMA_LOAD("5d", "%5, %6, %7, %8, %9", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                     "r"(at[4]));
}
#undef PBS_TMA_LOAD

/* Shared -> global; what lies outside the tensor is dropped. One thread, which also commits and
 * waits. 9.7.9.25.5.2 */
#define PBS_TMA_STORE(dimensions, coordinates, ...)                                          \
    PBS_ASM_SM90("cp.async.bulk.tensor." dimensions                                          \
                 ".global.shared::cta.bulk_group [%0, {" coordinates "}], [%1];" ::"l"(map), \
                 "r"(from), __VA_ARGS__                                                      \
                 : "memory")
template <int rank>
PBS_DEVICE void tma_store(const tensor_map *map, uint32_t from, const int32_t (&at)[rank]) {
    static_assert(rank >= 2 && rank <= 5, "ranks 2 to 5");
    if constexpr (rank == 2) PBS_TMA_STORE("2d", "%2, %3", "r"(at[0]), "r"(at[1]));
    if constexpr (rank == 3) PBS_TMA_STORE("3d", "%2, %3, %4", "r"(at[0]), "r"(at[1]), "r"(at[2]));
    if constexpr (rank == 4)
        PBS_TMA_STORE("4d", "%2, %3, %4, %5", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]));
    if constexpr (rank == 5)
        PBS_TMA_STORE("5d", "%2, %3, %4, %5, %6", "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
                      "r"(at[4]));
}
#undef PBS_TMA_STORE

/* Closes the calling thread's group of stores. 9.7.9.25.6.1 */
PBS_DEVICE void tma_store_commit() { PBS_ASM_SM90("cp.async.bulk.commit_group;" ::: "memory"); }

/* Waits until all but `pending` groups have read shared memory, which may then be written again (or
 * given back at the kernel's end). 9.7.9.25.6.2 */
template <int pending> PBS_DEVICE void tma_store_wait_read() {
    PBS_ASM_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/* Waits until all but `pending` groups have written global memory as well. 9.7.9.25.6.2 */
template <int pending> PBS_DEVICE void tma_store_wait() {
    PBS_ASM_SM90("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

/* A line of global memory is fetched into L2. 9.7.9.15 */
PBS_DEVICE void prefetch_l2(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)) : "memory");
}

/* ---- stores that the copy engine or the tensor cores will read ------------------------------ */
/* Ordinary stores; through these functions because the emulation then sees a missing
 * fence_proxy_async. 9.7.9.11 */
PBS_DEVICE void st_shared(uint32_t to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
PBS_DEVICE void st_shared_x4(uint32_t to, const uint32_t (&r)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* Four 8x8 matrices of 16-bit elements, the inverse of ldmatrix_x4: lane 8 m + r names row r of
 * matrix m; lane t gives of each matrix row t / 4, columns 2 (t % 4) and + 1. 9.7.14.5.16 */
PBS_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    PBS_ASM_SM90("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* ---- warps and warpgroups ------------------------------------------------------------------- */
/* 1 in one lane of the warp, 0 in the others; all 32 lanes call it. 9.7.13.14 */
PBS_DEVICE uint32_t elect() {
    uint32_t chosen = 0;
    PBS_ASM_SM90("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(chosen));
    return chosen;
}

/* Registers a thread of this warpgroup may use from here on, 24 to 256, a multiple of 8. The pool
 * is what the block was launched with: inc waits until others have given enough back. 9.7.19.5 */
template <int registers> PBS_DEVICE void setmaxnreg_dec() {
    PBS_ASM_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> PBS_DEVICE void setmaxnreg_inc() {
    PBS_ASM_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

/* Barrier 0 to 15 among `threads` threads, a multiple of 32; __syncthreads is barrier 0 of all.
 * arrive counts and goes on. 9.7.13.1 */
PBS_DEVICE void bar_sync(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
PBS_DEVICE void bar_arrive(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/* ---- clusters and dependent launches -------------------------------------------------------- */
/* This block's number within its cluster. 10.17 */
PBS_DEVICE uint32_t cluster_rank() {
    uint32_t rank = 0;
    PBS_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* The address, in block `rank`, of what lies at `address` in this one. 9.7.9.23 */
PBS_DEVICE uint32_t mapa(uint32_t address, uint32_t rank) {
    uint32_t there = 0;
    PBS_ASM_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* A barrier of all threads of the cluster, in two halves. 9.7.13.3 */
PBS_DEVICE void cluster_arrive() {
    PBS_ASM_SM90("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
PBS_DEVICE void cluster_wait() {
    PBS_ASM_SM90("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

} // namespace ptx
} // namespace pbs

#include "ptx_wgmma.cuh"

#undef PBS_ASM_SM90

#endif /* PBS_CUDA_PTX_SM90_CUH */
