/* SPDX-License-Identifier: Apache-2.0
 *
 * Making tensor maps. The rules (cuTensorMapEncodeTiled in cuda.h) are checked here, for better
 * words than the driver's CUDA_ERROR_INVALID_VALUE and because the emulation has no driver.
 */
#include <string.h>

#include "tensor_map.cuh"

#if defined(__CUDACC__)
#include <cudaTypedefs.h>
#else
#include "tensor_host.h"
#endif

namespace pbs {

/* Elements have 2 bytes. */
static pbs_status check(const tensor_shape &s) {
    if (s.rank < 1 || s.rank > 5)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "tensor map: rank %d; 1 to 5", s.rank);
    if (reinterpret_cast<uintptr_t>(s.base) % 16)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "tensor map: the tensor does not start on 16 bytes");
    for (int32_t i = 0; i < s.rank; i++) {
        if (s.size[i] < 1 || s.size[i] > INT64_C(1) << 32)
            return pbs_fail(PBS_ERR_UNSUPPORTED, "tensor map: size[%d] = %lld; 1 to 2^32", i,
                            static_cast<long long>(s.size[i]));
        if (s.box[i] < 1 || s.box[i] > 256)
            return pbs_fail(PBS_ERR_UNSUPPORTED, "tensor map: box[%d] = %d; 1 to 256", i, s.box[i]);
        if (i > 0 && s.size[i] > 1 &&
            (s.stride[i] < 0 || s.stride[i] % 16 || s.stride[i] >= INT64_C(1) << 40))
            return pbs_fail(PBS_ERR_UNSUPPORTED,
                            "tensor map: stride[%d] = %lld bytes; multiples of 16 below 2^40", i,
                            static_cast<long long>(s.stride[i]));
    }
    /* The manual allows a shorter row under a swizzle; no tile here has one. */
    const uint32_t row = 2 * static_cast<uint32_t>(s.box[0]);
    if (row % 16 || (s.mode != SWIZZLE_NONE && row != swizzle_width(s.mode)))
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "tensor map: box[0] = %d; whole 16-byte chunks, as wide as the swizzle",
                        s.box[0]);
    return PBS_OK;
}

/* A stride that no step uses must still be a legal one. */
static uint64_t stride_of(const tensor_shape &s, int32_t i) {
    return s.size[i] > 1 ? static_cast<uint64_t>(s.stride[i]) : 16;
}

#if defined(__CUDACC__)

static pbs_status encode(tensor_map *map, const tensor_shape &s) {
    static_assert(sizeof(tensor_map) == sizeof(CUtensorMap), "what the driver writes");
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
        return pbs_fail(PBS_ERR_DEVICE, "tensor map: the driver has no cuTensorMapEncodeTiled: %s",
                        cudaGetErrorString(error));

    cuuint64_t size[5], stride[5] = {};
    cuuint32_t box[5], step[5];
    for (int32_t i = 0; i < s.rank; i++) {
        size[i] = static_cast<cuuint64_t>(s.size[i]);
        box[i] = static_cast<cuuint32_t>(s.box[i]);
        step[i] = 1;
        if (i > 0) stride[i - 1] = stride_of(s, i);
    }
    const CUtensorMapSwizzle mode = s.mode == SWIZZLE_128B  ? CU_TENSOR_MAP_SWIZZLE_128B
                                    : s.mode == SWIZZLE_64B ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : s.mode == SWIZZLE_32B ? CU_TENSOR_MAP_SWIZZLE_32B
                                                            : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry)(
        reinterpret_cast<CUtensorMap *>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16,
        static_cast<cuuint32_t>(s.rank), const_cast<void *>(s.base), size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        return pbs_fail(PBS_ERR_DEVICE, "tensor map: cuTensorMapEncodeTiled: error %d",
                        static_cast<int>(result));
    return PBS_OK;
}

#else

static pbs_status encode(tensor_map *map, const tensor_shape &s) {
    emu::tensor_box box = {};
    box.base = static_cast<char *>(const_cast<void *>(s.base));
    box.rank = s.rank;
    box.mode = s.mode;
    for (int32_t i = 0; i < s.rank; i++) {
        box.size[i] = static_cast<uint64_t>(s.size[i]);
        box.stride[i] = i > 0 ? stride_of(s, i) : 2;
        box.box[i] = static_cast<uint16_t>(s.box[i]);
    }
    emu::encode_tensor_map(map->words, box);
    return PBS_OK;
}

#endif

pbs_status make_tensor_map(tensor_map *map, const tensor_shape &shape) {
    PBS_TRY(check(shape));
    return encode(map, shape);
}

} // namespace pbs
