/* Integer products of 16 rows at a time: a dot product of four bytes per 32-bit lane. Weights are unsigned here, activations signed; what was added to
 * signed weights is taken back through the sum of the activations, as the start value of the integer sum (|sum| <= 255 * 127 * 32, exact).
 *
 * Up to 16 rows of activations, or 8 precise ones (decode of one or several sessions), multiply weights as they are unpacked, in registers, up to eight rows per
 * pass over the panel. More rows first unpack 256 inputs of the panel into the first-level cache and pass over them with tiles of up to 16 rows: 8 dot products
 * and 3 or 4 other vector operations per 512 products. On Zen 4, 1536 x 576, one thread: 278 Gop/s (Q4_1), 287 (Q8_0) of 340 the multipliers give, and for one
 * row what memory gives. Eight precise rows, two threads: 11 GB/s of weights (Q4_1), which is 570 Gop/s (bench/bench_matmul.c). */
#include <immintrin.h>
#include <string.h>

#include "math/matmul_internal.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum { FUSED_ROWS = 8, CHUNK_BLOCKS = 8, INTERLEAVE = 8 };

/* 32 inputs of a panel: q + offset as unsigned bytes. */
typedef struct weights {
    __m512i q[8];
    __m512 scale[2], min[2];
} weights;

static ALWAYS_INLINE __m512 load_f16(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static ALWAYS_INLINE __m512i load_bytes(const uint8_t *p)
{
    return _mm512_loadu_si512(p);
}

static ALWAYS_INLINE __m512 load_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

static ALWAYS_INLINE __m512 load_i8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

static ALWAYS_INLINE bool type_is_fine(const block_type type)
{
    return type == BLOCK_Q2_K || type == BLOCK_Q3_K || type == BLOCK_Q6_K;
}

static ALWAYS_INLINE bool type_has_min(const block_type type)
{
    return type == BLOCK_Q4_1 || type == BLOCK_Q5_1 || type == BLOCK_Q4_K || type == BLOCK_Q5_K || type == BLOCK_Q2_K;
}

/* log2 of the offset of the unsigned quants, for the types without min. */
static ALWAYS_INLINE int type_shift(const block_type type)
{
    switch ((int)type) {
    case BLOCK_Q4_0: return 3;
    case BLOCK_Q5_0: return 4;
    case BLOCK_Q6_K: return 5;
    case BLOCK_Q3_K: return 2;
    default: return 7;
    }
}

static ALWAYS_INLINE void unpack_nibbles(const uint8_t *p, __m512i q[8])
{
    const __m512i mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        __m512i x = load_bytes(p + 64 * i);
        q[i] = _mm512_and_si512(x, mask);
        q[i + 4] = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
    }
}

static ALWAYS_INLINE void unpack_crumbs(const uint8_t *p, __m512i q[8])
{
    const __m512i mask = _mm512_set1_epi8(3);
    for (int v = 0; v < 8; v++) q[v] = _mm512_and_si512(_mm512_srli_epi16(load_bytes(p + 64 * (v / 4)), 2 * (unsigned)(v % 4)), mask);
}

/* q |= bit v of each byte, moved to bit `to`; 0xf8: a | (b & c). */
static ALWAYS_INLINE void unpack_bits(const uint8_t *p, const int to, __m512i q[8])
{
    const __m512i mask = _mm512_set1_epi8((char)(1 << to)), bits = load_bytes(p);
    for (int v = 0; v < 8; v++) {
        __m512i moved = v > to ? _mm512_srli_epi16(bits, (unsigned)(v - to)) : _mm512_slli_epi16(bits, (unsigned)(to - v));
        q[v] = _mm512_ternarylogic_epi64(q[v], moved, mask, 0xf8);
    }
}

static ALWAYS_INLINE void unpack_high_crumbs(const uint8_t *p, __m512i q[8])
{
    const __m512i mask = _mm512_set1_epi8(48);
    for (int v = 0; v < 8; v++) {
        __m512i x = load_bytes(p + 64 * (v / 4));
        int shift = 4 - 2 * (v % 4);
        x = shift >= 0 ? _mm512_slli_epi16(x, (unsigned)shift) : _mm512_srli_epi16(x, (unsigned)-shift);
        q[v] = _mm512_ternarylogic_epi64(q[v], x, mask, 0xf8);
    }
}

