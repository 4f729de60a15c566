/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of vec.h in portable C: VEC_EMU lanes in a struct. It runs the skeletons of every
 * instruction set on any machine and under the sanitizers, slowly.
 */
#ifndef PBS_CPU_VEC_EMU_H
#define PBS_CPU_VEC_EMU_H

enum { VL = VEC_EMU, TILE_ROWS = VEC_EMU == 8 ? 6 : 8 };

typedef struct vf {
    float lane[VL];
} vf;

#define EACH_LANE for (int i = 0; i < VL; i++)

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE vf vf_set1(float x) {
    vf r;
    EACH_LANE r.lane[i] = x;
    return r;
}

INLINE vf vf_zero(void) { return vf_set1(0.0f); }

/* Words travel as integers here: a pair of bf16 may look like a signalling NaN. */
INLINE vf vf_broadcast(const float *at) {
    vf r;
    EACH_LANE memcpy(&r.lane[i], at, sizeof *at);
    return r;
}

INLINE vf vf_load(const float *at) {
    vf r;
    memcpy(&r, at, sizeof r);
    return r;
}

INLINE void vf_store(float *at, vf x) { memcpy(at, &x, sizeof x); }

INLINE vf vf_add(vf x, vf y) {
    EACH_LANE x.lane[i] += y.lane[i];
    return x;
}

INLINE vf vf_sub(vf x, vf y) {
    EACH_LANE x.lane[i] -= y.lane[i];
    return x;
}

INLINE vf vf_mul(vf x, vf y) {
    EACH_LANE x.lane[i] *= y.lane[i];
    return x;
}

INLINE vf vf_max(vf x, vf y) {
    EACH_LANE x.lane[i] = x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i];
    return x;
}

/* The product of two floats is exact in double; fmaf would be a call per lane. */
INLINE vf vf_fma(vf a, vf b, vf c) {
    EACH_LANE c.lane[i] = (float)((double)a.lane[i] * (double)b.lane[i] + (double)c.lane[i]);
    return c;
}

/* Halves onto halves, as the shuffles of the real units do. */
INLINE float vf_hmax(vf x) {
    for (int n = VL / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            if (x.lane[i + n] > x.lane[i]) x.lane[i] = x.lane[i + n];
    return x.lane[0];
}

INLINE float vf_hadd(vf x) {
    for (int n = VL / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) x.lane[i] += x.lane[i + n];
    return x.lane[0];
}

INLINE vf vf_split(vf v, vf *whole) {
    EACH_LANE {
        float x = v.lane[i] < -127.0f ? -127.0f : v.lane[i];
        whole->lane[i] = floorf(x);
        v.lane[i] = x - whole->lane[i];
    }
    return v;
}

INLINE vf vf_ldexp(vf p, vf whole) {
    EACH_LANE {
        float n = whole.lane[i];
        p.lane[i] *= n < 128.0f ? float_of((uint32_t)((int32_t)n + 127) << 23) : n; /* inf, NaN */
    }
    return p;
}

INLINE void vf_transpose(vf rows[VL]) {
    vf from[VL];
    memcpy(from, rows, sizeof from);
    for (int r = 0; r < VL; r++) EACH_LANE memcpy(&rows[r].lane[i], &from[i].lane[r], 4);
}

INLINE float float_from_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x400u) return float_of(sign | ((rest << 13) + 0x38000000u));
    float tiny = (float)rest * 0x1p-24f;
    return sign ? -tiny : tiny;
}

INLINE uint16_t fp16_from_float(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (rest >> 13 & 0x1ffu));
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (rest < 0x38800000u) /* below 2^-14: the addition rounds to a multiple of 2^-24 */
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) & 0x7ffu));
    return (uint16_t)(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

INLINE float float_from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE uint16_t bf16_from_float(float x) {
    uint32_t bits = bits_of(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

INLINE vf vf_load_as(pbs_dtype dtype, const void *at, int64_t n) {
    vf r = vf_zero();
    int count = n < VL ? (int)n : VL;
    if (dtype == PBS_DTYPE_FP32) {
        if (count > 0) memcpy(&r, at, (size_t)count * 4);
        return r;
    }
    for (int i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, (const char *)at + 2 * i, 2);
        r.lane[i] = dtype == PBS_DTYPE_FP16 ? float_from_fp16(half) : float_from_bf16(half);
    }
    return r;
}

INLINE void vf_store_as(pbs_dtype dtype, void *at, int64_t n, vf x) {
    int count = n < VL ? (int)n : VL;
    if (dtype == PBS_DTYPE_FP32) {
        if (count > 0) memcpy(at, &x, (size_t)count * 4);
        return;
    }
    for (int i = 0; i < count; i++) {
        float f = x.lane[i];
        uint16_t half = dtype == PBS_DTYPE_FP16 ? fp16_from_float(f) : bf16_from_float(f);
        memcpy((char *)at + 2 * i, &half, 2);
    }
}

#if VEC_PAIRS
/* As VDPBF16PS and VCVTNE2PS2BF16 do: denormals count as 0. */
INLINE float no_denormal(float x) { return x < FLT_MIN && x > -FLT_MIN ? 0.0f : x; }

INLINE vf vf_dot2(vf acc, vf a, vf b) {
    EACH_LANE {
        uint32_t x = bits_of(a.lane[i]), y = bits_of(b.lane[i]);
        float high = no_denormal(float_of(x & 0xffff0000u)) * no_denormal(float_of(y & 0xffff0000u));
        float low = no_denormal(float_of(x << 16)) * no_denormal(float_of(y << 16));
        acc.lane[i] = no_denormal(no_denormal(acc.lane[i] + high) + low);
    }
    return acc;
}

INLINE void vf_store_pairs(void *at, vf x, vf y) {
    uint16_t half[2 * VL];
    EACH_LANE {
        half[i] = bf16_from_float(no_denormal(x.lane[i]));
        half[VL + i] = bf16_from_float(no_denormal(y.lane[i]));
    }
    memcpy(at, half, sizeof half);
}

INLINE vf vf_load_pairs(const void *x, const void *y, int64_t n) {
    vf r = vf_zero();
    for (int i = 0; i < VL && i < n; i++) {
        uint16_t low, high;
        memcpy(&low, (const char *)x + 2 * i, 2);
        memcpy(&high, (const char *)y + 2 * i, 2);
        uint32_t word = (uint32_t)high << 16 | low;
        memcpy(&r.lane[i], &word, 4);
    }
    return r;
}
#endif

#endif /* PBS_CPU_VEC_EMU_H */
