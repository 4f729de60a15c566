/* SPDX-License-Identifier: Apache-2.0
 *
 * Every word of the vector vocabulary, emulated and (where the CPU has it) real, against scalar C,
 * on random and on special numbers, in the caller's floating-point state and in ours.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "cpu/convert.h"
#include "cpu/state.h"
#include "harness.h"
#include "vec_ops.h"

/* Real units are trusted to keep the manual's order of VDPBF16PS, but only their makers know: they
 * are held to a bound. -DPBS_TEST_EXACT holds them to the order. */
#ifndef PBS_TEST_EXACT
#define PBS_TEST_EXACT 0
#endif

enum { ROUNDS = 200 };

static const uint32_t SPECIAL[] = {
    0x00000000, 0x80000000, 0x00000001, 0x80000001, /* zeros, the least denormals */
    0x007fffff, 0x807fffff, 0x00800000, 0x80800000, /* the largest, the least normal number */
    0x3f800000, 0xbf800000, 0x3f808000, 0x3f818000, /* 1, bf16 ties to even down and up */
    0x3f807fff, 0x3f808001, 0x7f7fffff, 0xff7fffff, /* beside a tie, the largest number */
    0x7f7f7fff, 0x7f7f8000, 0x7f800000, 0xff800000, /* the last bf16, the first inf */
    0x7fc00000, 0xffc12345, 0x7f800001, 0xff812345, /* quiet and signalling NaN */
    0x477fefff, 0x477ff000, 0x38800000, 0x387fe000, /* ends of fp16 */
    0x33000000, 0x33000001, 0x33800000, 0x38801000, /* half its least denormal, ties */
    0x38803000, 0x3f801000, 0x3f803000, 0x4b800000,
};
enum { SPECIALS = sizeof SPECIAL / sizeof *SPECIAL };

static uint32_t bits(float x) { return pbs_bits_of_float(x); }
static float number(uint32_t u) { return pbs_float_from_bits(u); }

static int same_bits(float x, float y) { return bits(x) == bits(y); }

/* A NaN is as good as another, and so is a zero. */
static int same(float x, float y) { return (isnan(x) && isnan(y)) || x == y; }

static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

/* Of any magnitude, or of one where sums and products stay normal and sums cancel. */
static float any_number(rng *r) {
    switch (rng_below(r, 4)) {
    case 0: return number(SPECIAL[rng_below(r, SPECIALS)]);
    case 1: return number(rng_next(r));
    default: return rng_uniform(r, -4.0f, 4.0f);
    }
}

static void any_numbers(rng *r, float x[MOST_LANES]) {
    for (int i = 0; i < MOST_LANES; i++) x[i] = any_number(r);
}

static void numbers(rng *r, float x[MOST_LANES]) {
    for (int i = 0; i < MOST_LANES; i++) x[i] = rng_uniform(r, -4.0f, 4.0f);
}

/* ---- arithmetic ------------------------------------------------------------------------------ */
#define EACH_LANE(ops) for (int i = 0; i < (ops)->lanes; i++)

#define CHECK_LANE(equal, what)                                                                   \
    CHECK(equal(got[i], expected), "%s: " what ": lane %d is %a, not %a", pbs_isa_name(ops->isa), \
          i, (double)got[i], (double)expected)

/* A denormal that MXCSR makes a zero: what max makes of it is nobody's promise. */
static int is_denormal(float x) { return bits(x) << 1 != 0 && bits(x) << 1 < 0x01000000u; }

static void test_arithmetic(const vec_ops *ops, rng *r) {
    float x[MOST_LANES], y[MOST_LANES], z[MOST_LANES], got[MOST_LANES];
    any_numbers(r, x);
    any_numbers(r, y);
    any_numbers(r, z);
    ops->add(got, x, y);
    EACH_LANE(ops) {
        const float expected = x[i] + y[i];
        CHECK_LANE(same, "add");
    }
    ops->sub(got, x, y);
    EACH_LANE(ops) {
        const float expected = x[i] - y[i];
        CHECK_LANE(same, "sub");
    }
    ops->mul(got, x, y);
    EACH_LANE(ops) {
        const float expected = x[i] * y[i];
        CHECK_LANE(same, "mul");
    }
    ops->max(got, x, y);
    EACH_LANE(ops) {
        const float expected = x[i] > y[i] ? x[i] : y[i];
        if (!is_denormal(x[i]) && !is_denormal(y[i])) CHECK_LANE(same, "max");
    }
    ops->fma(got, x, y, z);
    EACH_LANE(ops) { /* the emulated one rounds twice */
        float expected = fmaf(x[i], y[i], z[i]);
        const float twice = (float)((double)x[i] * (double)y[i] + (double)z[i]);
        if (is_emulated(ops->isa) && same(got[i], twice)) expected = twice;
        CHECK_LANE(same, "fma");
    }
}

