/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU drivers, as the entry points (core/dispatch.c) see them. Params are checked and complete,
 * dims derived; *_bytes say how much workspace the driver cuts up.
 */
#ifndef PBS_CPU_CPU_H
#define PBS_CPU_CPU_H

#include "../core/check.h"
#include "backend.h"

/* softmax_scale * log2(e): kernels work in powers of two. */
#define PBS_LOG2_E 1.44269504088896340736f

/* The table for a call, or an error that names what was asked for (also by PBS_ATTN_ISA). */
pbs_status pbs_cpu_choose(pbs_isa wanted, pbs_dtype dtype, const pbs_cpu_kernels **kernels);

size_t pbs_cpu_score_bytes(const pbs_score_params *p, const pbs_dims *d, const pbs_cpu_kernels *k);
/* first_head: what number head 0 has for the random orders. */
void pbs_cpu_score(const pbs_score_params *p, const pbs_dims *d, const pbs_cpu_kernels *k,
                   int32_t first_head);

size_t pbs_cpu_packed_bytes(const pbs_dims *d, pbs_permute_mode mode, const pbs_cpu_kernels *k);
size_t pbs_cpu_permute_bytes(const pbs_permute_params *p, const pbs_dims *d,
                             const pbs_cpu_kernels *k);
void pbs_cpu_permute(const pbs_permute_params *p, const pbs_dims *d, const pbs_cpu_kernels *k);

size_t pbs_cpu_select_bytes(const pbs_select_params *p, const pbs_dims *d,
                            const pbs_cpu_kernels *k);
void pbs_cpu_select(const pbs_select_params *p, const pbs_dims *d, const pbs_cpu_kernels *k);
void pbs_cpu_score_strip(const pbs_select_params *p, const pbs_dims *d, const pbs_cpu_kernels *k,
                         int32_t batch, int32_t head, int32_t row_begin, pbs_strip *strip);

/* Is p->packed what this call needs? */
pbs_status pbs_cpu_check_packed(const pbs_attend_params *p, const pbs_dims *d,
                                const pbs_cpu_kernels *k);
size_t pbs_cpu_attend_bytes(const pbs_attend_params *p, const pbs_dims *d,
                            const pbs_cpu_kernels *k);
void pbs_cpu_attend(const pbs_attend_params *p, const pbs_dims *d, const pbs_cpu_kernels *k);

size_t pbs_cpu_prefill_bytes(const pbs_prefill_params *p, const pbs_dims *d,
                             const pbs_cpu_kernels *k);
void pbs_cpu_prefill(const pbs_prefill_params *p, const pbs_dims *d, const pbs_cpu_kernels *k);

#endif /* PBS_CPU_CPU_H */
