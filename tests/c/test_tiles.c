/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiles, emulated and (where there are any) real: what loads and stores touch, and TDPBF16PS.
 */
#include <math.h>
#include <string.h>

#include "cpu/state.h"
#include "cpu/tiles_emu.h"
#include "harness.h"
#include "tile_ops.h"
#include "tile_ops.inc"

static const char *here(void) { return NULL; }

const tile_ops tiles_in_c = {"emu", here, copy, zero, dot, tiles_enter, tiles_leave};

enum { ROWS = 32, PAIRS = 16, COLUMNS = 32 };

/* ---- loads and stores ------------------------------------------------------------------------ */
static void test_memory(const tile_ops *ops) {
    enum { ROOM = 16 * 1024 };
    static const ptrdiff_t strides[] = {64, 128, 1000, -72};
    static char from[ROOM], to[ROOM];
    for (size_t s = 0; s < 4; s++)
        for (int tile = 0; tile < 8; tile++) {
            const ptrdiff_t in = strides[s], out = strides[(s + (size_t)tile) % 4];
            char *source = from + (in < 0 ? ROOM / 2 : 1), *target = to + (out < 0 ? ROOM / 2 : 3);
            for (int i = 0; i < ROOM; i++) from[i] = (char)(i * 7 + i / 251 + tile);
            memset(to, 0x5a, ROOM);
            ops->copy(tile, (rows64){target, out}, (rows64){source, in}, tile % 2);
            int others = ROOM;
            for (int r = 0; r < 16; r++) {
                CHECK(memcmp(target + r * out, source + r * in, 64) == 0,
                      "%s: tile %d, strides %d and %d: row %d", ops->name, tile, (int)in, (int)out,
                      r);
                memset(target + r * out, 0x5a, 64);
            }
            for (int i = 0; i < ROOM; i++) others -= to[i] == 0x5a;
            CHECK(others == 0, "%s: tile %d, stride %d: %d bytes beside its rows", ops->name, tile,
                  (int)out, others);
            ops->zero(tile, (rows64){target, out});
            for (int r = 0; r < 16; r++)
                for (int i = 0; i < 64; i++)
                    CHECK(target[r * out + i] == 0, "%s: tile %d is not zero", ops->name, tile);
        }
}

/* ---- products -------------------------------------------------------------------------------- */
typedef struct operands {
    uint16_t a[ROWS][2 * PAIRS];
    uint16_t b[PAIRS][COLUMNS][2];
    float c[ROWS][COLUMNS];
} operands;

static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

static float bf16(uint16_t bits) { return flushed(pbs_bf16_to_fp32(bits)); }

/* As Intel's manual has it: the even and the odd elements are a chain of FMA each, from zero; their
 * sum is added to C. */
static float by_the_manual(const operands *o, int m, int n) {
    float even = 0.0f, odd = 0.0f;
    for (int k = 0; k < PAIRS; k++) {
        even = flushed(fmaf(bf16(o->a[m][2 * k]), bf16(o->b[k][n][0]), even));
        odd = flushed(fmaf(bf16(o->a[m][2 * k + 1]), bf16(o->b[k][n][1]), odd));
    }
    return flushed(flushed(o->c[m][n]) + flushed(even + odd));
}

/* The true sum, and how far any order of rounding, or flushing, 34 additions may stay from it. */
static double in_doubles(const operands *o, int m, int n, double *slack) {
    double sum = (double)o->c[m][n], size = fabs(sum);
    for (int i = 0; i < 2 * PAIRS; i++) {
        double term = (double)bf16(o->a[m][i]) * (double)bf16(o->b[i / 2][n][i % 2]);
        sum += term;
        size += fabs(term);
    }
    *slack = 34 * (0x1p-24 * size + 0x1p-126);
    return sum;
}

static int same(float x, float y) { return (isnan(x) && isnan(y)) || memcmp(&x, &y, 4) == 0; }

/* Emulated: every bit as the manual says. Real: what is not finite as well, the rest within the
 * bound, for whether a core keeps the manual's order only Intel knows. */
