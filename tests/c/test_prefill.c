/* SPDX-License-Identifier: Apache-2.0
 *
 * pbs_prefill is the four verbs, bit for bit: with any cap on a wave, any number of threads, and at
 * any place in a batch.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

typedef struct options {
    pbs_permute_mode mode;
    pbs_order order;
    pbs_select_method method;
    size_t cap;
    pbs_parallel_for_fn parallel_for;
    int threads;
    const int32_t *permute_heads;
    const float *tau_heads;
    float tau;
} options;

typedef struct result {
    char *out; /* out, then lse */
    size_t out_bytes;
    uint32_t *bits;
    int32_t *count, *k_perm;
    size_t bits_bytes, count_bytes, perm_bytes;
} result;

static result new_result(const problem *p) {
    size_t rows = (size_t)(p->batch * p->heads_q * problem_blocks_q(p));
    result r;
    r.out_bytes = p->out_bytes + (size_t)(p->batch * p->lse.stride[0]) * sizeof(float);
    r.count_bytes = rows * sizeof(int32_t);
    r.bits_bytes = rows * (size_t)problem_words(p) * sizeof(uint32_t);
    r.perm_bytes = (size_t)(p->batch * problem_heads_p(p) * p->seqlen_k) * sizeof(int32_t);
    r.out = (char *)filled(r.out_bytes, 0xff);
    r.bits = (uint32_t *)filled(r.bits_bytes, 0xff);
    r.count = (int32_t *)filled(r.count_bytes, 0xff);
    r.k_perm = (int32_t *)filled(r.perm_bytes, 0xff);
    return r;
}

static void free_result(result *r) {
    free(r->out);
    free(r->bits);
    free(r->count);
    free(r->k_perm);
}

static void check_same(const result *a, const result *b, const char *what) {
    CHECK(memcmp(a->bits, b->bits, a->bits_bytes) == 0, "%s: other bits", what);
    CHECK(memcmp(a->count, b->count, a->count_bytes) == 0, "%s: other count", what);
    CHECK(memcmp(a->k_perm, b->k_perm, a->perm_bytes) == 0, "%s: other k_perm", what);
    CHECK(memcmp(a->out, b->out, a->out_bytes) == 0, "%s: other out or lse", what);
}

static pbs_exec exec_of(const problem *p, options *o) {
    pbs_exec e = {.parallel_for = o->parallel_for, .pool = &o->threads, .num_threads = o->threads};
    e.isa = p->isa;
    return e;
}

static result prefill(const problem *p, options o) {
    result r = new_result(p);
    pbs_prefill_params s = PBS_INIT(pbs_prefill_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.permute_heads = o.permute_heads;
    s.tau_heads = o.tau_heads;
    s.geometry = p->geometry;
    s.softmax_scale = p->scale;
    s.block_size = p->block;
    s.segment_size = p->segment;
    s.gqa = p->gqa;
    s.mode = o.mode;
    s.order = o.order;
    s.seed = 11;
    s.method = o.method;
    s.stride = 16;
    s.tau = o.tau;
    s.out = p->out;
    s.out.data = r.out;
    s.lse = p->lse;
    s.lse.data = r.out + p->out_bytes;
    s.count = r.count;
    s.bits = r.bits;
    s.k_perm = r.k_perm;
    s.workspace_cap = o.cap;
    s.exec = exec_of(p, &o);
    RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_prefill(&s));
    free(s.workspace);
    return r;
}

