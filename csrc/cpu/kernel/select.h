/* SPDX-License-Identifier: Apache-2.0
 *
 * select: block logits, C = scale A B^T in fp32, by the same micro-kernel, and their softmax. Every
 * element of C is one chain of products over depth, so cutting rows or columns differently never
 * changes a bit.
 */
#ifndef PBS_CPU_KERNEL_SELECT_H
#define PBS_CPU_KERNEL_SELECT_H

#include "cpu/kernel/pack.h"
#include "cpu/kernel/softmax.h"
#include "cpu/kernel/tile.h"

enum { GEMM_DEPTH = 128 }; /* of B at a time, transposed on the stack: 8 or 16 KiB */

typedef struct gemm_nt_block {
    const float *a;
    int64_t lda;
    const float *b; /* [steps][GROUP] */
    float *c;
    int64_t ldc;
    int32_t rows, cols, steps; /* cols <= GROUP */
    int first;                 /* first depth: c is not read */
    float scale;               /* 1 until the last depth */
} gemm_nt_block;

static void gemm_nt_rows(const gemm_nt_block *n) {
    float part[TILE_ROWS * GROUP];
    for (int32_t row = 0; row < n->rows; row += TILE_ROWS) {
        const int32_t rows = n->rows - row < TILE_ROWS ? n->rows - row : (int32_t)TILE_ROWS;
        const gemm g = {.a = n->a + row * n->lda,
                        .lda = n->lda,
                        .b = n->b,
                        .c = part,
                        .ldc = GROUP,
                        .rows = rows,
                        .steps = n->steps};
        memset(part, 0, sizeof part);
        for (int32_t r = 0; r < rows && !n->first; r++)
            memcpy(part + r * GROUP, n->c + (row + r) * n->ldc, (size_t)n->cols * 4);
        tile(TILE_ROWS, 0, 1, &g, 0);
        for (int32_t r = 0; r < rows; r++)
            for (int32_t i = 0; i < n->cols; i += VL)
                vf_store_as(PBS_DTYPE_FP32, n->c + (row + r) * n->ldc + i, n->cols - i,
                            vf_mul(vf_load(part + r * GROUP + i), vf_set1(n->scale)));
    }
}

static void kernel_gemm_nt(int32_t rows, int32_t cols, int32_t depth, float scale, const float *a,
                           int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    float group[GEMM_DEPTH * GROUP];
    for (int32_t col = 0; col < cols; col += GROUP) {
        for (int32_t d = 0; d < depth; d += GEMM_DEPTH) {
            const int last = depth - d <= GEMM_DEPTH;
            const int32_t steps = last ? depth - d : (int32_t)GEMM_DEPTH;
            const pbs_rows keys = {.base = b + d, .stride = ldb, .dtype = PBS_DTYPE_FP32};
            pack_k_group(PBS_DTYPE_FP32, &keys, col, cols, steps, group);
            const gemm_nt_block block = {.a = a + d,
                                         .lda = lda,
                                         .b = group,
                                         .c = c + col,
                                         .ldc = ldc,
                                         .rows = rows,
                                         .cols = cols - col < GROUP ? cols - col : (int32_t)GROUP,
                                         .steps = steps,
                                         .first = d == 0,
                                         .scale = last ? scale : 1.0f};
            gemm_nt_rows(&block);
        }
    }
}

/* Elements [i, i + VL) of x [n]; those beyond n are -inf. */
INLINE vf load_or_minus_inf(const float *x, int32_t i, int32_t n) {
    if (n - i >= VL) return vf_load(x + i);
    float part[VL];
    vf_store(part, vf_set1(-INFINITY));
    memcpy(part, x + i, (size_t)(n - i) * sizeof *part);
    return vf_load(part);
}

static void kernel_log_softmax(float *x, int32_t n) {
    vf top = vf_set1(-INFINITY), sum = vf_zero();
    for (int32_t i = 0; i < n; i += VL) top = vf_max(load_or_minus_inf(x, i, n), top);
    const vf max = vf_set1(vf_hmax(top)), log2_e = vf_set1(PBS_LOG2_E);
    for (int32_t i = 0; i < n; i += VL) {
        const vf below = vf_sub(load_or_minus_inf(x, i, n), max);
        sum = vf_add(sum, vf_exp2(EXP2_FINEST, vf_mul(below, log2_e)));
    }
    const vf log_sum = vf_set1(logf(vf_hadd(sum)));
    for (int32_t i = 0; i < n; i += VL) {
        const vf below = vf_sub(load_or_minus_inf(x, i, n), max);
        vf_store_as(PBS_DTYPE_FP32, x + i, n - i, vf_sub(below, log_sum));
    }
}

#endif /* PBS_CPU_KERNEL_SELECT_H */
