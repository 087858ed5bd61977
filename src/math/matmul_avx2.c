/* Integer products of 16 rows (two vectors of 8) at a time. Unsigned weights times signed activations give 16-bit sums of two products; as many of them as
 * 16 bits hold are added before they are widened: 8 for weights up to 4 bits (8 * 2 * 15 * 127 = 30,480), 4 for 5 bits (31,496), 2 for 6 bits (32,004).
 * 8-bit weights multiply their magnitude with the activation that took their sign, and are widened at once (2 * 128 * 127 = 32,512). All sums are exact.
 *
 * Up to four rows of activations (decode) multiply weights as they are unpacked. More rows first unpack 256 inputs of the panel into the first-level cache and
 * pass over them. Tiles are two rows of activations: wider ones measured slower, 16 registers do not hold them. On Zen 4, 1536 x 576, one thread: 207 Gop/s
 * (Q4_1), 113 (Q8_0), and for one row what memory gives (bench/bench_matmul.c). */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "math/matmul_internal.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

enum { TILE = 2, FUSED_MAX = 4, CHUNK_BLOCKS = 8 };

/* 32 inputs of a panel; [2]: rows 0-7 and 8-15. Quants are unsigned (Q8_0 and IQ4_NL: signed). */
typedef struct weights {
    __m256i q[8][2];
    __m256 scale[2][2], min[2][2]; /* [half][2] */
} weights;

static ALWAYS_INLINE __m256i load_bytes(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

static ALWAYS_INLINE __m256 load_f16(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static ALWAYS_INLINE __m256i load_u8(const uint8_t *p)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}

static ALWAYS_INLINE __m256i load_i8(const uint8_t *p)
{
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p));
}

static ALWAYS_INLINE bool type_is_fine(const block_type type)
{
    return type == BLOCK_Q2_K || type == BLOCK_Q3_K || type == BLOCK_Q6_K;
}

static ALWAYS_INLINE bool type_has_min(const block_type type)
{
    return type == BLOCK_Q4_1 || type == BLOCK_Q5_1 || type == BLOCK_Q4_K || type == BLOCK_Q5_K || type == BLOCK_Q2_K;
}

static ALWAYS_INLINE bool type_is_signed(const block_type type)
{
    return type == BLOCK_Q8_0 || type == BLOCK_IQ4_NL;
}

/* log2 of the offset of the unsigned quants, for the types without min. */
static ALWAYS_INLINE int type_shift(const block_type type)
{
    return type == BLOCK_Q4_0 ? 3 : type == BLOCK_Q5_0 ? 4 : type == BLOCK_Q6_K ? 5 : 2;
}

/* Vectors of products that 16 bits can hold. */
static ALWAYS_INLINE int type_run(const block_type type)
{
    if (type_is_fine(type)) return type == BLOCK_Q6_K ? 2 : 4;
    return type == BLOCK_Q5_0 || type == BLOCK_Q5_1 || type == BLOCK_Q5_K ? 4 : 8;
}

static ALWAYS_INLINE __m256i shift_bytes(__m256i x, int left, __m256i mask)
{
    return _mm256_and_si256(left >= 0 ? _mm256_slli_epi16(x, left) : _mm256_srli_epi16(x, -left), mask);
}

/* Vector v of a plane of `bits` bits, moved to bit `to` of each byte. */
static ALWAYS_INLINE __m256i plane_vector(const uint8_t *p, const int bits, const int to, const int v, const int rows)
{
    const int plane = bits == 4 ? v % 4 : bits * v / 8, from = bits == 4 ? v / 4 * 4 : bits * v % 8;
    const __m256i mask = _mm256_set1_epi8((char)(((1 << bits) - 1) << to));
    return shift_bytes(load_bytes(p + 64 * plane + 32 * rows), to - from, mask);
}

