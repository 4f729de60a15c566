/* SPDX-License-Identifier: Apache-2.0
 *
 * select: pooled queries against pooled keys, c = scale * a b^T.
 */
#include "isa_c.h"

void pbs_gemm_nt_c(int32_t rows, int32_t cols, int32_t depth, float scale, const float *a,
                   int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc) {
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < cols; j++) {
            float sum = 0.0f;
            for (int32_t d = 0; d < depth; d++) sum += a[i * lda + d] * b[j * ldb + d];
            c[i * ldc + j] = scale * sum;
        }
}