static void test_across(const vec_ops *ops, rng *r) {
    float x[MOST_LANES], sum[MOST_LANES];
    numbers(r, x);
    memcpy(sum, x, sizeof sum);
    float top = x[0];
    EACH_LANE(ops) top = x[i] > top ? x[i] : top;
    CHECK(ops->hmax(x) == top, "%s: hmax", pbs_isa_name(ops->isa));
    for (int n = ops->lanes / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) sum[i] += sum[i + n];
    CHECK(same_bits(ops->hadd(x), sum[0]), "%s: hadd: %a, not %a", pbs_isa_name(ops->isa),
          (double)ops->hadd(x), (double)sum[0]);
}

/* 2^v as vf_exp2 takes it apart; v < 129, where its callers stay. */
static void test_exp2(const vec_ops *ops, rng *r) {
    static const float ends[] = {
        -126.0f, -0x1.f80002p6f, -126.5f,   -127.0f, -128.0f, -1e30f, -INFINITY,     0.0f, -0.0f,
        127.0f,  0x1.fffffep6f,  -0x1p-24f, -1.0f,   8.0f,    NAN,    -0x1.f7fffep6f};
    float v[MOST_LANES], p[MOST_LANES], fraction[MOST_LANES], got[MOST_LANES];
    for (int i = 0; i < MOST_LANES; i++) {
        v[i] = rng_below(r, 2) ? ends[rng_below(r, 16)] : rng_uniform(r, -140.0f, 128.0f);
        p[i] = rng_uniform(r, 1.0f, 2.0f);
    }
    ops->split_ldexp(fraction, got, p, v);
    EACH_LANE(ops) {
        if (isnan(v[i])) {
            CHECK(isnan(fraction[i]), "%s: split of NaN", pbs_isa_name(ops->isa));
            continue; /* p is NaN then */
        }
        const float expected = v[i] < -126.0f ? 0.0f : ldexpf(p[i], (int)floorf(v[i]));
        CHECK_LANE(same_bits, "ldexp");
        CHECK(v[i] < -126.0f ? fraction[i] >= 0.0f && fraction[i] <= 1.0f
                             : fraction[i] == v[i] - floorf(v[i]),
              "%s: split of %a: %a", pbs_isa_name(ops->isa), (double)v[i], (double)fraction[i]);
    }
}

/* ---- words as they are ----------------------------------------------------------------------- */
static void test_moves(const vec_ops *ops, rng *r) {
    const int n = ops->lanes;
    float rows[MOST_LANES * MOST_LANES] = {0}, got[MOST_LANES * MOST_LANES];
    for (int i = 0; i < n * n; i++) rows[i] = any_number(r);
    memcpy(got, rows, sizeof got);
    ops->transpose(got);
    for (int i = 0; i < n * n; i++)
        CHECK(same_bits(got[i], rows[i % n * n + i / n]), "%s: transpose: word %d",
              pbs_isa_name(ops->isa), i);
    ops->broadcast(got, rows + 3);
    EACH_LANE(ops) {
        const float expected = rows[3];
        CHECK_LANE(same_bits, "broadcast");
    }
    ops->set1(got, 0x1.8p3f);
    EACH_LANE(ops) {
        const float expected = 0x1.8p3f;
        CHECK_LANE(same_bits, "set1");
    }
}

/* ---- elements of tensors --------------------------------------------------------------------- */
static size_t width(pbs_dtype dtype) { return dtype == PBS_DTYPE_FP32 ? 4 : 2; }

/* Exact, in any floating-point state. */
static float widened(pbs_dtype dtype, const char *at) {
    uint32_t word = 0;
    memcpy(&word, at, width(dtype));
    if (dtype == PBS_DTYPE_FP32) return number(word);
    if (dtype == PBS_DTYPE_BF16) return number(word << 16);
    return pbs_fp16_to_fp32((uint16_t)word);
}

