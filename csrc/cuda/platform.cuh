/* SPDX-License-Identifier: Apache-2.0
 *
 * What kernels and drivers are compiled against: CUDA under nvcc, the host emulation
 * (tests/emu/emu.h, on the include path then) under any other compiler. Nothing else in csrc/cuda
 * asks which one it is, but ptx.cuh.
 *
 * Rules for a kernel source, so that one text serves both:
 *  - no CUDA header, no intrinsic and no asm outside ptx.cuh. Words of the language are fine:
 *    __global__, threadIdx, __syncthreads, __shfl_*_sync, __ballot_sync, __popc, integer atomics;
 *  - dynamic shared memory only, one struct that names every buffer, obtained by PBS_SHARED;
 *  - 16-bit values are uint16_t, or pairs in a uint32_t; conversions go through ptx::;
 *  - accumulators are arrays of compile-time size passed by reference;
 *  - no spinning; no block waits for another;
 *  - launches go through pbs::launch (launch.cuh).
 */
#ifndef PBS_CUDA_PLATFORM_CUH
#define PBS_CUDA_PLATFORM_CUH

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define PBS_DEVICE static __device__ __forceinline__
#define PBS_KERNEL(threads, blocks_per_sm) \
    static __global__ void __launch_bounds__(threads, blocks_per_sm)
#define PBS_UNROLL _Pragma("unroll")
#define PBS_NO_UNROLL _Pragma("unroll 1")
/* plan &name: the block's dynamic shared memory seen as one struct. */
#define PBS_SHARED(plan, name)                                     \
    extern __shared__ __align__(1024) unsigned char pbs_shared_[]; \
    plan &name = *reinterpret_cast<plan *>(pbs_shared_)

#else

#include "emu.h"

#define PBS_DEVICE static inline
#define PBS_KERNEL(threads, blocks_per_sm) static void
#define PBS_UNROLL
#define PBS_NO_UNROLL
#define PBS_SHARED(plan, name) plan &name = *static_cast<plan *>(emu::shared_memory(sizeof(plan)))

#endif

#endif /* PBS_CUDA_PLATFORM_CUH */