static ALWAYS_INLINE __m256i unpack_vector(const block_type type, const uint8_t *p, const int v, const int rows)
{
    switch ((int)type) {
    case BLOCK_Q8_0: return load_bytes(p + 64 * v + 32 * rows);
    case BLOCK_Q2_K: return plane_vector(p, 2, 0, v, rows);
    case BLOCK_Q3_K: return _mm256_or_si256(plane_vector(p, 2, 0, v, rows), plane_vector(p + 128, 1, 2, v, rows));
    case BLOCK_Q6_K: return _mm256_or_si256(plane_vector(p, 4, 0, v, rows), plane_vector(p + 256, 2, 4, v, rows));
    case BLOCK_Q5_0:
    case BLOCK_Q5_1:
    case BLOCK_Q5_K: return _mm256_or_si256(plane_vector(p, 4, 0, v, rows), plane_vector(p + 256, 1, 4, v, rows));
    case BLOCK_IQ4_NL:
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)iq4_nl_values)),
                                   plane_vector(p, 4, 0, v, rows));
    default: return plane_vector(p, 4, 0, v, rows);
    }
}

static ALWAYS_INLINE void unpack_scales(const block_type type, const panel_layout *layout, const uint8_t *block, int sub, weights *w)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int r = 0; r < 2; r++) {
        __m256 d = load_f16(block + 16 * r), m = type_has_min(type) ? load_f16(block + layout->m + 16 * r) : d;
        const uint8_t *scale = block + layout->scale + (type_is_fine(type) ? 32 : 16) * sub + 8 * r;
        w->scale[0][r] = d;
        w->min[0][r] = m;
        if (type == BLOCK_Q4_K || type == BLOCK_Q5_K) {
            w->scale[0][r] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(load_u8(scale)));
            w->min[0][r] = _mm256_xor_ps(_mm256_mul_ps(m, _mm256_cvtepi32_ps(load_u8(block + layout->min + 16 * sub + 8 * r))), sign);
        }
        for (int half = 0; half < 2 && type_is_fine(type); half++, scale += 16) {
            if (type != BLOCK_Q2_K) {
                w->scale[half][r] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(load_i8(scale)));
                continue;
            }
            __m256i both = load_u8(scale);
            w->scale[half][r] = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15))));
            w->min[half][r] = _mm256_xor_ps(_mm256_mul_ps(m, _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4))), sign);
        }
    }
}

static ALWAYS_INLINE void unpack(const block_type type, const panel_layout *layout, const uint8_t *block, int sub, weights *w)
{
    const uint8_t *p = block + layout->planes + sub * layout->sub_bytes;
    for (int v = 0; v < 8; v++)
        for (int r = 0; r < 2; r++) w->q[v][r] = unpack_vector(type, p, v, r);
    unpack_scales(type, layout, block, sub, w);
}

static ALWAYS_INLINE __m256i broadcast4(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
}

/* dot[n][2] += the n_v vectors from q on. */
static ALWAYS_INLINE void dot_vectors(const int n, const bool is_signed, const int run, const __m256i (*q)[2], const int n_v,
                                      const uint8_t *a, __m256i (*dot)[2])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[TILE][2];
    for (int v = 0; v < n_v; v++) {
        for (int t = 0; t < n; t++) {
            __m256i four = broadcast4(a + t * SUB_BLOCK + 4 * v);
            for (int r = 0; r < 2; r++) {
                __m256i pairs = is_signed ? _mm256_maddubs_epi16(_mm256_abs_epi8(q[v][r]), _mm256_sign_epi8(four, q[v][r]))
                                          : _mm256_maddubs_epi16(q[v][r], four);
                sum[t][r] = is_signed || v % run == 0 ? pairs : _mm256_add_epi16(sum[t][r], pairs);
                if (is_signed || v % run == run - 1) dot[t][r] = _mm256_add_epi32(dot[t][r], _mm256_madd_epi16(sum[t][r], ones));
            }
        }
        /* Keeps compilers from moving the additions behind all products, which spills every one of them: 207 instead of 140 Gop/s. */
        for (int t = 0; t < n; t++) __asm__("" : "+x"(sum[t][0]), "+x"(sum[t][1]));
    }
}

static ALWAYS_INLINE void add_scaled(const __m256i *dot, const __m256 *scale, __m256 d, __m256 *acc)
{
    for (int r = 0; r < 2; r++) acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r]), _mm256_mul_ps(scale[r], d), acc[r]);
}

