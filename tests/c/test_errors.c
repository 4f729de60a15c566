/* SPDX-License-Identifier: Apache-2.0
 *
 * Every kind of wrong argument: the right status, a sentence that names the field, and outputs that
 * are as they were. Calls with nothing to do succeed.
 */
#define _DEFAULT_SOURCE /* setenv */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

static void small(problem *p) {
    *p = (problem){.batch = 2, .heads_q = 4, .heads_k = 2, .seqlen_q = 150, .seqlen_k = 200};
    p->head_dim = 16;
    p->block = 64;
    p->segment = 128;
    p->dtype = PBS_DTYPE_FP32;
    p->isa = PBS_ISA_C;
    p->has_geometry = 1;
    for (int b = 0; b < 2; b++) {
        p->q_len[b] = 150;
        p->kv_len[b] = 200;
    }
    problem_make(p, 1);
}

static pbs_prefill_params good_prefill(problem *p) {
    pbs_prefill_params s = PBS_INIT(pbs_prefill_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.geometry = p->geometry;
    s.block_size = 64;
    s.segment_size = 128;
    s.mode = PBS_PERMUTE_KEYS;
    s.tau = 0.9f;
    s.stride = 8;
    s.out = p->out;
    s.lse = p->lse;
    s.exec.isa = PBS_ISA_C;
    return s;
}

static void refused(const char *field, pbs_status expected, pbs_status got) {
    CHECK(got == expected, "%s: %s (%s), not %s", field, pbs_status_name(got), pbs_last_error(),
          pbs_status_name(expected));
    CHECK(strstr(pbs_last_error(), field) != NULL, "\"%s\" does not name %s", pbs_last_error(),
          field);
}

static int untouched(const problem *p) {
    const unsigned char *out = (const unsigned char *)p->out.data;
    for (size_t i = 0; i < p->out_bytes; i++)
        if (out[i] != 0xff) return 0;
    return 1;
}

/* One field of a good call is changed; sized: the size function must refuse it as well. */
#define BAD_PREFILL(field, status, sized, ...)                                      \
    do {                                                                            \
        problem p_;                                                                 \
        small(&p_);                                                                 \
        pbs_prefill_params s = good_prefill(&p_);                                   \
        RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));                    \
        s.workspace = filled(s.workspace_bytes, 0);                                 \
        void *workspace_ = s.workspace;                                             \
        __VA_ARGS__;                                                                \
        refused(field, status, pbs_prefill(&s));                                    \
        size_t bytes_;                                                              \
        if (sized) refused(field, status, pbs_prefill_workspace_size(&s, &bytes_)); \
        CHECK(untouched(&p_), "%s: out was written", field);                        \
        free(workspace_);                                                           \
        problem_free(&p_);                                                          \
    } while (0)

