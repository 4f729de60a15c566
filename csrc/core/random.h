/* SPDX-License-Identifier: Apache-2.0
 *
 * The pseudo-random numbers of PBS_ORDER_RANDOM_QUERY and PBS_ORDER_RANDOM: a hash of a counter, so
 * that a value depends on (seed, head, index) alone: not on the batch, the thread or the call.
 *
 *   golden = 0x9e3779b97f4a7c15                      all arithmetic modulo 2^64
 *   mix(x) : x ^= x >> 30;  x *= 0xbf58476d1ce4e5b9;
 *            x ^= x >> 27;  x *= 0x94d049bb133111eb;
 *            x ^= x >> 31                            (the finaliser of splitmix64)
 *   hash(seed, head, index) = mix(mix(seed + golden * (head + 1)) + golden * (index + 1))
 *
 *   RANDOM_QUERY  probe row  = hash(seed, head, 0) mod q_len       relative to q_start
 *   RANDOM        score[j]   = (hash(seed, head, j) >> 40) * 2^-24  in [0, 1), exact in fp32
 *
 * head is the head that owns the permutation, 0..Hp-1; j is relative to kv_start.
 */
#ifndef PBS_CORE_RANDOM_H
#define PBS_CORE_RANDOM_H

#include <stdint.h>

#include "geometry.h"

PBS_HD uint64_t pbs_mix64(uint64_t x) {
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    x ^= x >> 31;
    return x;
}

PBS_HD uint64_t pbs_hash(uint64_t seed, int32_t head, int32_t index) {
    const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15);
    uint64_t x = pbs_mix64(seed + golden * ((uint64_t)head + 1));
    return pbs_mix64(x + golden * ((uint64_t)index + 1));
}

PBS_HD int32_t pbs_random_row(uint64_t seed, int32_t head, int32_t q_len) {
    return (int32_t)(pbs_hash(seed, head, 0) % (uint64_t)q_len);
}

PBS_HD float pbs_random_score(uint64_t seed, int32_t head, int32_t j) {
    return (float)(pbs_hash(seed, head, j) >> 40) * 0x1p-24f;
}

#endif /* PBS_CORE_RANDOM_H */