static ALWAYS_INLINE void add_min(const __m256 *min, __m256 sum, __m256 *acc)
{
    for (int r = 0; r < 2; r++) acc[r] = _mm256_fmadd_ps(min[r], sum, acc[r]);
}

/* acc[n][2] += 32 inputs of n <= TILE rows; pairs: of one, whose terms are the two rows of the tile. */
static ALWAYS_INLINE void multiply(const block_type type, const bool pairs, const int n, const weights *w, const uint8_t *quants,
                                   const activation_scale *s, __m256 (*acc)[2])
{
    const bool fine = type_is_fine(type), with_start = !type_has_min(type) && !type_is_signed(type);
    const int shift = type_shift(type), n_v = fine ? 4 : 8;
    for (int half = 0; half < (fine ? 2 : 1); half++) {
        __m256i dot[TILE][2];
        for (int t = 0; t < n; t++) {
            int minus = !fine ? s[t].minus : half ? s[t].minus - s[t].minus_lo : s[t].minus_lo, term = pairs ? 1 : t;
            if (pairs) dot[0][0] = dot[0][1] = _mm256_setzero_si256();
            dot[term][0] = dot[term][1] = with_start ? _mm256_slli_epi32(_mm256_set1_epi32(minus), shift) : _mm256_setzero_si256();
        }
        dot_vectors(pairs ? 2 : n, type_is_signed(type), type_run(type), w->q + 4 * half, n_v, quants + 16 * half, dot);
        for (int r = 0; r < 2 && pairs; r++) dot[0][r] = _mm256_add_epi32(_mm256_slli_epi32(dot[0][r], PAIR_BITS), dot[1][r]);
        for (int t = 0; t < n; t++) add_scaled(dot[t], w->scale[half], _mm256_set1_ps(s[t].d), acc[t]);
    }
    for (int t = 0; t < n && type_has_min(type); t++) {
        if (!fine) {
            add_min(w->min[0], _mm256_set1_ps(s[t].sum), acc[t]);
            continue;
        }
        add_min(w->min[0], _mm256_set1_ps(s[t].d * (float)-s[t].minus_lo), acc[t]);
        add_min(w->min[1], _mm256_set1_ps(s[t].d * (float)(s[t].minus_lo - s[t].minus)), acc[t]);
    }
}

/* Few rows: n <= TILE of a group of `size` from row `first` on, unpacking in registers. */
static ALWAYS_INLINE void fused(const block_type type, const bool pairs, const int n, const panel_layout *layout, const uint8_t *panel,
                                int64_t n_in, const uint8_t *group, int size, int first, float *out)
{
    const int n_sub = layout->n_weights / SUB_BLOCK, n_q = (pairs ? 2 : 1) * SUB_BLOCK, step = size * activation_row_bytes(pairs);
    const uint8_t *quants = group + first * n_q, *scales = group + size * n_q + first * (int)sizeof(activation_scale);
    __m256 acc[TILE][2];
    for (int t = 0; t < n; t++) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
    for (int64_t b = 0; b < n_in / layout->n_weights; b++, panel += layout->n_bytes) {
        for (int sub = 0; sub < n_sub; sub++, quants += step, scales += step) {
            weights w;
            unpack(type, layout, panel, sub, &w);
            multiply(type, pairs, n, &w, quants, (const activation_scale *)(const void *)scales, acc);
        }
    }
    for (int t = 0; t < n; t++)
        for (int r = 0; r < 2; r++) _mm256_storeu_ps(out + (first + t) * PANEL_ROWS + 8 * r, acc[t][r]);
}

/* One group. After the first pass the panel comes from the cache. */
static ALWAYS_INLINE void fused_group(const block_type type, const bool pairs, const panel_layout *layout, const uint8_t *panel,
                                      int64_t n_in, const uint8_t *group, int size, float *out)
{
    for (int t = 0; t < size;) {
        if (pairs || size - t == 1)
            fused(type, pairs, 1, layout, panel, n_in, group, size, t, out), t += 1;
        else
            fused(type, pairs, TILE, layout, panel, n_in, group, size, t, out), t += TILE;
    }
}

