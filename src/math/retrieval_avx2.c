#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "math/retrieval.h"
#include "math/retrieval_exp.h"
#include "math/retrieval_i4.h"

#define INLINE static inline __attribute__((always_inline))

/* Sums of four vectors as the lanes of one. */
INLINE __m128 sum4(__m256 a, __m256 b, __m256 c, __m256 e)
{
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, e));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* ---- tables ---- */

INLINE float reduce(__m256 x, bool max)
{
    __m128 a = _mm256_castps256_ps128(x), b = _mm256_extractf128_ps(x, 1);
    a = max ? _mm_max_ps(a, b) : _mm_min_ps(a, b);
    b = _mm_movehl_ps(a, a);
    a = max ? _mm_max_ps(a, b) : _mm_min_ps(a, b);
    b = _mm_shuffle_ps(a, a, 1);
    return _mm_cvtss_f32(max ? _mm_max_ps(a, b) : _mm_min_ps(a, b));
}

static float lut_avx2(const float *q, const float *centroids, int n_sub, int d_sub, float *lut, float *low)
{
    __m256 widest = _mm256_setzero_ps();
    for (int s = 0; s < n_sub; s++) {
        __m256 a = _mm256_setzero_ps(), b = a;
        for (int j = 0; j < d_sub; j++) {
            const float *row = centroids + ((size_t)s * d_sub + j) * SCAN_CODES;
            __m256 x = _mm256_set1_ps(q[s * d_sub + j]);
            a = _mm256_fmadd_ps(x, _mm256_loadu_ps(row), a);
            b = _mm256_fmadd_ps(x, _mm256_loadu_ps(row + 8), b);
        }
        _mm256_storeu_ps(lut + s * SCAN_CODES, a);
        _mm256_storeu_ps(lut + s * SCAN_CODES + 8, b);
        low[s] = reduce(_mm256_min_ps(a, b), false);
        widest = _mm256_max_ps(widest, _mm256_sub_ps(_mm256_max_ps(a, b), _mm256_set1_ps(low[s])));
    }
    return reduce(widest, true);
}

static void lut_quantise_avx2(const float *lut, const float *low, float inverse_step, int n_sub, uint8_t *out)
{
    const __m256 factor = _mm256_set1_ps(inverse_step);
    for (int s = 0; s < n_sub; s++) {
        __m256 least = _mm256_set1_ps(low[s]);
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(lut + s * SCAN_CODES), least), factor));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(lut + s * SCAN_CODES + 8), least), factor));
        __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8), top = _mm256_set1_epi16(SCAN_TOP);
        words = _mm256_min_epu16(words, top);
        _mm_storeu_si128((__m128i *)(out + s * SCAN_CODES),
                         _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
}

/* ---- scan ---- */

/* 32 bytes, or 16 and zeros above: of an odd last sub-vector the upper lane then has a table of zeros. */
INLINE __m256i load_pair(const uint8_t *from, bool whole)
{
    return whole ? _mm256_loadu_si256((const __m256i *)from) : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));
}

/* Two sub-vectors at a time: a 128-bit lane holds 16 tokens of one of them. Four such steps add up in bytes before they are widened:
 * even and odd tokens to two vectors of u16. */
