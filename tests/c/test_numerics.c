/* SPDX-License-Identifier: Apache-2.0
 *
 * The error rules: powers of two and conversions over all their inputs, rescaling without a trace,
 * and attention on hard inputs, whose rows are compared as a whole.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "cpu/state.h"
#include "harness.h"
#include "vec_test.h"

extern const vec_test test_vec_emu_avx2, test_vec_emu_avx512, test_vec_emu_avx512bf16;
#if defined(__x86_64__)
extern const vec_test test_vec_avx2, test_vec_avx512, test_vec_avx512bf16;
#endif

static const vec_test *const VOCABULARIES[] = {
    &test_vec_emu_avx2, &test_vec_emu_avx512, &test_vec_emu_avx512bf16,
#if defined(__x86_64__)
    &test_vec_avx2,     &test_vec_avx512,     &test_vec_avx512bf16,
#endif
};
enum { NUM_VOCABULARIES = sizeof VOCABULARIES / sizeof *VOCABULARIES };

/* ---- 2^x ------------------------------------------------------------------------------------- */
enum { ALL_HALVES = 1 << 16, EXTRA = 1 << 15 };

/* Every bf16 up to 8, NaN and -inf among them; whole numbers and their neighbours in fp32; and
 * fractions as fp32 has them. A multiple of 16. */
static int64_t fill_exponents(float *v) {
    rng r = {7};
    int64_t n = 0;
    for (uint32_t u = 0; u < ALL_HALVES; u++) {
        float x = pbs_float_from_bits(u << 16);
        if (!(x > 8.0f)) v[n++] = x;
    }
    for (int whole = -130; whole <= 8; whole++) {
        v[n++] = nextafterf((float)whole, -INFINITY);
        v[n++] = (float)whole;
        if (whole < 8) v[n++] = nextafterf((float)whole, INFINITY);
    }
    for (int i = 0; i < EXTRA / 2; i++) v[n++] = rng_uniform(&r, -126.0f, 8.0f);
    while (n % 16) v[n++] = -INFINITY;
    return n;
}

/* Relative, of the polynomials (cpu/kernel/softmax.h), and of evaluating them in fp32. */
static double exp2_bound(int degree) {
    double polynomial = degree == 3 ? 7.5e-5 : degree == 5 ? 7.5e-8 : 1.9e-9;
    return polynomial * 1.01 + 0x1p-23;
}

static void check_exp2(const vec_test *t, int degree) {
    const char *name = pbs_isa_name(t->isa);
    float *v = (float *)filled((ALL_HALVES + EXTRA) * sizeof *v, 0);
    float *power = (float *)filled((ALL_HALVES + EXTRA) * sizeof *power, 0xff);
    int64_t n = fill_exponents(v);
    double worst = 0.0;
    t->exp2(degree, v, power, n);
    for (int64_t i = 0; i < n; i++) {
        double x = (double)v[i], got = (double)power[i], exact = exp2(x);
        if (isnan(x)) {
            CHECK(isnan(got), "%s: 2^NaN = %g", name, got);
        } else if (x < -126.0) {
            CHECK(got == 0.0, "%s: 2^%a = %a, not 0", name, x, got);
        } else if (got == 0.0) { /* the polynomial may lie below 1, and no denormal comes out */
            CHECK(exact < (double)FLT_MIN * 1.0001, "%s: 2^%a = 0", name, x);
        } else {
            double error = fabs(got - exact) / exact;
            CHECK(got >= (double)FLT_MIN && error <= exp2_bound(degree),
                  "%s degree %d: 2^%a = %a, relative error %g", name, degree, x, got, error);
            worst = fmax(worst, error);
        }
    }
    CHECK(worst > exp2_bound(degree) / 4, "%s degree %d: largest error %g; too good to be true",
          name, degree, worst);
    free(v);
    free(power);
}

/* ---- conversions ----------------------------------------------------------------------------- */
static void check_load(const vec_test *t, pbs_dtype dtype, uint16_t *half, float *wide) {
    int32_t wrong = 0, first = 0;
    for (uint32_t i = 0; i < ALL_HALVES; i++) half[i] = (uint16_t)i;
    t->load(dtype, half, wide, ALL_HALVES);
    for (int32_t i = ALL_HALVES - 1; i >= 0; i--) {
        float expected;
        pbs_load(&half[i], dtype, 1, &expected);
        if (memcmp(&wide[i], &expected, sizeof expected) == 0) continue;
        if (isnan(wide[i]) && isnan(expected)) continue; /* any NaN is as good as another */
        wrong++;
        first = i;
    }
    CHECK(wrong == 0, "%s dtype %d: %d halves are read wrong, %x as %a", pbs_isa_name(t->isa),
          (int)dtype, wrong, (unsigned)first, (double)wide[first]);
}

