/* SPDX-License-Identifier: Apache-2.0
 *
 * The vector vocabulary (csrc/cpu/vec.h) as functions on memory, so that one test tries every
 * implementation of it.
 */
#ifndef PBS_TEST_VEC_OPS_H
#define PBS_TEST_VEC_OPS_H

#include <stdint.h>

#include "vec_test.h"

typedef struct vec_ops {
    pbs_isa isa; /* whose kernels are made of it: it runs where they do */
    int lanes, pairs;
    void (*set1)(float *to, float x);
    void (*broadcast)(float *to, const float *at);
    void (*add)(float *to, const float *x, const float *y);
    void (*sub)(float *to, const float *x, const float *y);
    void (*mul)(float *to, const float *x, const float *y);
    void (*max)(float *to, const float *x, const float *y);
    void (*fma)(float *to, const float *a, const float *b, const float *c);
    float (*hmax)(const float *x);
    float (*hadd)(const float *x);
    void (*split_ldexp)(float *fraction, float *power, const float *p, const float *v);
    void (*transpose)(float *rows);
    void (*load_as)(float *to, pbs_dtype dtype, const void *at, int64_t n);
    void (*store_as)(pbs_dtype dtype, void *at, int64_t n, const float *x);
    /* NULL without pairs */
    void (*dot2)(float *to, const float *acc, const float *a, const float *b);
    void (*to_pairs)(float *to, const float *x, const float *y);
    void (*pair_of_ones)(float *to);
    void (*load_pairs)(float *to, const void *x, const void *y, int64_t n);
} vec_ops;

extern const vec_ops test_vec_emu_avx2_ops, test_vec_emu_avx512_ops, test_vec_emu_avx512bf16_ops;
#if defined(__x86_64__)
extern const vec_ops test_vec_avx2_ops, test_vec_avx512_ops, test_vec_avx512bf16_ops;
#endif

#endif /* PBS_TEST_VEC_OPS_H */
