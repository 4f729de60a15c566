/* SPDX-License-Identifier: Apache-2.0
 *
 * fp32 <-> bf16 / fp16 in portable C, round to nearest even, and rows of a tensor as fp32.
 */
#ifndef PBS_CPU_CONVERT_H
#define PBS_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "../core/view.h"
#include "kernels.h"

static inline float pbs_float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t pbs_bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float pbs_bf16_to_fp32(uint16_t h) { return pbs_float_from_bits((uint32_t)h << 16); }

static inline uint16_t pbs_fp32_to_bf16(float x) {
    uint32_t u = pbs_bits_of_float(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40); /* quiet NaN */
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

static inline float pbs_fp16_to_fp32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return pbs_float_from_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return pbs_float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float x = (float)mantissa * 0x1p-24f; /* subnormal or zero */
    return sign ? -x : x;
}

static inline uint16_t pbs_fp32_to_fp16(float x) {
    uint32_t u = pbs_bits_of_float(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);  /* NaN */
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (a < 0x38800000u) { /* subnormal: adding 0.5 lets the FPU round at 2^-24 */
        float shifted = pbs_float_from_bits(a) + 0.5f;
        return (uint16_t)(sign | (pbs_bits_of_float(shifted) - 0x3f000000u));
    }
    a -= 0x38000000u; /* rebias the exponent from 127 to 15 */
    return (uint16_t)(sign | (a + 0xfffu + (a >> 13 & 1)) >> 13);
}

/* Row i as the caller's memory has it. */
static inline const void *pbs_row(const pbs_rows *rows, int32_t i) {
    int64_t row = rows->index ? rows->index[i] : i;
    return (const char *)rows->base + row * rows->stride * (int64_t)pbs_dtype_size(rows->dtype);
}

static inline void pbs_load(const void *from, pbs_dtype dtype, int32_t n, float *to) {
    const uint16_t *half = (const uint16_t *)from;
    switch (dtype) {
    case PBS_DTYPE_FP32: memcpy(to, from, (size_t)n * sizeof *to); break;
    case PBS_DTYPE_BF16:
        for (int32_t d = 0; d < n; d++) to[d] = pbs_bf16_to_fp32(half[d]);
        break;
    case PBS_DTYPE_FP16:
        for (int32_t d = 0; d < n; d++) to[d] = pbs_fp16_to_fp32(half[d]);
        break;
    }
}

static inline void pbs_store(void *to, pbs_dtype dtype, int32_t n, const float *from) {
    uint16_t *half = (uint16_t *)to;
    switch (dtype) {
    case PBS_DTYPE_FP32: memcpy(to, from, (size_t)n * sizeof *from); break;
    case PBS_DTYPE_BF16:
        for (int32_t d = 0; d < n; d++) half[d] = pbs_fp32_to_bf16(from[d]);
        break;
    case PBS_DTYPE_FP16:
        for (int32_t d = 0; d < n; d++) half[d] = pbs_fp32_to_fp16(from[d]);
        break;
    }
}

static inline void pbs_load_row(const pbs_rows *rows, int32_t i, int32_t head_dim, float *to) {
    pbs_load(pbs_row(rows, i), rows->dtype, head_dim, to);
}

#endif /* PBS_CPU_CONVERT_H */
