/* base/file: maps that survive a shrinking file, reads, and the errors of both. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/file.h"
#include "base/memory.h"
#include "test.h"

enum { FILE_BYTES = 5 * 65536 + 100 };

static uint8_t pattern(size_t i)
{
    return (uint8_t)(i * 2654435761u >> 24 | 1); /* never 0 */
}

/* A temporary file of FILE_BYTES bytes of the pattern; name is filled in. */
static void file_make(char name[32])
{
    strcpy(name, "test_file_XXXXXX");
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    FILE *f = fdopen(fd, "wb");
    for (size_t i = 0; i < FILE_BYTES; i++) fputc(pattern(i), f);
    assert_int_equal(fclose(f), 0);
}

static void mapped_and_read_bytes_are_those_of_the_file(void **state)
{
    (void)state;
    char name[32];
    uint8_t part[1000];
    file_make(name);
    for (int use_mmap = 0; use_mmap < 2; use_mmap++) {
        quarry_error error = {0};
        file_map *map = file_map_open(name, use_mmap, &error);
        assert_non_null(map);
        assert_int_equal(file_map_size(map), FILE_BYTES);
        assert_string_equal(file_map_path(map), name);
        assert_int_equal(file_map_data(map) != NULL, use_mmap);
        assert_int_equal(file_map_read(map, FILE_BYTES - 1000, 1000, part, &error), QUARRY_OK);
        for (size_t i = 0; i < 1000; i++) assert_int_equal(part[i], pattern(FILE_BYTES - 1000 + i));
        for (size_t i = 0; use_mmap && i < FILE_BYTES; i += 97) assert_int_equal(file_map_data(map)[i], pattern(i));
        assert_int_equal(file_map_read(map, FILE_BYTES - 999, 1000, part, &error), QUARRY_ERROR_IO);
        assert_non_null(strstr(error.message, name));
        assert_int_equal(file_map_read(map, UINT64_MAX - 10, 1000, part, &error), QUARRY_ERROR_IO);
        assert_int_equal(file_map_check(map, &error), QUARRY_OK);
        file_map_close(map);
    }
    unlink(name);
}

static void a_file_that_shrinks_reads_zeros_and_is_reported(void **state)
{
    (void)state;
    char name[32], other_name[32];
    quarry_error error = {0};
    file_make(name);
    file_make(other_name);
    for (int round = 0; round < 2; round++) { /* the second reuses entries of the registry, which begin clean */
        file_map *map = file_map_open(name, true, &error), *other = file_map_open(other_name, true, &error);
        assert_non_null(map);
        assert_non_null(other);
        assert_int_equal(file_map_check(map, &error), QUARRY_OK);
        const volatile uint8_t *data = file_map_data(map);
        assert_int_equal(data[65536 - 1], pattern(65536 - 1));
        assert_int_equal(truncate(name, 65536), 0);
        assert_int_equal(data[3 * 65536], 0);
        assert_int_equal(data[FILE_BYTES - 1], 0);
        assert_int_equal(data[65535], pattern(65535));
        assert_int_equal(data[2 * 65536], 0);            /* before the first fault */
        assert_int_equal(truncate(name, FILE_BYTES), 0); /* growing again does not bring the bytes back */
        assert_int_equal(file_map_check(map, &error), QUARRY_ERROR_IO);
        assert_non_null(strstr(error.message, name));
        assert_int_equal(file_map_check(other, &error), QUARRY_OK); /* one file's fault is not another's */
        file_map_close(map);
        file_map_close(other);
    }
    unlink(name);
    unlink(other_name);
}

static void shrinking_inside_the_last_page_is_reported(void **state)
{
    (void)state;
    char name[32];
    quarry_error error = {0};
    file_make(name);
    file_map *map = file_map_open(name, true, &error);
    assert_non_null(map);
    assert_int_equal(truncate(name, FILE_BYTES - 50), 0);
    assert_int_equal(file_map_check(map, &error), QUARRY_ERROR_IO);
    file_map_close(map);
    unlink(name);
}

/* How a child that touches a page of its own beyond a file's end finishes, with handler as the program's own. */
static int status_of_foreign_fault(void (*handler)(int))
{
    char name[32];
    file_make(name);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGBUS, handler);
        file_map *map = file_map_open(name, true, NULL);
        FILE *f = fopen(name, "rb");
        volatile uint8_t *own = mmap(NULL, FILE_BYTES, PROT_READ, MAP_SHARED, fileno(f), 0);
        if (!map || truncate(name, 0) != 0) _exit(100);
        uint8_t byte = own[65536];
        _exit(101 + (byte != 0));
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    unlink(name);
    return status;
}

static void exit_42(int signal_number)
{
    (void)signal_number;
    _exit(42);
}

static void faults_elsewhere_go_to_the_programs_own_handler(void **state)
{
    (void)state;
    int status = status_of_foreign_fault(exit_42);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 42);
}

static void faults_elsewhere_end_a_program_that_has_no_handler(void **state)
{
    (void)state;
    int status = status_of_foreign_fault(SIG_DFL);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGBUS);
}

