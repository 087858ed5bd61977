#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "math/retrieval.h"
#include "math/retrieval_exp.h"
#include "math/retrieval_i4.h"

#define INLINE static inline __attribute__((always_inline))

/* ---- tables ---- */

static float lut_avx512(const float *q, const float *centroids, int n_sub, int d_sub, float *lut, float *low)
{
    __m512 widest = _mm512_setzero_ps();
    for (int s = 0; s < n_sub; s++) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < d_sub; j++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(q[s * d_sub + j]), _mm512_loadu_ps(centroids + ((size_t)s * d_sub + j) * SCAN_CODES), sum);
        _mm512_storeu_ps(lut + s * SCAN_CODES, sum);
        float least = _mm512_reduce_min_ps(sum);
        low[s] = least;
        widest = _mm512_max_ps(widest, _mm512_sub_ps(sum, _mm512_set1_ps(least)));
    }
    return _mm512_reduce_max_ps(widest);
}

static void lut_quantise_avx512(const float *lut, const float *low, float inverse_step, int n_sub, uint8_t *out)
{
    for (int s = 0; s < n_sub; s++) {
        __m512 x =
            _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(lut + s * SCAN_CODES), _mm512_set1_ps(low[s])), _mm512_set1_ps(inverse_step));
        _mm_storeu_si128((__m128i *)(out + s * SCAN_CODES),
                         _mm512_cvtusepi32_epi8(_mm512_min_epu32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(SCAN_TOP))));
    }
}

/* ---- scan ---- */

/* Four sub-vectors: a 128-bit lane holds 16 tokens of one of them. sum[h]: of the low and of the high nibbles' tokens. */
INLINE void scan_step(__m512i pair, const uint8_t *lut, size_t stride, __mmask64 mask, const int g, __m512i (*sum)[2])
{
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i low = _mm512_and_si512(pair, nibble), high = _mm512_and_si512(_mm512_srli_epi16(pair, 4), nibble);
    for (int h = 0; h < g; h++) {
        const uint8_t *from = lut + (size_t)h * stride;
        __m512i table = mask == ~(__mmask64)0 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(mask, from);
        sum[h][0] = _mm512_add_epi8(sum[h][0], _mm512_shuffle_epi8(table, low));
        sum[h][1] = _mm512_add_epi8(sum[h][1], _mm512_shuffle_epi8(table, high));
    }
}

/* Sums over the four lanes of the bytes of low and high, widened: tokens 0, 2, … 14; 1, 3, … 15; 16, 18, … ; 17, 19, … */
INLINE __m512i scan_reduce(__m512i low, __m512i high)
{
    const __m512i byte = _mm512_set1_epi16(255);
    __m512i even = _mm512_and_si512(low, byte), odd = _mm512_srli_epi16(low, 8);
    __m512i s = _mm512_add_epi16(_mm512_shuffle_i32x4(even, odd, 0x88), _mm512_shuffle_i32x4(even, odd, 0xdd));
    even = _mm512_and_si512(high, byte);
    odd = _mm512_srli_epi16(high, 8);
    __m512i u = _mm512_add_epi16(_mm512_shuffle_i32x4(even, odd, 0x88), _mm512_shuffle_i32x4(even, odd, 0xdd));
    return _mm512_add_epi16(_mm512_shuffle_i32x4(s, u, 0x88), _mm512_shuffle_i32x4(s, u, 0xdd));
}