static ALWAYS_INLINE void unpack_quants(const block_type type, const uint8_t *p, __m512i q[8])
{
    switch ((int)type) {
    case BLOCK_Q8_0:
        for (int v = 0; v < 8; v++) q[v] = _mm512_xor_si512(load_bytes(p + 64 * v), _mm512_set1_epi8(-128));
        break;
    case BLOCK_Q2_K: unpack_crumbs(p, q); break;
    case BLOCK_Q3_K:
        unpack_crumbs(p, q);
        unpack_bits(p + 128, 2, q);
        break;
    default: unpack_nibbles(p, q); break;
    }
    if (type == BLOCK_Q5_0 || type == BLOCK_Q5_1 || type == BLOCK_Q5_K) unpack_bits(p + 256, 4, q);
    if (type == BLOCK_Q6_K) unpack_high_crumbs(p + 256, q);
    if (type == BLOCK_IQ4_NL) {
        const __m512i values =
            _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)iq4_nl_values)), _mm512_set1_epi8(-128));
        for (int v = 0; v < 8; v++) q[v] = _mm512_shuffle_epi8(values, q[v]);
    }
}

static ALWAYS_INLINE void unpack_scales(const block_type type, const panel_layout *layout, const uint8_t *block, int sub, weights *w)
{
    __m512 d = load_f16(block), m = type_has_min(type) ? load_f16(block + layout->m) : d;
    const uint8_t *scale = block + layout->scale + (type_is_fine(type) ? 32 : 16) * sub, *min = block + layout->min + 16 * sub;
    const __m512 sign = _mm512_set1_ps(-0.0f);
    w->scale[0] = d;
    w->min[0] = m;
    if (type == BLOCK_Q4_K || type == BLOCK_Q5_K) {
        w->scale[0] = _mm512_mul_ps(d, load_u8(scale));
        w->min[0] = _mm512_xor_ps(_mm512_mul_ps(m, load_u8(min)), sign);
    }
    for (int half = 0; half < 2 && type_is_fine(type); half++, scale += 16) {
        if (type != BLOCK_Q2_K) {
            w->scale[half] = _mm512_mul_ps(d, load_i8(scale));
            continue;
        }
        __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)scale));
        w->scale[half] = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15))));
        w->min[half] = _mm512_xor_ps(_mm512_mul_ps(m, _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4))), sign);
    }
}

/* dot[n] += q · activations for n rows, `stride` bytes apart; rows are interleaved, a sum alone would wait for its last product. */
static ALWAYS_INLINE void dot_rows(const int n, const int stride, const __m512i *q, const uint8_t *quants, __m512i *dot)
{
    for (int v = 0; v < 8; v++) {
        for (int t = 0; t < n; t++) {
            int32_t four;
            memcpy(&four, quants + t * stride + 4 * v, sizeof four);
            dot[t] = _mm512_dpbusd_epi32(dot[t], q[v], _mm512_set1_epi32(four));
        }
    }
}

/* dot[n] of n <= INTERLEAVE rows or pairs, from `start` on. */
static ALWAYS_INLINE void dot_terms(const int n, const bool pairs, const __m512i *q, const uint8_t *quants, const __m512i *start,
                                    __m512i *dot)
{
    const int stride = (pairs ? 2 : 1) * SUB_BLOCK;
    for (int t = 0; t < n; t++) dot[t] = pairs ? _mm512_setzero_si512() : start[t];
    dot_rows(n, stride, q, quants, dot);
    if (!pairs) return;
    if (n <= INTERLEAVE / 2) { /* the terms need not wait for each other */
        __m512i second[INTERLEAVE / 2];
        for (int t = 0; t < n; t++) second[t] = start[t];
        dot_rows(n, stride, q, quants + SUB_BLOCK, second);
        for (int t = 0; t < n; t++) dot[t] = _mm512_add_epi32(_mm512_slli_epi32(dot[t], PAIR_BITS), second[t]);
        return;
    }
    for (int t = 0; t < n; t++) dot[t] = _mm512_add_epi32(_mm512_slli_epi32(dot[t], PAIR_BITS), start[t]);
    dot_rows(n, stride, q, quants + SUB_BLOCK, dot);
}

