/* SPDX-License-Identifier: Apache-2.0
 *
 * pbs_prefill is the four verbs, bit for bit: with any cap on a wave and at any place in a batch.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

static void test_modes(pbs_isa isa) {
    static const int32_t on[6] = {1, 0, 1, 1, 1, 0};
    static const float tau[6] = {0.9f, 0.2f, 0.5f, 1.0f, 0.7f, 0.0f};
    for (size_t mode = grid_first(isa); mode < 5; mode += grid_step(isa)) {
        problem p = three_sequences(isa, 330, 420);
        p.gqa = mode % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        problem_make(&p, mode);
        options o = {.mode = (pbs_permute_mode)mode, .order = (pbs_order)(mode % 4), .tau = 0.6f};
        o.method = mode == 2 || mode == 0 ? PBS_SELECT_ANTIDIAGONAL : PBS_SELECT_MEAN_POOL;
        o.normalize = mode == PBS_PERMUTE_KEYS ? PBS_NORMALIZE_ROW : PBS_NORMALIZE_HISTORY;
        if (p.gqa == PBS_GQA_PER_HEAD) {
            o.permute_heads = on;
            o.tau_heads = tau;
        }
        result expected = verbs(&p, o), whole = prefill(&p, o);
        check_same(&expected, &whole, "prefill against the verbs");
        drop_result(&whole);
        if (is_emulated(isa)) { /* waves are the drivers' business */
            drop_result(&expected);
            problem_free(&p);
            continue;
        }
        o.cap = 1; /* one K/V head at a time */
        result small = prefill(&p, o);
        check_same(&expected, &small, "one head a wave");
        o.order = PBS_ORDER_RANDOM; /* its numbers follow the head, not the wave */
        result one = prefill(&p, o), all = verbs(&p, o);
        check_same(&all, &one, "one head a wave, random order");
        o.cap = 300000;
        result some = prefill(&p, o);
        check_same(&all, &some, "some heads a wave");
        drop_result(&all);
        drop_result(&expected);
        drop_result(&small);
        drop_result(&one);
        drop_result(&some);
        problem_free(&p);
    }
}

/* tau = 1 keeps everything: the dense result, whatever the permutation. */
static void test_dense(pbs_isa isa) {
    for (size_t mode = grid_first(isa); mode < 5; mode += grid_step(isa)) {
        problem p = three_sequences(isa, 330, 420);
        p.dtype = PBS_DTYPE_FP32;
        problem_make(&p, 3);
        options o = {.mode = (pbs_permute_mode)mode, .tau = 1.0f};
        result r = prefill(&p, o);
        brute_attend_args a = {.block_q = 64, .block_k = 64, .heads_sel = 6, .own = PBS_OWN_ALL};
        pbs_view out = p.out;
        out.data = r.part[OUT];
        for (int32_t b = 0; b < 3; b++)
            for (int32_t h = 0; h < 6; h += 5)
                for (int32_t row = b; row < p.q_len[b]; row += 53) {
                    double expected[16], lse;
                    brute_attend_row(&p, &a, b, h, row, expected, &lse);
                    for (int32_t d = 0; d < 16; d++) {
                        double got = element(&out, b, h, p.q_start[b] + row, d);
                        CHECK(fabs(got - expected[d]) < 5e-6,
                              "mode %zu [%d, %d, %d, %d]: %g, not %g", mode, b, h, row, d, got,
                              expected[d]);
                    }
                }
        drop_result(&r);
        problem_free(&p);
    }
}

/* A sequence alone gives what it gives inside a batch. */
static void test_place_in_batch(pbs_isa isa) {
    problem p = three_sequences(isa, 330, 420);
    problem_make(&p, 12);
    options o = {.mode = PBS_PERMUTE_BOTH, .tau = 0.6f};
    result all = prefill(&p, o);
    for (int32_t b = 0; b < 3; b++) {
        problem one = p;
        one.batch = 1;
        one.geometry =
            (pbs_geometry){p.q_start + b, p.q_len + b, p.kv_start + b, p.kv_len + b, 0, 0};
        size_t size = 2, at = (size_t)b;
        one.q.data = (char *)p.q.data + (size_t)(b * p.q.stride[0]) * size;
        one.k.view.data = (char *)p.k.view.data + (size_t)(b * p.k.view.stride[0]) * size;
        one.v.view.data = (char *)p.v.view.data + (size_t)(b * p.v.view.stride[0]) * size;
        one.q.size[0] = one.k.view.size[0] = one.v.view.size[0] = 1;
        one.out.size[0] = one.lse.size[0] = 1;
        one.out_bytes = p.out_bytes / 3;
        result r = prefill(&one, o), same = r;
        for (int i = 0; i < PARTS; i++)
            if (r.part[i]) same.part[i] = (char *)all.part[i] + at * r.bytes[i];
        check_same(&same, &r, "a sequence alone");
        drop_result(&r);
    }
    drop_result(&all);
    problem_free(&p);
}

void test_prefill(void) {
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_BF16, isas);
    for (int i = 0; i < count; i++) {
        test_modes(isas[i]);
        if (!is_emulated(isas[i])) test_place_in_batch(isas[i]);
    }
    count = available_isas(PBS_DTYPE_FP32, isas);
    for (int i = 0; i < count; i++) test_dense(isas[i]);
}
