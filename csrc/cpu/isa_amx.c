/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX512
#define VEC_PAIRS 1
#define VEC_TILES 1

#include "cpu/kernel/table.h"
#include "cpu/tile_permission.h"

static int runs_here(void) { return pbs_tiles_missing() == NULL; }

/* Tiles multiply bf16. fp32 and fp16 run on AVX-512. */
static int takes(pbs_dtype dtype) { return dtype == PBS_DTYPE_BF16; }

const pbs_cpu_kernels pbs_kernels_amx = KERNEL_TABLE(PBS_ISA_AMX, "amx", runs_here, takes);
