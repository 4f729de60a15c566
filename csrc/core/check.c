/* SPDX-License-Identifier: Apache-2.0 */
#include "backend.h"
#include "check_common.h"

#include <stdint.h>

/* Bytes up to the end of a field: what the first release of a struct had. */
#define UP_TO(type, field) (offsetof(type, field) + sizeof(((type *)0)->field))

static int running(pbs_check_mode mode) { return mode == PBS_CHECK_RUN; }

static int empty(const pbs_dims *d) { return d->batch == 0 || d->heads_q == 0; }

pbs_status pbs_check_workspace(const void *workspace, size_t given, size_t needed) {
    if (needed == SIZE_MAX)
        return pbs_fail(PBS_ERR_SHAPE, "workspace: sizes need more bytes than size_t can count");
    if (needed && !workspace)
        return pbs_fail(PBS_ERR_NULL, "workspace: NULL; %zu bytes are needed", needed);
    if (given < needed)
        return pbs_fail(PBS_ERR_WORKSPACE, "workspace_bytes: %zu; %zu are needed", given, needed);
    return PBS_OK;
}

static pbs_status check_same_dtype(const char *name, pbs_dtype given, pbs_dtype q) {
    if (given == q) return PBS_OK;
    return pbs_fail(PBS_ERR_DTYPE, "%s.dtype: %d; q's is %d", name, (int)given, (int)q);
}

/* Mode NONE has no segments: segment_size is then not read. */
static pbs_status check_mode(pbs_permute_mode mode, int32_t block, int32_t *segment, pbs_dims *d) {
    PBS_TRY(pbs_check_enum("mode", (int)mode, 5));
    PBS_TRY(pbs_check_blocks("block_size", block, "block_size", block, d));
    if (mode == PBS_PERMUTE_NONE) *segment = block;
    return pbs_check_segment(*segment, block, d);
}

pbs_status pbs_check_score(const pbs_score_params *params, pbs_check_mode mode, pbs_score_params *p,
                           pbs_dims *d) {
    PBS_TRY(pbs_check_struct(params, UP_TO(pbs_score_params, exec), p, sizeof *p));
    PBS_TRY(pbs_check_enum("order", (int)p->order, 4));
    int reads = running(mode) && p->order != PBS_ORDER_RANDOM;
    PBS_TRY(pbs_check_view("q", &p->q, reads));
    PBS_TRY(pbs_check_kv("k", &p->k, reads));
    PBS_TRY(pbs_check_dims(&p->q, &p->k.view, p->gqa, &p->geometry, &p->exec, d));
    PBS_TRY(check_same_dtype("k", p->k.view.dtype, p->q.dtype));
    PBS_TRY(pbs_check_scale(&p->softmax_scale, d->head_dim));
    PBS_TRY(pbs_check_blocks("block_size", p->block_size, "block_size", p->block_size, d));
    PBS_TRY(pbs_check_segment(p->segment_size, p->block_size, d));
    PBS_TRY(pbs_check_exec(&p->exec, d));
    if (running(mode)) PBS_TRY(pbs_check_pointer("score", p->score, empty(d) ? 0 : d->max_k));
    return PBS_OK;
}

static pbs_status check_permute_pointers(const pbs_permute_params *p, const pbs_dims *d) {
    int64_t keys = empty(d) ? 0 : d->max_k;
    if (pbs_permutes_keys(p->mode) && !p->k_perm_in)
        PBS_TRY(pbs_check_pointer("score", p->score, keys));
    if (pbs_permutes_queries(p->mode))
        PBS_TRY(pbs_check_pointer("q_perm", p->q_perm, empty(d) ? 0 : d->max_q));
    if (p->packed && (uintptr_t)p->packed % 64)
        return pbs_fail(PBS_ERR_VALUE, "packed: %p; 64-byte alignment is needed", p->packed);
    return PBS_OK;
}

