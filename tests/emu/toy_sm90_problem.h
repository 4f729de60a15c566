/* SPDX-License-Identifier: Apache-2.0
 *
 * What toy_sm90.cuh is asked, and the answer in fp64: for the emulation and for a GPU.
 */
#ifndef EMU_TOY_SM90_PROBLEM_H
#define EMU_TOY_SM90_PROBLEM_H

#include "check.h"
#include "float16.h"
#include "toy_sm90.cuh"

#include <math.h>
#include <vector>

namespace toy90 {

/* [heads, len, head_dim], rows in chunks as wide as the swizzle. */
template <int D>
bool make_map(tensor_map *map, const uint16_t *base, int heads, int len, int box_rows) {
    constexpr int chunk = tile<D>::CHUNK;
    const tensor_shape shape = {base,
                                4,
                                {chunk, len, D / chunk, heads, 1},
                                {0, 2 * D, 2 * chunk, 2 * D * len, 0},
                                {chunk, box_rows, D / chunk, 1, 1},
                                tile<D>::MODE};
    return make_tensor_map(map, shape) == PBS_OK;
}

template <int D> struct attention {
    int heads, len_q, len_k;
    std::vector<uint16_t> q, k, v;
    std::vector<double> expected, tolerance;

    attention(int heads, int len_q, int len_k) : heads(heads), len_q(len_q), len_k(len_k) {
        emu_test::rng r(1);
        fill(q, len_q, r);
        fill(k, len_k, r);
        fill(v, len_k, r);
        expected.resize(q.size());
        tolerance.resize(q.size());
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < len_q; i++) solve(h, i);
    }

    void fill(std::vector<uint16_t> &rows, int len, emu_test::rng &r) const {
        rows.resize(static_cast<size_t>(heads * len * D));
        for (uint16_t &x : rows) x = emu::float_to_bf16(r.uniform(-2, 2));
    }

    static double scale() { return 1 / sqrt(D); }

    /* One row in fp64. P is rounded to bf16 (2^-9 of each term), and so is the result. */
    void solve(int head, int i) {
        const uint16_t *row = &q[static_cast<size_t>((head * len_q + i) * D)];
        std::vector<double> p(static_cast<size_t>(len_k)), out(D), sizes(D);
        double sum = 0;
        for (int j = 0; j < len_k; j++) {
            const uint16_t *key = &k[static_cast<size_t>((head * len_k + j) * D)];
            float s = 0;
            for (int d = 0; d < D; d++)
                s += emu::bf16_to_float(row[d]) * emu::bf16_to_float(key[d]);
            sum += p[static_cast<size_t>(j)] = exp(static_cast<double>(s) * scale());
        }
        for (int j = 0; j < len_k; j++)
            for (int d = 0; d < D; d++) {
                const double x =
                    p[static_cast<size_t>(j)] / sum *
                    emu::bf16_to_float(v[static_cast<size_t>((head * len_k + j) * D + d)]);
                out[static_cast<size_t>(d)] += x;
                sizes[static_cast<size_t>(d)] += fabs(x);
            }
        for (int d = 0; d < D; d++) {
            const size_t at = static_cast<size_t>((head * len_q + i) * D + d);
            expected[at] = out[static_cast<size_t>(d)];
            tolerance[at] = 0x1p-8 * (sizes[static_cast<size_t>(d)] + fabs(expected[at]));
        }
    }

    /* q, k, v and out as the kernel takes them, wherever they lie. */
    bool make_maps(tensor_map (&maps)[4], const uint16_t *q_at, const uint16_t *k_at,
                   const uint16_t *v_at, const uint16_t *out_at) const {
        constexpr int n = tile<D>::BLOCK_N;
        return make_map<D>(&maps[0], q_at, heads, len_q, GROUP_ROWS) &&
               make_map<D>(&maps[1], k_at, heads, len_k, n) &&
               make_map<D>(&maps[2], v_at, heads, len_k, n) &&
               make_map<D>(&maps[3], out_at, heads, len_q, GROUP_ROWS);
    }

    params make_params() const {
        return {heads, len_q, len_k, (len_q + BLOCK_M - 1) / BLOCK_M,
                static_cast<float>(scale() * 1.4426950408889634)};
    }

    bool right(const std::vector<uint16_t> &out) const {
        for (size_t i = 0; i < out.size(); i++)
            if (!(fabs(emu::bf16_to_float(out[i]) - expected[i]) <= tolerance[i])) return false;
        return true;
    }
};

} // namespace toy90

#endif /* EMU_TOY_SM90_PROBLEM_H */
