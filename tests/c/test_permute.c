/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "harness.h"

static pbs_permute_params params_of(const problem *p, pbs_permute_mode mode) {
    pbs_permute_params s = PBS_INIT(pbs_permute_params);
    s.q = p->q;
    s.k = p->k;
    s.v = p->v;
    s.geometry = p->geometry;
    s.block_size = p->block;
    s.segment_size = p->segment;
    s.gqa = p->gqa;
    s.mode = mode;
    s.exec.isa = p->isa;
    return s;
}

typedef struct outputs {
    int32_t *k_perm, *q_perm, *pool_len;
    float *k_pool, *v_pool;
} outputs;

static outputs run(const problem *p, pbs_permute_params *s) {
    size_t heads = (size_t)p->batch * (size_t)problem_heads_p(p), N = (size_t)p->seqlen_k;
    size_t pool = heads * (size_t)problem_blocks_k(p) * (size_t)p->head_dim;
    outputs o;
    o.k_perm = s->k_perm = (int32_t *)filled(heads * N * sizeof(int32_t), 0xff);
    o.k_pool = s->k_pool = (float *)filled(pool * sizeof(float), 0xff);
    o.v_pool = s->v_pool = (float *)filled(pool * sizeof(float), 0xff);
    o.pool_len = s->pool_len =
        (int32_t *)filled((size_t)p->batch * (size_t)problem_blocks_k(p) * sizeof(int32_t), 0xff);
    o.q_perm = s->q_perm = (int32_t *)filled(
        (size_t)p->batch * (size_t)p->heads_q * (size_t)p->seqlen_q * sizeof(int32_t), 0xff);
    RUN(pbs_permute_workspace_size(s, &s->workspace_bytes));
    s->workspace = filled(s->workspace_bytes, 0xff);
    RUN(pbs_permute(s));
    free(s->workspace);
    return o;
}

static void free_outputs(outputs *o) {
    free(o->k_perm);
    free(o->q_perm);
    free(o->pool_len);
    free(o->k_pool);
    free(o->v_pool);
}

static void compare_pool(const problem *p, int32_t b, int32_t hp, int32_t n, const int32_t *k_perm,
                         const outputs *o) {
    int32_t first = n * p->block, end = first + p->block;
    int32_t hk = hp / (problem_heads_p(p) / p->heads_k);
    int64_t at = ((int64_t)b * problem_heads_p(p) + hp) * problem_blocks_k(p) + n;
    if (end > p->kv_len[b]) end = p->kv_len[b];
    int32_t count = end > first ? end - first : 0;
    CHECK(o->pool_len[b * problem_blocks_k(p) + n] == count, "pool_len of block %d", n);
    for (int32_t d = 0; d < p->head_dim; d++) {
        double k = 0.0, v = 0.0;
        for (int32_t j = first; j < end; j++) {
            k += element(&p->k.view, b, hk, p->kv_start[b] + k_perm[j], d) / count;
            v += element(&p->v.view, b, hk, p->kv_start[b] + k_perm[j], d) / count;
        }
        double k_got = (double)o->k_pool[at * p->head_dim + d];
        double v_got = (double)o->v_pool[at * p->head_dim + d];
        CHECK(fabs(k_got - k) < 1e-5 && fabs(v_got - v) < 1e-5,
              "%s pool [%d, %d, %d, %d]: %g %g, not %g %g", pbs_isa_name(p->isa), b, hp, n, d,
              k_got, v_got, k, v);
    }
}

/* score [N]: in each segment all keys are alike but for one byte of one of them. */
static void one_byte_apart(const problem *p, uint64_t seed, float *score) {
    for (int32_t j = 0; j < p->seqlen_k; j++) {
        uint32_t bits = 0x3f800000; /* 1 */
        if (j % p->segment == 77)
            bits += UINT32_C(1) << 8 * (((uint64_t)j / (uint64_t)p->segment + seed) % 4);
        memcpy(&score[j], &bits, sizeof bits);
    }
}