static pbs_status check_given_order(pbs_permute_mode mode, const int32_t *k_perm_in,
                                    const int32_t *permute_heads, const pbs_dims *d) {
    if (!k_perm_in) return PBS_OK;
    if (!pbs_permutes_keys(mode))
        return pbs_fail(PBS_ERR_VALUE,
                        "k_perm_in: given, but mode is %d; only KEYS (2) and BOTH (4) permute keys",
                        (int)mode);
    return pbs_check_key_perm("k_perm_in", k_perm_in, permute_heads, d);
}

pbs_status pbs_check_permute(const pbs_permute_params *params, pbs_check_mode mode,
                             pbs_permute_params *p, pbs_dims *d) {
    PBS_TRY(pbs_check_struct(params, UP_TO(pbs_permute_params, exec), p, sizeof *p));
    PBS_TRY(pbs_check_enum("mode", (int)p->mode, 5));
    PBS_TRY(pbs_check_enum("correction", (int)p->correction, 2));
    int reads_q = pbs_permutes_queries(p->mode);
    int reads_v = p->packed || p->v_pool;
    if (!reads_q && !p->q.data) { /* sizes only */
        p->q.dtype = p->k.view.dtype;
        p->q.stride[3] = 1;
    }
    if (!reads_v && !p->v.view.data) p->v = p->k;
    PBS_TRY(pbs_check_view("q", &p->q, running(mode) && reads_q));
    PBS_TRY(pbs_check_kv("k", &p->k, running(mode)));
    PBS_TRY(pbs_check_dims(&p->q, &p->k.view, p->gqa, &p->geometry, &p->exec, d));
    PBS_TRY(check_same_dtype("k", p->k.view.dtype, p->q.dtype));
    PBS_TRY(pbs_check_kv("v", &p->v, running(mode) && reads_v));
    PBS_TRY(pbs_check_values(&p->k.view, &p->v.view, running(mode) && reads_v));
    PBS_TRY(check_mode(p->mode, p->block_size, &p->segment_size, d));
    PBS_TRY(pbs_check_exec(&p->exec, d));
    if (!running(mode)) return PBS_OK;
    PBS_TRY(check_permute_pointers(p, d));
    return check_given_order(p->mode, p->k_perm_in, p->permute_heads, d);
}

static pbs_status check_normalize(pbs_normalize normalize, pbs_select_method method,
                                  pbs_permute_mode mode) {
    PBS_TRY(pbs_check_enum("normalize", (int)normalize, 2));
    if (normalize == PBS_NORMALIZE_HISTORY || mode == PBS_PERMUTE_NONE) return PBS_OK;
    if (method != PBS_SELECT_ANTIDIAGONAL)
        return pbs_fail(PBS_ERR_VALUE,
                        "normalize: ROW (1), but method is %d; ANTIDIAGONAL (1) or mode NONE (0) "
                        "is needed",
                        (int)method);
    if (pbs_permutes_queries(mode))
        return pbs_fail(PBS_ERR_VALUE,
                        "normalize: ROW (1), but mode is %d; a group of permuted queries has no "
                        "diagonal, NONE, IDENTITY or KEYS is needed",
                        (int)mode);
    return PBS_OK;
}

static pbs_status check_method(pbs_select_method method, int32_t stride, pbs_reduce reduce,
                               pbs_rule rule, int32_t block_size) {
    PBS_TRY(pbs_check_enum("method", (int)method, 2));
    PBS_TRY(pbs_check_enum("reduce", (int)reduce, 2));
    PBS_TRY(pbs_check_enum("rule", (int)rule, 4));
    if (method == PBS_SELECT_ANTIDIAGONAL && (stride < 1 || block_size % stride))
        return pbs_fail(PBS_ERR_VALUE, "stride: %d; a divisor of block_size (%d) is needed", stride,
                        block_size);
    return PBS_OK;
}

