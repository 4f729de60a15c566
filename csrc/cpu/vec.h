/* SPDX-License-Identifier: Apache-2.0
 *
 * The vector vocabulary of the kernel skeletons (kernel/). An isa_*.c file defines one of
 * VEC_AVX2, VEC_AVX512, VEC_EMU (the lanes of an emulated unit: 8 or 16) and, where the unit
 * multiplies pairs of bf16, VEC_PAIRS; then it includes the skeletons. Each vocabulary defines
 *
 *   VL         fp32 lanes of a vector
 *   TILE_ROWS  rows of the register tile TILE_ROWS x 2 vectors. Rows that are left over run in
 *              tiles of 4, so row counts are padded to a multiple of TILE_ROWS - 4
 *   vf         a vector of VL floats
 *
 *   vf_zero vf_set1 vf_broadcast(address)     vf_load vf_store (any alignment)
 *   vf_add vf_sub vf_mul vf_max               x op y; vf_max(x, y) is y if either is NaN
 *   vf_fma(a, b, c) = a * b + c
 *   vf_hmax vf_hadd                           across lanes, always in the same order
 *   vf_split(v, &whole)                       v - floor(v), and what vf_ldexp wants of floor(v)
 *   vf_ldexp(p, whole)                        p * 2^floor(v), exactly 0 for v < -126
 *   vf_transpose(rows)                        VL x VL words in place
 *   vf_load_as vf_store_as(dtype, at, n)      the first min(n, VL) elements, widened and rounded to
 *                                             nearest even; the lanes beyond load as 0
 *
 * and with VEC_PAIRS, where a word is two bf16, the lower half first,
 *
 *   vf_dot2(acc, a, b)                        acc + a.lo * b.lo + a.hi * b.hi
 *   vf_to_pairs(x, y)                         2 VL floats as bf16 in order
 *   vf_pair_of_ones()
 *   vf_load_pairs(x, y, n)                    word i is element i of row x and element i of row y
 *
 * VEC_TILES: there are tiles too (tiles.h), and attend runs on them. They want pairs and 16 lanes.
 */
#ifndef PBS_CPU_VEC_H
#define PBS_CPU_VEC_H

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/geometry.h"
#include "cpu/kernels.h"

#define INLINE static inline __attribute__((always_inline))

#define NOINLINE static __attribute__((noinline))

#if defined(VEC_EMU) /* speed is no aim there, small code is */
#define UNROLL
#define UNROLL_4
#elif defined(__clang__)
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

#if defined(VEC_AVX2)
#include "cpu/vec_avx2.h"
#elif defined(VEC_AVX512)
#include "cpu/vec_avx512.h"
#else
#include "cpu/vec_emu.h"
#endif

#ifndef VEC_PAIRS
#define VEC_PAIRS 0
#endif
#ifndef VEC_TILES
#define VEC_TILES 0
#endif

enum { GROUP = 2 * VL }; /* keys or columns that a panel group holds: a tile is this wide */

INLINE size_t dtype_bytes(pbs_dtype dtype) { return dtype == PBS_DTYPE_FP32 ? 4 : 2; }

/* Address of row i; see pbs_rows. */
INLINE const char *row_at(const pbs_rows *rows, int64_t i, size_t bytes) {
    int64_t row = rows->index ? rows->index[i] : i;
    return (const char *)rows->base + row * rows->stride * (int64_t)bytes;
}

INLINE int32_t round_up(int32_t a, int32_t step) { return (a + step - 1) / step * step; }

#endif /* PBS_CPU_VEC_H */