static void test_keys(problem *p, uint64_t seed) {
    int32_t heads = problem_heads_p(p), N = p->seqlen_k;
    rng r = {seed};
    problem_make(p, seed);
    pbs_permute_params s = params_of(p, PBS_PERMUTE_KEYS);
    float *score = (float *)filled((size_t)(p->batch * heads * N) * sizeof(float), 0);
    int32_t *expected = (int32_t *)filled((size_t)N * sizeof(int32_t), 0);
    int32_t on[16];
    for (int32_t i = 0; i < p->batch * heads * N; i++) {
        score[i] = (float)rng_below(&r, 40) - 5.0f; /* many ties, both zeros */
        if (score[i] == 0.0f && i % 2) score[i] = -0.0f;
        if (rng_below(&r, 30) == 0) score[i] = NAN;
        if (rng_below(&r, 9) == 0) score[i] = (float)(rng_below(&r, 5) - 2) * 0x1p-149f;
    }
    for (int32_t b = 0; b < p->batch && heads > 2; b++)
        one_byte_apart(p, seed / 2, score + (int64_t)b * heads * N);
    for (int32_t h = 0; h < heads; h++) on[h] = h != 1;
    s.score = score;
    s.permute_heads = on;
    outputs o = run(p, &s);
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t hp = 0; hp < heads; hp++) {
            int64_t at = ((int64_t)b * heads + hp) * N;
            brute_order(p, b, score + at, expected);
            for (int32_t j = 0; j < N && !on[hp]; j++) expected[j] = j;
            for (int32_t j = 0; j < N; j++)
                CHECK(o.k_perm[at + j] == expected[j], "k_perm [%d, %d, %d]: %d, not %d", b, hp, j,
                      o.k_perm[at + j], expected[j]);
            for (int32_t n = 0; n < problem_blocks_k(p); n++)
                compare_pool(p, b, hp, n, expected, &o);
        }
    /* The order that came out, given back, is taken as it is. */
    pbs_permute_params again = params_of(p, PBS_PERMUTE_KEYS);
    again.k_perm_in = o.k_perm;
    outputs o2 = run(p, &again);
    CHECK(memcmp(o.k_perm, o2.k_perm, (size_t)(p->batch * heads * N) * sizeof(int32_t)) == 0,
          "k_perm_in is kept");
    free_outputs(&o);
    free_outputs(&o2);
    free(score);
    free(expected);
    problem_free(p);
}

/* Rows of one row segment by the definition, in fp64. */
static void brute_queries(const problem *p, int32_t b, int32_t hq, int32_t first,
                          const int32_t *k_perm, int32_t *q_perm) {
    int32_t S = p->segment, position = first + p->kv_len[b] - p->q_len[b];
    int32_t key = position < 0 ? 0 : position / S * S, at = first,
            hk = hq / (p->heads_q / p->heads_k);
    unsigned char taken[PBS_MAX_SEGMENT_SIZE] = {0};
    for (int32_t i = 0; i < S && first + i < p->seqlen_q; i++) q_perm[first + i] = first + i;
    if (first + S > p->q_len[b] || p->kv_len[b] <= S) return;
    for (int32_t n = 0; n < S / p->block; n++) {
        double similarity[PBS_MAX_SEGMENT_SIZE], norm[PBS_MAX_SEGMENT_SIZE];
        for (int32_t i = 0; i < S; i++) {
            similarity[i] = norm[i] = 0.0;
            for (int32_t d = 0; d < p->head_dim; d++) {
                double q = element(&p->q, b, hq, p->q_start[b] + first + i, d), c = 0.0;
                for (int32_t j = key + n * p->block; j < key + (n + 1) * p->block; j++)
                    c += element(&p->k.view, b, hk, p->kv_start[b] + (k_perm ? k_perm[j] : j), d);
                similarity[i] += q * c;
                norm[i] += q * q;
            }
            similarity[i] /= sqrt(norm[i]);
        }
        unsigned char mine[PBS_MAX_SEGMENT_SIZE] = {0};
        for (int32_t taken_now = 0; taken_now < p->block; taken_now++) {
            int32_t best = -1;
            for (int32_t i = 0; i < S; i++)
                if (!taken[i] && (best < 0 || similarity[i] > similarity[best])) best = i;
            taken[best] = mine[best] = 1;
        }
        for (int32_t i = 0; i < S; i++)
            if (mine[i]) q_perm[at++] = first + i;
    }
}