pbs_status pbs_check_select(const pbs_select_params *params, pbs_check_mode mode,
                            pbs_select_params *p, pbs_dims *d) {
    PBS_TRY(pbs_check_struct(params, UP_TO(pbs_select_params, exec), p, sizeof *p));
    int reads_k = p->method == PBS_SELECT_ANTIDIAGONAL;
    if (!reads_k && !p->k.view.data) { /* sizes only */
        p->k.view.dtype = p->q.dtype;
        p->k.view.stride[3] = 1;
    }
    PBS_TRY(pbs_check_view("q", &p->q, running(mode)));
    PBS_TRY(pbs_check_kv("k", &p->k, running(mode) && reads_k));
    PBS_TRY(pbs_check_dims(&p->q, &p->k.view, p->gqa, &p->geometry, &p->exec, d));
    PBS_TRY(check_same_dtype("k", p->k.view.dtype, p->q.dtype));
    PBS_TRY(pbs_check_scale(&p->softmax_scale, d->head_dim));
    PBS_TRY(check_mode(p->mode, p->block_size, &p->segment_size, d));
    PBS_TRY(check_method(p->method, p->stride, p->reduce, p->rule, p->block_size));
    PBS_TRY(check_normalize(p->normalize, p->method, p->mode));
    PBS_TRY(pbs_check_tau(p->tau, p->tau_heads, d));
    PBS_TRY(pbs_check_exec(&p->exec, d));
    if (!running(mode)) return PBS_OK;
    if (!reads_k) PBS_TRY(pbs_check_pointer("k_pool", p->k_pool, empty(d) ? 0 : d->max_k));
    PBS_TRY(pbs_check_key_perm("k_perm", p->k_perm, NULL, d));
    return pbs_check_query_perm("q_perm", p->q_perm, d);
}

/* Read and written by the host alone. */
static pbs_status check_counters(const pbs_work_counters *counters, const pbs_dims *d) {
    if (!counters) return PBS_OK;
    if (d->backend->on_device)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "counters: given; the backend \"%s\" keeps none",
                        d->backend->name);
    if ((uintptr_t)counters % _Alignof(pbs_work_counters))
        return pbs_fail(PBS_ERR_VALUE, "counters: %p; 8-byte alignment is needed",
                        (const void *)counters);
    return PBS_OK;
}

static pbs_status check_attend_blocks(const pbs_attend_params *p, pbs_dims *d) {
    PBS_TRY(pbs_check_enum("own", (int)p->own, 5));
    PBS_TRY(pbs_check_enum("correction", (int)p->correction, 2));
    if (p->correction && p->own == PBS_OWN_ALL)
        return pbs_fail(PBS_ERR_VALUE,
                        "correction: %d, but own is ALL (4), which leaves nothing "
                        "out; NONE (0) is needed",
                        (int)p->correction);
    PBS_TRY(pbs_check_blocks("block_q", p->block_q, "block_k", p->block_k, d));
    int free_blocks = p->own == PBS_OWN_MASK || p->own == PBS_OWN_ALL;
    if (!free_blocks && p->block_q != p->block_k)
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "block_k: %d; must equal block_q (%d) unless own is MASK or ALL",
                        p->block_k, p->block_q);
    int segments = p->own == PBS_OWN_SEGMENT || p->own == PBS_OWN_NONE;
    if (p->q_perm && (p->own == PBS_OWN_BLOCK || p->own == PBS_OWN_MASK))
        return pbs_fail(PBS_ERR_VALUE,
                        "q_perm: given, but own is %d; only SEGMENT, NONE and ALL permute queries",
                        (int)p->own);
    if (segments || p->q_perm) PBS_TRY(pbs_check_segment(p->segment_size, p->block_k, d));
    return PBS_OK;
}

