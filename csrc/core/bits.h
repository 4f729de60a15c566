/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of bits: bit n % 32 of word n / 32 is block n.
 */
#ifndef PBS_CORE_BITS_H
#define PBS_CORE_BITS_H

#include "geometry.h"

PBS_HD int32_t pbs_popcount(uint32_t x) {
#if defined(__CUDA_ARCH__)
    return __popc(x);
#else
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    return (int32_t)(((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
#endif
}

/* Those of word w that lie below n. */
PBS_HD uint32_t pbs_bits_below(int32_t n, int32_t w) {
    int32_t left = n - 32 * w;
    if (left <= 0) return 0;
    return left >= 32 ? UINT32_MAX : (UINT32_C(1) << left) - 1;
}

/* Bits set below n. */
PBS_HD int32_t pbs_count_bits(const uint32_t *bits, int32_t n) {
    int32_t count = 0;
    for (int32_t w = 0; 32 * w < n; w++) count += pbs_popcount(bits[w] & pbs_bits_below(n, w));
    return count;
}

#endif /* PBS_CORE_BITS_H */
