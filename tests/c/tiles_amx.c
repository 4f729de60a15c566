/* SPDX-License-Identifier: Apache-2.0
 *
 * The core's own tiles, where it has them.
 */
#include "cpu/tile_permission.h"
#include "tile_ops.h"

#if defined(__x86_64__)

#include "cpu/tiles_amx.h"
#include "tile_ops.inc"

const tile_ops tiles_of_amx = {"amx", pbs_tiles_missing, copy, zero, dot, tiles_enter, tiles_leave};

#else

const tile_ops tiles_of_amx = {.name = "amx", .missing = pbs_tiles_missing};

#endif