/* acc[n] += 32 inputs with one scale per row. */
static ALWAYS_INLINE void multiply_plain(const int n, const bool pairs, const bool with_min, const unsigned shift, const weights *w,
                                         const uint8_t *quants, const activation_scale *s, __m512 *acc)
{
    for (int first = 0; first < n; first += INTERLEAVE) {
        const int m = n - first < INTERLEAVE ? n - first : INTERLEAVE;
        __m512i dot[INTERLEAVE], start[INTERLEAVE];
        for (int t = 0; t < m; t++)
            start[t] = with_min ? _mm512_setzero_si512() : _mm512_slli_epi32(_mm512_set1_epi32(s[first + t].minus), shift);
        dot_terms(m, pairs, w->q, quants + first * (pairs ? 2 : 1) * SUB_BLOCK, start, dot);
        for (int t = 0; t < m; t++) {
            __m512 *y = &acc[first + t];
            *y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t]), _mm512_mul_ps(w->scale[0], _mm512_set1_ps(s[first + t].d)), *y);
            if (with_min) *y = _mm512_fmadd_ps(w->min[0], _mm512_set1_ps(s[first + t].sum), *y);
        }
    }
}

static ALWAYS_INLINE __m512i dot_half(__m512i sum, const __m512i *q, const uint8_t *a)
{
    for (int v = 0; v < 4; v++) {
        int32_t four;
        memcpy(&four, a + 4 * v, sizeof four);
        sum = _mm512_dpbusd_epi32(sum, q[v], _mm512_set1_epi32(four));
    }
    return sum;
}

/* The dot product with 16 inputs of a row or a pair. */
static ALWAYS_INLINE __m512i dot_half_terms(const bool pairs, __m512i start, const __m512i *q, const uint8_t *a)
{
    if (!pairs) return dot_half(start, q, a);
    __m512i first = dot_half(_mm512_setzero_si512(), q, a);
    return _mm512_add_epi32(_mm512_slli_epi32(first, PAIR_BITS), dot_half(start, q, a + SUB_BLOCK));
}

/* acc[n] += 32 inputs with a scale per 16. */
static ALWAYS_INLINE void multiply_fine(const int n, const bool pairs, const bool with_min, const unsigned shift, const weights *w,
                                        const uint8_t *quants, const activation_scale *s, __m512 *acc)
{
    for (int t = 0; t < n; t++, quants += (pairs ? 2 : 1) * SUB_BLOCK) {
        __m512 d = _mm512_set1_ps(s[t].d);
        __m512i minus_lo = _mm512_set1_epi32(s[t].minus_lo), minus_hi = _mm512_sub_epi32(_mm512_set1_epi32(s[t].minus), minus_lo);
        __m512i zero = _mm512_setzero_si512();
        __m512i lo = dot_half_terms(pairs, with_min ? zero : _mm512_slli_epi32(minus_lo, shift), w->q, quants);
        __m512i hi = dot_half_terms(pairs, with_min ? zero : _mm512_slli_epi32(minus_hi, shift), w->q + 4, quants + 16);
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lo), _mm512_mul_ps(w->scale[0], d), acc[t]);
        acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(hi), _mm512_mul_ps(w->scale[1], d), acc[t]);
        if (!with_min) continue;
        acc[t] = _mm512_fmadd_ps(w->min[0], _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_sub_epi32(zero, minus_lo))), acc[t]);
        acc[t] = _mm512_fmadd_ps(w->min[1], _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_sub_epi32(zero, minus_hi))), acc[t]);
    }
}

static ALWAYS_INLINE void multiply(const int n, const bool pairs, const bool fine, const bool with_min, const unsigned shift,
                                   const weights *w, const uint8_t *quants, const activation_scale *s, __m512 *acc)
{
    if (fine)
        multiply_fine(n, pairs, with_min, shift, w, quants, s, acc);
    else
        multiply_plain(n, pairs, with_min, shift, w, quants, s, acc);
}