static void test_views(void) {
    BAD_PREFILL("struct_size", PBS_ERR_STRUCT_SIZE, 1, s.struct_size = 64);
    BAD_PREFILL("q", PBS_ERR_NULL, 0, s.q.data = NULL);
    BAD_PREFILL("v", PBS_ERR_NULL, 0, s.v.view.data = NULL);
    BAD_PREFILL("q.size[2]", PBS_ERR_SHAPE, 1, s.q.size[2] = -1);
    BAD_PREFILL("k.size[0]", PBS_ERR_SHAPE, 1, s.k.view.size[0] = 3);
    BAD_PREFILL("k.size[3]", PBS_ERR_SHAPE, 1, s.k.view.size[3] = 24);
    BAD_PREFILL("v.size[2]", PBS_ERR_SHAPE, 1, s.v.view.size[2] = 100);
    BAD_PREFILL("v.size[3]", PBS_ERR_UNSUPPORTED, 1, s.v.view.size[3] = 8);
    BAD_PREFILL("q.size[1]", PBS_ERR_SHAPE, 1, s.q.size[1] = 3);
    BAD_PREFILL("head_dim", PBS_ERR_UNSUPPORTED, 1, s.q.size[3] = s.k.view.size[3] = 12);
    BAD_PREFILL("head_dim", PBS_ERR_UNSUPPORTED, 1, s.q.size[3] = s.k.view.size[3] = 264);
    BAD_PREFILL("q.dtype", PBS_ERR_DTYPE, 1, s.q.dtype = (pbs_dtype)9);
    BAD_PREFILL("k.dtype", PBS_ERR_DTYPE, 1, s.k.view.dtype = PBS_DTYPE_FP16);
    BAD_PREFILL("v.dtype", PBS_ERR_DTYPE, 1, s.v.view.dtype = PBS_DTYPE_FP16);
    BAD_PREFILL("q.stride[3]", PBS_ERR_STRIDE, 1, s.q.stride[3] = 2);
    BAD_PREFILL("k.stride[2]", PBS_ERR_STRIDE, 1, s.k.view.stride[2] = -16);
    BAD_PREFILL("k.block_table", PBS_ERR_UNSUPPORTED, 1, s.k.block_table = p_.q_len);
    BAD_PREFILL("out.size[2]", PBS_ERR_SHAPE, 0, s.out.size[2] = 149);
    BAD_PREFILL("out.dtype", PBS_ERR_DTYPE, 0, s.out.dtype = PBS_DTYPE_BF16);
    BAD_PREFILL("out.stride", PBS_ERR_STRIDE, 0, s.out.stride[2] = 8);
    BAD_PREFILL("out.stride", PBS_ERR_STRIDE, 0, s.out.stride[1] = 0);
    BAD_PREFILL("out.stride[0]", PBS_ERR_STRIDE, 0, s.out.stride[0] = 0);
    BAD_PREFILL("lse.dtype", PBS_ERR_DTYPE, 0, s.lse.dtype = PBS_DTYPE_FP16);
    BAD_PREFILL("lse.size[3]", PBS_ERR_SHAPE, 0, s.lse.size[3] = 2);
}

static void test_options(void) {
    static const float taus[4] = {0.5f, 0.5f, NAN, 0.5f};
    BAD_PREFILL("block_size", PBS_ERR_UNSUPPORTED, 1, s.block_size = 32);
    BAD_PREFILL("block_size", PBS_ERR_VALUE, 1, s.block_size = 0);
    BAD_PREFILL("segment_size", PBS_ERR_UNSUPPORTED, 1, s.segment_size = 100);
    BAD_PREFILL("segment_size", PBS_ERR_UNSUPPORTED, 1, s.segment_size = 4096);
    BAD_PREFILL("segment_size", PBS_ERR_VALUE, 1, s.segment_size = -128);
    BAD_PREFILL("softmax_scale", PBS_ERR_VALUE, 1, s.softmax_scale = -1.0f);
    BAD_PREFILL("softmax_scale", PBS_ERR_VALUE, 1, s.softmax_scale = NAN);
    BAD_PREFILL("gqa", PBS_ERR_VALUE, 1, s.gqa = (pbs_gqa)2);
    BAD_PREFILL("mode", PBS_ERR_VALUE, 1, s.mode = (pbs_permute_mode)5);
    BAD_PREFILL("order", PBS_ERR_VALUE, 1, s.order = (pbs_order)4);
    BAD_PREFILL("method", PBS_ERR_VALUE, 1, s.method = (pbs_select_method)2);
    BAD_PREFILL("reduce", PBS_ERR_VALUE, 1, s.reduce = (pbs_reduce)2);
    BAD_PREFILL("rule", PBS_ERR_VALUE, 1, s.rule = (pbs_rule)4);
    BAD_PREFILL("stride", PBS_ERR_VALUE, 1, s.method = PBS_SELECT_ANTIDIAGONAL; s.stride = 7);
    BAD_PREFILL("tau", PBS_ERR_VALUE, 1, s.tau = INFINITY);
    BAD_PREFILL("tau_heads[2]", PBS_ERR_VALUE, 1, s.tau_heads = taus);
    BAD_PREFILL("exec.num_threads", PBS_ERR_VALUE, 1, s.exec.num_threads = -1);
    BAD_PREFILL("exec.isa", PBS_ERR_VALUE, 1, s.exec.isa = PBS_ISA_COUNT);
    BAD_PREFILL("exec.stream", PBS_ERR_UNSUPPORTED, 1, s.exec.stream = &s);
    BAD_PREFILL("workspace", PBS_ERR_NULL, 0, s.workspace = NULL);
    BAD_PREFILL("workspace_bytes", PBS_ERR_WORKSPACE, 0, s.workspace_bytes -= 1);
    for (int isa = PBS_ISA_AVX2; isa < PBS_ISA_COUNT; isa++)
        if (!pbs_isa_available((pbs_isa)isa))
            BAD_PREFILL(pbs_isa_name((pbs_isa)isa), PBS_ERR_UNSUPPORTED, 1,
                        s.exec.isa = (pbs_isa)isa);
    setenv("PBS_ATTN_ISA", "sse9", 1);
    BAD_PREFILL("sse9", PBS_ERR_VALUE, 1, s.exec.isa = PBS_ISA_AUTO);
    setenv("PBS_ATTN_ISA", "c", 1);
    CHECK(pbs_isa_for(PBS_ISA_AUTO, PBS_DTYPE_FP32) == PBS_ISA_C, "PBS_ATTN_ISA=c is obeyed");
    unsetenv("PBS_ATTN_ISA");
    for (int isa = PBS_ISA_C; isa < PBS_ISA_COUNT; isa++)
        CHECK((pbs_isa_missing((pbs_isa)isa) == NULL) == (pbs_isa_available((pbs_isa)isa) != 0),
              "%s: missing for a reason, or there", pbs_isa_name((pbs_isa)isa));
    CHECK(pbs_isa_for(PBS_ISA_EMU_AMX, PBS_DTYPE_BF16) == PBS_ISA_EMU_AMX &&
              pbs_isa_for(PBS_ISA_EMU_AMX, PBS_DTYPE_FP16) == PBS_ISA_EMU_AVX512,
          "tiles take bf16; what they do not take goes to the next set");
}