INLINE void scan_heads(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, const int g, const uint16_t *offset,
                       uint16_t *out, int64_t stride)
{
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    size_t bytes = (size_t)n_sub * 16;
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint8_t *block = codes + (size_t)b * bytes;
        for (size_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)block + 4096 + i, _MM_HINT_T0);
        __m256i even_low[2], odd_low[2], even_high[2], odd_high[2];
        for (int h = 0; h < g; h++) even_low[h] = odd_low[h] = even_high[h] = odd_high[h] = _mm256_setzero_si256();
        for (size_t at = 0; at < bytes; at += 128) {
            size_t n = bytes - at < 128 ? bytes - at : 128;
            __m256i low_sum[2], high_sum[2];
            for (int h = 0; h < g; h++) low_sum[h] = high_sum[h] = _mm256_setzero_si256();
            for (size_t i = 0; i < n; i += 32) {
                bool whole = n - i >= 32;
                __m256i pair = load_pair(block + at + i, whole);
                __m256i low = _mm256_and_si256(pair, nibble), high = _mm256_and_si256(_mm256_srli_epi16(pair, 4), nibble);
                for (int h = 0; h < g; h++) {
                    __m256i table = load_pair(lut + (size_t)h * bytes + at + i, whole);
                    low_sum[h] = _mm256_add_epi8(low_sum[h], _mm256_shuffle_epi8(table, low));
                    high_sum[h] = _mm256_add_epi8(high_sum[h], _mm256_shuffle_epi8(table, high));
                }
            }
            for (int h = 0; h < g; h++) {
                even_low[h] = _mm256_add_epi16(even_low[h], _mm256_and_si256(low_sum[h], byte));
                odd_low[h] = _mm256_add_epi16(odd_low[h], _mm256_srli_epi16(low_sum[h], 8));
                even_high[h] = _mm256_add_epi16(even_high[h], _mm256_and_si256(high_sum[h], byte));
                odd_high[h] = _mm256_add_epi16(odd_high[h], _mm256_srli_epi16(high_sum[h], 8));
            }
        }
        for (int h = 0; h < g; h++) {
            /* sums over the lanes: [even][odd]; then in order */
            __m256i low = _mm256_add_epi16(_mm256_permute2x128_si256(even_low[h], odd_low[h], 0x20),
                                           _mm256_permute2x128_si256(even_low[h], odd_low[h], 0x31));
            __m256i high = _mm256_add_epi16(_mm256_permute2x128_si256(even_high[h], odd_high[h], 0x20),
                                            _mm256_permute2x128_si256(even_high[h], odd_high[h], 0x31));
            __m256i above = _mm256_set1_epi16((short)offset[h]);
            low = _mm256_adds_epu16(low, above);
            high = _mm256_adds_epu16(high, above);
            __m256i swapped_low = _mm256_permute2x128_si256(low, low, 1), swapped_high = _mm256_permute2x128_si256(high, high, 1);
            low = _mm256_permute2x128_si256(_mm256_unpacklo_epi16(low, swapped_low), _mm256_unpackhi_epi16(low, swapped_low), 0x20);
            high = _mm256_permute2x128_si256(_mm256_unpacklo_epi16(high, swapped_high), _mm256_unpackhi_epi16(high, swapped_high), 0x20);
            __m256i *to = (__m256i *)(out + h * stride + b * SCAN_BLOCK);
            _mm256_storeu_si256(to, low);
            _mm256_storeu_si256(to + 1, high);
        }
    }
}

static void scan_avx2(const uint8_t *codes, int n_sub, int64_t n_blocks, const uint8_t *lut, int g, const uint16_t *offset, uint16_t *out,
                      int64_t stride)
{
    for (int h = 0; h < g; h += 2) {
        const uint8_t *table = lut + (size_t)h * (size_t)n_sub * SCAN_CODES;
        if (g - h >= 2)
            scan_heads(codes, n_sub, n_blocks, table, 2, offset + h, out + h * stride, stride);
        else
            scan_heads(codes, n_sub, n_blocks, table, 1, offset + h, out + h * stride, stride);
    }
}