/* out[n] += n_blocks sub-blocks; n rows of a group of `size` from row `first` on. */
static ALWAYS_INLINE void tile(const block_type type, const bool pairs, const int n, const weights *w, int n_blocks, const uint8_t *group,
                               int size, int first, float *out)
{
    const int n_q = (pairs ? 2 : 1) * SUB_BLOCK, step = size * activation_row_bytes(pairs);
    const uint8_t *quants = group + first * n_q, *scales = group + size * n_q + first * (int)sizeof(activation_scale);
    __m256 acc[TILE][2];
    out += first * PANEL_ROWS;
    for (int t = 0; t < n; t++)
        for (int r = 0; r < 2; r++) acc[t][r] = _mm256_loadu_ps(out + t * PANEL_ROWS + 8 * r);
    for (int b = 0; b < n_blocks; b++, quants += step, scales += step)
        multiply(type, pairs, n, &w[b], quants, (const activation_scale *)(const void *)scales, acc);
    for (int t = 0; t < n; t++)
        for (int r = 0; r < 2; r++) _mm256_storeu_ps(out + t * PANEL_ROWS + 8 * r, acc[t][r]);
}

/* One group of `size` rows. */
static ALWAYS_INLINE void group_multiply(const block_type type, const bool pairs, const weights *w, int n_blocks, const uint8_t *group,
                                         int size, float *out)
{
    for (int t = 0; t < size;) {
        if (pairs || size - t == 1)
            tile(type, pairs, 1, w, n_blocks, group, size, t, out), t += 1;
        else
            tile(type, pairs, TILE, w, n_blocks, group, size, t, out), t += TILE;
    }
}

