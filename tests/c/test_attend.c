/* SPDX-License-Identifier: Apache-2.0 */
#define _DEFAULT_SOURCE /* MAP_NORESERVE */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "harness.h"

typedef struct tolerance {
    double out, lse;
} tolerance;

/* Absolute, for values in [-1, 1]: half an ulp of the output, and P in bf16 for bf16 dot products.
 */
static tolerance tolerance_of(pbs_dtype dtype) {
    if (dtype == PBS_DTYPE_FP32) return (tolerance){5e-6, 5e-6};
    if (dtype == PBS_DTYPE_FP16) return (tolerance){6e-4, 2e-5};
    return (tolerance){8e-3, 2e-3};
}

static pbs_attend_params params_of(const problem *p, const brute_attend_args *a) {
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.bits = a->bits;
    s.q_perm = a->q_perm;
    s.geometry = p->geometry;
    s.softmax_scale = p->scale;
    s.block_q = a->block_q;
    s.block_k = a->block_k;
    s.segment_size = p->segment;
    s.heads_sel = a->heads_sel;
    s.gqa = p->gqa;
    s.own = a->own;
    s.out = p->out;
    s.lse = p->lse;
    s.exec.isa = p->isa;
    return s;
}

static void run(pbs_attend_params *s) {
    RUN(pbs_attend_workspace_size(s, &s->workspace_bytes));
    s->workspace = filled(s->workspace_bytes, 0xff);
    RUN(pbs_attend(s));
    free(s->workspace);
}

static int outside(const problem *p, int32_t b, int32_t row) {
    return row < p->q_start[b] || row >= p->q_start[b] + p->q_len[b];
}

/* Every stride-th row of every head; rows outside the sequences must still be NaN. */
static void compare(const problem *p, const brute_attend_args *a, int32_t stride) {
    tolerance limit = tolerance_of(p->dtype);
    double out[PBS_MAX_HEAD_DIM], lse;
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t h = 0; h < p->heads_q; h++)
            for (int32_t row = 0; row < p->seqlen_q; row += stride) {
                double got_lse = element(&p->lse, b, h, row, 0);
                if (outside(p, b, row)) {
                    CHECK(isnan(got_lse) && isnan(element(&p->out, b, h, row, 0)),
                          "row %d of sequence %d is outside, but written", row, b);
                    continue;
                }
                brute_attend_row(p, a, b, h, row - p->q_start[b], out, &lse);
                CHECK(got_lse == lse || fabs(got_lse - lse) < limit.lse,
                      "%s dtype %d own %d D %d Nk %d lse [%d, %d, %d]: %g, not %g",
                      pbs_isa_name(p->isa), (int)p->dtype, (int)a->own, p->head_dim, p->seqlen_k, b,
                      h, row, got_lse, lse);
                for (int32_t d = 0; d < p->head_dim; d++) {
                    double got = element(&p->out, b, h, row, d);
                    CHECK(fabs(got - out[d]) < limit.out,
                          "%s dtype %d own %d D %d Nk %d out [%d, %d, %d, %d]: %g, not %g",
                          pbs_isa_name(p->isa), (int)p->dtype, (int)a->own, p->head_dim,
                          p->seqlen_k, b, h, row, d, got, out[d]);
                }
            }
}

static uint32_t *random_bits(const problem *p, const brute_attend_args *a, uint64_t seed,
                             int density) {
    rng r = {seed};
    int32_t Tq = (p->seqlen_q + a->block_q - 1) / a->block_q;
    int32_t W = ((p->seqlen_k + a->block_k - 1) / a->block_k + 31) / 32;
    size_t words = (size_t)(p->batch * a->heads_sel * Tq * W);
    uint32_t *bits = (uint32_t *)filled(words * sizeof *bits, 0);
    for (size_t i = 0; i < 32 * words; i++)
        if (rng_below(&r, 100) < density) bits[i / 32] |= UINT32_C(1) << (i % 32);
    return bits;
}

/* Natural order, bits drawn at random (also for blocks that a row may not read). */
static void test_natural(problem *p, pbs_own own, int32_t block_q, int32_t heads_sel, int density,
                         int32_t stride) {
    problem_make(p, (uint64_t)own + 1);
    brute_attend_args a = {.block_q = block_q, .block_k = p->block, .own = own};
    a.heads_sel = heads_sel;
    uint32_t *bits = random_bits(p, &a, 77, density);
    if (own != PBS_OWN_ALL) a.bits = bits;
    pbs_attend_params s = params_of(p, &a);
    run(&s);
    compare(p, &a, stride);
    free(bits);
    problem_free(p);
}