/* All bit patterns of 32 whose lower half is low. */
static void check_store(const vec_test *t, pbs_dtype dtype, uint32_t low, uint16_t *half,
                        float *wide) {
    const int infinity = dtype == PBS_DTYPE_FP16 ? 0x7c00 : 0x7f80;
    int32_t wrong = 0, first = 0;
    for (uint32_t i = 0; i < ALL_HALVES; i++) wide[i] = pbs_float_from_bits(i << 16 | low);
    t->store(dtype, wide, half, ALL_HALVES);
    for (int32_t i = ALL_HALVES - 1; i >= 0; i--) {
        uint16_t expected[2]; /* gcc: as if it could be fp32 */
        pbs_store(expected, dtype, 1, &wide[i]);
        if (half[i] == expected[0]) continue;
        if (isnan(wide[i]) && (half[i] & 0x7fff) > infinity) continue;
        wrong++;
        first = i;
    }
    CHECK(wrong == 0, "%s dtype %d: %d numbers are rounded wrong, %a to %x", pbs_isa_name(t->isa),
          (int)dtype, wrong, (double)wide[first], (unsigned)half[first]);
}

/* From all halves, and to them from fp32 numbers on, and next to, what separates two of them. */
static void check_conversions(const vec_test *t, pbs_dtype dtype) {
    static const uint32_t low[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001,
                                   0x7fff, 0x8000, 0x8001, 0xefff, 0xf000, 0xf001, 0xfffe, 0xffff};
    uint16_t *half = (uint16_t *)filled(ALL_HALVES * sizeof *half, 0);
    float *wide = (float *)filled(ALL_HALVES * sizeof *wide, 0);
    check_load(t, dtype, half, wide);
    for (size_t k = 0; k < sizeof low / sizeof *low; k += PBS_TEST_THIN)
        check_store(t, dtype, low[k], half, wide);
    free(half);
    free(wide);
}

/* ---- rescaling ------------------------------------------------------------------------------- */
/* Maxima rise by 24 a panel, so everything is rescaled again and again; scores are multiples of
 * 1/64, so that they minus a maximum are exact. A row that knows its last maximum from the start
 * must come to the same bits: factors other than powers of two would round. */
static void check_rescaling(const vec_test *t, int degree, uint64_t seed) {
    enum { PANELS = 4, KEYS = 64 };
    const char *name = pbs_isa_name(t->isa);
    float scores[PANELS * KEYS];
    rng r = {seed};
    double exact = 0.0, sum = 0.0;
    for (int i = 0; i < PANELS * KEYS; i++)
        scores[i] = (float)(24 * (i / KEYS)) - (float)(1 + rng_below(&r, 1280)) / 64.0f;
    softmax_run rising = {.scores = scores, .panels = PANELS, .keys = KEYS, .row_max = -FLT_MAX};
    t->softmax(degree, &rising);
    softmax_run known = {.scores = scores, .panels = PANELS, .keys = KEYS};
    known.row_max = rising.row_max;
    t->softmax(degree, &known);
    CHECK(rising.row_max == ceilf(rising.row_max) && rising.row_max == known.row_max,
          "%s: row maxima %g and %g", name, (double)rising.row_max, (double)known.row_max);
    size_t bytes = (size_t)t->lanes * sizeof(float);
    CHECK(memcmp(rising.row_sum, known.row_sum, bytes) == 0, "%s: row sum rescaled", name);
    CHECK(memcmp(rising.acc_o, known.acc_o, bytes) == 0, "%s: acc_o rescaled", name);
    CHECK(memcmp(rising.row_weight, known.row_weight, bytes) == 0, "%s: weight rescaled", name);
    float lower[PANELS * KEYS]; /* and 7 on top of them: the same again */
    for (int i = 0; i < PANELS * KEYS; i++) lower[i] = scores[i] - 7.0f;
    softmax_run biased = {.scores = lower, .panels = PANELS, .keys = KEYS, .row_max = -FLT_MAX};
    biased.bias = 7.0f;
    t->softmax(degree, &biased);
    CHECK(biased.row_max == rising.row_max && memcmp(rising.row_sum, biased.row_sum, bytes) == 0 &&
              memcmp(rising.acc_o, biased.acc_o, bytes) == 0,
          "%s: a bias is no part of the score", name);
    for (int i = 0; i < PANELS * KEYS; i++)
        exact += exp2((double)scores[i] - (double)rising.row_max);
    for (int i = 0; i < t->lanes; i++) sum += (double)rising.row_sum[i];
    CHECK(fabs(sum / exact - 1.0) < exp2_bound(degree) + 4e-7, "%s: sum %.9g, not %.9g", name, sum,
          exact);
}

static void test_vocabulary(const vec_test *t) {
    pbs_cpu_state saved;
    if (!pbs_isa_available(t->isa)) return;
    pbs_enter_mxcsr(&saved);
    check_exp2(t, 3);
    check_exp2(t, 5);
    check_exp2(t, 6);
    for (uint64_t seed = 0; seed < 50; seed++) check_rescaling(t, seed % 2 ? 3 : 5, seed);
    for (int ours = 0; ours < 2; ours++) { /* conversions serve in any state */
        check_conversions(t, PBS_DTYPE_FP16);
        check_conversions(t, PBS_DTYPE_BF16);
        pbs_leave_mxcsr(&saved);
    }
}

