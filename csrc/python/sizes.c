/* SPDX-License-Identifier: Apache-2.0
 *
 * How much memory a call of some sizes needs, asked without tensors.
 */
#include "module.h"

/* Contiguous [batch, heads, seqlen, head_dim]. The memory behind it is never read: a size query
 * looks at shapes alone. */
static pbs_view shape_only(pbs_dtype dtype, int batch, int heads, int seqlen, int head_dim) {
    static char nothing[64];
    pbs_view view = {.data = nothing, .dtype = dtype, .size = {batch, heads, seqlen, head_dim}};
    view.stride[3] = 1;
    view.stride[2] = head_dim;
    view.stride[1] = view.stride[2] * seqlen;
    view.stride[0] = view.stride[1] * heads;
    return view;
}

const char pbs_python_prefill_workspace_size_doc[] = PyDoc_STR(

    "prefill_workspace_size(batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, "
    "dtype, num_threads, block_size, segment_size, gqa, mode, order, method, stride, "
    "reduce=0, rule=0, isa=0, workspace_cap=0, correction=0, normalize=0) -> int\n\n"
    "Bytes that a prefill of these sizes needs; enums as in pbs.h.");

PyObject *pbs_python_prefill_workspace_size(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    static char *names[] = {
        "batch",     "num_heads", "num_heads_k", "seqlen_q",      "seqlen_k",
        "head_dim",  "dtype",     "num_threads", "block_size",    "segment_size",
        "gqa",       "mode",      "order",       "method",        "stride",
        "reduce",    "rule",      "isa",         "workspace_cap", "correction",
        "normalize", NULL};
    int batch, heads, heads_k, seqlen_q, seqlen_k, head_dim, threads, block_size, segment_size;
    int gqa, mode, order, method, stride, reduce = 0, rule = 0, isa_id = 0;
    int correction = 0, normalize = 0;
    const char *dtype_name;
    Py_ssize_t cap = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiiiisiiiiiiii|iiinii:prefill_workspace_size",
                                     names, &batch, &heads, &heads_k, &seqlen_q, &seqlen_k,
                                     &head_dim, &dtype_name, &threads, &block_size, &segment_size,
                                     &gqa, &mode, &order, &method, &stride, &reduce, &rule, &isa_id,
                                     &cap, &correction, &normalize)) {
        return NULL;
    }
    pbs_dtype dtype = pbs_python_dtype(dtype_name);
    if (!dtype) return NULL;
    if (cap < 0) {
        return PyErr_Format(PyExc_ValueError, "workspace_cap is %zd: 0 or more is allowed", cap);
    }
    pbs_prefill_params p = PBS_INIT(pbs_prefill_params);
    p.q = shape_only(dtype, batch, heads, seqlen_q, head_dim);
    p.k.view = shape_only(dtype, batch, heads_k, seqlen_k, head_dim);
    p.v.view = p.k.view;
    p.out = p.q;
    p.block_size = block_size;
    p.segment_size = segment_size;
    p.gqa = (pbs_gqa)gqa;
    p.mode = (pbs_permute_mode)mode;
    p.order = (pbs_order)order;
    p.method = (pbs_select_method)method;
    p.stride = stride;
    p.reduce = (pbs_reduce)reduce;
    p.rule = (pbs_rule)rule;
    p.tau = 1.0f; /* allowed by every rule, and no size depends on it */
    p.workspace_cap = (size_t)cap;
    p.correction = (pbs_correction)correction;
    p.normalize = (pbs_normalize)normalize;
    p.exec.num_threads = threads;
    p.exec.isa = (pbs_isa)isa_id;
    size_t bytes = 0;
    if (pbs_python_raise(pbs_prefill_workspace_size(&p, &bytes)) < 0) return NULL;
    return PyLong_FromSize_t(bytes);
}

const char pbs_python_kv_packed_bytes_doc[] = PyDoc_STR(

    "kv_packed_bytes(batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, dtype, "
    "block_size, segment_size, gqa, mode, isa=0, correction=0) -> int\n\n"
    "Bytes of the packed K/V that permute writes for these sizes; enums as in pbs.h.");

PyObject *pbs_python_kv_packed_bytes(PyObject *self, PyObject *args, PyObject *kwargs) {
    (void)self;
    static char *names[] = {
        "batch",      "num_heads",    "num_heads_k", "seqlen_q", "seqlen_k", "head_dim",   "dtype",
        "block_size", "segment_size", "gqa",         "mode",     "isa",      "correction", NULL};
    int batch, heads, heads_k, seqlen_q, seqlen_k, head_dim, block_size, segment_size, gqa, mode;
    int isa_id = 0, correction = 0;
    const char *dtype_name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iiiiiisiiii|ii:kv_packed_bytes", names, &batch,
                                     &heads, &heads_k, &seqlen_q, &seqlen_k, &head_dim, &dtype_name,
                                     &block_size, &segment_size, &gqa, &mode, &isa_id,
                                     &correction)) {
        return NULL;
    }
    pbs_dtype dtype = pbs_python_dtype(dtype_name);
    if (!dtype) return NULL;
    pbs_permute_params p = PBS_INIT(pbs_permute_params);
    p.q = shape_only(dtype, batch, heads, seqlen_q, head_dim);
    p.k.view = shape_only(dtype, batch, heads_k, seqlen_k, head_dim);
    p.v.view = p.k.view;
    p.block_size = block_size;
    p.segment_size = segment_size;
    p.gqa = (pbs_gqa)gqa;
    p.mode = (pbs_permute_mode)mode;
    p.correction = (pbs_correction)correction;
    p.exec.isa = (pbs_isa)isa_id;
    size_t bytes = 0;
    if (pbs_python_raise(pbs_kv_packed_bytes(&p, &bytes)) < 0) return NULL;
    return PyLong_FromSize_t(bytes);
}
