/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend (core/backend.h): its drivers, one file per verb. They look at sizes only,
 * launch on exec's stream and return; workspace is cut as on the CPU.
 */
#ifndef PBS_CUDA_CUDA_H
#define PBS_CUDA_CUDA_H

#include "../core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const pbs_backend pbs_cuda_backend;

size_t pbs_cuda_score_bytes(const pbs_score_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cuda_score(const pbs_score_params *p, const pbs_dims *d, const void *kernels,
                          int32_t first_head);

size_t pbs_cuda_packed_bytes(const pbs_dims *d, pbs_permute_mode mode, pbs_correction correction,
                             const void *kernels);
size_t pbs_cuda_permute_bytes(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cuda_permute(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);
/* What follows the segments, if the mode permutes queries; behind pbs_cuda_permute already. */
pbs_status pbs_cuda_permute_queries(const pbs_permute_params *p, const pbs_dims *d);
/* score and permute, whose scores nobody else sees. */
pbs_status pbs_cuda_score_permute(const pbs_score_params *p, const pbs_permute_params *permute,
                                  const pbs_dims *d, const void *kernels, int32_t first_head);
pbs_status pbs_cuda_fill_identity(const pbs_exec *exec, int32_t *perm, int64_t heads, int32_t len);

size_t pbs_cuda_select_bytes(const pbs_select_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cuda_select(const pbs_select_params *p, const pbs_dims *d, const void *kernels);

pbs_status pbs_cuda_check_packed(const pbs_attend_params *p, const pbs_dims *d,
                                 const void *kernels);
size_t pbs_cuda_attend_bytes(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);
/* count [B, Hq, Tq]: blocks that bits list, or NULL. */
pbs_status pbs_cuda_attend(const pbs_attend_params *p, const pbs_dims *d, const void *kernels,
                           const int32_t *count);

/* Rows are moved 16 bytes at a time: base and strides must be multiples of that. */
pbs_status pbs_cuda_check_aligned(const char *name, const pbs_view *view);

/* Which kernels a call runs: what stands behind the pointer that choose hands on. */
static inline pbs_isa pbs_cuda_isa(const void *kernels) { return *(const pbs_isa *)kernels; }

/* Compute capability of a device as 10 * major + minor (sm_86: 86), 0 if it cannot be asked. Asked
 * for by every launch; needs no synchronisation. */
int pbs_cuda_capability(int32_t device);
/* How many multiprocessors a device has, at least 1. */
int32_t pbs_cuda_multiprocessors(int32_t device);
/* Why no kernel of this library runs there, or NULL. */
const char *pbs_cuda_refuses(int32_t device);
/* Makes device current for the calling thread; *previous is for pbs_cuda_leave. */
pbs_status pbs_cuda_enter(int32_t device, int32_t *previous);
void pbs_cuda_leave(int32_t device, int32_t previous);

#ifdef __cplusplus
}
#endif

#endif /* PBS_CUDA_CUDA_H */
