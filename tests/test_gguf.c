/* gguf: what a well-formed file holds comes back; what a hostile one claims is an error that names it. */
#include <unistd.h>

#include "gguf/gguf.h"
#include "test.h"

/* A small writer. */

typedef struct buffer {
    uint8_t *bytes;
    size_t n;
} buffer;

enum { U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 };

static void put(buffer *b, const void *bytes, size_t n)
{
    b->bytes = realloc(b->bytes, b->n + n + 1);
    memcpy(b->bytes + b->n, bytes, n);
    b->n += n;
}

static void put_u32(buffer *b, uint32_t x)
{
    put(b, &x, 4);
}

static void put_u64(buffer *b, uint64_t x)
{
    put(b, &x, 8);
}

static void put_string(buffer *b, const char *text)
{
    put_u64(b, strlen(text));
    put(b, text, strlen(text));
}

static void put_header(buffer *b, uint64_t n_tensors, uint64_t n_keys)
{
    put(b, "GGUF", 4);
    put_u32(b, 3);
    put_u64(b, n_tensors);
    put_u64(b, n_keys);
}

static void put_key(buffer *b, const char *key, uint32_t type)
{
    put_string(b, key);
    put_u32(b, type);
}

static void put_key_string(buffer *b, const char *key, const char *value)
{
    put_key(b, key, STRING);
    put_string(b, value);
}

static void put_key_u32(buffer *b, const char *key, uint32_t value)
{
    put_key(b, key, U32);
    put_u32(b, value);
}

static void put_array(buffer *b, const char *key, uint32_t type, uint64_t n)
{
    put_key(b, key, ARRAY);
    put_u32(b, type);
    put_u64(b, n);
}

static void put_tensor(buffer *b, const char *name, uint32_t n_dims, const uint64_t *dims, uint32_t type, uint64_t offset)
{
    put_string(b, name);
    put_u32(b, n_dims);
    for (uint32_t d = 0; d < n_dims; d++) put_u64(b, dims[d]);
    put_u32(b, type);
    put_u64(b, offset);
}

static void put_zeros_to(buffer *b, size_t alignment)
{
    while (b->n % alignment) put(b, "", 1);
}

#define PUT(b, type, value) put(b, &(type){value}, sizeof(type))

/* All value types, and two tensors: a 2 x 3 of F32 (0, 1, …) and a row of 64 in Q8_0. */
static buffer well_formed(void)
{
    buffer b = {0};
    put_header(&b, 2, 18);
    put_key_string(&b, "general.architecture", "llama");
    put_key_u32(&b, "general.alignment", 64);
    put_key(&b, "u8", U8), PUT(&b, uint8_t, 200);
    put_key(&b, "i8", I8), PUT(&b, int8_t, -100);
    put_key(&b, "u16", U16), PUT(&b, uint16_t, 60000);
    put_key(&b, "i16", I16), PUT(&b, int16_t, -30000);
    put_key(&b, "i32", I32), PUT(&b, int32_t, -2000000000);
    put_key(&b, "f32", F32), PUT(&b, float, 0.5f);
    put_key(&b, "f32 whole", F32), PUT(&b, float, -1e6f);
    put_key(&b, "yes", BOOL), PUT(&b, uint8_t, 1);
    put_key(&b, "u64", U64), PUT(&b, uint64_t, UINT64_MAX);
    put_key(&b, "i64", I64), PUT(&b, int64_t, INT64_MIN);
    put_key(&b, "f64", F64), PUT(&b, double, 1e-9);
    put_array(&b, "ints", U16, 3), PUT(&b, uint16_t, 7), PUT(&b, uint16_t, 8), PUT(&b, uint16_t, 65535);
    put_array(&b, "floats", F32, 2), PUT(&b, float, 0.25f), PUT(&b, float, -4);
    put_array(&b, "bools", BOOL, 2), PUT(&b, uint8_t, 0), PUT(&b, uint8_t, 1);
    put_array(&b, "tokens", STRING, 3), put_string(&b, "a"), put_string(&b, ""), put_string(&b, "long token");
    put_key_string(&b, "empty", "");
    put_tensor(&b, "matrix", 2, (uint64_t[]){3, 2}, BLOCK_F32, 0);
    put_tensor(&b, "row", 1, (uint64_t[]){64}, BLOCK_Q8_0, 64);
    put_zeros_to(&b, 64);
    for (int i = 0; i < 6; i++) PUT(&b, float, (float)i);
    put_zeros_to(&b, 64);
    for (int i = 0; i < 68; i++) PUT(&b, uint8_t, (uint8_t)i);
    return b;
}

