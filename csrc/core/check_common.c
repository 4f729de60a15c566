/* SPDX-License-Identifier: Apache-2.0 */
#include "check_common.h"

#include "backend.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

/* Lengths above this could overflow int32 when rounded up to a block or a segment. */
enum { MAX_SEQLEN = INT32_MAX - 2 * PBS_MAX_SEGMENT_SIZE };

pbs_status pbs_check_struct(const void *given, size_t released_size, void *full, size_t full_size) {
    if (!given) return pbs_fail(PBS_ERR_NULL, "params: NULL; a params struct is needed");
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size < released_size)
        return pbs_fail(PBS_ERR_STRUCT_SIZE,
                        "struct_size: %zu; at least %zu (sizeof the params struct) is needed", size,
                        released_size);
    memset(full, 0, full_size);
    memcpy(full, given, size < full_size ? size : full_size);
    return PBS_OK;
}

static int64_t view_elements(const pbs_view *v) {
    int empty = !v->size[0] || !v->size[1] || !v->size[2] || !v->size[3];
    return empty ? 0 : 1; /* only emptiness matters; a product could overflow */
}

pbs_status pbs_check_pointer(const char *name, const void *pointer, int64_t elements) {
    if (pointer || elements == 0) return PBS_OK;
    return pbs_fail(PBS_ERR_NULL, "%s: NULL; a pointer is needed", name);
}

pbs_status pbs_check_view(const char *name, const pbs_view *v, int data_needed) {
    for (int i = 0; i < 4; i++)
        if (v->size[i] < 0 || v->size[i] > MAX_SEQLEN)
            return pbs_fail(PBS_ERR_SHAPE, "%s.size[%d]: %" PRId32 "; 0..%d is allowed", name, i,
                            v->size[i], MAX_SEQLEN);
    if (v->dtype < PBS_DTYPE_FP32 || v->dtype > PBS_DTYPE_BF16)
        return pbs_fail(PBS_ERR_DTYPE, "%s.dtype: %d; fp32 (1), fp16 (2) and bf16 (3) are allowed",
                        name, (int)v->dtype);
    if (view_elements(v) == 0) return PBS_OK;
    for (int i = 0; i < 3; i++)
        if (v->stride[i] < 0)
            return pbs_fail(PBS_ERR_STRIDE, "%s.stride[%d]: %" PRId64 "; 0 or more is allowed",
                            name, i, v->stride[i]);
    if (v->stride[3] != 1 && v->size[3] > 1)
        return pbs_fail(PBS_ERR_STRIDE,
                        "%s.stride[3]: %" PRId64 "; the last dimension must be contiguous (1)",
                        name, v->stride[3]);
    if (data_needed) PBS_TRY(pbs_check_pointer(name, v->data, 1));
    return PBS_OK;
}

pbs_status pbs_check_kv(const char *name, const pbs_kv *kv, int data_needed) {
    if (kv->block_table)
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "%s.block_table: not NULL; paged caches are not supported", name);
    return pbs_check_view(name, &kv->view, data_needed);
}

static pbs_status check_lengths(const char *start_name, const char *len_name, const int32_t *start,
                                const int32_t *len, int32_t b, int32_t size, int32_t max) {
    int32_t s = start ? start[b] : 0;
    int32_t n = len ? len[b] : size - s;
    if (s < 0 || s > size)
        return pbs_fail(PBS_ERR_VALUE, "%s[%d]: %" PRId32 "; 0..%" PRId32 " is allowed", start_name,
                        b, s, size);
    if (n < 0 || n > size - s)
        return pbs_fail(PBS_ERR_VALUE,
                        "%s[%d]: %" PRId32 "; 0..%" PRId32 " is allowed (%s is %" PRId32
                        " of %" PRId32 ")",
                        len_name, b, n, size - s, start_name, s, size);
    if (n > max)
        return pbs_fail(PBS_ERR_VALUE, "%s[%d]: %" PRId32 "; at most max_seqlen (%" PRId32 ")",
                        len_name, b, n, max);
    return PBS_OK;
}

