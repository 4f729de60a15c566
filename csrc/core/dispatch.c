/* SPDX-License-Identifier: Apache-2.0
 *
 * The entry points: check everything, find the kernels, then run. Nothing is written before the
 * last check has passed.
 */
#include "backend.h"

/* Rows, heads or sequences that do not exist: a legal call with nothing to do. */
static int has_heads(const pbs_dims *d) { return d->batch > 0 && d->heads_q > 0; }

static pbs_status answer(size_t needed, size_t *bytes) {
    if (needed == SIZE_MAX) return pbs_check_workspace(NULL, 0, needed);
    *bytes = needed;
    return PBS_OK;
}

static pbs_status choose(const pbs_exec *exec, const pbs_dims *d, const void **kernels) {
    pbs_isa isa;
    return d->backend->choose(exec, d->dtype, kernels, &isa);
}

static pbs_status check_answer(const size_t *bytes) {
    return bytes ? PBS_OK : pbs_fail(PBS_ERR_NULL, "bytes: NULL; a pointer is needed");
}

pbs_status pbs_score_workspace_size(const pbs_score_params *params, size_t *bytes) {
    pbs_score_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_score(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(d.backend->score_bytes(&p, &d, k), bytes);
}

pbs_status pbs_score(const pbs_score_params *params) {
    pbs_score_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_score(params, PBS_CHECK_RUN, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(pbs_check_workspace(p.workspace, p.workspace_bytes, d.backend->score_bytes(&p, &d, k)));
    return has_heads(&d) ? d.backend->score(&p, &d, k, 0) : PBS_OK;
}

pbs_status pbs_permute_workspace_size(const pbs_permute_params *params, size_t *bytes) {
    pbs_permute_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_permute(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(d.backend->permute_bytes(&p, &d, k), bytes);
}

pbs_status pbs_kv_packed_bytes(const pbs_permute_params *params, size_t *bytes) {
    pbs_permute_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_permute(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(d.backend->packed_bytes(&d, p.mode, p.correction, k), bytes);
}

pbs_status pbs_permute(const pbs_permute_params *params) {
    pbs_permute_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_permute(params, PBS_CHECK_RUN, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(
        pbs_check_workspace(p.workspace, p.workspace_bytes, d.backend->permute_bytes(&p, &d, k)));
    size_t packed = d.backend->packed_bytes(&d, p.mode, p.correction, k);
    if (p.packed && p.packed_bytes < packed)
        return pbs_fail(PBS_ERR_WORKSPACE, "packed_bytes: %zu; %zu are needed", p.packed_bytes,
                        packed);
    return has_heads(&d) ? d.backend->permute(&p, &d, k) : PBS_OK;
}

pbs_status pbs_select_workspace_size(const pbs_select_params *params, size_t *bytes) {
    pbs_select_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_select(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(d.backend->select_bytes(&p, &d, k), bytes);
}

pbs_status pbs_select(const pbs_select_params *params) {
    pbs_select_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_select(params, PBS_CHECK_RUN, &p, &d));
    if (has_heads(&d) && d.blocks_q > 0) {
        if (d.words && !p.bits) return pbs_fail(PBS_ERR_NULL, "bits: NULL; a pointer is needed");
        if (!p.count) return pbs_fail(PBS_ERR_NULL, "count: NULL; a pointer is needed");
    }
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(
        pbs_check_workspace(p.workspace, p.workspace_bytes, d.backend->select_bytes(&p, &d, k)));
    return has_heads(&d) ? d.backend->select(&p, &d, k) : PBS_OK;
}

static pbs_status check_range(const char *name, int32_t first, int32_t count, int32_t end) {
    if (first >= 0 && count >= 0 && first <= end - count) return PBS_OK;
    return pbs_fail(PBS_ERR_SHAPE, "%s: [%d, %lld); inside [0, %d) is needed", name, first,
                    (long long)first + count, end);
}

pbs_status pbs_score_strip(const pbs_select_params *params, int32_t batch, int32_t head,
                           int32_t row_begin, pbs_strip *strip) {
    pbs_select_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_select(params, PBS_CHECK_RUN, &p, &d));
    if (!d.backend->score_strip)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "strip: the backend \"%s\" gives none away",
                        d.backend->name);
    if (!strip) return pbs_fail(PBS_ERR_NULL, "strip: NULL; a pointer is needed");
    PBS_TRY(check_range("batch", batch, 1, d.batch));
    PBS_TRY(check_range("head", head, 1, d.heads_q));
    PBS_TRY(check_range("row_begin", row_begin, strip->rows, d.blocks_q));
    if (strip->cols != d.blocks_k)
        return pbs_fail(PBS_ERR_SHAPE, "strip.cols: %d; %d is needed", strip->cols, d.blocks_k);
    if (strip->log_mass_stride < d.blocks_k || strip->eligible_stride < d.words)
        return pbs_fail(PBS_ERR_STRIDE,
                        "strip: strides %lld and %lld; at least %d and %d are needed",
                        (long long)strip->log_mass_stride, (long long)strip->eligible_stride,
                        d.blocks_k, d.words);
    if (d.words && strip->rows && (!strip->log_mass || !strip->eligible))
        return pbs_fail(PBS_ERR_NULL, "strip: NULL log_mass or eligible; pointers are needed");
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(
        pbs_check_workspace(p.workspace, p.workspace_bytes, d.backend->select_bytes(&p, &d, k)));
    return d.backend->score_strip(&p, &d, k, batch, head, row_begin, strip);
}

pbs_status pbs_attend_workspace_size(const pbs_attend_params *params, size_t *bytes) {
    pbs_attend_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_attend(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(d.backend->attend_bytes(&p, &d, k), bytes);
}

pbs_status pbs_attend(const pbs_attend_params *params) {
    pbs_attend_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_attend(params, PBS_CHECK_RUN, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(d.backend->check_packed(&p, &d, k));
    PBS_TRY(
        pbs_check_workspace(p.workspace, p.workspace_bytes, d.backend->attend_bytes(&p, &d, k)));
    return has_heads(&d) ? d.backend->attend(&p, &d, k) : PBS_OK;
}

pbs_status pbs_prefill_workspace_size(const pbs_prefill_params *params, size_t *bytes) {
    pbs_prefill_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(check_answer(bytes));
    PBS_TRY(pbs_check_prefill(params, PBS_CHECK_SIZING, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    return answer(pbs_prefill_bytes(&p, &d, k), bytes);
}

pbs_status pbs_prefill(const pbs_prefill_params *params) {
    pbs_prefill_params p;
    pbs_dims d;
    const void *k;
    PBS_TRY(pbs_check_prefill(params, PBS_CHECK_RUN, &p, &d));
    PBS_TRY(choose(&p.exec, &d, &k));
    PBS_TRY(pbs_check_workspace(p.workspace, p.workspace_bytes, pbs_prefill_bytes(&p, &d, k)));
    return has_heads(&d) ? pbs_prefill_run(&p, &d, k) : PBS_OK;
}
