/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels that test the emulation, for nvcc: real code for sm_90a, so what the emulation runs
 * is what a GPU could. `make ptx-check` reads ptxas' notes.
 */
#include "toy_cluster.cuh"
#include "toy_sm90.cuh"

namespace toy90 {

#define TOY_ATTEND(D)                                                           \
    template __global__ void toy_attend<D, CORRECT>(                            \
        const __grid_constant__ tensor_map, const __grid_constant__ tensor_map, \
        const __grid_constant__ tensor_map, const __grid_constant__ tensor_map, const params);
TOY_ATTEND(64)
TOY_ATTEND(96)
TOY_ATTEND(128)
TOY_ATTEND(256)

} // namespace toy90

namespace toy_cluster {

template __global__ void sum_tiles<CORRECT>(const __grid_constant__ tensor_map, uint32_t *,
                                            int32_t);

} // namespace toy_cluster
