// SPDX-License-Identifier: Apache-2.0
//
// The most that mma.sync gives: warps that multiply fragments in their registers and touch no
// memory. peak/mma.py builds this into a library of its own and loads it; see peak/cuda.py.
//
// A warp has 2 fragments of A (16 x 16) and 4 of B (16 x 8), so 8 products that do not wait for
// each other, and each operand is used again as in a real tile. 8 warps a block, 2 blocks an SM: 4
// warps on every scheduler.
#include <cuda_runtime.h>
#include <stdint.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum { WARPS = 8, A_TILES = 2, B_TILES = 4, FLOP_PER_MMA = 2 * 16 * 8 * 16 };

static __device__ uint32_t hash(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ (x >> 16);
}

// Two bf16 of random sign and mantissa in +-[2^-2, 4): as much toggling as data, and no NaN.
static __device__ uint32_t random_pair(uint32_t seed) {
    uint32_t bits = hash(seed);
    return (bits & 0x81ff81ffU) + 0x3e803e80U;
}

static __global__ void __launch_bounds__(32 * WARPS) peak_mma(float *out, int rounds) {
    uint32_t a[A_TILES][4], b[B_TILES][2];
    float acc[A_TILES][B_TILES][4];
    const uint32_t seed = 64 * (blockIdx.x * blockDim.x + threadIdx.x);
#pragma unroll
    for (int i = 0; i < A_TILES * 4; i++) a[i / 4][i % 4] = random_pair(seed + i);
#pragma unroll
    for (int i = 0; i < B_TILES * 2; i++) b[i / 2][i % 2] = random_pair(seed + 32 + i);
#pragma unroll
    for (int i = 0; i < A_TILES * B_TILES * 4; i++)
        acc[i / (B_TILES * 4)][i / 4 % B_TILES][i % 4] = 0;

    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int i = 0; i < A_TILES; i++) {
#pragma unroll
            for (int j = 0; j < B_TILES; j++) {
                float(&c)[4] = acc[i][j];
                asm volatile(
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                    "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                    : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]),
                      "r"(b[j][1]));
            }
        }
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < A_TILES * B_TILES * 4; i++)
        sum += acc[i / (B_TILES * 4)][i / 4 % B_TILES][i % 4];
    if (out) out[blockIdx.x * blockDim.x + threadIdx.x] = sum; // never: out is NULL
}

EXPORT int peak_mma_launch(int device, void *stream, int blocks, int rounds) {
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    peak_mma<<<blocks, 32 * WARPS, 0, (cudaStream_t)stream>>>(NULL, rounds);
    return cudaGetLastError();
}

EXPORT double peak_mma_flop_per_block(int rounds) {
    return (double)rounds * WARPS * A_TILES * B_TILES * FLOP_PER_MMA;
}

EXPORT const char *peak_mma_error(int status) { return cudaGetErrorString((cudaError_t)status); }