static void test_arrays(void) {
    BAD_PREFILL("q_start[1]", PBS_ERR_VALUE, 1, p_.q_start[1] = 151);
    BAD_PREFILL("q_len[1]", PBS_ERR_VALUE, 1, p_.q_len[1] = 151);
    BAD_PREFILL("q_len[0]", PBS_ERR_VALUE, 1, p_.q_start[0] = 1);
    BAD_PREFILL("kv_len[0]", PBS_ERR_VALUE, 1, p_.kv_len[0] = -1);
    BAD_PREFILL("kv_start[1]", PBS_ERR_VALUE, 1, p_.kv_start[1] = -1);
    BAD_PREFILL("kv_len[0]", PBS_ERR_VALUE, 1, s.geometry.max_seqlen_k = 199);
    BAD_PREFILL("max_seqlen_q", PBS_ERR_VALUE, 1, s.geometry.max_seqlen_q = -1);
    int32_t perm[2 * 4 * 200];
    for (int i = 0; i < 2 * 4 * 200; i++) perm[i] = i % 200;
    BAD_PREFILL("k_perm_in[1, 3, 5]", PBS_ERR_VALUE, 0, perm[7 * 200 + 5] = 4; s.k_perm_in = perm);
    perm[7 * 200 + 5] = 5;
    BAD_PREFILL("k_perm_in[0, 0, 130]", PBS_ERR_VALUE, 0, perm[130] = 131; s.k_perm_in = perm);
    perm[130] = 130;
    BAD_PREFILL("k_perm_in[0, 1, 0]", PBS_ERR_VALUE, 0, perm[200] = 150; s.k_perm_in = perm);
    perm[200] = 0;
    BAD_PREFILL("k_perm_in", PBS_ERR_VALUE, 0, s.mode = PBS_PERMUTE_IDENTITY; s.k_perm_in = perm);
}

