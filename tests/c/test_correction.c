/* SPDX-License-Identifier: Apache-2.0
 *
 * attend with CORRECTION_MEAN: what it computes, by the definition in pbs.h; and what follows from
 * the definition, bit for bit.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"

/* One call of attend, perhaps on packed panels, and the permutations that they were made with. */
typedef struct attention {
    brute_attend_args a;
    uint32_t *bits;
    int32_t *k_perm, *q_perm;
    void *packed;
    size_t packed_bytes;
    int threads;
} attention;

static void drop_attention(attention *c) {
    free(c->bits);
    free(c->k_perm);
    free(c->q_perm);
    free(c->packed);
}

static attention natural(const problem *p, pbs_own own, int32_t block_q, int density) {
    attention c = {.a = {.block_q = block_q, .block_k = p->block, .own = own}};
    rng r = {(uint64_t)own + 7};
    c.a.heads_sel = p->heads_q;
    c.a.correction = PBS_CORRECTION_MEAN;
    int32_t Tq = (p->seqlen_q + block_q - 1) / block_q;
    size_t words = (size_t)(p->batch * p->heads_q * Tq * problem_words(p));
    c.bits = (uint32_t *)filled(words * sizeof *c.bits, 0);
    for (size_t i = 0; i < 32 * words; i++)
        if (rng_below(&r, 100) < density) c.bits[i / 32] |= UINT32_C(1) << (i % 32);
    c.a.bits = c.bits;
    return c;
}

/* pools: the caller wants them as well. */
static void pack(const problem *p, attention *c, pbs_permute_mode mode, pbs_correction correction,
                 int pools) {
    static const int32_t on[8] = {1, 0, 1, 1, 0, 1, 1, 1};
    size_t heads = (size_t)(p->batch * problem_heads_p(p)), keys = heads * (size_t)p->seqlen_k;
    size_t means = heads * (size_t)(problem_blocks_k(p) * p->head_dim);
    float *score = (float *)filled(keys * sizeof *score, 0), *k_pool = NULL, *v_pool = NULL;
    rng r = {3};
    for (size_t i = 0; i < keys; i++) score[i] = rng_uniform(&r, 0.0f, 1.0f);
    if (pools) k_pool = (float *)filled(means * sizeof *k_pool, 0xff);
    if (pools) v_pool = (float *)filled(means * sizeof *v_pool, 0xff);
    int queries = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH;
    if (!c->k_perm) c->k_perm = (int32_t *)filled(keys * sizeof(int32_t), 0);
    if (!c->q_perm && queries)
        c->q_perm =
            (int32_t *)filled((size_t)(p->batch * p->heads_q * p->seqlen_q) * sizeof(int32_t), 0);
    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p->q, t.k = p->k, t.v = p->v, t.score = score, t.geometry = p->geometry;
    t.block_size = p->block, t.segment_size = p->segment, t.gqa = p->gqa, t.mode = mode;
    if (c->a.own != PBS_OWN_NONE) t.permute_heads = on;
    t.k_perm = c->k_perm, t.q_perm = c->q_perm, t.k_pool = k_pool, t.v_pool = v_pool;
    t.correction = correction;
    t.exec.isa = p->isa;
    t.exec.parallel_for = c->threads > 1 ? pool_parallel_for : NULL;
    t.exec.pool = &c->threads, t.exec.num_threads = c->threads;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute_workspace_size(&t, &t.workspace_bytes));
    free(c->packed);
    t.packed = c->packed = filled_lines((t.packed_bytes + 63) / 64 * 64, 0xff);
    t.workspace = filled(t.workspace_bytes, 0xff);
    RUN(pbs_permute(&t));
    for (size_t i = 0; pools && i < (size_t)p->head_dim; i++)
        CHECK(!isnan(k_pool[i]) && !isnan(v_pool[i]), "packing leaves no pools to the caller");
    c->packed_bytes = t.packed_bytes;
    c->a.k_perm = c->k_perm, c->a.q_perm = c->q_perm;
    free(t.workspace);
    free(score);
    free(k_pool);
    free(v_pool);
}

static pbs_attend_params params_of(const problem *p, attention *c) {
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p->q, s.k = p->k, s.v = p->v, s.packed = c->packed, s.packed_bytes = c->packed_bytes;
    s.bits = c->a.bits, s.q_perm = c->a.q_perm, s.geometry = p->geometry;
    s.softmax_scale = p->scale, s.block_q = c->a.block_q, s.block_k = c->a.block_k;
    s.segment_size = p->segment, s.heads_sel = c->a.heads_sel, s.gqa = p->gqa, s.own = c->a.own;
    s.out = p->out, s.lse = p->lse, s.correction = c->a.correction;
    s.exec.isa = p->isa;
    s.exec.parallel_for = c->threads > 1 ? pool_parallel_for : NULL;
    s.exec.pool = &c->threads, s.exec.num_threads = c->threads;
    return s;
}

