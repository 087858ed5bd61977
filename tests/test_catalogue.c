/* store/catalogue: what it finds, what it removes, and that no process, fault or damage makes it lose what was committed. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "store/store.h"
#include "test.h"

enum { N_TOKENS = 1000, FINGERPRINT = 77 };

static char folder[] = "/tmp/quarry_catalogue_XXXXXX";
static int32_t tokens[N_TOKENS];
static char log_text[8192]; /* what the catalogue said since make_folder */

static void on_log(quarry_log_level level, const char *line, void *data)
{
    (void)level;
    (void)data;
    const size_t n = strlen(log_text);
    snprintf(log_text + n, sizeof log_text - n, "%s\n", line);
}

/* ---- pieces of a format of their own: what the catalogue asks of it and nothing else ---- */

static const char magic[] = "piece of a test\n";

static quarry_code describe(const char *path, catalogue_piece *piece, char **names, char **model, void *data, quarry_error *error)
{
    size_t n;
    (void)data;
    char *text = file_read_all(path, &n, error);
    if (!text) return QUARRY_ERROR_IO;
    quarry_code code = QUARRY_OK;
    if (strncmp(text, "newer", 5) == 0)
        code = error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s: is of a newer version", path);
    else if (n < sizeof magic + sizeof *piece || memcmp(text, magic, sizeof magic) != 0)
        code = error_set(error, QUARRY_ERROR_FORMAT, "%s: is damaged", path);
    if (code == QUARRY_OK) {
        memcpy(piece, text + sizeof magic, sizeof *piece);
        const char *name = text + sizeof magic + sizeof *piece;
        if (*name) {
            *names = memory_string(name, strlen(name), NULL);
            *model = memory_string("tiny", 4, NULL);
        }
    }
    memory_free(text);
    return code;
}

/* tokens[first, end) of the piece that begins at the parent's end; which tells pieces with the same tokens apart. */
static catalogue_piece make_piece(const catalogue_piece *parent, int64_t n_tokens, uint8_t which)
{
    catalogue_piece p = {.fingerprint = FINGERPRINT, .params = "ivfpq f16", .n_tokens = n_tokens};
    if (parent) {
        p.parent = parent->key;
        p.first = parent->first + parent->n_tokens;
    }
    p.token_digest = catalogue_digest(tokens + p.first, n_tokens);
    for (size_t i = 0; i < sizeof p.key.bytes; i++)
        p.key.bytes[i] = (uint8_t)(p.parent.bytes[i] * 31 + (p.token_digest >> (i % 8 * 8)) + which);
    p.key.bytes[15] |= 1;
    return p;
}

static quarry_code add(catalogue *c, catalogue_piece *p, size_t n_bytes, const char *name, quarry_error *error)
{
    quarry_code code = QUARRY_ERROR_MEMORY;
    char *path = catalogue_piece_path(c, &p->key, error), *rest = calloc(1, n_bytes + 64);
    file_writer *w = path ? file_write_open(path, error) : NULL;
    if (w) {
        strcpy(rest, name ? name : "");
        code = file_write_append(w, magic, sizeof magic, error);
        if (code == QUARRY_OK) code = file_write_append(w, p, sizeof *p, error);
        if (code == QUARRY_OK) code = file_write_append(w, rest, n_bytes, error);
        if (code == QUARRY_OK) code = catalogue_add(c, p, w, error);
        if (code == QUARRY_OK && name) code = catalogue_name(c, &p->key, name, "tiny", NULL, error);
    } else if (error) {
        code = error->code;
    }
    file_write_close(w);
    memory_free(path);
    free(rest);
    return code;
}

static catalogue_piece added(catalogue *c, const catalogue_piece *parent, int64_t n_tokens, uint8_t which, size_t n_bytes, const char *name)
{
    quarry_error error = {0};
    catalogue_piece p = make_piece(parent, n_tokens, which);
    if (add(c, &p, n_bytes, name, &error) != QUARRY_OK) fail_msg("%s", error.message);
    return p;
}

/* ---- the store ---- */

static catalogue *open_with(quarry_error *error)
{
    const catalogue_params params = {.folder = folder, .describe = describe, .log = on_log};
    return catalogue_open(&params, error);
}

static catalogue *opened(void)
{
    quarry_error error = {0};
    catalogue *c = open_with(&error);
    if (!c) fail_msg("%s", error.message);
    return c;
}

static void file_name(char out[128], const char *name)
{
    snprintf(out, 128, "%s/%s", folder, name);
}

static bool has_file(catalogue *c, const catalogue_piece *p)
{
    char *path = catalogue_piece_path(c, &p->key, NULL);
    const bool has = access(path, F_OK) == 0;
    memory_free(path);
    return has;
}

static bool has_row(catalogue *c, const catalogue_piece *p)
{
    catalogue_chain chain;
    quarry_error error = {0};
    const quarry_code code = catalogue_chain_of(c, &p->key, &chain, &error);
    assert_true(code == QUARRY_OK || code == QUARRY_ERROR_ARGUMENT);
    catalogue_chain_free(&chain);
    return code == QUARRY_OK;
}

static void on_fault(const char *line, void *data)
{
    (void)data;
    print_error("%s\n", line);
}

/* Rows and files agree, and no temporary file is left. */
static void assert_sound(catalogue *c)
{
    int64_t n_faults;
    quarry_error error = {0};
    assert_int_equal(catalogue_verify(c, on_fault, NULL, &n_faults, &error), QUARRY_OK);
    assert_int_equal(n_faults, 0);
    DIR *d = opendir(folder);
    for (const struct dirent *e; (e = readdir(d));) assert_null(strstr(e->d_name, ".tmp"));
    closedir(d);
}

static catalogue_totals totals_of(catalogue *c)
{
    catalogue_totals totals;
    quarry_error error = {0};
    assert_int_equal(catalogue_get_totals(c, &totals, &error), QUARRY_OK);
    return totals;
}

static int64_t context_of(catalogue *c, const char *name)
{
    catalogue_contexts list;
    int64_t id = 0;
    assert_int_equal(catalogue_list(c, &list, NULL), QUARRY_OK);
    for (int64_t i = 0; i < list.n; i++)
        if (strcmp(list.items[i].names, name) == 0) id = list.items[i].id;
    catalogue_contexts_free(&list);
    return id;
}

static void empty_folder(void)
{
    char path[512];
    DIR *d = opendir(folder);
    for (const struct dirent *e; d && (e = readdir(d));) {
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        unlink(path);
    }
    if (d) closedir(d);
}

