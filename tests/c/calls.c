/* SPDX-License-Identifier: Apache-2.0 */
#include "calls.h"

#include <string.h>

static const char *const NAMES[PARTS] = {"out",    "lse",   "bits",   "count",  "k_perm",
                                         "q_perm", "score", "k_pool", "v_pool", "mass"};

static int permutes_queries(const options *o) {
    return o->mode == PBS_PERMUTE_QUERIES || o->mode == PBS_PERMUTE_BOTH;
}

/* all: also what only single verbs give. */
static result new_result(const problem *p, const options *o, int all) {
    size_t heads = (size_t)(p->batch * problem_heads_p(p)), word = sizeof(int32_t);
    size_t rows = (size_t)(p->batch * p->heads_q * problem_blocks_q(p));
    size_t keys = heads * (size_t)p->seqlen_k, blocks = (size_t)problem_blocks_k(p);
    result r = {{NULL}, {0}};
    r.bytes[OUT] = p->out_bytes;
    r.bytes[LSE] = view_bytes(&p->lse);
    r.bytes[BITS] = rows * (size_t)problem_words(p) * word;
    r.bytes[COUNT] = rows * word;
    r.bytes[K_PERM] = keys * word;
    if (permutes_queries(o)) r.bytes[Q_PERM] = (size_t)(p->batch * p->heads_q * p->seqlen_q) * word;
    if (all) {
        r.bytes[SCORE] = keys * word;
        r.bytes[K_POOL] = r.bytes[V_POOL] = heads * blocks * (size_t)p->head_dim * word;
        r.bytes[MASS] = rows * blocks * word;
    }
    for (int i = 0; i < PARTS; i++)
        if (r.bytes[i]) r.part[i] = filled(r.bytes[i], 0xff);
    return r;
}

void drop_result(result *r) {
    for (int i = 0; i < PARTS; i++) drop(r->part[i]);
}

void check_same(const result *a, const result *b, const char *what) {
    for (int i = 0; i < PARTS; i++)
        if (a->part[i] && b->part[i])
            CHECK(memcmp(a->part[i], b->part[i], a->bytes[i]) == 0, "%s: other %s", what, NAMES[i]);
}

static pbs_exec exec_of(const problem *p, options *o) {
    pbs_exec e = {.parallel_for = o->parallel_for, .pool = &o->threads, .num_threads = o->threads};
    e.isa = p->isa;
    return e;
}

