/* SPDX-License-Identifier: Apache-2.0
 *
 * The tensor cores of sm_90a: wgmma, issued by the 128 threads of a warpgroup. Included by
 * ptx_sm90.cuh. Operands in shared memory are matrix descriptors; where elements lie in registers
 * and in shared memory stands in descriptor.cuh.
 *
 * Between its issue and the wait for its group nobody may touch what a wgmma reads or writes: the
 * accumulators, A in registers, the tiles.
 */
#ifndef PBS_CUDA_PTX_WGMMA_CUH
#define PBS_CUDA_PTX_WGMMA_CUH

namespace pbs {
namespace ptx {

/* Orders this warpgroup's earlier accesses to accumulators and A registers before the next wgmma;
 * needed before the first one after such accesses. 9.7.15.7.1 */
PBS_DEVICE void wgmma_fence() { PBS_ASM_SM90("wgmma.fence.sync.aligned;" ::: "memory"); }

/* Closes a group. 9.7.15.7.2 */
PBS_DEVICE void wgmma_commit() { PBS_ASM_SM90("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* Waits until at most `pending` groups are under way. Then fence_registers on what the finished
 * ones wrote. 9.7.15.7.3 */
template <int pending> PBS_DEVICE void wgmma_wait() {
    PBS_ASM_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* No instruction: tells the compiler that registers change here. It knows nothing of the wait that
 * defines an accumulator and would move arithmetic on it above that wait. */
template <int count> PBS_DEVICE void fence_registers(float (&r)[count]) {
    PBS_UNROLL
    for (int i = 0; i < count; i++) PBS_ASM_SM90("" : "+f"(r[i])::"memory");
}
template <int count> PBS_DEVICE void fence_registers(uint32_t (&r)[count]) {
    PBS_UNROLL
    for (int i = 0; i < count; i++) PBS_ASM_SM90("" : "+r"(r[i])::"memory");
}

/* d[64, N] = A[64, 16] B[16, N] + (accumulate ? d : 0) in fp32, N = 64, 96, 128 or 256 by the size
 * of d (N / 2 elements a thread). T is bf16 or fp16; transpose_b = 1: B is MN-major. 9.7.15.5.2
 *   wgmma_ss<T, transpose_b>(d, a, b, accumulate)   A from shared memory, K-major
 *   wgmma_rs<T, transpose_b>(d, a, b, accumulate)   A from a[0 .. 3]: of an array that keeps
 *                                                   its values until the wait */
#define PBS_R32                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "           \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define PBS_R48                                                            \
    PBS_R32 ", "                                                           \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
            "%44, %45, %46, %47"
#define PBS_R64                                                            \
    PBS_R48 ", "                                                           \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
            "%60, %61, %62, %63"
#define PBS_R128                                                                       \
    PBS_R64 ", "                                                                       \
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "             \
            "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, "             \
            "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "             \
            "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
            "%124, %125, %126, %127"
#define PBS_D8(i)                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define PBS_D16(i) PBS_D8(i), PBS_D8(i + 8)
#define PBS_D32 PBS_D16(0), PBS_D16(16)
#define PBS_D48 PBS_D32, PBS_D16(32)
#define PBS_D64 PBS_D48, PBS_D16(48)
#define PBS_D128 PBS_D64, PBS_D16(64), PBS_D16(80), PBS_D16(96), PBS_D16(112)

/* n columns, c = n / 2 registers; c0 .. c6 are the numbers c, c + 1, ... of the operands behind the
 * accumulators. */
#define PBS_WGMMA_SS(n, c, c0, c1, c2, c3, type)                                               \
    PBS_ASM_SM90("{\n"                                                                         \
                 ".reg .pred p;\n"                                                             \
                 "setp.ne.b32 p, %" #c2 ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PBS_R##c \
                 "}, %" #c0 ", %" #c1 ", p, 1, 1, 0, %" #c3 ";\n"                              \
                 "}"                                                                           \
                 : PBS_D##c                                                                    \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(transpose_b)                           \
                 : "memory")
#define PBS_WGMMA_RS(n, c, c0, c1, c2, c3, c4, c5, c6, type)                                   \
    PBS_ASM_SM90("{\n"                                                                         \
                 ".reg .pred p;\n"                                                             \
                 "setp.ne.b32 p, %" #c5 ", 0;\n"                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" PBS_R##c \
                 "}, {%" #c0 ", %" #c1 ", %" #c2 ", %" #c3 "}, %" #c4 ", p, 1, 1, %" #c6 ";\n" \
                 "}"                                                                           \
                 : PBS_D##c                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),        \
                   "n"(transpose_b)                                                            \
                 : "memory")
#define PBS_WGMMA(n, c, c0, c1, c2, c3, c4, c5, c6)                                         \
    template <class T, int transpose_b>                                                     \
    PBS_DEVICE void wgmma_ss(float(&d)[c], uint64_t a, uint64_t b, int accumulate) {        \
        if constexpr (is_bf16<T>)                                                           \
            PBS_WGMMA_SS(n, c, c0, c1, c2, c3, "bf16");                                     \
        else                                                                                \
            PBS_WGMMA_SS(n, c, c0, c1, c2, c3, "f16");                                      \
    }                                                                                       \
    template <class T, int transpose_b>                                                     \
    PBS_DEVICE void wgmma_rs(float(&d)[c], const uint32_t *a, uint64_t b, int accumulate) { \
        if constexpr (is_bf16<T>)                                                           \
            PBS_WGMMA_RS(n, c, c0, c1, c2, c3, c4, c5, c6, "bf16");                         \
        else                                                                                \
            PBS_WGMMA_RS(n, c, c0, c1, c2, c3, c4, c5, c6, "f16");                          \
    }

template <class T> inline constexpr bool is_bf16 = false;
template <> inline constexpr bool is_bf16<bf16> = true;

PBS_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
PBS_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
PBS_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
PBS_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef PBS_WGMMA
#undef PBS_WGMMA_RS
#undef PBS_WGMMA_SS
#undef PBS_D128
#undef PBS_D64
#undef PBS_D48
#undef PBS_D32
#undef PBS_D16
#undef PBS_D8
#undef PBS_R128
#undef PBS_R64
#undef PBS_R48
#undef PBS_R32

} // namespace ptx
} // namespace pbs

#endif /* PBS_CUDA_PTX_WGMMA_CUH */
