/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX512

#include "cpu/kernel/table.h"

static int runs_here(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int takes(pbs_dtype dtype) {
    (void)dtype;
    return 1;
}

const pbs_cpu_kernels pbs_kernels_avx512 = KERNEL_TABLE(PBS_ISA_AVX512, "avx512", runs_here, takes);
