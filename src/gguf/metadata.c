/* Getters of keys. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "gguf/parts.h"

static int compare_key(const void *key, const void *entry)
{
    return strcmp(key, (*(gguf_entry *const *)entry)->key);
}

const gguf_entry *gguf_entry_find(const gguf_file *g, const char *key)
{
    gguf_entry *const *found = bsearch(key, g->by_key, (size_t)g->n_entries, sizeof *g->by_key, compare_key);
    return found ? *found : NULL;
}

static void wrong_type(const gguf_file *g, const char *key, const char *wanted)
{
    char shown[NAME_SHOWN];
    if (g->wrong->code != QUARRY_OK) return; /* the first is reported */
    error_set(g->wrong, QUARRY_ERROR_FORMAT, "%s: key %s is not %s", g->path, gguf_shown(shown, key, strlen(key)), wanted);
}

quarry_code gguf_metadata_error(const gguf_file *g, quarry_error *error)
{
    if (g->wrong->code == QUARRY_OK) return QUARRY_OK;
    return error_set(error, g->wrong->code, "%s", g->wrong->message);
}

/* Element i of a value of numbers as an integer; false if it is not one. */
static bool number_int(const gguf_file *g, const gguf_entry *e, uint64_t i, int64_t *value)
{
    const uint8_t *p = g->header + e->value_at + i * gguf_type_size(e->type);
    int8_t s8;
    uint16_t u16;
    int16_t s16;
    uint32_t u32;
    int32_t s32;
    uint64_t u64;
    float f32;
    double f64 = 0;
    switch (e->type) {
    case TYPE_BOOL:
    case TYPE_UINT8: *value = *p; return true;
    case TYPE_INT8:
        memcpy(&s8, p, 1);
        *value = s8;
        return true;
    case TYPE_UINT16:
        memcpy(&u16, p, 2);
        *value = u16;
        return true;
    case TYPE_INT16:
        memcpy(&s16, p, 2);
        *value = s16;
        return true;
    case TYPE_UINT32:
        memcpy(&u32, p, 4);
        *value = u32;
        return true;
    case TYPE_INT32:
        memcpy(&s32, p, 4);
        *value = s32;
        return true;
    case TYPE_INT64: memcpy(value, p, 8); return true;
    case TYPE_UINT64:
        memcpy(&u64, p, 8);
        *value = (int64_t)u64;
        return u64 <= INT64_MAX;
    case TYPE_FLOAT32:
        memcpy(&f32, p, 4);
        f64 = (double)f32;
        break;
    case TYPE_FLOAT64: memcpy(&f64, p, 8); break;
    default: return false;
    }
    if (!(f64 >= -0x1p63 && f64 < 0x1p63) || f64 != trunc(f64)) return false; /* NaN fails the first */
    *value = (int64_t)f64;
    return true;
}

static bool number_float(const gguf_file *g, const gguf_entry *e, uint64_t i, double *value)
{
    const uint8_t *p = g->header + e->value_at + i * gguf_type_size(e->type);
    float f32;
    int64_t whole;
    if (e->type == TYPE_FLOAT32) {
        memcpy(&f32, p, 4);
        *value = (double)f32;
        return true;
    }
    if (e->type == TYPE_FLOAT64) {
        memcpy(value, p, 8);
        return true;
    }
    if (!number_int(g, e, i, &whole)) return false;
    *value = (double)whole;
    return whole >= -(1LL << 53) && whole <= 1LL << 53;
}

bool gguf_has(const gguf_file *g, const char *key)
{
    return gguf_entry_find(g, key) != NULL;
}

int64_t gguf_int(const gguf_file *g, const char *key, int64_t def)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    int64_t value;
    if (!e) return def;
    if (!e->is_array && e->type != TYPE_BOOL && number_int(g, e, 0, &value)) return value;
    wrong_type(g, key, "a whole number");
    return def;
}

double gguf_float(const gguf_file *g, const char *key, double def)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    double value;
    if (!e) return def;
    if (!e->is_array && e->type != TYPE_BOOL && number_float(g, e, 0, &value)) return value;
    wrong_type(g, key, "a number");
    return def;
}

bool gguf_bool(const gguf_file *g, const char *key, bool def)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    if (!e) return def;
    if (!e->is_array && e->type == TYPE_BOOL) return g->header[e->value_at] != 0;
    wrong_type(g, key, "true or false");
    return def;
}

const char *gguf_string(const gguf_file *g, const char *key, size_t *n_bytes)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    if (n_bytes) *n_bytes = 0;
    if (!e) return NULL;
    if (e->is_array || e->type != TYPE_STRING) {
        wrong_type(g, key, "a string");
        return NULL;
    }
    if (n_bytes) *n_bytes = (size_t)e->count;
    return (const char *)g->header + e->value_at;
}

static gguf_value_kind kind_of(gguf_type type)
{
    switch (type) {
    case TYPE_FLOAT32:
    case TYPE_FLOAT64: return GGUF_FLOAT;
    case TYPE_BOOL: return GGUF_BOOL;
    case TYPE_STRING: return GGUF_STRING;
    default: return GGUF_INT;
    }
}

int64_t gguf_array(const gguf_file *g, const char *key, gguf_value_kind kind)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    return e && e->is_array && kind_of(e->type) == kind ? (int64_t)e->count : -1;
}

/* The entry if it is an array with an element i. */
static const gguf_entry *array_find(const gguf_file *g, const char *key, int64_t i)
{
    const gguf_entry *e = gguf_entry_find(g, key);
    return e && e->is_array && i >= 0 && (uint64_t)i < e->count ? e : NULL;
}

int64_t gguf_array_int(const gguf_file *g, const char *key, int64_t i)
{
    const gguf_entry *e = array_find(g, key, i);
    int64_t value = 0;
    if (e && number_int(g, e, (uint64_t)i, &value)) return value;
    wrong_type(g, key, "an array of whole numbers of the expected length");
    return 0;
}

double gguf_array_float(const gguf_file *g, const char *key, int64_t i)
{
    const gguf_entry *e = array_find(g, key, i);
    double value = 0;
    if (e && number_float(g, e, (uint64_t)i, &value)) return value;
    wrong_type(g, key, "an array of numbers of the expected length");
    return 0;
}

const char *gguf_array_string(const gguf_file *g, const char *key, int64_t i, size_t *n_bytes)
{
    const gguf_entry *e = array_find(g, key, i);
    uint64_t n;
    if (n_bytes) *n_bytes = 0;
    if (!e || e->type != TYPE_STRING) {
        wrong_type(g, key, "an array of strings of the expected length");
        return NULL;
    }
    memcpy(&n, g->header + e->strings[i], sizeof n);
    if (n_bytes) *n_bytes = (size_t)n;
    return (const char *)g->header + e->strings[i] + sizeof n;
}