static void check_metadata(const gguf_file *g)
{
    size_t n = 99;
    assert_string_equal(gguf_string(g, "general.architecture", &n), "llama");
    assert_int_equal(n, 5);
    assert_string_equal(gguf_string(g, "empty", &n), "");
    assert_int_equal(n, 0);
    assert_null(gguf_string(g, "absent", NULL));
    assert_true(gguf_has(g, "u8"));
    assert_false(gguf_has(g, "u"));
    assert_int_equal(gguf_int(g, "u8", 0), 200);
    assert_int_equal(gguf_int(g, "i8", 0), -100);
    assert_int_equal(gguf_int(g, "u16", 0), 60000);
    assert_int_equal(gguf_int(g, "i16", 0), -30000);
    assert_int_equal(gguf_int(g, "i32", 0), -2000000000);
    assert_true(gguf_int(g, "i64", 0) == INT64_MIN);
    assert_int_equal(gguf_int(g, "f32 whole", 0), -1000000);
    assert_int_equal(gguf_int(g, "absent", -7), -7);
    assert_true(gguf_float(g, "f32", 0) == 0.5);
    assert_true(gguf_float(g, "f64", 0) == 1e-9);
    assert_true(gguf_float(g, "u16", 0) == 60000);
    assert_true(gguf_float(g, "absent", 2.5) == 2.5);
    assert_true(gguf_bool(g, "yes", false));
    assert_true(gguf_bool(g, "absent", true));
    assert_int_equal(gguf_array(g, "ints", GGUF_INT), 3);
    assert_int_equal(gguf_array(g, "ints", GGUF_FLOAT), -1);
    assert_int_equal(gguf_array(g, "u8", GGUF_INT), -1);
    assert_int_equal(gguf_array(g, "absent", GGUF_INT), -1);
    assert_int_equal(gguf_array_int(g, "ints", 2), 65535);
    assert_int_equal(gguf_array(g, "floats", GGUF_FLOAT), 2);
    assert_true(gguf_array_float(g, "floats", 1) == -4);
    assert_int_equal(gguf_array(g, "bools", GGUF_BOOL), 2);
    assert_int_equal(gguf_array_int(g, "bools", 1), 1);
    assert_int_equal(gguf_array(g, "tokens", GGUF_STRING), 3);
    assert_memory_equal(gguf_array_string(g, "tokens", 2, &n), "long token", 10);
    assert_int_equal(n, 10);
    assert_non_null(gguf_array_string(g, "tokens", 1, &n));
    assert_int_equal(n, 0);
    assert_memory_equal(gguf_array_string(g, "tokens", 0, &n), "a", 1);
    assert_int_equal(n, 1);
    quarry_error error = {0};
    assert_int_equal(gguf_metadata_error(g, &error), QUARRY_OK);
}

