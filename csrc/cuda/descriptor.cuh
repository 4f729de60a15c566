/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the elements of a tile lie on Hopper: in shared memory (swizzle, matrix descriptor) and in
 * the registers of a warpgroup. Arithmetic alone, for host and device; the emulation computes with
 * the same functions and tests/emu/test_layouts.cc holds them against tables of the manual.
 * Sections are those of the PTX ISA 9.0. Elements have 16 bits, so a 16-byte chunk holds 8.
 */
#ifndef PBS_CUDA_DESCRIPTOR_CUH
#define PBS_CUDA_DESCRIPTOR_CUH

#include "../core/geometry.h"

namespace pbs {

/* How 16-byte chunks are exchanged within a tile; the values are the codes of a descriptor's bits
 * 62-63. 9.7.15.5.1.2.2 */
enum swizzle { SWIZZLE_NONE = 0, SWIZZLE_128B = 1, SWIZZLE_64B = 2, SWIZZLE_32B = 3 };

/* Bytes of one row of the pattern: as wide as a row of a K-major tile may be. */
PBS_HD constexpr uint32_t swizzle_width(swizzle mode) {
    return mode == SWIZZLE_128B ? 128 : mode == SWIZZLE_64B ? 64 : mode == SWIZZLE_32B ? 32 : 16;
}

/* The pattern's period: a tile starts on a multiple of it, so that no base offset is needed. */
PBS_HD constexpr uint32_t swizzle_period(swizzle mode) {
    return mode == SWIZZLE_NONE ? 16 : 8 * swizzle_width(mode);
}

/* Byte address before the exchange -> byte address after; its own inverse. Bits 4 to 6 are mixed
 * with bits 7 to 9: all three, two or one of them. 5.5.7 */
PBS_HD constexpr uint32_t swizzled(swizzle mode, uint32_t address) {
    return mode == SWIZZLE_NONE ? address
                                : address ^ ((address >> 3) & ((swizzle_width(mode) - 1) & 0x70));
}

/* What wgmma is told of a matrix in shared memory: its address and two strides, all multiples of
 * 16 bytes and below 2^18. 9.7.15.5.1.2.2. With rows of W = swizzle_width bytes:
 *
 *   K-major (Q, K: rows of D)      leading: unused           stride: 8 rows = 8 W
 *   MN-major (V: rows of keys, transpose flag)
 *                                  leading: next W/2 columns stride: next 8 keys = 8 W
 *   K-major without swizzle        leading: next 8 of k      stride: next 8 rows
 *   MN-major without swizzle       leading: next 8 of k      stride: next 8 columns
 */
PBS_HD constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                            swizzle mode) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
           static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(mode) << 62;
}

/* The same matrix `bytes` further on: the next step of k, the next stage. */
PBS_HD constexpr uint64_t descriptor_at(uint64_t descriptor, uint32_t bytes) {
    return descriptor + (bytes >> 4);
}

/* Byte offset, before the swizzle, of element (row, k) of a K-major matrix; row is m or n.
 * 9.7.15.5.1.2.1.3, canonical layouts */
PBS_HD constexpr uint32_t k_major_offset(swizzle mode, uint32_t leading, uint32_t stride,
                                         uint32_t row, uint32_t k) {
    return mode == SWIZZLE_NONE ? row % 8 * 16 + row / 8 * stride + k / 8 * leading + 2 * (k % 8)
                                : row % 8 * swizzle_width(mode) + row / 8 * stride + 2 * k;
}

/* Byte offset, before the swizzle, of element (n, k) of an MN-major matrix. */
PBS_HD constexpr uint32_t mn_major_offset(swizzle mode, uint32_t leading, uint32_t stride,
                                          uint32_t n, uint32_t k) {
    const uint32_t width = swizzle_width(mode), chunk = n / 8, chunks = width / 16;
    return mode == SWIZZLE_NONE ? k % 8 * 16 + chunk * stride + k / 8 * leading + 2 * (n % 8)
                                : chunk % chunks * 16 + chunk / chunks * leading + k % 8 * width +
                                      k / 8 * stride + 2 * (n % 8);
}

/* A tile of rows of D elements, cut into chunks as wide as the swizzle which lie one behind the
 * other, [chunk][row][width]: what boxes of a tensor map fill, one a chunk. Byte of an element
 * after the swizzle. rows is a multiple of 8. */
PBS_HD constexpr uint32_t tile_offset(swizzle mode, uint32_t rows, uint32_t row, uint32_t column) {
    const uint32_t width = swizzle_width(mode), chunk = width / 2;
    return swizzled(mode, column / chunk * rows * width + row * width + column % chunk * 2);
}

/* Such a tile as an operand of wgmma, 16 of k a step: how many bytes behind the first step j
 * begins. K-major (k are columns): inside a row of the chunk, then in the next chunk. */
PBS_HD constexpr uint32_t k_major_step(swizzle mode, uint32_t rows, uint32_t j) {
    const uint32_t width = swizzle_width(mode), chunk = width / 2;
    return 16 * j / chunk * rows * width + 16 * j % chunk * 2;
}

/* MN-major (k are rows, n columns): 16 rows further down. */
PBS_HD constexpr uint32_t mn_major_step(swizzle mode, uint32_t j) {
    return 16 * j * swizzle_width(mode);
}

/* Registers of a warpgroup, thread 0..127. An accumulator's element e (0 .. N/2 - 1) is this row of
 * 64 and this column of N; 9.7.15.5.1.1.1, figure 149. */
PBS_HD constexpr uint32_t accumulator_row(uint32_t thread, uint32_t e) {
    return thread / 32 * 16 + thread % 32 / 4 + 8 * (e / 2 % 2);
}
PBS_HD constexpr uint32_t accumulator_column(uint32_t thread, uint32_t e) {
    return e / 4 * 8 + thread % 4 * 2 + e % 2;
}

/* Element i (0..7, two to a register) of a 64 x 16 operand A in registers has accumulator_row(i)
 * and this column: elements 8 j .. 8 j + 7 of an accumulator are, packed in pairs, the operand of
 * step j. Figure 148 */
PBS_HD constexpr uint32_t operand_row(uint32_t thread, uint32_t i) {
    return accumulator_row(thread, i);
}
PBS_HD constexpr uint32_t operand_column(uint32_t thread, uint32_t i) {
    return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

} // namespace pbs

#endif /* PBS_CUDA_DESCRIPTOR_CUH */
