/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_EMU 16
#define VEC_PAIRS 1
#define VEC_TEST test_vec_emu_avx512bf16
#define VEC_TEST_ISA PBS_ISA_EMU_AVX512_BF16

#include "vec_test.h"
#include "vec_ops.inc"
