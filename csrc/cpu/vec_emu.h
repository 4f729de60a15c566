/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of vec.h in portable C: VEC_EMU lanes in a struct. It runs the skeletons of every
 * instruction set on any machine and under the sanitizers, slowly.
 */
#ifndef PBS_CPU_VEC_EMU_H
#define PBS_CPU_VEC_EMU_H

#include "cpu/convert.h"

enum { VL = VEC_EMU, TILE_ROWS = VEC_EMU == 8 ? 6 : 8 };

typedef struct vf {
    float lane[VL];
} vf;

#define EACH_LANE for (int i = 0; i < VL; i++)

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
        p.lane[i] *=
            n < 128.0f ? pbs_float_from_bits((uint32_t)((int32_t)n + 127) << 23) : n; /* inf, NaN */
    }
    return p;
}

INLINE void vf_transpose(vf rows[VL]) {
    vf from[VL];
    memcpy(from, rows, sizeof from);
    for (int r = 0; r < VL; r++) EACH_LANE memcpy(&rows[r].lane[i], &from[i].lane[r], 4);
}

INLINE vf vf_load_as(pbs_dtype dtype, const void *at, int64_t n) {
    vf r = vf_zero();
    if (n > 0) pbs_load(at, dtype, n < VL ? (int32_t)n : VL, r.lane);
    return r;
}

INLINE void vf_store_as(pbs_dtype dtype, void *at, int64_t n, vf x) {
    if (n > 0) pbs_store(at, dtype, n < VL ? (int32_t)n : VL, x.lane);
}

#if VEC_PAIRS
/* As VDPBF16PS and VCVTNE2PS2BF16 do: denormals count as 0, the sign stays. */
INLINE float no_denormal(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

INLINE float half_of(float word, int high) {
    uint32_t bits = pbs_bits_of_float(word);
    return no_denormal(pbs_float_from_bits(high ? bits & 0xffff0000u : bits << 16));
}

INLINE vf vf_dot2(vf acc, vf a, vf b) {
    EACH_LANE for (int high = 1; high >= 0; high--) {
        float product = half_of(a.lane[i], high) * half_of(b.lane[i], high);
        acc.lane[i] = no_denormal(acc.lane[i] + product);
    }
    return acc;
}

INLINE vf vf_to_pairs(vf x, vf y) {
    uint16_t half[2 * VL];
    vf r;
    EACH_LANE {
        half[i] = pbs_fp32_to_bf16(no_denormal(x.lane[i]));
        half[VL + i] = pbs_fp32_to_bf16(no_denormal(y.lane[i]));
    }
    memcpy(&r, half, sizeof r);
    return r;
}

INLINE vf vf_pair_of_ones(void) { return vf_set1(pbs_float_from_bits(0x3f803f80u)); }

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
