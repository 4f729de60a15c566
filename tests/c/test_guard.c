/* SPDX-License-Identifier: Apache-2.0
 *
 * Nothing reads or writes a byte beyond what it was given: every piece of memory of every kernel,
 * and of whole calls, ends where a page begins that nobody may touch; then starts behind one.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "core/backend.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"

static const char *where(const pbs_cpu_kernels *k, const char *kernel) {
    static char text[64];
    const char *side[] = {"", "before", "after"};
    size_t n = strlen(k->name), m = strlen(kernel);
    memcpy(text, k->name, n);
    text[n] = ' ';
    memcpy(text + n + 1, kernel, m);
    text[n + 1 + m] = ' ';
    strcpy(text + n + m + 2, side[test_guard]);
    return text;
}

typedef struct sizes {
    const pbs_cpu_kernels *k;
    pbs_dtype dtype;
    int32_t head_dim, keys, count, rows;
    int permuted, strided, kept;
} sizes;

/* count rows of head_dim, the last one up to the guard, all 1. */
static pbs_rows new_rows(const sizes *s, int32_t count) {
    pbs_rows rows = {.stride = s->head_dim + (s->strided ? 24 : 0), .dtype = s->dtype};
    size_t size = pbs_dtype_size(s->dtype), elements = 0;
    if (count) elements = (size_t)((count - 1) * rows.stride + s->head_dim);
    char *base = (char *)filled(elements * size, 0);
    const uint16_t one = s->dtype == PBS_DTYPE_FP16 ? 0x3c00 : 0x3f80;
    for (size_t i = 0; i < elements; i++) memcpy(base + (i + 1) * size - 2, &one, 2);
    rows.base = base;
    if (!s->permuted) return rows;
    int32_t *index = (int32_t *)filled((size_t)count * sizeof *index, 0);
    for (int32_t i = 0; i < count; i++) index[i] = count - 1 - i;
    rows.index = index;
    return rows;
}

static void drop_rows(pbs_rows *rows) {
    drop((void *)(uintptr_t)rows->base);
    drop((void *)(uintptr_t)rows->index);
}

static float *floats(size_t count) { return (float *)filled(count * sizeof(float), 0); }

/* ---- single kernels -------------------------------------------------------------------------- */
static void run_pack(void *arg) {
    const sizes *s = (const sizes *)arg;
    pbs_rows k = new_rows(s, s->count), v = new_rows(s, s->count);
    pbs_pack_job job = {.k = k, .v = v, .count = s->count, .keys = s->keys};
    job.head_dim = s->head_dim;
    job.panel = filled(s->k->panel_bytes(s->head_dim, s->keys), 0xff);
    s->k->pack(&job);
    float *sum = floats((size_t)s->head_dim);
    s->k->pool_add(&k, s->count, s->head_dim, sum);
    for (int32_t d = 0; d < s->head_dim; d++)
        CHECK(sum[d] == (float)s->count, "%s: sum %g of %d ones", where(s->k, "pool"),
              (double)sum[d], s->count);
    drop(sum);
    drop(job.panel);
    drop_rows(&k);
    drop_rows(&v);
}

static void run_score(void *arg) {
    const sizes *s = (const sizes *)arg;
    size_t rows = (size_t)s->rows, count = (size_t)s->count;
    size_t steps = (count + PBS_SCORE_STEP - 1) / PBS_SCORE_STEP;
    pbs_rows k = new_rows(s, s->count);
    pbs_score_job job = {.probe = floats(rows * (size_t)s->head_dim), .probe_rows = s->rows};
    job.k = k;
    job.count = s->count;
    job.head_dim = s->head_dim;
    job.scale_log2 = 1.0f;
    job.row_max = floats(rows);
    job.row_sum = floats(rows);
    job.step_max = floats(steps * rows);
    if (s->kept) job.kept = floats(steps * rows * PBS_SCORE_STEP);
    job.scratch = filled(s->k->score_scratch(s->head_dim, s->rows), 0xff);
    s->k->score_stats(&job);
    job.score = floats(count);
    s->k->score_columns(&job);
    for (size_t i = 0; i < count; i++) {
        float error = job.score[i] * (float)s->count - 1.0f;
        CHECK(error < 1e-5f && error > -1e-5f, "%s: share %g of %d equal ones",
              where(s->k, "score"), (double)job.score[i], s->count);
    }
    drop((void *)(uintptr_t)job.probe);
    drop(job.row_max);
    drop(job.row_sum);
    drop(job.step_max);
    drop(job.kept);
    drop(job.scratch);
    drop(job.score);
    drop_rows(&k);
}

