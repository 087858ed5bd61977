/* The streaming detokenizer: whatever the bytes and however tokens cut them, what comes out is valid UTF-8, comes as early as it can, and loses nothing. */
#include "test.h"

#include "text/unicode.h"
#include "tokenizer_builder.h"

/* A vocabulary whose tokens are all 256 bytes, some pieces that end inside a character, and a special token. */
static const char *const extra_tokens[] = {"\xC3\xB0\xC5\x81\xC4\xB3" /* F0 9F 91 */, "\xC4\xB0\xC3\xA2\xC4\xA4" /* 8E E2 82 */,
                                           "<|im_end|>", "\xC4\xA0the"};
enum { TOKEN_EMOJI_HEAD = 256, TOKEN_TAIL_AND_HEAD, TOKEN_SPECIAL, TOKEN_THE, N_TOKENS };

static builder built;
static tokenizer *bytes_tokenizer;

static int setup(void **state)
{
    (void)state;
    static char alphabet[256][4];
    const char *tokens[N_TOKENS];
    int32_t types[N_TOKENS];
    for (int b = 0, other = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD);
        utf8_encode(printable ? (uint32_t)b : (uint32_t)(256 + other++), alphabet[b]);
        tokens[b] = alphabet[b];
    }
    memcpy(tokens + 256, extra_tokens, sizeof extra_tokens);
    for (int i = 0; i < N_TOKENS; i++) types[i] = i == TOKEN_SPECIAL ? 3 : 1;
    const char *const merges[] = {"a b"};
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    builder_strings(&built, "ggml.tokens", tokens, N_TOKENS);
    builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, types, N_TOKENS);
    builder_strings(&built, "ggml.merges", merges, 1);
    bytes_tokenizer = builder_tokenizer(&built, NULL);
    return bytes_tokenizer ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    tokenizer_destroy(bytes_tokenizer);
    return 0;
}

static void assert_push(detokenizer *d, const tokenizer *t, int32_t id, const char *expected)
{
    char out[64];
    size_t n = detokenizer_push(d, t, id, out, sizeof out);
    assert_int_equal(n, strlen(expected));
    assert_memory_equal(out, expected, n);
}

static void test_characters_are_not_split(void **state)
{
    (void)state;
    detokenizer d;
    detokenizer_start(&d);
    assert_push(&d, bytes_tokenizer, 0xC3, "");
    assert_push(&d, bytes_tokenizer, 0xA9, "\xC3\xA9");
    assert_push(&d, bytes_tokenizer, TOKEN_EMOJI_HEAD, "");
    assert_push(&d, bytes_tokenizer, TOKEN_TAIL_AND_HEAD, "\xF0\x9F\x91\x8E");
    assert_push(&d, bytes_tokenizer, 0xAC, "\xE2\x82\xAC");
    char out[16];
    assert_int_equal(detokenizer_finish(&d, out, sizeof out), 0);
}

static void test_text_is_not_held_back(void **state)
{
    (void)state;
    detokenizer d;
    detokenizer_start(&d);
    assert_push(&d, bytes_tokenizer, TOKEN_THE, " the"); /* byte-level: the space is part of the text */
    assert_push(&d, bytes_tokenizer, 'x', "x");
}

static void test_broken_characters_become_replacements(void **state)
{
    (void)state;
    detokenizer d;
    detokenizer_start(&d);
    assert_push(&d, bytes_tokenizer, 0xFF, "\xEF\xBF\xBD");
    assert_push(&d, bytes_tokenizer, 0x80, "\xEF\xBF\xBD");
    assert_push(&d, bytes_tokenizer, 0xC3, "");
    assert_push(&d, bytes_tokenizer, 'x', "\xEF\xBF\xBDx");
    assert_push(&d, bytes_tokenizer, 0xE0, "");
    assert_push(&d, bytes_tokenizer, 0x80, "\xEF\xBF\xBD\xEF\xBF\xBD"); /* overlong */
    assert_push(&d, bytes_tokenizer, 0xED, "");
    assert_push(&d, bytes_tokenizer, 0xA0, "\xEF\xBF\xBD\xEF\xBF\xBD"); /* a surrogate */
    assert_push(&d, bytes_tokenizer, TOKEN_EMOJI_HEAD, "");
    char out[16];
    assert_int_equal(detokenizer_finish(&d, out, sizeof out), 3);
    assert_memory_equal(out, "\xEF\xBF\xBD", 3);
    assert_int_equal(detokenizer_finish(&d, out, sizeof out), 0);
}

static void test_special_and_unknown_ids_give_nothing(void **state)
{
    (void)state;
    detokenizer d;
    detokenizer_start(&d);
    assert_push(&d, bytes_tokenizer, TOKEN_SPECIAL, "");
    assert_push(&d, bytes_tokenizer, -1, "");
    assert_push(&d, bytes_tokenizer, N_TOKENS, "");
}