result prefill(const problem *p, options o) {
    result r = new_result(p, &o, 0);
    pbs_prefill_params s = PBS_INIT(pbs_prefill_params);
    s.q = p->q, s.k = p->k, s.v = p->v;
    s.permute_heads = o.permute_heads, s.tau_heads = o.tau_heads;
    s.geometry = p->geometry, s.softmax_scale = p->scale;
    s.block_size = p->block, s.segment_size = p->segment, s.gqa = p->gqa;
    s.mode = o.mode, s.order = o.order, s.seed = 11;
    s.method = o.method, s.stride = 16, s.tau = o.tau, s.correction = o.correction;
    s.normalize = o.normalize;
    s.out = p->out, s.out.data = r.part[OUT], s.lse = p->lse, s.lse.data = r.part[LSE];
    s.count = r.part[COUNT], s.bits = r.part[BITS];
    s.k_perm = r.part[K_PERM], s.q_perm = r.part[Q_PERM];
    s.workspace_cap = o.cap;
    s.exec = exec_of(p, &o);
    RUN(pbs_prefill_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled_workspace(s.workspace_bytes);
    RUN(pbs_prefill(&s));
    drop(s.workspace);
    return r;
}

static void score(const problem *p, options *o, result *r) {
    pbs_score_params s = PBS_INIT(pbs_score_params);
    s.q = p->q, s.k = p->k, s.geometry = p->geometry, s.softmax_scale = p->scale;
    s.block_size = p->block, s.segment_size = p->segment, s.gqa = p->gqa, s.order = o->order;
    s.seed = 11, s.score = r->part[SCORE], s.exec = exec_of(p, o);
    RUN(pbs_score_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled_workspace(s.workspace_bytes);
    RUN(pbs_score(&s));
    drop(s.workspace);
}

/* Returns the packed panels. */
static void *permute(const problem *p, options *o, result *r, size_t *packed_bytes) {
    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = p->q, t.k = p->k, t.v = p->v, t.permute_heads = o->permute_heads;
    t.score = r->part[SCORE], t.geometry = p->geometry;
    t.block_size = p->block, t.segment_size = p->segment, t.gqa = p->gqa, t.mode = o->mode;
    t.k_perm = r->part[K_PERM], t.q_perm = r->part[Q_PERM];
    t.k_pool = r->part[K_POOL], t.v_pool = r->part[V_POOL], t.exec = exec_of(p, o);
    t.correction = o->correction;
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    RUN(pbs_permute_workspace_size(&t, &t.workspace_bytes));
    t.packed = filled_lines(t.packed_bytes, 0xff);
    t.workspace = filled_workspace(t.workspace_bytes);
    RUN(pbs_permute(&t));
    drop(t.workspace);
    *packed_bytes = t.packed_bytes;
    return t.packed;
}

static void choose(const problem *p, options *o, result *r) {
    pbs_select_params u = PBS_INIT(pbs_select_params);
    u.q = p->q, u.k = p->k, u.k_pool = r->part[K_POOL], u.k_perm = r->part[K_PERM];
    u.q_perm = r->part[Q_PERM], u.tau_heads = o->tau_heads, u.geometry = p->geometry;
    u.softmax_scale = p->scale, u.block_size = p->block, u.segment_size = p->segment;
    u.gqa = p->gqa, u.mode = o->mode, u.method = o->method, u.stride = 16, u.tau = o->tau;
    u.normalize = o->normalize;
    u.bits = r->part[BITS], u.count = r->part[COUNT], u.mass = r->part[MASS];
    u.exec = exec_of(p, o);
    RUN(pbs_select_workspace_size(&u, &u.workspace_bytes));
    u.workspace = filled_workspace(u.workspace_bytes);
    RUN(pbs_select(&u));
    drop(u.workspace);
}

static void attend(const problem *p, options *o, result *r, void *packed, size_t packed_bytes) {
    pbs_attend_params a = PBS_INIT(pbs_attend_params);
    a.q = p->q, a.k = p->k, a.v = p->v, a.packed = packed, a.packed_bytes = packed_bytes;
    a.bits = r->part[BITS], a.q_perm = r->part[Q_PERM], a.geometry = p->geometry;
    a.softmax_scale = p->scale, a.block_q = a.block_k = p->block, a.segment_size = p->segment;
    a.gqa = p->gqa, a.own = o->mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
    a.out = p->out, a.out.data = r->part[OUT], a.lse = p->lse, a.lse.data = r->part[LSE];
    a.exec = exec_of(p, o), a.correction = o->correction;
    RUN(pbs_attend_workspace_size(&a, &a.workspace_bytes));
    a.workspace = filled_workspace(a.workspace_bytes);
    RUN(pbs_attend(&a));
    drop(a.workspace);
}

result verbs(const problem *p, options o) {
    result r = new_result(p, &o, 1);
    size_t packed_bytes;
    score(p, &o, &r);
    void *packed = permute(p, &o, &r, &packed_bytes);
    choose(p, &o, &r);
    attend(p, &o, &r, packed, packed_bytes);
    drop(packed);
    return r;
}

problem three_sequences(pbs_isa isa, int32_t seqlen_q, int32_t seqlen_k) {
    problem p = {.batch = 3, .heads_q = 6, .heads_k = 2, .head_dim = 16};
    const int32_t geometry[4][3] = {{0, 17, seqlen_q - 130},
                                    {seqlen_q, seqlen_q - 130, 0},
                                    {0, 11, 3},
                                    {seqlen_k, seqlen_q - 130, 131}};
    p.seqlen_q = seqlen_q;
    p.seqlen_k = seqlen_k;
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
