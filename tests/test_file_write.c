/* base/file_write: files that are complete or absent, under every failure of the system. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/file.h"
#include "base/memory.h"
#include "test.h"

static char folder[] = "test_file_write_XXXXXX";
static char path[64];

static int make_folder(void **state)
{
    (void)state;
    strcpy(folder + strlen(folder) - 6, "XXXXXX");
    if (!mkdtemp(folder)) return -1;
    snprintf(path, sizeof path, "%s/file", folder);
    return 0;
}

/* Names in the folder but for the target; the first of them to name. */
static int n_others(char name[256])
{
    int n = 0;
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (const struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.' || strcmp(e->d_name, "file") == 0) continue;
        if (name) snprintf(name, 256, "%s", e->d_name);
        n++;
    }
    closedir(d);
    return n;
}

static int remove_folder(void **state)
{
    (void)state;
    for (int call = 0; call < FILE_N_CALLS; call++) file_fail_at((file_call)call, -1, 0);
    unlink(path);
    return rmdir(folder); /* fails if a test left something behind */
}

static void assert_holds(const void *bytes, size_t n)
{
    size_t n_found;
    quarry_error error = {0};
    char *text = file_read_all(path, &n_found, &error);
    assert_non_null(text);
    assert_int_equal(n_found, n);
    assert_memory_equal(text, bytes, n);
    memory_free(text);
}

static uint8_t *make_bytes(size_t n)
{
    uint8_t *bytes = malloc(n);
    for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)(i * 2654435761u >> 24);
    return bytes;
}

static void pieces_of_any_size_are_written_in_order(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 100, 1 << 20, (1 << 20) - 1, 3, (1 << 20) + 1, 5 << 20, 17, 1 << 19, 1 << 19, 1 << 19, 1};
    size_t n_all = 0, at = 0;
    quarry_error error = {0};
    for (size_t i = 0; i < TEST_COUNT(sizes); i++) n_all += sizes[i];
    uint8_t *bytes = make_bytes(n_all);
    file_writer *w = file_write_open(path, &error);
    assert_non_null(w);
    for (size_t i = 0; i < TEST_COUNT(sizes); at += sizes[i++]) {
        assert_int_equal(file_write_append(w, bytes + at, sizes[i], &error), QUARRY_OK);
        assert_int_equal(file_write_size(w), at + sizes[i]);
    }
    assert_int_equal(access(path, F_OK), -1); /* not before it is whole */
    assert_int_equal(file_write_commit(w, &error), QUARRY_OK);
    assert_holds(bytes, n_all);
    file_write_close(w);
    assert_holds(bytes, n_all);
    free(bytes);
}