/* Every byte string of up to four bytes from a set that has all kinds, decoded at once (by the tested decoder of characters) and byte by byte. */
static void test_all_short_byte_strings_stream_as_they_decode(void **state)
{
    (void)state;
    static const unsigned char kinds[] = {'a',  0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF,
                                          0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF};
    enum { N_KINDS = sizeof kinds };
    for (int code = 0; code < N_KINDS * N_KINDS * N_KINDS * N_KINDS; code++) {
        char text[4], whole[64], streamed[64];
        for (int i = 0, rest = code; i < 4; i++, rest /= N_KINDS) text[i] = (char)kinds[rest % N_KINDS];
        size_t n_whole = 0, n_streamed = 0;
        for (size_t i = 0; i < 4;) {
            uint32_t cp;
            size_t length = utf8_decode(text + i, 4 - i, &cp);
            if (cp != UTF8_INVALID) { /* broken bytes are compared as one replacement a run: how many they give is a matter of taste */
                memcpy(whole + n_whole, text + i, length);
                n_whole += length;
            }
            i += length;
        }
        detokenizer d;
        detokenizer_start(&d);
        for (int i = 0; i < 4; i++)
            n_streamed +=
                detokenizer_push(&d, bytes_tokenizer, (unsigned char)text[i], streamed + n_streamed, sizeof streamed - n_streamed);
        n_streamed += detokenizer_finish(&d, streamed + n_streamed, sizeof streamed - n_streamed);
        size_t n_kept = 0, n_replacements = 0;
        for (size_t i = 0; i < n_streamed;) {
            uint32_t cp;
            size_t length = utf8_decode(streamed + i, n_streamed - i, &cp);
            assert_int_not_equal(cp, UTF8_INVALID);
            n_replacements += cp == 0xFFFD;
            if (cp != 0xFFFD) {
                memmove(streamed + n_kept, streamed + i, length);
                n_kept += length;
            }
            i += length;
        }
        assert_int_equal(n_kept, n_whole);
        assert_memory_equal(streamed, whole, n_whole);
        assert_int_equal(n_replacements > 0, n_whole < 4);
    }
}

static void test_valid_text_fits_the_promised_capacity(void **state)
{
    (void)state;
    /* a token of 40 bytes that are alternately broken and whole: replacements give way, text does not */
    char piece[128] = "";
    for (int i = 0; i < 20; i++) strcat(piece, "\xC3\xBF" /* FF */ "a");
    const char *const tokens[] = {piece, "b"}, *const merges[] = {"a b"};
    builder_start(&built);
    builder_string(&built, "ggml.model", "gpt2");
    builder_strings(&built, "ggml.tokens", tokens, 2);
    builder_strings(&built, "ggml.merges", merges, 1);
    tokenizer *t = builder_tokenizer(&built, NULL);
    assert_non_null(t);
    char out[40 + 16 + 1];
    out[40 + 16] = '#';
    detokenizer d;
    detokenizer_start(&d);
    size_t n = detokenizer_push(&d, t, 0, out, 40 + 16), n_letters = 0;
    assert_true(n <= 40 + 16);
    assert_int_equal(out[40 + 16], '#');
    for (size_t i = 0; i < n; i++) n_letters += out[i] == 'a';
    assert_int_equal(n_letters, 20);
    tokenizer_destroy(t);
}

static void test_sentencepiece_drops_the_space_in_front(void **state)
{
    (void)state;
    const char *const tokens[] = {"<unk>", "<s>", "</s>", "\xE2\x96\x81the", "\xE2\x96\x81", "<0xC3>", "<0xA9>", "<0x0A>"};
    const int32_t types[] = {2, 3, 3, 1, 1, 6, 6, 6};
    const float scores[8] = {0};
    for (int prefix = 0; prefix < 2; prefix++) {
        builder_start(&built);
        builder_string(&built, "ggml.model", "llama");
        builder_strings(&built, "ggml.tokens", tokens, TEST_COUNT(tokens));
        builder_numbers(&built, "ggml.token_type", GGUF_TYPE_I32, types, TEST_COUNT(types));
        builder_numbers(&built, "ggml.scores", GGUF_TYPE_F32, scores, TEST_COUNT(scores));
        builder_bool(&built, "ggml.add_space_prefix", prefix);
        tokenizer *t = builder_tokenizer(&built, NULL);
        assert_non_null(t);
        detokenizer d;
        detokenizer_start(&d);
        assert_push(&d, t, 1, "");
        assert_push(&d, t, 3, prefix ? "the" : " the");
        assert_push(&d, t, 3, " the");
        assert_push(&d, t, 5, "");
        assert_push(&d, t, 6, "\xC3\xA9");
        assert_push(&d, t, 7, "\n");
        assert_push(&d, t, 4, " ");
        tokenizer_destroy(t);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_characters_are_not_split),
        cmocka_unit_test(test_text_is_not_held_back),
        cmocka_unit_test(test_broken_characters_become_replacements),
        cmocka_unit_test(test_special_and_unknown_ids_give_nothing),
        cmocka_unit_test(test_all_short_byte_strings_stream_as_they_decode),
        cmocka_unit_test(test_valid_text_fits_the_promised_capacity),
        cmocka_unit_test(test_sentencepiece_drops_the_space_in_front),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
