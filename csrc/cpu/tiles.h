/* SPDX-License-Identifier: Apache-2.0
 *
 * The tile vocabulary of kernel/attend_tiles.h: a unit with eight tiles of 16 rows x 64 bytes, as
 * AMX has. With VEC_EMU the unit is plain C (tiles_emu.h), else the core's own (tiles_amx.h).
 *
 *   tile_unit                               the eight tiles; `unit` below points to one
 *   TILE_LOAD(unit, tile, at, stride)       16 rows of 64 bytes, `stride` bytes apart
 *   TILE_LOAD_ONCE(unit, tile, at, stride)  the same, of data that no cache near the core need keep
 *   TILE_STORE(unit, tile, at, stride)
 *   TILE_ZERO(unit, tile)
 *   TILE_DOT(unit, c, a, b)                 c[m][n] += sum over k < 16 of a[m][k] . b[k][n]
 *                                           words of a and b are pairs of bf16, of c they are fp32
 *   tiles_enter(saved), tiles_leave(saved)  around all of the above, on every thread; 64 bytes
 *
 * `tile`, c, a and b are literal numbers 0 to 7: AMX encodes them in the instruction. TILE_DOT
 * rounds to nearest even and takes denormals for zeros, whatever MXCSR says; 0 * inf is NaN.
 */
#ifndef PBS_CPU_TILES_H
#define PBS_CPU_TILES_H

#if defined(VEC_EMU)
#include "cpu/tiles_emu.h"
#else
#include "cpu/tiles_amx.h"
#endif

#endif /* PBS_CPU_TILES_H */
