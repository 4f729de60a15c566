/* SPDX-License-Identifier: Apache-2.0
 *
 * The vocabulary of vec.h in AVX2, FMA and F16C.
 */
#ifndef PBS_CPU_VEC_AVX2_H
#define PBS_CPU_VEC_AVX2_H

#include <immintrin.h>

/* 6 x 2 accumulators: the 12 that two FMA pipes of latency 4 to 5 need, and 4 registers for the
 * operands. */
enum { VL = 8, TILE_ROWS = 6 };

typedef __m256 vf;

INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_broadcast(const float *at) { return _mm256_broadcast_ss(at); }
INLINE vf vf_load(const float *at) { return _mm256_loadu_ps(at); }
INLINE void vf_store(float *at, vf x) { _mm256_storeu_ps(at, x); }
INLINE vf vf_add(vf x, vf y) { return _mm256_add_ps(x, y); }
INLINE vf vf_sub(vf x, vf y) { return _mm256_sub_ps(x, y); }
INLINE vf vf_mul(vf x, vf y) { return _mm256_mul_ps(x, y); }
INLINE vf vf_max(vf x, vf y) { return _mm256_max_ps(x, y); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }

INLINE float vf_hmax(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

INLINE float vf_hadd(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* At -127 the exponent field that vf_ldexp builds is 0, and so is the product. */
INLINE vf vf_split(vf v, vf *whole) {
    v = _mm256_max_ps(_mm256_set1_ps(-127.0f), v);
    *whole = _mm256_floor_ps(v);
    return _mm256_sub_ps(v, *whole);
}

INLINE vf vf_ldexp(vf p, vf whole) {
    __m256i n = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(n, 23)));
}

INLINE void vf_transpose(vf rows[VL]) {
    vf pair[VL], quad[VL];
    UNROLL for (int i = 0; i < VL; i += 2) {
        pair[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < VL; i += 4) {
        quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
        quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

/* The lanes of a vector that does not fill up go through memory: head_dim is a multiple of 8, so
 * only odd depths of gemm_nt come here. */
INLINE vf vf_load_as(pbs_dtype dtype, const void *at, int64_t n) {
    if (n <= 0) return vf_zero();
    float part[VL] = {0};
    if (n < VL) {
        memcpy(part, at, (size_t)n * (dtype == PBS_DTYPE_FP32 ? 4 : 2));
        at = part;
    }
    if (dtype == PBS_DTYPE_FP32) return vf_load(at);
    __m128i half = _mm_loadu_si128((const __m128i *)at);
    if (dtype == PBS_DTYPE_FP16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE __m128i vf_to_bf16(vf x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

INLINE void vf_store_as(pbs_dtype dtype, void *at, int64_t n, vf x) {
    if (n <= 0) return;
    size_t bytes = (size_t)(n < VL ? n : VL) * (dtype == PBS_DTYPE_FP32 ? 4 : 2);
    float part[VL];
    void *to = n < VL ? part : at;
    if (dtype == PBS_DTYPE_FP32)
        vf_store(to, x);
    else if (dtype == PBS_DTYPE_FP16)
        _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm_storeu_si128((__m128i *)to, vf_to_bf16(x));
    if (n < VL) memcpy(at, part, bytes);
}

#endif /* PBS_CPU_VEC_AVX2_H */
