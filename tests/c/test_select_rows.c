/* SPDX-License-Identifier: Apache-2.0
 *
 * select with normalize ROW: shares of all that a query group sees, its own span included.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "selects.h"

static problem base(pbs_dtype dtype, pbs_isa isa) {
    problem p = {.batch = 1, .heads_q = 2, .heads_k = 1, .head_dim = 16};
    p.block = 64;
    p.segment = 128;
    p.dtype = dtype;
    p.isa = isa;
    return p;
}

static setup row_setup(const problem *p, pbs_permute_mode mode, pbs_reduce reduce, int32_t stride) {
    setup u = select_setup(p, mode, 7);
    u.s.method = PBS_SELECT_ANTIDIAGONAL;
    u.s.normalize = PBS_NORMALIZE_ROW;
    u.s.reduce = reduce;
    u.s.stride = stride;
    u.s.rule = PBS_RULE_ABSOLUTE;
    u.s.tau = 0.1f;
    return u;
}

/* Against the definition, with the n-th reduce and rule. */
static void test_one(problem *p, pbs_permute_mode mode, int32_t stride, size_t n) {
    static const float tau[] = {0.8f, 0.4f, 0.03f, 2.5f};
    problem_make(p, n);
    setup u = row_setup(p, mode, (pbs_reduce)(n % 2), stride);
    u.s.rule = (pbs_rule)(n / 2 % 4);
    u.s.tau = tau[u.s.rule];
    select_check(p, &u);
    select_drop(&u);
    problem_free(p);
}

/* Queries anywhere after a prefix: blocks that straddle segments, segments of one block and of more
 * than a chunk, more rows than a band has, ragged ends of both. */
static void test_shapes(pbs_dtype dtype, pbs_isa isa) {
    static const struct {
        int32_t stride, block, segment, rows, keys;
    } shapes[] = {
        {8, 64, 128, 300, 700},   {16, 64, 256, 461, 901},    {32, 64, 512, 130, 1301},
        {64, 64, 64, 257, 600},   {8, 64, 1024, 390, 1900},   {16, 128, 256, 777, 777},
        {32, 128, 512, 300, 950}, {64, 128, 128, 517, 517},   {2, 64, 128, 700, 707},
        {64, 256, 256, 300, 813}, {16, 64, 128, 1100, 1103},  {64, 64, 256, 1150, 1250},
        {8, 64, 128, 300, 250},   {16, 64, 1024, 2100, 2100},
    };
    for (size_t n = grid_first(isa); n < sizeof shapes / sizeof *shapes; n += grid_step(isa)) {
        problem p = base(dtype, isa);
        p.block = shapes[n].block, p.segment = shapes[n].segment;
        p.seqlen_q = shapes[n].rows, p.seqlen_k = shapes[n].keys;
        p.head_dim = n % 3 ? 8 : 24;
        p.scale = n % 4 ? 0.0f : 2.0f;
        p.gqa = n % 2 ? PBS_GQA_GROUP : PBS_GQA_PER_HEAD;
        p.heads_q = p.seqlen_q > 800 ? 1 : 2;
        p.layout = (layout)(n % 3);
        test_one(&p, n % 5 ? PBS_PERMUTE_KEYS : PBS_PERMUTE_IDENTITY, shapes[n].stride,
                 n + (size_t)dtype);
    }
}

/* Prefix, padding, no rows, more queries than keys; the own span is what differs from HISTORY. */
static void test_sequences(pbs_dtype dtype, pbs_isa isa) {
    for (int mode = PBS_PERMUTE_IDENTITY; mode <= PBS_PERMUTE_KEYS; mode++) {
        problem p = base(dtype, isa);
        select_sequences(&p);
        test_one(&p, (pbs_permute_mode)mode, mode == PBS_PERMUTE_KEYS ? 16 : 64, 5);
    }
}

static int bit(const setup *u, const problem *p, int32_t row, int32_t n) {
    return (int)(u->s.bits[row * problem_words(p) + n / 32] >> (n % 32) & 1);
}