/* The four verbs one after another. */
static result verbs(const problem *p, options o) {
    result r = new_result(p);
    size_t heads = (size_t)(p->batch * problem_heads_p(p));
    float *score = (float *)filled(heads * (size_t)p->seqlen_k * sizeof(float), 0xff);
    float *k_pool = (float *)filled(
        heads * (size_t)problem_blocks_k(p) * (size_t)p->head_dim * sizeof(float), 0xff);
    int32_t *q_perm =
        (int32_t *)filled((size_t)(p->batch * p->heads_q * p->seqlen_q) * sizeof(int32_t), 0xff);
    int queries = o.mode == PBS_PERMUTE_QUERIES || o.mode == PBS_PERMUTE_BOTH;

    pbs_score_params s = PBS_INIT(pbs_score_params);
    s.q = p->q, s.k = p->k, s.geometry = p->geometry, s.softmax_scale = p->scale;
    s.block_size = p->block, s.segment_size = p->segment, s.gqa = p->gqa, s.order = o.order;
    s.seed = 11, s.score = score, s.exec = exec_of(p, &o);
    RUN(pbs_score_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_score(&s));

    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p->q, t.k = p->k, t.v = p->v, t.score = score, t.permute_heads = o.permute_heads;
    t.geometry = p->geometry, t.block_size = p->block, t.segment_size = p->segment;
    t.gqa = p->gqa, t.mode = o.mode, t.k_perm = r.k_perm, t.q_perm = queries ? q_perm : NULL;
    t.k_pool = k_pool, t.exec = s.exec;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute_workspace_size(&t, &t.workspace_bytes));
    void *room = filled(t.packed_bytes + 64, 0xff);
    t.packed = (char *)room + (64 - (uintptr_t)room % 64) % 64;
    t.workspace = filled(t.workspace_bytes, 0xff);
    RUN(pbs_permute(&t));

    pbs_select_params u = PBS_INIT(pbs_select_params);
    u.q = p->q, u.k = p->k, u.k_pool = k_pool, u.k_perm = r.k_perm, u.q_perm = t.q_perm;
    u.tau_heads = o.tau_heads, u.geometry = p->geometry, u.softmax_scale = p->scale;
    u.block_size = p->block, u.segment_size = p->segment, u.gqa = p->gqa, u.mode = o.mode;
    u.method = o.method, u.stride = 16, u.tau = o.tau, u.bits = r.bits, u.count = r.count;
    u.exec = s.exec;
    RUN(pbs_select_workspace_size(&u, &u.workspace_bytes));
    u.workspace = filled(u.workspace_bytes, 0xff);
    RUN(pbs_select(&u));

    pbs_attend_params a = PBS_INIT(pbs_attend_params);
    a.q = p->q, a.k = p->k, a.v = p->v, a.packed = t.packed, a.packed_bytes = t.packed_bytes;
    a.bits = r.bits, a.q_perm = t.q_perm, a.geometry = p->geometry, a.softmax_scale = p->scale;
    a.block_q = a.block_k = p->block, a.segment_size = p->segment, a.gqa = p->gqa;
    a.own = o.mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
    a.out = p->out, a.out.data = r.out, a.lse = p->lse, a.lse.data = r.out + p->out_bytes;
    a.exec = s.exec;
    RUN(pbs_attend_workspace_size(&a, &a.workspace_bytes));
    a.workspace = filled(a.workspace_bytes, 0xff);
    RUN(pbs_attend(&a));

    void *used[] = {score, k_pool,      q_perm,      s.workspace,
                    room,  t.workspace, u.workspace, a.workspace};
    for (size_t i = 0; i < sizeof used / sizeof *used; i++) free(used[i]);
    return r;
}

static problem base(pbs_isa isa) {
    problem p = {.batch = 3, .heads_q = 6, .heads_k = 2, .head_dim = 16};
    static const int32_t geometry[4][3] = {
        {0, 17, 200}, {330, 200, 0}, {0, 11, 3}, {420, 200, 131}};
    p.seqlen_q = 330;
    p.seqlen_k = 420;
    p.block = 64;
    p.segment = 128;
    p.dtype = PBS_DTYPE_BF16;
    p.isa = isa;
    p.has_geometry = 1;
    for (int b = 0; b < 3; b++) {
        p.q_start[b] = geometry[0][b];
        p.q_len[b] = geometry[1][b];
        p.kv_start[b] = geometry[2][b];
        p.kv_len[b] = geometry[3][b];
    }
    return p;
}