static float exp_sum_avx2(const uint16_t *keys, int64_t n, float step, uint16_t *top)
{
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 16) most = _mm256_max_epu16(most, _mm256_loadu_si256((const __m256i *)(keys + i)));
    /* the largest is what is left of the smallest complement */
    __m128i least = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    least = _mm_minpos_epu16(_mm_xor_si128(least, _mm_set1_epi8(-1)));
    *top = (uint16_t)~_mm_extract_epi16(least, 0);
    exp_scale scale = exp_scale_make(step);
    const __m256i whole = _mm256_set1_epi16((short)scale.whole), part = _mm256_set1_epi16((short)scale.part);
    const __m256i limit = _mm256_set1_epi16((short)scale.most), peak = _mm256_set1_epi16(EXP_TOP_BITS),
                  last = _mm256_set1_epi16((short)*top);
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += 16) {
        __m256i x = _mm256_loadu_si256((const __m256i *)(keys + i)), distance = _mm256_min_epu16(_mm256_sub_epi16(last, x), limit);
        __m256i below = _mm256_add_epi16(_mm256_mullo_epi16(distance, whole), _mm256_mulhi_epu16(distance, part));
        __m256i power = _mm256_andnot_si256(_mm256_cmpeq_epi16(x, _mm256_setzero_si256()), _mm256_subs_epu16(peak, below));
        sum[0] = _mm256_add_ps(sum[0], _mm256_cvtph_ps(_mm256_castsi256_si128(power)));
        sum[1] = _mm256_add_ps(sum[1], _mm256_cvtph_ps(_mm256_extracti128_si256(power, 1)));
    }
    __m256 both = _mm256_add_ps(sum[0], sum[1]);
    return _mm_cvtss_f32(sum4(both, both, both, both)) * 0x1p-13f;
}

static void merge_avx2(const uint16_t *keys, int64_t stride, int g, const uint16_t *up, const uint16_t *down, int64_t n, uint16_t *out)
{
    for (int64_t i = 0; i < n; i += 16) {
        __m256i best = _mm256_setzero_si256();
        for (int h = 0; h < g; h++) {
            __m256i x = _mm256_adds_epu16(_mm256_loadu_si256((const __m256i *)(keys + h * stride + i)), _mm256_set1_epi16((short)up[h]));
            best = _mm256_max_epu16(best, _mm256_subs_epu16(x, _mm256_set1_epi16((short)down[h])));
        }
        _mm256_storeu_si256((__m256i *)(out + i), best);
    }
}

/* Bits of the 32 keys that are >= limit. */
INLINE uint32_t reach_mask(const uint16_t *keys, __m256i limit, uint32_t *equal)
{
    __m256i a = _mm256_loadu_si256((const __m256i *)keys), b = _mm256_loadu_si256((const __m256i *)(keys + 16));
    if (equal)
        *equal = (uint32_t)_mm256_movemask_epi8(
            _mm256_permute4x64_epi64(_mm256_packs_epi16(_mm256_cmpeq_epi16(a, limit), _mm256_cmpeq_epi16(b, limit)), 0xd8));
    a = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a);
    b = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
    return (uint32_t)_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8));
}

static int64_t count_avx2(const uint16_t *keys, int64_t n, uint16_t threshold)
{
    const __m256i limit = _mm256_set1_epi16((short)threshold);
    int64_t count = 0;
    for (int64_t i = 0; i < n;) {
        int64_t end = n - i > 16384 ? i + 16384 : n; /* so many keys cannot overflow a 16-bit lane */
        __m256i sum = _mm256_setzero_si256();
        for (; i < end; i += 16) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(keys + i));
            sum = _mm256_sub_epi16(sum, _mm256_cmpeq_epi16(_mm256_max_epu16(x, limit), x));
        }
        __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        count += _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
    }
    return count;
}

static int64_t collect_avx2(const uint16_t *keys, int64_t n, uint16_t threshold, int64_t *n_ties, int32_t first, int32_t *ids)
{
    const __m256i limit = _mm256_set1_epi16((short)threshold);
    int64_t found = 0, ties = *n_ties;
    for (int64_t i = 0; i < n; i += SCAN_BLOCK) {
        uint32_t equal, reach = reach_mask(keys + i, limit, &equal);
        for (; reach; reach &= reach - 1) {
            uint32_t bit = reach & -reach;
            if (equal & bit && ties-- <= 0) {
                ties = 0;
                continue;
            }
            ids[found++] = first + (int32_t)i + __builtin_ctz(reach);
        }
    }
    *n_ties = ties;
    return found;
}

