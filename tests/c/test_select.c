/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "selects.h"

static void test_one(problem *p, pbs_permute_mode mode, pbs_select_method method, pbs_reduce reduce,
                     int32_t stride, uint64_t seed) {
    problem_make(p, seed);
    setup u = select_setup(p, mode, seed);
    u.s.method = method;
    u.s.reduce = reduce;
    u.s.stride = stride;
    select_check(p, &u);
    select_drop(&u);
    problem_free(p);
}

static problem base(pbs_dtype dtype, pbs_isa isa) {
    problem p = {.batch = 1, .heads_q = 2, .heads_k = 1, .head_dim = 16};
    p.block = 64;
    p.segment = 128;
    p.dtype = dtype;
    p.isa = isa;
    return p;
}

/* Every stride and block size: queries after a prefix against more key groups than one chunk has,
 * with a block and an end that are ragged. Large scales make the maxima of chunks differ. */
static void test_strides(pbs_isa isa, size_t thin) {
    static const int32_t strides[] = {8, 16, 32, 64}, blocks[] = {64, 128, 256};
    size_t n = 0;
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
        for (size_t j = 0; j < sizeof blocks / sizeof *blocks; j++, n++) {
            if (n % thin) continue;
            problem p = base(PBS_DTYPE_FP32, isa);
            p.block = p.segment = blocks[j];
            p.head_dim = n % 2 ? 24 : 8;
            p.scale = n % 3 ? 4.0f : 0.0f;
            p.seqlen_k = 64 * strides[i] + 2 * blocks[j] + 37;
            p.seqlen_q = blocks[j] + strides[i] + 5;
            test_one(&p, n % 2 ? PBS_PERMUTE_NONE : PBS_PERMUTE_BOTH, PBS_SELECT_ANTIDIAGONAL,
                     (pbs_reduce)(n / 2 % 2), strides[i], n);
        }
}

/* More groups than a band has; more blocks than a strip has; in one block groups that see nothing
 * and groups that do. */
static void test_bands(pbs_isa isa) {
    problem p = base(PBS_DTYPE_FP32, isa);
    p.seqlen_q = p.seqlen_k = 600;
    test_one(&p, PBS_PERMUTE_NONE, PBS_SELECT_ANTIDIAGONAL, PBS_REDUCE_SUM, 2, 1);
    p.seqlen_q = p.seqlen_k = 1100;
    test_one(&p, PBS_PERMUTE_KEYS, PBS_SELECT_ANTIDIAGONAL, PBS_REDUCE_MAX, 16, 2);
    p.seqlen_q = 300, p.seqlen_k = 250;
    test_one(&p, PBS_PERMUTE_NONE, PBS_SELECT_ANTIDIAGONAL, PBS_REDUCE_SUM, 8, 3);
}

/* A query that is not a number keeps every block, and touches no other query block. */
static void test_nan(pbs_isa isa, pbs_select_method method, pbs_reduce how) {
    problem p = base(PBS_DTYPE_FP32, isa);
    const int32_t bad = 3;
    p.seqlen_q = p.seqlen_k = 389;
    problem_make(&p, 5);
    setup u = select_setup(&p, PBS_PERMUTE_IDENTITY, 5);
    u.s.method = method;
    u.s.reduce = how;
    u.s.tau = 0.1f;
    ((float *)p.q.data)[(bad * p.block + 9) * p.q.stride[2] + 1] = NAN;
    select_run(&u);
    for (int32_t m = 0; m < problem_blocks_q(&p); m++) {
        view_of_row w = select_look(&p, &u.s, 0, 0, m);
        const float *mass = u.s.mass + m * problem_blocks_k(&p);
        for (int32_t n = 0; n < w.history; n++)
            CHECK((mass[n] != mass[n]) == (m == bad), "%s method %d mass [%d, %d]: %g",
                  pbs_isa_name(isa), (int)method, m, n, (double)mass[n]);
        if (m == bad) CHECK(u.s.count[m] == w.history, "%d of %d", u.s.count[m], w.history);
    }
    select_drop(&u);
    problem_free(&p);
}

/* 128K tokens: what grows with them is one sum per key block and lane of a band. */
static void test_bytes(pbs_isa isa) {
    pbs_select_params s = PBS_INIT(pbs_select_params);
    const int32_t tokens = 131072, block = 128, dim = 128;
    char nothing;
    s.q = (pbs_view){&nothing, PBS_DTYPE_FP32, {1, 1, tokens, dim}, {0, 0, dim, 1}};
    s.k.view = s.q;
    s.block_size = block;
    s.segment_size = 256;
    s.mode = PBS_PERMUTE_NONE;
    s.method = PBS_SELECT_ANTIDIAGONAL;
    s.bits = (uint32_t *)(void *)&s;
    s.count = (int32_t *)(void *)&s;
    s.exec.isa = isa;
    for (s.stride = 8; s.stride <= 64; s.stride *= 2) {
        size_t lanes = 16 * (size_t)(block / s.stride), bytes = 0;
        size_t band = lanes * sizeof(float) * (size_t)(s.stride * dim + 2 * (tokens / block));
        size_t chunk = 64 * sizeof(float) * (size_t)(s.stride * dim + (int32_t)lanes);
        size_t strip = 16 * 4 * (size_t)(tokens / block + tokens / block / 32) + 8192 + 4096;
        RUN(pbs_select_workspace_size(&s, &bytes));
        CHECK(bytes && bytes < band + chunk + strip, "%s stride %d: %zu", pbs_isa_name(isa),
              s.stride, bytes);
    }
}

static void test_groups(void) {
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_FP32, isas);
    for (int i = 0; i < count; i++) {
        test_strides(isas[i], grid_step(isas[i]));
        test_bands(isas[i]);
        for (int how = 0; how < 2; how++)
            test_nan(isas[i], PBS_SELECT_ANTIDIAGONAL, (pbs_reduce)how);
        test_nan(isas[i], PBS_SELECT_MEAN_POOL, PBS_REDUCE_SUM);
        test_bytes(isas[i]);
    }
}

void test_select(void) {
    static const int32_t lengths[] = {1, 64, 128, 129, 257, 389, 701};
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++)
            for (size_t n = grid_first(isas[i]); n < sizeof lengths / sizeof *lengths;
                 n += grid_step(isas[i])) {
                problem p = base((pbs_dtype)dtype, isas[i]);
                p.seqlen_q = p.seqlen_k = lengths[n];
                p.gqa = n % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
                p.layout = (layout)(n % 3);
                test_one(&p, (pbs_permute_mode)(n % 5), PBS_SELECT_MEAN_POOL, PBS_REDUCE_SUM, 8, n);
                test_one(&p, (pbs_permute_mode)((n + 2) % 5), PBS_SELECT_ANTIDIAGONAL,
                         (pbs_reduce)(n % 2), n % 2 ? 16 : 4, n);
            }
    }
    test_groups();
    for (int mode = 0; mode < 5; mode++) /* prefix, padding, no rows, more queries than keys */
        for (int method = 0; method < 2; method++) {
            pbs_isa isas[PBS_ISA_COUNT];
            pbs_dtype dtype = widest_dtype();
            available_isas(dtype, isas);
            problem p = base(dtype, isas[0]);
            select_sequences(&p);
            test_one(&p, (pbs_permute_mode)mode, (pbs_select_method)method, PBS_REDUCE_SUM, 64, 3);
        }
}