static void test_load(const vec_ops *ops, rng *r, pbs_dtype dtype) {
    char from[4 * MOST_LANES];
    float got[MOST_LANES];
    const int64_t n = rng_below(r, ops->lanes + 4) - 1; /* -1 to two more than there are */
    const size_t bytes = (size_t)(n < 0 ? 0 : n < ops->lanes ? n : ops->lanes) * width(dtype);
    for (size_t i = 0; i < sizeof from; i++) from[i] = (char)rng_next(r);
    /* the page behind this block may not be touched */
    char *at = (char *)filled(bytes, 0);
    memcpy(at, from, bytes);
    ops->load_as(got, dtype, at, n);
    drop(at);
    EACH_LANE(ops) {
        const float expected = i < n ? widened(dtype, from + (size_t)i * width(dtype)) : 0.0f;
        if (isnan(expected))
            CHECK_LANE(same, "load");
        else
            CHECK_LANE(same_bits, "load");
    }
}

static uint32_t rounded(pbs_dtype dtype, float x) {
    if (dtype == PBS_DTYPE_FP32) return bits(x);
    return dtype == PBS_DTYPE_BF16 ? pbs_fp32_to_bf16(x) : pbs_fp32_to_fp16(x);
}

static void test_store(const vec_ops *ops, rng *r, pbs_dtype dtype) {
    enum { GUARD = 8 };
    unsigned char to[4 * MOST_LANES + 2 * GUARD];
    const size_t bytes = width(dtype);
    const int64_t n = rng_below(r, ops->lanes + 4) - 1;
    const size_t kept = (size_t)(n < 0 ? 0 : n < ops->lanes ? n : ops->lanes);
    float x[MOST_LANES];
    any_numbers(r, x);
    memset(to, 0x5a, sizeof to);
    ops->store_as(dtype, to + GUARD, n, x);
    for (size_t i = 0; i < kept; i++) {
        uint32_t got = 0, expected = rounded(dtype, x[i]);
        memcpy(&got, to + GUARD + i * bytes, bytes);
        if (dtype == PBS_DTYPE_FP16 && isnan(x[i])) got |= 0x3ff, expected |= 0x3ff;
        CHECK(got == expected, "%s: store of %a as dtype %d: %x, not %x", pbs_isa_name(ops->isa),
              (double)x[i], (int)dtype, got, expected);
    }
    for (size_t i = 0; i < sizeof to; i++)
        CHECK((i >= GUARD && i < GUARD + kept * bytes) || to[i] == 0x5a,
              "%s: dtype %d, n %d: byte %d was written", pbs_isa_name(ops->isa), (int)dtype, (int)n,
              (int)i - GUARD);
}

/* ---- pairs ----------------------------------------------------------------------------------- */
static float half(float word, int high) {
    return flushed(number(high ? bits(word) & 0xffff0000u : bits(word) << 16));
}

/* As Intel's manual has it: the upper halves, then the lower ones, rounded each time. */
static float by_the_manual(float acc, float a, float b) {
    acc = flushed(fmaf(half(a, 1), half(b, 1), flushed(acc)));
    return flushed(fmaf(half(a, 0), half(b, 0), acc));
}

static float random_pair(rng *r, int wide) {
    uint32_t word = 0;
    for (int i = 0; i < 2; i++)
        word = word << 16 | pbs_fp32_to_bf16(wide ? any_number(r) : rng_uniform(r, -4.0f, 4.0f));
    return number(word);
}

/* `wide`: with infinities, NaN and denormals. What products under 2^-126 leave is then not asked
 * for: a unit that keeps them and one that drops them differ by less than 2^-125. */
