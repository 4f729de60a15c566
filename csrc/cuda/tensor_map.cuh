/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensor maps: what the copy engine is told of a tensor of 16-bit elements in global memory and of
 * the box that one instruction moves. Made on the host, passed to a kernel as a
 * `const __grid_constant__ tensor_map`.
 */
#ifndef PBS_CUDA_TENSOR_MAP_CUH
#define PBS_CUDA_TENSOR_MAP_CUH

#include "../core/status.h"
#include "descriptor.cuh"
#include "platform.cuh"

namespace pbs {

/* Opaque: written by the driver, read by the copy engine. */
struct alignas(64) tensor_map {
    uint64_t words[16];
};

/* Dimension 0 is the one whose elements are adjacent; rank 1 to 5. */
struct tensor_shape {
    const void *base; /* on 16 bytes */
    int32_t rank;
    int64_t size[5];   /* elements; 1 .. 2^32 */
    int64_t stride[5]; /* bytes, multiples of 16 below 2^40; [0] is not read. Where size is 1 any
                          value will do: it is never stepped */
    int32_t box[5];    /* elements, 1 .. 256; box[0] is a multiple of 16 bytes that fits the width
                          of the swizzle */
    swizzle mode;
};

/* PBS_ERR_UNSUPPORTED with the rule that shape breaks; PBS_ERR_DEVICE without a driver. */
pbs_status make_tensor_map(tensor_map *map, const tensor_shape &shape);

/* Bytes that one box moves, those outside the tensor counted in: what expect_tx is told. */
static inline uint32_t box_bytes(const tensor_shape &shape) {
    uint32_t bytes = 2;
    for (int32_t i = 0; i < shape.rank; i++) bytes *= static_cast<uint32_t>(shape.box[i]);
    return bytes;
}

} // namespace pbs

#endif /* PBS_CUDA_TENSOR_MAP_CUH */
