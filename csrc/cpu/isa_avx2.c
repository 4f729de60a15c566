/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX2

#include "cpu/kernel/table.h"

static int runs_here(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static int takes(pbs_dtype dtype) { (void)dtype; return 1; }

const pbs_cpu_kernels pbs_kernels_avx2 = KERNEL_TABLE(PBS_ISA_AVX2, "avx2", runs_here, takes);