static pbs_attend_params good_attend(const problem *p, const uint32_t *bits) {
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.bits = bits;
    s.block_q = s.block_k = 64;
    s.segment_size = 128;
    s.out = p->out;
    s.exec.isa = PBS_ISA_C;
    return s;
}

#define BAD_ATTEND(field, status, ...)                          \
    do {                                                        \
        pbs_attend_params s = good_attend(&p, bits);            \
        RUN(pbs_attend_workspace_size(&s, &s.workspace_bytes)); \
        s.workspace = workspace;                                \
        __VA_ARGS__;                                            \
        refused(field, status, pbs_attend(&s));                 \
        CHECK(untouched(&p), "%s: out was written", field);     \
    } while (0)

static void test_attend_arguments(void) {
    problem p;
    small(&p);
    uint32_t bits[2 * 4 * 3] = {0};
    int32_t q_perm[2 * 4 * 150];
    for (int i = 0; i < 2 * 4 * 150; i++) q_perm[i] = i % 150;
    void *workspace = filled(1 << 20, 0), *packed = filled(1 << 20, 0);
    char *aligned = (char *)packed + (64 - (uintptr_t)packed % 64) % 64;
    BAD_ATTEND("bits", PBS_ERR_NULL, s.bits = NULL);
    BAD_ATTEND("block_k", PBS_ERR_UNSUPPORTED, s.block_k = 128);
    BAD_ATTEND("heads_sel", PBS_ERR_SHAPE, s.heads_sel = 3);
    BAD_ATTEND("own", PBS_ERR_VALUE, s.own = (pbs_own)5);
    BAD_ATTEND("q_perm", PBS_ERR_VALUE, s.own = PBS_OWN_MASK; s.q_perm = q_perm);
    BAD_ATTEND("q_perm[0, 0, 9]", PBS_ERR_VALUE, q_perm[3] = 9; s.q_perm = q_perm);
    BAD_ATTEND("packed", PBS_ERR_VALUE, s.packed = aligned + 4; s.packed_bytes = 1 << 19);
    BAD_ATTEND("packed", PBS_ERR_WORKSPACE, s.packed = aligned; s.packed_bytes = 1 << 19);
    float pool[2 * 4 * 4 * 16];
    int32_t k_perm[2 * 4 * 200];
    float score[2 * 4 * 200] = {0};
    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p.q, t.k = p.k, t.v = p.v, t.score = score, t.block_size = 64, t.segment_size = 128;
    t.mode = PBS_PERMUTE_KEYS, t.k_perm = k_perm, t.k_pool = pool, t.packed = aligned;
    t.workspace = workspace, t.workspace_bytes = 1 << 20, t.exec.isa = PBS_ISA_C;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute(&t));
#define PACKED s.packed = aligned, s.packed_bytes = t.packed_bytes
    BAD_ATTEND("packed_bytes", PBS_ERR_WORKSPACE, PACKED; s.packed_bytes -= 64);
    BAD_ATTEND("packed", PBS_ERR_WORKSPACE, PACKED; s.gqa = PBS_GQA_GROUP);
    BAD_ATTEND("packed", PBS_ERR_WORKSPACE, PACKED; s.geometry.q_len = p.q_start);
    BAD_ATTEND("own", PBS_ERR_VALUE, PACKED; s.own = PBS_OWN_BLOCK);
    BAD_ATTEND("segment_size", PBS_ERR_VALUE, PACKED; s.segment_size = 64);
    BAD_ATTEND("packed: made without correction", PBS_ERR_WORKSPACE, PACKED;
               s.correction = PBS_CORRECTION_MEAN);
    BAD_ATTEND("correction", PBS_ERR_VALUE, s.correction = (pbs_correction)2);
    BAD_ATTEND("correction", PBS_ERR_VALUE, s.correction = PBS_CORRECTION_MEAN;
               s.own = PBS_OWN_ALL);
    int32_t on[4] = {1, 0, 1, 1}; /* some history in natural order, so MASK alone is allowed */
    t.permute_heads = on;
    t.correction = PBS_CORRECTION_MEAN;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute(&t));
    BAD_ATTEND("own: MASK", PBS_ERR_VALUE, PACKED; s.correction = PBS_CORRECTION_MEAN;
               s.own = PBS_OWN_MASK);
    BAD_ATTEND("packed_bytes", PBS_ERR_WORKSPACE, PACKED; s.packed_bytes -= 64);
    t.correction = (pbs_correction)2;
    refused("correction", PBS_ERR_VALUE, pbs_permute(&t));
    t.correction = PBS_CORRECTION_MEAN;
    t.packed_bytes -= 1;
    refused("packed_bytes", PBS_ERR_WORKSPACE, pbs_permute(&t));
    t.q_perm = NULL;
    t.mode = PBS_PERMUTE_BOTH;
    refused("q_perm", PBS_ERR_NULL, pbs_permute(&t));
    t.mode = PBS_PERMUTE_KEYS;
    t.score = NULL;
    refused("score", PBS_ERR_NULL, pbs_permute(&t));
    free(workspace);
    free(packed);
    problem_free(&p);
}