/* Groups of 8 rows against two blocks of 8 groups of keys; all that exists is seen. */
static void run_antidiagonal(void *arg) {
    const sizes *s = (const sizes *)arg;
    enum { STRIDE = 8, PER_BLOCK = 8, BLOCKS = 2 };
    int32_t lanes = s->k->antidiagonal_lanes, groups = (s->rows + STRIDE - 1) / STRIDE;
    lanes = (groups + lanes - 1) / lanes * lanes;
    size_t all = (size_t)lanes;
    pbs_rows q = new_rows(s, s->rows), k = new_rows(s, s->count);
    int32_t *visible = (int32_t *)filled(all * sizeof *visible, 0);
    for (int32_t i = 0; i < groups; i++) visible[i] = (s->count + STRIDE - 1) / STRIDE;
    pbs_antidiagonal_job job = {.q = q, .k = k, .q_count = s->rows, .k_count = s->count};
    job.head_dim = s->head_dim;
    job.stride = STRIDE;
    job.lanes = lanes;
    job.key_groups = BLOCKS * PER_BLOCK;
    job.per_block = PER_BLOCK;
    job.scale_log2 = 0.01f;
    job.visible = visible;
    job.panel = floats(all * STRIDE * (size_t)s->head_dim);
    job.max = floats(all);
    job.sum = floats(all * BLOCKS);
    job.scratch = filled(s->k->antidiagonal_scratch(&job), 0xff);
    s->k->antidiagonal_pack(&job);
    s->k->antidiagonal_sums(&job);
    pbs_antidiagonal_shares shares = {.lanes = lanes, .blocks = BLOCKS, .chunks = 1};
    shares.chunk_blocks = BLOCKS;
    shares.max = job.max;
    shares.sum = job.sum;
    s->k->antidiagonal_shares(&shares);
    float total = job.sum[0] + job.sum[lanes];
    CHECK(total > 0.999f && total < 1.001f, "%s: shares add up to %g", where(s->k, "antidiagonal"),
          (double)total);
    drop(visible);
    drop(job.panel);
    drop(job.max);
    drop(job.sum);
    drop(job.scratch);
    drop_rows(&q);
    drop_rows(&k);
}

/* rows x count, over a depth of head_dim - 3; and the logarithm of count equal shares. */
static void run_gemm(void *arg) {
    const sizes *s = (const sizes *)arg;
    int32_t depth = s->head_dim - 3, lda = depth + 2, ldb = depth + 1, ldc = s->count + 5;
    float *a = floats((size_t)((s->rows - 1) * lda + depth));
    float *b = floats((size_t)((s->count - 1) * ldb + depth));
    float *x = floats((size_t)s->count);
    float *c = floats((size_t)((s->rows - 1) * ldc + s->count));
    s->k->gemm_nt(s->rows, s->count, depth, 1.0f, a, lda, b, ldb, c, ldc);
    s->k->log_softmax(x, s->count);
    CHECK(fabsf(x[0] + logf((float)s->count)) < 1e-5f, "%s: %g, %d equal shares",
          where(s->k, "log_softmax"), (double)x[0], s->count);
    drop(x);
    drop(a);
    drop(b);
    drop(c);
}

/* A query block of `rows` rows: one block of history is listed, one stands for its mean (all keys
 * are alike, so any panel of keys will do), then `count` keys of its own. */
static void run_attend(void *arg) {
    const sizes *s = (const sizes *)arg;
    int32_t keys = s->keys, panels = 2 + (s->count + keys - 1) / keys;
    size_t panel_bytes = s->k->panel_bytes(s->head_dim, keys), size = pbs_dtype_size(s->dtype);
    char *packed = (char *)filled_lines((size_t)panels * panel_bytes, 0xff);
    pbs_rows k = new_rows(s, 2 * keys + s->count), q = new_rows(s, s->rows);
    for (int32_t i = 0; i < panels; i++) {
        pbs_rows part = k;
        int32_t left = 2 * keys + s->count - i * keys;
        if (part.index)
            part.index += i * keys;
        else
            part.base = (const char *)k.base + (size_t)(i * keys) * (size_t)k.stride * size;
        pbs_pack_job pack = {.k = part, .v = part, .count = left < keys ? left : keys};
        pack.keys = keys;
        pack.head_dim = s->head_dim;
        pack.panel = packed + (size_t)i * panel_bytes;
        s->k->pack(&pack);
    }
    uint32_t *bits = (uint32_t *)filled(sizeof *bits, 0);
    bits[0] = 2;
    size_t scratch = s->k->attend_scratch(s->head_dim, (s->rows + 63) / 64 * 64);
    pbs_attend_job job = {.q = q, .rows = s->rows, .q_offset = 2 * keys + s->count - s->rows};
    job.head_dim = s->head_dim;
    job.scale_log2 = 0.1f;
    job.block_k = keys;
    job.bits = bits;
    job.hist_end = 2;
    job.hist_panels = job.own_panels = packed;
    job.mean_panels = packed;
    job.mean_bias = keys == 64 ? 6.0f : 7.0f;
    job.own_begin = 2 * keys;
    job.own_end = 2 * keys + s->count;
    job.out_stride = q.stride;
    job.out = filled((size_t)((s->rows - 1) * q.stride + s->head_dim) * size, 0);
    job.lse_stride = 3;
    job.lse = floats((size_t)(s->rows - 1) * 3 + 1);
    job.scratch = filled_lines((scratch + 63) / 64 * 64, 0xff);
    s->k->attend_block(&job);
    float first; /* every value is 1, and so is any mean of them */
    pbs_load(job.out, s->dtype, 1, &first);
    CHECK(first > 0.99f && first < 1.01f, "%s: a mean %g of ones", where(s->k, "attend"),
          (double)first);
    drop(job.out);
    drop(job.lse);
    drop(job.scratch);
    drop(bits);
    drop(packed);
    drop_rows(&k);
    drop_rows(&q);
}

