/* Asks a question about a text file, with nothing but the public header.
 *
 *     ask MODEL.gguf FILE "question"
 *
 * Build: cc ask.c $(pkg-config --cflags --libs quarry) -o ask */
#include <quarry/quarry.h>

#include <stdio.h>
#include <stdlib.h>

static char *read_file(const char *path, size_t *n_bytes)
{
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    *n_bytes = 0;
    if (!file) return NULL;
    for (size_t capacity = 1 << 16, n = 1; n; capacity *= 2) {
        char *larger = realloc(text, capacity);
        if (!larger) break;
        text = larger;
        n = fread(text + *n_bytes, 1, capacity - *n_bytes, file);
        *n_bytes += n;
    }
    if (ferror(file) || !feof(file)) {
        free(text);
        text = NULL;
    }
    fclose(file);
    return text;
}

static bool print_text(const char *text, size_t n_bytes, void *data)
{
    (void)data;
    return fwrite(text, 1, n_bytes, stdout) == n_bytes && fflush(stdout) == 0; /* false stops the answer */
}

int main(int argc, char **argv)
{
    quarry_error error = {0};
    quarry_model *model = NULL;
    quarry_session *session = NULL;
    quarry_prompt prompt = {0};
    quarry_sampling sampling;
    quarry_stats stats;
    int status = EXIT_FAILURE;

    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf FILE \"question\"\n", argv[0]);
        return status;
    }
    quarry_document document = {.name = argv[2]};
    char *text = read_file(argv[2], &document.n_bytes);
    if (!text) {
        perror(argv[2]);
        return status;
    }
    document.text = text;

    if (!(model = quarry_model_open(argv[1], NULL, &error))) goto done;
    if (!(session = quarry_session_open(model, NULL, &error))) goto done;
    if (quarry_prompt_build(model, &document, 1, NULL, argv[3], &prompt, &error)) goto done;
    if (quarry_session_read(session, prompt.context, prompt.n_context, NULL, &error)) goto done;   /* dense, indexed */
    if (quarry_session_feed(session, prompt.question, prompt.n_question, NULL, &error)) goto done; /* searches */

    quarry_sampling_default(&sampling);
    sampling.max_tokens = 256;
    if (quarry_session_generate(session, &sampling, print_text, NULL, NULL, &error)) goto done;

    quarry_session_get_stats(session, &stats);
    fprintf(stderr, "\n%lld tokens read in %.1f s, %lld generated in %.1f s\n", (long long)stats.n_read, stats.read_seconds,
            (long long)stats.n_generated, stats.generate_seconds);
    if (stats.kv_bytes_per_step > 0)
        fprintf(stderr, "keys and values read per token: %.2f MB of %.2f MB\n", stats.kv_bytes_per_step / 1e6, stats.kv_bytes_full / 1e6);
    status = EXIT_SUCCESS;
done:
    if (error.code) fprintf(stderr, "%s: %s\n", argv[0], error.message);
    quarry_prompt_free(&prompt);
    quarry_session_close(session);
    quarry_model_close(model);
    free(text);
    return status;
}
