/* SPDX-License-Identifier: Apache-2.0
 *
 * A stable order by counting: the rank of a key is the number of keys that come before it. Exact,
 * needs no network, and gives the inverse of the order, which is what a scatter wants.
 */
#ifndef PBS_CUDA_RANK_CUH
#define PBS_CUDA_RANK_CUH

#include "ptx.cuh"

namespace pbs {

/* Descending floats as ascending integers: -0 is 0, NaN comes behind -inf. */
enum : uint32_t {
    KEY_OF_MINUS_INF = 0xff800000u,
    KEY_OF_NAN = KEY_OF_MINUS_INF + 1,
    KEY_LAST = KEY_OF_NAN + 1, /* behind every number: not in the order */
};

PBS_DEVICE uint32_t descending_key(float x) {
    if (x != x) return KEY_OF_NAN;
    if (x == 0.0f) x = 0.0f;
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

PBS_DEVICE int32_t count_below(const uint4 &key, uint32_t limit) {
    return (key.x < limit) + (key.y < limit) + (key.z < limit) + (key.w < limit);
}

/* How many of key[0, count) come before key[i]: smaller ones, and equal ones at smaller places.
 * count is a multiple of 32, key of 16 bytes; called by whole warps, lane = i % 32. */
PBS_DEVICE int32_t rank_of(const uint32_t *key, int32_t count, int32_t i) {
    const uint4 *keys = reinterpret_cast<const uint4 *>(key);
    const uint32_t own = key[i];
    const int32_t warp_first = i - i % 32, warp_end = warp_first + 32;
    int32_t rank = 0;
    for (int32_t j = 0; j < warp_first / 4; j++) rank += count_below(keys[j], own + 1);
    for (int32_t j = warp_first; j < warp_end; j++) rank += key[j] < own + (j < i);
    for (int32_t j = warp_end / 4; j < count / 4; j++) rank += count_below(keys[j], own);
    return rank;
}

} // namespace pbs

#endif /* PBS_CUDA_RANK_CUH */
