/* SPDX-License-Identifier: Apache-2.0
 *
 * torch::stable::Tensor -> the structs of pbs.h, and pbs_status -> C++ exceptions (which torch
 * turns into Python ones: std::invalid_argument is ValueError). Checked here is only what the C
 * core cannot see: rank, dtype, device and shape of the tensors behind plain pointers.
 */
#ifndef PBS_TORCH_CONVERT_H
#define PBS_TORCH_CONVERT_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "pbs/pbs.h"

namespace pbs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

[[noreturn]] inline void invalid(const std::string &text) { throw std::invalid_argument(text); }

inline void check(pbs_status status) {
    if (status == PBS_OK) return;
    if (status == PBS_ERR_UNSUPPORTED) {
        throw std::runtime_error(std::string("unsupported: ") + pbs_last_error());
    }
    if (status == PBS_ERR_DEVICE) {
        throw std::runtime_error(std::string("device: ") + pbs_last_error());
    }
    invalid(pbs_last_error());
}

inline int32_t to_int32(const char *name, int64_t value) {
    if (value < std::numeric_limits<int32_t>::min() ||
        value > std::numeric_limits<int32_t>::max()) {
        invalid(std::string(name) + " is " + std::to_string(value) +
                ", which is no 32-bit integer");
    }
    return static_cast<int32_t>(value);
}

template <class Enum> Enum to_enum(const char *name, int64_t value) {
    return static_cast<Enum>(to_int32(name, value));
}

template <class Sizes> std::string to_text(const Sizes &sizes) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
}

inline void check_rank4(const char *name, const Tensor &t) {
    if (t.dim() != 4)
        invalid(std::string(name) + " has shape " + to_text(t.sizes()) +
                ": 4 dimensions are needed");
}

/* Is q where this library's kernels run? */
inline bool is_ours(const Tensor &q) {
#if defined(PBS_CUDA_LIBRARY)
    return q.is_cuda();
#else
    return q.is_cpu();
#endif
}

inline void check_device(const char *name, const Tensor &t, const Tensor &q) {
    if (is_ours(t) && t.get_device_index() == q.get_device_index()) return;
    const std::string place =
        q.is_cuda() ? "cuda:" + std::to_string(q.get_device_index()) : "the CPU";
    invalid(std::string(name) + " is not on " + place + ", as q is");
}

inline void check_dtype(const char *name, const Tensor &t, ScalarType wanted) {
    if (t.scalar_type() == wanted) return;
    invalid(std::string(name) + " has dtype " + torch::headeronly::toString(t.scalar_type()) +
            ": " + torch::headeronly::toString(wanted) + " is allowed");
}

inline pbs_dtype to_dtype(const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return PBS_DTYPE_FP32;
    case ScalarType::Half: return PBS_DTYPE_FP16;
    case ScalarType::BFloat16: return PBS_DTYPE_BF16;
    default:
        invalid(std::string(name) + " has dtype " + torch::headeronly::toString(t.scalar_type()) +
                ": Float, Half or BFloat16 is allowed");
    }
}

/* Empty tensors may have no memory; the C core takes NULL for "not given". Nobody reads through the
 * address that stands for it, which is the host's even for a device's tensor. */
inline void *data_of(const Tensor &t) {
    alignas(64) static char nothing[64];
    void *data = const_cast<void *>(t.const_data_ptr());
    return data ? data : nothing;
}

/* What every op knows: the device of all its tensors and its sequences. */
struct Call {
    Tensor q;
    pbs_geometry geometry{};
    int64_t sequences = 0; /* B of pbs.h */
};

/* The order of the dimensions of a tensor as pbs_view names them: batch, heads, seqlen, head_dim.
 */
enum class Layout { bhnd, bnhd };

/* More sequences than the tensor's batch of 1 is packed varlen: every sequence lies in the same
 * row, batch stride 0. */
inline void spread_batch(const Call &call, const Tensor &t, pbs_view &view) {
    if (call.sequences == t.size(0) || t.size(0) != 1) return;
    view.size[0] = to_int32("batch", call.sequences);
    view.stride[0] = 0;
}

inline pbs_view to_view(const Call &call, const char *name, const Tensor &t,
                        Layout layout = Layout::bhnd) {
    check_rank4(name, t);
    check_device(name, t, call.q);
    const int heads = layout == Layout::bhnd ? 1 : 2, seqlen = 3 - heads;
    const int order[4] = {0, heads, seqlen, 3};
    pbs_view view{};
    view.data = data_of(t);
    view.dtype = to_dtype(name, t);
    for (int i = 0; i < 4; i++) {
        view.size[i] = to_int32(name, t.size(order[i]));
        view.stride[i] = t.stride(order[i]);
    }
    spread_batch(call, t, view);
    return view;
}