/* Few rows: n <= FUSED_ROWS of a group of `size`, unpacking in registers. */
static ALWAYS_INLINE void fused(const block_type type, const bool pairs, const int n, const panel_layout *layout, const uint8_t *panel,
                                int64_t n_in, const uint8_t *group, int size, int first, float *out)
{
    const int n_sub = layout->n_weights / SUB_BLOCK, n_q = (pairs ? 2 : 1) * SUB_BLOCK, step = size * activation_row_bytes(pairs);
    const uint8_t *quants = group + first * n_q, *scales = group + size * n_q + first * (int)sizeof(activation_scale);
    __m512 acc[FUSED_ROWS];
    for (int t = 0; t < n; t++) acc[t] = _mm512_setzero_ps();
    for (int64_t b = 0; b < n_in / layout->n_weights; b++, panel += layout->n_bytes) {
        const uint8_t *plane = panel + layout->planes;
        for (int sub = 0; sub < n_sub; sub++, plane += layout->sub_bytes, quants += step, scales += step) {
            weights w;
            unpack_quants(type, plane, w.q);
            unpack_scales(type, layout, panel, sub, &w);
            multiply(n, pairs, type_is_fine(type), type_has_min(type), (unsigned)type_shift(type), &w, quants,
                     (const activation_scale *)(const void *)scales, acc);
        }
    }
    for (int t = 0; t < n; t++) _mm512_storeu_ps(out + (first + t) * PANEL_ROWS, acc[t]);
}

/* One group. After the first pass the panel comes from the cache. */
static ALWAYS_INLINE void fused_group(const block_type type, const bool pairs, const panel_layout *layout, const uint8_t *panel,
                                      int64_t n_in, const uint8_t *group, int size, float *out)
{
    for (int t = 0; t < size;) {
        int left = size - t;
        if (left >= 8)
            fused(type, pairs, 8, layout, panel, n_in, group, size, t, out), t += 8;
        else if (left >= 4)
            fused(type, pairs, 4, layout, panel, n_in, group, size, t, out), t += 4;
        else if (left == 3)
            fused(type, pairs, 3, layout, panel, n_in, group, size, t, out), t += 3;
        else if (left == 2)
            fused(type, pairs, 2, layout, panel, n_in, group, size, t, out), t += 2;
        else
            fused(type, pairs, 1, layout, panel, n_in, group, size, t, out), t += 1;
    }
}

/* Many rows: unpacks one sub-block to memory. Types without min all get the offset 128. */
static ALWAYS_INLINE void unpack(const block_type type, const panel_layout *layout, const uint8_t *block, int sub, weights *w)
{
    weights registers;
    unpack_quants(type, block + layout->planes + sub * layout->sub_bytes, registers.q);
    unpack_scales(type, layout, block, sub, &registers);
    const int lift = type_has_min(type) ? 0 : 128 - (1 << type_shift(type));
    for (int v = 0; v < 8; v++) w->q[v] = lift ? _mm512_add_epi8(registers.q[v], _mm512_set1_epi8((char)lift)) : registers.q[v];
    for (int half = 0; half < (type_is_fine(type) ? 2 : 1); half++) {
        w->scale[half] = registers.scale[half];
        if (type_has_min(type)) w->min[half] = registers.min[half];
    }
}

/* out[n] += n_blocks sub-blocks; n rows of a group of `size` from row `first` on. */
static ALWAYS_INLINE void tile(const int n, const bool pairs, const bool fine, const bool with_min, const weights *w, int n_blocks,
                               const uint8_t *group, int size, int first, float *out)
{
    const int n_q = (pairs ? 2 : 1) * SUB_BLOCK, step = size * activation_row_bytes(pairs);
    const uint8_t *quants = group + first * n_q, *scales = group + size * n_q + first * (int)sizeof(activation_scale);
    __m512 acc[ACTIVATION_GROUP];
    out += first * PANEL_ROWS;
    for (int t = 0; t < n; t++) acc[t] = _mm512_loadu_ps(out + t * PANEL_ROWS);
    for (int b = 0; b < n_blocks; b++, quants += step, scales += step)
        multiply(n, pairs, fine, with_min, 7, &w[b], quants, (const activation_scale *)(const void *)scales, acc);
    for (int t = 0; t < n; t++) _mm512_storeu_ps(out + t * PANEL_ROWS, acc[t]);
}

/* One group of `size` rows in tiles of 16, 8, 4, 2 and 1. */
static ALWAYS_INLINE void group_multiply(const bool pairs, const bool fine, const bool with_min, const weights *w, int n_blocks,
                                         const uint8_t *group, int size, float *out)
{
    for (int t = 0; t < size;) {
        int left = size - t;
        if (left >= 16 && !pairs)
            tile(16, pairs, fine, with_min, w, n_blocks, group, size, t, out), t += 16;
        else if (left >= 8)
            tile(8, pairs, fine, with_min, w, n_blocks, group, size, t, out), t += 8;
        else if (left >= 4)
            tile(4, pairs, fine, with_min, w, n_blocks, group, size, t, out), t += 4;
        else if (left >= 2)
            tile(2, pairs, fine, with_min, w, n_blocks, group, size, t, out), t += 2;
        else
            tile(1, pairs, fine, with_min, w, n_blocks, group, size, t, out), t += 1;
    }
}