/* Four steps add up in bytes before they are widened. */
INLINE void scan_heads(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, const int g, const uint16_t *offset,
                       uint16_t *out, int64_t stride)
{
    const __m512i order = _mm512_set_epi16(31, 23, 30, 22, 29, 21, 28, 20, 27, 19, 26, 18, 25, 17, 24, 16, 15, 7, 14, 6, 13, 5, 12, 4, 11,
                                           3, 10, 2, 9, 1, 8, 0);
    size_t bytes = (size_t)n_sub * 16, whole = bytes / 256 * 256;
    __m512i base[4];
    for (int h = 0; h < g; h++) base[h] = _mm512_set1_epi16((short)offset[h]);
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint8_t *block = codes + (size_t)b * bytes;
        __m512i total[4], sum[4][2];
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)block + 4096 + i, _MM_HINT_T0);
        for (int h = 0; h < g; h++) total[h] = _mm512_setzero_si512();
        for (size_t at = 0; at < whole; at += 256) {
            for (int h = 0; h < g; h++) sum[h][0] = sum[h][1] = _mm512_setzero_si512();
            for (size_t i = at; i < at + 256; i += 64) scan_step(_mm512_loadu_si512(block + i), lut + i, bytes, ~(__mmask64)0, g, sum);
            for (int h = 0; h < g; h++) total[h] = _mm512_add_epi16(total[h], scan_reduce(sum[h][0], sum[h][1]));
        }
        if (whole < bytes) {
            size_t i = whole;
            for (int h = 0; h < g; h++) sum[h][0] = sum[h][1] = _mm512_setzero_si512();
            for (; i + 64 <= bytes; i += 64) scan_step(_mm512_loadu_si512(block + i), lut + i, bytes, ~(__mmask64)0, g, sum);
            if (i < bytes) {
                __mmask64 mask = ((__mmask64)1 << (bytes - i)) - 1;
                scan_step(_mm512_maskz_loadu_epi8(mask, block + i), lut + i, bytes, mask, g, sum);
            }
            for (int h = 0; h < g; h++) total[h] = _mm512_add_epi16(total[h], scan_reduce(sum[h][0], sum[h][1]));
        }
        for (int h = 0; h < g; h++)
            _mm512_storeu_si512(out + h * stride + b * SCAN_BLOCK, _mm512_adds_epu16(_mm512_permutexvar_epi16(order, total[h]), base[h]));
    }
}

static void scan_avx512(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, int g, const uint16_t *offset, uint16_t *out,
                        int64_t stride)
{
    for (int h = 0; h < g; h += 4) {
        const uint8_t *table = lut + (size_t)h * (size_t)n_sub * SCAN_CODES;
        uint16_t *to = out + h * stride;
        int n = g - h;
        if (n >= 4)
            scan_heads(codes, n_sub, n_blocks, table, 4, offset + h, to, stride);
        else if (n == 3)
            scan_heads(codes, n_sub, n_blocks, table, 3, offset + h, to, stride);
        else if (n == 2)
            scan_heads(codes, n_sub, n_blocks, table, 2, offset + h, to, stride);
        else
            scan_heads(codes, n_sub, n_blocks, table, 1, offset + h, to, stride);
    }
}

static float exp_sum_avx512(const uint16_t *keys, int64_t n, float step, uint16_t *top)
{
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += SCAN_BLOCK) most = _mm512_max_epu16(most, _mm512_loadu_si512(keys + i));
    __m512i wide = _mm512_max_epu32(_mm512_and_si512(most, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(most, 16));
    *top = (uint16_t)_mm512_reduce_max_epu32(wide);
    exp_scale scale = exp_scale_make(step);
    const __m512i whole = _mm512_set1_epi16((short)scale.whole), part = _mm512_set1_epi16((short)scale.part);
    const __m512i limit = _mm512_set1_epi16((short)scale.most), peak = _mm512_set1_epi16(EXP_TOP_BITS),
                  last = _mm512_set1_epi16((short)*top);
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += SCAN_BLOCK) {
        __m512i x = _mm512_loadu_si512(keys + i), distance = _mm512_min_epu16(_mm512_sub_epi16(last, x), limit);
        __m512i below = _mm512_add_epi16(_mm512_mullo_epi16(distance, whole), _mm512_mulhi_epu16(distance, part));
        __m512i power = _mm512_maskz_subs_epu16(_mm512_test_epi16_mask(x, x), peak, below);
        sum[0] = _mm512_add_ps(sum[0], _mm512_cvtph_ps(_mm512_castsi512_si256(power)));
        sum[1] = _mm512_add_ps(sum[1], _mm512_cvtph_ps(_mm512_extracti64x4_epi64(power, 1)));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) * 0x1p-13f;
}

