/* SPDX-License-Identifier: Apache-2.0
 *
 * A backend: what one kind of machine does for each verb. The entry points (dispatch.c) check a
 * call and hand it on; the waves of prefill (prefill.c) are the same for every backend. Params are
 * complete and dims derived when a backend sees them; *_bytes say how much workspace it cuts up.
 */
#ifndef PBS_CORE_BACKEND_H
#define PBS_CORE_BACKEND_H

#include "check.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A wave of prefill as its verbs. */
typedef struct pbs_verbs {
    const pbs_score_params *score; /* NULL: nothing is ordered by score */
    int32_t first_head;            /* of score */
    const pbs_permute_params *permute;
    const pbs_select_params *select;
    const pbs_attend_params *attend;
} pbs_verbs;

struct pbs_backend {
    const char *name;
    /* Pointers of a call are a device's: the host looks at sizes and never at what they point to.
     */
    int on_device;
    int (*available)(pbs_isa isa);       /* built in, and this machine can run it */
    const char *(*missing)(pbs_isa isa); /* why it is not; NULL if it is */
    /* Kernels for a call, or an error that names what was asked for. *isa: which ones. */
    pbs_status (*choose)(const pbs_exec *exec, pbs_dtype dtype, const void **kernels, pbs_isa *isa);

    size_t (*score_bytes)(const pbs_score_params *p, const pbs_dims *d, const void *kernels);
    /* first_head: what number head 0 has for the random orders. */
    pbs_status (*score)(const pbs_score_params *p, const pbs_dims *d, const void *kernels,
                        int32_t first_head);

    size_t (*packed_bytes)(const pbs_dims *d, pbs_permute_mode mode, pbs_correction correction,
                           const void *kernels);
    size_t (*permute_bytes)(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);
    pbs_status (*permute)(const pbs_permute_params *p, const pbs_dims *d, const void *kernels);

    size_t (*select_bytes)(const pbs_select_params *p, const pbs_dims *d, const void *kernels);
    pbs_status (*select)(const pbs_select_params *p, const pbs_dims *d, const void *kernels);
    /* NULL: this backend keeps its strips to itself. */
    pbs_status (*score_strip)(const pbs_select_params *p, const pbs_dims *d, const void *kernels,
                              int32_t batch, int32_t head, int32_t row_begin, pbs_strip *strip);

    /* Is p->packed what this call needs? As far as the host can tell. */
    pbs_status (*check_packed)(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);
    size_t (*attend_bytes)(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);
    pbs_status (*attend)(const pbs_attend_params *p, const pbs_dims *d, const void *kernels);

    /* A wave of prefill in one: the same results as verb after verb, bit for bit. NULL: like that.
     */
    pbs_status (*wave)(const pbs_verbs *verbs, const pbs_dims *d, const void *kernels);

    /* Bytes a wave of prefill may use where the caller sets no workspace_cap. */
    size_t (*wave_cap)(const pbs_exec *exec);
    /* perm [heads, len] = 0, 1, ..., len - 1 each. */
    pbs_status (*fill_identity)(const pbs_exec *exec, int32_t *perm, int64_t heads, int32_t len);
};

/* The backend of a call that wants isa: every library has one backend and answers with it. */
const pbs_backend *pbs_backend_for(pbs_isa isa);

/* prefill.c */
size_t pbs_prefill_bytes(const pbs_prefill_params *p, const pbs_dims *d, const void *kernels);
pbs_status pbs_prefill_run(const pbs_prefill_params *p, const pbs_dims *d, const void *kernels);

#ifdef __cplusplus
}
#endif

#endif /* PBS_CORE_BACKEND_H */
