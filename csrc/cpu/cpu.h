/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU backend (core/backend.h): its drivers, one file per verb. kernels is the pbs_cpu_kernels
 * table that cpu.c chose.
 */
#ifndef PBS_CPU_CPU_H
#define PBS_CPU_CPU_H

#include "../core/backend.h"
#include "kernels.h"

extern const pbs_backend pbs_cpu_backend;

size_t pbs_cpu_score_bytes(const pbs_score_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cpu_score(const pbs_score_params *p, const pbs_dims *d, const void *kernels,
                         int32_t first_head);

size_t pbs_cpu_packed_bytes(const pbs_dims *d, pbs_permute_mode mode, pbs_correction correction,
                            const void *kernels);
size_t pbs_cpu_permute_bytes(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cpu_permute(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);

size_t pbs_cpu_select_bytes(const pbs_select_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cpu_select(const pbs_select_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cpu_score_strip(const pbs_select_params *p, const pbs_dims *d, const void *kernels,
                               int32_t batch, int32_t head, int32_t row_begin, pbs_strip *strip);

pbs_status pbs_cpu_check_packed(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);
size_t pbs_cpu_attend_bytes(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_cpu_attend(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);

#endif /* PBS_CPU_CPU_H */
