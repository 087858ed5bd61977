#include "base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file_calls.h"
#include "base/memory.h"

/* A signal handler belongs to the process, so what it reads is the one piece of global mutable state of the library. Regions are never freed, only
 * reused, so that a handler on another thread can walk the list without a lock. */
typedef struct map_region map_region;
struct map_region {
    map_region *next;        /* set once, before the region is published */
    _Atomic uintptr_t start; /* 0: free */
    _Atomic uintptr_t size;  /* bytes, 0: free */
    atomic_bool failed;
};

static _Atomic(map_region *) regions;
static pthread_mutex_t regions_lock = PTHREAD_MUTEX_INITIALIZER; /* of adding and removing; the handler takes none */
static struct sigaction previous_actions[2]; /* what we replaced; the other one is written while a handler may read this one */
static atomic_int previous_index;
static uintptr_t page_size;

struct file_map {
    char *path;
    int fd;
    uint64_t size;
    uint8_t *data; /* [size], NULL when not mapped */
    map_region *region;
};

/* True if address lay in a map of ours: its pages from there to the end, which the file no longer has, now read as zeros. */
static bool region_heal(uintptr_t address)
{
    for (map_region *r = atomic_load(&regions); r; r = r->next) {
        uintptr_t start = atomic_load(&r->start), size = atomic_load(&r->size);
        if (size == 0 || address < start || address - start >= size) continue;
        uintptr_t page = address / page_size * page_size;
        void *zeros = mmap((void *)page, start + size - page, PROT_READ, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (zeros == MAP_FAILED) return false;
        atomic_store(&r->failed, true);
        return true;
    }
    return false;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    const struct sigaction *previous = &previous_actions[atomic_load(&previous_index)];
    int saved = errno;
    bool from_fault = info->si_code > 0; /* not sent by kill or raise */
    bool healed = from_fault && region_heal((uintptr_t)info->si_addr);
    errno = saved;
    if (healed) return;
    bool is_default = !(previous->sa_flags & SA_SIGINFO) && (previous->sa_handler == SIG_DFL || previous->sa_handler == SIG_IGN);
    if (is_default && !from_fault && previous->sa_handler == SIG_IGN) return;
    if (is_default) {
        signal(signal_number, SIG_DFL); /* a fault repeats when this returns, and ends the process as it would have without us */
        if (!from_fault) raise(signal_number);
        return;
    }
    if (previous->sa_flags & SA_SIGINFO)
        previous->sa_sigaction(signal_number, info, context);
    else
        previous->sa_handler(signal_number);
}

/* Puts our handler first, again if the program installed its own since the last map. */
static quarry_code handler_install(quarry_error *error)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    int other = !atomic_load(&previous_index);
    sigemptyset(&action.sa_mask);
    page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    if (sigaction(SIGBUS, NULL, &previous_actions[other]) != 0) goto failed;
    if ((previous_actions[other].sa_flags & SA_SIGINFO) && previous_actions[other].sa_sigaction == on_sigbus) return QUARRY_OK;
    atomic_store(&previous_index, other);
    if (sigaction(SIGBUS, &action, NULL) != 0) goto failed;
    return QUARRY_OK;
failed:
    return error_set(error, QUARRY_ERROR_IO, "cannot install a SIGBUS handler: %s", strerror(errno));
}

static quarry_code region_add(const void *data, uint64_t size, map_region **region, quarry_error *error)
{
    map_region *r;
    pthread_mutex_lock(&regions_lock);
    quarry_code code = handler_install(error);
    if (code != QUARRY_OK) goto done;
    for (r = atomic_load(&regions); r && atomic_load(&r->size) != 0; r = r->next) {
    }
    bool fresh = !r;
    if (fresh && !(r = memory_zero(1, sizeof *r, "file map", error))) {
        code = QUARRY_ERROR_MEMORY;
        goto done;
    }
    atomic_store(&r->failed, false);
    atomic_store(&r->start, (uintptr_t)data);
    atomic_store(&r->size, (uintptr_t)size);
    if (fresh) {
        r->next = atomic_load(&regions);
        atomic_store(&regions, r);
    }
    *region = r;
done:
    pthread_mutex_unlock(&regions_lock);
    return code;
}

