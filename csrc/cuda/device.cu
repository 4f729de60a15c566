/* SPDX-License-Identifier: Apache-2.0
 *
 * What the drivers ask of the device itself.
 */
#include "cuda.h"

#include "launch.cuh"

#if defined(__CUDACC__)

int pbs_cuda_capability(int32_t device) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError(); /* not to be found by the next launch */
        return 0;
    }
    return 10 * major + minor;
}

int32_t pbs_cuda_multiprocessors(int32_t device) {
    int count = 1;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        cudaGetLastError(); /* not to be found by the next launch */
    return count;
}

pbs_status pbs_cuda_enter(int32_t device, int32_t *previous) {
    int current = device;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    *previous = current;
    return error == cudaSuccess ? PBS_OK : pbs::device_error("device", error);
}

void pbs_cuda_leave(int32_t device, int32_t previous) {
    if (previous != device) cudaSetDevice(previous);
}

#else /* the emulated device runs everything */

int pbs_cuda_capability(int32_t device) {
    (void)device;
    return 90;
}

/* So that persistent kernels have several blocks. */
int32_t pbs_cuda_multiprocessors(int32_t device) {
    (void)device;
    return 3;
}

pbs_status pbs_cuda_enter(int32_t device, int32_t *previous) {
    *previous = device;
    return PBS_OK;
}

void pbs_cuda_leave(int32_t device, int32_t previous) { (void)device, (void)previous; }

#endif

const char *pbs_cuda_refuses(int32_t device) {
    const int capability = pbs_cuda_capability(device);
    if (capability == 0)
        return "device: it cannot be asked for its compute capability; the driver may be older "
               "than "
               "the CUDA runtime of this library";
    if (capability < 80) return "device: compute capability 8.0 or later is needed";
    return nullptr;
}