/* ---- clusters and rows: d is a multiple of 8 ---- */

INLINE __m256 load_i8(const int8_t *x)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)x)));
}

INLINE void dot_heads(const float *q, const int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                      int64_t stride)
{
    for (int64_t c = 0; c < n; c += 4) {
        const int8_t *row[4];
        __m256 sum[2][4];
        float factor[4], result[4];
        for (int r = 0; r < 4; r++) {
            int64_t at = c + r < n ? c + r : n - 1;
            row[r] = x + at * d;
            _mm_prefetch((const char *)row[r] + 2048, _MM_HINT_T0);
            factor[r] = scale[at];
            for (int h = 0; h < g; h++) sum[h][r] = _mm256_setzero_ps();
        }
        for (int i = 0; i < d; i += 8)
            for (int r = 0; r < 4; r++) {
                __m256 v = load_i8(row[r] + i);
                for (int h = 0; h < g; h++) sum[h][r] = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * d + i), v, sum[h][r]);
            }
        for (int h = 0; h < g; h++) {
            _mm_storeu_ps(result,
                          _mm_fmadd_ps(_mm_loadu_ps(factor), sum4(sum[h][0], sum[h][1], sum[h][2], sum[h][3]), _mm_set1_ps(bias[h])));
            memcpy(out + h * stride + c, result, (size_t)(n - c < 4 ? n - c : 4) * sizeof *out);
        }
    }
}

static void dot_i8_avx2(const float *q, int g, int d, const int8_t *x, const float *scale, const float *bias, int64_t n, float *out,
                        int64_t stride)
{
    for (int h = 0; h < g; h += 2)
        if (g - h >= 2)
            dot_heads(q + h * d, 2, d, x, scale, bias + h, n, out + h * stride, stride);
        else
            dot_heads(q + h * d, 1, d, x, scale, bias + h, n, out + h * stride, stride);
}

enum { I4_CHUNK = 16 };

/* Sums of the lanes of four vectors. */
INLINE __m128i sum4_i32(__m256i a, __m256i b, __m256i c, __m256i e)
{
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, e));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

INLINE __m128i load_i4(const uint8_t *x, int n)
{
    uint8_t some[I4_CHUNK] = {0};
    if (n >= I4_CHUNK) return _mm_loadu_si128((const __m128i *)x);
    memcpy(some, x, (size_t)n);
    return _mm_loadu_si128((const __m128i *)some);
}

INLINE void dot_i4_heads(const int8_t *q, const float *factor, const float *bias, const int g, int d, const uint8_t *x, const float *scale,
                         const int32_t *at, int64_t n, uint16_t *out, int64_t stride, uint16_t *top)
{
    const int half = d / 2;
    int n_chunks = 0;
    int8_t ordered[4][DOT_I4_MOST + 2 * I4_CHUNK];
    float shift[4] = {0}, by[4] = {0}, add[4] = {0};
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    for (int h = 0; h < g; h++) {
        n_chunks = order_query(q + h * d, d, I4_CHUNK, ordered[h], &shift[h]);
        by[h] = factor[h];
        add[h] = bias[h];
    }
    const __m128 offset = _mm_loadu_ps(shift), times = _mm_loadu_ps(by), plus = _mm_loadu_ps(add);
    __m128i most = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *row = x + (size_t)at[i] * (size_t)half;
        __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
        if (i + DOT_I4_AHEAD < n) {
            const size_t next = (size_t)at[i + DOT_I4_AHEAD];
            _mm_prefetch((const char *)x + next * (size_t)half, _MM_HINT_T0);
            _mm_prefetch((const char *)(scale + next), _MM_HINT_T0);
        }
        for (int c = 0; c < n_chunks; c++) {
            const __m128i bytes = load_i4(row + c * I4_CHUNK, half - c * I4_CHUNK);
            const __m256i nibbles =
                _mm256_and_si256(low, _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1));
            for (int h = 0; h < g; h++) {
                const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_loadu_si256((const __m256i *)(ordered[h] + c * 2 * I4_CHUNK)));
                sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(pairs, one));
            }
        }
        const __m128 dot = _mm_sub_ps(_mm_cvtepi32_ps(sum4_i32(sum[0], sum[1], sum[2], sum[3])), offset);
        __m128 steps = _mm_add_ps(plus, _mm_mul_ps(times, _mm_mul_ps(_mm_set1_ps(scale[at[i]]), dot)));
        steps = _mm_min_ps(_mm_max_ps(steps, _mm_set1_ps(1)), _mm_set1_ps(UINT16_MAX));
        const __m128i score = _mm_cvtps_epi32(steps);
        most = _mm_max_epi32(most, score);
        out[i] = (uint16_t)_mm_cvtsi128_si32(score);
        if (g > 1) out[stride + i] = (uint16_t)_mm_extract_epi32(score, 1);
        if (g > 2) out[2 * stride + i] = (uint16_t)_mm_extract_epi32(score, 2);
        if (g > 3) out[3 * stride + i] = (uint16_t)_mm_extract_epi32(score, 3);
    }
    int32_t largest[4];
    _mm_storeu_si128((__m128i *)largest, most);
    for (int h = 0; h < g; h++)
        if (largest[h] > top[h]) top[h] = (uint16_t)largest[h];
}