static int make_folder(void **state)
{
    (void)state;
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = i * i % 997;
    log_text[0] = 0;
    strcpy(folder + strlen(folder) - 6, "XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    for (int call = 0; call < FILE_N_CALLS; call++) file_fail_at((file_call)call, -1, 0);
    memory_fail_after(-1);
    empty_folder();
    return rmdir(folder);
}

static void write_bytes(const char *path, const void *bytes, size_t n)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0 && write(fd, bytes, n) == (ssize_t)n);
    close(fd);
}

/* Runs SQL past the catalogue. */
static void run_sql(const char *sql)
{
    sqlite3 *db;
    char path[128], *why = NULL;
    file_name(path, "catalogue.sqlite");
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    if (sqlite3_exec(db, sql, NULL, NULL, &why) != SQLITE_OK) fail_msg("%s: %s", sql, why);
    sqlite3_close(db);
}

/* ---- finding ---- */

static void keys_are_written_and_read(void **state)
{
    (void)state;
    store_key key, again;
    char text[STORE_KEY_CHARS];
    for (size_t i = 0; i < sizeof key.bytes; i++) key.bytes[i] = (uint8_t)(i * 17);
    store_key_text(&key, text);
    assert_string_equal(text, "00112233445566778899aabbccddeeff");
    assert_true(store_key_parse(text, &again));
    assert_true(store_key_same(&key, &again));
    assert_false(store_key_none(&key));
    static const char *const wrong[] = {"", "00112233445566778899aabbccddeef", "00112233445566778899aabbccddeeff0",
                                        "00112233445566778899aabbccddeefg", "00112233445566778899AABBCCDDEEFF"};
    for (size_t i = 0; i < TEST_COUNT(wrong); i++) assert_false(store_key_parse(wrong[i], &again));
}

static void assert_finds(catalogue *c, int64_t n, const catalogue_piece *const *expected)
{
    catalogue_chain chain;
    int64_t n_expected = 0, n_tokens = 0;
    assert_int_equal(catalogue_find(c, FINGERPRINT, "ivfpq f16", tokens, n, &chain, NULL), QUARRY_OK);
    while (expected[n_expected]) n_tokens += expected[n_expected++]->n_tokens;
    assert_int_equal(chain.n, n_expected);
    assert_int_equal(chain.n_tokens, n_tokens);
    for (int64_t i = 0; i < chain.n; i++) assert_true(store_key_same(&chain.pieces[i].key, &expected[i]->key));
    catalogue_chain_free(&chain);
}

static void the_longest_stored_prefix_is_found(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 10, NULL), abc = added(c, &ab, 300, 0, 10, NULL);
    const catalogue_piece d = added(c, NULL, 350, 0, 10, NULL); /* one piece, longer than two of the other way */
    catalogue_piece other = make_piece(&ab, 200, 0), wrong = make_piece(&d, 50, 3);
    other.params[0] = 'x';
    other.key.bytes[0] ^= 1;
    wrong.token_digest ^= 1; /* other tokens */
    assert_int_equal(add(c, &other, 10, NULL, NULL), QUARRY_OK);
    assert_int_equal(add(c, &wrong, 10, NULL, NULL), QUARRY_OK);
    assert_finds(c, 99, (const catalogue_piece *[]){NULL});
    assert_finds(c, 100, (const catalogue_piece *[]){&a, NULL});
    assert_finds(c, 349, (const catalogue_piece *[]){&a, &ab, NULL});
    assert_finds(c, 499, (const catalogue_piece *[]){&d, NULL});
    assert_finds(c, 500, (const catalogue_piece *[]){&a, &ab, &abc, NULL});
    assert_finds(c, N_TOKENS, (const catalogue_piece *[]){&a, &ab, &abc, NULL});
    tokens[150]++;
    assert_finds(c, N_TOKENS, (const catalogue_piece *[]){&a, NULL});
    tokens[0]++;
    assert_finds(c, N_TOKENS, (const catalogue_piece *[]){NULL});
    catalogue_chain chain;
    assert_int_equal(catalogue_find(c, FINGERPRINT + 1, "ivfpq f16", tokens, 500, &chain, NULL), QUARRY_OK);
    assert_int_equal(chain.n, 0);
    assert_int_equal(catalogue_find(c, FINGERPRINT, "full f16", tokens, 500, &chain, NULL), QUARRY_OK);
    assert_int_equal(chain.n, 0);
    catalogue_close(c);
}

static void of_two_ways_to_the_same_token_the_one_with_fewer_pieces_is_taken(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL);
    added(c, &a, 100, 0, 10, NULL);
    const catalogue_piece whole = added(c, NULL, 200, 0, 10, NULL);
    assert_finds(c, 200, (const catalogue_piece *[]){&whole, NULL});
    catalogue_close(c);
}

static void a_chain_leads_from_the_beginning_to_its_end(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_chain chain;
    quarry_error error = {0};
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 20, NULL), ac = added(c, &a, 200, 0, 30, NULL);
    assert_int_equal(catalogue_chain_of(c, &ac.key, &chain, &error), QUARRY_OK);
    assert_int_equal(chain.n, 2);
    assert_int_equal(chain.n_tokens, 300);
    assert_memory_equal(&chain.pieces[0], &a, sizeof a);
    assert_memory_equal(&chain.pieces[1], &ac, sizeof ac);
    catalogue_chain_free(&chain);
    assert_int_equal(catalogue_children(c, &a.key, &chain, &error), QUARRY_OK);
    assert_int_equal(chain.n, 2);
    assert_true(store_key_same(&chain.pieces[0].key, &ab.key) && store_key_same(&chain.pieces[1].key, &ac.key));
    catalogue_chain_free(&chain);
    assert_int_equal(catalogue_children(c, &(store_key){0}, &chain, &error), QUARRY_OK);
    assert_int_equal(chain.n, 1);
    catalogue_chain_free(&chain);
    assert_int_equal(catalogue_chain_of(c, &(store_key){{1}}, &chain, &error), QUARRY_ERROR_ARGUMENT);
    assert_int_equal(catalogue_chain_of(c, &(store_key){0}, &chain, &error), QUARRY_ERROR_ARGUMENT);
    catalogue_close(c);
}