/* Packed K/V, permuted keys, perhaps permuted queries and one head left in natural order. */
static void test_packed(problem *p, pbs_permute_mode mode, pbs_own own) {
    problem_make(p, 5);
    rng r = {6};
    int32_t heads = problem_heads_p(p), on[16];
    size_t count = (size_t)(p->batch * heads * p->seqlen_k);
    float *score = (float *)filled(count * sizeof(float), 0);
    int32_t *k_perm = (int32_t *)filled(count * sizeof(int32_t), 0);
    int32_t *q_perm =
        (int32_t *)filled((size_t)(p->batch * p->heads_q * p->seqlen_q) * sizeof(int32_t), 0);
    for (size_t i = 0; i < count; i++) score[i] = rng_uniform(&r, 0.0f, 1.0f);
    for (int32_t h = 0; h < heads; h++) on[h] = h != 1;
    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p->q;
    t.k = p->k;
    t.v = p->v;
    t.score = score;
    t.permute_heads = own == PBS_OWN_NONE ? NULL : on;
    t.geometry = p->geometry;
    t.block_size = p->block;
    t.segment_size = p->segment;
    t.gqa = p->gqa;
    t.mode = mode;
    t.k_perm = k_perm;
    t.q_perm = q_perm;
    t.exec.isa = p->isa;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute_workspace_size(&t, &t.workspace_bytes));
    void *room = filled(t.packed_bytes + 64, 0xff);
    t.packed = (char *)room + (64 - (uintptr_t)room % 64) % 64;
    t.workspace = filled(t.workspace_bytes, 0xff);
    RUN(pbs_permute(&t));
    brute_attend_args a = {.block_q = p->block, .block_k = p->block, .heads_sel = p->heads_q};
    a.own = own;
    a.k_perm = k_perm;
    a.q_perm = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH ? q_perm : NULL;
    uint32_t *bits = random_bits(p, &a, 8, 60);
    a.bits = bits;
    pbs_attend_params s = params_of(p, &a);
    s.packed = t.packed;
    s.packed_bytes = t.packed_bytes;
    run(&s);
    compare(p, &a, 5);
    free(score);
    free(k_perm);
    free(q_perm);
    free(bits);
    free(room);
    free(t.workspace);
    problem_free(p);
}

static problem base(pbs_dtype dtype, pbs_isa isa, int32_t n) {
    problem p = {.batch = 1, .heads_q = 2, .heads_k = 1, .head_dim = 40};
    p.seqlen_q = p.seqlen_k = n;
    p.block = 64;
    p.segment = 128;
    p.dtype = dtype;
    p.isa = isa;
    return p;
}

static void test_isa(pbs_dtype dtype, pbs_isa isa) {
    static const int32_t lengths[] = {1, 63, 64, 65, 127, 128, 129, 211, 389};
    static const int32_t dims[] = {8, 64, 24, 96, 16, 128, 72, 256, 40};
    static const int32_t ratios[] = {1, 3, 4, 8};
    for (size_t n = grid_first(isa); n < sizeof lengths / sizeof *lengths; n += grid_step(isa)) {
        problem p = base(dtype, isa, lengths[n]);
        p.head_dim = dims[n];
        p.layout = (layout)(n % 3);
        p.heads_q = ratios[is_emulated(isa) ? n % 2 : n % 4];
        test_natural(&p, PBS_OWN_SEGMENT, 64, p.heads_q, 50, 13);
        test_natural(&p, (pbs_own)(n % 5), 64, 1, 50, 13);
    }
    if (grid_step(isa) > 3 || (grid_step(isa) == 3 && dtype != PBS_DTYPE_BF16)) return; /* slow */
    problem p = base(dtype, isa, 280);
    p.seqlen_q = 90; /* chunked prefill; offset 190 ends two keys before a block does */
    p.batch = is_emulated(isa) ? 1 : 2;
    if (!is_emulated(isa)) test_natural(&p, PBS_OWN_ALL, 64, 2, 0, 11);
    p.block = 128;
    p.segment = 256;
    test_natural(&p, PBS_OWN_BLOCK, 128, 2, 50, 11);
    p.block = 256;
    test_natural(&p, PBS_OWN_MASK, 64, 1, 50, 11);
    p.block = 64;
    test_natural(&p, PBS_OWN_MASK, 256, 2, 50, 11);
    p.segment = 128;
    p.heads_q = 4;
    p.heads_k = 2;
    p.seqlen_q = is_emulated(isa) ? 130 : 300;
    p.seqlen_k = 420;
    if (!is_emulated(isa)) test_packed(&p, PBS_PERMUTE_KEYS, PBS_OWN_SEGMENT);
    test_packed(&p, PBS_PERMUTE_BOTH, PBS_OWN_SEGMENT);
}

