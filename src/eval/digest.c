#include <errno.h>
#include <fcntl.h>
#include <nettle/sha2.h>
#include <string.h>
#include <unistd.h>

#include "eval/eval.h"

static void digest_end(struct sha256_ctx *sha, char out[DIGEST_CHARS])
{
    uint8_t bytes[SHA256_DIGEST_SIZE];
    sha256_digest(sha, sizeof bytes, bytes);
    for (size_t i = 0; i < sizeof bytes; i++) {
        out[2 * i] = "0123456789abcdef"[bytes[i] >> 4];
        out[2 * i + 1] = "0123456789abcdef"[bytes[i] & 15];
    }
    out[2 * sizeof bytes] = '\0';
}

void digest_bytes(const void *data, size_t n, char out[DIGEST_CHARS])
{
    struct sha256_ctx sha;
    sha256_init(&sha);
    sha256_update(&sha, n, data);
    digest_end(&sha, out);
}

quarry_code digest_file(const char *path, char out[DIGEST_CHARS], quarry_error *error)
{
    enum { PIECE = 1 << 20 };
    struct sha256_ctx sha;
    quarry_code code = QUARRY_OK;
    ssize_t n;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return error_set(error, QUARRY_ERROR_IO, "%s: %s", path, strerror(errno));
    uint8_t *piece = memory_alloc(PIECE, 1, "file", error);
    if (!piece) code = QUARRY_ERROR_MEMORY;
    sha256_init(&sha);
    while (code == QUARRY_OK && (n = read(fd, piece, PIECE)) != 0) {
        if (n > 0)
            sha256_update(&sha, (size_t)n, piece);
        else if (errno != EINTR)
            code = error_set(error, QUARRY_ERROR_IO, "%s: %s", path, strerror(errno));
    }
    close(fd);
    memory_free(piece);
    if (code == QUARRY_OK) digest_end(&sha, out);
    return code;
}