static void check_tensors(const gguf_file *g, bool copies)
{
    quarry_error error = {0};
    void *copy;
    assert_int_equal(gguf_n_tensors(g), 2);
    assert_null(gguf_find(g, "matri"));
    const gguf_tensor *matrix = gguf_find(g, "matrix"), *row = gguf_find(g, "row");
    assert_ptr_equal(matrix, gguf_tensor_at(g, 0));
    assert_ptr_equal(row, gguf_tensor_at(g, 1));
    assert_string_equal(matrix->name, "matrix");
    assert_int_equal(matrix->type, BLOCK_F32);
    assert_int_equal(matrix->n_dims, 2);
    assert_int_equal(matrix->dims[0], 3);
    assert_int_equal(matrix->dims[1], 2);
    assert_int_equal(matrix->dims[2], 1);
    assert_int_equal(matrix->n_bytes, 24);
    assert_int_equal(row->n_bytes, 68);
    assert_memory_equal(gguf_tensor_data(g, matrix, &copy, &error), ((float[]){0, 1, 2, 3, 4, 5}), 24);
    assert_int_equal(copy != NULL, copies);
    memory_free(copy);
    const uint8_t *bytes = gguf_tensor_data(g, row, &copy, &error);
    for (int i = 0; i < 68; i++) assert_int_equal(bytes[i], i);
    memory_free(copy);
    gguf_tensor_release(g, row);
    assert_int_equal(gguf_check(g, &error), QUARRY_OK);
}

static void file_write(char name[32], const buffer *b)
{
    strcpy(name, "test_gguf_XXXXXX");
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, b->bytes, b->n), (ssize_t)b->n);
    close(fd);
}

static void a_well_formed_file_comes_back_from_memory_mapping_and_reads(void **state)
{
    (void)state;
    buffer b = well_formed();
    char name[32];
    quarry_error error = {0};
    file_write(name, &b);
    for (int how = 0; how < 3; how++) {
        gguf_file *g = how == 2 ? gguf_open_memory(b.bytes, b.n, name, &error) : gguf_open(name, how == 0, &error);
        if (!g) fail_msg("%s", error.message);
        assert_string_equal(gguf_path(g), name);
        check_metadata(g);
        check_tensors(g, how == 1);
        gguf_close(g);
    }
    unlink(name);
    free(b.bytes);
}

static void a_header_larger_than_one_read_comes_back(void **state)
{
    (void)state;
    enum { N = 150000 };
    buffer b = {0};
    char text[32], name[32];
    quarry_error error = {0};
    size_t n, capacity = 64 << 20;
    b.bytes = malloc(capacity);
    put_header(&b, 1, 2);
    put_array(&b, "tokens", STRING, N);
    b.bytes = realloc(b.bytes, capacity);
    uint8_t *p = b.bytes + b.n;
    for (int i = 0; i < N; i++) {
        uint64_t length = (uint64_t)snprintf(text, sizeof text, "token number %d", i);
        memcpy(p, &length, 8);
        memcpy(p + 8, text, length);
        p += 8 + length;
    }
    b.n = (size_t)(p - b.bytes);
    put_key_string(&b, "last", "key");
    put_tensor(&b, "t", 1, (uint64_t[]){1}, BLOCK_F32, 0);
    put_zeros_to(&b, 32);
    put(&b, "\1\2\3\4", 4);
    file_write(name, &b);
    gguf_file *g = gguf_open(name, false, &error);
    assert_non_null(g);
    assert_int_equal(gguf_array(g, "tokens", GGUF_STRING), N);
    for (int i = 0; i < N; i++) {
        snprintf(text, sizeof text, "token number %d", i);
        const char *token = gguf_array_string(g, "tokens", i, &n);
        assert_int_equal(n, strlen(text));
        assert_memory_equal(token, text, n);
    }
    assert_string_equal(gguf_string(g, "last", NULL), "key");
    assert_string_equal(gguf_tensor_at(g, 0)->name, "t");
    gguf_close(g);
    unlink(name);
    free(b.bytes);
}

static void expect_error(gguf_file *g, const char *key, const char *cause)
{
    quarry_error error = {0};
    assert_int_equal(gguf_metadata_error(g, &error), QUARRY_ERROR_FORMAT);
    if (!strstr(error.message, key) || !strstr(error.message, cause)) fail_msg("%s", error.message);
    gguf_close(g);
}

