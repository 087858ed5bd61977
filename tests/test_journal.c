/* Journals: what survives being stopped, and what is refused. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "eval/eval.h"
#include "test.h"

static char path[] = "/tmp/quarry_journal_XXXXXX";

static int make_path(void **state)
{
    (void)state;
    strcpy(path + strlen(path) - 6, "XXXXXX");
    const int fd = mkstemp(path);
    if (fd >= 0) close(fd);
    return fd < 0 || unlink(path);
}

static int remove_path(void **state)
{
    (void)state;
    return unlink(path);
}

static json_t *make_header(int seed)
{
    return json_pack("{s:s, s:i, s:{s:f}}", "command", "eval test", "seed", seed, "parameters", "x", 0.1);
}

static journal *open_with(int seed, quarry_error *error)
{
    json_t *header = make_header(seed);
    journal *j = journal_open(path, header, error);
    json_decref(header);
    return j;
}

static void write_file(const char *text, int flags)
{
    const int fd = open(path, O_WRONLY | O_CREAT | flags, 0600);
    assert_true(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

static void make_two_records(void)
{
    quarry_error error;
    journal *j = open_with(1, &error);
    assert_non_null(j);
    assert_int_equal(journal_add(j, "a", json_pack("{s:f}", "value", 0.1 + 0.2), &error), QUARRY_OK);
    assert_int_equal(journal_add(j, "b", json_pack("{s:f}", "value", 1e-300), &error), QUARRY_OK);
    journal_close(j);
}

static double value_of(const journal *j, const char *key)
{
    return json_real_value(json_object_get(journal_find(j, key), "value"));
}

static void records_come_back_with_every_digit(void **state)
{
    (void)state;
    quarry_error error;
    make_two_records();
    journal *j = open_with(1, &error);
    assert_non_null(j);
    assert_int_equal(journal_count(j), 2);
    assert_true(value_of(j, "a") == 0.1 + 0.2 && value_of(j, "b") == 1e-300);
    assert_null(journal_find(j, "c"));
    journal_close(j);
}

static void a_last_line_cut_short_is_measured_again(void **state)
{
    (void)state;
    quarry_error error;
    make_two_records();
    write_file("{\"key\":\"c\",\"rec", O_APPEND);
    journal *j = open_with(1, &error);
    assert_non_null(j);
    assert_int_equal(journal_count(j), 2);
    assert_int_equal(journal_add(j, "c", json_pack("{s:f}", "value", 3.0), &error), QUARRY_OK);
    journal_close(j);
    j = open_with(1, &error);
    assert_non_null(j);
    assert_int_equal(journal_count(j), 3);
    assert_true(value_of(j, "c") == 3);
    journal_close(j);
}

static void a_header_cut_short_is_written_again(void **state)
{
    (void)state;
    quarry_error error;
    write_file("{\"header\":{\"comm", O_TRUNC);
    journal *j = open_with(1, &error);
    assert_non_null(j);
    journal_close(j);
    assert_non_null(j = open_with(1, &error));
    journal_close(j);
}

static void another_measurement_is_refused(void **state)
{
    (void)state;
    quarry_error error;
    make_two_records();
    assert_null(open_with(2, &error));
    assert_int_equal(error.code, QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, path));
    assert_non_null(strstr(error.message, "seed is 1 there, 2 here"));
}

static void garbage_is_refused_and_left_alone(void **state)
{
    (void)state;
    static const char *const garbage[] = {
        "no journal", "{\"a\": 1}", "no journal\n", "{}\n", "[]\n", "{\"header\":{}}\n", "{\"quarry_journal\":2,\"header\":{}}\n", "\n"};
    quarry_error error;
    for (size_t i = 0; i < sizeof garbage / sizeof *garbage; i++) {
        size_t n;
        write_file(garbage[i], O_TRUNC);
        assert_null(open_with(1, &error));
        assert_int_equal(error.code, QUARRY_ERROR_FORMAT);
        char *text = file_read_all(path, &n, &error);
        assert_string_equal(text, garbage[i]);
        memory_free(text);
    }
}

static void a_damaged_record_is_named_by_its_line(void **state)
{
    (void)state;
    static const char *const damage[] = {
        "{\"key\":\"c\"}\n", "{\"record\":{}}\n", "garbage\n", "{\"key\":1,\"record\":{}}\n", "{\"key\":\"c\",\"record\":3}\n", "\n"};
    quarry_error error;
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        unlink(path);
        make_two_records();
        write_file(damage[i], O_APPEND);
        assert_null(open_with(1, &error));
        assert_int_equal(error.code, QUARRY_ERROR_FORMAT);
        assert_non_null(strstr(error.message, "line 4"));
    }
}

static void one_process_writes_at_a_time(void **state)
{
    (void)state;
    quarry_error error;
    journal *j = open_with(1, &error);
    assert_non_null(j);
    assert_null(open_with(1, &error));
    assert_non_null(strstr(error.message, "another process"));
    journal_close(j);
}

static void no_journal_remembers_nothing(void **state)
{
    (void)state;
    assert_null(journal_find(NULL, "a"));
    assert_int_equal(journal_add(NULL, "a", json_object(), NULL), QUARRY_OK);
    assert_int_equal(journal_count(NULL), 0);
    assert_int_equal(journal_add(NULL, "a", NULL, NULL), QUARRY_ERROR_MEMORY);
}

static void a_place_that_cannot_be_written_is_an_error(void **state)
{
    (void)state;
    quarry_error error;
    json_t *header = make_header(1);
    assert_null(journal_open("/nonexistent/journal", header, &error));
    assert_int_equal(error.code, QUARRY_ERROR_IO);
    json_decref(header);
}

static void lack_of_memory_is_an_error_anywhere(void **state)
{
    (void)state;
    quarry_error error;
    bool opened = false;
    int failures = 0;
    make_two_records();
    for (int i = 0; i < 100 && !opened; i++) {
        memory_fail_after(i);
        journal *j = open_with(1, &error);
        memory_fail_after(-1);
        opened = j != NULL;
        failures += !opened;
        if (!opened) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
        journal_close(j);
    }
    assert_true(opened && failures >= 3);
}

/* FIPS 180-2, appendix B. */
static void digests_are_sha256(void **state)
{
    (void)state;
    static const char abc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    char digest[DIGEST_CHARS];
    quarry_error error;
    digest_bytes("abc", 3, digest);
    assert_string_equal(digest, abc);
    write_file("abc", O_TRUNC);
    assert_int_equal(digest_file(path, digest, &error), QUARRY_OK);
    assert_string_equal(digest, abc);
    assert_int_equal(digest_file("/nonexistent", digest, &error), QUARRY_ERROR_IO);
    assert_int_equal(digest_file("/", digest, &error), QUARRY_ERROR_IO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(records_come_back_with_every_digit, make_path, remove_path),
        cmocka_unit_test_setup_teardown(a_last_line_cut_short_is_measured_again, make_path, remove_path),
        cmocka_unit_test_setup_teardown(a_header_cut_short_is_written_again, make_path, remove_path),
        cmocka_unit_test_setup_teardown(another_measurement_is_refused, make_path, remove_path),
        cmocka_unit_test_setup_teardown(garbage_is_refused_and_left_alone, make_path, remove_path),
        cmocka_unit_test_setup_teardown(a_damaged_record_is_named_by_its_line, make_path, remove_path),
        cmocka_unit_test_setup_teardown(one_process_writes_at_a_time, make_path, remove_path),
        cmocka_unit_test(no_journal_remembers_nothing),
        cmocka_unit_test(a_place_that_cannot_be_written_is_an_error),
        cmocka_unit_test_setup_teardown(lack_of_memory_is_an_error_anywhere, make_path, remove_path),
        cmocka_unit_test_setup_teardown(digests_are_sha256, make_path, remove_path),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