/* Left and right padding, a prefix, no rows, no keys, more queries than keys. */
static void test_geometry(void) {
    static const int32_t geometry[4][4] = {
        {5, 0, 60, 0}, {140, 0, 131, 190}, {3, 100, 0, 20}, {300, 90, 0, 155}};
    for (int own = 0; own < 5; own++) {
        problem p = base(widest_dtype(), PBS_ISA_AUTO, 320);
        p.batch = 4;
        p.seqlen_q = 191;
        p.has_geometry = 1;
        p.layout = LAYOUT_BNHD;
        for (int b = 0; b < 4; b++) {
            p.q_start[b] = geometry[0][b];
            p.q_len[b] = geometry[1][b];
            p.kv_start[b] = geometry[2][b];
            p.kv_len[b] = geometry[3][b];
        }
        test_natural(&p, (pbs_own)own, 64, 2, 60, 3);
        p.gqa = PBS_GQA_GROUP;
        if (own == PBS_OWN_SEGMENT || own == PBS_OWN_NONE) {
            test_packed(&p, PBS_PERMUTE_KEYS, (pbs_own)own);
            test_packed(&p, PBS_PERMUTE_QUERIES, (pbs_own)own);
        }
    }
}

/* A view on memory that is reserved, not used: only touched pages exist. */
static pbs_view sparse_view(char *memory, pbs_dtype dtype, int32_t heads, int32_t n, int32_t dim,
                            int64_t row_stride, int64_t head_stride) {
    pbs_view v = {memory, dtype, {1, heads, n, dim}, {0, head_stride, row_stride, 1}};
    return v;
}

static void copy_elements(const pbs_view *from, const pbs_view *to) {
    for (int32_t h = 0; h < from->size[1]; h++)
        for (int32_t i = 0; i < from->size[2]; i++)
            memcpy((char *)to->data + 2 * (h * to->stride[1] + i * to->stride[2]),
                   (const char *)from->data + 2 * (h * from->stride[1] + i * from->stride[2]),
                   2 * (size_t)from->size[3]);
}

/* Offsets beyond 2^31 elements, in rows and in heads: same bits as the compact call. */
static void test_huge_strides(void) {
    const int64_t row = INT64_C(1) << 24, head = 8, tensor = INT64_C(2) * 140 * row;
    problem p = base(PBS_DTYPE_BF16, PBS_ISA_AUTO, 140);
    p.heads_k = 2;
    p.head_dim = 8;
    char *memory = (char *)mmap(NULL, (size_t)(4 * tensor), PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED, "cannot reserve %lld bytes", (long long)(4 * tensor));
    if (memory == MAP_FAILED) return;
    problem_make(&p, 4);
    brute_attend_args a = {.block_q = 64, .block_k = 64, .heads_sel = 2, .own = PBS_OWN_ALL};
    for (int swapped = 0; swapped < 2; swapped++) { /* far rows, then far heads */
        int64_t r = swapped ? head : row, h = swapped ? 139 * row : head;
        pbs_attend_params s = params_of(&p, &a);
        run(&s);
        s.q = sparse_view(memory, p.dtype, 2, 140, 8, r, h);
        s.k.view = sparse_view(memory + tensor, p.dtype, 2, 140, 8, r, h);
        s.v.view = sparse_view(memory + 2 * tensor, p.dtype, 2, 140, 8, r, h);
        s.out = sparse_view(memory + 3 * tensor, p.dtype, 2, 140, 8, r, h);
        copy_elements(&p.q, &s.q);
        copy_elements(&p.k.view, &s.k.view);
        copy_elements(&p.v.view, &s.v.view);
        run(&s);
        for (int32_t hq = 0; hq < 2; hq++)
            for (int32_t i = 0; i < 140; i++)
                for (int32_t d = 0; d < 8; d++)
                    CHECK(element(&s.out, 0, hq, i, d) == element(&p.out, 0, hq, i, d),
                          "huge stride, swapped %d, [%d, %d, %d]", swapped, hq, i, d);
    }
    munmap(memory, (size_t)(4 * tensor));
    problem_free(&p);
}

void test_attend(void) {
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++) test_isa((pbs_dtype)dtype, isas[i]);
    }
    test_geometry();
    test_huge_strides();
}
