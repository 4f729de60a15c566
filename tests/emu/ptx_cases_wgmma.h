/* SPDX-License-Identifier: Apache-2.0
 *
 * The cases of ptx_wgmma.cuh: every shape, type, swizzle and place of A, on random bytes.
 */
#ifndef EMU_PTX_CASES_WGMMA_H
#define EMU_PTX_CASES_WGMMA_H

#include "ptx_cases.h"

namespace ptx_cases {

/* Two steps of k; what a descriptor makes of these bytes is what is tested. */
struct wgmma_plan {
    alignas(1024) uint32_t a[2048]; /* 64 rows */
    uint32_t b[8192];               /* up to 256 columns */
};
constexpr uint32_t WGMMA_WORDS = sizeof(wgmma_plan) / 4;

/* A matrix of 32 of k by rows, and how far the second 16 of k are. */
struct operand {
    uint64_t first, second;
};

PBS_DEVICE operand k_major(uint32_t base, uint32_t rows, swizzle mode) {
    const uint32_t width = swizzle_width(mode);
    const bool wide = mode == SWIZZLE_128B || mode == SWIZZLE_64B; /* both steps in one row */
    const uint32_t leading = mode == SWIZZLE_NONE ? rows * 16 : 16;
    const uint32_t step = wide ? 32 : rows * 32;
    const uint64_t d = matrix_descriptor(base, leading, 8 * width, mode);
    return {d, descriptor_at(d, step)};
}

PBS_DEVICE operand mn_major(uint32_t base, uint32_t columns, swizzle mode) {
    const uint32_t width = swizzle_width(mode);
    const uint32_t leading = mode == SWIZZLE_NONE ? columns * 16 : 32 * width;
    const uint32_t stride = mode == SWIZZLE_NONE ? 128 : 8 * width;
    const uint64_t d = matrix_descriptor(base, leading, stride, mode);
    return {d, descriptor_at(d, 2 * (mode == SWIZZLE_NONE ? leading : stride))};
}

/* d = [d +] A B over 32 of k, each step a group of its own. a.bytes: accumulate from the start. */
template <class T, int N, int transpose_b>
PBS_DEVICE void start_wgmma(wgmma_plan &s, const case_args &a, float (&d)[N / 2], operand &x,
                            operand &y) {
    const uint32_t t = threadIdx.x;
    uint32_t *words = s.a;
    for (uint32_t i = t; i < WGMMA_WORDS / 4; i += 128) {
        const uint32_t r[4] = {a.in[4 * i], a.in[4 * i + 1], a.in[4 * i + 2], a.in[4 * i + 3]};
        ptx::st_shared_x4(ptx::shared_address(words) + 16 * i, r);
    }
    ptx::fence_proxy_async();
    __syncthreads();
    PBS_UNROLL
    for (int i = 0; i < N / 2; i++)
        d[i] = ptx::to_float<T>(static_cast<uint16_t>(a.in[t * 64 + i % 64] >> (i / 64 * 16)));
    const swizzle mode = static_cast<swizzle>(a.mode);
    x = k_major(ptx::shared_address(s.a), 64, mode);
    y = transpose_b ? mn_major(ptx::shared_address(s.b), N, mode)
                    : k_major(ptx::shared_address(s.b), N, mode);
    ptx::fence_registers(d);
    ptx::wgmma_fence();
}

template <int count> PBS_DEVICE void end_wgmma(const case_args &a, float (&d)[count]) {
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::wgmma_wait<0>();
    ptx::fence_registers(d);
    PBS_UNROLL
    for (int i = 0; i < count; i++)
        a.out[static_cast<uint32_t>(i) * 128 + threadIdx.x] = __float_as_uint(d[i]);
}

template <class T, int N, int transpose_b>
PBS_KERNEL(128, 1)
wgmma_ss(const __grid_constant__ case_args a) {
    PBS_SHARED(wgmma_plan, s);
    float d[N / 2];
    operand x, y;
    start_wgmma<T, N, transpose_b>(s, a, d, x, y);
    ptx::wgmma_ss<T, transpose_b>(d, x.first, y.first, static_cast<int>(a.bytes));
    ptx::wgmma_commit();
    ptx::wgmma_ss<T, transpose_b>(d, x.second, y.second, 1);
    end_wgmma(a, d);
}

template <class T, int N, int transpose_b>
PBS_KERNEL(128, 1)
wgmma_rs(const __grid_constant__ case_args a) {
    PBS_SHARED(wgmma_plan, s);
    float d[N / 2];
    uint32_t p[8];
    operand x, y;
    PBS_UNROLL
    for (uint32_t i = 0; i < 8; i++) p[i] = a.in[threadIdx.x * 8 + i];
    ptx::fence_registers(p);
    start_wgmma<T, N, transpose_b>(s, a, d, x, y);
    ptx::wgmma_rs<T, transpose_b>(d, p, y.first, static_cast<int>(a.bytes));
    ptx::wgmma_commit();
    ptx::wgmma_rs<T, transpose_b>(d, p + 4, y.second, 1);
    end_wgmma(a, d);
    ptx::fence_registers(p);
}

inline void add_wgmma_case(std::vector<ptx_case> &list, const char *name,
                           void (*kernel)(const case_args), int N, input in, swizzle mode,
                           int32_t accumulate) {
    ptx_case c = simple(name, kernel, 128, sizeof(wgmma_plan), WGMMA_WORDS,
                        static_cast<uint32_t>(64 * N), in, SUMS);
    c.sm90 = true;
    c.mode = mode;
    c.at[0][0] = accumulate;
    list.push_back(c);
}

template <int N> void add_wgmma_columns(std::vector<ptx_case> &list, swizzle mode) {
    const auto add = [&](const char *name, void (*kernel)(const case_args), input in, int sum) {
        add_wgmma_case(list, name, kernel, N, in, mode, sum);
    };
    add("wgmma_ss bf16, K-major", wgmma_ss<bf16, N, 0>, BF16, 1);
    add("wgmma_ss bf16, MN-major", wgmma_ss<bf16, N, 1>, BF16, 0);
    add("wgmma_ss fp16, K-major", wgmma_ss<fp16, N, 0>, FP16, 0);
    add("wgmma_ss fp16, MN-major", wgmma_ss<fp16, N, 1>, FP16, 1);
    add("wgmma_rs bf16, K-major", wgmma_rs<bf16, N, 0>, BF16, 0);
    add("wgmma_rs bf16, MN-major", wgmma_rs<bf16, N, 1>, BF16, 1);
    add("wgmma_rs fp16, K-major", wgmma_rs<fp16, N, 0>, FP16, 1);
    add("wgmma_rs fp16, MN-major", wgmma_rs<fp16, N, 1>, FP16, 0);
}

inline void add_wgmma(std::vector<ptx_case> &list) {
    for (const swizzle mode : {SWIZZLE_NONE, SWIZZLE_128B, SWIZZLE_64B, SWIZZLE_32B}) {
        add_wgmma_columns<64>(list, mode);
        add_wgmma_columns<96>(list, mode);
        add_wgmma_columns<128>(list, mode);
        add_wgmma_columns<256>(list, mode);
    }
}

} // namespace ptx_cases

#endif /* EMU_PTX_CASES_WGMMA_H */
