/* SPDX-License-Identifier: Apache-2.0
 *
 * Rules on a device: one warp turns a row of log masses into bits (core/rule.c says what they
 * mean).
 *
 * Every rule comes down to a cut through the order "mass descending, index ascending": keep all
 * masses above a key, and the first few of those equal to it. Masses are >= 0, so their bits,
 * read as integers, are keys in the same order. Nothing is sorted: the cut is found by halving the
 * range of keys, and every sum on the way is one of integers (masses in fixed point), which no
 * order of adding can change.
 */
#ifndef PBS_CUDA_RULE_CUH
#define PBS_CUDA_RULE_CUH

#include <math.h>

#include "../core/geometry.h"
#include "ptx.cuh"

namespace pbs {

constexpr unsigned WHOLE_WARP = 0xffffffffu;
constexpr uint32_t KEY_ABOVE_ONE = 0x3f800001u; /* the largest mass of a row is 1 */

PBS_DEVICE int32_t lane_id() { return static_cast<int32_t>(threadIdx.x % 32); }

template <class N> PBS_DEVICE N warp_sum(N x) {
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, lanes);
    return x;
}

PBS_DEVICE float warp_max(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(WHOLE_WARP, x, lanes));
    return x;
}

PBS_DEVICE uint32_t warp_max(uint32_t x) {
    for (int lanes = 16; lanes; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(WHOLE_WARP, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

/* Blocks with a key above `key` stay, and the first `ties` of those that have it. */
struct rule_cut {
    uint32_t key;
    int32_t ties;
};

PBS_DEVICE rule_cut keep_all() { return {0, INT32_MAX}; }
PBS_DEVICE rule_cut keep_none() { return {UINT32_MAX, 0}; }

/* One row: masses [n], in place of the log masses that it came with. */
struct rule_row {
    float *mass;
    int32_t n;
    float scale; /* of fixed point; 0: every block weighs 1 */
};

PBS_DEVICE uint64_t weight_of(const rule_row &row, float mass) {
    return row.scale > 0.0f ? static_cast<uint64_t>(mass * row.scale) : 1;
}

/* Largest power of two with which n masses of at most 1 add up to less than 2^63. */
PBS_DEVICE float fixed_point(int32_t n) {
    float scale = 0x1p62f;
    for (int32_t m = n - 1; m > 0; m /= 2) scale *= 0.5f;
    return scale;
}

/* What the blocks with keys from `key` on weigh together, and how many they are. */
struct tally {
    uint64_t weight;
    int32_t count;
};

PBS_DEVICE tally tally_from(const rule_row &row, uint32_t key) {
    tally t = {0, 0};
    for (int32_t i = lane_id(); i < row.n; i += 32) {
        const float mass = row.mass[i];
        if (__float_as_uint(mass) < key) continue;
        t.weight += weight_of(row, mass);
        t.count++;
    }
    t.weight = warp_sum(t.weight);
    t.count = warp_sum(t.count);
    return t;
}

PBS_DEVICE uint32_t largest_key_below(const rule_row &row, uint32_t key) {
    uint32_t largest = 0;
    for (int32_t i = lane_id(); i < row.n; i += 32) {
        const uint32_t own = __float_as_uint(row.mass[i]);
        if (own < key && own > largest) largest = own;
    }
    return warp_max(largest);
}

/* The smallest prefix that weighs at least `needed`; 0 < needed <= the weight of the row. The block
 * that reaches it has its key in [low, high) always, and is found when no other key lies there. */
PBS_DEVICE rule_cut find_cut(const rule_row &row, uint64_t needed) {
    uint32_t low = 0, high = KEY_ABOVE_ONE;
    int32_t from_low = row.n;
    tally above = {0, 0}; /* from high on */
    while (high - low > 1 && from_low - above.count > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const tally t = tally_from(row, middle);
        if (t.weight >= needed) {
            low = middle;
            from_low = t.count;
        } else {
            high = middle;
            above = t;
        }
    }
    const uint32_t key = largest_key_below(row, high);
    const uint64_t each = weight_of(row, __uint_as_float(key));
    return {key, static_cast<int32_t>((needed - above.weight + each - 1) / each)};
}

/* The largest log mass; NaN if any is. */
PBS_DEVICE float largest(const rule_row &row) {
    float most = -INFINITY;
    bool nan = false;
    for (int32_t i = lane_id(); i < row.n; i += 32) {
        const float x = row.mass[i];
        nan = nan || x != x;
        most = fmaxf(most, x);
    }
    return __any_sync(WHOLE_WARP, nan) ? NAN : warp_max(most);
}

/* Log masses -> masses over e^base. The lanes keep to their own blocks. */
PBS_DEVICE void to_masses(const rule_row &row, float base) {
    for (int32_t i = lane_id(); i < row.n; i += 32) row.mass[i] = expf(row.mass[i] - base);
}

/* Log masses -> masses with 1 at the largest, 0 if all are. */
PBS_DEVICE void to_relative_masses(const rule_row &row, float most) {
    if (most > -INFINITY) {
        to_masses(row, most);
        return;
    }
    for (int32_t i = lane_id(); i < row.n; i += 32) row.mass[i] = 0.0f;
}

PBS_DEVICE rule_cut prefix_cut(rule_row row, float tau) {
    const float most = largest(row);
    if (most != most || !(tau < 1.0f)) return keep_all();
    row.scale = fixed_point(row.n);
    to_relative_masses(row, most);
    const double needed = static_cast<double>(tau) * static_cast<double>(tally_from(row, 0).weight);
    if (!(needed > 0.0)) return keep_none();
    return find_cut(row, static_cast<uint64_t>(ceil(needed)));
}

PBS_DEVICE rule_cut budget_cut(rule_row row, float tau) {
    const float most = largest(row);
    if (most != most || !(tau < static_cast<float>(row.n))) return keep_all();
    if (!(tau > 0.0f)) return keep_none();
    row.scale = 0.0f;
    to_relative_masses(row, most);
    return find_cut(row, static_cast<uint64_t>(ceilf(tau)));
}

/* mass >= tau; NaN stays: as an integer it lies above every number. */
PBS_DEVICE rule_cut at_least_cut(const rule_row &row, float tau, bool relative) {
    const float most = relative ? largest(row) : 0.0f;
    to_masses(row, most > -INFINITY ? most : 0.0f);
    if (!(tau > 0.0f)) return keep_all();
    return {__float_as_uint(tau) - 1, 0};
}

/* Leaves masses of some normalisation in log_mass [n], to be read with the cut. */
PBS_DEVICE rule_cut apply_rule(pbs_rule rule, float tau, float *log_mass, int32_t n) {
    const rule_row row = {log_mass, n, 0.0f};
    switch (rule) {
    case PBS_RULE_PREFIX: return prefix_cut(row, tau);
    case PBS_RULE_BUDGET: return budget_cut(row, tau);
    case PBS_RULE_RELATIVE: return at_least_cut(row, tau, true);
    case PBS_RULE_ABSOLUTE:
    default: return at_least_cut(row, tau, false);
    }
}

/* Word w of the bits of a row; words in order, `ties` counts what earlier ones met. */
PBS_DEVICE uint32_t kept_word(const float *mass, int32_t n, int32_t w, rule_cut cut,
                              int32_t &ties) {
    const int32_t i = 32 * w + lane_id();
    const uint32_t key = i < n ? __float_as_uint(mass[i]) : 0;
    const uint32_t tied = __ballot_sync(WHOLE_WARP, i < n && key == cut.key);
    const int32_t before = ties + __popc(tied & ((1u << lane_id()) - 1));
    const bool keep = key > cut.key || (key == cut.key && before < cut.ties);
    ties += __popc(tied);
    return __ballot_sync(WHOLE_WARP, i < n && keep);
}

} // namespace pbs

#endif /* PBS_CUDA_RULE_CUH */
