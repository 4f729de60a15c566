/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>

#include "core/random.h"
#include "harness.h"

static pbs_score_params params_of(const problem *p, pbs_order order) {
    pbs_score_params s = PBS_INIT(pbs_score_params);
    s.q = p->q;
    s.k = p->k;
    s.geometry = p->geometry;
    s.softmax_scale = p->scale;
    s.block_size = p->block;
    s.segment_size = p->segment;
    s.gqa = p->gqa;
    s.order = order;
    s.seed = 42;
    s.exec.isa = p->isa;
    return s;
}

static float *run_with(const problem *p, pbs_order order, int32_t threads) {
    pbs_score_params s = params_of(p, order);
    s.exec.num_threads = threads;
    size_t count = (size_t)p->batch * (size_t)problem_heads_p(p) * (size_t)p->seqlen_k;
    RUN(pbs_score_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    s.score = (float *)filled(count * sizeof(float), 0xff);
    RUN(pbs_score(&s));
    free(s.workspace);
    return s.score;
}

static float *run(const problem *p, pbs_order order) { return run_with(p, order, 1); }

/* Rows of the probe, and whether they are averaged before the softmax. */
static int32_t probe_of(const problem *p, pbs_order order, int32_t b, int32_t hp, int32_t *probe) {
    int32_t len = p->q_len[b], count = len < p->block ? len : p->block;
    if (order == PBS_ORDER_MEAN_QUERY) count = len;
    if (order == PBS_ORDER_RANDOM_QUERY) {
        probe[0] = pbs_random_row(42, hp, len);
        return 1;
    }
    for (int32_t i = 0; i < count; i++) probe[i] = len - count + i;
    return count;
}

static void compare(const problem *p, pbs_order order) {
    float *score = run(p, order);
    double *expected = (double *)filled((size_t)p->seqlen_k * sizeof(double), 0);
    int32_t *probe = (int32_t *)filled((size_t)(p->seqlen_q + 1) * sizeof(int32_t), 0);
    double limit = 2e-5; /* for every instruction set: scores are made in fp32 */
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t hp = 0; hp < problem_heads_p(p); hp++) {
            const float *got =
                score + ((size_t)b * (size_t)problem_heads_p(p) + (size_t)hp) * (size_t)p->seqlen_k;
            if (order == PBS_ORDER_RANDOM)
                for (int32_t j = 0; j < p->seqlen_k; j++)
                    expected[j] = j < p->kv_len[b] / p->segment * p->segment
                                      ? (double)pbs_random_score(42, hp, j)
                                      : 0.0;
            else if (p->q_len[b] == 0)
                for (int32_t j = 0; j < p->seqlen_k; j++) expected[j] = 0.0;
            else
                brute_score(p, b, hp, probe, probe_of(p, order, b, hp, probe),
                            order == PBS_ORDER_MEAN_QUERY, expected);
            for (int32_t j = 0; j < p->seqlen_k; j++)
                CHECK(fabs((double)got[j] - expected[j]) <= limit * expected[j] + 1e-12,
                      "%s dtype %d order %d Nk %d [%d, %d, %d]: %g, not %g", pbs_isa_name(p->isa),
                      (int)p->dtype, (int)order, p->seqlen_k, b, hp, j, (double)got[j],
                      expected[j]);
        }
    free(score);
    free(expected);
    free(probe);
}

/* 128 rows and 17,500 keys are more than one thread keeps between the passes, less than two do:
 * what is computed again must be what was kept, to the last bit. */
static void kept_or_computed_again(pbs_isa isa, pbs_dtype dtype) {
    problem p = {.batch = 1, .heads_q = 2, .heads_k = 1, .head_dim = 8};
    p.seqlen_q = 128;
    p.seqlen_k = 17500;
    p.block = 128;
    p.segment = 256;
    p.dtype = dtype;
    p.isa = isa;
    problem_make(&p, 7);
    float *once = run_with(&p, PBS_ORDER_LAST_BLOCK, 2), *again = run(&p, PBS_ORDER_LAST_BLOCK);
    for (int32_t j = 0; j < 2 * p.seqlen_k; j++)
        CHECK(once[j] == again[j], "%s key %d: %.9g kept, %.9g computed again", pbs_isa_name(isa),
              j, (double)once[j], (double)again[j]);
    free(once);
    free(again);
    problem_free(&p);
}

void test_score(void) {
    static const int32_t lengths[] = {1, 63, 64, 127, 128, 129, 257, 641};
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++)
            for (size_t n = grid_first(isas[i]); n < sizeof lengths / sizeof *lengths;
                 n += grid_step(isas[i])) {
                problem p = {.batch = 1, .heads_q = 3, .heads_k = 1, .head_dim = 24};
                p.seqlen_q = lengths[n] < 150 ? lengths[n] : 77;
                p.seqlen_k = lengths[n];
                p.block = 64;
                p.segment = 128;
                p.dtype = (pbs_dtype)dtype;
                p.isa = isas[i];
                p.gqa = n % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
                p.layout = (layout)(n % 3);
                problem_make(&p, n);
                compare(&p, (pbs_order)(n % 4));
                compare(&p, PBS_ORDER_LAST_BLOCK);
                problem_free(&p);
            }
        for (int i = 0; i < count; i++) /* emulated: once, where the grid is not thinned */
            if (!is_emulated(isas[i]) || (grid_step(isas[i]) == 3 && dtype == PBS_DTYPE_BF16))
                kept_or_computed_again(isas[i], (pbs_dtype)dtype);
    }
    problem p = {.batch = 3, .heads_q = 4, .heads_k = 2, .seqlen_q = 90, .seqlen_k = 300};
    p.head_dim = 16;
    p.block = 64;
    p.segment = 128;
    p.dtype = widest_dtype();
    pbs_isa isas[PBS_ISA_COUNT];
    available_isas(p.dtype, isas);
    p.isa = isas[0];
    p.has_geometry = 1;
    const int32_t geometry[4][3] = {{5, 0, 89}, {80, 0, 1}, {3, 40, 0}, {290, 257, 127}};
    for (int b = 0; b < 3; b++) {
        p.q_start[b] = geometry[0][b];
        p.q_len[b] = geometry[1][b];
        p.kv_start[b] = geometry[2][b];
        p.kv_len[b] = geometry[3][b];
    }
    for (int order = 0; order < 4; order++) {
        p.gqa = order % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        problem_make(&p, 99);
        compare(&p, (pbs_order)order);
        problem_free(&p);
    }
}