static void released_pages_come_back_from_the_file(void **state)
{
    (void)state;
    char name[32];
    quarry_error error = {0};
    file_make(name);
    file_map *map = file_map_open(name, true, &error);
    assert_non_null(map);
    const volatile uint8_t *data = file_map_data(map);
    for (size_t i = 0; i < FILE_BYTES; i++) assert_int_equal(data[i], pattern(i));
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char resident = 1;
    file_map_release(map, 1, FILE_BYTES);
    file_map_release(map, FILE_BYTES + 1, 10); /* outside: nothing */
    assert_int_equal(mincore((void *)((uintptr_t)data + page), page, &resident), 0);
    for (size_t i = 0; i < FILE_BYTES; i++) assert_int_equal(data[i], pattern(i));
    file_map_close(map);
    unlink(name);
}

static void what_cannot_be_opened_is_named(void **state)
{
    (void)state;
    quarry_error error = {0};
    assert_null(file_map_open("no/such/file", true, &error));
    assert_int_equal(error.code, QUARRY_ERROR_IO);
    assert_non_null(strstr(error.message, "no/such/file"));
    assert_null(file_map_open(".", true, &error));
    assert_non_null(strstr(error.message, "directory"));
    assert_null(file_read_all(".", NULL, &error));
    assert_int_equal(error.code, QUARRY_ERROR_IO);
    assert_null(file_read_all("no/such/file", NULL, &error));
    assert_non_null(strstr(error.message, "no/such/file"));
    assert_int_equal(mkfifo("test_file_fifo", 0600), 0);
    assert_null(file_map_open("test_file_fifo", true, &error));
    assert_non_null(strstr(error.message, "regular"));
    unlink("test_file_fifo");
}

static void all_of_a_file_is_read_with_a_nul_behind_it(void **state)
{
    (void)state;
    char name[32];
    size_t n = 0;
    quarry_error error = {0};
    file_make(name);
    char *text = file_read_all(name, &n, &error);
    assert_non_null(text);
    assert_int_equal(n, FILE_BYTES);
    for (size_t i = 0; i < n; i++) assert_int_equal((uint8_t)text[i], pattern(i));
    assert_int_equal(text[n], 0);
    memory_free(text);
    assert_int_equal(truncate(name, 0), 0);
    text = file_read_all(name, &n, &error);
    assert_int_equal(n, 0);
    assert_string_equal(text, "");
    memory_free(text);
    file_map *map = file_map_open(name, true, &error);
    assert_non_null(map);
    assert_int_equal(file_map_size(map), 0);
    assert_int_equal(file_map_check(map, &error), QUARRY_OK);
    file_map_close(map);
    unlink(name);
}

static void a_pipe_is_read_to_its_end(void **state)
{
    (void)state;
    int ends[2];
    size_t n = 0;
    quarry_error error = {0};
    assert_int_equal(pipe(ends), 0);
    int saved = dup(STDIN_FILENO);
    pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        for (size_t i = 0; i < 300000; i++) {
            uint8_t byte = pattern(i);
            if (write(ends[1], &byte, 1) != 1) _exit(1);
        }
        _exit(0);
    }
    close(ends[1]);
    dup2(ends[0], STDIN_FILENO);
    close(ends[0]);
    char *text = file_read_all("-", &n, &error);
    dup2(saved, STDIN_FILENO);
    close(saved);
    waitpid(child, NULL, 0);
    assert_non_null(text);
    assert_int_equal(n, 300000);
    for (size_t i = 0; i < n; i++) assert_int_equal((uint8_t)text[i], pattern(i));
    memory_free(text);
}

static void running_out_of_memory_is_an_error(void **state)
{
    (void)state;
    char name[32];
    file_make(name);
    for (int what = 0; what < 2; what++) {
        bool opened = false;
        for (int64_t n = 0; !opened && n < 10; n++) {
            quarry_error error = {0};
            memory_fail_after(n);
            file_map *map = what == 0 ? file_map_open(name, true, &error) : NULL;
            char *text = what == 1 ? file_read_all(name, NULL, &error) : NULL;
            memory_fail_after(-1);
            opened = map || text;
            if (!opened) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
            file_map_close(map);
            memory_free(text);
        }
        assert_true(opened);
    }
    unlink(name);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(running_out_of_memory_is_an_error),
        cmocka_unit_test(mapped_and_read_bytes_are_those_of_the_file),
        cmocka_unit_test(a_file_that_shrinks_reads_zeros_and_is_reported),
        cmocka_unit_test(shrinking_inside_the_last_page_is_reported),
        cmocka_unit_test(faults_elsewhere_go_to_the_programs_own_handler),
        cmocka_unit_test(faults_elsewhere_end_a_program_that_has_no_handler),
        cmocka_unit_test(released_pages_come_back_from_the_file),
        cmocka_unit_test(what_cannot_be_opened_is_named),
        cmocka_unit_test(all_of_a_file_is_read_with_a_nul_behind_it),
        cmocka_unit_test(a_pipe_is_read_to_its_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
