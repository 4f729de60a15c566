/* SPDX-License-Identifier: Apache-2.0
 *
 * Instructions that the host twins of ptx_sm90.cuh call; defined in mbarrier.cc, tma.cc, wgmma.cc
 * and cluster.cc.
 */
#ifndef EMU_HOPPER_OPS_H
#define EMU_HOPPER_OPS_H

#include <stdint.h>

namespace emu {

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_inval(uint32_t barrier);
void mbarrier_arrive(const char *name, uint32_t barrier, bool expect, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);

void fence_proxy_async();
void st_shared(uint32_t to, const uint32_t *words, int count);
void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]);

/* blocks: bit mask of ranks, 0 for the caller's own block without multicast. */
void tma_load(uint32_t to, const uint64_t *map, uint32_t barrier, uint32_t blocks, int rank,
              const int32_t *at);
void tma_store(const uint64_t *map, uint32_t from, int rank, const int32_t *at);
void tma_store_commit();
void tma_store_wait(int pending, bool read_only);
void check_tensor_map(const uint64_t *map);

/* One wgmma: d[64, columns] += A[64, 16] B[16, columns]. */
struct wgmma_operands {
    int columns;
    bool is_bf16, transpose_b, accumulate;
    bool a_in_registers;
    uint64_t a, b; /* descriptors */
};
void wgmma_issue(const wgmma_operands &what, float *d, const uint32_t *a);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

uint32_t elect();
void setmaxnreg(int registers, bool increase);
uint32_t cluster_rank();
uint32_t mapa(uint32_t address, uint32_t rank);
void cluster_arrive();
void cluster_wait();
void barrier_arrive(int id, int threads); /* schedule.cc */

} // namespace emu

#endif /* EMU_HOPPER_OPS_H */
