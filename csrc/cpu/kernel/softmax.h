/* SPDX-License-Identifier: Apache-2.0
 *
 * Online softmax of one row, in log2 units: row_max is a whole number, so that every rescaling is
 * by a power of two and exact, and it is raised only when a score exceeds it by more than
 * RAISE_ABOVE; probabilities are then at most 2^RAISE_ABOVE.
 */
#ifndef PBS_CPU_KERNEL_SOFTMAX_H
#define PBS_CPU_KERNEL_SOFTMAX_H

#include "cpu/vec.h"

#define LN2 0.69314718055994530942
#define RAISE_ABOVE 8.0f
#define NO_ROW_MAX (-FLT_MAX) /* finite: a row whose first panel is all masked stays at it */

/* 2^x on [0, 1): the polynomials of degree 3, 5 and 6 with the least relative error, 7.5e-5, 7.5e-8
 * and 1.9e-9. Probabilities that are rounded to bf16 (2e-3), or make a bf16 output, need no more
 * than degree 3. */
typedef enum exp2_degree { EXP2_COARSE = 3, EXP2_FINE = 5, EXP2_FINEST = 6 } exp2_degree;

static const float exp2_coarse[] = {0x1.fff632p-1f, 0x1.64444cp-1f, 0x1.cefc4cp-3f, 0x1.3f96a4p-4f};
static const float exp2_fine[] = {0x1.fffffep-1f, 0x1.62e4f6p-1f, 0x1.ebd5a8p-3f,
                                  0x1.c95446p-5f, 0x1.26900cp-7f, 0x1.ec320ap-10f};
static const float exp2_finest[] = {0x1p+0f,      0x1.62e42ap-1f,  0x1.ebfd9ep-3f, 0x1.c685p-5f,
                                    0x1.3d28p-7f, 0x1.461954p-10f, 0x1.c72118p-13f};

/* Exactly 0 below 2^-126; what the polynomial may leave just under 2^-126 is flushed (state.h). */
INLINE vf vf_exp2(const exp2_degree degree, vf v) {
    const float *poly = degree == EXP2_COARSE ? exp2_coarse
                        : degree == EXP2_FINE ? exp2_fine
                                              : exp2_finest;
    vf whole, x = vf_split(v, &whole), p = vf_set1(poly[degree]);
    UNROLL for (int i = (int)degree - 1; i >= 0; i--) p = vf_fma(p, x, vf_set1(poly[i]));
    return vf_ldexp(p, whole);
}

/* 2^n of a whole n <= 0. */
INLINE float power_of_two(float n) {
    if (n < -126.0f) return 0.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* Keys from `visible` on are masked. */
INLINE void mask_row(float *row, int32_t visible, int32_t n) {
    for (int32_t i = visible > 0 ? visible : 0; i < n; i++) row[i] = -INFINITY;
}

INLINE float max_of_row(const float *row, int32_t n) {
    vf top0 = vf_load(row), top1 = vf_load(row + VL);
    for (int32_t i = GROUP; i < n; i += GROUP) {
        top0 = vf_max(vf_load(row + i), top0);
        top1 = vf_max(vf_load(row + i + VL), top1);
    }
    return vf_hmax(vf_max(top0, top1));
}

typedef struct softmax_state {
    float *row_max;    /* [rows] */
    float *row_sum;    /* [rows][VL]: lanes are added at the end */
    float *row_weight; /* [rows][VL]: row_sum of the probabilities as the product with V sees them.
                          With pairs they are rounded, and an output normalised by the rounded ones
                          is exact where one key decides; else NULL, it is row_sum */
    float *acc_o;      /* [rows][columns]; NULL: no output, as in scoring */
    int64_t columns;
    float scale_log2;
    uint64_t *rescales; /* NULL: not counted */
} softmax_state;

INLINE void scale_row(float *row, int64_t n, vf factor) {
    for (int64_t i = 0; i < n; i += VL) vf_store(row + i, vf_mul(vf_load(row + i), factor));
}

static void raise_row_max(const softmax_state *state, int64_t r, float top) {
    const float raised = ceilf(top), before = state->row_max[r];
    state->row_max[r] = raised;
    if (before == NO_ROW_MAX) return; /* the sums are zeros */
    if (state->rescales) ++*state->rescales;
    const vf down = vf_set1(power_of_two(before - raised));
    scale_row(state->row_sum + r * VL, VL, down);
    if (state->row_weight) scale_row(state->row_weight + r * VL, VL, down);
    if (state->acc_o) scale_row(state->acc_o + r * state->columns, state->columns, down);
}

/* Scores of row r, each with bias (a whole number of log2 units) on top, to probabilities, in
 * place: n floats, or n bf16 at the start of the row. */
INLINE void exp2_row(const int pairs, const exp2_degree degree, const softmax_state *state,
                     float bias, int64_t r, float *row, int32_t n) {
    const vf scale = vf_set1(state->scale_log2), shift = vf_set1(bias - state->row_max[r]);
    vf sum = vf_load(state->row_sum + r * VL);
#if VEC_PAIRS
    vf weight = pairs ? vf_load(state->row_weight + r * VL) : vf_zero();
#endif
    for (int32_t i = 0; i < n; i += GROUP) {
        const vf p0 = vf_exp2(degree, vf_fma(vf_load(row + i), scale, shift));
        const vf p1 = vf_exp2(degree, vf_fma(vf_load(row + i + VL), scale, shift));
        sum = vf_add(sum, vf_add(p0, p1));
#if VEC_PAIRS
        if (pairs) {
            const vf rounded = vf_to_pairs(p0, p1);
            weight = vf_dot2(weight, rounded, vf_pair_of_ones());
            vf_store(row + i / 2, rounded); /* never ahead of what was read */
            continue;
        }
#endif
        vf_store(row + i, p0);
        vf_store(row + i + VL, p1);
    }
    vf_store(state->row_sum + r * VL, sum);
#if VEC_PAIRS
    if (pairs) vf_store(state->row_weight + r * VL, weight);
#endif
    (void)pairs;
}

/* Rows [first, first + rows) of the state, stored ld apart from `row` on. The maxima of some rows
 * come before their powers: alone they overlap, and the row is still in L1 for the second look. */
INLINE void softmax_rows(const int pairs, const exp2_degree degree, const softmax_state *state,
                         float bias, int64_t first, int32_t rows, float *row, int64_t ld,
                         int32_t n) {
    enum { BATCH = 8 };
    for (int32_t at = 0; at < rows; at += BATCH) {
        const int32_t end = at + BATCH < rows ? at + BATCH : rows;
        for (int32_t r = at; r < end; r++) {
            const float top = max_of_row(row + r * ld, n) * state->scale_log2 + bias;
            if (top > state->row_max[first + r] + RAISE_ABOVE) raise_row_max(state, first + r, top);
        }
        for (int32_t r = at; r < end; r++)
            exp2_row(pairs, degree, state, bias, first + r, row + r * ld, n);
    }
}

#endif /* PBS_CPU_KERNEL_SOFTMAX_H */