static void test_queries(problem *p, pbs_permute_mode mode, uint64_t seed) {
    int32_t heads = problem_heads_p(p);
    rng r = {seed};
    problem_make(p, seed);
    pbs_permute_params s = params_of(p, mode);
    size_t count = (size_t)(p->batch * heads * p->seqlen_k);
    float *score = (float *)filled(count * sizeof(float), 0);
    int32_t *expected = (int32_t *)filled((size_t)p->seqlen_q * sizeof(int32_t), 0);
    for (size_t i = 0; i < count; i++) score[i] = rng_uniform(&r, 0.0f, 1.0f);
    s.score = score;
    outputs o = run(p, &s);
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t hq = 0; hq < p->heads_q; hq++) {
            int32_t hp = hq / (p->heads_q / heads);
            const int32_t *k_perm = o.k_perm + ((int64_t)b * heads + hp) * p->seqlen_k;
            const int32_t *q_perm = o.q_perm + ((int64_t)b * p->heads_q + hq) * p->seqlen_q;
            for (int32_t first = 0; first < p->seqlen_q; first += p->segment)
                brute_queries(p, b, hq, first, mode == PBS_PERMUTE_BOTH ? k_perm : NULL, expected);
            for (int32_t i = 0; i < p->seqlen_q; i++)
                CHECK(q_perm[i] == expected[i], "mode %d q_perm [%d, %d, %d]: %d, not %d",
                      (int)mode, b, hq, i, q_perm[i], expected[i]);
        }
    free_outputs(&o);
    free(score);
    free(expected);
    problem_free(p);
}

void test_permute(void) {
    static const int32_t lengths[] = {1, 64, 127, 128, 129, 255, 256, 383, 401};
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++)
            for (size_t n = grid_first(isas[i]); n < sizeof lengths / sizeof *lengths;
                 n += grid_step(isas[i])) {
                problem p = {.batch = 2, .heads_q = 4, .heads_k = 2, .head_dim = 24};
                p.seqlen_q = 5;
                p.seqlen_k = lengths[n];
                p.block = 64;
                p.segment = n % 2 ? 128 : 192;
                p.dtype = (pbs_dtype)dtype;
                p.isa = isas[i];
                p.gqa = n % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
                p.layout = (layout)(n % 3);
                p.has_geometry = n > 4;
                for (int b = 0; b < 2; b++) {
                    p.q_len[b] = 5;
                    p.kv_start[b] = 30 * b;
                    p.kv_len[b] = lengths[n] - 100 * b;
                }
                test_keys(&p, n + 1);
            }
    }
    problem p = {.batch = 2, .heads_q = 2, .heads_k = 1, .seqlen_q = 300, .seqlen_k = 420};
    p.head_dim = 16;
    p.block = 64;
    p.segment = 128;
    p.dtype = widest_dtype();
    p.has_geometry = 1;
    p.q_len[0] = 300, p.kv_len[0] = 420;
    p.q_start[1] = 20, p.q_len[1] = 270, p.kv_start[1] = 1, p.kv_len[1] = 200;
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(p.dtype, isas);
    for (int i = 0; i < count; i++) {
        p.isa = isas[i];
        test_queries(&p, PBS_PERMUTE_QUERIES, 5);
        test_queries(&p, PBS_PERMUTE_BOTH, 6);
    }
}