static void cell_sums_avx2(const uint16_t *keys, const uint32_t *begin, int64_t n_cells, float step, uint16_t top, float *sums)
{
    const exp_scale scale = exp_scale_make(step);
    const __m256i whole = _mm256_set1_epi16((short)scale.whole), part = _mm256_set1_epi16((short)scale.part);
    const __m256i limit = _mm256_set1_epi16((short)scale.most), peak = _mm256_set1_epi16(EXP_TOP_BITS),
                  last = _mm256_set1_epi16((short)top);
    const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t c = 0; c < n_cells; c++) {
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (uint32_t i = begin[c]; i < begin[c + 1]; i += 16) {
            const uint32_t rest = begin[c + 1] - i;
            __m256i x = _mm256_loadu_si256((const __m256i *)(keys + i));
            if (rest < 16) x = _mm256_and_si256(x, _mm256_cmpgt_epi16(_mm256_set1_epi16((short)rest), lane));
            const __m256i distance = _mm256_min_epu16(_mm256_sub_epi16(last, x), limit);
            const __m256i below = _mm256_add_epi16(_mm256_mullo_epi16(distance, whole), _mm256_mulhi_epu16(distance, part));
            const __m256i power = _mm256_andnot_si256(_mm256_cmpeq_epi16(x, _mm256_setzero_si256()), _mm256_subs_epu16(peak, below));
            sum[0] = _mm256_add_ps(sum[0], _mm256_cvtph_ps(_mm256_castsi256_si128(power)));
            sum[1] = _mm256_add_ps(sum[1], _mm256_cvtph_ps(_mm256_extracti128_si256(power, 1)));
        }
        const __m256 both = _mm256_add_ps(sum[0], sum[1]);
        sums[c] = _mm_cvtss_f32(sum4(both, both, both, both)) * (0x1p-13f / EXP_MEAN);
    }
}

/* The sums of 8 * dims dimensions of g heads stay in registers. */
INLINE void accumulate_i8_heads(const float *w, int64_t stride, const int g, int d, const int dims, const int8_t *x, const float *scale,
                                int64_t n, float *o)
{
    __m256 sum[3][4];
    for (int i = 0; i < dims; i++)
        for (int h = 0; h < g; h++) sum[h][i] = _mm256_loadu_ps(o + h * d + i * 8);
    for (int64_t c = 0; c < n; c++) {
        __m256 weight[3];
        for (int h = 0; h < g; h++) weight[h] = _mm256_set1_ps(w[h * stride + c] * scale[c]);
        for (int i = 0; i < dims; i++) {
            __m256 v = load_i8(x + c * d + i * 8);
            for (int h = 0; h < g; h++) sum[h][i] = _mm256_fmadd_ps(weight[h], v, sum[h][i]);
        }
    }
    for (int i = 0; i < dims; i++)
        for (int h = 0; h < g; h++) _mm256_storeu_ps(o + h * d + i * 8, sum[h][i]);
}

