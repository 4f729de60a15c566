/* SPDX-License-Identifier: Apache-2.0
 *
 * bf16 and fp16 by bits, rounded to nearest even as cvt.rn does; every NaN becomes 0x7fff. Apart
 * from csrc/cpu/convert.h on purpose: tests hold results of the one against those of the other.
 */
#ifndef EMU_FLOAT16_H
#define EMU_FLOAT16_H

#include <stdint.h>
#include <string.h>

namespace emu {

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

/* Exponents differ in their bias, 127 against 15; the product is exact, subnormals included. */
static inline float fp16_to_float(uint16_t h) {
    const uint32_t magnitude = h & 0x7fffu;
    uint32_t bits = float_bits(bits_float(magnitude << 13) * 0x1p112f);
    if (magnitude >= 0x7c00) bits = magnitude << 13 | 0x7f800000u;
    return bits_float(bits | (h & 0x8000u) << 16);
}

static inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t float_to_fp16(float x) {
    const uint32_t sign = float_bits(x) >> 16 & 0x8000u, magnitude = float_bits(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00); /* 65520 and more */
    if (magnitude < 0x38800000u) { /* below 2^-14: the sum's last bit is worth 2^-24 */
        const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

} // namespace emu

#endif /* EMU_FLOAT16_H */
