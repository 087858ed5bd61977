/* One vector of f32 by the widest registers of the file's instruction set: 16 lanes with AVX-512, 8 with AVX2 + FMA + F16C. Kernels
 * written on it are compiled once per instruction set. Private to math's `*_avx2.c` and `*_avx512.c`. */
#ifndef MATH_SIMD_H
#define MATH_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SIMD_INLINE static inline __attribute__((always_inline, unused))

#if defined(__AVX512F__)

typedef __m512 vf;
enum { LANES = 16 };

SIMD_INLINE vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
SIMD_INLINE vf vf_set(float x)
{
    return _mm512_set1_ps(x);
}
SIMD_INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
SIMD_INLINE void vf_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}
SIMD_INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
SIMD_INLINE vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
SIMD_INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
SIMD_INLINE vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
SIMD_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
/* c - a b */
SIMD_INLINE vf vf_fnma(vf a, vf b, vf c)
{
    return _mm512_fnmadd_ps(a, b, c);
}
/* b if either is NaN */
SIMD_INLINE vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
SIMD_INLINE vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
SIMD_INLINE float vf_sum(vf a)
{
    return _mm512_reduce_add_ps(a);
}
SIMD_INLINE float vf_top(vf a)
{
    return _mm512_reduce_max_ps(a);
}
SIMD_INLINE float vf_first(vf a)
{
    return _mm512_cvtss_f32(a);
}

/* The first n lanes, 0 <= n <= LANES; the others are 0 or left alone. */
SIMD_INLINE __mmask16 vf_mask(int n)
{
    return (__mmask16)((1u << n) - 1);
}
SIMD_INLINE vf vf_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(vf_mask(n), p);
}
SIMD_INLINE void vf_store_n(float *p, vf a, int n)
{
    _mm512_mask_storeu_ps(p, vf_mask(n), a);
}
SIMD_INLINE vf vf_first_n(vf a, vf other, int n)
{
    return _mm512_mask_blend_ps(vf_mask(n), other, a);
}

SIMD_INLINE vf vf_from_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
SIMD_INLINE vf vf_from_f16_n(const uint16_t *p, int n)
{
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(vf_mask(n), p));
}
SIMD_INLINE void vf_to_f16(uint16_t *p, vf a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SIMD_INLINE void vf_to_f16_n(uint16_t *p, vf a, int n)
{
    _mm256_mask_storeu_epi16(p, vf_mask(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Complex product of interleaved pairs: (a0 + i a1)(c0 + i c1) … */
SIMD_INLINE vf vf_rotate_pairs(vf a, vf c)
{
    vf swapped = _mm512_permute_ps(a, 0xB1);
    return _mm512_fmaddsub_ps(a, _mm512_moveldup_ps(c), _mm512_mul_ps(swapped, _mm512_movehdup_ps(c)));
}

/* Even and odd elements of 2 LANES floats. */
SIMD_INLINE void vf_deinterleave(const float *p, vf *even, vf *odd)
{
    const __m512i index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    vf a = vf_load(p), b = vf_load(p + LANES);
    *even = _mm512_permutex2var_ps(a, index, b);
    *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(index, _mm512_set1_epi32(1)), b);
}

/* The sums of four vectors. */
SIMD_INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d)
{
    vf ab = vf_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)), cd = vf_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vf x = vf_add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
}

SIMD_INLINE vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* p 2^n for an integer n in [-126, 127]; 0 where x < least */
SIMD_INLINE vf vf_scale(vf p, vf n, vf x, vf least)
{
    __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), p, _mm512_castsi512_ps(bits));
}