static void keys_of_the_wrong_type_are_remembered(void **state)
{
    (void)state;
    buffer b = well_formed();
    gguf_file *g;
#define OPEN() (g = gguf_open_memory(b.bytes, b.n, "m.gguf", NULL))
    assert_int_equal(gguf_int(OPEN(), "general.architecture", 5), 5);
    assert_true(gguf_float(g, "tokens", 1) == 1); /* only the first is reported */
    expect_error(g, "general.architecture", "whole number");
    assert_int_equal(gguf_int(OPEN(), "f32", 5), 5);
    expect_error(g, "f32", "whole number");
    assert_int_equal(gguf_int(OPEN(), "u64", 5), 5);
    expect_error(g, "u64", "whole number");
    assert_true(gguf_float(OPEN(), "u64", 5) == 5);
    expect_error(g, "u64", "number");
    assert_int_equal(gguf_int(OPEN(), "ints", 5), 5);
    expect_error(g, "ints", "whole number");
    assert_true(gguf_bool(OPEN(), "u8", true));
    expect_error(g, "u8", "true or false");
    assert_null(gguf_string(OPEN(), "u8", NULL));
    expect_error(g, "u8", "string");
    assert_int_equal(gguf_array_int(OPEN(), "ints", 3), 0);
    expect_error(g, "ints", "length");
    assert_int_equal(gguf_array_int(OPEN(), "ints", -1), 0);
    expect_error(g, "ints", "length");
    assert_int_equal(gguf_array_int(OPEN(), "tokens", 0), 0);
    expect_error(g, "tokens", "whole numbers");
    assert_null(gguf_array_string(OPEN(), "ints", 0, NULL));
    expect_error(g, "ints", "strings");
#undef OPEN
    free(b.bytes);
}

/* Hostile files. */

/* Opening b fails with code; the message names the file and says cause. Frees b. */
static void refused(buffer b, quarry_code code, const char *cause)
{
    quarry_error error = {0};
    uint8_t *exact = malloc(b.n ? b.n : 1); /* so that AddressSanitizer sees the first byte too far */
    if (b.n) memcpy(exact, b.bytes, b.n);
    gguf_file *g = gguf_open_memory(exact, b.n, "bad.gguf", &error);
    assert_null(g);
    if (error.code != code || !strstr(error.message, cause) || !strstr(error.message, "bad.gguf") || strchr(error.message, '\n'))
        fail_msg("code %d, wanted \"%s\": %s", error.code, cause, error.message);
    free(exact);
    free(b.bytes);
}

static void what_is_not_gguf_is_refused(void **state)
{
    (void)state;
    buffer b = {0};
    refused(b, QUARRY_ERROR_FORMAT, "not a GGUF file");
    b = (buffer){0};
    put(&b, "PK\3\4 and so on and so forth", 24);
    refused(b, QUARRY_ERROR_FORMAT, "not a GGUF file");
    b = (buffer){0};
    put(&b, "GGUF", 4), put_u32(&b, 1), put_u32(&b, 0), put_u32(&b, 0);
    refused(b, QUARRY_ERROR_UNSUPPORTED, "version 1");
    b = (buffer){0};
    put(&b, "GGUF", 4), put_u32(&b, 4), put_u64(&b, 0), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_UNSUPPORTED, "version 4");
    b = (buffer){0};
    put(&b, "GGUF", 4), put_u32(&b, 3u << 24), put_u64(&b, 0), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_UNSUPPORTED, "big-endian");
}

