/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_EMU 16
#define VEC_PAIRS 1
#define VEC_TILES 1

#include "cpu/kernel/table.h"

static int runs_here(void) { return 1; }

static int takes(pbs_dtype dtype) { return dtype == PBS_DTYPE_BF16; }

const pbs_cpu_kernels pbs_kernels_emu_amx =
    KERNEL_TABLE(PBS_ISA_EMU_AMX, "emu_amx", runs_here, takes);