static void merge_avx512(const uint16_t *keys, int64_t stride, int g, const uint16_t *up, const uint16_t *down, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i += SCAN_BLOCK) {
        __m512i best = _mm512_setzero_si512();
        for (int h = 0; h < g; h++) {
            __m512i x = _mm512_adds_epu16(_mm512_loadu_si512(keys + h * stride + i), _mm512_set1_epi16((short)up[h]));
            best = _mm512_max_epu16(best, _mm512_subs_epu16(x, _mm512_set1_epi16((short)down[h])));
        }
        _mm512_storeu_si512(out + i, best);
    }
}

static int64_t count_avx512(const uint16_t *keys, int64_t n, uint16_t threshold)
{
    const __m512i limit = _mm512_set1_epi16((short)threshold), one = _mm512_set1_epi16(1);
    int64_t count = 0;
    for (int64_t i = 0; i < n;) {
        int64_t end = n - i > 32 * 32767 ? i + 32 * 32767 : n; /* so many keys cannot overflow a signed 16-bit lane */
        __m512i sum = _mm512_setzero_si512();
        for (; i < end; i += SCAN_BLOCK)
            sum = _mm512_mask_add_epi16(sum, _mm512_cmpge_epu16_mask(_mm512_loadu_si512(keys + i), limit), sum, one);
        count += _mm512_reduce_add_epi32(_mm512_madd_epi16(sum, one));
    }
    return count;
}

static int64_t collect_avx512(const uint16_t *keys, int64_t n, uint16_t threshold, int64_t *n_ties, int32_t first, int32_t *ids)
{
    const __m512i limit = _mm512_set1_epi16((short)threshold), next = _mm512_set1_epi32(16);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    int32_t *to = ids;
    for (int64_t i = 0; i < n; i += SCAN_BLOCK) {
        __m512i x = _mm512_loadu_si512(keys + i);
        uint32_t reach = _mm512_cmpge_epu16_mask(x, limit), equal = _mm512_cmpeq_epu16_mask(x, limit);
        for (; equal; equal &= equal - 1)
            if ((*n_ties)-- <= 0) {
                *n_ties = 0;
                reach &= ~(equal & -equal);
            }
        /* compressed in a register and stored whole: a compressing store is slow on some processors */
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)reach, index));
        to += _mm_popcnt_u32(reach & 0xffff);
        index = _mm512_add_epi32(index, next);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)(reach >> 16), index));
        to += _mm_popcnt_u32(reach >> 16);
        index = _mm512_add_epi32(index, next);
    }
    return to - ids;
}

/* ---- clusters and rows ---- */

INLINE __mmask16 lanes(int64_t n)
{
    return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}

INLINE __m512 load_i8(const int8_t *x, __mmask16 mask)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x)));
}

/* Sums of four vectors as the lanes of one. */
INLINE __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 e)
{
    __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m256 y = _mm256_add_ps(_mm512_castps512_ps256(b), _mm512_extractf32x8_ps(b, 1));
    __m256 z = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    __m256 w = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(x, y), _mm256_hadd_ps(z, w));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* 16 dimensions of four clusters and g heads. */
INLINE void dot_step(const float *q, const int g, int d, const int8_t *const *row, int i, __mmask16 mask, __m512 (*sum)[4])
{
    __m512 v[4];
    for (int r = 0; r < 4; r++)
        v[r] = mask == 0xffff ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row[r] + i))))
                              : load_i8(row[r] + i, mask);
    for (int h = 0; h < g; h++) {
        __m512 part = mask == 0xffff ? _mm512_loadu_ps(q + h * d + i) : _mm512_maskz_loadu_ps(mask, q + h * d + i);
        for (int r = 0; r < 4; r++) sum[h][r] = _mm512_fmadd_ps(part, v[r], sum[h][r]);
    }
}