static void test_dot2(const vec_ops *ops, rng *r, int wide) {
    float acc[MOST_LANES], a[MOST_LANES], b[MOST_LANES], got[MOST_LANES];
    for (int i = 0; i < MOST_LANES; i++) {
        acc[i] = wide ? any_number(r) : rng_uniform(r, -4.0f, 4.0f);
        a[i] = random_pair(r, wide);
        b[i] = random_pair(r, wide);
    }
    ops->dot2(got, acc, a, b);
    EACH_LANE(ops) {
        const float expected = by_the_manual(acc[i], a[i], b[i]);
        const double high = (double)half(a[i], 1) * (double)half(b[i], 1);
        const double low = (double)half(a[i], 0) * (double)half(b[i], 0);
        const double size = fabs((double)acc[i]) + fabs(high) + fabs(low);
        const int finite = isfinite(expected) && size < (double)FLT_MAX;
        if (is_emulated(ops->isa) ? !wide : PBS_TEST_EXACT || !finite) CHECK_LANE(same, "dot2");
        if (finite)
            CHECK(fabs((double)got[i] - ((double)flushed(acc[i]) + high + low)) <=
                      3 * 0x1p-24 * size + 0x1p-125,
                  "%s: dot2: lane %d is %a, not %a", pbs_isa_name(ops->isa), i, (double)got[i],
                  (double)expected);
    }
}

static void test_pairs(const vec_ops *ops, rng *r) {
    float x[MOST_LANES], y[MOST_LANES], got[MOST_LANES];
    uint16_t halves[2 * MOST_LANES];
    any_numbers(r, x);
    any_numbers(r, y);
    ops->to_pairs(got, x, y);
    memcpy(halves, got, sizeof halves);
    for (int i = 0; i < 2 * ops->lanes; i++) {
        const float from = i < ops->lanes ? x[i] : y[i - ops->lanes];
        const uint16_t expected = pbs_fp32_to_bf16(flushed(from));
        CHECK(halves[i] == expected, "%s: to_pairs: half %d of %a is %x, not %x",
              pbs_isa_name(ops->isa), i, (double)from, halves[i], expected);
    }
    ops->pair_of_ones(got);
    EACH_LANE(ops) {
        const float expected = number(0x3f803f80u);
        CHECK_LANE(same_bits, "ones");
    }

    const int64_t n = rng_below(r, ops->lanes + 4) - 1;
    const int kept = n < 0 ? 0 : n < ops->lanes ? (int)n : ops->lanes;
    uint16_t *low = (uint16_t *)filled(2 * (size_t)kept, 0);
    uint16_t *high = (uint16_t *)filled(2 * (size_t)kept, 0);
    for (int i = 0; i < kept; i++) {
        low[i] = (uint16_t)rng_next(r);
        high[i] = (uint16_t)rng_next(r);
    }
    ops->load_pairs(got, low, high, n);
    EACH_LANE(ops) {
        const float expected = number(i < kept ? (uint32_t)high[i] << 16 | low[i] : 0);
        CHECK_LANE(same_bits, "load_pairs");
    }
    drop(low);
    drop(high);
}

static void test_ops(void *arg) {
    const vec_ops *ops = (const vec_ops *)arg;
    static const pbs_dtype dtypes[] = {PBS_DTYPE_FP32, PBS_DTYPE_FP16, PBS_DTYPE_BF16};
    rng r = {11};
    for (int round = 0; round < ROUNDS; round++) {
        test_arithmetic(ops, &r);
        test_across(ops, &r);
        test_exp2(ops, &r);
        test_moves(ops, &r);
        for (int i = 0; i < 3; i++) {
            test_load(ops, &r, dtypes[i]);
            test_store(ops, &r, dtypes[i]);
        }
        if (!ops->pairs) continue;
        test_dot2(ops, &r, 0);
        test_dot2(ops, &r, 1);
        test_pairs(ops, &r);
    }
}

void test_vec(void) {
    static const vec_ops *const all[] = {
        &test_vec_emu_avx2_ops,
        &test_vec_emu_avx512_ops,
        &test_vec_emu_avx512bf16_ops,
#if defined(__x86_64__)
        &test_vec_avx2_ops,
        &test_vec_avx512_ops,
        &test_vec_avx512bf16_ops,
#endif
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const char *name = pbs_isa_name(all[i]->isa);
        vec_ops ops = *all[i];
        pbs_cpu_state saved;
        if (!pbs_isa_available(ops.isa)) continue;
        test_guard = GUARD_AFTER;
        run_guarded(test_ops, &ops, name);
        pbs_enter_mxcsr(&saved);
        run_guarded(test_ops, &ops, name);
        pbs_leave_mxcsr(&saved);
        test_guard = GUARD_NONE;
    }
}
