/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX512
#define VEC_PAIRS 1

#include "cpu/kernel/table.h"

static int runs_here(void) { return __builtin_cpu_supports("avx512bf16"); }

/* VDPBF16PS has twice the rate of an fp32 FMA on AMD and half of it on Intel. */
static int takes(pbs_dtype dtype) { return dtype == PBS_DTYPE_BF16 && !__builtin_cpu_is("intel"); }

const pbs_cpu_kernels pbs_kernels_avx512bf16 =
    KERNEL_TABLE(PBS_ISA_AVX512_BF16, "avx512bf16", runs_here, takes);