INLINE void dot_heads(const float *q, const int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                      int64_t stride)
{
    for (int64_t c = 0; c < n; c += 4) {
        const int8_t *row[4];
        __m512 sum[4][4];
        int i = 0;
        for (int r = 0; r < 4; r++) {
            row[r] = x + (c + r < n ? c + r : n - 1) * d;
            _mm_prefetch((const char *)row[r] + 2048, _MM_HINT_T0);
            for (int h = 0; h < g; h++) sum[h][r] = _mm512_setzero_ps();
        }
        for (; i + 16 <= d; i += 16) dot_step(q, g, d, row, i, 0xffff, sum);
        if (i < d) dot_step(q, g, d, row, i, lanes(d - i), sum);
        __mmask8 valid = (__mmask8)lanes(n - c < 4 ? n - c : 4);
        __m128 factor = _mm_maskz_loadu_ps(valid, scale + c);
        for (int h = 0; h < g; h++)
            _mm_mask_storeu_ps(out + h * stride + c, valid,
                               _mm_fmadd_ps(factor, sum4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]), _mm_set1_ps(bias[h])));
    }
}

static void dot_i8_avx512(const float *q, int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                          int64_t stride)
{
    for (int h = 0; h < g; h += 4) {
        const float *part = q + h * d;
        int rest = g - h;
        if (rest >= 4)
            dot_heads(part, 4, d, x, scale, bias + h, n, out + h * stride, stride);
        else if (rest == 3)
            dot_heads(part, 3, d, x, scale, bias + h, n, out + h * stride, stride);
        else if (rest == 2)
            dot_heads(part, 2, d, x, scale, bias + h, n, out + h * stride, stride);
        else
            dot_heads(part, 1, d, x, scale, bias + h, n, out + h * stride, stride);
    }
}

enum { I4_CHUNK = 32 };

/* Sums of the lanes of four vectors. */
INLINE __m128i sum4_i32(__m512i a, __m512i b, __m512i c, __m512i e)
{
    __m256i ab = _mm256_hadd_epi32(_mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)),
                                   _mm256_add_epi32(_mm512_castsi512_si256(b), _mm512_extracti64x4_epi64(b, 1)));
    __m256i ce = _mm256_hadd_epi32(_mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1)),
                                   _mm256_add_epi32(_mm512_castsi512_si256(e), _mm512_extracti64x4_epi64(e, 1)));
    __m256i all = _mm256_hadd_epi32(ab, ce);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

INLINE void dot_i4_heads(const int8_t *q, const float *factor, const float *bias, const int g, int d, const uint8_t *x, const float *scale,
                         const int32_t *at, int64_t n, uint16_t *out, int64_t stride, uint16_t *top)
{
    const int half = d / 2;
    int n_chunks = 0;
    int8_t ordered[4][DOT_I4_MOST + 2 * I4_CHUNK];
    float shift[4];
    __m128i most[4];
    const __m512i low = _mm512_set1_epi8(15), one = _mm512_set1_epi16(1);
    for (int h = 0; h < g; h++) {
        n_chunks = order_query(q + h * d, d, I4_CHUNK, ordered[h], &shift[h]);
        most[h] = _mm_setzero_si128();
    }
    for (int64_t i = 0; i < n; i += 4) {
        const int n_rows = n - i < 4 ? (int)(n - i) : 4;
        __m512i sum[4][4]; /* [head][row] */
        for (int h = 0; h < g; h++)
            for (int r = 0; r < 4; r++) sum[h][r] = _mm512_setzero_si512();
        for (int r = 0; r < 4; r++) {
            const size_t here = (size_t)at[r < n_rows ? i + r : i], next = (size_t)at[i + r + DOT_I4_AHEAD < n ? i + r + DOT_I4_AHEAD : i];
            const uint8_t *row = x + here * (size_t)half;
            _mm_prefetch((const char *)x + next * (size_t)half, _MM_HINT_T0);
            _mm_prefetch((const char *)(scale + next), _MM_HINT_T0);
            for (int c = 0; c < n_chunks; c++) {
                const int rest = half - c * I4_CHUNK;
                const __mmask32 mask = rest < I4_CHUNK ? (1u << rest) - 1 : UINT32_MAX;
                const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + c * I4_CHUNK);
                const __m512i nibbles =
                    _mm512_and_si512(low, _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1));
                for (int h = 0; h < g; h++) {
                    const __m512i pairs = _mm512_maddubs_epi16(nibbles, _mm512_loadu_si512(ordered[h] + c * 2 * I4_CHUNK));
                    sum[h][r] = _mm512_add_epi32(sum[h][r], _mm512_madd_epi16(pairs, one));
                }
            }
        }
        const __m128 scales = _mm_setr_ps(scale[at[i]], scale[at[n_rows > 1 ? i + 1 : i]], scale[at[n_rows > 2 ? i + 2 : i]],
                                          scale[at[n_rows > 3 ? i + 3 : i]]);
        for (int h = 0; h < g; h++) {
            const __m128i dots = sum4_i32(sum[h][0], sum[h][1], sum[h][2], sum[h][3]);
            const __m128 dot = _mm_mul_ps(scales, _mm_sub_ps(_mm_cvtepi32_ps(dots), _mm_set1_ps(shift[h])));
            __m128 steps = _mm_add_ps(_mm_set1_ps(bias[h]), _mm_mul_ps(_mm_set1_ps(factor[h]), dot));
            steps = _mm_min_ps(_mm_max_ps(steps, _mm_set1_ps(1)), _mm_set1_ps(UINT16_MAX));
            const __m128i score = _mm_cvtps_epi32(steps);
            most[h] = _mm_max_epi32(most[h], score);
            _mm_mask_storeu_epi16(out + h * stride + i, (__mmask8)((1 << n_rows) - 1), _mm_packus_epi32(score, score));
        }
    }
    for (int h = 0; h < g; h++) {
        int32_t largest[4];
        _mm_storeu_si128((__m128i *)largest, most[h]);
        for (int r = 0; r < 4; r++)
            if (largest[r] > top[h]) top[h] = (uint16_t)largest[r];
    }
}

