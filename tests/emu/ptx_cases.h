/* SPDX-License-Identifier: Apache-2.0
 *
 * One tiny kernel per function of ptx.cuh, ptx_sm90.cuh and ptx_wgmma.cuh; the same text for a GPU
 * and for the emulation. tests/gpu/test_ptx.cu runs them. This file: what a case is, and sm_80.
 *
 * A kernel reads words of `in`, the same random ones everywhere, and writes all words of `out`.
 */
#ifndef EMU_PTX_CASES_H
#define EMU_PTX_CASES_H

#include "cuda/ptx.cuh"

#include <vector>

namespace ptx_cases {

using namespace pbs;

/* What the words of `in` are: bits; pairs of 16-bit numbers in (-2, 2); floats in (-140, 140) and
 * special ones. */
enum input { BITS, BF16, FP16, FLOATS };
/* How results are compared: bit for bit; as floats to 2^-20 of the value; or of the same sum over
 * magnitudes, which is what comes out for inputs without their signs. */
enum comparison { EXACT, NEAR, SUMS };

constexpr int PLACES = 4; /* of boxes that a case copies */

struct case_args {
    tensor_map map;
    const uint32_t *in;
    uint32_t *out;
    uint32_t bytes; /* of a box */
    uint32_t mode;  /* swizzle */
    int32_t at[PLACES][5];
};

struct ptx_case {
    const char *name;
    void (*kernel)(const case_args);
    int threads;
    size_t shared;
    uint32_t in_words, out_words;
    input in;
    comparison compare;
    /* sm_90a from here on */
    bool sm90;
    int cluster;        /* also the number of blocks */
    bool stores;        /* the map is of out, not of in */
    tensor_shape shape; /* without base; rank 0: none */
    int32_t at[PLACES][5];
    swizzle mode;
};

PBS_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

/* ---- arithmetic: one thread per word -------------------------------------------------------- */
PBS_KERNEL(128, 1) ex2(const __grid_constant__ case_args a) {
    a.out[threadIdx.x] = __float_as_uint(ptx::ex2(as_float(a.in[threadIdx.x])));
}
PBS_KERNEL(128, 1) lg2(const __grid_constant__ case_args a) {
    a.out[threadIdx.x] = __float_as_uint(ptx::lg2(fabsf(as_float(a.in[threadIdx.x]))));
}
template <class T> PBS_KERNEL(128, 1) pack(const __grid_constant__ case_args a) {
    const uint32_t t = threadIdx.x;
    a.out[t] = ptx::pack<T>(as_float(a.in[t]), as_float(a.in[t ^ 1]));
}
template <class T> PBS_KERNEL(128, 1) to_float(const __grid_constant__ case_args a) {
    const uint32_t word = a.in[threadIdx.x];
    a.out[2 * threadIdx.x] = __float_as_uint(ptx::to_float<T>(static_cast<uint16_t>(word)));
    a.out[2 * threadIdx.x + 1] =
        __float_as_uint(ptx::to_float<T>(static_cast<uint16_t>(word >> 16)));
}

/* ---- shared memory -------------------------------------------------------------------------- */
struct words_plan {
    alignas(1024) uint32_t words[1024];
};

/* 64 threads, two groups of 16 bytes each; every other copy of the second is zeros. */
PBS_KERNEL(64, 1) cp_async(const __grid_constant__ case_args a) {
    PBS_SHARED(words_plan, s);
    const uint32_t t = threadIdx.x, first = ptx::shared_address(&s.words[4 * t]);
    ptx::cp_async_16(first, a.in + 4 * t, 16);
    ptx::cp_async_commit();
    ptx::cp_async_16(first + 1024, a.in + 256 + 4 * t, t % 2 * 16);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (uint32_t i = 0; i < 4; i++) a.out[4 * t + i] = s.words[(4 * t + i) ^ 4];
    ptx::cp_async_wait<0>();
    __syncthreads();
    for (uint32_t i = 0; i < 4; i++) a.out[256 + 4 * t + i] = s.words[256 + ((4 * t + i) ^ 4)];
}

/* Rows in an order of their own: lane t names row 31 - t. */
template <bool transposed> PBS_KERNEL(32, 1) ldmatrix(const __grid_constant__ case_args a) {
    PBS_SHARED(words_plan, s);
    const uint32_t t = threadIdx.x;
    for (uint32_t i = 0; i < 4; i++) s.words[4 * t + i] = a.in[4 * t + i];
    __syncthreads();
    uint32_t r[4];
    const uint32_t row = ptx::shared_address(&s.words[4 * (31 - t)]);
    if (transposed)
        ptx::ldmatrix_x4_trans(r, row);
    else
        ptx::ldmatrix_x4(r, row);
    for (uint32_t i = 0; i < 4; i++) a.out[4 * t + i] = r[i];
}

template <class T> PBS_KERNEL(32, 1) mma(const __grid_constant__ case_args a) {
    const uint32_t t = threadIdx.x;
    float c[4];
    uint32_t x[4], y[2];
    for (uint32_t i = 0; i < 4; i++) {
        x[i] = a.in[t * 8 + i];
        c[i] = ptx::to_float<T>(static_cast<uint16_t>(a.in[t * 8 + 4 + i % 2] >> (i / 2 * 16)));
    }
    for (uint32_t i = 0; i < 2; i++) y[i] = a.in[t * 8 + 6 + i];
    ptx::mma_m16n8k16<T>(c, x, y[0], y[1]);
    for (uint32_t i = 0; i < 4; i++) a.out[t * 4 + i] = __float_as_uint(c[i]);
}

/* A case without clusters and tensor maps. */
inline ptx_case simple(const char *name, void (*kernel)(const case_args), int threads,
                       size_t shared, uint32_t in_words, uint32_t out_words, input in,
                       comparison compare) {
    ptx_case c = {};
    c.name = name;
    c.kernel = kernel;
    c.threads = threads;
    c.shared = shared;
    c.in_words = in_words;
    c.out_words = out_words;
    c.in = in;
    c.compare = compare;
    c.cluster = 1;
    return c;
}

inline void add_sm80(std::vector<ptx_case> &list) {
    constexpr size_t words = sizeof(words_plan);
    list.push_back(simple("ex2", ex2, 128, 0, 128, 128, FLOATS, NEAR));
    list.push_back(simple("lg2", lg2, 128, 0, 128, 128, FLOATS, NEAR));
    list.push_back(simple("pack bf16", pack<bf16>, 128, 0, 128, 128, FLOATS, EXACT));
    list.push_back(simple("pack fp16", pack<fp16>, 128, 0, 128, 128, FLOATS, EXACT));
    list.push_back(simple("to_float bf16", to_float<bf16>, 128, 0, 128, 256, BF16, EXACT));
    list.push_back(simple("to_float fp16", to_float<fp16>, 128, 0, 128, 256, FP16, EXACT));
    list.push_back(simple("cp_async", cp_async, 64, words, 512, 512, BITS, EXACT));
    list.push_back(simple("ldmatrix_x4", ldmatrix<false>, 32, words, 128, 128, BITS, EXACT));
    list.push_back(simple("ldmatrix_x4_trans", ldmatrix<true>, 32, words, 128, 128, BITS, EXACT));
    list.push_back(simple("mma_m16n8k16 bf16", mma<bf16>, 32, 0, 256, 128, BF16, SUMS));
    list.push_back(simple("mma_m16n8k16 fp16", mma<fp16>, 32, 0, 256, 128, FP16, SUMS));
}

} // namespace ptx_cases

#endif /* EMU_PTX_CASES_H */