inline pbs_kv to_kv(const Call &call, const char *name, const Tensor &t) {
    pbs_kv kv{};
    kv.view = to_view(call, name, t);
    return kv;
}

/* lse: fp32 [B, Hq, Nq] of any strides, seen as [B, Hq, Nq, 1]. */
inline pbs_view to_lse_view(const Call &call, const Tensor &t) {
    if (t.dim() != 3)
        invalid("lse has shape " + to_text(t.sizes()) + ": (batch, heads, seqlen) is needed");
    check_device("lse", t, call.q);
    check_dtype("lse", t, ScalarType::Float);
    pbs_view view{};
    view.data = data_of(t);
    view.dtype = PBS_DTYPE_FP32;
    for (int i = 0; i < 3; i++) {
        view.size[i] = to_int32("lse", t.size(i));
        view.stride[i] = t.stride(i);
    }
    view.size[3] = 1;
    view.stride[3] = 1;
    spread_batch(call, t, view);
    return view;
}

/* A contiguous tensor of exactly this shape and dtype behind a plain pointer; NULL if not given. */
template <class T>
const T *to_array(const Call &call, const char *name, const OptTensor &t, ScalarType dtype,
                  Shape shape) {
    if (!t) return nullptr;
    check_device(name, *t, call.q);
    check_dtype(name, *t, dtype);
    bool same = t->dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); i++) {
        same = t->size(static_cast<int64_t>(i)) == shape.begin()[i];
    }
    if (!same) {
        invalid(std::string(name) + " has shape " + to_text(t->sizes()) + ": " + to_text(shape) +
                " is needed");
    }
    if (!t->is_contiguous()) invalid(std::string(name) + " is not contiguous");
    return static_cast<const T *>(data_of(*t));
}

inline Call to_call(const Tensor &q, const OptTensor &q_start, const OptTensor &q_len,
                    const OptTensor &kv_start, const OptTensor &kv_len, int64_t max_seqlen_q,
                    int64_t max_seqlen_k) {
    check_rank4("q", q);
    if (!is_ours(q)) invalid("q is not on the device of the other tensors");
    Call call{q};
    call.sequences = q.size(0);
    for (const OptTensor *t : {&q_start, &q_len, &kv_start, &kv_len}) {
        if (*t && q.size(0) == 1 && (*t)->dim() == 1) call.sequences = (*t)->size(0);
    }
    const Shape shape = {call.sequences};
    pbs_geometry &g = call.geometry;
    g.q_start = to_array<int32_t>(call, "q_start", q_start, ScalarType::Int, shape);
    g.q_len = to_array<int32_t>(call, "q_len", q_len, ScalarType::Int, shape);
    g.kv_start = to_array<int32_t>(call, "kv_start", kv_start, ScalarType::Int, shape);
    g.kv_len = to_array<int32_t>(call, "kv_len", kv_len, ScalarType::Int, shape);
    g.max_seqlen_q = to_int32("max_seqlen_q", max_seqlen_q);
    g.max_seqlen_k = to_int32("max_seqlen_k", max_seqlen_k);
    return call;
}

/* The letters of pbs.h as tensor sizes; nonsense sizes become 0 and are refused by the C core. */
struct Letters {
    int64_t b, hq, hp, nq, nk, d, tq, tk, w;

    Letters(const Call &call, const Tensor &k, int64_t gqa, int64_t block_q, int64_t block_k) {
        check_rank4("k", k);
        const auto blocks = [](int64_t n, int64_t size) {
            return size > 0 ? (n + size - 1) / size : 0;
        };
        const Tensor &q = call.q;
        const pbs_geometry &g = call.geometry;
        b = call.sequences;
        hq = q.size(1);
        hp = gqa == PBS_GQA_GROUP ? k.size(1) : hq;
        nq = g.max_seqlen_q > 0 ? g.max_seqlen_q : q.size(2);
        nk = g.max_seqlen_k > 0 ? g.max_seqlen_k : k.size(2);
        d = q.size(3);
        tq = blocks(nq, block_q);
        tk = blocks(nk, block_k);
        w = blocks(tk, 32);
    }
};

inline Tensor new_tensor(const Tensor &like, Shape shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
}

} // namespace pbs

#endif /* PBS_TORCH_CONVERT_H */
