/* SPDX-License-Identifier: Apache-2.0
 *
 * Launching a kernel, the same on a GPU and under the emulation. A launch that the device refuses
 * comes back as PBS_ERR_DEVICE with the runtime's words. On 9.0 it may overtake the end of the
 * launch before it, so every kernel starts with begin_kernel (kernel.cuh); the emulation fails one
 * that does not.
 */
#ifndef PBS_CUDA_LAUNCH_CUH
#define PBS_CUDA_LAUNCH_CUH

#include "../core/status.h"
#include "cuda.h"
#include "platform.cuh"

#include <stdlib.h>
#include <string.h>

namespace pbs {

#if defined(__CUDACC__)

/* Beyond this much dynamic shared memory a kernel must say so before it is launched. */
constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;
/* And then asks for this, which every device since sm_80 has: the limit holds for all threads of
 * the host, so one that asked for just its own need could take away another's before its launch. */
constexpr size_t SHARED_TO_ASK_FOR = 99 << 10;

inline pbs_status device_error(const char *what, cudaError_t error) {
    cudaGetLastError(); /* not to be found by the next launch */
    return pbs_fail(PBS_ERR_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}

/* Is there machine code for this compute capability in the file that is being compiled? */
constexpr bool built_for(int capability) {
    for (const int arch : {__CUDA_ARCH_LIST__})
        if (arch == 10 * capability) return true;
    return false;
}

/* May a launch overtake the end of the one before it (programmatic dependent launch)? Its code must
 * have begin_kernel's wait, which code for earlier devices has not, nor has it where that is
 * translated for a later one. */
inline bool overtakes(const pbs_exec &exec) {
    const char *wanted = getenv("PBS_ATTN_OVERLAP"); /* 0: to compare, or to rule it out */
    if (wanted && strcmp(wanted, "0") == 0) return false;
    return built_for(90) && pbs_cuda_capability(exec.device) == 90;
}

/* kernel<<<blocks, threads, shared>>>(args...) on exec's stream. No blocks: nothing happens. */
template <class... P, class... A>
pbs_status launch(const pbs_exec &exec, const char *name, void (*kernel)(P...), int64_t blocks,
                  int threads, size_t shared, const A &...args) {
    if (blocks <= 0) return PBS_OK;
    if (blocks > INT32_MAX)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "%s: %lld blocks in one launch; at most 2^31 - 1",
                        name, static_cast<long long>(blocks));
    if (shared > SHARED_WITHOUT_ASKING) {
        const size_t limit = shared > SHARED_TO_ASK_FOR ? shared : SHARED_TO_ASK_FOR;
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
        if (error != cudaSuccess) return device_error(name, error);
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(exec.stream);
    config.attrs = &early;
    config.numAttrs = overtakes(exec);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    return error == cudaSuccess ? PBS_OK : device_error(name, error);
}

#else

template <class... P, class... A>
pbs_status launch(const pbs_exec &exec, const char *name, void (*kernel)(P...), int64_t blocks,
                  int threads, size_t shared, const A &...args) {
    (void)exec;
    if (blocks <= 0) return PBS_OK;
    const char *error =
        emu::launch({name, blocks, threads, shared, 1, 0, true}, [&] { kernel(args...); });
    return error ? pbs_fail(PBS_ERR_DEVICE, "%s", error) : PBS_OK;
}

#endif

/* PBS_TRY(PBS_LAUNCH(exec, kernel, blocks, threads, shared, args...)); template arguments of the
 * kernel go into parentheses of their own: (attend_kernel<bf16, 128>). */
#define PBS_LAUNCH(exec, kernel, ...) ::pbs::launch(exec, #kernel, kernel, __VA_ARGS__)

} // namespace pbs

#endif /* PBS_CUDA_LAUNCH_CUH */
