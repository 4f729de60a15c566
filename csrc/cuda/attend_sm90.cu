/* SPDX-License-Identifier: Apache-2.0
 *
 * attend on 9.0: the tensor maps of a call, and the kernel that attend_instances_sm90.inc names for
 * dtype and head_dim. What no map can address, and what the kernel has no tiles for, is left to
 * attend_sm80.cuh.
 */
#include "attend_run.cuh"
#include "attend_sm90.cuh"
#include "cuda.h"
#include "launch.cuh"

#include <stdlib.h>
#include <string.h>

namespace pbs {
namespace {

template <int D, int N, int KV, int Q, bool TURNS, bool ASKS, int LOG2, bool FIRST, bool MEANS>
struct shape {
    static constexpr int HEAD_DIM = D, BLOCK_N = N, KV_STAGES = KV, Q_STAGES = Q, SLACK = LOG2;
    static constexpr bool PING_PONG = TURNS, DYNAMIC = ASKS, RESCALE_FIRST = FIRST,
                          CORRECTED = MEANS;
};

/* ---- maps ------------------------------------------------------------------------------------ */
/* Boxes of ROWS rows of one chunk of tiles of D columns. */
template <int ROWS, int D> pbs_status map_of(tensor_map *map, tensor_shape shape) {
    using tile = sm90::matrix<ROWS, D>;
    shape.rank = 4;
    shape.mode = tile::MODE;
    shape.box[0] = tile::CHUNK;
    shape.box[1] = ROWS;
    shape.box[2] = shape.box[3] = 1;
    return make_tensor_map(map, shape);
}

/* A dimension with stride 0 is not there: the kernel's coordinate is 0 in it. */
template <int ROWS, int D> pbs_status map_of_view(tensor_map *map, const pbs_view &view) {
    tensor_shape shape = {};
    shape.base = view.data;
    shape.size[0] = view.size[3];
    for (int i = 1; i < 4; i++) {
        const int64_t stride = view.stride[3 - i];
        shape.size[i] = stride || i == 1 ? view.size[3 - i] : 1;
        shape.stride[i] = stride * static_cast<int64_t>(sizeof(uint16_t));
    }
    return map_of<ROWS, D>(map, shape);
}

/* rows x head_dim of every head, contiguous; none: no tile comes from there. */
template <int ROWS, int D>
pbs_status map_of_rows(tensor_map *map, const void *base, const pbs_dims &d, int32_t rows,
                       int32_t heads) {
    if (rows == 0) return PBS_OK;
    const int64_t row = d.head_dim * static_cast<int64_t>(sizeof(uint16_t));
    tensor_shape shape = {};
    shape.base = base;
    shape.size[0] = d.head_dim;
    shape.size[1] = rows;
    shape.size[2] = heads;
    shape.size[3] = d.batch;
    shape.stride[1] = row;
    shape.stride[2] = row * rows;
    shape.stride[3] = row * rows * heads;
    return map_of<ROWS, D>(map, shape);
}

template <class S>
pbs_status map_packed(sm90::kv_maps *maps, const attend_args &a, int64_t k, int64_t v,
                      int32_t rows) {
    constexpr int N = S::BLOCK_N, D = S::HEAD_DIM;
    PBS_TRY((map_of_rows<N, D>(&maps->k, a.packed + k, a.dims, rows, a.dims.heads_p)));
    return map_of_rows<N, D>(&maps->v, a.packed + v, a.dims, rows, a.dims.heads_p);
}

template <class S> pbs_status make_maps(sm90::maps *maps, const attend_args &a) {
    constexpr int N = S::BLOCK_N, D = S::HEAD_DIM;
    const pbs_dims &d = a.dims;
    if (!a.q_perm) { /* else both go row by row */
        PBS_TRY((map_of_view<sm90::GROUP_ROWS, D>(&maps->q, a.q)));
        PBS_TRY((map_of_view<sm90::GROUP_ROWS, D>(&maps->out, a.out)));
    }
    PBS_TRY((map_of_view<N, D>(&maps->original.k, a.k)));
    PBS_TRY((map_of_view<N, D>(&maps->original.v, a.v)));
    if (a.packed && a.takes_permuted)
        PBS_TRY(map_packed<S>(&maps->permuted, a, a.permuted.k, a.permuted.v, a.permuted.rows));
    if (!S::CORRECTED) return PBS_OK;
    if (!a.packed) {
        PBS_TRY((map_of_rows<N, D>(&maps->means[0].k, a.k_mean, d, d.blocks_k, d.heads_k)));
        return map_of_rows<N, D>(&maps->means[0].v, a.v_mean, d, d.blocks_k, d.heads_k);
    }
    PBS_TRY(map_packed<S>(&maps->means[0], a, a.natural.k_mean, a.natural.v_mean, d.blocks_k));
    if (!a.takes_permuted) return PBS_OK;
    return map_packed<S>(&maps->means[1], a, a.permuted.k_mean, a.permuted.v_mean, d.blocks_k);
}

/* ---- launch ---------------------------------------------------------------------------------- */
#if defined(__CUDACC__)
/* Built without 9.0a, these kernels are traps. */
template <class K> bool is_built(K kernel) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
        return attributes.ptxVersion >= 90;
    cudaGetLastError(); /* not to be found by the next launch */
    return false;
}
#else
template <class K> bool is_built(K) { return true; }
#endif

/* Tiles are whole parts of blocks. */
template <class S> bool serves(const attend_args &a) {
    const pbs_dims &d = a.dims;
    if (d.block_q % sm90::BLOCK_M != 0) return false;
    if (a.own != PBS_OWN_ALL && d.block_k % S::BLOCK_N != 0) return false;
    return d.seqlen_q > 0 && d.seqlen_k > 0;
}

template <class T, class S>
pbs_status launch_shape(const pbs_exec &exec, const attend_run &run, bool *taken) {
    sm90::arguments a = {};
    a.attend = run.args;
    if (!serves<S>(a.attend) || !is_built(sm90::attend_kernel<T, S>)) return PBS_OK;
    const pbs_status mapped = make_maps<S>(&a.map, a.attend);
    if (mapped == PBS_ERR_UNSUPPORTED) return PBS_OK; /* strides that no map has */
    PBS_TRY(mapped);
    a.parts = a.attend.dims.block_q / sm90::BLOCK_M;
    a.row_blocks = run.order.items * a.parts;
    a.taken = run.order.taken;
    *taken = true;
    const int32_t blocks = pbs_min_i32(a.row_blocks, pbs_cuda_multiprocessors(exec.device));
    return PBS_LAUNCH(exec, (sm90::attend_kernel<T, S>), blocks, sm90::THREADS,
                      sizeof(sm90::plan<S>), a);
}

} // namespace