static void contexts_are_listed_with_what_they_take(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_contexts list;
    int64_t id, again;
    const catalogue_piece a = added(c, NULL, 100, 0, 1000, NULL), ab = added(c, &a, 100, 0, 500, "a.txt\nb.txt");
    const catalogue_piece ac = added(c, &a, 200, 0, 700, "a.txt\nc.txt"), acd = added(c, &ac, 10, 0, 300, "a.txt\nc.txt\nd.txt");
    assert_int_equal(catalogue_touch(c, &ab.key, NULL), QUARRY_OK);
    assert_int_equal(catalogue_list(c, &list, NULL), QUARRY_OK);
    assert_int_equal(list.n, 3);
    const catalogue_context *first = &list.items[0], *second = &list.items[1], *third = &list.items[2];
    assert_string_equal(first->names, "a.txt\nb.txt"); /* the last used */
    assert_string_equal(first->model, "tiny");
    assert_string_equal(first->params, "ivfpq f16");
    assert_int_equal(first->fingerprint, FINGERPRINT);
    assert_int_equal(first->n_tokens, 200);
    assert_int_equal(first->n_pieces, 2);
    assert_int_equal(first->n_bytes, a.n_bytes + ab.n_bytes);
    assert_int_equal(first->n_bytes_alone, ab.n_bytes);
    assert_int_equal(second->n_tokens, 310);
    assert_int_equal(second->n_bytes, a.n_bytes + ac.n_bytes + acd.n_bytes);
    assert_int_equal(second->n_bytes_alone, acd.n_bytes);
    assert_int_equal(third->n_bytes_alone, 0);
    assert_true(first->last_used > second->last_used && second->last_used > third->last_used);
    catalogue_contexts_free(&list);
    assert_int_equal(catalogue_name(c, &ab.key, "other names", "tiny", &id, NULL), QUARRY_OK);
    assert_int_equal(catalogue_name(c, &ab.key, "again", "tiny", &again, NULL), QUARRY_OK);
    assert_int_equal(id, again);
    assert_int_equal(context_of(c, "again"), id);
    assert_int_equal(totals_of(c).n_contexts, 3);
    assert_int_equal(totals_of(c).n_bytes, a.n_bytes + ab.n_bytes + ac.n_bytes + acd.n_bytes);
    assert_int_equal(catalogue_name(c, &(store_key){{1}}, "nothing", "tiny", &id, NULL), QUARRY_ERROR_ARGUMENT);
    catalogue_close(c);
}

/* ---- adding ---- */

static void what_was_added_is_there_in_another_opening(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 10, "b");
    catalogue_close(c);
    c = opened();
    assert_finds(c, 200, (const catalogue_piece *[]){&a, &ab, NULL});
    assert_true(context_of(c, "b") > 0);
    assert_sound(c);
    assert_string_equal(log_text, "");
    catalogue_close(c);
}

static void a_piece_whose_parent_is_gone_is_refused(void **state)
{
    (void)state;
    catalogue *c = opened();
    quarry_error error = {0};
    const catalogue_piece absent = make_piece(NULL, 100, 0);
    catalogue_piece p = make_piece(&absent, 100, 0);
    assert_int_equal(add(c, &p, 10, NULL, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "read the documents again"));
    assert_false(has_file(c, &p));
    assert_sound(c);
    catalogue_close(c);
}

static void the_first_of_two_writers_of_a_piece_wins(void **state)
{
    (void)state;
    catalogue *c = opened(), *d = opened();
    const catalogue_piece first = added(c, NULL, 100, 0, 10, "first"), second = added(d, NULL, 100, 0, 99, "second");
    assert_true(store_key_same(&first.key, &second.key));
    assert_int_equal(second.n_bytes, first.n_bytes); /* of the file that is there */
    assert_int_equal(totals_of(c).n_pieces, 1);
    assert_int_equal(totals_of(c).n_contexts, 1);
    assert_true(context_of(c, "second") > 0);
    assert_sound(c);
    catalogue_close(c);
    catalogue_close(d);
}

static void a_failed_write_adds_neither_row_nor_file(void **state)
{
    (void)state;
    static const file_call calls[] = {FILE_CALL_OPEN, FILE_CALL_WRITE, FILE_CALL_SYNC, FILE_CALL_RENAME};
    catalogue *c = opened();
    for (size_t i = 0; i < TEST_COUNT(calls); i++) {
        quarry_error error = {0};
        catalogue_piece p = make_piece(NULL, 100, (uint8_t)i);
        file_fail_at(calls[i], 0, ENOSPC);
        assert_int_equal(add(c, &p, 10, NULL, &error), QUARRY_ERROR_IO);
        assert_non_null(strstr(error.message, ".piece"));
        assert_false(has_file(c, &p));
        assert_false(has_row(c, &p));
        assert_int_equal(add(c, &p, 10, NULL, &error), QUARRY_OK);
        assert_true(has_row(c, &p));
    }
    assert_sound(c);
    catalogue_close(c);
}

/* ---- removing ---- */

static void removing_a_context_keeps_what_others_need(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_removed removed;
    quarry_error error = {0};
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 20, "ab"), abd = added(c, &ab, 100, 0, 30, "abd");
    const catalogue_piece ac = added(c, &a, 200, 0, 40, NULL), ace = added(c, &ac, 20, 0, 50, "ace");
    const int64_t id = context_of(c, "ace");
    assert_int_equal(catalogue_remove(c, context_of(c, "ab"), &removed, &error), QUARRY_OK);
    assert_int_equal(removed.n_contexts, 1);
    assert_int_equal(removed.n_pieces, 0); /* abd continues it */
    assert_int_equal(catalogue_remove(c, id, &removed, &error), QUARRY_OK);
    assert_int_equal(removed.n_pieces, 2);
    assert_int_equal(removed.n_bytes, ac.n_bytes + ace.n_bytes);
    assert_true(has_file(c, &a) && has_file(c, &ab) && has_file(c, &abd));
    assert_false(has_file(c, &ac) || has_file(c, &ace));
    assert_int_equal(catalogue_remove(c, id, &removed, &error), QUARRY_ERROR_ARGUMENT);
    assert_non_null(strstr(error.message, "no context"));
    assert_int_equal(removed.n_contexts, 0);
    assert_int_equal(catalogue_remove(c, context_of(c, "abd"), &removed, &error), QUARRY_OK);
    assert_int_equal(removed.n_pieces, 3);
    assert_int_equal(totals_of(c).n_pieces, 0);
    assert_sound(c);
    catalogue_piece again = added(c, NULL, 50, 0, 10, "again");
    assert_true(context_of(c, "again") > id); /* numbers are not used twice */
    assert_true(has_file(c, &again));
    catalogue_close(c);
}

static void a_reader_keeps_what_it_has_open(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a");
    char *path = catalogue_piece_path(c, &a.key, NULL);
    file_map *map = file_map_open(path, true, NULL);
    file_map_hold(map);
    assert_int_equal(catalogue_remove(c, context_of(c, "a"), NULL, NULL), QUARRY_OK);
    assert_false(has_file(c, &a));
    assert_memory_equal(file_map_data(map), magic, sizeof magic);
    assert_int_equal(file_map_check(map, NULL), QUARRY_OK);
    file_map_close(map);
    memory_free(path);
    catalogue_close(c);
}