static void run(const problem *p, attention *c) {
    pbs_attend_params s = params_of(p, c);
    RUN(pbs_attend_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    memset(p->out.data, 0xff, p->out_bytes);
    memset(p->lse.data, 0xff, view_bytes(&p->lse));
    RUN(pbs_attend(&s));
    free(s.workspace);
}

/* Some rows of every head; rows outside the sequences must still be NaN. */
static void compare(const problem *p, const brute_attend_args *a, int32_t stride,
                    const char *what) {
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t h = 0; h < p->heads_q; h++) {
            for (int32_t i = h; i < p->q_len[b]; i += stride * PBS_TEST_THIN)
                check_attend_row(p, a, b, h, i, what);
            for (int32_t row = 0; row < p->seqlen_q; row++)
                CHECK((row >= p->q_start[b] && row < p->q_start[b] + p->q_len[b]) ||
                          isnan(element(&p->lse, b, h, row, 0)),
                      "%s: row %d of sequence %d is outside, but written", what, row, b);
        }
}

/* out and lse, to be compared bit for bit. */
static char *bits_of_result(const problem *p) {
    size_t lse = view_bytes(&p->lse);
    char *copy = (char *)filled(p->out_bytes + lse, 0);
    memcpy(copy, p->out.data, p->out_bytes);
    memcpy(copy + p->out_bytes, p->lse.data, lse);
    return copy;
}

static void check_bits(const problem *p, const char *expected, const char *what) {
    char *got = bits_of_result(p);
    CHECK(memcmp(got, expected, p->out_bytes + view_bytes(&p->lse)) == 0, "%s dtype %d D %d: %s",
          pbs_isa_name(p->isa), (int)p->dtype, p->head_dim, what);
    free(got);
}

static problem base(pbs_dtype dtype, pbs_isa isa, int32_t n, int32_t block, int32_t head_dim) {
    problem p = {.batch = 1, .heads_q = 2, .heads_k = 1, .seqlen_q = n, .seqlen_k = n};
    p.block = block;
    p.segment = 2 * block;
    p.head_dim = head_dim;
    p.dtype = dtype;
    p.isa = isa;
    return p;
}

/* ---- what it computes ------------------------------------------------------------------------ */
static void test_natural(problem p, pbs_own own, int32_t block_q, int32_t stride,
                         const char *what) {
    problem_make(&p, (uint64_t)own + 1);
    attention c = natural(&p, own, block_q, 40);
    run(&p, &c);
    compare(&p, &c.a, stride, what);
    drop_attention(&c);
    problem_free(&p);
}

static void test_packed(problem p, pbs_permute_mode mode, pbs_own own, int32_t stride) {
    static const char *const names[] = {"none", "identity", "keys", "queries", "both"};
    problem_make(&p, 5);
    attention c = natural(&p, own, p.block, 50);
    pack(&p, &c, mode, PBS_CORRECTION_MEAN, mode % 2);
    run(&p, &c);
    compare(&p, &c.a, stride, names[mode]);
    drop_attention(&c);
    problem_free(&p);
}

/* Steps through cases: dtypes differ where panels are packed, so one of them takes every case. */
static size_t every(pbs_dtype dtype, pbs_isa isa) {
    return grid_step(isa) * (is_emulated(isa) ? 2 : dtype == PBS_DTYPE_BF16 ? 1 : 3);
}

/* Chunks at offsets that end blocks, segments or nothing; lengths likewise. */
static void test_shapes(pbs_dtype dtype, pbs_isa isa) {
    static const pbs_own owns[] = {PBS_OWN_SEGMENT, PBS_OWN_BLOCK, PBS_OWN_MASK, PBS_OWN_NONE};
    static const int32_t dims[] = {64, 8, 128, 96, 256, 72, 192, 24};
    static const int32_t blocks[] = {64, 128, 256}, rows[] = {65, 300, 1, 127, 64, 190};
    const size_t step = every(dtype, isa);
    for (size_t i = (size_t)isa % step; i < 24; i += step) {
        int32_t block = blocks[i % 3], block_q = block;
        pbs_own own = owns[i % 4];
        problem p = base(dtype, isa, 5 * block + (int32_t)(i * 37 % 90), block, dims[i % 8]);
        p.seqlen_q = rows[(i + i / 6) % 6];
        p.layout = (layout)(i % 3);
        if (own == PBS_OWN_MASK) block_q = blocks[(i / 3 + 1) % 3];
        test_natural(p, own, block_q, 29, "natural");
    }
    /* Means of more blocks than a panel has, few of them in the last one. */
    problem p = base(dtype, isa, 67 * 64 + 5, 64, 16);
    p.seqlen_q = 70;
    p.heads_q = 1;
    test_natural(p, PBS_OWN_SEGMENT, 64, 23, "many blocks");
}