typedef void (*group_fn)(const weights *w, int n_blocks, const uint8_t *group, int size, float *out);

#define GROUP(name, pairs, fine, with_min)                                                                                                 \
    static void name(const weights *w, int n_blocks, const uint8_t *group, int size, float *out)                                           \
    {                                                                                                                                      \
        group_multiply(pairs, fine, with_min, w, n_blocks, group, size, out);                                                              \
    }
GROUP(rows_plain, false, false, false)
GROUP(rows_min, false, false, true)
GROUP(rows_fine, false, true, false)
GROUP(rows_fine_min, false, true, true)
GROUP(pairs_plain, true, false, false)
GROUP(pairs_min, true, false, true)
GROUP(pairs_fine, true, true, false)
GROUP(pairs_fine_min, true, true, true)

/* [pairs][fine][with_min] */
static const group_fn group_functions[2][2][2] = {{{rows_plain, rows_min}, {rows_fine, rows_fine_min}},
                                                  {{pairs_plain, pairs_min}, {pairs_fine, pairs_fine_min}}};

/* out[n][16] += what the first terms left: few blocks here and there, and the panel is in the cache. */
static ALWAYS_INLINE void add_rests(const block_type type, const panel_layout *layout, const uint8_t *panel, int64_t n_in,
                                    const rest_list *rests, int64_t n, float *out)
{
    const int n_sub = layout->n_weights / SUB_BLOCK;
    for (int64_t first = 0; first < n; first += ACTIVATION_GROUP, out += ACTIVATION_GROUP * PANEL_ROWS) {
        const rest_list *list = rest_list_at(rests, first / ACTIVATION_GROUP, n_in);
        for (const rest_block *r = list->blocks, *end = r + list->n; r < end;) {
            const int32_t block = r->block;
            const uint8_t *data = panel + block / n_sub * layout->n_bytes;
            weights w;
            unpack_quants(type, data + layout->planes + block % n_sub * layout->sub_bytes, w.q);
            unpack_scales(type, layout, data, block % n_sub, &w);
            for (; r < end && r->block == block; r++) {
                __m512 y = _mm512_loadu_ps(out + r->row * PANEL_ROWS);
                multiply(1, false, type_is_fine(type), type_has_min(type), (unsigned)type_shift(type), &w, (const uint8_t *)r->q, &r->scale,
                         &y);
                _mm512_storeu_ps(out + r->row * PANEL_ROWS, y);
            }
        }
    }
}

static ALWAYS_INLINE void product(const block_type type, const bool pairs, const uint8_t *panel, int64_t n_in, const uint8_t *quantized,
                                  int64_t n, float *out)
{
    const int rows = activation_group(pairs);
    panel_layout layout;
    panel_layout_get(type, &layout);
    if (n <= rows) {
        fused_group(type, pairs, &layout, panel, n_in, quantized, (int)n, out);
        return;
    }
    const group_fn multiply_group = group_functions[pairs][type_is_fine(type)][type_has_min(type)];
    const int64_t n_blocks = n_in / SUB_BLOCK;
    const int n_sub = layout.n_weights / SUB_BLOCK;
    weights chunk[CHUNK_BLOCKS];
    memset(out, 0, (size_t)n * PANEL_ROWS * sizeof *out);
    for (int64_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        int m = n_blocks - b < CHUNK_BLOCKS ? (int)(n_blocks - b) : CHUNK_BLOCKS;
        for (int i = 0; i < m; i++) unpack(type, &layout, panel + (b + i) / n_sub * layout.n_bytes, (int)((b + i) % n_sub), &chunk[i]);
        for (int64_t t = 0; t < n; t += rows) {
            int size = n - t < rows ? (int)(n - t) : rows;
            multiply_group(chunk, m, quantized + activation_bytes(t, n_in, pairs) + b * size * activation_row_bytes(pairs), size,
                           out + t * PANEL_ROWS);
        }
    }
}

#include "math/matmul_products.h"

const matmul_kernels matmul_avx512vnni = {activations_quantize_avx2, activations_quantize_pairs_avx2, panel_product, floats_product_avx512};
