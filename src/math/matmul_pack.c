/* The panel layout of matmul_internal.h, written and read one row at a time. */
#include <assert.h>
#include <string.h>

#include "math/matmul_internal.h"

void panel_layout_get(block_type type, panel_layout *layout)
{
    const block_traits *t = block_traits_get(type);
    int offset = 2 * PANEL_ROWS;
    layout->low_bits = t->n_bits == 6 || t->n_bits == 5 ? 4 : t->n_bits == 3 ? 2 : t->n_bits;
    layout->high_bits = (uint8_t)(t->n_bits - layout->low_bits);
    layout->sub_bytes = (uint16_t)(64 * t->n_bits);
    layout->n_weights = t->n_scale ? 256 : 32;
    layout->m = (uint16_t)offset;
    offset += t->has_m ? 2 * PANEL_ROWS : 0;
    layout->scale = (uint16_t)offset;
    offset += t->n_scale * PANEL_ROWS;
    layout->min = (uint16_t)offset;
    offset += t->has_min && !t->fine ? t->n_scale * PANEL_ROWS : 0;
    layout->planes = (uint16_t)offset;
    layout->n_bytes = (uint16_t)(offset + layout->n_weights / SUB_BLOCK * layout->sub_bytes);
}

/* Where input k of a row lies in a plane: the byte and the shift. */
static int plane_place(int bits, int row, int k, int *shift)
{
    int per_byte = 8 / bits, vector = k / 4;
    *shift = bits * (bits == 4 ? vector / 4 : vector % per_byte);
    return 64 * (bits == 4 ? vector % 4 : vector / per_byte) + 4 * row + k % 4;
}

/* The bits [from, from + bits) of 32 quants, four at a time. */
static void plane_put(uint8_t *plane, int bits, int from, int row, const uint8_t *q)
{
    const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    uint32_t words[8] = {0};
    for (int v = 0; v < 8; v++) {
        uint32_t four;
        memcpy(&four, q + 4 * v, sizeof four);
        four = four >> from & mask;
        if (bits == 8)
            words[v] = four;
        else if (bits == 4)
            words[v % 4] |= four << 4 * (v / 4);
        else if (bits == 2)
            words[v / 4] |= four << 2 * (v % 4);
        else
            words[0] |= four << v;
    }
    for (int i = 0; i < bits; i++) memcpy(plane + 64 * i + 4 * row, &words[i], sizeof words[i]);
}

static int plane_get(const uint8_t *plane, int bits, int row, int k)
{
    int shift, byte = plane_place(bits, row, k, &shift);
    return plane[byte] >> shift & ((1 << bits) - 1);
}

static void panel_put(block_type type, const panel_layout *layout, uint8_t *block, int row, const block_parts *parts)
{
    const block_traits *t = block_traits_get(type);
    memcpy(block + 2 * row, &parts->d, 2);
    if (t->has_m) memcpy(block + layout->m + 2 * row, &parts->m, 2);
    for (int i = 0; i < t->n_scale; i++) {
        int packed_min = t->has_min && t->fine ? parts->min[i] << 4 : 0;
        block[layout->scale + PANEL_ROWS * i + row] = (uint8_t)(parts->scale[i] | packed_min);
        if (t->has_min && !t->fine) block[layout->min + PANEL_ROWS * i + row] = parts->min[i];
    }
    uint8_t *plane = block + layout->planes;
    for (int i = 0; i < layout->n_weights; i += SUB_BLOCK, plane += layout->sub_bytes) {
        plane_put(plane, layout->low_bits, 0, row, parts->q + i);
        if (layout->high_bits) plane_put(plane + 64 * layout->low_bits, layout->high_bits, layout->low_bits, row, parts->q + i);
    }
}

void panel_put_block(block_type type, const panel_layout *layout, uint8_t *block, int row, const uint8_t *source)
{
    if (type == BLOCK_Q4_0 || type == BLOCK_Q4_1 || type == BLOCK_IQ4_NL) { /* the planes hold the source's bytes */
        memcpy(block + 2 * row, source, 2);
        if (type == BLOCK_Q4_1) memcpy(block + layout->m + 2 * row, source + 2, 2);
        source += layout->planes / PANEL_ROWS;
        for (int i = 0; i < 4; i++) memcpy(block + layout->planes + 64 * i + 4 * row, source + 4 * i, 4);
        return;
    }
    block_parts parts;
    block_split(type, source, &parts);
    panel_put(type, layout, block, row, &parts);
}

static void scales_get(const block_traits *t, const panel_layout *layout, const uint8_t *block, int row, block_parts *parts)
{
    parts->m = 0;
    memcpy(&parts->d, block + 2 * row, 2);
    if (t->has_m) memcpy(&parts->m, block + layout->m + 2 * row, 2);
    int n = t->n_scale;
    assert(n <= 16);
    for (int i = 0; i < n; i++) parts->scale[i & 15] = block[layout->scale + PANEL_ROWS * i + row];
    if (!t->has_min) return;
    if (!t->fine) {
        for (int i = 0; i < n; i++) parts->min[i & 15] = block[layout->min + PANEL_ROWS * i + row];
        return;
    }
    for (int i = 0; i < 16; i++) {
        parts->min[i] = parts->scale[i] >> 4;
        parts->scale[i] &= 15;
    }
}

static uint8_t quant_get(const panel_layout *layout, const uint8_t *plane, int row, int k)
{
    int q = plane_get(plane, layout->low_bits, row, k);
    if (layout->high_bits) q |= plane_get(plane + 64 * layout->low_bits, layout->high_bits, row, k) << layout->low_bits;
    return (uint8_t)q;
}

void panel_get(block_type type, const panel_layout *layout, const uint8_t *block, int row, block_parts *parts)
{
    scales_get(block_traits_get(type), layout, block, row, parts);
    for (int i = 0; i < layout->n_weights; i++)
        parts->q[i] = quant_get(layout, block + layout->planes + i / SUB_BLOCK * layout->sub_bytes, row, i % SUB_BLOCK);
}

void panel_unpack(block_type type, const panel_layout *layout, const uint8_t *block, int sub, panel_values *values)
{
    const block_traits *t = block_traits_get(type);
    const uint8_t *plane = block + layout->planes + sub * layout->sub_bytes;
    for (int row = 0; row < PANEL_ROWS; row++) {
        block_parts parts;
        scales_get(t, layout, block, row, &parts);
        for (int half = 0; half < 2; half++) block_scale(type, &parts, sub, half, &values->scale[half][row], &values->min[half][row]);
        for (int k = 0; k < SUB_BLOCK; k++) values->q[k / 4][4 * row + k % 4] = (int8_t)block_value(type, quant_get(layout, plane, row, k));
    }
}
