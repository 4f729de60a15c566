/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX2

#include <cpuid.h>

#include "cpu/kernel/table.h"

/* AVX2 also says that the system keeps the registers; __builtin_cpu_supports of older compilers
 * does not know F16C. */
static int runs_here(void) {
    unsigned eax, ebx, ecx = 0, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (ecx & bit_F16C);
}

static int takes(pbs_dtype dtype) {
    (void)dtype;
    return 1;
}

const pbs_cpu_kernels pbs_kernels_avx2 = KERNEL_TABLE(PBS_ISA_AVX2, "avx2", runs_here, takes);
