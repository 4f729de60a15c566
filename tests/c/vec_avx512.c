/* SPDX-License-Identifier: Apache-2.0 */
#define VEC_AVX512
#define VEC_TEST test_vec_avx512
#define VEC_TEST_ISA PBS_ISA_AVX512

#include "vec_test.h"
#include "vec_ops.inc"