static void cell_sums_avx512(const uint16_t *keys, const uint32_t *begin, int64_t n_cells, float step, uint16_t top, float *sums)
{
    const exp_scale scale = exp_scale_make(step);
    const __m512i whole = _mm512_set1_epi16((short)scale.whole), part = _mm512_set1_epi16((short)scale.part);
    const __m512i limit = _mm512_set1_epi16((short)scale.most), peak = _mm512_set1_epi16(EXP_TOP_BITS),
                  last = _mm512_set1_epi16((short)top);
    for (int64_t c = 0; c < n_cells; c++) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (uint32_t i = begin[c]; i < begin[c + 1]; i += SCAN_BLOCK) {
            const uint32_t rest = begin[c + 1] - i;
            const __mmask32 mask = rest < SCAN_BLOCK ? (1u << rest) - 1 : UINT32_MAX;
            const __m512i x = _mm512_maskz_loadu_epi16(mask, keys + i), distance = _mm512_min_epu16(_mm512_sub_epi16(last, x), limit);
            const __m512i below = _mm512_add_epi16(_mm512_mullo_epi16(distance, whole), _mm512_mulhi_epu16(distance, part));
            const __m512i power = _mm512_maskz_subs_epu16(_mm512_test_epi16_mask(x, x), peak, below);
            sum[0] = _mm512_add_ps(sum[0], _mm512_cvtph_ps(_mm512_castsi512_si256(power)));
            sum[1] = _mm512_add_ps(sum[1], _mm512_cvtph_ps(_mm512_extracti64x4_epi64(power, 1)));
        }
        sums[c] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) * (0x1p-13f / EXP_MEAN);
    }
}

