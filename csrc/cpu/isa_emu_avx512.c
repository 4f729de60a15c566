/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_EMU 16

#include "cpu/kernel/table.h"

static int runs_here(void) { return 1; }

static int takes(pbs_dtype dtype) {
    (void)dtype;
    return 1;
}

const pbs_cpu_kernels pbs_kernels_emu_avx512 =
    KERNEL_TABLE(PBS_ISA_EMU_AVX512, "emu_avx512", runs_here, takes);