INLINE void accumulate_i8_dims(const float *w, int64_t stride, const int g, int d, const int8_t *x, const float *scale, int64_t n, float *o)
{
    int i = 0;
    for (; i + 32 <= d; i += 32) accumulate_i8_heads(w, stride, g, d, 4, x + i, scale, n, o + i);
    for (; i < d; i += 8) accumulate_i8_heads(w, stride, g, d, 1, x + i, scale, n, o + i);
}

static void accumulate_i8_avx2(const float *w, int64_t stride, int g, int d, const int8_t *x, const float *scale, int64_t n, float *o)
{
    int h = 0;
    for (; h + 3 <= g; h += 3) accumulate_i8_dims(w + h * stride, stride, 3, d, x, scale, n, o + h * d);
    for (; h < g; h++) accumulate_i8_dims(w + h * stride, stride, 1, d, x, scale, n, o + h * d);
}

INLINE __m256 load_value(const void *row, kv_type type, int64_t at)
{
    if (type == KV_F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)row + at)));
    return _mm256_loadu_ps((const float *)row + at);
}

INLINE void accumulate_rows_heads(const float *w, const int g, int d, int first, const int dims, kv_type type, const void *const *rows,
                                  int64_t n, float *o)
{
    __m256 sum[3][4];
    for (int i = 0; i < dims; i++)
        for (int h = 0; h < g; h++) sum[h][i] = _mm256_loadu_ps(o + h * d + first + i * 8);
    for (int64_t r = 0; r < n; r++) {
        __m256 weight[3];
        for (int h = 0; h < g; h++) weight[h] = _mm256_set1_ps(w[h * n + r]);
        for (int i = 0; i < dims; i++) {
            __m256 v = load_value(rows[r], type, d + first + i * 8);
            for (int h = 0; h < g; h++) sum[h][i] = _mm256_fmadd_ps(weight[h], v, sum[h][i]);
        }
    }
    for (int i = 0; i < dims; i++)
        for (int h = 0; h < g; h++) _mm256_storeu_ps(o + h * d + first + i * 8, sum[h][i]);
}

INLINE void accumulate_rows_dims(const float *w, const int g, int d, kv_type type, const void *const *rows, int64_t n, float *o)
{
    int i = 0;
    for (; i + 32 <= d; i += 32) accumulate_rows_heads(w, g, d, i, 4, type, rows, n, o);
    for (; i < d; i += 8) accumulate_rows_heads(w, g, d, i, 1, type, rows, n, o);
}

static void accumulate_rows_avx2(const float *w, int g, int d, kv_type type, const void *const *rows, int64_t n, float *o)
{
    int h = 0;
    for (; h + 3 <= g; h += 3) accumulate_rows_dims(w + h * n, 3, d, type, rows, n, o + h * d);
    for (; h < g; h++) accumulate_rows_dims(w + h * n, 1, d, type, rows, n, o + h * d);
}

/* ---- building ---- */