/* The sums of 64 dimensions of g heads stay in registers. */
INLINE void accumulate_i8_heads(const float *w, int64_t stride, const int g, int d, int n_dims, const int8_t *x, const float *scale,
                                int64_t n, float *o)
{
    __m512 sum[4][4];
    __mmask16 mask[4];
    for (int i = 0; i < 4; i++) {
        mask[i] = n_dims > i * 16 ? lanes(n_dims - i * 16) : 0;
        for (int h = 0; h < g; h++) sum[h][i] = _mm512_maskz_loadu_ps(mask[i], o + h * d + i * 16);
    }
    for (int64_t c = 0; c < n; c++) {
        __m512 v[4];
        _mm_prefetch((const char *)x + c * d + 2048, _MM_HINT_T0);
        for (int i = 0; i < 4; i++) v[i] = load_i8(x + c * d + i * 16, mask[i]);
        for (int h = 0; h < g; h++) {
            __m512 weight = _mm512_set1_ps(w[h * stride + c] * scale[c]);
            for (int i = 0; i < 4; i++) sum[h][i] = _mm512_fmadd_ps(weight, v[i], sum[h][i]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < g; h++) _mm512_mask_storeu_ps(o + h * d + i * 16, mask[i], sum[h][i]);
}

static void accumulate_i8_avx512(const float *w, int64_t stride, int g, int d, const int8_t *x, const float *scale, int64_t n, float *o)
{
    for (int h = 0; h < g; h += 4) {
        const float *part = w + h * stride;
        int rest = g - h;
        for (int i = 0; i < d; i += 64) {
            int dims = d - i < 64 ? d - i : 64;
            float *to = o + h * d + i;
            if (rest >= 4)
                accumulate_i8_heads(part, stride, 4, d, dims, x + i, scale, n, to);
            else if (rest == 3)
                accumulate_i8_heads(part, stride, 3, d, dims, x + i, scale, n, to);
            else if (rest == 2)
                accumulate_i8_heads(part, stride, 2, d, dims, x + i, scale, n, to);
            else
                accumulate_i8_heads(part, stride, 1, d, dims, x + i, scale, n, to);
        }
    }
}

INLINE __m512 load_value(const void *row, kv_type type, int64_t at, __mmask16 mask)
{
    if (type == KV_F16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)row + at));
    return _mm512_maskz_loadu_ps(mask, (const float *)row + at);
}

