/* SPDX-License-Identifier: Apache-2.0
 *
 * Where the rows of a tensor lie.
 */
#ifndef PBS_CORE_VIEW_H
#define PBS_CORE_VIEW_H

#include "geometry.h"

PBS_HD size_t pbs_dtype_size(pbs_dtype dtype) { return dtype == PBS_DTYPE_FP32 ? 4 : 2; }

/* A row of one head of one sequence; NULL if the view has no memory. */
PBS_HD char *pbs_view_at(const pbs_view *v, int32_t b, int32_t h, int64_t row) {
    int64_t at = b * v->stride[0] + h * v->stride[1] + row * v->stride[2];
    return v->data ? (char *)v->data + at * (int64_t)pbs_dtype_size(v->dtype) : NULL;
}

#endif /* PBS_CORE_VIEW_H */