static void region_remove(map_region *r)
{
    if (!r) return;
    pthread_mutex_lock(&regions_lock);
    atomic_store(&r->size, 0);
    atomic_store(&r->start, 0);
    pthread_mutex_unlock(&regions_lock);
}

static quarry_code file_map_bytes(file_map *map, quarry_error *error)
{
    if (map->size == 0) return QUARRY_OK; /* nothing to map */
    if (map->size > SIZE_MAX) return error_memory(error, map->path, SIZE_MAX);
    void *data = mmap(NULL, (size_t)map->size, PROT_READ, MAP_PRIVATE, map->fd, 0);
    if (data == MAP_FAILED) return error_set(error, QUARRY_ERROR_IO, "%s: cannot map the file: %s", map->path, strerror(errno));
    map->data = data;
    return region_add(data, map->size, &map->region, error);
}

file_map *file_map_open(const char *path, bool use_mmap, quarry_error *error)
{
    struct stat st;
    file_map *map = memory_zero(1, sizeof *map, "file map", error);
    if (!map) return NULL;
    map->fd = -1;
    if (!(map->path = memory_string(path, strlen(path), error))) goto failed;
    map->fd = file_call_open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0); /* a FIFO must not block before it is refused */
    if (map->fd < 0 || fstat(map->fd, &st) != 0) {
        error_set(error, QUARRY_ERROR_IO, "%s: cannot open: %s", path, strerror(errno));
        goto failed;
    }
    if (!S_ISREG(st.st_mode)) {
        error_set(error, QUARRY_ERROR_IO, "%s: %s", path, S_ISDIR(st.st_mode) ? "is a directory, not a file" : "is not a regular file");
        goto failed;
    }
    map->size = (uint64_t)st.st_size;
    if (use_mmap && file_map_bytes(map, error) != QUARRY_OK) goto failed;
    return map;
failed:
    file_map_close(map);
    return NULL;
}

void file_map_close(file_map *map)
{
    if (!map) return;
    region_remove(map->region); /* before the addresses can belong to somebody else */
    if (map->data) munmap(map->data, (size_t)map->size);
    if (map->fd >= 0) close(map->fd);
    memory_free(map->path);
    memory_free(map);
}

uint64_t file_map_size(const file_map *map)
{
    return map->size;
}

const char *file_map_path(const file_map *map)
{
    return map->path;
}

const uint8_t *file_map_data(const file_map *map)
{
    return map->data;
}

quarry_code file_map_check(const file_map *map, quarry_error *error)
{
    struct stat st;
    if (!map->data) return QUARRY_OK; /* reads report for themselves */
    /* The size too: bytes cut off inside the last page read as zeros without a signal. */
    bool shrank = fstat(map->fd, &st) != 0 || (uint64_t)st.st_size < map->size;
    if (shrank || atomic_load(&map->region->failed))
        return error_set(error, QUARRY_ERROR_IO, "%s: the file became shorter or unreadable while in use; restore it and try again",
                         map->path);
    return QUARRY_OK;
}

