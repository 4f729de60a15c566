/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of vec.h in AVX-512 F, BW, DQ and VL, and with VEC_PAIRS also BF16.
 */
#ifndef PBS_CPU_VEC_AVX512_H
#define PBS_CPU_VEC_AVX512_H

#include <immintrin.h>

/* 8 x 2 accumulators: two VDPBF16PS pipes of latency 6 need 12. */
enum { VL = 16, TILE_ROWS = 8 };

typedef __m512 vf;

INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_broadcast(const float *at) { return _mm512_set1_ps(*at); }
INLINE vf vf_load(const float *at) { return _mm512_loadu_ps(at); }
INLINE void vf_store(float *at, vf x) { _mm512_storeu_ps(at, x); }
INLINE vf vf_add(vf x, vf y) { return _mm512_add_ps(x, y); }
INLINE vf vf_sub(vf x, vf y) { return _mm512_sub_ps(x, y); }
INLINE vf vf_mul(vf x, vf y) { return _mm512_mul_ps(x, y); }
INLINE vf vf_max(vf x, vf y) { return _mm512_max_ps(x, y); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float vf_hmax(vf x) { return _mm512_reduce_max_ps(x); }
INLINE float vf_hadd(vf x) { return _mm512_reduce_add_ps(x); }

/* VSCALEFPS takes the floor by itself, so "whole" is v. */
INLINE vf vf_split(vf v, vf *whole) {
    *whole = v;
    return _mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF);
}

INLINE vf vf_ldexp(vf p, vf whole) {
    __mmask16 normal = _mm512_cmp_ps_mask(whole, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

INLINE void vf_transpose(vf rows[VL]) {
    vf pair[VL], quad[VL];
    UNROLL for (int i = 0; i < VL; i += 2) {
        pair[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < VL; i += 4) {
        quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    /* quad[4 g + i], lane L = column 4 L + i of rows 4 g to 4 g + 3 */
    UNROLL for (int i = 0; i < 4; i++) {
        vf even01 = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88);
        vf even23 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
        vf odd01 = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xdd);
        vf odd23 = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(even01, even23, 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        rows[i + 12] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}

INLINE __mmask16 vf_first(int64_t n) {
    return (__mmask16)(n >= VL ? 0xffffu : n > 0 ? (1u << n) - 1u : 0u);
}

INLINE vf vf_load_as(pbs_dtype dtype, const void *at, int64_t n) {
    __mmask16 first = vf_first(n);
    if (dtype == PBS_DTYPE_FP32) return _mm512_maskz_loadu_ps(first, at);
    __m256i half = _mm256_maskz_loadu_epi16(first, at);
    if (dtype == PBS_DTYPE_FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m256i vf_to_bf16(vf x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    even = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(even, 16));
}

INLINE void vf_store_as(pbs_dtype dtype, void *at, int64_t n, vf x) {
    __mmask16 first = vf_first(n);
    if (dtype == PBS_DTYPE_FP32)
        _mm512_mask_storeu_ps(at, first, x);
    else if (dtype == PBS_DTYPE_FP16)
        _mm256_mask_storeu_epi16(at, first, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm256_mask_storeu_epi16(at, first, vf_to_bf16(x));
}

#if VEC_PAIRS
INLINE vf vf_dot2(vf acc, vf a, vf b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
}

INLINE vf vf_to_pairs(vf x, vf y) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(y, x));
}

INLINE vf vf_pair_of_ones(void) { return _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)); }

INLINE vf vf_load_pairs(const void *x, const void *y, int64_t n) {
    __mmask16 first = vf_first(n);
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, x));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, y));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

#endif /* PBS_CPU_VEC_AVX512_H */