/* Do two calls choose the same, by the same masses of history? */
static void check_same(const problem *p, const setup *a, const setup *b, const char *what) {
    int32_t blocks = problem_blocks_q(p), T = problem_blocks_k(p);
    for (int32_t row = 0; row < p->batch * p->heads_q * blocks; row++) {
        view_of_row w = select_look(p, &a->s, row / blocks / p->heads_q, row / blocks % p->heads_q,
                                    row % blocks);
        CHECK(a->s.count[row] == b->s.count[row], "%s: row %d", what, row);
        for (int32_t n = 0; n < w.history; n++) {
            CHECK(a->s.mass[row * T + n] == b->s.mass[row * T + n], "%s: mass [%d, %d]: %g, %g",
                  what, row, n, (double)a->s.mass[row * T + n], (double)b->s.mass[row * T + n]);
            CHECK(bit(a, p, row, n) == bit(b, p, row, n), "%s: bit [%d, %d]", what, row, n);
        }
    }
}

/* Segments of one block, after a prefix of whole blocks: mode NONE, to the bit. */
static void test_is_natural(pbs_dtype dtype, pbs_isa isa) {
    problem p = base(dtype, isa);
    p.segment = p.block;
    p.seqlen_q = 333, p.seqlen_k = 333 + 3 * p.block;
    problem_make(&p, 3);
    for (int how = 0; how < 2; how++) {
        setup a = row_setup(&p, PBS_PERMUTE_IDENTITY, (pbs_reduce)how, 16);
        setup b = row_setup(&p, PBS_PERMUTE_NONE, (pbs_reduce)how, 16);
        a.s.k_perm = NULL;
        select_run(&a);
        select_run(&b);
        check_same(&p, &a, &b, "natural order");
        select_drop(&a);
        select_drop(&b);
    }
    problem_free(&p);
}

/* A head that is not permuted, beside one that is, gives what it gives in natural order. */
static void test_unpermuted_head(pbs_dtype dtype, pbs_isa isa) {
    problem p = base(dtype, isa);
    p.seqlen_q = 300, p.seqlen_k = 611;
    problem_make(&p, 4);
    setup a = row_setup(&p, PBS_PERMUTE_KEYS, PBS_REDUCE_MAX, 16);
    setup b = row_setup(&p, PBS_PERMUTE_IDENTITY, PBS_REDUCE_MAX, 16);
    memcpy(a.k_perm, b.k_perm, (size_t)p.seqlen_k * sizeof *a.k_perm);
    select_check(&p, &a);
    select_run(&b);
    problem head = p;
    head.heads_q = 1;
    check_same(&head, &a, &b, "unpermuted head");
    select_drop(&a);
    select_drop(&b);
    problem_free(&p);
}

/* A larger share asked for never adds a block, 0 keeps all of history; masses are shares, and those
 * of a row leave room for its own span. */
static void test_thresholds(pbs_dtype dtype, pbs_isa isa, pbs_reduce how) {
    static const float tau[] = {0.0f, 0.001f, 0.02f, 0.1f, 0.3f, 1.0f};
    problem p = base(dtype, isa);
    p.seqlen_q = 500, p.seqlen_k = 777;
    p.scale = 1.0f;
    problem_make(&p, 6);
    int32_t rows = p.heads_q * problem_blocks_q(&p), T = problem_blocks_k(&p), all = 0;
    uint32_t *before =
        (uint32_t *)filled((size_t)(rows * problem_words(&p)) * sizeof *before, 0xff);
    for (size_t i = 0; i < sizeof tau / sizeof *tau; i++) {
        setup u = row_setup(&p, PBS_PERMUTE_KEYS, how, 32);
        int32_t kept = 0;
        u.s.tau = tau[i];
        select_run(&u);
        for (int32_t row = 0; row < rows; row++) {
            view_of_row w =
                select_look(&p, &u.s, 0, row / problem_blocks_q(&p), row % problem_blocks_q(&p));
            double sum = 0.0;
            kept += u.s.count[row];
            if (i == 0) CHECK(u.s.count[row] == w.history, "row %d: %d", row, u.s.count[row]);
            for (int32_t n = 0; n < w.history; n++) {
                float mass = u.s.mass[row * T + n];
                sum += (double)mass;
                CHECK(mass >= 0.0f && mass <= 1.0f, "mass [%d, %d]: %g", row, n, (double)mass);
            }
            if (how == PBS_REDUCE_SUM) CHECK(sum < 0.999, "row %d sums to %g", row, sum);
            for (int32_t n = 0; n < problem_words(&p); n++) {
                uint32_t *at = &before[row * problem_words(&p) + n];
                uint32_t now = u.s.bits[row * problem_words(&p) + n];
                CHECK((now & ~*at) == 0, "tau %g adds a block to row %d", (double)tau[i], row);
                *at = now;
            }
        }
        if (i == 0) all = kept;
        if (tau[i] == 1.0f) CHECK(kept < all / 2, "%d of %d", kept, all);
        select_drop(&u);
    }
    free(before);
    problem_free(&p);
}