static void test_kernels(const pbs_cpu_kernels *k, pbs_dtype dtype) {
    static const int32_t dims[] = {8, 24, 40, 64, 72, 80, 128, 192, 256};
    static const int32_t counts[] = {1, 31, 64, 63, 5, 128, 127, 65, 100};
    static const int32_t rows[] = {1, 64, 3, 63, 128, 13, 65, 6, 33};
    size_t n = sizeof dims / sizeof *dims, step = grid_step(k->isa), number = 0;
    step += step % 3 == 0; /* every step meets every dim and every count */
    for (size_t i = 0; i < n * n; i += step, number++) {
        sizes s = {.k = k, .dtype = dtype, .head_dim = dims[i % n], .count = counts[i / n]};
        s.rows = rows[(i + i / n) % n];
        s.keys = s.count > 64 || number % 3 == 0 ? 128 : 64;
        s.permuted = number % 2;
        s.strided = number % 5 < 2;
        s.kept = number % 7 < 4;
        test_guard = number % 4 < 2 ? GUARD_AFTER : GUARD_BEFORE;
        run_guarded(run_pack, &s, where(k, "pack"));
        run_guarded(run_score, &s, where(k, "score"));
        run_guarded(run_antidiagonal, &s, where(k, "antidiagonal"));
        run_guarded(run_gemm, &s, where(k, "gemm"));
        if (s.count >= s.rows) run_guarded(run_attend, &s, where(k, "attend"));
    }
    test_guard = GUARD_NONE;
}

/* ---- whole calls ----------------------------------------------------------------------------- */
typedef struct call {
    problem *p;
    options o;
    const result *expected;
} call;

static void run_call(void *arg) {
    call *c = (call *)arg;
    problem_make(c->p, 31);
    result whole = prefill(c->p, c->o), parts = verbs(c->p, c->o);
    check_same(c->expected, &whole, "prefill between guards");
    check_same(c->expected, &parts, "verbs between guards");
    drop_result(&whole);
    drop_result(&parts);
    problem_free(c->p);
}

static void test_calls(const pbs_cpu_kernels *k, pbs_dtype dtype) {
    for (size_t mode = grid_first(k->isa); mode < 5; mode += grid_step(k->isa)) {
        problem p = three_sequences(k->isa, 211, 301);
        p.heads_q = p.heads_k = 1 + (mode == PBS_PERMUTE_BOTH);
        p.head_dim = mode % 2 ? 24 : 72;
        p.dtype = dtype;
        p.layout = (layout)(mode % 3);
        problem_make(&p, 31);
        call c = {.p = &p, .o = {.mode = (pbs_permute_mode)mode, .tau = 0.6f}};
        c.o.method = (pbs_select_method)(mode / 2 % 2);
        c.o.normalize = mode == PBS_PERMUTE_KEYS ? PBS_NORMALIZE_ROW : PBS_NORMALIZE_HISTORY;
        c.o.correction = mode == PBS_PERMUTE_QUERIES ? PBS_CORRECTION_NONE : PBS_CORRECTION_MEAN;
        result expected = verbs(&p, c.o);
        c.expected = &expected;
        problem_free(&p);
        for (test_guard = GUARD_BEFORE; test_guard <= GUARD_AFTER; test_guard++)
            run_guarded(run_call, &c, where(k, "call"));
        test_guard = GUARD_NONE;
        drop_result(&expected);
    }
}

void test_guards(void) {
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT], chosen;
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++) {
            pbs_exec exec = {.num_threads = 1, .isa = isas[i]};
            const void *table;
            const pbs_backend *backend = pbs_backend_for(isas[i]);
            RUN(backend->choose(&exec, (pbs_dtype)dtype, &table, &chosen));
            const pbs_cpu_kernels *k = (const pbs_cpu_kernels *)table;
            pbs_cpu_state saved;
            k->enter(&saved);
            test_kernels(k, (pbs_dtype)dtype);
            k->leave(&saved);
            test_calls(k, (pbs_dtype)dtype);
        }
    }
}
