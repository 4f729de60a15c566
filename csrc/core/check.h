/* SPDX-License-Identifier: Apache-2.0
 *
 * Argument validation shared by every backend. pbs_check_<verb> copies the caller's struct into a
 * full one of today's size, checks it, fills in defaults (softmax_scale, heads_sel, num_threads,
 * max_seqlen) and derives the dimensions that drivers work with.
 */
#ifndef PBS_CORE_CHECK_H
#define PBS_CORE_CHECK_H

#include "geometry.h"
#include "status.h"
#include "view.h"

typedef struct pbs_backend pbs_backend; /* backend.h */

/* SIZING is for pbs_*_workspace_size: pointers to tensors, outputs and workspace may be NULL. */
typedef enum pbs_check_mode { PBS_CHECK_RUN, PBS_CHECK_SIZING } pbs_check_mode;

typedef struct pbs_dims {
    int32_t batch;
    int32_t heads_q, heads_k, heads_p; /* heads_p own a permutation */
    int32_t group;                     /* heads_q / heads_k */
    int32_t seqlen_q, seqlen_k;        /* of the tensors */
    int32_t max_q, max_k;              /* Nq, Nk */
    int32_t head_dim;
    int32_t block_q, block_k, segment_size;
    int32_t blocks_q, blocks_k, words; /* Tq, Tk, W */
    pbs_dtype dtype;
    pbs_geometry geometry;
    const pbs_backend *backend; /* of the call; means nothing on a device */
} pbs_dims;

PBS_HD pbs_seq pbs_dims_seq(const pbs_dims *d, int32_t b) {
    return pbs_seq_at(&d->geometry, b, d->seqlen_q, d->seqlen_k);
}

/* Key head whose rows head hp of a permutation is about; owner of query head hq's permutation. */
PBS_HD int32_t pbs_key_head(const pbs_dims *d, int32_t hp) {
    return d->heads_p == d->heads_k ? hp : hp / d->group;
}

PBS_HD int32_t pbs_owner_head(const pbs_dims *d, int32_t hq) {
    return d->heads_p == d->heads_q ? hq : hq / d->group;
}

PBS_HD int pbs_permutes_keys(pbs_permute_mode mode) {
    return mode == PBS_PERMUTE_KEYS || mode == PBS_PERMUTE_BOTH;
}

PBS_HD int pbs_permutes_queries(pbs_permute_mode mode) {
    return mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH;
}

PBS_HD pbs_own pbs_own_of_mode(pbs_permute_mode mode) {
    return mode == PBS_PERMUTE_NONE ? PBS_OWN_BLOCK : PBS_OWN_SEGMENT;
}

#ifdef __cplusplus
extern "C" {
#endif

pbs_status pbs_check_score(const pbs_score_params *params, pbs_check_mode mode,
                           pbs_score_params *full, pbs_dims *dims);
pbs_status pbs_check_permute(const pbs_permute_params *params, pbs_check_mode mode,
                             pbs_permute_params *full, pbs_dims *dims);
pbs_status pbs_check_select(const pbs_select_params *params, pbs_check_mode mode,
                            pbs_select_params *full, pbs_dims *dims);
pbs_status pbs_check_attend(const pbs_attend_params *params, pbs_check_mode mode,
                            pbs_attend_params *full, pbs_dims *dims);
pbs_status pbs_check_prefill(const pbs_prefill_params *params, pbs_check_mode mode,
                             pbs_prefill_params *full, pbs_dims *dims);

pbs_status pbs_check_workspace(const void *workspace, size_t given, size_t needed);

#ifdef __cplusplus
}
#endif

#endif /* PBS_CORE_CHECK_H */