/* p 2^n, where n is what adding 1.5 2^23 left in the low bits of t */
SIMD_INLINE vf vf_scale_magic(vf p, vf t)
{
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
/* Whether some lane of a is greater. */
SIMD_INLINE int vf_any_above(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}

#else

typedef __m256 vf;
enum { LANES = 8 };

SIMD_INLINE vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
SIMD_INLINE vf vf_set(float x)
{
    return _mm256_set1_ps(x);
}
SIMD_INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
SIMD_INLINE void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}
SIMD_INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
SIMD_INLINE vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
SIMD_INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
SIMD_INLINE vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
SIMD_INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
/* c - a b */
SIMD_INLINE vf vf_fnma(vf a, vf b, vf c)
{
    return _mm256_fnmadd_ps(a, b, c);
}
/* b if either is NaN */
SIMD_INLINE vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
SIMD_INLINE vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
SIMD_INLINE float vf_first(vf a)
{
    return _mm256_cvtss_f32(a);
}
SIMD_INLINE float vf_sum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
SIMD_INLINE float vf_top(vf a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

/* The first n lanes, 0 <= n <= LANES; the others are 0 or left alone. */
SIMD_INLINE __m256i vf_mask(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SIMD_INLINE vf vf_load_n(const float *p, int n)
{
    return _mm256_maskload_ps(p, vf_mask(n));
}
SIMD_INLINE void vf_store_n(float *p, vf a, int n)
{
    _mm256_maskstore_ps(p, vf_mask(n), a);
}
SIMD_INLINE vf vf_first_n(vf a, vf other, int n)
{
    return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(vf_mask(n)));
}

SIMD_INLINE vf vf_from_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
SIMD_INLINE vf vf_from_f16_n(const uint16_t *p, int n)
{
    uint16_t x[LANES] = {0};
    memcpy(x, p, (size_t)n * sizeof *x);
    return vf_from_f16(x);
}
SIMD_INLINE void vf_to_f16(uint16_t *p, vf a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SIMD_INLINE void vf_to_f16_n(uint16_t *p, vf a, int n)
{
    uint16_t x[LANES];
    vf_to_f16(x, a);
    memcpy(p, x, (size_t)n * sizeof *x);
}

/* Complex product of interleaved pairs: (a0 + i a1)(c0 + i c1) … */
SIMD_INLINE vf vf_rotate_pairs(vf a, vf c)
{
    vf swapped = _mm256_permute_ps(a, 0xB1);
    return _mm256_fmaddsub_ps(a, _mm256_moveldup_ps(c), _mm256_mul_ps(swapped, _mm256_movehdup_ps(c)));
}

SIMD_INLINE vf vf_order_quarters(vf a)
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xD8));
}
/* Even and odd elements of 2 LANES floats. */
SIMD_INLINE void vf_deinterleave(const float *p, vf *even, vf *odd)
{
    vf a = vf_load(p), b = vf_load(p + LANES);
    *even = vf_order_quarters(_mm256_shuffle_ps(a, b, 0x88));
    *odd = vf_order_quarters(_mm256_shuffle_ps(a, b, 0xDD));
}

/* The sums of four vectors. */
SIMD_INLINE __m128 vf_sum4(vf a, vf b, vf c, vf d)
{
    vf ab = vf_add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), cd = vf_add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    vf x = vf_add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
    return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

SIMD_INLINE vf vf_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* p 2^n for an integer n in [-126, 127]; 0 where x < least */
SIMD_INLINE vf vf_scale(vf p, vf n, vf x, vf least)
{
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), _mm256_mul_ps(p, _mm256_castsi256_ps(bits)));
}

/* p 2^n, where n is what adding 1.5 2^23 left in the low bits of t */
SIMD_INLINE vf vf_scale_magic(vf p, vf t)
{
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
/* Whether some lane of a is greater. */
SIMD_INLINE int vf_any_above(vf a, vf b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

#endif

/* exp(r) for |r| <= ln(2)/2: the polynomial of Cephes' expf. */
SIMD_INLINE vf vf_exp_reduced(vf r)
{
    vf p = vf_fma(vf_set(1.9875691500e-4f), r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    return vf_fma(vf_mul(r, r), p, vf_add(r, vf_set(1)));
}

/* x - n ln(2) in two steps, exact to rounding. */
SIMD_INLINE vf vf_exp_reduce(vf x, vf n)
{
    return vf_fnma(n, vf_set(-2.12194440e-4f), vf_fnma(n, vf_set(0.693359375f), x));
}

/* exp(x): 0 below -87.3 (no denormals; -INFINITY included), exp(88) above 88, NaN for NaN. Relative error below 2e-7
 * (tests/test_vector.c). */
SIMD_INLINE vf vf_exp(vf x)
{
    const vf least = vf_set(-87.3f);
    vf y = vf_min(vf_set(88.0f), vf_max(least, x));
    vf n = vf_round(vf_mul(y, vf_set(1.44269504f)));
    return vf_scale(vf_exp_reduced(vf_exp_reduce(y, n)), n, x, least);
}

#endif