quarry_code file_map_read(const file_map *map, uint64_t offset, size_t n, void *out, quarry_error *error)
{
    for (size_t done = 0; done < n;) {
        ssize_t got = offset + done > INT64_MAX ? 0 : file_call_pread(map->fd, (char *)out + done, n - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return error_set(error, QUARRY_ERROR_IO, "%s: cannot read: %s", map->path, strerror(errno));
        if (got == 0)
            return error_set(error, QUARRY_ERROR_IO, "%s: the file ends before byte %llu; it is cut short or changed while in use",
                             map->path, (unsigned long long)offset + n);
        done += (size_t)got;
    }
    return QUARRY_OK;
}

void file_map_expect(const file_map *map, uint64_t offset, size_t n)
{
    posix_fadvise(map->fd, (off_t)offset, (off_t)n, POSIX_FADV_WILLNEED);
}

quarry_code file_map_read_many(const file_map *map, file_range *ranges, int64_t n, quarry_error *error)
{
    int64_t n_late = 0;
    for (int64_t i = 0; i < n; i++) {
        const file_range *r = &ranges[i];
        const bool beyond = r->offset + r->n > map->size;
        const ssize_t got = beyond ? 0 : file_call_pread_now(map->fd, r->out, r->n, (off_t)r->offset);
        if (got == (ssize_t)r->n) continue;
        if (got < 0 && errno != EAGAIN && errno != EINTR && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL)
            return error_set(error, QUARRY_ERROR_IO, "%s: cannot read: %s", map->path, strerror(errno));
        if (!beyond) file_map_expect(map, r->offset, r->n);
        ranges[n_late++] = *r;
    }
    quarry_code code = QUARRY_OK;
    for (int64_t i = 0; i < n_late && code == QUARRY_OK; i++)
        code = file_map_read(map, ranges[i].offset, ranges[i].n, ranges[i].out, error);
    return code;
}

void file_map_scatter(const file_map *map)
{
    posix_fadvise(map->fd, 0, 0, POSIX_FADV_RANDOM);
}

void file_map_release(const file_map *map, uint64_t offset, size_t n)
{
    if (!map->data || offset >= map->size) return;
    if (n > map->size - offset) n = (size_t)(map->size - offset);
    uintptr_t first = (uintptr_t)map->data + (uintptr_t)offset;
    uintptr_t begin = (first + page_size - 1) / page_size * page_size, end = (first + n) / page_size * page_size;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED); /* advice: a refusal costs memory only */
}

bool file_map_identity(const file_map *map, quarry_file_identity *identity)
{
    struct stat st;
    *identity = (quarry_file_identity){0};
    if (fstat(map->fd, &st) != 0) return false;
    identity->device = st.st_dev;
    identity->inode = st.st_ino;
    identity->n_bytes = (uint64_t)st.st_size;
    identity->modified = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
    identity->changed = (int64_t)st.st_ctim.tv_sec * 1000000000 + st.st_ctim.tv_nsec;
    return true;
}

void file_map_hold(const file_map *map)
{
    flock(map->fd, LOCK_SH | LOCK_NB); /* refused only while somebody tests or removes the file, which the open map outlives */
}

bool file_is_held(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return errno != ENOENT; /* what cannot be tested may be in use */
    const bool held = flock(fd, LOCK_EX | LOCK_NB) != 0;
    close(fd);
    return held;
}

char *file_read_all(const char *path, size_t *n_bytes, quarry_error *error)
{
    bool is_stdin = strcmp(path, "-") == 0;
    const char *name = is_stdin ? "standard input" : path;
    struct stat st;
    char *text = NULL;
    size_t used = 0, capacity = 64 << 10;
    quarry_code code = QUARRY_OK;
    int fd = is_stdin ? STDIN_FILENO : file_call_open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0 || fstat(fd, &st) != 0) {
        code = error_set(error, QUARRY_ERROR_IO, "%s: cannot open: %s", name, strerror(errno));
        goto done;
    }
    if (S_ISREG(st.st_mode) && st.st_size > 0 && (uint64_t)st.st_size < SIZE_MAX / 4)
        capacity = (size_t)st.st_size + 2; /* sees the end at once */
    if ((code = memory_grow(&text, capacity, 1, name, error)) != QUARRY_OK) goto done;
    for (;;) {
        if (capacity - used < 2) {
            if ((code = memory_grow(&text, capacity, 2, name, error)) != QUARRY_OK) goto done;
            capacity *= 2;
        }
        ssize_t got = file_call_read(fd, text + used, capacity - used - 1);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            code = error_set(error, QUARRY_ERROR_IO, "%s: cannot read: %s", name, strerror(errno));
            goto done;
        }
        if (got == 0) break;
        used += (size_t)got;
    }
    text[used] = 0;
    if (n_bytes) *n_bytes = used;
done:
    if (fd >= 0 && !is_stdin) close(fd);
    if (code == QUARRY_OK) return text;
    memory_free(text);
    return NULL;
}