/* A key of the own span that is not a number makes no share of its row known: all stays. Blocks
 * that do not see it are as they were. */
static void test_nan(pbs_dtype dtype, pbs_isa isa, pbs_permute_mode mode, pbs_reduce how) {
    problem p = base(dtype, isa);
    const int32_t bad = 4;
    p.seqlen_q = p.seqlen_k = 389;
    problem_make(&p, 5);
    set_element(&p.k.view, 0, 0, bad * p.block + 9, 1, NAN);
    setup u = row_setup(&p, mode, how, 16);
    u.s.tau = 0.5f;
    select_run(&u);
    for (int32_t m = 0; m < problem_blocks_q(&p); m++) {
        view_of_row w = select_look(&p, &u.s, 0, 0, m);
        const float *mass = u.s.mass + m * problem_blocks_k(&p);
        for (int32_t n = 0; n < w.history; n++)
            CHECK((mass[n] != mass[n]) == (m >= bad), "%s mode %d mass [%d, %d]: %g",
                  pbs_isa_name(isa), (int)mode, m, n, (double)mass[n]);
        if (m >= bad)
            CHECK(u.s.count[m] == w.history, "row %d: %d of %d", m, u.s.count[m], w.history);
    }
    select_drop(&u);
    problem_free(&p);
}

/* Threads change no bit. How much memory a call needs is known before its pointers are. */
static void test_threads_and_sizes(pbs_dtype dtype, pbs_isa isa) {
    problem p = base(dtype, isa);
    p.seqlen_q = 1200, p.seqlen_k = 1300;
    problem_make(&p, 8);
    setup a = row_setup(&p, PBS_PERMUTE_KEYS, PBS_REDUCE_SUM, 64);
    select_run(&a);
    for (int threads = 2; threads < 8; threads += 3) {
        setup b = row_setup(&p, PBS_PERMUTE_KEYS, PBS_REDUCE_SUM, 64);
        b.s.exec.parallel_for = pool_parallel_for;
        b.s.exec.pool = &threads;
        b.s.exec.num_threads = threads;
        select_run(&b);
        check_same(&p, &a, &b, "threads");
        select_drop(&b);
    }
    size_t bytes = 0;
    a.s.k_perm = NULL;
    RUN(pbs_select_workspace_size(&a.s, &bytes));
    CHECK(bytes == a.s.workspace_bytes, "%zu, not %zu", bytes, a.s.workspace_bytes);
    select_drop(&a);
    problem_free(&p);
}

void test_select_rows(void) {
    for (int type = PBS_DTYPE_FP32; type <= PBS_DTYPE_BF16; type++) {
        pbs_dtype dtype = (pbs_dtype)type;
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas(dtype, isas);
        for (int i = 0; i < count; i++) {
            test_shapes(dtype, isas[i]);
            test_sequences(dtype, isas[i]);
            if (is_emulated(isas[i]) && (type + i) % 3) continue; /* slow */
            test_is_natural(dtype, isas[i]);
            test_unpermuted_head(dtype, isas[i]);
            for (int how = 0; how < 2; how++) {
                test_thresholds(dtype, isas[i], (pbs_reduce)how);
                test_nan(dtype, isas[i], PBS_PERMUTE_IDENTITY, (pbs_reduce)how);
                test_nan(dtype, isas[i], PBS_PERMUTE_KEYS, (pbs_reduce)how);
            }
            test_threads_and_sizes(dtype, isas[i]);
        }
    }
}