/* A tile of 16 columns against `r` centroids; the maximum is kept per lane, so nothing is reduced across lanes. */
INLINE void nearest_tile(const float *c, const float *half, int first, const int r, int d, const float *y, int64_t stride, __m256 *best,
                         __m256i *at)
{
    __m256 sum[4][2];
    for (int j = 0; j < r; j++) sum[j][0] = sum[j][1] = _mm256_set1_ps(-half[first + j]);
    for (int i = 0; i < d; i++) {
        __m256 a = _mm256_loadu_ps(y + i * stride), b = _mm256_loadu_ps(y + i * stride + 8);
        for (int j = 0; j < r; j++) {
            __m256 x = _mm256_set1_ps(c[(size_t)(first + j) * d + i]);
            sum[j][0] = _mm256_fmadd_ps(x, a, sum[j][0]);
            sum[j][1] = _mm256_fmadd_ps(x, b, sum[j][1]);
        }
    }
    for (int j = 0; j < r; j++)
        for (int u = 0; u < 2; u++) {
            __m256 more = _mm256_cmp_ps(sum[j][u], best[u], _CMP_GT_OQ);
            best[u] = _mm256_blendv_ps(best[u], sum[j][u], more);
            at[u] = _mm256_blendv_epi8(at[u], _mm256_set1_epi32(first + j), _mm256_castps_si256(more));
        }
}

static void nearest_avx2(const float *c, const float *half, int k, int d, const float *y, int64_t stride, int64_t n, int32_t *index,
                         float *value)
{
    int64_t t = 0;
    for (; t + 16 <= n; t += 16) {
        __m256 best[2] = {_mm256_set1_ps(-INFINITY), _mm256_set1_ps(-INFINITY)};
        __m256i at[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        int j = 0;
        for (; j + 4 <= k; j += 4) nearest_tile(c, half, j, 4, d, y + t, stride, best, at);
        for (; j < k; j++) nearest_tile(c, half, j, 1, d, y + t, stride, best, at);
        for (int u = 0; u < 2; u++) {
            _mm256_storeu_si256((__m256i *)(index + t + u * 8), at[u]);
            _mm256_storeu_ps(value + t + u * 8, best[u]);
        }
    }
    if (t < n) retrieval_scalar.nearest(c, half, k, d, y + t, stride, n - t, index + t, value + t);
}

INLINE void product_tile(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row,
                         const int r, int64_t k, bool add)
{
    __m256 sum[6][2];
    for (int i = 0; i < r; i++)
        for (int u = 0; u < 2; u++) sum[i][u] = add ? _mm256_loadu_ps(c + i * c_row + u * 8) : _mm256_setzero_ps();
    for (int64_t l = 0; l < k; l++) {
        __m256 x = _mm256_loadu_ps(b + l * b_row), y = _mm256_loadu_ps(b + l * b_row + 8);
        for (int i = 0; i < r; i++) {
            __m256 factor = _mm256_set1_ps(a[i * a_row + l * a_column]);
            sum[i][0] = _mm256_fmadd_ps(factor, x, sum[i][0]);
            sum[i][1] = _mm256_fmadd_ps(factor, y, sum[i][1]);
        }
    }
    for (int i = 0; i < r; i++)
        for (int u = 0; u < 2; u++) _mm256_storeu_ps(c + i * c_row + u * 8, sum[i][u]);
}

static void product_avx2(const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row, float *c, int64_t c_row, int64_t m,
                         int64_t n, int64_t k, bool add)
{
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        int64_t i = 0;
        for (; i + 6 <= m; i += 6) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 6, k, add);
        for (; i + 3 <= m; i += 3) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 3, k, add);
        for (; i < m; i++) product_tile(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, 1, k, add);
    }
    if (j < n) retrieval_scalar.product(a, a_row, a_column, b + j, b_row, c + j, c_row, m, n - j, k, add);
}

const retrieval_kernels retrieval_avx2 = {
    .lut = lut_avx2,
    .lut_quantise = lut_quantise_avx2,
    .scan = scan_avx2,
    .exp_sum = exp_sum_avx2,
    .merge = merge_avx2,
    .count = count_avx2,
    .collect = collect_avx2,
    .dot_i8 = dot_i8_avx2,
    .dot_i4 = dot_i4,
    .cell_sums = cell_sums_avx2,
    .accumulate_i8 = accumulate_i8_avx2,
    .accumulate_rows = accumulate_rows_avx2,
    .nearest = nearest_avx2,
    .product = product_avx2,
};
