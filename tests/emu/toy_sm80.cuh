/* SPDX-License-Identifier: Apache-2.0
 *
 * The emulation's own sm_80 kernels. toy_attend has the shape of FlashAttention-2 and is small
 * enough to read: out[i] = softmax_j(scale q[i] . k[j]) v[j], no causal mask, bf16, one head.
 *
 *   WARPS warps, 16 rows of q each; K and V tiles of N keys, one buffer each, by cp.async:
 *     wait K(n) | barrier | load V(n) | S = Q K^T, mask, softmax | wait V(n) | barrier |
 *     load K(n + 1) | O += P V
 *   The first barrier also frees V(n - 1), the second K(n).
 *
 * Every bug is one condition in the text; bug 0 is the correct kernel.
 */
#ifndef EMU_TOY_SM80_CUH
#define EMU_TOY_SM80_CUH

#include "cuda/ptx.cuh"

namespace toy80 {

enum bug {
    CORRECT,
    NO_K_WAIT,
    NO_V_WAIT,
    NO_BARRIER_AFTER_K,
    NO_BARRIER_BEFORE_PV,
    K_LOADED_EARLY,
    SWIZZLE_ON_ONE_SIDE,
    WRONG_MASK_COLUMN,
    BARRIER_IN_SOME_WARPS,
    SHUFFLE_IN_SOME_LANES,
    LDMATRIX_BEYOND,
    BUGS
};

/* Sizes and the bug, so that the kernel has one template parameter. */
template <int warps, int n, int d, bug b> struct config {
    static constexpr int WARPS = warps, M = 16 * warps, N = n, D = d, THREADS = 32 * warps;
    static constexpr bug BUG = b;
};

template <class C> struct plan {
    alignas(1024) uint16_t q[C::M * C::D];
    uint16_t k[C::N * C::D], v[C::N * C::D];
};

struct problem {
    const uint16_t *q, *k, *v; /* [seqlen_q, D], [seqlen_k, D] */
    float *out;                /* [seqlen_q, D] */
    int seqlen_q, seqlen_k;
    float scale_log2;
};

/* Element (row, column) of a tile of D columns; chunks of 8 are swizzled, so that 8 rows of one
 * column of chunks lie in 8 different groups of banks. */
template <int D> PBS_DEVICE int at(int row, int column) {
    return row * D + ((column / 8 ^ row % 8) * 8) + column % 8;
}

/* Rows first ... first + ROWS - 1 of from, zeros beyond `rows`. */
template <int ROWS, class C>
PBS_DEVICE void load(uint16_t *tile, const uint16_t *from, int first, int rows) {
    constexpr int CHUNKS = C::D / 8;
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += C::THREADS) {
        const int row = i / CHUNKS, column = i % CHUNKS * 8;
        const bool inside = first + row < rows;
        const uint16_t *source = from + static_cast<int64_t>(inside ? first + row : 0) * C::D;
        pbs::ptx::cp_async_16(pbs::ptx::shared_address(tile + at<C::D>(row, column)),
                              source + column, inside ? 16 : 0);
    }
    pbs::ptx::cp_async_commit();
}

/* acc_s[16, N] = Q K^T of this warp's rows. */
template <class C> PBS_DEVICE void scores(float (&acc_s)[C::N / 8][4], plan<C> &shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    for (int j = 0; j < C::N / 8; j++)
        for (int i = 0; i < 4; i++) acc_s[j][i] = 0.0f;
    for (int step = 0; step < C::D / 16; step++) {
        uint32_t a[4], b[4];
        const int row = warp * 16 + lane % 16, column = step * 16 + lane / 16 * 8;
        pbs::ptx::ldmatrix_x4(a, pbs::ptx::shared_address(shared.q + at<C::D>(row, column)));
        for (int j = 0; j < C::N / 16; j++) {
            const int key = j * 16 + lane % 8 + lane / 16 * 8, part = step * 16 + lane / 8 % 2 * 8;
            const int where =
                C::BUG == SWIZZLE_ON_ONE_SIDE ? key * C::D + part : at<C::D>(key, part);
            uint32_t address = pbs::ptx::shared_address(shared.k + where);
            if (C::BUG == LDMATRIX_BEYOND && j == C::N / 16 - 1) address += sizeof shared;
            pbs::ptx::ldmatrix_x4(b, address);
            pbs::ptx::mma_m16n8k16<pbs::bf16>(acc_s[2 * j], a, b[0], b[1]);
            pbs::ptx::mma_m16n8k16<pbs::bf16>(acc_s[2 * j + 1], a, b[2], b[3]);
        }
    }
}

/* Keys from `valid` on are outside the sequence. */
template <class C> PBS_DEVICE void mask(float (&acc_s)[C::N / 8][4], int valid) {
    const int q = static_cast<int>(threadIdx.x) % 4;
    for (int j = 0; j < C::N / 8; j++)
        for (int i = 0; i < 4; i++) {
            const int column =
                C::BUG == WRONG_MASK_COLUMN ? j * 8 + q + i % 2 * 4 : j * 8 + q * 2 + i % 2;
            if (column >= valid) acc_s[j][i] = -INFINITY;
        }
}

