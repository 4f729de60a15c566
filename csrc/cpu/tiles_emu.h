/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of tiles.h in portable C: tiles in an array, TDPBF16PS as Intel's manual spells it
 * out, bit for bit. It runs the tile kernels on any machine and under the sanitizers, which see
 * every byte that is loaded; of the assembler's they see none.
 */
#ifndef PBS_CPU_TILES_EMU_H
#define PBS_CPU_TILES_EMU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cpu/convert.h"

enum { TMM_ROWS = 16, TMM_BYTES = 64 /* of a row */, TMM_WORDS = TMM_BYTES / 4 };

typedef struct emu_tile {
    uint32_t word[TMM_ROWS][TMM_WORDS];
} emu_tile;

typedef struct tile_unit {
    emu_tile tile[8];
} tile_unit;

#define TILE_LOAD(unit, number, at, stride) emu_tile_load(&(unit)->tile[number], at, stride)
#define TILE_LOAD_ONCE TILE_LOAD
#define TILE_STORE(unit, number, at, stride) emu_tile_store(&(unit)->tile[number], at, stride)
#define TILE_ZERO(unit, number) memset(&(unit)->tile[number], 0, sizeof(emu_tile))
#define TILE_DOT(unit, c, a, b) emu_tile_dot(&(unit)->tile[c], &(unit)->tile[a], &(unit)->tile[b])

static inline void emu_tile_load(emu_tile *tile, const void *at, ptrdiff_t stride) {
    for (int r = 0; r < TMM_ROWS; r++) memcpy(tile->word[r], (const char *)at + r * stride, 64);
}

static inline void emu_tile_store(const emu_tile *tile, void *at, ptrdiff_t stride) {
    for (int r = 0; r < TMM_ROWS; r++) memcpy((char *)at + r * stride, tile->word[r], 64);
}

/* A denormal is 0; its sign stays. */
static inline float emu_no_denormal(uint32_t bits) {
    return pbs_float_from_bits(bits & 0x7f800000u ? bits : bits & 0x80000000u);
}

/* x * y + z rounded once, for x and y with at most 12 significant bits, so that their product is
 * exact in double; the sum is then exact too, or one side is too small to move the other. What
 * would round to less than 2^-126, were exponents unbounded, is 0. */
static inline float emu_fma(float x, float y, float z) {
    const double sum = (double)x * (double)y + (double)z;
    const double least = 0x1p-126 - 0x1p-151;
    return sum < least && sum > -least ? (float)(0.0 * sum) : (float)sum;
}

static inline void emu_tile_dot(emu_tile *c, const emu_tile *a, const emu_tile *b) {
    float low[TMM_ROWS][TMM_WORDS], high[TMM_ROWS][TMM_WORDS]; /* halves of b */
    for (int k = 0; k < TMM_ROWS; k++)
        for (int n = 0; n < TMM_WORDS; n++) {
            low[k][n] = emu_no_denormal(b->word[k][n] << 16);
            high[k][n] = emu_no_denormal(b->word[k][n] & 0xffff0000u);
        }
    for (int m = 0; m < TMM_ROWS; m++) {
        float even[TMM_WORDS] = {0.0f}, odd[TMM_WORDS] = {0.0f}; /* one chain for each half */
        for (int k = 0; k < TMM_WORDS; k++) {
            const float x = emu_no_denormal(a->word[m][k] << 16);
            const float y = emu_no_denormal(a->word[m][k] & 0xffff0000u);
            for (int n = 0; n < TMM_WORDS; n++) {
                even[n] = emu_fma(x, low[k][n], even[n]);
                odd[n] = emu_fma(y, high[k][n], odd[n]);
            }
        }
        for (int n = 0; n < TMM_WORDS; n++) {
            const float pair = emu_fma(even[n], 1.0f, odd[n]);
            const float sum = emu_fma(pair, 1.0f, emu_no_denormal(c->word[m][n]));
            c->word[m][n] = pbs_bits_of_float(sum);
        }
    }
}

static inline void tiles_enter(void *saved) { (void)saved; }
static inline void tiles_leave(const void *saved) { (void)saved; }

#endif /* PBS_CPU_TILES_EMU_H */
