/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA library: every call is the GPU's.
 */
#include "cuda.h"

const pbs_backend *pbs_backend_for(pbs_isa isa) {
    (void)isa;
    return &pbs_cuda_backend;
}