static void test_orders(pbs_dtype dtype, pbs_isa isa) {
    static const pbs_permute_mode modes[] = {PBS_PERMUTE_KEYS, PBS_PERMUTE_BOTH,
                                             PBS_PERMUTE_IDENTITY, PBS_PERMUTE_QUERIES,
                                             PBS_PERMUTE_NONE};
    const size_t step = every(dtype, isa);
    for (size_t i = (size_t)isa % step; i < 10; i += step) {
        pbs_permute_mode mode = modes[i % 5];
        const int32_t slow = is_emulated(isa), rows = slow ? 150 : 190, keys = slow ? 460 : 700;
        problem p = base(dtype, isa, keys, i % 3 == 1 ? 128 : 64, i % 2 ? 40 : 64);
        p.batch = 2 - slow;
        p.heads_q = 4 - slow;
        p.heads_k = 2 - slow;
        p.seqlen_q = rows;
        p.gqa = i / 5 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        p.layout = (layout)(i % 3);
        p.has_geometry = 1;
        p.q_len[slow] = rows, p.kv_len[slow] = keys;
        p.q_start[!slow] = 3, p.q_len[!slow] = rows - 30, p.kv_start[!slow] = 2;
        p.kv_len[!slow] = keys - 150;
        pbs_own own = i % 4 == 3 ? PBS_OWN_NONE : PBS_OWN_SEGMENT;
        test_packed(p, mode, mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : own, 41);
    }
}

/* Left and right padding, a prefix, no rows, no keys, more queries than keys: NaN all around. */
static void test_padding(pbs_dtype dtype, pbs_isa isa) {
    static const int32_t geometry[4][4] = {
        {5, 0, 60, 0}, {140, 0, 131, 190}, {3, 100, 0, 20}, {460, 90, 0, 155}};
    for (size_t own = grid_first(isa); own < 4; own += grid_step(isa)) {
        problem p = base(dtype, isa, 490, 64, 40);
        p.batch = 4;
        p.seqlen_q = 191;
        p.has_geometry = 1;
        p.layout = LAYOUT_BNHD;
        for (int b = 0; b < 4; b++) {
            p.q_start[b] = geometry[0][b], p.q_len[b] = geometry[1][b];
            p.kv_start[b] = geometry[2][b], p.kv_len[b] = geometry[3][b];
        }
        test_natural(p, (pbs_own)own, own == PBS_OWN_MASK ? 128 : 64, 17, "padding");
    }
}

/* ---- what follows ---------------------------------------------------------------------------- */
/* Nothing is left out: the bits of a call without correction, on the same panels. */
static void test_nothing_dropped(pbs_dtype dtype, pbs_isa isa) {
    for (int packed = 0; packed < 2; packed++) {
        problem p = base(dtype, isa, is_emulated(isa) ? 220 : 389, 64, 72);
        problem_make(&p, 9);
        attention c = natural(&p, packed ? PBS_OWN_SEGMENT : PBS_OWN_MASK, 64, 100);
        if (packed) pack(&p, &c, PBS_PERMUTE_KEYS, PBS_CORRECTION_MEAN, 0);
        c.a.correction = PBS_CORRECTION_NONE;
        run(&p, &c);
        char *expected = bits_of_result(&p);
        c.a.correction = PBS_CORRECTION_MEAN;
        run(&p, &c);
        check_bits(&p, expected, "nothing is left out, but bits changed");
        free(expected);
        drop_attention(&c);
        problem_free(&p);
    }
}

/* A block of equal keys is its mean, as long as none of it is listed: dense attention. */
static void test_equal_keys(pbs_dtype dtype, pbs_isa isa) {
    for (int packed = 0; packed < 2; packed++) {
        problem p = base(dtype, isa, 600, 64, 64);
        p.heads_q = 1;
        problem_make(&p, 15);
        for (int32_t j = 0; j < 600; j++) /* in a segment, so in any order of its keys */
            for (int32_t d = 0; d < p.head_dim; d++)
                set_element(&p.k.view, 0, 0, j, d, element(&p.k.view, 0, 0, j / 128 * 128, d));
        attention c = natural(&p, PBS_OWN_SEGMENT, 64, packed ? 30 : 0);
        if (packed) pack(&p, &c, PBS_PERMUTE_KEYS, PBS_CORRECTION_MEAN, 1);
        run(&p, &c);
        brute_attend_args dense = {.block_q = 64, .block_k = 64, .heads_sel = 1};
        dense.own = PBS_OWN_ALL;
        compare(&p, &dense, 43, "equal keys");
        drop_attention(&c);
        problem_free(&p);
    }
}