static void test_modes(pbs_isa isa) {
    static const int32_t on[6] = {1, 0, 1, 1, 1, 0};
    static const float tau[6] = {0.9f, 0.2f, 0.5f, 1.0f, 0.7f, 0.0f};
    for (size_t mode = grid_first(isa); mode < 5; mode += grid_step(isa)) {
        problem p = base(isa);
        p.gqa = mode % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        problem_make(&p, mode);
        options o = {.mode = (pbs_permute_mode)mode, .order = (pbs_order)(mode % 4), .tau = 0.6f};
        o.method = mode == 2 || mode == 0 ? PBS_SELECT_ANTIDIAGONAL : PBS_SELECT_MEAN_POOL;
        if (p.gqa == PBS_GQA_PER_HEAD) {
            o.permute_heads = on;
            o.tau_heads = tau;
        }
        result expected = verbs(&p, o), whole = prefill(&p, o);
        check_same(&expected, &whole, "prefill against the verbs");
        free_result(&whole);
        if (is_emulated(isa)) { /* waves are the drivers' business */
            free_result(&expected);
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
        free_result(&all);
        free_result(&expected);
        free_result(&small);
        free_result(&one);
        free_result(&some);
        problem_free(&p);
    }
}

/* tau = 1 keeps everything: the dense result, whatever the permutation. */
static void test_dense(pbs_isa isa) {
    for (size_t mode = grid_first(isa); mode < 5; mode += grid_step(isa)) {
        problem p = base(isa);
        p.dtype = PBS_DTYPE_FP32;
        problem_make(&p, 3);
        options o = {.mode = (pbs_permute_mode)mode, .tau = 1.0f};
        result r = prefill(&p, o);
        brute_attend_args a = {.block_q = 64, .block_k = 64, .heads_sel = 6, .own = PBS_OWN_ALL};
        pbs_view out = p.out;
        out.data = r.out;
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
        free_result(&r);
        problem_free(&p);
    }
}

/* A sequence alone gives what it gives inside a batch. */
static void test_place_in_batch(pbs_isa isa) {
    problem p = base(isa);
    problem_make(&p, 12);
    options o = {.mode = PBS_PERMUTE_BOTH, .tau = 0.6f};
    result all = prefill(&p, o);
    for (int32_t b = 0; b < 3; b++) {
        problem one = p;
        one.batch = 1;
        one.geometry =
            (pbs_geometry){p.q_start + b, p.q_len + b, p.kv_start + b, p.kv_len + b, 0, 0};
        size_t size = 2;
        one.q.data = (char *)p.q.data + (size_t)(b * p.q.stride[0]) * size;
        one.k.view.data = (char *)p.k.view.data + (size_t)(b * p.k.view.stride[0]) * size;
        one.v.view.data = (char *)p.v.view.data + (size_t)(b * p.v.view.stride[0]) * size;
        one.q.size[0] = one.k.view.size[0] = one.v.view.size[0] = 1;
        one.out.size[0] = one.lse.size[0] = 1;
        one.out_bytes = p.out_bytes / 3;
        result r = prefill(&one, o);
        CHECK(memcmp(r.out, all.out + (size_t)b * one.out_bytes, one.out_bytes) == 0,
              "sequence %d alone", b);
        CHECK(memcmp(r.bits, (char *)all.bits + (size_t)b * r.bits_bytes, r.bits_bytes) == 0,
              "bits of sequence %d alone", b);
        free_result(&r);
    }
    free_result(&all);
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

void test_threads(void) {
    static const int counts[] = {2, 3, 8};
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_BF16, isas);
    for (int i = 0; i < count; i++)
        for (int method = 0; method < 2 && !is_emulated(isas[i]); method++) {
            problem p = base(isas[i]);
            problem_make(&p, 21);
            options o = {.mode = PBS_PERMUTE_BOTH, .tau = 0.7f};
            o.method = (pbs_select_method)method;
            result serial = prefill(&p, o);
            for (size_t t = 0; t < sizeof counts / sizeof *counts; t++) {
                o.parallel_for = pool_parallel_for;
                o.threads = counts[t];
                result r = prefill(&p, o);
                check_same(&serial, &r, "threads");
                free_result(&r);
            }
            o.parallel_for = reverse_parallel_for;
            result r = prefill(&p, o);
            check_same(&serial, &r, "two calls with many slots each, last first");
            free_result(&r);
            free_result(&serial);
            problem_free(&p);
        }
}
