/* SPDX-License-Identifier: Apache-2.0
 *
 * One function per PTX instruction; the section of the PTX ISA (9.0) stands beside it. Under any
 * compiler but nvcc the same names come from the emulation (tests/emu/ptx_host.h), so a kernel that
 * uses only these runs on a CPU.
 *
 * volatile and "memory" are decided here, once: on everything that reads or writes memory or orders
 * such accesses. Pure arithmetic has neither.
 */
#ifndef PBS_CUDA_PTX_CUH
#define PBS_CUDA_PTX_CUH

#include "platform.cuh"

namespace pbs {

/* Element types, as template arguments. */
struct bf16 {};
struct fp16 {};

} // namespace pbs

#if defined(__CUDACC__)

namespace pbs {
namespace ptx {

/* ---- arithmetic ------------------------------------------------------------------------------ */
/* 2^x, 2 ulp; 2^-inf = 0. 9.7.3.21 */
PBS_DEVICE float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* log2 x. 9.7.3.20 */
PBS_DEVICE float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Two floats, rounded to nearest even, as low and high half of a word. The instruction puts its
 * first source into the high half. 9.7.9.21 */
template <class T> PBS_DEVICE uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <> __device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

/* 16 bits to fp32, exactly. 9.7.9.21 */
template <class T> PBS_DEVICE float to_float(uint16_t bits);
template <> __device__ __forceinline__ float to_float<bf16>(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
template <> __device__ __forceinline__ float to_float<fp16>(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

/* ---- shared memory and copies ---------------------------------------------------------------- */
/* Generic address -> 32-bit address in the shared window. 9.7.9.20 */
PBS_DEVICE uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/* 16 bytes, global -> shared, asynchronously; only the first `bytes` (0 or 16) are read, the rest
 * is filled with zeros. Both addresses 16-byte aligned. 9.7.9.25.3.1 */
PBS_DEVICE void cp_async_16(uint32_t to, const void *from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

/* Closes the calling thread's group of copies. 9.7.9.25.3.2 */
PBS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most `pending` of the calling thread's groups are under way. Other threads' copies
 * are seen after a barrier only. 9.7.9.25.3.3 */
template <int pending> PBS_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* Four 8x8 matrices of 16-bit elements: lane 8 m + r names row r of matrix m; lane t receives of
 * each matrix row t / 4, columns 2 (t % 4) and + 1. 9.7.14.5.15 */
PBS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

/* The same, transposed: lane t receives rows 2 (t % 4) and + 1 of column t / 4. */
PBS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

/* ---- tensor cores ---------------------------------------------------------------------------- */
/* c[16, 8] += a[16, 16] b[16, 8], fp32 accumulators. With g = lane / 4, q = lane % 4:
 * a: word i holds row g + 8 (i % 2), columns 2 q + 8 (i / 2) and + 1;
 * b: word i holds k 2 q + 8 i and + 1 of column g;
 * c: element i is row g + 8 (i / 2), column 2 q + i % 2. 9.7.14.5.8 */
template <class T>
PBS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- launches that overlap ------------------------------------------------------------------- */
/* From 9.0 on; before, no launch overtakes another. Waits until the launches before this one are
 * over and what they wrote is there; lets the one behind it begin. 9.7.13.13 */
PBS_DEVICE void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
PBS_DEVICE void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace ptx
} // namespace pbs

#include "ptx_sm90.cuh"

#else

#include "ptx_host.h"

#endif

#endif /* PBS_CUDA_PTX_CUH */