/* out[n][16] += what the first terms left: few blocks here and there, and the panel is in the cache. */
static ALWAYS_INLINE void add_rests(const block_type type, const panel_layout *layout, const uint8_t *panel, int64_t n_in,
                                    const rest_list *rests, int64_t n, float *out)
{
    const int n_sub = layout->n_weights / SUB_BLOCK;
    for (int64_t first = 0; first < n; first += ACTIVATION_GROUP, out += ACTIVATION_GROUP * PANEL_ROWS) {
        const rest_list *list = rest_list_at(rests, first / ACTIVATION_GROUP, n_in);
        for (const rest_block *r = list->blocks, *end = r + list->n; r < end;) {
            const int32_t block = r->block;
            weights w;
            unpack(type, layout, panel + block / n_sub * layout->n_bytes, block % n_sub, &w);
            for (; r < end && r->block == block; r++) {
                float *y = out + r->row * PANEL_ROWS;
                __m256 acc[1][2] = {{_mm256_loadu_ps(y), _mm256_loadu_ps(y + 8)}};
                multiply(type, false, 1, &w, (const uint8_t *)r->q, &r->scale, acc);
                for (int half = 0; half < 2; half++) _mm256_storeu_ps(y + 8 * half, acc[0][half]);
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
    if (n <= (pairs ? FUSED_MAX / 2 : FUSED_MAX)) {
        fused_group(type, pairs, &layout, panel, n_in, quantized, (int)n, out);
        return;
    }
    const int64_t n_blocks = n_in / SUB_BLOCK;
    const int n_sub = layout.n_weights / SUB_BLOCK;
    weights chunk[CHUNK_BLOCKS];
    memset(out, 0, (size_t)n * PANEL_ROWS * sizeof *out);
    for (int64_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        int m = n_blocks - b < CHUNK_BLOCKS ? (int)(n_blocks - b) : CHUNK_BLOCKS;
        for (int i = 0; i < m; i++) unpack(type, &layout, panel + (b + i) / n_sub * layout.n_bytes, (int)((b + i) % n_sub), &chunk[i]);
        for (int64_t t = 0; t < n; t += rows) {
            int size = n - t < rows ? (int)(n - t) : rows;
            group_multiply(type, pairs, chunk, m, quantized + activation_bytes(t, n_in, pairs) + b * size * activation_row_bytes(pairs),
                           size, out + t * PANEL_ROWS);
        }
    }
}

#include "math/matmul_products.h"

static ALWAYS_INLINE int32_t add_lanes(__m256i v)
{
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

/* Largest of the lanes, which are not negative. */
static ALWAYS_INLINE uint32_t max_lanes(__m256i v)
{
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

static ALWAYS_INLINE void store_quants(const __m256i *n, uint8_t *q)
{
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); /* undoes the lane order of the packs */
    _mm256_storeu_si256((__m256i *)(void *)q, bytes);
}

/* As in matmul_scalar.c, bit for bit. */
static ALWAYS_INLINE void quantize_block(const float *x, uint8_t *q, activation_scale *s)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256 v[4];
    __m256i max = _mm256_setzero_si256(), n[4];
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        max = _mm256_max_epi32(max, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    uint32_t max_bits = max_lanes(max);
    float largest;
    memcpy(&largest, &max_bits, sizeof largest);
    bool finite = max_bits < 0x7f800000;
    if (!finite || !(largest >= 1e-30f)) {
        memset(q, 0, SUB_BLOCK);
        *s = (activation_scale){.d = finite ? 0 : NAN, .sum = finite ? 0 : NAN};
        return;
    }
    __m256 inverse = _mm256_set1_ps(127 / largest);
    for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    int32_t lo = add_lanes(_mm256_add_epi32(n[0], n[1])), sum = lo + add_lanes(_mm256_add_epi32(n[2], n[3]));
    store_quants(n, q);
    float d = largest / 127;
    *s = (activation_scale){d, d * (float)sum, -sum, -lo};
}

void activations_quantize_avx2(const float *x, int n, int64_t n_in, uint8_t *out)
{
    for (int64_t b = 0; b < n_in / SUB_BLOCK; b++, out += n * activation_row_bytes(false)) {
        activation_scale *s = (activation_scale *)(void *)(out + n * SUB_BLOCK);
        for (int t = 0; t < n; t++) quantize_block(x + t * n_in + b * SUB_BLOCK, out + t * SUB_BLOCK, &s[t]);
    }
}

/* The second term of a block whose first is finite and not zero. */
static ALWAYS_INLINE void quantize_rest(const float *x, const uint8_t *first, uint8_t *q, activation_scale *s)
{
    const __m256 d = _mm256_set1_ps(s->d), inverse = _mm256_set1_ps((1 << PAIR_BITS) / s->d);
    __m256i n[4];
    for (int i = 0; i < 4; i++) {
        __m256 whole = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(first + 8 * i))));
        n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + 8 * i), _mm256_mul_ps(d, whole)), inverse));
        n[i] = _mm256_max_epi32(_mm256_min_epi32(n[i], _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
    }
    int32_t lo = add_lanes(_mm256_add_epi32(n[0], n[1])), sum = lo + add_lanes(_mm256_add_epi32(n[2], n[3]));
    store_quants(n, q);
    s->minus = s->minus * (1 << PAIR_BITS) - sum;
    s->minus_lo = s->minus_lo * (1 << PAIR_BITS) - lo;
    s->d /= 1 << PAIR_BITS;
    s->sum = s->d * (float)-s->minus;
}

void activations_quantize_pairs_avx2(const float *x, int n, int64_t n_in, uint8_t *out)
{
    for (int64_t b = 0; b < n_in / SUB_BLOCK; b++, out += n * activation_row_bytes(true)) {
        activation_scale *s = (activation_scale *)(void *)(out + 2 * n * SUB_BLOCK);
        for (int t = 0; t < n; t++) {
            const float *row = x + t * n_in + b * SUB_BLOCK;
            uint8_t *q = out + 2 * t * SUB_BLOCK;
            quantize_block(row, q, &s[t]);
            if (s[t].d > 0)
                quantize_rest(row, q, q + SUB_BLOCK, &s[t]);
            else
                memset(q + SUB_BLOCK, 0, SUB_BLOCK);
        }
    }
}

const matmul_kernels matmul_avx2 = {activations_quantize_avx2, activations_quantize_pairs_avx2, panel_product, floats_product_avx2};
