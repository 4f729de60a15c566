/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of tiles.h in AMX-TILE and AMX-BF16. Assembler and not intrinsics: gcc 12 does not
 * know that _tile_loadd reads memory, and deletes the stores of what it should load. volatile keeps
 * all of them in order, "memory" keeps them between the C loads and stores around them; no compiler
 * flag is needed and no vector register is touched. The compiler itself never uses tiles.
 */
#ifndef PBS_CPU_TILES_AMX_H
#define PBS_CPU_TILES_AMX_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { TMM_ROWS = 16, TMM_BYTES = 64 /* of a row */ };

typedef struct tile_unit {
    char in_the_core;
} tile_unit;

#define TMM_NAME(tile) "%%tmm" #tile
#define TMM(tile) TMM_NAME(tile) /* of a macro's value, too */

#define TMM_MEMORY(operation, unit, at, stride)                                       \
    do {                                                                              \
        (void)(unit);                                                                 \
        __asm__ volatile(operation : : "r"(at), "r"((ptrdiff_t)(stride)) : "memory"); \
    } while (0)

#define TILE_LOAD(unit, tile, at, stride) \
    TMM_MEMORY("tileloadd (%0,%1,1), " TMM(tile), unit, at, stride)
#define TILE_LOAD_ONCE(unit, tile, at, stride) \
    TMM_MEMORY("tileloaddt1 (%0,%1,1), " TMM(tile), unit, at, stride)
#define TILE_STORE(unit, tile, at, stride) \
    TMM_MEMORY("tilestored " TMM(tile) ", (%0,%1,1)", unit, at, stride)

#define TILE_ZERO(unit, tile)                      \
    do {                                           \
        (void)(unit);                              \
        __asm__ volatile("tilezero " TMM(tile)::); \
    } while (0)

#define TILE_DOT(unit, c, a, b)                                          \
    do {                                                                 \
        (void)(unit);                                                    \
        __asm__ volatile("tdpbf16ps " TMM(b) ", " TMM(a) ", " TMM(c)::); \
    } while (0)

/* What LDTILECFG reads and STTILECFG writes. Palette 0: tiles are not in use. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

_Static_assert(sizeof(tile_config) == 64, "LDTILECFG reads 64 bytes");

/* The owner of this thread may have tiles of another shape: oneDNN keeps its own from call to call
 * and does not look again. Their contents are lost, as in any call. */
static inline void tiles_enter(void *saved) {
    tile_config ours = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        ours.row_bytes[tile] = TMM_BYTES;
        ours.rows[tile] = TMM_ROWS;
    }
    __asm__ volatile("sttilecfg (%0)" : : "r"(saved) : "memory");
    __asm__ volatile("ldtilecfg (%0)" : : "r"(&ours) : "memory");
}

static inline void tiles_leave(const void *saved) {
    if (*(const uint8_t *)saved == 0)
        __asm__ volatile("tilerelease" ::: "memory");
    else
        __asm__ volatile("ldtilecfg (%0)" : : "r"(saved) : "memory");
}

#endif /* PBS_CPU_TILES_AMX_H */