static pbs_status check_geometry(const pbs_geometry *g, pbs_dims *d) {
    if (g->max_seqlen_q < 0 || g->max_seqlen_q > MAX_SEQLEN)
        return pbs_fail(PBS_ERR_VALUE, "max_seqlen_q: %" PRId32 "; 0..%d is allowed",
                        g->max_seqlen_q, MAX_SEQLEN);
    if (g->max_seqlen_k < 0 || g->max_seqlen_k > MAX_SEQLEN)
        return pbs_fail(PBS_ERR_VALUE, "max_seqlen_k: %" PRId32 "; 0..%d is allowed",
                        g->max_seqlen_k, MAX_SEQLEN);
    d->geometry = *g;
    d->max_q = g->max_seqlen_q ? g->max_seqlen_q : d->seqlen_q;
    d->max_k = g->max_seqlen_k ? g->max_seqlen_k : d->seqlen_k;
    if (d->backend->on_device) { /* kernels clamp what they find */
        if (!g->q_start && !g->q_len)
            PBS_TRY(check_lengths("q_start", "q_len", NULL, NULL, 0, d->seqlen_q, d->max_q));
        if (!g->kv_start && !g->kv_len)
            PBS_TRY(check_lengths("kv_start", "kv_len", NULL, NULL, 0, d->seqlen_k, d->max_k));
        return PBS_OK;
    }
    for (int32_t b = 0; b < d->batch; b++) {
        PBS_TRY(check_lengths("q_start", "q_len", g->q_start, g->q_len, b, d->seqlen_q, d->max_q));
        PBS_TRY(
            check_lengths("kv_start", "kv_len", g->kv_start, g->kv_len, b, d->seqlen_k, d->max_k));
    }
    return PBS_OK;
}

pbs_status pbs_check_dims(const pbs_view *q, const pbs_view *k, pbs_gqa gqa,
                          const pbs_geometry *geometry, const pbs_exec *exec, pbs_dims *d) {
    memset(d, 0, sizeof *d);
    d->backend = pbs_backend_for(exec->isa);
    PBS_TRY(pbs_check_enum("gqa", (int)gqa, 2));
    if (q->size[0] != k->size[0])
        return pbs_fail(PBS_ERR_SHAPE, "k.size[0]: %" PRId32 "; q's batch is %" PRId32, k->size[0],
                        q->size[0]);
    if (q->size[3] != k->size[3])
        return pbs_fail(PBS_ERR_SHAPE, "k.size[3]: %" PRId32 "; q's head_dim is %" PRId32,
                        k->size[3], q->size[3]);
    int32_t hq = q->size[1], hk = k->size[1], dim = q->size[3];
    if (hk ? hq % hk != 0 : hq != 0)
        return pbs_fail(PBS_ERR_SHAPE,
                        "q.size[1]: %" PRId32 "; a multiple of k's %" PRId32 " heads is needed", hq,
                        hk);
    if (dim < 8 || dim > PBS_MAX_HEAD_DIM || dim % 8)
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "head_dim: %" PRId32 "; multiples of 8 from 8 to %d are supported", dim,
                        PBS_MAX_HEAD_DIM);
    d->batch = q->size[0];
    d->heads_q = hq;
    d->heads_k = hk;
    d->heads_p = gqa == PBS_GQA_GROUP ? hk : hq;
    d->group = hk ? hq / hk : 1;
    d->seqlen_q = q->size[2];
    d->seqlen_k = k->size[2];
    d->head_dim = dim;
    d->dtype = k->dtype;
    return check_geometry(geometry, d);
}

pbs_status pbs_check_values(const pbs_view *k, const pbs_view *v, int data_needed) {
    PBS_TRY(pbs_check_view("v", v, data_needed));
    for (int i = 0; i < 3; i++)
        if (v->size[i] != k->size[i])
            return pbs_fail(PBS_ERR_SHAPE, "v.size[%d]: %" PRId32 "; k's is %" PRId32, i,
                            v->size[i], k->size[i]);
    if (v->size[3] != k->size[3])
        return pbs_fail(PBS_ERR_UNSUPPORTED,
                        "v.size[3]: %" PRId32 "; only k's head_dim (%" PRId32 ") is supported",
                        v->size[3], k->size[3]);
    if (v->dtype != k->dtype)
        return pbs_fail(PBS_ERR_DTYPE, "v.dtype: %d; k's is %d", (int)v->dtype, (int)k->dtype);
    return PBS_OK;
}

static pbs_status check_block(const char *name, int32_t block) {
    if (block == 64 || block == 128 || block == 256) return PBS_OK;
    return pbs_fail(block > 0 ? PBS_ERR_UNSUPPORTED : PBS_ERR_VALUE,
                    "%s: %" PRId32 "; 64, 128 and 256 are supported", name, block);
}