/* Packing with pools for the caller or without, and by attend itself, comes to the same bits; so
 * does any number of threads. */
static void test_same_bits(pbs_dtype dtype, pbs_isa isa) {
    static const int counts[] = {2, 3, 8};
    for (int mode = PBS_PERMUTE_IDENTITY; mode <= PBS_PERMUTE_KEYS; mode++) {
        problem p = base(dtype, isa, is_emulated(isa) ? 300 : 700, mode % 2 ? 64 : 128, 40);
        p.heads_q = p.heads_k = 1 + !is_emulated(isa);
        problem_make(&p, 19);
        attention c = natural(&p, PBS_OWN_SEGMENT, p.block, 40);
        c.threads = 1;
        pack(&p, &c, (pbs_permute_mode)mode, PBS_CORRECTION_MEAN, 0);
        char *panels = (char *)filled(c.packed_bytes, 0);
        memcpy(panels, c.packed, c.packed_bytes);
        run(&p, &c);
        char *expected = bits_of_result(&p);
        for (int i = 0; i < 3; i++) {
            c.threads = counts[i];
            pack(&p, &c, (pbs_permute_mode)mode, PBS_CORRECTION_MEAN, i % 2);
            CHECK(memcmp(panels, c.packed, c.packed_bytes) == 0, "%s mode %d: other panels by %d",
                  pbs_isa_name(isa), mode, counts[i]);
            run(&p, &c);
            check_bits(&p, expected, "other bits by more threads");
        }
        for (int i = 0; i < 4 && mode == PBS_PERMUTE_IDENTITY; i++) {
            c.threads = i < 3 ? counts[i] : 1;
            free(c.packed);
            c.packed = NULL, c.packed_bytes = 0;
            run(&p, &c);
            check_bits(&p, expected, "attend packs other means");
        }
        free(panels);
        free(expected);
        drop_attention(&c);
        problem_free(&p);
    }
}

/* pbs_prefill is the verbs, whatever the wave and the number of threads. */
static void test_prefills(pbs_isa isa) {
    static const int32_t on[6] = {1, 0, 1, 1, 1, 0};
    for (size_t mode = grid_first(isa); mode < 5; mode += grid_step(isa)) {
        problem p = three_sequences(isa, 330, 420);
        if (is_emulated(isa)) p.heads_q = 2, p.heads_k = 1;
        p.gqa = mode % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        problem_make(&p, mode);
        options o = {.mode = (pbs_permute_mode)mode, .tau = 0.6f};
        o.method = mode == 2 || mode == 0 ? PBS_SELECT_ANTIDIAGONAL : PBS_SELECT_MEAN_POOL;
        if (p.gqa == PBS_GQA_PER_HEAD) o.permute_heads = on;
        o.correction = PBS_CORRECTION_MEAN;
        result expected = verbs(&p, o);
        o.correction = PBS_CORRECTION_NONE;
        result plain = verbs(&p, o);
        CHECK(memcmp(plain.part[OUT], expected.part[OUT], expected.bytes[OUT]) != 0,
              "mode %zu: nothing was left out", mode);
        o.correction = PBS_CORRECTION_MEAN;
        for (int i = 0; i < (is_emulated(isa) ? 1 : 4); i++) {
            static const size_t caps[] = {0, 1, 300000, 1};
            o.cap = caps[i];
            o.threads = 1 + i;
            o.parallel_for = i ? pool_parallel_for : NULL;
            result whole = prefill(&p, o);
            check_same(&expected, &whole, "prefill with correction against the verbs");
            drop_result(&whole);
        }
        drop_result(&plain);
        drop_result(&expected);
        problem_free(&p);
    }
}

void test_correction(void) {
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++) {
            test_shapes((pbs_dtype)dtype, isas[i]);
            test_orders((pbs_dtype)dtype, isas[i]);
            test_padding((pbs_dtype)dtype, isas[i]);
            test_nothing_dropped((pbs_dtype)dtype, isas[i]);
            test_equal_keys((pbs_dtype)dtype, isas[i]);
            test_same_bits((pbs_dtype)dtype, isas[i]);
            if (dtype == PBS_DTYPE_BF16) test_prefills(isas[i]);
        }
    }
}