static void earlier_bytes_can_be_written_over(void **state)
{
    (void)state;
    quarry_error error = {0};
    const size_t n = 3 << 20;
    uint8_t *bytes = make_bytes(n);
    file_writer *w = file_write_open(path, &error);
    assert_int_equal(file_write_append(w, bytes, n, &error), QUARRY_OK);
    assert_int_equal(file_write_append(w, "tail", 4, &error), QUARRY_OK);
    assert_int_equal(file_write_at(w, 0, "head", 4, &error), QUARRY_OK);
    assert_int_equal(file_write_at(w, n - 2, "across", 6, &error), QUARRY_OK); /* to the end, which is still in the buffer */
    assert_int_equal(file_write_at(w, n + 3, "xy", 2, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(file_write_at(w, UINT64_MAX, "xy", 2, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(file_write_append(w, "end", 3, &error), QUARRY_OK);
    assert_int_equal(file_write_commit(w, &error), QUARRY_OK);
    file_write_close(w);
    uint8_t *expected = malloc(n + 7);
    memcpy(expected, bytes, n);
    memcpy(expected, "head", 4);
    memcpy(expected + n - 2, "acrossend", 9);
    assert_holds(expected, n + 7);
    free(expected);
    free(bytes);
}

static void a_file_that_is_not_committed_leaves_the_old_one(void **state)
{
    (void)state;
    quarry_error error = {0};
    assert_int_equal(file_write_all(path, "old", 3, &error), QUARRY_OK);
    file_writer *w = file_write_open(path, &error);
    assert_int_equal(file_write_append(w, "new", 3, &error), QUARRY_OK);
    assert_int_equal(n_others(NULL), 1);
    file_write_close(w);
    assert_int_equal(n_others(NULL), 0);
    assert_holds("old", 3);
    assert_int_equal(file_write_all(path, "new", 3, &error), QUARRY_OK);
    assert_holds("new", 3);
}

static void permissions_are_those_of_any_new_file(void **state)
{
    (void)state;
    quarry_error error = {0};
    struct stat st;
    const mode_t mask = umask(027);
    assert_int_equal(file_write_all(path, "x", 1, &error), QUARRY_OK);
    umask(mask);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0640);
}

/* Two appends, one of them large, a header, commit: what a context file does. */
static quarry_code write_everything(const uint8_t *bytes, size_t n, quarry_error *error)
{
    file_writer *w = file_write_open(path, error);
    quarry_code code = w ? QUARRY_OK : error->code;
    if (w) {
        file_write_append(w, bytes, 100, NULL); /* an error stays: the commit reports it */
        file_write_append(w, bytes + 100, n - 100, NULL);
        file_write_at(w, 8, bytes + 8, 16, NULL);
        code = file_write_commit(w, error);
    }
    file_write_close(w);
    return code;
}

static void every_failing_call_is_reported_and_the_old_file_stays(void **state)
{
    (void)state;
    static const struct {
        file_call call;
        int failure;
        const char *says;
    } cases[] = {
        {FILE_CALL_OPEN, EACCES, "choose a folder that you may write to"},
        {FILE_CALL_OPEN, ENOSPC, "free some space there"},
        {FILE_CALL_OPEN, ENOENT, "make its folder first"},
        {FILE_CALL_OPEN, EMFILE, "cannot"},
        {FILE_CALL_WRITE, ENOSPC, "free some space there"},
        {FILE_CALL_WRITE, EDQUOT, "free some space there"},
        {FILE_CALL_WRITE, EIO, "is failing"},
        {FILE_CALL_WRITE, EFBIG, "no file of this size"},
        {FILE_CALL_SYNC, EIO, "cannot bring it"},
        {FILE_CALL_SYNC, ENOSPC, "free some space there"},
        {FILE_CALL_RENAME, EROFS, "cannot give it its name"},
        {FILE_CALL_RENAME, ENOSPC, "free some space there"},
    };
    const size_t n = 2 << 20;
    uint8_t *bytes = make_bytes(n);
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        bool succeeded = false;
        int n_failures = 0;
        for (int at = 0; !succeeded && at < 20; at++) {
            quarry_error error = {0};
            assert_int_equal(file_write_all(path, "old", 3, &error), QUARRY_OK);
            file_fail_at(cases[i].call, at, cases[i].failure);
            const quarry_code code = write_everything(bytes, n, &error);
            file_fail_at(cases[i].call, -1, 0);
            succeeded = code == QUARRY_OK;
            assert_int_equal(n_others(NULL), 0);
            if (succeeded) {
                assert_holds(bytes, n);
                continue;
            }
            n_failures++;
            assert_int_equal(code, QUARRY_ERROR_IO);
            assert_int_equal(error.code, QUARRY_ERROR_IO);
            assert_non_null(strstr(error.message, path));
            if (strstr(error.message, "its folder to the disk")) /* the file has its name already */
                assert_holds(bytes, n);
            else
                assert_holds("old", 3);
            if (at == 0) assert_non_null(strstr(error.message, cases[i].says));
        }
        assert_true(succeeded);
        const int expected[FILE_N_CALLS] = {[FILE_CALL_OPEN] = 2, [FILE_CALL_WRITE] = 3, [FILE_CALL_SYNC] = 2, [FILE_CALL_RENAME] = 1};
        assert_int_equal(n_failures, expected[cases[i].call]);
    }
    free(bytes);
}

static void short_and_interrupted_calls_are_continued(void **state)
{
    (void)state;
    const size_t n = 2 << 20;
    uint8_t *bytes = make_bytes(n);
    quarry_error error = {0};
    for (int at = 0; at < 4; at++) {
        for (int failure = 0; failure <= EINTR; failure += EINTR) {
            file_fail_at(FILE_CALL_WRITE, at, failure);
            assert_int_equal(write_everything(bytes, n, &error), QUARRY_OK);
            file_fail_at(FILE_CALL_WRITE, -1, 0);
            file_fail_at(FILE_CALL_READ, at, failure);
            assert_holds(bytes, n);
            file_map *map = file_map_open(path, false, &error);
            uint8_t *copy = malloc(n);
            file_fail_at(FILE_CALL_READ, 0, failure);
            assert_int_equal(file_map_read(map, 0, n, copy, &error), QUARRY_OK);
            file_fail_at(FILE_CALL_READ, -1, 0);
            assert_memory_equal(copy, bytes, n);
            free(copy);
            file_map_close(map);
        }
    }
    free(bytes);
}

static void reads_that_fail_are_errors(void **state)
{
    (void)state;
    quarry_error error = {0};
    char byte;
    assert_int_equal(file_write_all(path, "x", 1, &error), QUARRY_OK);
    file_map *map = file_map_open(path, false, &error);
    assert_non_null(map);
    file_fail_at(FILE_CALL_READ, 0, EIO);
    assert_int_equal(file_map_read(map, 0, 1, &byte, &error), QUARRY_ERROR_IO);
    assert_non_null(strstr(error.message, path));
    assert_int_equal(file_map_read(map, 0, 1, &byte, &error), QUARRY_OK); /* the one call only */
    file_fail_at(FILE_CALL_READ, 0, EIO);
    assert_null(file_read_all(path, NULL, &error));
    file_fail_at(FILE_CALL_OPEN, 0, EMFILE);
    assert_null(file_map_open(path, true, &error));
    file_map_close(map);
}

/* The system's own refusal, not an injected one. */
static void a_file_larger_than_allowed_is_an_error(void **state)
{
    (void)state;
    const pid_t child = fork();
    if (child == 0) {
        const size_t n = 4 << 20;
        quarry_error error = {0};
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){1 << 20, 1 << 20});
        uint8_t *bytes = make_bytes(n);
        const quarry_code code = file_write_all(path, bytes, n, &error);
        _exit(code == QUARRY_ERROR_IO && strstr(error.message, "ulimit -f") && n_others(NULL) == 0 ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    assert_int_equal(access(path, F_OK), -1);
}

static void a_folder_that_is_missing_is_named(void **state)
{
    (void)state;
    quarry_error error = {0};
    assert_null(file_write_open("missing_folder/file", &error));
    assert_non_null(strstr(error.message, "missing_folder/file"));
    assert_non_null(strstr(error.message, "make its folder"));
}

/* The child writes until it is killed; its temporary file is a leftover from then on and not before. */
static void what_a_killed_writer_leaves_can_be_told_from_what_is_being_written(void **state)
{
    (void)state;
    int ready[2];
    char name[256], temporary[512], byte;
    assert_int_equal(pipe(ready), 0);
    const pid_t child = fork();
    if (child == 0) {
        file_writer *w = file_write_open(path, NULL);
        if (!w || write(ready[1], "x", 1) != 1) _exit(1);
        for (;;) pause();
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_int_equal(n_others(name), 1);
    snprintf(temporary, sizeof temporary, "%s/%s", folder, name);
    assert_true(file_is_held(temporary));
    assert_false(file_write_remove_leftover(temporary));
    assert_int_equal(kill(child, SIGKILL), 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_false(file_is_held(temporary));
    assert_true(file_write_remove_leftover(temporary));
    close(ready[0]);
    close(ready[1]);
    assert_int_equal(n_others(NULL), 0);
    assert_int_equal(access(path, F_OK), -1);
}

static void only_names_of_temporary_files_are_leftovers(void **state)
{
    (void)state;
    static const char *const names[] = {"a", "a.tmp", "a.12.tmp", "a.12-.tmp", "a.-.tmp", "a.12-ab.tmp.bak", "a.12-ab", "tmp", "a.x-y.tmp"};
    char name[128];
    quarry_error error = {0};
    for (size_t i = 0; i < TEST_COUNT(names); i++) {
        snprintf(name, sizeof name, "%s/%s", folder, names[i]);
        assert_int_equal(file_write_all(name, "x", 1, &error), QUARRY_OK);
        assert_false(file_write_remove_leftover(name));
        assert_int_equal(unlink(name), 0);
    }
    snprintf(name, sizeof name, "%s/a.piece.12-00000000000000ab.tmp", folder);
    assert_false(file_write_remove_leftover(name)); /* there is none */
    assert_int_equal(file_write_all(name, "x", 1, &error), QUARRY_OK);
    assert_true(file_write_remove_leftover(name));
}

static void a_file_is_held_while_a_map_says_so(void **state)
{
    (void)state;
    quarry_error error = {0};
    assert_false(file_is_held(path)); /* there is none */
    assert_int_equal(file_write_all(path, "x", 1, &error), QUARRY_OK);
    assert_false(file_is_held(path));
    file_map *first = file_map_open(path, true, &error), *second = file_map_open(path, true, &error);
    assert_false(file_is_held(path)); /* opening is not holding */
    file_map_hold(first);
    file_map_hold(second); /* several may */
    assert_true(file_is_held(path));
    file_map_close(first);
    assert_true(file_is_held(path));
    file_map_close(second);
    assert_false(file_is_held(path));
}

static void running_out_of_memory_is_an_error(void **state)
{
    (void)state;
    bool opened = false;
    int n_failures = 0;
    for (int n = 0; n < 10 && !opened; n++) {
        quarry_error error = {0};
        memory_fail_after(n);
        file_writer *w = file_write_open(path, &error);
        memory_fail_after(-1);
        opened = w != NULL;
        n_failures += !opened;
        if (!opened) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
        file_write_close(w);
        assert_int_equal(n_others(NULL), 0);
    }
    assert_true(opened && n_failures >= 3);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        IN_FOLDER(pieces_of_any_size_are_written_in_order),
        IN_FOLDER(earlier_bytes_can_be_written_over),
        IN_FOLDER(a_file_that_is_not_committed_leaves_the_old_one),
        IN_FOLDER(permissions_are_those_of_any_new_file),
        IN_FOLDER(every_failing_call_is_reported_and_the_old_file_stays),
        IN_FOLDER(short_and_interrupted_calls_are_continued),
        IN_FOLDER(reads_that_fail_are_errors),
        IN_FOLDER(a_file_larger_than_allowed_is_an_error),
        IN_FOLDER(a_folder_that_is_missing_is_named),
        IN_FOLDER(what_a_killed_writer_leaves_can_be_told_from_what_is_being_written),
        IN_FOLDER(only_names_of_temporary_files_are_leftovers),
        IN_FOLDER(a_file_is_held_while_a_map_says_so),
        IN_FOLDER(running_out_of_memory_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
