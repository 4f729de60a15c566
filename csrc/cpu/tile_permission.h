/* SPDX-License-Identifier: Apache-2.0 */
#ifndef PBS_CPU_TILE_PERMISSION_H
#define PBS_CPU_TILE_PERMISSION_H

/* Why this process cannot use AMX-BF16 tiles beside AVX-512, as part of a sentence; NULL: it can.
 * The first call asks the system for them, for the whole process and its children. */
const char *pbs_tiles_missing(void);

#endif /* PBS_CPU_TILE_PERMISSION_H */
