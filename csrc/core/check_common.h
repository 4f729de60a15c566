/* SPDX-License-Identifier: Apache-2.0
 *
 * What check.c (verbs) asks of check_common.c (views, geometry, options). Every function names the
 * field, the given value and what is allowed.
 */
#ifndef PBS_CORE_CHECK_COMMON_H
#define PBS_CORE_CHECK_COMMON_H

#include "check.h"

/* Copies min(*given, full_size) bytes into the zeroed full struct; released_size is the size of the
 * first released version, the smallest that any caller can have. */
pbs_status pbs_check_struct(const void *given, size_t released_size, void *full, size_t full_size);

/* data_needed: NULL is an error (unless the view holds no element). */
pbs_status pbs_check_view(const char *name, const pbs_view *view, int data_needed);
pbs_status pbs_check_kv(const char *name, const pbs_kv *kv, int data_needed);
pbs_status pbs_check_pointer(const char *name, const void *pointer, int64_t elements);
/* An output: q's batch, heads and rows, given last dimension and dtype; no element twice. */
pbs_status pbs_check_output(const char *name, const pbs_view *view, const pbs_dims *dims,
                            int32_t last, pbs_dtype dtype);

/* From checked views q and k: fills every field but the block sizes. exec says whose call it is. */
pbs_status pbs_check_dims(const pbs_view *q, const pbs_view *k, pbs_gqa gqa,
                          const pbs_geometry *geometry, const pbs_exec *exec, pbs_dims *dims);
/* v agrees with k. */
pbs_status pbs_check_values(const pbs_view *k, const pbs_view *v, int data_needed);
/* block_size and segment_size; fills blocks_q, blocks_k, words. */
pbs_status pbs_check_blocks(const char *name_q, int32_t block_q, const char *name_k,
                            int32_t block_k, pbs_dims *dims);
pbs_status pbs_check_segment(int32_t segment_size, int32_t block_size, pbs_dims *dims);

pbs_status pbs_check_enum(const char *name, int value, int count);
pbs_status pbs_check_scale(float *softmax_scale, int32_t head_dim);
/* dims: read only with tau_heads, NULL without. */
pbs_status pbs_check_tau(float tau, const float *tau_heads, const pbs_dims *dims);
pbs_status pbs_check_exec(pbs_exec *exec, const pbs_dims *dims);

/* Values behind pointers are looked at only where the backend lets the host do so.
 *
 * perm [batch, heads, max_len]: a permutation inside each complete segment of every sequence,
 * identity behind them. on_heads [heads] or NULL: 0 = not looked at. */
pbs_status pbs_check_key_perm(const char *name, const int32_t *perm, const int32_t *on_heads,
                              const pbs_dims *dims);
pbs_status pbs_check_query_perm(const char *name, const int32_t *perm, const pbs_dims *dims);

#endif /* PBS_CORE_CHECK_COMMON_H */
