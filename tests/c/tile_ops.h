/* SPDX-License-Identifier: Apache-2.0
 *
 * The tile vocabulary (csrc/cpu/tiles.h) as functions, so that one test tries every implementation.
 */
#ifndef PBS_TEST_TILE_OPS_H
#define PBS_TEST_TILE_OPS_H

#include <stddef.h>

/* Rows of 64 bytes, stride bytes apart. */
typedef struct rows64 {
    char *at;
    ptrdiff_t stride;
} rows64;

typedef struct tile_ops {
    const char *name;
    const char *(*missing)(void); /* NULL: it runs here */
    /* Tile number `tile`: 16 rows in and out; or zeros out. */
    void (*copy)(int tile, rows64 to, rows64 from, int once);
    void (*zero)(int tile, rows64 to);
    /* The kernel's own use of tiles: c [32][2] += a [32] . b [16][2], tiles side by side. */
    void (*dot)(rows64 c, rows64 a, rows64 b);
    /* Of the thread's tile configuration; 64 bytes. */
    void (*enter)(void *saved);
    void (*leave)(const void *saved);
} tile_ops;

extern const tile_ops tiles_in_c, tiles_of_amx;

#endif /* PBS_TEST_TILE_OPS_H */
