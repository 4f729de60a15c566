/* SPDX-License-Identifier: Apache-2.0
 *
 * One vector vocabulary (cpu/vec.h) and its softmax, callable on arrays: vec_*.c define VEC_* as
 * the isa_*.c of that name do, then include this. test_numerics.c judges what comes out.
 */
#ifndef PBS_TEST_VEC_TEST_H
#define PBS_TEST_VEC_TEST_H

#include "pbs/pbs.h"

enum { MOST_LANES = 16 };

/* A row of scores in log2 units, panel by panel, and the running state that it leaves. */
typedef struct softmax_run {
    const float *scores; /* [panels][keys], keys a multiple of 32 */
    int panels, keys;
    float bias;    /* on top of every score */
    float row_max; /* in: where it starts */
    float row_sum[MOST_LANES], row_weight[MOST_LANES];
    float acc_o[MOST_LANES]; /* every lane: the probabilities, as the product with V sees them */
} softmax_run;

/* n is a multiple of 16. */
typedef struct vec_test {
    pbs_isa isa;
    int lanes, pairs;
    void (*exp2)(int degree, const float *v, float *power, int64_t n);
    void (*load)(pbs_dtype dtype, const void *from, float *to, int64_t n);
    void (*store)(pbs_dtype dtype, const float *from, void *to, int64_t n);
    void (*softmax)(int degree, softmax_run *run);
} vec_test;

#ifdef VEC_TEST

#include "cpu/kernel/softmax.h"

static void test_exp2(int degree, const float *v, float *power, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        const vf x = vf_load(v + i);
        vf_store(power + i, degree == EXP2_COARSE ? vf_exp2(EXP2_COARSE, x)
                            : degree == EXP2_FINE ? vf_exp2(EXP2_FINE, x)
                                                  : vf_exp2(EXP2_FINEST, x));
    }
}

static void test_load(pbs_dtype dtype, const void *from, float *to, int64_t n) {
    const char *at = (const char *)from;
    for (int64_t i = 0; i < n; i += VL)
        vf_store(to + i, vf_load_as(dtype, at + (size_t)i * dtype_bytes(dtype), n - i));
}

static void test_store(pbs_dtype dtype, const float *from, void *to, int64_t n) {
    char *at = (char *)to;
    for (int64_t i = 0; i < n; i += VL)
        vf_store_as(dtype, at + (size_t)i * dtype_bytes(dtype), n - i, vf_load(from + i));
}

static void test_softmax(int degree, softmax_run *run) {
    float row[PBS_MAX_PANEL_KEYS];
    const softmax_state state = {.row_max = &run->row_max,
                                 .row_sum = run->row_sum,
                                 .row_weight = VEC_PAIRS ? run->row_weight : NULL,
                                 .acc_o = run->acc_o,
                                 .columns = VL,
                                 .scale_log2 = 1.0f};
    for (int panel = 0; panel < run->panels; panel++) {
        memcpy(row, run->scores + panel * run->keys, (size_t)run->keys * sizeof *row);
        softmax_rows(VEC_PAIRS, degree == EXP2_COARSE ? EXP2_COARSE : EXP2_FINE, &state, run->bias,
                     0, 1, row, run->keys, run->keys);
        vf acc = vf_load(run->acc_o);
#if VEC_PAIRS
        for (int i = 0; i < run->keys / 2; i++)
            acc = vf_dot2(acc, vf_broadcast(row + i), vf_pair_of_ones());
#else
        for (int i = 0; i < run->keys; i++) acc = vf_fma(vf_broadcast(row + i), vf_set1(1.0f), acc);
#endif
        vf_store(run->acc_o, acc);
    }
}

extern const vec_test VEC_TEST;

const vec_test VEC_TEST = {.isa = VEC_TEST_ISA,
                           .lanes = VL,
                           .pairs = VEC_PAIRS,
                           .exp2 = test_exp2,
                           .load = test_load,
                           .store = test_store,
                           .softmax = test_softmax};

#endif /* VEC_TEST */

#endif /* PBS_TEST_VEC_TEST_H */