pbs_status pbs_check_attend(const pbs_attend_params *params, pbs_check_mode mode,
                            pbs_attend_params *p, pbs_dims *d) {
    PBS_TRY(pbs_check_struct(params, UP_TO(pbs_attend_params, exec), p, sizeof *p));
    PBS_TRY(pbs_check_view("q", &p->q, running(mode)));
    PBS_TRY(pbs_check_kv("k", &p->k, running(mode)));
    PBS_TRY(pbs_check_dims(&p->q, &p->k.view, p->gqa, &p->geometry, &p->exec, d));
    PBS_TRY(check_same_dtype("k", p->k.view.dtype, p->q.dtype));
    PBS_TRY(pbs_check_kv("v", &p->v, running(mode)));
    PBS_TRY(pbs_check_values(&p->k.view, &p->v.view, running(mode)));
    PBS_TRY(pbs_check_scale(&p->softmax_scale, d->head_dim));
    PBS_TRY(check_attend_blocks(p, d));
    if (p->heads_sel == 0) p->heads_sel = d->heads_q;
    if (p->heads_sel != d->heads_q && p->heads_sel != d->heads_k)
        return pbs_fail(PBS_ERR_SHAPE, "heads_sel: %d; q's heads (%d) or k's (%d) are allowed",
                        p->heads_sel, d->heads_q, d->heads_k);
    PBS_TRY(pbs_check_exec(&p->exec, d));
    PBS_TRY(check_counters(p->counters, d));
    if (!running(mode)) return PBS_OK;
    if (p->own != PBS_OWN_ALL)
        PBS_TRY(
            pbs_check_pointer("bits", p->bits, empty(d) || !d->blocks_q ? 0 : (int64_t)d->words));
    PBS_TRY(pbs_check_output("out", &p->out, d, d->head_dim, p->q.dtype));
    if (p->lse.data) PBS_TRY(pbs_check_output("lse", &p->lse, d, 1, PBS_DTYPE_FP32));
    return pbs_check_query_perm("q_perm", p->q_perm, d);
}

pbs_status pbs_check_prefill(const pbs_prefill_params *params, pbs_check_mode mode,
                             pbs_prefill_params *p, pbs_dims *d) {
    PBS_TRY(pbs_check_struct(params, UP_TO(pbs_prefill_params, exec), p, sizeof *p));
    PBS_TRY(pbs_check_view("q", &p->q, running(mode)));
    PBS_TRY(pbs_check_kv("k", &p->k, running(mode)));
    PBS_TRY(pbs_check_dims(&p->q, &p->k.view, p->gqa, &p->geometry, &p->exec, d));
    PBS_TRY(check_same_dtype("k", p->k.view.dtype, p->q.dtype));
    PBS_TRY(pbs_check_kv("v", &p->v, running(mode)));
    PBS_TRY(pbs_check_values(&p->k.view, &p->v.view, running(mode)));
    PBS_TRY(pbs_check_scale(&p->softmax_scale, d->head_dim));
    PBS_TRY(check_mode(p->mode, p->block_size, &p->segment_size, d));
    PBS_TRY(pbs_check_enum("order", (int)p->order, 4));
    PBS_TRY(check_method(p->method, p->stride, p->reduce, p->rule, p->block_size));
    PBS_TRY(check_normalize(p->normalize, p->method, p->mode));
    PBS_TRY(pbs_check_enum("correction", (int)p->correction, 2));
    PBS_TRY(pbs_check_tau(p->tau, p->tau_heads, d));
    PBS_TRY(pbs_check_exec(&p->exec, d));
    PBS_TRY(check_counters(p->counters, d));
    if (!running(mode)) return PBS_OK;
    PBS_TRY(pbs_check_output("out", &p->out, d, d->head_dim, p->q.dtype));
    if (p->lse.data) PBS_TRY(pbs_check_output("lse", &p->lse, d, 1, PBS_DTYPE_FP32));
    return check_given_order(p->mode, p->k_perm_in, p->permute_heads, d);
}
