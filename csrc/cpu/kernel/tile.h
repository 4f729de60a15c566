/* SPDX-License-Identifier: Apache-2.0
 *
 * The micro-kernel. Everything that multiplies is
 *     C[rows][GROUP] (+)= A[rows][steps] B[steps][GROUP]
 * with A row-major, one word broadcast per step, and B one group of a panel.
 *
 *            A                  B                              C
 *   scores   query rows         K: GROUP keys, steps over d    acc_s
 *   output   probabilities      V: GROUP columns, over keys    acc_o
 *
 * A word is an fp32 number, or with `pairs` two bf16. A C element is one chain of products in step
 * order whatever tile it lies in, so how rows are cut never changes a bit.
 */
#ifndef PBS_CPU_KERNEL_TILE_H
#define PBS_CPU_KERNEL_TILE_H

#include "cpu/vec.h"

enum { TAIL_ROWS = 4, ROW_STEP = TILE_ROWS - TAIL_ROWS };

typedef struct gemm {
    const float *a; /* [rows][steps] */
    int64_t lda;    /* words */
    const float *b; /* [steps][GROUP] */
    float *c;       /* [padded_rows(rows)][GROUP]: what lies beyond `rows` is scratch */
    int64_t ldc;
    int32_t rows;
    int32_t steps;
} gemm;

/* Lines to bring into L2 while tiles run; at = NULL: none. */
typedef struct prefetch {
    const char *at;
    const char *end;
    int32_t lines_per_tile;
} prefetch;

INLINE void prefetch_some(prefetch *next) {
    for (int32_t i = 0; i < next->lines_per_tile && next->at < next->end;
         i++, next->at += PBS_ALIGN)
        __builtin_prefetch(next->at, 0, 2);
}

/* Rows in whole tiles: how many rows `rows` are padded to. Any such number is a sum of TILE_ROWS
 * and TAIL_ROWS. */
INLINE int32_t padded_rows(int32_t rows) {
    return rows <= TAIL_ROWS ? (int32_t)TAIL_ROWS : round_up(rows, ROW_STEP);
}

INLINE vf multiply(const int pairs, vf acc, vf a, vf b) {
#if VEC_PAIRS
    if (pairs) return vf_dot2(acc, a, b);
#endif
    (void)pairs;
    return vf_fma(a, b, acc);
}

/* Rows [row, row + height). A row that A does not have repeats the last one. */
INLINE void tile(const int height, const int pairs, const int add, const gemm *g, int32_t row) {
    vf acc[TILE_ROWS][2];
    const float *a[TILE_ROWS], *b = g->b;
    float *c = g->c + row * g->ldc;

    UNROLL for (int r = 0; r < height; r++) {
        a[r] = g->a + (row + r < g->rows ? row + r : g->rows - 1) * g->lda;
        acc[r][0] = add ? vf_load(c + r * g->ldc) : vf_zero();
        acc[r][1] = add ? vf_load(c + r * g->ldc + VL) : vf_zero();
    }
    const int64_t steps = g->steps;
    UNROLL_4 for (int64_t t = 0; t < steps; t++) {
        const vf b0 = vf_load(b + t * GROUP), b1 = vf_load(b + t * GROUP + VL);
        UNROLL for (int r = 0; r < height; r++) {
            const vf x = vf_broadcast(a[r] + t);
            acc[r][0] = multiply(pairs, acc[r][0], x, b0);
            acc[r][1] = multiply(pairs, acc[r][1], x, b1);
        }
    }
    UNROLL for (int r = 0; r < height; r++) {
        vf_store(c + r * g->ldc, acc[r][0]);
        vf_store(c + r * g->ldc + VL, acc[r][1]);
    }
}

/* All rows against one group; next may be NULL. */
INLINE void gemm_group(const int pairs, const int add, const gemm *g, prefetch *next) {
    const int32_t rows = padded_rows(g->rows);
    int32_t tail = 0, row = 0;
    while ((rows - tail) % TILE_ROWS) tail += TAIL_ROWS;
    for (; row < rows - tail; row += TILE_ROWS) {
        tile(TILE_ROWS, pairs, add, g, row);
        if (next) prefetch_some(next);
    }
    for (; row < rows; row += TAIL_ROWS) tile(TAIL_ROWS, pairs, add, g, row);
}

#endif /* PBS_CPU_KERNEL_TILE_H */
