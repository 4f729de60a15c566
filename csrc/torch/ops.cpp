/* SPDX-License-Identifier: Apache-2.0
 *
 * The torch ops of pbs_attn over the LibTorch stable ABI (target 2.10): schemas, registration, and
 * for each verb tensors in, params struct filled by named field, tensors out. No algorithm.
 *
 * C++ types are the ones the stable ABI carries: double for a schema's float, int64_t for int.
 */
#include <tuple>

#include "exec.h"
#include "keep.h"

namespace pbs::ops {

/* The six geometry arguments that every op has, in one place. */
#define GEOMETRY_SCHEMA                                                                    \
    "Tensor? q_start, Tensor? q_len, Tensor? kv_start, Tensor? kv_len, int max_seqlen_q, " \
    "int max_seqlen_k, "
#define GEOMETRY_PARAMS                                                       \
    OptTensor q_start, OptTensor q_len, OptTensor kv_start, OptTensor kv_len, \
        int64_t max_seqlen_q, int64_t max_seqlen_k
#define GEOMETRY_ARGS q_start, q_len, kv_start, kv_len, max_seqlen_q, max_seqlen_k

Tensor score(Tensor q, Tensor k, GEOMETRY_PARAMS, double softmax_scale, int64_t block_size,
             int64_t segment_size, int64_t gqa, int64_t order, int64_t seed, int64_t isa) {
    const Call call = to_call(q, GEOMETRY_ARGS);
    const Letters n(call, k, gqa, block_size, block_size);
    Exec exec(q, isa);
    pbs_score_params p = PBS_INIT(pbs_score_params);
    p.q = to_view(call, "q", q);
    p.k = to_kv(call, "k", k);
    p.geometry = call.geometry;
    p.exec = exec.c;
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.block_size = to_int32("block_size", block_size);
    p.segment_size = to_int32("segment_size", segment_size);
    p.gqa = to_enum<pbs_gqa>("gqa", gqa);
    p.order = to_enum<pbs_order>("order", order);
    p.seed = static_cast<uint64_t>(seed);
    Tensor out = new_tensor(q, {n.b, n.hp, n.nk}, ScalarType::Float);
    p.score = static_cast<float *>(data_of(out));
    run(p, pbs_score_workspace_size, pbs_score, q, exec);
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
permute(Tensor q, Tensor k, Tensor v, OptTensor score, OptTensor k_perm_in, OptTensor permute_heads,
        GEOMETRY_PARAMS, int64_t block_size, int64_t segment_size, int64_t gqa, int64_t mode,
        bool pack, int64_t isa, int64_t correction) {
    const Call call = to_call(q, GEOMETRY_ARGS);
    const Letters n(call, k, gqa, block_size, block_size);
    const bool rows = mode == PBS_PERMUTE_QUERIES || mode == PBS_PERMUTE_BOTH;
    Exec exec(q, isa);
    pbs_permute_params p = PBS_INIT(pbs_permute_params);
    p.q = to_view(call, "q", q);
    p.k = to_kv(call, "k", k);
    p.v = to_kv(call, "v", v);
    p.score = to_array<float>(call, "score", score, ScalarType::Float, {n.b, n.hp, n.nk});
    p.k_perm_in =
        to_array<int32_t>(call, "k_perm_in", k_perm_in, ScalarType::Int, {n.b, n.hp, n.nk});
    p.permute_heads =
        to_array<int32_t>(call, "permute_heads", permute_heads, ScalarType::Int, {n.hp});
    p.geometry = call.geometry;
    p.exec = exec.c;
    p.block_size = to_int32("block_size", block_size);
    p.segment_size = to_int32("segment_size", segment_size);
    p.gqa = to_enum<pbs_gqa>("gqa", gqa);
    p.mode = to_enum<pbs_permute_mode>("mode", mode);
    p.correction = to_enum<pbs_correction>("correction", correction);
    Tensor k_perm = new_tensor(q, {n.b, n.hp, n.nk}, ScalarType::Int);
    Tensor q_perm = new_tensor(q, {n.b, n.hq, rows ? n.nq : 0}, ScalarType::Int);
    Tensor k_pool = new_tensor(q, {n.b, n.hp, n.tk, n.d}, ScalarType::Float);
    Tensor v_pool = new_tensor(q, {n.b, n.hp, n.tk, n.d}, ScalarType::Float);
    p.k_perm = static_cast<int32_t *>(data_of(k_perm));
    p.q_perm = rows ? static_cast<int32_t *>(data_of(q_perm)) : nullptr;
    p.k_pool = static_cast<float *>(data_of(k_pool));
    p.v_pool = static_cast<float *>(data_of(v_pool));
    if (pack) check(pbs_kv_packed_bytes(&p, &p.packed_bytes));
    Tensor packed = new_tensor(q, {static_cast<int64_t>(p.packed_bytes)}, ScalarType::Byte);
    /* Panels of keys that do not exist are not written: the same call must give the same bytes. */
    if (pack) fill(packed, 0.0f);
    p.packed = pack ? data_of(packed) : nullptr;
    run(p, pbs_permute_workspace_size, pbs_permute, q, exec);
    return {k_perm, q_perm, k_pool, v_pool, packed};
}

std::tuple<Tensor, Tensor, Tensor>
select(Tensor q, Tensor k, OptTensor k_pool, OptTensor k_perm, OptTensor q_perm,
       OptTensor tau_heads, GEOMETRY_PARAMS, double softmax_scale, int64_t block_size,
       int64_t segment_size, int64_t gqa, int64_t mode, int64_t method, int64_t stride,
       int64_t reduce, int64_t rule, double tau, bool return_mass, int64_t isa, int64_t normalize) {
    const Call call = to_call(q, GEOMETRY_ARGS);
    const Letters n(call, k, gqa, block_size, block_size);
    Exec exec(q, isa);
    pbs_select_params p = PBS_INIT(pbs_select_params);
    p.q = to_view(call, "q", q);
    p.k = to_kv(call, "k", k);
    p.k_pool = to_array<float>(call, "k_pool", k_pool, ScalarType::Float, {n.b, n.hp, n.tk, n.d});
    p.k_perm = to_array<int32_t>(call, "k_perm", k_perm, ScalarType::Int, {n.b, n.hp, n.nk});
    p.q_perm = to_array<int32_t>(call, "q_perm", q_perm, ScalarType::Int, {n.b, n.hq, n.nq});
    p.tau_heads = to_array<float>(call, "tau_heads", tau_heads, ScalarType::Float, {n.hq});
    p.geometry = call.geometry;
    p.exec = exec.c;
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.block_size = to_int32("block_size", block_size);
    p.segment_size = to_int32("segment_size", segment_size);
    p.gqa = to_enum<pbs_gqa>("gqa", gqa);
    p.mode = to_enum<pbs_permute_mode>("mode", mode);
    p.method = to_enum<pbs_select_method>("method", method);
    p.stride = to_int32("stride", stride);
    p.reduce = to_enum<pbs_reduce>("reduce", reduce);
    p.rule = to_enum<pbs_rule>("rule", rule);
    p.tau = static_cast<float>(tau);
    p.normalize = to_enum<pbs_normalize>("normalize", normalize);
    Tensor bits = new_tensor(q, {n.b, n.hq, n.tq, n.w}, ScalarType::Int);
    Tensor count = new_tensor(q, {n.b, n.hq, n.tq}, ScalarType::Int);
    Tensor mass = new_tensor(q, {n.b, n.hq, return_mass ? n.tq : 0, return_mass ? n.tk : 0},
                             ScalarType::Float);
    p.bits = static_cast<uint32_t *>(data_of(bits));
    p.count = static_cast<int32_t *>(data_of(count));
    p.mass = return_mass ? static_cast<float *>(data_of(mass)) : nullptr;
    run(p, pbs_select_workspace_size, pbs_select, q, exec);
    return {bits, count, mass};
}

/* out (B, Nq, Hq, D) contiguous and lse (B, Hq, Nq) or empty. Where rows may lie outside every
 * sequence, they read 0 and -inf. */
std::tuple<Tensor, Tensor> new_outputs(const Tensor &q, bool geometry_given, bool return_lse) {
    check_rank4("q", q);
    const ScalarType dtype = q.scalar_type();
    Tensor out = new_tensor(q, {q.size(0), q.size(2), q.size(1), q.size(3)}, dtype);
    Tensor lse = return_lse ? new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float)
                            : new_tensor(q, {0}, ScalarType::Float);
    if (geometry_given) {
        fill(out, 0.0f);
        if (return_lse) fill(lse, -std::numeric_limits<float>::infinity());
    }
    return {out, lse};
}

bool any_given(std::initializer_list<const OptTensor *> tensors) {
    for (const OptTensor *t : tensors) {
        if (*t) return true;
    }
    return false;
}

void attend_out(Tensor q, Tensor k, Tensor v, OptTensor packed, OptTensor bits, OptTensor q_perm,
                GEOMETRY_PARAMS, double softmax_scale, int64_t block_q, int64_t block_k,
                int64_t segment_size, int64_t gqa, int64_t own, int64_t isa, int64_t correction,
                Tensor out, OptTensor lse) {
    const Call call = to_call(q, GEOMETRY_ARGS);
    const Letters n(call, k, gqa, block_q, block_k);
    const int64_t heads_sel = bits && bits->dim() == 4 ? bits->size(1) : n.hq;
    const int64_t packed_bytes = packed ? packed->numel() : 0;
    Exec exec(q, isa);
    pbs_attend_params p = PBS_INIT(pbs_attend_params);
    p.q = to_view(call, "q", q);
    p.k = to_kv(call, "k", k);
    p.v = to_kv(call, "v", v);
    p.packed = to_array<uint8_t>(call, "packed", packed, ScalarType::Byte, {packed_bytes});
    p.packed_bytes = static_cast<size_t>(packed_bytes);
    p.bits = reinterpret_cast<const uint32_t *>(
        to_array<int32_t>(call, "bits", bits, ScalarType::Int, {n.b, heads_sel, n.tq, n.w}));
    p.q_perm = to_array<int32_t>(call, "q_perm", q_perm, ScalarType::Int, {n.b, n.hq, n.nq});
    p.geometry = call.geometry;
    p.exec = exec.c;
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.block_q = to_int32("block_q", block_q);
    p.block_k = to_int32("block_k", block_k);
    p.segment_size = to_int32("segment_size", segment_size);
    p.heads_sel = to_int32("heads_sel", heads_sel);
    p.gqa = to_enum<pbs_gqa>("gqa", gqa);
    p.own = to_enum<pbs_own>("own", own);
    p.correction = to_enum<pbs_correction>("correction", correction);
    p.out = to_view(call, "out", out, Layout::bnhd);
    if (lse) p.lse = to_lse_view(call, *lse);
    run(p, pbs_attend_workspace_size, pbs_attend, q, exec);
}

std::tuple<Tensor, Tensor> attend(Tensor q, Tensor k, Tensor v, OptTensor packed, OptTensor bits,
                                  OptTensor q_perm, GEOMETRY_PARAMS, double softmax_scale,
                                  int64_t block_q, int64_t block_k, int64_t segment_size,
                                  int64_t gqa, int64_t own, bool return_lse, int64_t isa,
                                  int64_t correction) {
    auto [out, lse] = new_outputs(q, any_given({&q_start, &q_len, &kv_start, &kv_len}), return_lse);
    attend_out(q, k, v, packed, bits, q_perm, GEOMETRY_ARGS, softmax_scale, block_q, block_k,
               segment_size, gqa, own, isa, correction, out,
               return_lse ? OptTensor(lse) : std::nullopt);
    return {out, lse};
}

/* What prefill and prefill_out share; the plan's tensors may be absent. */
struct Plan {
    OptTensor count, bits, k_perm;
};

void prefill_into(Tensor q, Tensor k, Tensor v, OptTensor k_perm_in, OptTensor permute_heads,
                  OptTensor tau_heads, GEOMETRY_PARAMS, double softmax_scale, int64_t block_size,
                  int64_t segment_size, int64_t gqa, int64_t mode, int64_t order, int64_t seed,
                  int64_t method, int64_t stride, int64_t reduce, int64_t rule, double tau,
                  int64_t isa, int64_t normalize, int64_t correction, Tensor out, OptTensor lse,
                  bool want_count, bool want_plan, Plan &plan) {
    const Call call = to_call(q, GEOMETRY_ARGS);
    const Letters n(call, k, gqa, block_size, block_size);
    Exec exec(q, isa);
    pbs_prefill_params p = PBS_INIT(pbs_prefill_params);
    p.q = to_view(call, "q", q);
    p.k = to_kv(call, "k", k);
    p.v = to_kv(call, "v", v);
    p.k_perm_in =
        to_array<int32_t>(call, "k_perm_in", k_perm_in, ScalarType::Int, {n.b, n.hp, n.nk});
    p.permute_heads =
        to_array<int32_t>(call, "permute_heads", permute_heads, ScalarType::Int, {n.hp});
    p.tau_heads = to_array<float>(call, "tau_heads", tau_heads, ScalarType::Float, {n.hq});
    p.geometry = call.geometry;
    p.exec = exec.c;
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.block_size = to_int32("block_size", block_size);
    p.segment_size = to_int32("segment_size", segment_size);
    p.gqa = to_enum<pbs_gqa>("gqa", gqa);
    p.mode = to_enum<pbs_permute_mode>("mode", mode);
    p.order = to_enum<pbs_order>("order", order);
    p.seed = static_cast<uint64_t>(seed);
    p.method = to_enum<pbs_select_method>("method", method);
    p.stride = to_int32("stride", stride);
    p.reduce = to_enum<pbs_reduce>("reduce", reduce);
    p.rule = to_enum<pbs_rule>("rule", rule);
    p.tau = static_cast<float>(tau);
    p.normalize = to_enum<pbs_normalize>("normalize", normalize);
    p.correction = to_enum<pbs_correction>("correction", correction);
    p.out = to_view(call, "out", out, Layout::bnhd);
    if (lse) p.lse = to_lse_view(call, *lse);
    if (want_count) {
        plan.count = new_tensor(q, {n.b, n.hq, n.tq}, ScalarType::Int);
        p.count = static_cast<int32_t *>(data_of(*plan.count));
    }
    if (want_plan) {
        plan.bits = new_tensor(q, {n.b, n.hq, n.tq, n.w}, ScalarType::Int);
        plan.k_perm = new_tensor(q, {n.b, n.hp, n.nk}, ScalarType::Int);
        p.bits = static_cast<uint32_t *>(data_of(*plan.bits));
        p.k_perm = static_cast<int32_t *>(data_of(*plan.k_perm));
    }
    run(p, pbs_prefill_workspace_size, pbs_prefill, q, exec);
}

void prefill_out(Tensor q, Tensor k, Tensor v, OptTensor k_perm_in, OptTensor permute_heads,
                 OptTensor tau_heads, GEOMETRY_PARAMS, double softmax_scale, int64_t block_size,
                 int64_t segment_size, int64_t gqa, int64_t mode, int64_t order, int64_t seed,
                 int64_t method, int64_t stride, int64_t reduce, int64_t rule, double tau,
                 int64_t isa, int64_t normalize, int64_t correction, Tensor out, OptTensor lse) {
    Plan plan;
    prefill_into(q, k, v, k_perm_in, permute_heads, tau_heads, GEOMETRY_ARGS, softmax_scale,
                 block_size, segment_size, gqa, mode, order, seed, method, stride, reduce, rule,
                 tau, isa, normalize, correction, out, lse, false, false, plan);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
prefill(Tensor q, Tensor k, Tensor v, OptTensor k_perm_in, OptTensor permute_heads,
        OptTensor tau_heads, GEOMETRY_PARAMS, double softmax_scale, int64_t block_size,
        int64_t segment_size, int64_t gqa, int64_t mode, int64_t order, int64_t seed,
        int64_t method, int64_t stride, int64_t reduce, int64_t rule, double tau, bool return_lse,
        bool return_plan, int64_t isa, int64_t normalize, int64_t correction) {
    auto [out, lse] = new_outputs(q, any_given({&q_start, &q_len, &kv_start, &kv_len}), return_lse);
    Plan plan;
    prefill_into(q, k, v, k_perm_in, permute_heads, tau_heads, GEOMETRY_ARGS, softmax_scale,
                 block_size, segment_size, gqa, mode, order, seed, method, stride, reduce, rule,
                 tau, isa, normalize, correction, out, return_lse ? OptTensor(lse) : std::nullopt,
                 true, return_plan, plan);
    const auto or_empty = [&q](OptTensor &t) {
        return t ? *t : new_tensor(q, {0}, ScalarType::Int);
    };
    return {out, lse, *plan.count, or_empty(plan.bits), or_empty(plan.k_perm)};
}

using torch::stable::detail::StableLibrary;

#if !defined(PBS_CUDA_LIBRARY)

#define ATTEND_SCHEMA                                                                              \
    "Tensor q, Tensor k, Tensor v, Tensor? packed, Tensor? bits, Tensor? q_perm, " GEOMETRY_SCHEMA \
    "float softmax_scale, int block_q, int block_k, int segment_size, int gqa, int own, "
#define PREFILL_SCHEMA                                                                   \
    "Tensor q, Tensor k, Tensor v, Tensor? k_perm_in, Tensor? permute_heads, Tensor? "   \
    "tau_heads, " GEOMETRY_SCHEMA                                                        \
    "float softmax_scale, int block_size, int segment_size, int gqa, int permute_mode, " \
    "int order, int seed, int method, int stride, int reduce, int rule, float tau, "

/* What came later stands behind isa with a default: programs exported before still run. */
void define(StableLibrary &m) {
    m.def("score(Tensor q, Tensor k, " GEOMETRY_SCHEMA
          "float softmax_scale, int block_size, int segment_size, int gqa, int order, int seed, "
          "int isa=0) -> Tensor");
    /* permute_mode, not mode: torch's own dispatch has a parameter of that name. */
    m.def("permute(Tensor q, Tensor k, Tensor v, Tensor? score, Tensor? k_perm_in, "
          "Tensor? permute_heads, " GEOMETRY_SCHEMA
          "int block_size, int segment_size, int gqa, int permute_mode, bool pack, int isa=0, "
          "int correction=0) -> (Tensor k_perm, Tensor q_perm, Tensor k_pool, Tensor v_pool, "
          "Tensor packed)");
    m.def("select(Tensor q, Tensor k, Tensor? k_pool, Tensor? k_perm, Tensor? q_perm, "
          "Tensor? tau_heads, " GEOMETRY_SCHEMA
          "float softmax_scale, int block_size, int segment_size, int gqa, int permute_mode, "
          "int method, int stride, int reduce, int rule, float tau, bool return_mass, int isa=0, "
          "int normalize=0) -> (Tensor bits, Tensor count, Tensor mass)");
    m.def("attend(" ATTEND_SCHEMA "bool return_lse, int isa=0, int correction=0) "
          "-> (Tensor out, Tensor lse)");
    m.def("attend_out(" ATTEND_SCHEMA
          "int isa=0, int correction=0, *, Tensor(a!) out, Tensor(b!)? lse=None) -> ()");
    m.def("prefill(" PREFILL_SCHEMA "bool return_lse, bool return_plan, int isa=0, "
          "int normalize=0, int correction=0) -> (Tensor out, Tensor lse, Tensor count, Tensor "
          "bits, Tensor k_perm)");
    m.def("prefill_out(" PREFILL_SCHEMA "int isa=0, int normalize=0, int correction=0, *, "
          "Tensor(a!) out, Tensor(b!)? lse=None) -> ()");
}

#endif

void implement(StableLibrary &m) {
    m.impl("score", TORCH_BOX(&score));
    m.impl("permute", TORCH_BOX(&permute));
    m.impl("select", TORCH_BOX(&select));
    m.impl("attend", TORCH_BOX(&attend));
    m.impl("attend_out", TORCH_BOX(&attend_out));
    m.impl("prefill", TORCH_BOX(&prefill));
    m.impl("prefill_out", TORCH_BOX(&prefill_out));
}

} // namespace pbs::ops

#if !defined(PBS_CUDA_LIBRARY) && !defined(PBS_EMULATED_LIBRARY)
size_t pbs_torch_keep_workspace(size_t bytes) { return pbs::Workspace::keep(bytes); }
#endif

/* Schemas are defined once, by the CPU library, which is always there. The emulated GPU's ops have
 * a namespace of their own, and take CPU tensors. */
#if defined(PBS_CUDA_LIBRARY)
STABLE_TORCH_LIBRARY_IMPL(pbs_attn, CUDA, m) { pbs::ops::implement(m); }
#elif defined(PBS_EMULATED_LIBRARY)
STABLE_TORCH_LIBRARY(pbs_attn_emu, m) { pbs::ops::define(m); }
STABLE_TORCH_LIBRARY_IMPL(pbs_attn_emu, CPU, m) { pbs::ops::implement(m); }
#else
STABLE_TORCH_LIBRARY(pbs_attn, m) { pbs::ops::define(m); }
STABLE_TORCH_LIBRARY_IMPL(pbs_attn, CPU, m) { pbs::ops::implement(m); }
#endif
