/* SPDX-License-Identifier: Apache-2.0
 *
 * Words of CUDA C++ that need no machine: qualifiers, vector types, min and max; and where a thread
 * finds its indices.
 */
#ifndef EMU_WORDS_H
#define EMU_WORDS_H

#include <math.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define EMU_VECTOR(T, name, bytes2, bytes4)                           \
    struct alignas(bytes2) name##2 {                                  \
        T x, y;                                                       \
    };                                                                \
    struct alignas(bytes4) name##4 {                                  \
        T x, y, z, w;                                                 \
    };                                                                \
    static inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(int, int, 8, 16)
EMU_VECTOR(unsigned, uint, 8, 16)
EMU_VECTOR(float, float, 8, 16)
EMU_VECTOR(unsigned short, ushort, 4, 8)
EMU_VECTOR(unsigned long long, ulonglong, 16, 16)
#undef EMU_VECTOR

/* The overloads of the CUDA headers, mixed signs included. */
#define EMU_MIN_MAX(T, A, B)                                                                  \
    static inline T min(A a, B b) {                                                           \
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
    }                                                                                         \
    static inline T max(A a, B b) {                                                           \
        return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
    }
EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(unsigned, unsigned, int)
EMU_MIN_MAX(long, long, long)
EMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMU_MIN_MAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

namespace emu {

struct indices {
    dim3 thread, block, block_dim, grid_dim;
    int lane;
};

/* Of the CUDA thread that runs on this OS thread. A fiber stays on its OS thread, so compilers may
 * keep the address of this variable; initial-exec saves a call in a shared library. */
extern __thread const indices *here __attribute__((tls_model("initial-exec")));

} // namespace emu

#define threadIdx (::emu::here->thread)
#define blockIdx (::emu::here->block)
#define blockDim (::emu::here->block_dim)
#define gridDim (::emu::here->grid_dim)
#define warpSize 32

#endif /* EMU_WORDS_H */
