/* SPDX-License-Identifier: Apache-2.0
 *
 * The C tests of the verbs (tests/c) on the emulated GPU: odd shapes against an fp64 brute force,
 * for the sanitizers too. Verbs may be named on the command line.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../c/harness.h"

void test_host_reads(void);

/* Values that no caller should pass: no host looks at a device's memory, so kernels must not read
 * or write outside the tensors whatever they find. The sanitizers watch; results mean nothing. */
static void fill_wrong(rng *r, int32_t *values, int64_t count, int32_t size) {
    static const int32_t edges[] = {INT32_MIN, INT32_MIN + 1, -1, 0, 1, INT32_MAX - 1, INT32_MAX};
    for (int64_t i = 0; i < count; i++)
        values[i] = rng_below(r, 2) ? edges[rng_below(r, 7)] : rng_below(r, 3 * size) - size;
}

/* attend over the packed rows of m, with an order of rows as wrong as everything else; with a
 * correction where m was made with one, which every own mode but ALL takes. */
static void attend_packed(const problem *p, const pbs_permute_params *m, const int32_t *q_perm,
                          uint64_t seed) {
    const pbs_own own = (pbs_own)(seed % 5);
    const int permutes_rows = own == PBS_OWN_SEGMENT || own == PBS_OWN_NONE || own == PBS_OWN_ALL;
    size_t words = (size_t)(p->batch * p->heads_q * problem_blocks_q(p) * problem_words(p));
    rng r = {seed};
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.packed = seed % 7 ? m->packed : NULL;
    s.packed_bytes = m->packed_bytes;
    s.correction = own == PBS_OWN_ALL ? PBS_CORRECTION_NONE : m->correction;
    uint32_t *bits = (uint32_t *)filled(words * sizeof *bits, 0);
    for (size_t i = 0; i < words; i++) bits[i] = rng_next(&r);
    s.bits = bits;
    s.q_perm = permutes_rows ? q_perm : NULL;
    s.geometry = p->geometry;
    s.block_q = s.block_k = p->block;
    s.segment_size = p->segment;
    s.own = own;
    s.out = p->out;
    s.lse = p->lse;
    RUN(pbs_attend_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_attend(&s));
    free(s.workspace);
    free(bits);
}

static void all_but_select(const problem *p, uint64_t seed, const int32_t *k_perm_in,
                           const int32_t *q_perm) {
    size_t heads = (size_t)p->batch * (size_t)p->heads_q, rows = (size_t)p->seqlen_q;
    pbs_score_params s = PBS_INIT(pbs_score_params);
    s.q = p->q;
    s.k = p->k;
    s.geometry = p->geometry;
    s.block_size = p->block;
    s.segment_size = p->segment;
    s.order = (pbs_order)(seed % 4);
    s.score = (float *)filled(heads * (size_t)p->seqlen_k * sizeof(float), 0);
    RUN(pbs_score_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_score(&s));
    pbs_permute_params m = PBS_INIT(pbs_permute_params);
    m.q = p->q;
    m.k = p->k;
    m.v = p->v;
    m.score = s.score;
    m.k_perm_in = k_perm_in;
    m.geometry = p->geometry;
    m.block_size = p->block;
    m.segment_size = p->segment;
    m.mode = PBS_PERMUTE_BOTH;
    m.correction = (pbs_correction)(seed % 2);
    m.q_perm = (int32_t *)filled(heads * rows * sizeof(int32_t), 0);
    RUN(pbs_kv_packed_bytes(&m, &m.packed_bytes));
    m.packed = aligned_alloc(64, (m.packed_bytes + 63) / 64 * 64);
    RUN(pbs_permute_workspace_size(&m, &m.workspace_bytes));
    m.workspace = filled(m.workspace_bytes, 0xff);
    RUN(pbs_permute(&m));
    attend_packed(p, &m, q_perm, seed);
    free(s.workspace);
    free(s.score);
    free(m.q_perm);
    free(m.packed);
    free(m.workspace);
}