pbs_status pbs_check_blocks(const char *name_q, int32_t block_q, const char *name_k,
                            int32_t block_k, pbs_dims *d) {
    PBS_TRY(check_block(name_q, block_q));
    PBS_TRY(check_block(name_k, block_k));
    d->block_q = block_q;
    d->block_k = block_k;
    d->segment_size = block_k;
    d->blocks_q = pbs_ceil_div(d->max_q, block_q);
    d->blocks_k = pbs_ceil_div(d->max_k, block_k);
    d->words = pbs_ceil_div(d->blocks_k, 32);
    return PBS_OK;
}

pbs_status pbs_check_segment(int32_t segment_size, int32_t block_size, pbs_dims *d) {
    if (segment_size <= 0 || segment_size > PBS_MAX_SEGMENT_SIZE || segment_size % block_size)
        return pbs_fail(segment_size > 0 ? PBS_ERR_UNSUPPORTED : PBS_ERR_VALUE,
                        "segment_size: %" PRId32 "; multiples of block_size (%" PRId32
                        ") up to %d are supported",
                        segment_size, block_size, PBS_MAX_SEGMENT_SIZE);
    d->segment_size = segment_size;
    return PBS_OK;
}

pbs_status pbs_check_enum(const char *name, int value, int count) {
    if (value >= 0 && value < count) return PBS_OK;
    return pbs_fail(PBS_ERR_VALUE, "%s: %d; 0..%d is allowed", name, value, count - 1);
}

/* x, positive, rounded to nearest whatever rounding mode the caller has set: that can move x by its
 * last bit only. */
static float nearest_float(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x0fffffff + (bits >> 29 & 1)) & ~UINT64_C(0x1fffffff);
    memcpy(&x, &bits, sizeof x);
    return (float)x;
}

pbs_status pbs_check_scale(float *softmax_scale, int32_t head_dim) {
    if (*softmax_scale == 0.0f)
        *softmax_scale = nearest_float(1.0 / (double)nearest_float(sqrt((double)head_dim)));
    if (isfinite(*softmax_scale) && *softmax_scale > 0.0f) return PBS_OK;
    return pbs_fail(PBS_ERR_VALUE,
                    "softmax_scale: %g; a positive finite number, or 0 for head_dim^-0.5",
                    (double)*softmax_scale);
}

pbs_status pbs_check_tau(float tau, const float *tau_heads, const pbs_dims *d) {
    if (!tau_heads && !isfinite(tau))
        return pbs_fail(PBS_ERR_VALUE, "tau: %g; a finite number is needed", (double)tau);
    if (!tau_heads || d->backend->on_device) return PBS_OK; /* there, a NaN keeps every block */
    for (int32_t h = 0; h < d->heads_q; h++)
        if (!isfinite(tau_heads[h]))
            return pbs_fail(PBS_ERR_VALUE, "tau_heads[%d]: %g; a finite number is needed", h,
                            (double)tau_heads[h]);
    return PBS_OK;
}

pbs_status pbs_check_exec(pbs_exec *exec, const pbs_dims *d) {
    if (exec->num_threads < 0)
        return pbs_fail(PBS_ERR_VALUE, "exec.num_threads: %" PRId32 "; 0 or more is allowed",
                        exec->num_threads);
    if (exec->num_threads == 0) exec->num_threads = 1;
    PBS_TRY(pbs_check_enum("exec.isa", (int)exec->isa, PBS_ISA_COUNT));
    if (exec->stream && !d->backend->on_device)
        return pbs_fail(PBS_ERR_UNSUPPORTED, "exec.stream: not NULL; this library runs on CPUs");
    return PBS_OK;
}

/* Needs positive strides; dims of size 1 do not count. */
static int overlaps_itself(const pbs_view *v) {
    int64_t size[3], stride[3];
    int n = 0;
    for (int i = 0; i < 3; i++) {
        if (v->size[i] <= 1) continue;
        int at = n++;
        for (; at > 0 && stride[at - 1] > v->stride[i]; at--) { /* insertion sort by stride */
            size[at] = size[at - 1];
            stride[at] = stride[at - 1];
        }
        size[at] = v->size[i];
        stride[at] = v->stride[i];
    }
    int64_t extent = v->size[3];
    for (int i = 0; i < n; i++) {
        if (stride[i] < extent) return 1;
        extent = (size[i] - 1) * stride[i] + extent;
    }
    return 0;
}

