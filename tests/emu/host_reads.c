/* SPDX-License-Identifier: Apache-2.0
 *
 * A driver on the host never looks at the memory of its caller's tensors: here all of them, arrays
 * of options and workspaces too, lie where only kernels can read and write.
 */
#include <math.h>
#include <string.h>

#include "../c/harness.h"
#include "hidden.h"

void test_host_reads(void);

enum { BATCH = 2, HEADS_Q = 4, HEADS_K = 2, ROWS = 200, DIM = 64, BLOCK = 64, SEGMENT = 128 };
enum { BLOCKS = (ROWS + BLOCK - 1) / BLOCK, WORDS = 1 };

static void *room(size_t bytes) {
    void *at = pbs_emu_device_alloc(bytes);
    CHECK(at != NULL, "no room for %zu bytes", bytes);
    return at;
}

static const int32_t *four(int32_t a, int32_t b, int32_t c, int32_t d) {
    int32_t *array = (int32_t *)room(4 * sizeof *array);
    array[0] = a, array[1] = b, array[2] = c, array[3] = d;
    return array;
}

/* bf16 numbers are the upper halves of floats. */
static pbs_view rows(int32_t heads, int32_t dim, pbs_dtype dtype, uint64_t seed) {
    const int32_t count = BATCH * heads * ROWS * dim;
    pbs_view v = {room((size_t)count * sizeof(float)),
                  dtype,
                  {BATCH, heads, ROWS, dim},
                  {heads * ROWS * dim, ROWS * dim, dim, 1}};
    rng r = {seed};
    for (int32_t i = 0; i < count && dtype == PBS_DTYPE_BF16; i++) {
        const float x = rng_uniform(&r, -1, 1);
        memcpy((uint16_t *)v.data + i, (const char *)&x + 2, 2);
    }
    return v;
}