INLINE void accumulate_rows_heads(const float *w, const int g, int d, int first, kv_type type, const void *const *rows, int64_t n, float *o)
{
    __m512 sum[4][4];
    __mmask16 mask[4];
    for (int i = 0; i < 4; i++) {
        mask[i] = d > first + i * 16 ? lanes(d - first - i * 16) : 0;
        for (int h = 0; h < g; h++) sum[h][i] = _mm512_maskz_loadu_ps(mask[i], o + h * d + first + i * 16);
    }
    for (int64_t r = 0; r < n; r++) {
        __m512 v[4];
        for (int i = 0; i < 4; i++) v[i] = load_value(rows[r], type, d + first + i * 16, mask[i]);
        for (int h = 0; h < g; h++) {
            __m512 weight = _mm512_set1_ps(w[h * n + r]);
            for (int i = 0; i < 4; i++) sum[h][i] = _mm512_fmadd_ps(weight, v[i], sum[h][i]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < g; h++) _mm512_mask_storeu_ps(o + h * d + first + i * 16, mask[i], sum[h][i]);
}

static void accumulate_rows_avx512(const float *w, int g, int d, kv_type type, const void *const *rows, int64_t n, float *o)
{
    for (int h = 0; h < g; h += 4) {
        for (int i = 0; i < d; i += 64) {
            if (g - h >= 4)
                accumulate_rows_heads(w + h * n, 4, d, i, type, rows, n, o + h * d);
            else if (g - h == 3)
                accumulate_rows_heads(w + h * n, 3, d, i, type, rows, n, o + h * d);
            else if (g - h == 2)
                accumulate_rows_heads(w + h * n, 2, d, i, type, rows, n, o + h * d);
            else
                accumulate_rows_heads(w + h * n, 1, d, i, type, rows, n, o + h * d);
        }
    }
}

/* ---- building ---- */

/* A tile of 32 columns against `r` centroids; the maximum is kept per lane, so nothing is reduced across lanes. */
INLINE void nearest_tile(const float *c, const float *half, int first, const int r, int d, const float *y, int64_t stride,
                         const __mmask16 *mask, __m512 *best, __m512i *at)
{
    __m512 sum[8][2];
    for (int j = 0; j < r; j++) sum[j][0] = sum[j][1] = _mm512_set1_ps(-half[first + j]);
    for (int i = 0; i < d; i++) {
        __m512 a = _mm512_maskz_loadu_ps(mask[0], y + i * stride), b = _mm512_maskz_loadu_ps(mask[1], y + i * stride + 16);
        for (int j = 0; j < r; j++) {
            __m512 x = _mm512_set1_ps(c[(size_t)(first + j) * d + i]);
            sum[j][0] = _mm512_fmadd_ps(x, a, sum[j][0]);
            sum[j][1] = _mm512_fmadd_ps(x, b, sum[j][1]);
        }
    }
    for (int j = 0; j < r; j++)
        for (int u = 0; u < 2; u++) {
            __mmask16 more = _mm512_cmp_ps_mask(sum[j][u], best[u], _CMP_GT_OQ);
            best[u] = _mm512_mask_mov_ps(best[u], more, sum[j][u]);
            at[u] = _mm512_mask_mov_epi32(at[u], more, _mm512_set1_epi32(first + j));
        }
}

static void nearest_avx512(const float *c, const float *half, int k, int d, const float *y, int64_t stride, int64_t n, int32_t *index,
                           float *value)
{
    for (int64_t t = 0; t < n; t += 32) {
        __mmask16 mask[2] = {lanes(n - t), n - t > 16 ? lanes(n - t - 16) : 0};
        __m512 best[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
        __m512i at[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        int j = 0;
        for (; j + 8 <= k; j += 8) nearest_tile(c, half, j, 8, d, y + t, stride, mask, best, at);
        for (; j + 2 <= k; j += 2) nearest_tile(c, half, j, 2, d, y + t, stride, mask, best, at);
        for (; j < k; j++) nearest_tile(c, half, j, 1, d, y + t, stride, mask, best, at);
        for (int u = 0; u < 2; u++) {
            _mm512_mask_storeu_epi32(index + t + u * 16, mask[u], at[u]);
            _mm512_mask_storeu_ps(value + t + u * 16, mask[u], best[u]);
        }
    }
}

INLINE void product_tile(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row,
                         const int r, const __mmask16 *mask, int64_t k, bool add)
{
    __m512 sum[8][2];
    for (int i = 0; i < r; i++)
        for (int u = 0; u < 2; u++) sum[i][u] = add ? _mm512_maskz_loadu_ps(mask[u], c + i * c_row + u * 16) : _mm512_setzero_ps();
    for (int64_t l = 0; l < k; l++) {
        __m512 x = _mm512_maskz_loadu_ps(mask[0], b + l * b_row), y = _mm512_maskz_loadu_ps(mask[1], b + l * b_row + 16);
        for (int i = 0; i < r; i++) {
            __m512 factor = _mm512_set1_ps(a[i * a_row + l * a_column]);
            sum[i][0] = _mm512_fmadd_ps(factor, x, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(factor, y, sum[i][1]);
        }
    }
    for (int i = 0; i < r; i++)
        for (int u = 0; u < 2; u++) _mm512_mask_storeu_ps(c + i * c_row + u * 16, mask[u], sum[i][u]);
}

static void product_avx512(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row,
                           int64_t m, int64_t n, int64_t k, bool add)
{
    for (int64_t j = 0; j < n; j += 32) {
        __mmask16 mask[2] = {lanes(n - j), n - j > 16 ? lanes(n - j - 16) : 0};
        int64_t i = 0;
        for (; i + 8 <= m; i += 8) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 8, mask, k, add);
        for (; i + 3 <= m; i += 3) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 3, mask, k, add);
        for (; i < m; i++) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 1, mask, k, add);
    }
}

const retrieval_kernels retrieval_avx512 = {
    .lut = lut_avx512,
    .lut_quantise = lut_quantise_avx512,
    .scan = scan_avx512,
    .exp_sum = exp_sum_avx512,
    .merge = merge_avx512,
    .count = count_avx512,
    .collect = collect_avx512,
    .dot_i8 = dot_i8_avx512,
    .dot_i4 = dot_i4,
    .cell_sums = cell_sums_avx512,
    .accumulate_i8 = accumulate_i8_avx512,
    .accumulate_rows = accumulate_rows_avx512,
    .nearest = nearest_avx512,
    .product = product_avx512,
};
