/* Opens a catalogue whose database had bytes written over, and does with it all that can be done: an error that names the folder, or answers that are within bounds.
 * The input is a list of offset (2 bytes) and value; of 512-byte pages, so that it reaches all of them. */
#include <dirent.h>
#include <fcntl.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/store.h"

enum { N_PIECES = 6, N_TOKENS = 60 };

static char folder[64], database[96];
static char *sound; /* the database as it was made */
static size_t n_sound;
static int32_t tokens[N_TOKENS];
static catalogue_piece pieces[N_PIECES]; /* what is in the piece files */
static char *paths[N_PIECES];

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

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

static void clean_up(void)
{
    empty_folder();
    rmdir(folder);
    memory_free(sound);
    for (int i = 0; i < N_PIECES; i++) memory_free(paths[i]);
}

static void must(bool holds)
{
    if (!holds) abort();
}

/* The whole row is in the file. */
static quarry_code describe(const char *path, catalogue_piece *piece, char **names, char **model, void *data, quarry_error *error)
{
    (void)names;
    (void)model;
    (void)data;
    size_t n;
    char *bytes = file_read_all(path, &n, error);
    if (!bytes) return QUARRY_ERROR_IO;
    must(n == sizeof *piece);
    memcpy(piece, bytes, n);
    memory_free(bytes);
    return QUARRY_OK;
}

static const catalogue_params params = {.folder = folder, .describe = describe};

static void make_store(void)
{
    quarry_error error;
    sqlite3 *db;
    const char *const small_pages = "PRAGMA page_size = 512; CREATE TABLE t(a); DROP TABLE t";
    snprintf(folder, sizeof folder, "%s/quarry_fuzz_XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    must(mkdtemp(folder) != NULL);
    atexit(clean_up);
    snprintf(database, sizeof database, "%s/catalogue.sqlite", folder);
    must(sqlite3_open(database, &db) == SQLITE_OK && sqlite3_exec(db, small_pages, NULL, NULL, NULL) == SQLITE_OK);
    sqlite3_close(db);
    catalogue *c = catalogue_open(&params, &error);
    must(c != NULL);
    for (int i = 0; i < N_PIECES; i++) {
        catalogue_piece *p = &pieces[i], row;
        *p = (catalogue_piece){.key = {{1, (uint8_t)i}}, .fingerprint = 1, .params = "params", .n_tokens = 10};
        if (i % 3) {
            p->parent = pieces[i - 1].key;
            p->first = pieces[i - 1].first + 10;
        }
        p->token_digest = catalogue_digest(tokens + p->first, 10);
        row = *p;
        paths[i] = catalogue_piece_path(c, &p->key, &error);
        file_writer *w = file_write_open(paths[i], &error);
        must(file_write_append(w, p, sizeof *p, &error) == QUARRY_OK && catalogue_add(c, &row, w, &error) == QUARRY_OK);
        must(catalogue_name(c, &p->key, "document", "model", NULL, &error) == QUARRY_OK);
        file_write_close(w);
    }
    catalogue_close(c);
    must((sound = file_read_all(database, &n_sound, &error)) != NULL);
}

static int put_file(const char *path, const void *bytes, size_t n)
{
    const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    must(fd >= 0 && write(fd, bytes, n) == (ssize_t)n);
    return fd;
}

static void use(catalogue *c)
{
    quarry_error error;
    catalogue_chain chain;
    catalogue_contexts list;
    catalogue_totals totals;
    int64_t n_faults;
    bool fits;
    if (catalogue_find(c, 1, "params", tokens, N_TOKENS, &chain, &error) == QUARRY_OK) {
        must(chain.n_tokens <= N_TOKENS && (chain.n > 0) == (chain.n_tokens > 0));
        if (chain.n) catalogue_touch(c, &chain.pieces[chain.n - 1].key, &error);
        catalogue_chain_free(&chain);
    }
    catalogue_verify(c, NULL, NULL, &n_faults, &error);
    catalogue_get_totals(c, &totals, &error);
    if (catalogue_list(c, &list, &error) == QUARRY_OK) {
        for (int64_t i = 0; i < list.n; i++) must(list.items[i].n_tokens > 0 && list.items[i].n_bytes_alone <= list.items[i].n_bytes);
        if (list.n) catalogue_remove(c, list.items[0].id, NULL, &error);
        catalogue_contexts_free(&list);
    }
    catalogue_make_room(c, 0, 300, NULL, &fits, NULL, &error);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    quarry_error error = {0};
    if (!sound) make_store();
    empty_folder();
    for (int i = 0; i < N_PIECES; i++) close(put_file(paths[i], &pieces[i], sizeof pieces[i]));
    const int fd = put_file(database, sound, n_sound);
    for (size_t i = 0; i + 3 <= n && i < 300; i += 3) {
        const size_t at = ((size_t)data[i] << 8 | data[i + 1]) % n_sound;
        must(pwrite(fd, data + i + 2, 1, (off_t)at) == 1);
    }
    close(fd);
    catalogue *c = catalogue_open(&params, &error);
    must(c || (error.code != QUARRY_OK && strstr(error.message, folder)));
    if (c) use(c);
    catalogue_close(c);
    return 0;
}
