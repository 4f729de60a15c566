/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_EMU 8
#define VEC_TEST test_vec_emu_avx2
#define VEC_TEST_ISA PBS_ISA_EMU_AVX2

#include "vec_test.h"
#include "vec_ops.inc"
