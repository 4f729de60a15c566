/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernels that test the emulation, on a GPU: what runs on a CPU is what runs there. Answers are
 * held against fp64 with the emulation's own bound. `make ptx-gpu` runs this behind test_ptx.
 */
#include "toy_cluster.cuh"
#include "toy_sm90_problem.h"

#include "pbs/pbs.h"

#include <stdio.h>

namespace {

bool good(cudaError_t error) {
    if (error != cudaSuccess) printf("toy kernels: %s\n", cudaGetErrorString(error));
    return error == cudaSuccess;
}

uint16_t *on_gpu(const std::vector<uint16_t> &host) {
    uint16_t *copy = nullptr;
    if (!good(cudaMalloc(&copy, host.size() * 2))) return nullptr;
    good(cudaMemcpy(copy, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
    return copy;
}

/* Two launches, of few and of many persistent blocks: right, and the same bits. */
template <int D> bool attends(int heads, int len_q, int len_k) {
    const toy90::attention<D> x(heads, len_q, len_k);
    std::vector<uint16_t> out(x.q.size(), 0x7fff), first;
    uint16_t *q = on_gpu(x.q), *k = on_gpu(x.k), *v = on_gpu(x.v), *o = on_gpu(out);
    pbs::tensor_map maps[4];
    bool fine = q && k && v && o && x.make_maps(maps, q, k, v, o);
    if (!fine) printf("toy_attend: %s\n", pbs_last_error());
    const int shared = sizeof(toy90::smem_plan<D>);
    void (*kernel)(const pbs::tensor_map, const pbs::tensor_map, const pbs::tensor_map,
                   const pbs::tensor_map, const toy90::params) =
        toy90::toy_attend<D, toy90::CORRECT>;
    fine = fine &&
           good(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    for (const int blocks : {1, 2, 32}) {
        if (!fine) break;
        kernel<<<blocks, toy90::THREADS, shared>>>(maps[0], maps[1], maps[2], maps[3],
                                                   x.make_params());
        fine = good(cudaDeviceSynchronize()) &&
               good(cudaMemcpy(out.data(), o, out.size() * 2, cudaMemcpyDeviceToHost));
        if (blocks == 1) first = out;
        fine = fine && x.right(out) && out == first;
    }
    for (uint16_t *p : {q, k, v, o}) cudaFree(p);
    printf("toy_attend D %d, %d x %d: %s\n", D, len_q, len_k, fine ? "ok" : "WRONG");
    return fine;
}

template <int D> int wrong_of_dim() {
    return !attends<D>(2, 1, 1) + !attends<D>(1, 127, 129) + !attends<D>(2, 200, 300) +
           !attends<D>(3, 1000, 2049);
}

} // namespace

/* How many went wrong. */
int run_toy_kernels() {
    return wrong_of_dim<64>() + wrong_of_dim<96>() + wrong_of_dim<128>() + wrong_of_dim<256>();
}

namespace toy_cluster {

/* Compiled for ptxas' notes; the conformance program has clusters of its own. */
template __global__ void sum_tiles<CORRECT>(const __grid_constant__ tensor_map, uint32_t *,
                                            int32_t);

} // namespace toy_cluster