static void false_counts_are_refused(void **state)
{
    (void)state;
    buffer b = {0};
    put_header(&b, 0, 1ull << 60);
    refused(b, QUARRY_ERROR_FORMAT, "1152921504606846976 keys");
    b = (buffer){0};
    put_header(&b, 1ull << 60, 0);
    refused(b, QUARRY_ERROR_FORMAT, "1152921504606846976 tensors");
    b = (buffer){0};
    put_header(&b, 0, 2), put_key_string(&b, "only", "one, and not a second key");
    refused(b, QUARRY_ERROR_FORMAT, "end of the file");
    b = (buffer){0};
    put_header(&b, 0, 1), put_key(&b, "long", STRING), put_u64(&b, 1 << 30), put(&b, "short", 5);
    refused(b, QUARRY_ERROR_FORMAT, "key long");
    b = (buffer){0};
    put_header(&b, 0, 1), put_key(&b, "long", STRING), put_u64(&b, UINT64_MAX), put(&b, "short", 5);
    refused(b, QUARRY_ERROR_FORMAT, "end of the file");
    b = (buffer){0};
    put_header(&b, 0, 1), put_array(&b, "array", U64, (1ull << 61) + 1), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_FORMAT, "key array");
    b = (buffer){0};
    put_header(&b, 0, 1), put_array(&b, "array", STRING, 1ull << 61), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_FORMAT, "strings, more than the file can hold");
    b = (buffer){0};
    put_header(&b, 0, 1), put_array(&b, "array", STRING, 2), put_string(&b, "x"), put_u64(&b, 1ull << 40);
    refused(b, QUARRY_ERROR_FORMAT, "key array");
}

static void bad_keys_are_refused(void **state)
{
    (void)state;
    buffer b = {0};
    put_header(&b, 0, 1), put_key(&b, "typed", 13), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_FORMAT, "unknown value type 13");
    b = (buffer){0};
    put_header(&b, 0, 1), put_array(&b, "nested", ARRAY, 1), put_u32(&b, U8), put_u64(&b, 1), put(&b, "x", 1);
    refused(b, QUARRY_ERROR_FORMAT, "array of arrays");
    b = (buffer){0};
    put_header(&b, 0, 1), put_array(&b, "typed", 77, 1), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_FORMAT, "unknown value type 77");
    b = (buffer){0};
    put_header(&b, 0, 1), put_key_string(&b, "", "value");
    refused(b, QUARRY_ERROR_FORMAT, "empty name");
    b = (buffer){0};
    put_header(&b, 0, 1), put_u64(&b, 3), put(&b, "a\0b", 3), put_u32(&b, U32), put_u32(&b, 1);
    refused(b, QUARRY_ERROR_FORMAT, "NUL byte");
    b = (buffer){0};
    put_header(&b, 0, 1), put_u64(&b, 70000), put_u64(&b, 0);
    refused(b, QUARRY_ERROR_FORMAT, "70000 bytes");
    b = (buffer){0};
    put_header(&b, 0, 2), put_key_u32(&b, "same", 1), put_key_string(&b, "same", "again");
    refused(b, QUARRY_ERROR_FORMAT, "key same occurs twice");
    b = (buffer){0};
    put_header(&b, 0, 2), put_key_u32(&b, "a\n\033[31mb", 1), put_key_u32(&b, "a\n\033[31mb", 1);
    refused(b, QUARRY_ERROR_FORMAT, "key a??[31mb occurs twice"); /* a message stays one harmless line */
}

static void bad_alignments_are_refused(void **state)
{
    (void)state;
    const uint32_t wrong[] = {0, 1, 4, 48, 1u << 30, UINT32_MAX};
    buffer b;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        b = (buffer){0};
        put_header(&b, 0, 1), put_key_u32(&b, "general.alignment", wrong[i]);
        refused(b, QUARRY_ERROR_FORMAT, "general.alignment");
    }
    b = (buffer){0};
    put_header(&b, 0, 1), put_key_string(&b, "general.alignment", "wide");
    refused(b, QUARRY_ERROR_FORMAT, "general.alignment is not a whole number");
}

/* A file with one tensor and 4,096 bytes of data. */
static buffer one_tensor(const char *name, uint32_t n_dims, const uint64_t *dims, uint32_t type, uint64_t offset)
{
    buffer b = {0};
    put_header(&b, 1, 0);
    put_tensor(&b, name, n_dims, dims, type, offset);
    put_zeros_to(&b, 32);
    for (int i = 0; i < 512; i++) put_u64(&b, 0);
    return b;
}