/* ---- attention ------------------------------------------------------------------------------- */
typedef enum kind { RANDOM, HUGE_SCORES, CONSTANT, ONE_HOT, RISING, KINDS } kind;

static const char *const KIND_NAMES[] = {"random", "huge scores", "constant", "one-hot", "rising"};

/* Scores, in units of the exponential, by what the first element of q and k adds to them. */
static double first_of_key(kind how, rng *r, int32_t j) {
    switch ((int)how) {
    case HUGE_SCORES: return (double)rng_uniform(r, -100.0f, 100.0f);
    case ONE_HOT: return rng_below(r, 40) == 0 ? 60.0 : 0.0;
    case RISING: return (double)j / 2.0;
    default: return 0.0;
    }
}

static void fill(const problem *p, kind how, uint64_t seed) {
    rng r = {seed};
    double size = how == RANDOM ? 1.0 : how == ONE_HOT || how == RISING ? 0.25 : 0.0;
    double first_q = (how == HUGE_SCORES ? 100.0 : 1.0) / (double)p->scale;
    for (int32_t b = 0; b < p->batch; b++) {
        for (int32_t i = p->q_start[b]; i < p->q_start[b] + p->q_len[b]; i++)
            for (int32_t d = 0; d < p->head_dim; d++)
                set_element(&p->q, b, 0, i, d,
                            d == 0 && how != RANDOM && how != CONSTANT
                                ? first_q
                                : 2.0 * (double)rng_uniform(&r, -1.0f, 1.0f));
        for (int32_t j = p->kv_start[b]; j < p->kv_start[b] + p->kv_len[b]; j++)
            for (int32_t d = 0; d < p->head_dim; d++)
                set_element(&p->k.view, b, 0, j, d,
                            d == 0 && how != RANDOM
                                ? first_of_key(how, &r, j - p->kv_start[b])
                                : size * 2.0 * (double)rng_uniform(&r, -1.0f, 1.0f));
    }
}

/* Keys and values that no sequence has: NaN as problem_make leaves them, or infinities. */
static void pad_with_infinities(const problem *p) {
    for (int32_t b = 0; b < p->batch; b++)
        for (int32_t j = 0; j < p->seqlen_k; j++)
            for (int32_t d = 0; d < p->head_dim; d++)
                if (j < p->kv_start[b] || j >= p->kv_start[b] + p->kv_len[b]) {
                    set_element(&p->k.view, b, 0, j, d, j % 2 ? INFINITY : -INFINITY);
                    set_element(&p->v.view, b, 0, j, d, j % 2 ? INFINITY : -INFINITY);
                }
}

/* One sequence with more rows than keys, whose first rows see none; one between padding. */
static void test_kind(pbs_isa isa, pbs_dtype dtype, kind how) {
    problem p = {.batch = 2, .heads_q = 1, .heads_k = 1, .seqlen_q = 300, .seqlen_k = 290};
    p.head_dim = how % 2 ? 40 : 64;
    p.block = how % 2 ? 128 : 64;
    p.segment = 256;
    p.dtype = dtype;
    p.isa = isa;
    p.has_geometry = 1;
    p.q_len[0] = 300, p.kv_len[0] = 290;
    p.q_start[1] = 17, p.q_len[1] = 130, p.kv_start[1] = 9, p.kv_len[1] = 263;
    problem_make(&p, 41);
    fill(&p, how, 42);
    if (how % 2) pad_with_infinities(&p);
    brute_attend_args a = {.block_q = p.block, .block_k = p.block, .heads_sel = 1};
    a.own = PBS_OWN_ALL;
    pbs_attend_params s = PBS_INIT(pbs_attend_params);
    s.q = p.q, s.k = p.k, s.v = p.v, s.geometry = p.geometry, s.softmax_scale = p.scale;
    s.block_q = s.block_k = p.block, s.segment_size = p.segment, s.heads_sel = 1, s.own = a.own;
    s.out = p.out, s.lse = p.lse, s.exec.isa = isa;
    RUN(pbs_attend_workspace_size(&s, &s.workspace_bytes));
    s.workspace = filled(s.workspace_bytes, 0xff);
    RUN(pbs_attend(&s));
    for (int32_t b = 0; b < 2; b++)
        for (int32_t i = 0; i < p.q_len[b]; i += i < 12 ? 1 : 17 * PBS_TEST_THIN)
            check_attend_row(&p, &a, b, 0, i, KIND_NAMES[how]);
    free(s.workspace);
    problem_free(&p);
}

void test_numerics(void) {
    for (int i = 0; i < NUM_VOCABULARIES; i++) test_vocabulary(VOCABULARIES[i]);
    for (int dtype = PBS_DTYPE_FP32; dtype <= PBS_DTYPE_BF16; dtype++) {
        pbs_isa isas[PBS_ISA_COUNT];
        int count = available_isas((pbs_dtype)dtype, isas);
        for (int i = 0; i < count; i++)
            for (int how = 0; how < KINDS; how++) test_kind(isas[i], (pbs_dtype)dtype, (kind)how);
    }
}