/* ---- variants -------------------------------------------------------------------------------- */
/* PBS_ATTEND_VARIANT: lines of the table by name, in builds that have them; read at every call. */
static const char *wanted_variant() {
#if defined(PBS_ATTEND_VARIANTS)
    const char *name = getenv("PBS_ATTEND_VARIANT");
    return name ? name : "";
#else
    return "";
#endif
}

/* Of the tiles that a call runs on, whichever variant; 0: the table has none for it. */
static int32_t tile_width(const pbs_dims &d) {
#define VARIANT(...)
#define INSTANCE(dtype_, T, D, ...) \
    if (d.dtype == dtype_ && d.head_dim <= D) return D;
#include "attend_instances_sm90.inc"
#undef INSTANCE
#undef VARIANT
    return 0;
}

static pbs_status refuse_variant(const char *name, const pbs_dims &d, int32_t width) {
    char allowed[160] = "";
#define INSTANCE(...)
#define VARIANT(name_, dtype_, T, D, ...)                                                        \
    if (d.dtype == dtype_ && width == D && strlen(allowed) + strlen(name_) + 3 < sizeof allowed) \
        strcat(strcat(allowed, *allowed ? ", " : ""), name_);
#include "attend_instances_sm90.inc"
#undef INSTANCE
#undef VARIANT
    return pbs_fail(PBS_ERR_VALUE, "PBS_ATTEND_VARIANT: \"%.32s\"; for head_dim %d: %s", name,
                    d.head_dim, *allowed ? allowed : "none");
}

pbs_status launch_attend_sm90(const pbs_exec &exec, const attend_run &run, bool *taken) {
    const pbs_dims &d = run.args.dims;
    const int32_t width = tile_width(d);
    const char *variant = wanted_variant();
    *taken = false;
#define VARIANT(name, dtype_, T, D, ...)                                                     \
    if (d.dtype == dtype_ && width == D && strcmp(variant, name) == 0)                       \
        return run.corrects ? launch_shape<T, shape<D, __VA_ARGS__, true>>(exec, run, taken) \
                            : launch_shape<T, shape<D, __VA_ARGS__, false>>(exec, run, taken);
#define INSTANCE(...) VARIANT("", __VA_ARGS__)
#include "attend_instances_sm90.inc"
#undef INSTANCE
#undef VARIANT
    return *variant ? refuse_variant(variant, d, width) : PBS_OK;
}

} // namespace pbs