/* Packed varlen: batch stride 0, so the rows of the sequences must be disjoint. */
static pbs_status check_disjoint(const char *name, const pbs_dims *d) {
    if (d->backend->on_device) return PBS_OK;
    for (int32_t b = 1; b < d->batch; b++) {
        pbs_seq s = pbs_dims_seq(d, b), before = pbs_dims_seq(d, b - 1);
        if (s.q_start < before.q_start + before.q_len)
            return pbs_fail(PBS_ERR_STRIDE,
                            "%s.stride[0]: 0; sequences %d and %d of q_start, q_len must then be "
                            "ascending and disjoint",
                            name, b - 1, b);
    }
    return PBS_OK;
}

pbs_status pbs_check_output(const char *name, const pbs_view *v, const pbs_dims *d, int32_t last,
                            pbs_dtype dtype) {
    const int32_t expected[4] = {d->batch, d->heads_q, d->seqlen_q, last};
    PBS_TRY(pbs_check_view(name, v, 1));
    for (int i = 0; i < 4; i++)
        if (v->size[i] != expected[i])
            return pbs_fail(PBS_ERR_SHAPE, "%s.size[%d]: %" PRId32 "; %" PRId32 " is needed", name,
                            i, v->size[i], expected[i]);
    if (v->dtype != dtype)
        return pbs_fail(PBS_ERR_DTYPE, "%s.dtype: %d; %d is needed", name, (int)v->dtype,
                        (int)dtype);
    if (view_elements(v) == 0) return PBS_OK;
    pbs_view one = *v;
    if (d->batch > 1 && v->stride[0] == 0) {
        PBS_TRY(check_disjoint(name, d));
        one.size[0] = 1;
    }
    if (overlaps_itself(&one))
        return pbs_fail(PBS_ERR_STRIDE,
                        "%s.stride: %" PRId64 ", %" PRId64 ", %" PRId64
                        "; an output may not overlap itself",
                        name, v->stride[0], v->stride[1], v->stride[2]);
    return PBS_OK;
}

/* One head of one sequence; 0 if good, else 1 + the first bad position. */
static int32_t bad_position(const int32_t *perm, int32_t len, int32_t segment_size) {
    uint32_t seen[PBS_MAX_SEGMENT_SIZE / 32];
    int32_t complete = pbs_complete_keys(len, segment_size);
    for (int32_t first = 0; first < complete; first += segment_size) {
        memset(seen, 0, sizeof seen);
        for (int32_t i = first; i < first + segment_size; i++) {
            int64_t at = (int64_t)perm[i] - first;
            if (at < 0 || at >= segment_size || (seen[at / 32] >> (at % 32) & 1)) return i + 1;
            seen[at / 32] |= UINT32_C(1) << (at % 32);
        }
    }
    for (int32_t i = complete; i < len; i++)
        if (perm[i] != i) return i + 1;
    return 0;
}

static pbs_status check_perm(const char *name, const int32_t *perm, const int32_t *on_heads,
                             int32_t heads, int32_t max_len, int of_keys, const pbs_dims *d) {
    for (int32_t b = 0; b < d->batch; b++) {
        pbs_seq s = pbs_dims_seq(d, b);
        for (int32_t h = 0; h < heads; h++) {
            if (on_heads && !on_heads[h]) continue;
            const int32_t *row = perm + ((int64_t)b * heads + h) * max_len;
            int32_t bad = bad_position(row, of_keys ? s.kv_len : s.q_len, d->segment_size);
            if (bad)
                return pbs_fail(PBS_ERR_VALUE,
                                "%s[%d, %d, %d]: %" PRId32 "; a permutation inside each complete "
                                "segment of %" PRId32 " and the identity behind them is needed",
                                name, b, h, bad - 1, row[bad - 1], d->segment_size);
        }
    }
    return PBS_OK;
}

pbs_status pbs_check_key_perm(const char *name, const int32_t *perm, const int32_t *on_heads,
                              const pbs_dims *d) {
    if (!perm || d->backend->on_device) return PBS_OK;
    return check_perm(name, perm, on_heads, d->heads_p, d->max_k, 1, d);
}

pbs_status pbs_check_query_perm(const char *name, const int32_t *perm, const pbs_dims *d) {
    if (!perm || d->backend->on_device) return PBS_OK;
    return check_perm(name, perm, NULL, d->heads_q, d->max_q, 0, d);
}