/* The maximum, or sum, of a row lies in the four lanes of a quad. */
template <class C> PBS_DEVICE float quad_max(float x) {
    if (C::BUG == SHUFFLE_IN_SOME_LANES && threadIdx.x % 32 >= 16) return x;
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
PBS_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* acc_s becomes P; half = 0, 1: the thread's two rows. */
template <class C>
PBS_DEVICE void softmax(float (&acc_s)[C::N / 8][4], float (&acc_o)[C::D / 8][4],
                        float (&row_max)[2], float (&row_sum)[2], float scale_log2) {
    for (int half = 0; half < 2; half++) {
        float top = row_max[half];
        for (int j = 0; j < C::N / 8; j++)
            top = fmaxf(top, fmaxf(acc_s[j][2 * half], acc_s[j][2 * half + 1]));
        top = quad_max<C>(top);
        const float shrink = pbs::ptx::ex2((row_max[half] - top) * scale_log2);
        row_max[half] = top;
        row_sum[half] *= shrink;
        for (int j = 0; j < C::D / 8; j++)
            for (int i = 0; i < 2; i++) acc_o[j][2 * half + i] *= shrink;
        for (int j = 0; j < C::N / 8; j++)
            for (int i = 0; i < 2; i++) {
                float &p = acc_s[j][2 * half + i];
                p = pbs::ptx::ex2((p - top) * scale_log2);
                row_sum[half] += p;
            }
    }
}

/* acc_o[16, D] += P V. The accumulators of two key groups of 8 are the A fragment of 16 keys. */
template <class C>
PBS_DEVICE void add_pv(float (&acc_o)[C::D / 8][4], const float (&acc_s)[C::N / 8][4],
                       plan<C> &shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int step = 0; step < C::N / 16; step++) {
        const float(&low)[4] = acc_s[2 * step], (&high)[4] = acc_s[2 * step + 1];
        const uint32_t p[4] = {pbs::ptx::pack<pbs::bf16>(low[0], low[1]),
                               pbs::ptx::pack<pbs::bf16>(low[2], low[3]),
                               pbs::ptx::pack<pbs::bf16>(high[0], high[1]),
                               pbs::ptx::pack<pbs::bf16>(high[2], high[3])};
        for (int j = 0; j < C::D / 16; j++) {
            uint32_t b[4];
            const int key = step * 16 + lane % 16, column = j * 16 + lane / 16 * 8;
            pbs::ptx::ldmatrix_x4_trans(b,
                                        pbs::ptx::shared_address(shared.v + at<C::D>(key, column)));
            pbs::ptx::mma_m16n8k16<pbs::bf16>(acc_o[2 * j], p, b[0], b[1]);
            pbs::ptx::mma_m16n8k16<pbs::bf16>(acc_o[2 * j + 1], p, b[2], b[3]);
        }
    }
}

template <class C>
PBS_DEVICE void store(const problem &x, const float (&acc_o)[C::D / 8][4],
                      const float (&row_sum)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    for (int half = 0; half < 2; half++) {
        const float sum = quad_sum(row_sum[half]);
        const int row = static_cast<int>(blockIdx.x) * C::M + warp * 16 + lane / 4 + 8 * half;
        if (row >= x.seqlen_q) continue;
        for (int j = 0; j < C::D / 8; j++)
            for (int i = 0; i < 2; i++)
                x.out[static_cast<int64_t>(row) * C::D + j * 8 + lane % 4 * 2 + i] =
                    acc_o[j][2 * half + i] / sum;
    }
}

template <class C> PBS_KERNEL(C::THREADS, 1) toy_attend(problem x) {
    PBS_SHARED(plan<C>, shared);
    load<C::M, C>(shared.q, x.q, static_cast<int>(blockIdx.x) * C::M, x.seqlen_q);
    load<C::N, C>(shared.k, x.k, 0, x.seqlen_k);
    float acc_s[C::N / 8][4], acc_o[C::D / 8][4] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
    for (int first = 0; first < x.seqlen_k; first += C::N) {
        if (C::BUG != NO_K_WAIT || first == 0) pbs::ptx::cp_async_wait<0>();
        if (C::BUG != NO_BARRIER_AFTER_K &&
            (C::BUG != BARRIER_IN_SOME_WARPS || first == 0 || threadIdx.x >= 32))
            __syncthreads();
        load<C::N, C>(shared.v, x.v, first, x.seqlen_k);
        scores<C>(acc_s, shared);
        if (first + C::N > x.seqlen_k) mask<C>(acc_s, x.seqlen_k - first);
        softmax<C>(acc_s, acc_o, row_max, row_sum, x.scale_log2);
        if (C::BUG == K_LOADED_EARLY && first + C::N < x.seqlen_k)
            load<C::N, C>(shared.k, x.k, first + C::N, x.seqlen_k);
        if (C::BUG != NO_V_WAIT) pbs::ptx::cp_async_wait<0>();
        if (C::BUG != NO_BARRIER_BEFORE_PV) __syncthreads();
        if (C::BUG != K_LOADED_EARLY && first + C::N < x.seqlen_k)
            load<C::N, C>(shared.k, x.k, first + C::N, x.seqlen_k);
        add_pv<C>(acc_o, acc_s, shared);
    }
    store<C>(x, acc_o, row_sum);
}

/* ---- rank by counting ------------------------------------------------------------------------ */
/* out = in[threads], largest first: plain shared memory, three barriers; `missing` names the one
 * that is not there, 0: none. One buffer holds the values and then their order. */
struct rank_plan {
    int value[256];
};

template <int missing> PBS_KERNEL(256, 1) rank_values(const int *in, int *out) {
    PBS_SHARED(rank_plan, shared);
    const int i = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int own = in[i];
    shared.value[i] = own;
    if (missing != 1) __syncthreads();
    int rank = 0;
    for (int j = 0; j < threads; j++)
        rank += shared.value[j] > own || (shared.value[j] == own && j < i);
    if (missing != 2) __syncthreads();
    shared.value[rank] = own;
    if (missing != 3) __syncthreads();
    out[i] = shared.value[i];
}

} // namespace toy80

#endif /* EMU_TOY_SM80_CUH */