/* The workspace is made after its size is known, so memory is hidden for the sizes too. */
#define RUN_HIDDEN(verb, params)                                        \
    do {                                                                \
        pbs_emu_device_hide(1);                                         \
        RUN(verb##_workspace_size(params, &(params)->workspace_bytes)); \
        pbs_emu_device_hide(0);                                         \
        (params)->workspace = room((params)->workspace_bytes);          \
        pbs_emu_device_hide(1);                                         \
        RUN(verb(params));                                              \
        pbs_emu_device_hide(0);                                         \
    } while (0)

/* What the four verbs and prefill have in common. */
#define COMMON(s)                                                                                \
    s.geometry = (pbs_geometry){                                                                 \
        four(0, 3, 0, 0), four(ROWS, 150, 0, 0), four(0, 5, 0, 0), four(ROWS, 160, 0, 0), 0, 0}; \
    s.segment_size = SEGMENT

static void check_out(const pbs_view *out, const char *what) {
    for (int32_t h = 0; h < HEADS_Q; h++) {
        const double x = element(out, 1, h, 140, 5);
        CHECK(isfinite(x) && x != 0, "%s: head %d has %g", what, h, x);
    }
}

/* A share of the row where there is one. */
static pbs_normalize normalize_of(pbs_permute_mode mode, pbs_select_method method) {
    const int queries = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH;
    return method == PBS_SELECT_ANTIDIAGONAL && !queries ? PBS_NORMALIZE_ROW
                                                         : PBS_NORMALIZE_HISTORY;
}

static void prefill(pbs_view q, pbs_kv k, pbs_kv v, pbs_permute_mode mode,
                    pbs_select_method method) {
    pbs_prefill_params s = PBS_INIT(pbs_prefill_params);
    s.q = q, s.k = k, s.v = v;
    COMMON(s);
    s.block_size = BLOCK;
    s.permute_heads = four(1, 0, 1, 1);
    float *tau = (float *)room(HEADS_Q * sizeof *tau);
    for (int i = 0; i < HEADS_Q; i++) tau[i] = 0.5f + 0.1f * (float)i;
    s.tau_heads = tau;
    s.mode = mode, s.method = method, s.stride = 16, s.tau = 0.9f;
    s.normalize = normalize_of(mode, method), s.correction = PBS_CORRECTION_MEAN;
    s.out = rows(HEADS_Q, DIM, q.dtype, 4);
    s.lse = rows(HEADS_Q, 1, PBS_DTYPE_FP32, 0);
    s.count = (int32_t *)room(BATCH * HEADS_Q * BLOCKS * sizeof *s.count);
    s.bits = (uint32_t *)room(BATCH * HEADS_Q * BLOCKS * WORDS * sizeof *s.bits);
    s.k_perm = (int32_t *)room(BATCH * HEADS_Q * ROWS * sizeof *s.k_perm);
    RUN_HIDDEN(pbs_prefill, &s);
    check_out(&s.out, "prefill");
}

/* One verb after another, as a caller may do it. */
static void verbs(pbs_view q, pbs_kv k, pbs_kv v, pbs_permute_mode mode, pbs_select_method method) {
    const int queries = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH;
    pbs_score_params s = PBS_INIT(pbs_score_params);
    s.q = q, s.k = k, s.block_size = BLOCK;
    COMMON(s);
    s.score = (float *)room(BATCH * HEADS_Q * ROWS * sizeof(float));
    RUN_HIDDEN(pbs_score, &s);

    pbs_permute_params t = PBS_INIT(pbs_permute_params);
    t.q = q, t.k = k, t.v = v, t.block_size = BLOCK, t.mode = mode;
    COMMON(t);
    t.score = s.score, t.permute_heads = four(1, 1, 0, 1);
    t.k_perm = (int32_t *)room(BATCH * HEADS_Q * ROWS * sizeof(int32_t));
    if (queries) t.q_perm = (int32_t *)room(BATCH * HEADS_Q * ROWS * sizeof(int32_t));
    t.k_pool = (float *)room(BATCH * HEADS_Q * BLOCKS * DIM * sizeof(float));
    t.pool_len = (int32_t *)room(BATCH * BLOCKS * sizeof(int32_t));
    RUN(pbs_kv_packed_bytes(&t, &t.packed_bytes));
    t.packed = room(t.packed_bytes);
    RUN_HIDDEN(pbs_permute, &t);

    pbs_select_params u = PBS_INIT(pbs_select_params);
    u.q = q, u.k = k, u.block_size = BLOCK, u.mode = mode, u.method = method, u.stride = 16;
    COMMON(u);
    u.normalize = normalize_of(mode, method);
    u.tau = 0.9f, u.k_pool = t.k_pool, u.k_perm = t.k_perm, u.q_perm = t.q_perm;
    u.bits = (uint32_t *)room(BATCH * HEADS_Q * BLOCKS * WORDS * sizeof *u.bits);
    u.count = (int32_t *)room(BATCH * HEADS_Q * BLOCKS * sizeof *u.count);
    RUN_HIDDEN(pbs_select, &u);

    pbs_attend_params a = PBS_INIT(pbs_attend_params);
    a.q = q, a.k = k, a.v = v, a.packed = t.packed, a.packed_bytes = t.packed_bytes;
    COMMON(a);
    a.bits = u.bits, a.q_perm = t.q_perm, a.block_q = a.block_k = BLOCK;
    a.own = mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
    a.out = rows(HEADS_Q, DIM, q.dtype, 4);
    a.lse = rows(HEADS_Q, 1, PBS_DTYPE_FP32, 0);
    RUN_HIDDEN(pbs_attend, &a);
    check_out(&a.out, "attend");
    a.packed = NULL, a.correction = PBS_CORRECTION_MEAN; /* means are the call's own */
    RUN_HIDDEN(pbs_attend, &a);
    check_out(&a.out, "attend with means");
}

#ifndef PBS_TEST_THIN
#define PBS_TEST_THIN 1
#endif

void test_host_reads(void) {
    for (int i = 0; i < 10; i += PBS_TEST_THIN) {
        const pbs_permute_mode mode = (pbs_permute_mode)(i % 5);
        const pbs_select_method method = (pbs_select_method)(i / 5);
        const pbs_view q = rows(HEADS_Q, DIM, PBS_DTYPE_BF16, 1);
        const pbs_kv k = {.view = rows(HEADS_K, DIM, PBS_DTYPE_BF16, 2)};
        const pbs_kv v = {.view = rows(HEADS_K, DIM, PBS_DTYPE_BF16, 3)};
        prefill(q, k, v, mode, method);
        if (i % 2 == 0) verbs(q, k, v, mode, method);
        pbs_emu_device_reset();
    }
}