#define DIMS(...)                                                                                                                          \
    (uint64_t[])                                                                                                                           \
    {                                                                                                                                      \
        __VA_ARGS__                                                                                                                        \
    }

static void bad_tensors_are_refused(void **state)
{
    (void)state;
    char long_name[66];
    memset(long_name, 'x', 65);
    long_name[65] = 0;
    refused(one_tensor(long_name, 1, DIMS(32), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "65 bytes");
    refused(one_tensor("", 1, DIMS(32), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "empty name");
    refused(one_tensor("t", 0, NULL, BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "tensor t has 0 dimensions");
    refused(one_tensor("t", 5, DIMS(1, 1, 1, 1, 1), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "5 dimensions");
    refused(one_tensor("t", 2, DIMS(32, 0), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "dimension of 0");
    refused(one_tensor("t", 2, DIMS(0, 1ull << 40), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "dimension of 0");
    refused(one_tensor("t", 2, DIMS(1ull << 32, 1ull << 32), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "product is too large");
    refused(one_tensor("t", 1, DIMS(1ull << 63), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "product is too large");
    refused(one_tensor("t", 2, DIMS(1ull << 31, 1ull << 31), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "product is too large");
    refused(one_tensor("t", 1, DIMS(1025), BLOCK_F32, 0), QUARRY_ERROR_FORMAT, "tensor t goes past the end of the file");
    refused(one_tensor("t", 1, DIMS(1024), BLOCK_F32, 32), QUARRY_ERROR_FORMAT, "end of the file");
    refused(one_tensor("t", 1, DIMS(1), BLOCK_F32, UINT64_MAX - 31), QUARRY_ERROR_FORMAT, "end of the file");
    refused(one_tensor("t", 1, DIMS(1), BLOCK_F32, 4), QUARRY_ERROR_FORMAT, "not a multiple of the alignment 32");
    refused(one_tensor("t", 2, DIMS(16, 2), BLOCK_Q8_0, 0), QUARRY_ERROR_FORMAT, "block of 32 of type Q8_0");
    refused(one_tensor("t", 1, DIMS(32), 99, 0), QUARRY_ERROR_FORMAT, "unknown type 99");
    refused(one_tensor("t", 1, DIMS(256), 16, 0), QUARRY_ERROR_UNSUPPORTED, "IQ2_XXS");
}

static buffer two_tensors(const char *first, uint64_t first_offset, const char *second, uint64_t second_offset)
{
    buffer b = {0};
    put_header(&b, 2, 0);
    put_tensor(&b, first, 1, DIMS(16), BLOCK_F32, first_offset);
    put_tensor(&b, second, 1, DIMS(16), BLOCK_F32, second_offset);
    put_zeros_to(&b, 32);
    for (int i = 0; i < 16; i++) put_u64(&b, 0);
    return b;
}

static void tensors_that_share_a_name_or_bytes_are_refused(void **state)
{
    (void)state;
    quarry_error error = {0};
    buffer b = two_tensors("a", 64, "b", 0);
    gguf_file *g = gguf_open_memory(b.bytes, b.n, "good.gguf", &error);
    assert_non_null(g);
    gguf_close(g);
    free(b.bytes);
    refused(two_tensors("a", 0, "a", 64), QUARRY_ERROR_FORMAT, "tensor a occurs twice");
    refused(two_tensors("a", 32, "b", 0), QUARRY_ERROR_FORMAT, "tensors b and a overlap");
    refused(two_tensors("a", 64, "b", 64), QUARRY_ERROR_FORMAT, "overlap");
}

static void truncation_anywhere_is_an_error(void **state)
{
    (void)state;
    buffer b = well_formed();
    for (size_t n = 0; n < b.n; n++) {
        buffer cut = {.bytes = malloc(n ? n : 1), .n = n};
        memcpy(cut.bytes, b.bytes, n);
        refused(cut, QUARRY_ERROR_FORMAT, "");
    }
    free(b.bytes);
}

static void any_changed_byte_is_an_error_or_harmless(void **state)
{
    (void)state;
    buffer b = well_formed();
    int opened = 0;
    for (size_t at = 0; at < b.n; at++) {
        for (int change = 0; change < 3; change++) {
            uint8_t saved = b.bytes[at];
            b.bytes[at] = change == 0 ? (uint8_t)~saved : change == 1 ? 0 : 0x80;
            quarry_error error = {0};
            gguf_file *g = gguf_open_memory(b.bytes, b.n, "bad.gguf", &error);
            if (!g) assert_true(error.code != QUARRY_OK && error.message[0]);
            for (int64_t i = 0; g && i < gguf_n_tensors(g); i++) {
                const gguf_tensor *t = gguf_tensor_at(g, i);
                assert_true(t->offset + t->n_bytes <= b.n);
            }
            opened += g != NULL;
            gguf_close(g);
            b.bytes[at] = saved;
        }
    }
    assert_true(opened > 100); /* values and data */
    free(b.bytes);
}

static void a_file_that_shrinks_while_mapped_is_an_io_error(void **state)
{
    (void)state;
    buffer b = {0};
    char name[32];
    quarry_error error = {0};
    enum { N = 1 << 16 };
    put_header(&b, 1, 1);
    put_key_string(&b, "key", "value");
    put_tensor(&b, "t", 1, DIMS(N), BLOCK_F32, 0);
    put_zeros_to(&b, 32);
    size_t header = b.n;
    float *ones = malloc(N * sizeof *ones);
    for (int i = 0; i < N; i++) ones[i] = 1;
    put(&b, ones, N * sizeof *ones);
    free(ones);
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        void *copy;
        file_write(name, &b);
        gguf_file *g = gguf_open(name, use_mmap, &error);
        assert_non_null(g);
        assert_int_equal(truncate(name, (off_t)header), 0);
        const float *data = gguf_tensor_data(g, gguf_find(g, "t"), &copy, &error);
        if (use_mmap) {
            assert_true(data[N - 1] == 0); /* no signal */
            assert_int_equal(gguf_check(g, &error), QUARRY_ERROR_IO);
        } else {
            assert_null(data);
        }
        assert_int_equal(error.code, QUARRY_ERROR_IO);
        assert_non_null(strstr(error.message, name));
        assert_string_equal(gguf_string(g, "key", NULL), "value");
        gguf_close(g);
        unlink(name);
    }
    free(b.bytes);
}

static void running_out_of_memory_is_an_error(void **state)
{
    (void)state;
    buffer b = well_formed();
    char name[32];
    file_write(name, &b);
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        const void *data = NULL;
        for (int64_t n = 0; !data && n < 100; n++) {
            quarry_error error = {0};
            void *copy = NULL;
            memory_fail_after(n);
            gguf_file *g = gguf_open(name, use_mmap, &error);
            if (g) data = gguf_tensor_data(g, gguf_find(g, "matrix"), &copy, &error);
            memory_fail_after(-1);
            if (!data) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
            memory_free(copy);
            gguf_close(g);
        }
        assert_non_null(data);
    }
    unlink(name);
    free(b.bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_well_formed_file_comes_back_from_memory_mapping_and_reads),
        cmocka_unit_test(a_header_larger_than_one_read_comes_back),
        cmocka_unit_test(keys_of_the_wrong_type_are_remembered),
        cmocka_unit_test(what_is_not_gguf_is_refused),
        cmocka_unit_test(false_counts_are_refused),
        cmocka_unit_test(bad_keys_are_refused),
        cmocka_unit_test(bad_alignments_are_refused),
        cmocka_unit_test(bad_tensors_are_refused),
        cmocka_unit_test(tensors_that_share_a_name_or_bytes_are_refused),
        cmocka_unit_test(truncation_anywhere_is_an_error),
        cmocka_unit_test(any_changed_byte_is_an_error_or_harmless),
        cmocka_unit_test(a_file_that_shrinks_while_mapped_is_an_io_error),
        cmocka_unit_test(running_out_of_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
