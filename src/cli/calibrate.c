#include <nettle/sha2.h>
#include <string.h>

#include "cli/cli.h"
#include "gen/gen.h"

typedef struct calibrate_settings {
    cli_model_options model;
    cli_output_options output;
    cli_list files;
    const char *out, *type;
    int64_t n_tokens, n_random, n_centroids, n_iterations, distance, seed;
    double exponent, shrink;
    bool exact_rope;
} calibrate_settings;

static const cli_option calibrate_table[] = {
    {"-f, --file", "FILE", CLI_LIST, offsetof(calibrate_settings, files), NULL,
     "calibration text; may be repeated, each gives an equal share", 0, 0},
    {"-o, --out", "FILE", CLI_TEXT, offsetof(calibrate_settings, out), NULL, "the codebook to make; FILE.partial keeps what is finished", 0,
     0},
    {"--tokens", "N", CLI_INT, offsetof(calibrate_settings, n_tokens), "8192", "tokens of the texts, at most (paper: 65536); 0: no text", 0,
     1e7},
    {"--random", "N", CLI_INT, offsetof(calibrate_settings, n_random), "2048", "tokens of random UUIDs (paper: 16384)", 0, 1e7},
    {"--centroids", "N", CLI_INT, offsetof(calibrate_settings, n_centroids), "1024", "centroids per layer and KV head (paper: 4096)", 1,
     65536},
    {"--iterations", "N", CLI_INT, offsetof(calibrate_settings, n_iterations), "25", "most iterations of k-means (paper: 300)", 0, 100000},
    {"--distance", "N", CLI_INT, offsetof(calibrate_settings, distance), "2048", "distance at which far tokens are scored", 0, 1e7},
    {"--exact-rope", NULL, CLI_SWITCH, offsetof(calibrate_settings, exact_rope), NULL, "code keys after RoPE (an ablation)", 0, 0},
    {"--exponent", "X", CLI_NUMBER, offsetof(calibrate_settings, exponent), "1", "of the metric of the queries; 0: none, plain k-means", 0,
     2},
    {"--shrink", "X", CLI_NUMBER, offsetof(calibrate_settings, shrink), "1e-6",
     "added to its diagonal, in root mean squares of its entries", 0, 1e6},
    {"--type", "TYPE", CLI_TEXT, offsetof(calibrate_settings, type), "f16", "of what is stored: f16 or int8", 0, 0},
    {"--seed", "N", CLI_INT, offsetof(calibrate_settings, seed), "1", "of the UUIDs and of k-means", 0, 1e15},
    {0}};

static const cli_group calibrate_groups[] = {{"Model", cli_model_table, offsetof(calibrate_settings, model)},
                                             {"Calibration", calibrate_table, 0},
                                             {"Output", cli_output_table + 1, offsetof(calibrate_settings, output)},
                                             {0}};

/* The first `most` tokens of the texts, an equal share of each; what a shorter one lacks falls to those after it. memory_free. */
static int read_texts(const quarry_model *model, const cli_list *files, int64_t most, int32_t **tokens, int64_t *n_tokens)
{
    *n_tokens = 0;
    for (int i = 0; i < files->n; i++) {
        char *text = NULL;
        size_t n_bytes = 0;
        quarry_error error;
        int32_t *found = NULL;
        int code = cli_read_file(&text, &n_bytes, files->items[i]);
        int64_t n = code ? 0 : quarry_tokenize(model, text, n_bytes, false, &found, &error);
        const int64_t share = (most - *n_tokens) / (files->n - i);
        memory_free(text);
        if (n < 0) code = cli_fail_error(&error);
        n = n < share ? n : share;
        if (!code && memory_grow(tokens, (size_t)(*n_tokens + n + 1), sizeof **tokens, "calibration text", &error) != QUARRY_OK)
            code = cli_fail_error(&error);
        if (!code && n) memcpy(*tokens + *n_tokens, found, (size_t)n * sizeof *found);
        quarry_free(found);
        if (code) return code;
        *n_tokens += n;
    }
    return CLI_OK;
}

