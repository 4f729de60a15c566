/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend's table: each verb on the device of the call, between entering and leaving it.
 */
#include <stdint.h>
#include <stdlib.h>

#include "cuda.h"

/* Kernels for 9.0 beside the portable ones, which run whatever those have no instance for. */
static const pbs_isa SM80 = PBS_ISA_SM80, SM90 = PBS_ISA_SM90;

static int available(pbs_isa isa) { return isa == SM80 || isa == SM90; }

static const char *missing(pbs_isa isa) { return available(isa) ? NULL : "not in this build"; }

/* PBS_ATTN_ISA speaks of the CPU, too: what it names there changes nothing here. */
static pbs_isa wanted(const pbs_exec *exec) {
    const char *name = exec->isa == PBS_ISA_AUTO ? getenv("PBS_ATTN_ISA") : NULL;
    const pbs_isa forced = pbs_isa_from_name(name);
    return name && available(forced) ? forced : exec->isa;
}

/* What is handed on is a pointer to the isa: the drivers know their kernels. */
static pbs_status choose(const pbs_exec *exec, pbs_dtype dtype, const void **kernels,
                         pbs_isa *isa) {
    const int hopper = pbs_cuda_capability(exec->device) == 90;
    const pbs_isa asked = wanted(exec);
    if (asked != PBS_ISA_AUTO && !available(asked))
        return pbs_fail(PBS_ERR_UNSUPPORTED, "exec.isa: %s; CUDA calls run sm80 and sm90",
                        pbs_isa_name(asked));
    if (asked == SM90 && !hopper)
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "isa: sm90; device %d is not of compute capability 9.0", (int)exec->device);
    if (dtype != PBS_DTYPE_FP16 && dtype != PBS_DTYPE_BF16)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "dtype: %d; fp16 (2) and bf16 (3) run on CUDA",
                        (int)dtype);
    *kernels = hopper && asked != SM80 ? &SM90 : &SM80;
    *isa = pbs_cuda_isa(*kernels);
    return PBS_OK;
}

pbs_status pbs_cuda_check_aligned(const char *name, const pbs_view *view) {
    int aligned = (uintptr_t)view->data % 16 == 0;
    for (int i = 0; i < 3; i++)
        aligned &=
            view->size[i] <= 1 || view->stride[i] * (int64_t)pbs_dtype_size(view->dtype) % 16 == 0;
    if (aligned || !view->size[0] || !view->size[1] || !view->size[2]) return PBS_OK;
    return pbs_fail(
        PBS_ERR_UNSUPPORTED,
        "%s: %p with strides %lld, %lld, %lld; rows must start on multiples of 16 bytes", name,
        view->data, (long long)view->stride[0], (long long)view->stride[1],
        (long long)view->stride[2]);
}

/* A verb of a call between entering its device and leaving it. */
#define ON_DEVICE(call)                                                   \
    do {                                                                  \
        int32_t previous;                                                 \
        const char *refusal = pbs_cuda_refuses(p->exec.device);           \
        if (refusal) return pbs_fail(PBS_ERR_UNSUPPORTED, "%s", refusal); \
        PBS_TRY(pbs_cuda_enter(p->exec.device, &previous));               \
        pbs_status status = (call);                                       \
        pbs_cuda_leave(p->exec.device, previous);                         \
        return status;                                                    \
    } while (0)

static pbs_status score(const pbs_score_params *p, const pbs_dims *d, const void *kernels,
                        int32_t first_head) {
    ON_DEVICE(pbs_cuda_score(p, d, kernels, first_head));
}

static pbs_status permute(const pbs_permute_params *p, const pbs_dims *d, const void *kernels) {
    ON_DEVICE(pbs_cuda_permute(p, d, kernels));
}

static pbs_status select(const pbs_select_params *p, const pbs_dims *d, const void *kernels) {
    ON_DEVICE(pbs_cuda_select(p, d, kernels));
}

static pbs_status attend(const pbs_attend_params *p, const pbs_dims *d, const void *kernels) {
    ON_DEVICE(pbs_cuda_attend(p, d, kernels, NULL));
}

/* Fewer launches: score and permute share one, and order need not count what select has counted. */
static pbs_status run_verbs(const pbs_verbs *v, const pbs_dims *d, const void *kernels) {
    if (v->score)
        PBS_TRY(pbs_cuda_score_permute(v->score, v->permute, d, kernels, v->first_head));
    else
        PBS_TRY(pbs_cuda_permute(v->permute, d, kernels));
    PBS_TRY(pbs_cuda_select(v->select, d, kernels));
    return pbs_cuda_attend(v->attend, d, kernels, v->select->count);
}

static pbs_status wave(const pbs_verbs *v, const pbs_dims *d, const void *kernels) {
    const pbs_attend_params *p = v->attend;
    ON_DEVICE(run_verbs(v, d, kernels));
}

static pbs_status fill_identity(const pbs_exec *exec, int32_t *perm, int64_t heads, int32_t len) {
    struct {
        pbs_exec exec;
    } call = {*exec}, *p = &call;
    ON_DEVICE(pbs_cuda_fill_identity(exec, perm, heads, len));
}

/* Room for several K/V heads at 128K, so that a wave fills the device; see docs/cuda.md. */
static size_t wave_cap(const pbs_exec *exec) {
    (void)exec;
    return (size_t)1 << 30;
}

const pbs_backend pbs_cuda_backend = {
    .name = "cuda",
    .on_device = 1,
    .available = available,
    .missing = missing,
    .choose = choose,
    .score_bytes = pbs_cuda_score_bytes,
    .score = score,
    .packed_bytes = pbs_cuda_packed_bytes,
    .permute_bytes = pbs_cuda_permute_bytes,
    .permute = permute,
    .select_bytes = pbs_cuda_select_bytes,
    .select = select,
    .check_packed = pbs_cuda_check_packed,
    .attend_bytes = pbs_cuda_attend_bytes,
    .attend = attend,
    .wave = wave,
    .wave_cap = wave_cap,
    .fill_identity = fill_identity,
};
