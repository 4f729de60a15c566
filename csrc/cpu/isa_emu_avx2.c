/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_EMU 8

#include "cpu/kernel/table.h"

static int runs_here(void) { return 1; }

static int takes(pbs_dtype dtype) {
    (void)dtype;
    return 1;
}

const pbs_cpu_kernels pbs_kernels_emu_avx2 =
    KERNEL_TABLE(PBS_ISA_EMU_AVX2, "emu_avx2", runs_here, takes);