static void what_was_longest_unused_goes_first(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_removed removed;
    bool fits;
    const catalogue_piece a = added(c, NULL, 100, 0, 1000, NULL), ab = added(c, &a, 100, 0, 1000, "ab"),
                          ac = added(c, &a, 200, 0, 1000, "ac");
    const catalogue_piece d = added(c, NULL, 300, 0, 1000, "d");
    assert_int_equal(catalogue_touch(c, &ab.key, NULL), QUARRY_OK); /* order now: ac, d, a and ab */
    const int64_t one = a.n_bytes;
    assert_int_equal(catalogue_make_room(c, 0, 4 * one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(fits && removed.n_pieces == 0);
    assert_int_equal(catalogue_make_room(c, one - 1, 4 * one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(fits && removed.n_pieces == 1 && removed.n_contexts == 1 && removed.n_bytes == one);
    assert_false(has_file(c, &ac));
    assert_int_equal(catalogue_make_room(c, 0, 2 * one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_false(has_file(c, &d));
    assert_true(has_file(c, &a) && has_file(c, &ab));
    assert_int_equal(catalogue_make_room(c, 0, one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(fits && has_file(c, &a) && !has_file(c, &ab)); /* what continues a piece goes before it */
    assert_int_equal(catalogue_make_room(c, one + 1, one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(!fits && removed.n_pieces == 0 && has_file(c, &a)); /* nothing goes in vain */
    assert_int_equal(catalogue_make_room(c, one, one, &a.key, &fits, &removed, NULL), QUARRY_OK);
    assert_true(!fits && has_file(c, &a)); /* what is coming continues it */
    assert_int_equal(catalogue_make_room(c, one, one, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(fits && removed.n_pieces == 1);
    assert_int_equal(totals_of(c).n_pieces, 0);
    assert_sound(c);
    catalogue_close(c);
}

static void what_is_in_use_is_not_evicted(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_removed removed;
    bool fits;
    const catalogue_piece a = added(c, NULL, 100, 0, 1000, "a"), b = added(c, NULL, 200, 0, 1000, "b");
    char *path = catalogue_piece_path(c, &a.key, NULL);
    file_map *map = file_map_open(path, true, NULL);
    file_map_hold(map);
    for (int i = 0; i < 2; i++) { /* asking twice changes nothing */
        assert_int_equal(catalogue_make_room(c, 0, 10, NULL, &fits, &removed, NULL), QUARRY_OK);
        assert_false(fits);
        assert_true(has_file(c, &a) && !has_file(c, &b));
    }
    file_map_close(map);
    assert_int_equal(catalogue_make_room(c, 0, 10, NULL, &fits, &removed, NULL), QUARRY_OK);
    assert_true(fits && !has_file(c, &a));
    memory_free(path);
    catalogue_close(c);
}

static void a_damaged_piece_goes_with_what_continues_it(void **state)
{
    (void)state;
    catalogue *c = opened();
    catalogue_removed removed;
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), ab = added(c, &a, 100, 0, 10, "ab"), abc = added(c, &ab, 100, 0, 10, "abc");
    assert_int_equal(catalogue_discard(c, &ab.key, &removed, NULL), QUARRY_OK);
    assert_int_equal(removed.n_pieces, 2);
    assert_int_equal(removed.n_contexts, 2);
    assert_true(has_file(c, &a) && !has_file(c, &ab) && !has_file(c, &abc));
    assert_int_equal(catalogue_discard(c, &ab.key, &removed, NULL), QUARRY_OK);
    assert_int_equal(removed.n_pieces, 0);
    assert_sound(c);
    catalogue_close(c);
}

/* ---- what other processes, and those that died, leave in the folder ---- */

static void leftovers_of_dead_writers_are_removed_and_others_are_not(void **state)
{
    (void)state;
    char dead[128], stranger[128];
    catalogue_close(opened());
    file_name(dead, "00112233445566778899aabbccddeeff.piece.1-00000000000000ab.tmp");
    file_name(stranger, "notes.1-00000000000000ab.tmp");
    write_bytes(dead, "x", 1);
    write_bytes(stranger, "x", 1);
    char *path = NULL;
    catalogue *c = opened();
    assert_int_equal(access(dead, F_OK), -1);
    assert_int_equal(access(stranger, F_OK), 0);
    const store_key key = {{1}};
    file_writer *w = file_write_open(path = catalogue_piece_path(c, &key, NULL), NULL); /* one who is writing now */
    catalogue *d = opened();
    assert_int_equal(file_write_append(w, "x", 1, NULL), QUARRY_OK);
    assert_int_equal(file_write_commit(w, NULL), QUARRY_OK);
    file_write_close(w);
    assert_int_equal(access(path, F_OK), 0);
    memory_free(path);
    catalogue_close(c);
    catalogue_close(d);
}

static void files_without_a_row_are_entered_again(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), ab = added(c, &a, 100, 0, 10, NULL), abc = added(c, &ab, 100, 0, 10, "abc");
    const catalogue_piece d = added(c, NULL, 400, 0, 10, "d");
    catalogue_close(c);
    run_sql("DELETE FROM context; DELETE FROM piece WHERE n_tokens = 100");
    c = opened();
    assert_non_null(strstr(log_text, "entered again"));
    assert_finds(c, 300, (const catalogue_piece *[]){&a, &ab, &abc, NULL});
    assert_finds(c, 400, (const catalogue_piece *[]){&d, NULL});
    assert_true(context_of(c, "a") && context_of(c, "abc"));
    assert_int_equal(totals_of(c).n_contexts, 2); /* d's was forgotten, its row was not */
    assert_int_equal(totals_of(c).n_bytes, a.n_bytes + ab.n_bytes + abc.n_bytes + d.n_bytes);
    assert_sound(c);
    catalogue_close(c);
}

static void files_of_no_use_are_removed_and_unreadable_ones_left(void **state)
{
    (void)state;
    char damaged[128], newer[128], misnamed[128];
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 10, NULL);
    const catalogue_piece e = added(c, NULL, 300, 0, 10, NULL), ef = added(c, &e, 100, 0, 10, NULL);
    char *of_a = catalogue_piece_path(c, &a.key, NULL), *of_e = catalogue_piece_path(c, &e.key, NULL);
    char *of_ef = catalogue_piece_path(c, &ef.key, NULL);
    catalogue_close(c);
    run_sql("DELETE FROM piece");
    unlink(of_a);
    file_name(damaged, "00000000000000000000000000000001.piece");
    file_name(newer, "00000000000000000000000000000002.piece");
    file_name(misnamed, "00000000000000000000000000000003.piece");
    write_bytes(damaged, magic, sizeof magic);
    write_bytes(newer, "newer", 5);
    assert_int_equal(rename(of_e, misnamed), 0);
    c = opened();
    assert_false(has_file(c, &ab)); /* what it continues is gone */
    assert_int_equal(access(damaged, F_OK), -1);
    assert_int_equal(access(newer, F_OK), 0);
    assert_int_equal(access(misnamed, F_OK), 0);
    assert_int_equal(totals_of(c).n_pieces, 0);
    catalogue_close(c);
    assert_int_equal(access(of_ef, F_OK), -1);
    assert_non_null(strstr(log_text, "newer version"));
    assert_non_null(strstr(log_text, "than its name says"));
    memory_free(of_a);
    memory_free(of_e);
    memory_free(of_ef);
}

static void what_continues_an_unreadable_file_is_left_too(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, NULL), ab = added(c, &a, 100, 0, 10, NULL);
    char *of_a = catalogue_piece_path(c, &a.key, NULL);
    catalogue_close(c);
    run_sql("DELETE FROM piece");
    write_bytes(of_a, "newer", 5);
    c = opened();
    assert_true(has_file(c, &a) && has_file(c, &ab));
    assert_int_equal(totals_of(c).n_pieces, 0);
    catalogue_close(c);
    memory_free(of_a);
}

static void rows_without_a_file_are_dropped_with_what_needs_them(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), ab = added(c, &a, 100, 0, 10, "ab"), abc = added(c, &ab, 100, 0, 10, "abc");
    char *path = catalogue_piece_path(c, &ab.key, NULL);
    unlink(path);
    memory_free(path);
    int64_t n_faults;
    assert_int_equal(catalogue_verify(c, NULL, NULL, &n_faults, NULL), QUARRY_OK);
    assert_int_equal(n_faults, 1);
    catalogue_close(c);
    c = opened();
    assert_true(has_row(c, &a) && !has_row(c, &ab) && !has_row(c, &abc));
    assert_false(has_file(c, &abc));
    assert_int_equal(totals_of(c).n_contexts, 1);
    assert_sound(c);
    const catalogue_piece again = added(c, &a, 100, 0, 10, "ab");
    assert_true(has_file(c, &again));
    catalogue_close(c);
}

static void a_removal_that_was_cut_short_is_finished(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), b = added(c, NULL, 200, 0, 10, "b");
    catalogue_close(c);
    run_sql("DELETE FROM context WHERE names = 'a'; INSERT INTO removed SELECT key FROM piece WHERE n_tokens = 100; DELETE FROM piece "
            "WHERE n_tokens = 100");
    c = opened();
    assert_false(has_file(c, &a)); /* and not entered again */
    assert_true(has_file(c, &b));
    assert_sound(c);
    catalogue_close(c);
}

static void a_piece_stored_again_before_its_file_was_removed_stays(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a");
    run_sql("DELETE FROM context; INSERT INTO removed SELECT key FROM piece; DELETE FROM piece");
    added(c, NULL, 100, 0, 10, "a");
    const catalogue_piece b = added(c, NULL, 200, 0, 10, "b");
    assert_int_equal(catalogue_remove(c, context_of(c, "b"), NULL, NULL), QUARRY_OK); /* unlinks what is noted */
    assert_true(has_file(c, &a) && !has_file(c, &b));
    assert_sound(c);
    catalogue_close(c);
}

static void verifying_tells_rows_from_files(void **state)
{
    (void)state;
    static const char *const changes[] = {
        "UPDATE piece SET token_digest = token_digest + 1 WHERE n_tokens = 100", "UPDATE piece SET params = 'other' WHERE n_tokens = 100",
        "UPDATE piece SET n_bytes = 1 WHERE n_tokens = 100", "UPDATE piece SET fingerprint = 1 WHERE n_tokens = 100",
        "UPDATE piece SET parent = NULL WHERE n_tokens = 100"};
    for (size_t i = 0; i < TEST_COUNT(changes); i++) {
        int64_t n_faults;
        catalogue *c = opened();
        const catalogue_piece a = added(c, NULL, 200, 0, 10, NULL);
        catalogue_piece ab = added(c, &a, 100, 0, 10, "ab");
        assert_int_equal(catalogue_verify(c, on_fault, NULL, &n_faults, NULL), QUARRY_OK);
        assert_int_equal(n_faults, 0);
        run_sql(changes[i]);
        assert_int_equal(catalogue_verify(c, NULL, NULL, &n_faults, NULL), QUARRY_OK);
        assert_in_range(n_faults, 1, 2);                          /* a row at odds with its file, and perhaps with its parent */
        assert_int_equal(add(c, &ab, 10, NULL, NULL), QUARRY_OK); /* storing it again puts the row right */
        assert_sound(c);
        catalogue_close(c);
        empty_folder();
    }
}

static void fingerprints_are_remembered_by_all_that_identifies_a_file(void **state)
{
    (void)state;
    catalogue *c = opened();
    quarry_fingerprints known = catalogue_fingerprints(c);
    const quarry_file_identity file = {1, UINT64_MAX, 3, 4, 5, 6};
    uint64_t fingerprint = 0;
    assert_false(known.recall(&file, &fingerprint, known.data));
    known.remember(&file, UINT64_MAX - 7, known.data);
    catalogue_close(c);
    c = opened();
    known = catalogue_fingerprints(c);
    assert_true(known.recall(&file, &fingerprint, known.data));
    assert_true(fingerprint == UINT64_MAX - 7);
    for (int field = 0; field < 6; field++) {
        quarry_file_identity other = file;
        if (field == 0) other.device++;
        if (field == 1) other.inode--;
        if (field == 2) other.n_bytes++;
        if (field == 3) other.modified++;
        if (field == 4) other.changed++;
        if (field == 5) other.method++;
        assert_false(known.recall(&other, &fingerprint, known.data));
    }
    quarry_file_identity changed = file;
    changed.changed = 50;
    known.remember(&changed, 8, known.data); /* in the place of what the file was */
    assert_false(known.recall(&file, &fingerprint, known.data));
    assert_true(known.recall(&changed, &fingerprint, known.data) && fingerprint == 8);
    catalogue_close(c);
}

/* Two changes within one tick of the clock leave the same times. */
static void what_changed_just_now_is_not_remembered(void **state)
{
    (void)state;
    catalogue *c = opened();
    const quarry_fingerprints known = catalogue_fingerprints(c);
    struct timespec now;
    uint64_t fingerprint;
    clock_gettime(CLOCK_REALTIME, &now);
    for (int field = 0; field < 3; field++) {
        const int64_t recent = (int64_t)(now.tv_sec + (field == 2 ? 1000 : 0)) * 1000000000; /* the last: a clock that was set back */
        const quarry_file_identity file = {1, 2, 3, field == 0 ? recent : 4, field != 0 ? recent : 5, 6};
        known.remember(&file, 7, known.data);
        assert_false(known.recall(&file, &fingerprint, known.data));
    }
    catalogue_close(c);
}

/* ---- damaged and foreign databases ---- */

static void a_damaged_database_is_made_anew_from_the_pieces(void **state)
{
    (void)state;
    char path[128], aside[128];
    file_name(path, "catalogue.sqlite");
    file_name(aside, "catalogue.sqlite.damaged");
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), ab = added(c, &a, 100, 0, 10, NULL);
    const catalogue_piece d = added(c, NULL, 300, 0, 10, NULL);
    catalogue_close(c);
    write_bytes(path, "this was a database once, and long enough to have a header of one hundred bytes, which it has not............", 105);
    c = opened();
    assert_non_null(strstr(log_text, "made anew"));
    assert_int_equal(access(aside, F_OK), 0);
    assert_finds(c, 200, (const catalogue_piece *[]){&a, &ab, NULL});
    assert_true(has_row(c, &d));
    assert_true(context_of(c, "a") > 0);
    assert_int_equal(totals_of(c).n_contexts, 3); /* chains without a name in their files get a context that can be removed */
    assert_sound(c);
    catalogue_close(c);
}

static void a_database_that_is_gone_is_made_anew(void **state)
{
    (void)state;
    char path[128];
    file_name(path, "catalogue.sqlite");
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a");
    catalogue_close(c);
    for (size_t n = 0; n < 2; n++) {
        if (n == 0)
            unlink(path);
        else
            write_bytes(path, "", 0);
        c = opened();
        assert_finds(c, 100, (const catalogue_piece *[]){&a, NULL});
        assert_true(context_of(c, "a") > 0);
        catalogue_close(c);
    }
}

/* Whatever is overwritten, the store opens, and every piece is in it whose row says what its file says. */
static void bytes_overwritten_anywhere_in_the_database_lose_no_piece(void **state)
{
    (void)state;
    char path[128];
    file_name(path, "catalogue.sqlite");
    catalogue *c = opened();
    catalogue_piece pieces[12];
    for (int i = 0; i < 12; i++) pieces[i] = added(c, i % 4 ? &pieces[i - 1] : NULL, 20 + i, (uint8_t)i, 10, i % 4 == 3 ? "name" : NULL);
    catalogue_close(c);
    size_t n;
    char *sound = file_read_all(path, &n, NULL);
    random_state random;
    random_seed(&random, 5);
    int n_rebuilt = 0;
    for (int round = 0; round < 110; round++) {
        const bool in_header = round >= 60; /* its fields byte by byte */
        const size_t n_over = in_header || round % 2 ? 1 : 400, at = in_header ? (size_t)round - 44 : random_below(&random, n - 400);
        char *bytes = malloc(n);
        memcpy(bytes, sound, n);
        for (size_t i = 0; i < n_over; i++) bytes[at + i] = (char)random_u64(&random);
        write_bytes(path, bytes, n);
        free(bytes);
        log_text[0] = 0;
        quarry_error error = {0};
        c = open_with(&error);
        if (!c) { /* what says of which version it is */
            assert_true(at + 400 > 60 && at < 64);
            assert_int_equal(error.code, QUARRY_ERROR_UNSUPPORTED);
            continue;
        }
        n_rebuilt += strstr(log_text, "made anew") != NULL;
        for (int i = 0; i < 12; i++) assert_true(has_file(c, &pieces[i]));
        catalogue_totals totals = totals_of(c);
        assert_int_equal(totals.n_pieces, 12);
        catalogue_close(c);
    }
    assert_in_range(n_rebuilt, 20, 100);
    free(sound);
}

static void a_foreign_database_is_refused_and_left_alone(void **state)
{
    (void)state;
    quarry_error error = {0};
    run_sql("CREATE TABLE recipe(name TEXT); INSERT INTO recipe VALUES ('soup')");
    assert_null(open_with(&error));
    assert_int_equal(error.code, QUARRY_ERROR_FORMAT);
    assert_non_null(strstr(error.message, "catalogue.sqlite"));
    assert_non_null(strstr(error.message, "no catalogue of contexts"));
    run_sql("INSERT INTO recipe SELECT name FROM recipe WHERE name = 'soup'");
}

static void a_newer_version_is_refused_and_left_alone(void **state)
{
    (void)state;
    quarry_error error = {0};
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a");
    catalogue_close(c);
    run_sql("PRAGMA user_version = 2");
    assert_null(open_with(&error));
    assert_int_equal(error.code, QUARRY_ERROR_UNSUPPORTED);
    assert_non_null(strstr(error.message, "newer quarry"));
    run_sql("PRAGMA user_version = 1");
    c = opened();
    assert_true(has_row(c, &a));
    catalogue_close(c);
}

/* ---- places that do not do ---- */

/* Runs body in a child that may change what belongs to the process; 0 is success. */
static void in_child(int (*body)(void))
{
    int status;
    const pid_t child = fork();
    if (child == 0) _exit(body());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static int refuses(const char *says)
{
    quarry_error error = {0};
    catalogue *c = open_with(&error);
    if (!c && error.code == QUARRY_ERROR_IO && strstr(error.message, folder) && strstr(error.message, says)) return 0;
    fprintf(stderr, "%s: %s\n", c ? "opened" : "not opened", error.message);
    return 1;
}

static int without_permission(void)
{
    if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) return 2; /* root may write anywhere */
    return refuses("a folder that you may write to");
}

static void a_folder_that_cannot_be_written_is_refused(void **state)
{
    (void)state;
    assert_int_equal(chmod(folder, 0555), 0);
    in_child(without_permission); /* an empty one */
    assert_int_equal(chmod(folder, 0755), 0);
    catalogue_close(opened());
    assert_int_equal(chmod(folder, 0555), 0);
    in_child(without_permission); /* one with a store */
    assert_int_equal(chmod(folder, 0755), 0);
}

static void a_file_in_the_place_of_the_folder_is_refused(void **state)
{
    (void)state;
    char path[128];
    quarry_error error = {0};
    file_name(path, "file");
    write_bytes(path, "x", 1);
    assert_null(catalogue_open(&(catalogue_params){.folder = path}, &error));
    assert_non_null(strstr(error.message, path));
    strcat(path, "/store");
    assert_null(catalogue_open(&(catalogue_params){.folder = path}, &error));
    assert_int_equal(error.code, QUARRY_ERROR_IO);
}

static void a_missing_folder_is_made_for_this_user_only(void **state)
{
    (void)state;
    char path[128], inner[192];
    struct stat st;
    file_name(path, "a");
    snprintf(inner, sizeof inner, "%s//b/c/", path);
    catalogue *c = catalogue_open(&(catalogue_params){.folder = inner}, NULL);
    assert_non_null(c);
    assert_string_equal(catalogue_folder(c), inner);
    catalogue_close(c);
    assert_int_equal(stat(inner, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    char command[256];
    snprintf(command, sizeof command, "rm -r %s", path);
    assert_int_equal(system(command), 0);
}

static void assert_default(const char *store, const char *cache, const char *home, const char *expected)
{
    const struct {
        const char *name, *value;
    } variables[] = {{"QUARRY_STORE", store}, {"XDG_CACHE_HOME", cache}, {"HOME", home}};
    quarry_error error = {0};
    for (size_t i = 0; i < TEST_COUNT(variables); i++) {
        if (variables[i].value)
            setenv(variables[i].name, variables[i].value, 1);
        else
            unsetenv(variables[i].name);
    }
    char *path = catalogue_default_folder(&error);
    if (expected) {
        assert_string_equal(path, expected);
    } else {
        assert_null(path);
        assert_int_equal(error.code, QUARRY_ERROR_ARGUMENT);
        assert_non_null(strstr(error.message, "QUARRY_STORE"));
        assert_null(catalogue_open(&(catalogue_params){0}, &error));
        assert_int_equal(error.code, QUARRY_ERROR_ARGUMENT);
    }
    memory_free(path);
}

static void the_default_folder_follows_the_environment(void **state)
{
    (void)state;
    assert_default("/s", "/c", "/h", "/s");
    assert_default("", "/c", "/h", "/c/quarry/contexts");
    assert_default(NULL, NULL, "/h", "/h/.cache/quarry/contexts");
    assert_default(NULL, "relative", "/h", "/h/.cache/quarry/contexts");
    assert_default(NULL, NULL, NULL, NULL);
    assert_default(NULL, "", "", NULL);
}

/* Adds pieces until the limit on file sizes strikes: in the database's log, for the pieces are small. */
static int fill_up(void)
{
    quarry_error error = {0};
    catalogue *c = open_with(&error);
    if (!c) return 3;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &(struct rlimit){100000, 100000});
    int n = 0;
    for (quarry_code code = QUARRY_OK; code == QUARRY_OK && n < 200; n++) {
        catalogue_piece p = make_piece(NULL, 1 + n, 0);
        code = add(c, &p, 10, "name", &error);
    }
    if (n < 3 || n == 200 || error.code != QUARRY_ERROR_IO || !strstr(error.message, folder)) return 1;
    if (totals_of(c).n_pieces < n - 1) return 2; /* those added stay, and the catalogue can be read */
    return 0;
}

static void a_full_disk_loses_nothing(void **state)
{
    (void)state;
    catalogue_close(opened());
    in_child(fill_up);
    catalogue *c = opened();
    assert_true(totals_of(c).n_pieces >= 2);
    assert_sound(c);
    catalogue_close(c);
}

static void running_out_of_memory_is_an_error(void **state)
{
    (void)state;
    catalogue *c = opened();
    const catalogue_piece a = added(c, NULL, 100, 0, 10, "a"), ab = added(c, &a, 100, 0, 10, "ab");
    for (int what = 0; what < 5; what++) {
        bool succeeded = false;
        int n_failures = 0;
        for (int n = 0; n < 40 && !succeeded; n++, n_failures += !succeeded) {
            quarry_error error = {0};
            catalogue_chain chain = {0};
            catalogue_contexts list = {0};
            int64_t n_faults;
            catalogue *d = NULL;
            quarry_code code = QUARRY_ERROR_MEMORY;
            memory_fail_after(n);
            if (what == 0) code = catalogue_find(c, FINGERPRINT, "ivfpq f16", tokens, 200, &chain, &error);
            if (what == 1) code = catalogue_chain_of(c, &ab.key, &chain, &error);
            if (what == 2) code = catalogue_list(c, &list, &error);
            if (what == 3 && (d = open_with(&error))) code = QUARRY_OK;
            if (what == 4) code = catalogue_verify(c, NULL, NULL, &n_faults, &error);
            memory_fail_after(-1);
            succeeded = code == QUARRY_OK;
            if (!succeeded) assert_int_equal(error.code, QUARRY_ERROR_MEMORY);
            catalogue_chain_free(&chain);
            catalogue_contexts_free(&list);
            catalogue_close(d);
        }
        assert_true(succeeded && n_failures > 0);
    }
    assert_sound(c);
    catalogue_close(c);
}

/* ---- several processes ---- */

enum { N_PROCESSES = 4, N_EACH = 12 };

/* One of several that store, use, remove and evict the same and different contexts. */
static int work(int which)
{
    quarry_error error = {0};
    catalogue *c = open_with(&error);
    for (int i = 0; c && i < N_EACH; i++) {
        catalogue_piece shared = make_piece(NULL, 10 + i, 0), own = make_piece(&shared, 20, (uint8_t)(1 + which));
        char name[32];
        snprintf(name, sizeof name, "%d of %d", i, which);
        quarry_code code;
        do { /* another process may remove the last context that needs `shared` while nothing of ours continues it yet */
            code = add(c, &shared, 100, NULL, &error);
            if (code == QUARRY_OK) code = add(c, &own, 100, name, &error);
        } while (code == QUARRY_ERROR_ARGUMENT);
        if (code != QUARRY_OK) break;
        error.code = QUARRY_OK;
        if (catalogue_touch(c, &own.key, &error) != QUARRY_OK) break;
        if (i % 3 == 1 && catalogue_remove(c, context_of(c, name), NULL, &error) != QUARRY_OK) break;
    }
    if (!c || error.code != QUARRY_OK) fprintf(stderr, "%s\n", error.message);
    catalogue_close(c);
    return !c || error.code != QUARRY_OK;
}

static void processes_at_once_lose_nothing(void **state)
{
    (void)state;
    pid_t children[N_PROCESSES];
    for (int i = 0; i < N_PROCESSES; i++)
        if ((children[i] = fork()) == 0) _exit(work(i)); /* the folder is empty: they also make the database at once */
    for (int i = 0; i < N_PROCESSES; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    catalogue *c = opened();
    assert_int_equal(totals_of(c).n_contexts, N_PROCESSES * (N_EACH - N_EACH / 3));
    for (int which = 0; which < N_PROCESSES; which++) {
        for (int i = 0; i < N_EACH; i++) {
            const catalogue_piece shared = make_piece(NULL, 10 + i, 0), own = make_piece(&shared, 20, (uint8_t)(1 + which));
            assert_int_equal(has_row(c, &own), i % 3 != 1);
            assert_int_equal(has_row(c, &shared), i % 3 != 1);
        }
    }
    assert_sound(c);
    catalogue_close(c);
}

/* What a child that is killed says before: the pieces it has stored ('+'), and those it is about to remove ('-'). */
typedef struct note {
    char what;
    catalogue_piece piece;
} note;

static int work_until_killed(int round, int notes, file_call call, int64_t kill_at)
{
    catalogue *c = open_with(NULL);
    file_fail_at(call, kill_at, -1);
    for (int i = 0; c && i < 1000; i++) {
        note n = {'+', make_piece(NULL, 1 + (round * 7 + i) % 300, 0)};
        char name[32];
        snprintf(name, sizeof name, "%d", i);
        if (add(c, &n.piece, 3000, name, NULL) != QUARRY_OK || write(notes, &n, sizeof n) != sizeof n) return 1;
        n.what = '-';
        if (i % 3 == 2 && write(notes, &n, sizeof n) != sizeof n) return 1;
        if (i % 3 == 2 && catalogue_remove(c, context_of(c, name), NULL, NULL) != QUARRY_OK) return 1;
    }
    return 1;
}

/* Kills the child at its kill_at-th call of the file layer, or, with n_notes, when it has said so much: anywhere in what comes next. A bystander works on the same
 * store meanwhile and must not notice. */
static void kill_one(int round, file_call call, int64_t kill_at, int n_notes, bool with_bystander)
{
    static note notes[64];
    int ends[2], n = 0, status;
    const pid_t bystander = with_bystander ? fork() : -1;
    if (bystander == 0) _exit(work(1));
    assert_int_equal(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) {
        close(ends[0]);
        _exit(work_until_killed(round, ends[1], call, kill_at));
    }
    close(ends[1]);
    while (n < 64 && (n_notes == 0 || n < n_notes) && read(ends[0], &notes[n], sizeof notes[n]) == sizeof notes[n]) n++;
    if (n_notes) kill(child, SIGKILL);
    while (n < 64 && read(ends[0], &notes[n], sizeof notes[n]) == sizeof notes[n]) n++;
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    if (with_bystander) {
        assert_int_equal(waitpid(bystander, &status, 0), bystander);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    catalogue *c = opened();
    assert_sound(c);
    for (int i = 0; i < n; i++) {
        bool removed = false;
        for (int j = i; j < n; j++) removed |= notes[j].what == '-' && store_key_same(&notes[j].piece.key, &notes[i].piece.key);
        if (!removed) assert_true(has_row(c, &notes[i].piece));
    }
    catalogue_close(c);
}

static void a_process_killed_in_any_call_loses_nothing_that_was_committed(void **state)
{
    (void)state;
    static const file_call calls[] = {FILE_CALL_OPEN, FILE_CALL_WRITE, FILE_CALL_SYNC, FILE_CALL_RENAME};
    for (size_t i = 0; i < TEST_COUNT(calls); i++)
        for (int at = 0; at < 8; at++) kill_one((int)i * 8 + at, calls[i], at, 0, at == 5);
}

static void a_process_killed_at_any_time_loses_nothing_that_was_committed(void **state)
{
    (void)state;
    for (int round = 0; round < 24; round++) kill_one(round, FILE_CALL_OPEN, -1, 1 + round % 7, round % 6 == 3);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keys_are_written_and_read),
        IN_FOLDER(the_longest_stored_prefix_is_found),
        IN_FOLDER(of_two_ways_to_the_same_token_the_one_with_fewer_pieces_is_taken),
        IN_FOLDER(a_chain_leads_from_the_beginning_to_its_end),
        IN_FOLDER(contexts_are_listed_with_what_they_take),
        IN_FOLDER(what_was_added_is_there_in_another_opening),
        IN_FOLDER(a_piece_whose_parent_is_gone_is_refused),
        IN_FOLDER(the_first_of_two_writers_of_a_piece_wins),
        IN_FOLDER(a_failed_write_adds_neither_row_nor_file),
        IN_FOLDER(removing_a_context_keeps_what_others_need),
        IN_FOLDER(a_reader_keeps_what_it_has_open),
        IN_FOLDER(what_was_longest_unused_goes_first),
        IN_FOLDER(what_is_in_use_is_not_evicted),
        IN_FOLDER(a_damaged_piece_goes_with_what_continues_it),
        IN_FOLDER(leftovers_of_dead_writers_are_removed_and_others_are_not),
        IN_FOLDER(files_without_a_row_are_entered_again),
        IN_FOLDER(files_of_no_use_are_removed_and_unreadable_ones_left),
        IN_FOLDER(what_continues_an_unreadable_file_is_left_too),
        IN_FOLDER(rows_without_a_file_are_dropped_with_what_needs_them),
        IN_FOLDER(a_removal_that_was_cut_short_is_finished),
        IN_FOLDER(a_piece_stored_again_before_its_file_was_removed_stays),
        IN_FOLDER(verifying_tells_rows_from_files),
        IN_FOLDER(fingerprints_are_remembered_by_all_that_identifies_a_file),
        IN_FOLDER(what_changed_just_now_is_not_remembered),
        IN_FOLDER(a_damaged_database_is_made_anew_from_the_pieces),
        IN_FOLDER(a_database_that_is_gone_is_made_anew),
        IN_FOLDER(bytes_overwritten_anywhere_in_the_database_lose_no_piece),
        IN_FOLDER(a_foreign_database_is_refused_and_left_alone),
        IN_FOLDER(a_newer_version_is_refused_and_left_alone),
        IN_FOLDER(a_folder_that_cannot_be_written_is_refused),
        IN_FOLDER(a_file_in_the_place_of_the_folder_is_refused),
        IN_FOLDER(a_missing_folder_is_made_for_this_user_only),
        cmocka_unit_test(the_default_folder_follows_the_environment),
        IN_FOLDER(a_full_disk_loses_nothing),
        IN_FOLDER(running_out_of_memory_is_an_error),
        IN_FOLDER(processes_at_once_lose_nothing),
        IN_FOLDER(a_process_killed_in_any_call_loses_nothing_that_was_committed),
        IN_FOLDER(a_process_killed_at_any_time_loses_nothing_that_was_committed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