/* A struct from the future is fine; a missing struct is not. */
static void test_struct_size(void) {
    struct {
        pbs_prefill_params s;
        char later[64];
    } future = {.later = {1}};
    problem p;
    small(&p);
    future.s = good_prefill(&p);
    future.s.struct_size = sizeof future;
    RUN(pbs_prefill_workspace_size(&future.s, &future.s.workspace_bytes));
    future.s.workspace = filled(future.s.workspace_bytes, 0);
    RUN(pbs_prefill(&future.s));
    free(future.s.workspace);
    refused("params", PBS_ERR_NULL, pbs_prefill(NULL));
    refused("bytes", PBS_ERR_NULL, pbs_prefill_workspace_size(&future.s, NULL));
    problem_free(&p);
}

/* Nothing to do is not an error: 0 sequences, rows, keys or heads. */
static void test_empty(void) {
    for (int what = 0; what < 4; what++)
        for (int mode = 0; mode < 5; mode++) {
            problem p;
            small(&p);
            problem_free(&p);
            p.has_geometry = 0;
            if (what == 0) p.batch = 0;
            if (what == 1) p.seqlen_q = 0;
            if (what == 2) p.seqlen_k = 0;
            if (what == 3) p.heads_q = p.heads_k = 0;
            problem_make(&p, 2);
            pbs_prefill_params s = good_prefill(&p);
            s.mode = (pbs_permute_mode)mode;
            RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));
            s.workspace = filled(s.workspace_bytes, 0xff);
            RUN(pbs_prefill(&s));
            for (int32_t i = 0; what == 2 && i < p.seqlen_q; i++) {
                CHECK(element(&p.out, 1, 3, i, 5) == 0.0, "no key: row %d is not 0", i);
                CHECK(element(&p.lse, 1, 3, i, 0) == -INFINITY, "no key: lse %d is not -inf", i);
            }
            free(s.workspace);
            problem_free(&p);
        }
}

/* Packed varlen: one row of tokens, batch stride 0, outputs in disjoint ranges. */
static void test_varlen(void) {
    problem p;
    small(&p);
    pbs_prefill_params s = good_prefill(&p);
    const int32_t start[2] = {0, 70}, len[2] = {70, 80}, kv_start[2] = {0, 90},
                  kv_len[2] = {90, 110};
    s.geometry = (pbs_geometry){start, len, kv_start, kv_len, 80, 110};
    s.q.stride[0] = s.k.view.stride[0] = s.v.view.stride[0] = 0;
    s.out.stride[0] = s.lse.stride[0] = 0;
    RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_prefill(&s));
    for (int32_t i = 0; i < 150; i++)
        CHECK(!isnan(element(&p.out, 0, 3, i, 0)), "varlen row %d was not written", i);
    free(s.workspace);
    problem_free(&p);
}

void test_errors(void) {
    test_views();
    test_options();
    test_arrays();
    test_attend_arguments();
    test_struct_size();
    test_empty();
    test_varlen();
}