static void check_dot(const tile_ops *ops, const operands *o, const char *what) {
    for (int ours = 0; ours < 2; ours++) { /* in the caller's floating-point state, and in ours */
        operands r = *o;
        pbs_cpu_state saved;
        if (ours) pbs_enter_mxcsr(&saved);
        ops->dot((rows64){(char *)r.c, sizeof r.c[0]}, (rows64){(char *)r.a, sizeof r.a[0]},
                 (rows64){(char *)r.b, sizeof r.b[0]});
        if (ours) pbs_leave_mxcsr(&saved);
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < COLUMNS; n++) {
                const float manual = by_the_manual(o, m, n), got = r.c[m][n];
                double slack, sum = in_doubles(o, m, n, &slack);
                if (ops == &tiles_in_c || !isfinite(manual))
                    CHECK(same(got, manual), "%s: %s [%d, %d]: %a, not %a", ops->name, what, m, n,
                          (double)got, (double)manual);
                if (isfinite(manual))
                    CHECK(fabs((double)got - sum) <= slack, "%s: %s [%d, %d]: %g, not %g",
                          ops->name, what, m, n, (double)got, sum);
            }
    }
}

/* Uniform in +- 2^exponent. */
static operands random_operands(rng *r, int a_exponent, int b_exponent, int c_exponent) {
    operands o;
    for (int m = 0; m < ROWS; m++)
        for (int i = 0; i < 2 * PAIRS; i++)
            o.a[m][i] = pbs_fp32_to_bf16(ldexpf(rng_uniform(r, -1.0f, 1.0f), a_exponent));
    for (int k = 0; k < PAIRS; k++)
        for (int n = 0; n < 2 * COLUMNS; n++)
            o.b[k][n / 2][n % 2] =
                pbs_fp32_to_bf16(ldexpf(rng_uniform(r, -1.0f, 1.0f), b_exponent));
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < COLUMNS; n++)
            o.c[m][n] = ldexpf(rng_uniform(r, -1.0f, 1.0f), c_exponent);
    return o;
}

static void test_dot(const tile_ops *ops) {
    rng r = {5};
    for (int i = 0; i < 8; i++) {
        operands o = random_operands(&r, i, 2 - i, i % 3 - 1);
        check_dot(ops, &o, "numbers");
    }
    operands o = random_operands(&r, 0, 0, 0);
    for (int m = 0; m < ROWS; m++) /* 256 - 255 - 1 + ...: the order shows */
        for (int i = 0; i < 2 * PAIRS; i++)
            o.a[m][i] = pbs_fp32_to_bf16(i % 4 < 2 ? 0x1p20f : -0x1p20f);
    check_dot(ops, &o, "cancelling");

    o = random_operands(&r, 0, 0, 0); /* denormal inputs are zeros, in A, B and C */
    for (int i = 0; i < 2 * PAIRS; i++) o.a[3][i] = (uint16_t)(0x8001 + 4 * i);
    for (int k = 0; k < PAIRS; k++) o.b[k][5][k % 2] = 0x007f;
    for (int n = 0; n < COLUMNS; n++) o.c[3][n] = n % 2 ? 0x1p-130f : -0x1p-127f;
    check_dot(ops, &o, "denormals in");
    for (int n = 0; n < COLUMNS; n++)
        CHECK(by_the_manual(&o, 3, n) == 0.0f, "a row of denormals is a row of zeros");

    for (int scale = -68; scale <= -58; scale++) { /* sums on both sides of 2^-126 */
        o = random_operands(&r, scale, scale, -120);
        check_dot(ops, &o, "tiny products");
        for (int n = 0; n < COLUMNS; n++) o.c[0][n] = 0.0f;
        check_dot(ops, &o, "tiny sums");
    }

    o = random_operands(&r, 0, 0, 0);
    o.a[1][4] = 0x7f80; /* inf, against 0 in column 7 and a denormal in column 8 */
    o.b[2][7][0] = 0x8000;
    o.b[2][8][0] = 0x0001;
    o.a[30][9] = 0x7fc1; /* NaN */
    o.b[15][20][1] = 0xff80;
    o.c[20][20] = INFINITY;
    o.c[21][31] = NAN;
    check_dot(ops, &o, "inf and NaN");
    CHECK(isnan(by_the_manual(&o, 1, 7)) && isnan(by_the_manual(&o, 1, 8)), "inf * 0 is NaN");
    o = random_operands(&r, 100, 100, 0);
    check_dot(ops, &o, "overflow");
}

void test_tiles(void) {
    static const tile_ops *const all[] = {&tiles_in_c, &tiles_of_amx};
    for (size_t i = 0; i < 2; i++) {
        _Alignas(64) char saved[64], inner[64];
        if (all[i]->missing()) continue;
        all[i]->enter(saved);
        test_memory(all[i]);
        all[i]->enter(inner); /* a task inside a task: leaving it keeps what is around it */
        all[i]->leave(inner);
        test_dot(all[i]);
        all[i]->leave(saved);
    }
}