static void select_blocks(const problem *p, pbs_select_method method, pbs_permute_mode mode,
                          const int32_t *k_perm, const int32_t *q_perm, const float *tau) {
    size_t heads = (size_t)p->batch * (size_t)p->heads_q;
    size_t rows = heads * (size_t)problem_blocks_q(p), blocks = (size_t)problem_blocks_k(p);
    pbs_select_params s = PBS_INIT(pbs_select_params);
    s.q = p->q;
    s.k = p->k;
    s.k_pool = (float *)filled(heads * blocks * (size_t)p->head_dim * sizeof(float), 0);
    s.k_perm = k_perm;
    s.q_perm = q_perm;
    s.tau_heads = tau;
    s.geometry = p->geometry;
    s.block_size = p->block;
    s.segment_size = p->segment;
    s.mode = mode;
    s.method = method;
    s.normalize = (pbs_normalize)(method == PBS_SELECT_ANTIDIAGONAL &&
                                  mode != PBS_PERMUTE_QUERIES && mode != PBS_PERMUTE_BOTH);
    s.stride = 8;
    s.rule = (pbs_rule)(q_perm[0] & 3);
    s.bits = (uint32_t *)filled(rows * (size_t)problem_words(p) * sizeof(uint32_t), 0);
    s.count = (int32_t *)filled(rows * sizeof(int32_t), 0);
    s.mass = (float *)filled(rows * blocks * sizeof(float), 0);
    RUN(pbs_select_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_select(&s));
    free((void *)(uintptr_t)s.k_pool);
    free(s.bits);
    free(s.count);
    free(s.mass);
    free(s.workspace);
}

static void test_wrong_values(void) {
    problem p = {.batch = 3, .heads_q = 2, .heads_k = 1, .seqlen_q = 150, .seqlen_k = 300};
    p.head_dim = 24;
    p.dtype = PBS_DTYPE_BF16;
    p.has_geometry = 1;
    int32_t k_perm[3 * 2 * 300], q_perm[3 * 2 * 150], tau[2]; /* tau: bits of floats, NaN too */
    float tau_heads[2];
    for (uint64_t seed = 0; seed < 40; seed++) {
        rng r = {seed};
        p.block = p.segment = seed % 4 < 2 ? 64 : 128; /* 128: attend's kernel for 9.0 */
        memset(p.q_len, 0, sizeof p.q_len);
        memset(p.kv_len, 0, sizeof p.kv_len);
        problem_make(&p, seed);
        fill_wrong(&r, p.q_start, p.batch, p.seqlen_q);
        fill_wrong(&r, p.q_len, p.batch, p.seqlen_q);
        fill_wrong(&r, p.kv_start, p.batch, p.seqlen_k);
        fill_wrong(&r, p.kv_len, p.batch, p.seqlen_k);
        fill_wrong(&r, k_perm, 3 * 2 * 300, p.seqlen_k);
        fill_wrong(&r, q_perm, 3 * 2 * 150, p.seqlen_q);
        all_but_select(&p, seed, seed % 3 ? NULL : k_perm, q_perm);
        fill_wrong(&r, tau, 2, 1);
        memcpy(tau_heads, tau, sizeof tau);
        select_blocks(&p, (pbs_select_method)(seed % 2), (pbs_permute_mode)(seed % 5), k_perm,
                      q_perm, tau_heads);
        problem_free(&p);
        memset(p.q_start, 0, sizeof p.q_start);
        memset(p.kv_start, 0, sizeof p.kv_start);
    }
}

static const test_case TESTS[] = {{"score", test_score},        {"permute", test_permute},
                                  {"select", test_select},      {"select_rows", test_select_rows},
                                  {"attend", test_attend},      {"correction", test_correction},
                                  {"wrong", test_wrong_values}, {"host", test_host_reads}};

int main(int argc, char **argv) {
    run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
    printf("%s: %d checks, %d failed\n", argv[0], test_checks, test_failures);
    return test_failures != 0;
}