static uint64_t digest(const void *bytes, size_t n)
{
    struct sha256_ctx sha;
    uint8_t out[8];
    uint64_t value = 0;
    sha256_init(&sha);
    sha256_update(&sha, n, bytes);
    sha256_digest(&sha, sizeof out, out);
    for (int i = 0; i < 8; i++) value = value << 8 | out[i];
    return value;
}

static int make(quarry_model *model, const calibrate_settings *s, const int32_t *tokens, int64_t n)
{
    codebook_header header = {
        .text_digest = digest(tokens, (size_t)n * sizeof *tokens),
        .seed = (uint64_t)s->seed,
        .n_random = s->n_random,
        .n_centroids = (int32_t)s->n_centroids,
        .iterations = (int32_t)s->n_iterations,
        .distance = (int32_t)s->distance,
        .exact_rope = s->exact_rope,
        .type = strcmp(s->type, "int8") ? CODEBOOK_F16 : CODEBOOK_INT8,
        .exponent = (float)s->exponent,
        .shrink = (float)s->shrink,
    };
    quarry_error error;
    cli_progress reading, clustering;
    calibrate_result result;
    const double start = cli_seconds();
    cli_work_begin();
    quarry_watch heads = cli_progress_start(&clustering, "clustering", s->output.quiet);
    clustering.unit = "heads";
    quarry_watch watch = cli_progress_start(&reading, "reading", s->output.quiet);
    const quarry_code code = calibrate(model, &header, tokens, n, s->out, &watch, &heads, &result, &error);
    cli_progress_end(&reading);
    cli_progress_end(&clustering);
    cli_work_end();
    if (code != QUARRY_OK) return cli_fail_error(&error);
    cli_print(
        "%s: %d %s centroids for %d layers of %d KV heads, from %lld tokens of text and %lld of UUIDs, %s, metric to the power of %g; ",
        s->out, header.n_centroids, s->type, header.n_layer, header.n_head_kv, (long long)header.n_text, (long long)header.n_random,
        header.exact_rope ? "keys after RoPE" : "keys before RoPE", (double)header.exponent);
    cli_print("%.1f iterations on average, %d of %d heads the %d allowed; %d heads were there, %.0f s\n", result.average, result.capped,
              header.n_layer * header.n_head_kv, header.iterations, result.resumed, cli_seconds() - start);
    return CLI_OK;
}

static int calibrate_run(const void *settings, const cli_list *arguments)
{
    const calibrate_settings *s = settings;
    if (arguments->n) return cli_fail_usage(&command_calibrate, "'%s' is no option; texts are given with -f", arguments->items[0]);
    if (!s->out || (!s->files.n && s->n_tokens)) return cli_fail_usage(&command_calibrate, "-f FILE and -o FILE are needed");
    if (strcmp(s->type, "f16") && strcmp(s->type, "int8"))
        return cli_fail_usage(&command_calibrate, "--type is f16 or int8, not '%s'", s->type);
    quarry_model *model = NULL;
    int32_t *tokens = NULL;
    int64_t n = 0;
    int code = cli_model_open(&model, &s->model, &s->output, NULL);
    if (!code) code = read_texts(model, &s->files, s->n_tokens, &tokens, &n);
    if (!code) code = make(model, s, tokens, n);
    memory_free(tokens);
    quarry_model_close(model);
    return code;
}

const cli_command command_calibrate = {
    "calibrate",
    "[options] -f FILE -o FILE",
    "make the codebook of the policy a2ats for a model",
    "Interrupted, it keeps the layers and heads that are finished and takes them up when called again with the same options; reading the "
    "text is done again.",
    calibrate_groups,
    sizeof(calibrate_settings),
    calibrate_run,
};
