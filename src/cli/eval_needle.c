#include <stdio.h>

#include "cli/eval_common.h"

typedef struct needle_settings {
    eval_settings eval;
    const char *depths;
    int64_t count, needles, positions, n_answer, seed;
    bool cite;
} needle_settings;

static const cli_option needle_table[] = {
    {"-d, --depths", "N,...", CLI_TEXT, offsetof(needle_settings, depths), "2000,4000,7000", "tokens of each haystack", 0, 0},
    {"--count", "N", CLI_INT, offsetof(needle_settings, count), "3", "haystacks per depth and text", 1, 10000},
    {"--needles", "N", CLI_INT, offsetof(needle_settings, needles), "1", "needles in a haystack, each asked for (harder, and cheaper)", 1,
     NEEDLE_MAX},
    {"--positions", "N", CLI_INT, offsetof(needle_settings, positions), "0",
     "needles lie in the middle of each N-th of the text in turn (a multiple of --needles), --count times per depth and text; 0: anywhere",
     0, NEEDLE_POSITIONS},
    {"-n, --predict", "N", CLI_INT, offsetof(needle_settings, n_answer), "32", "most tokens of an answer", 1, 4096},
    {"-s, --seed", "N", CLI_INT, offsetof(needle_settings, seed), "1", "seed of places, keys and numbers", 0, 9e18},
    {"--cite", NULL, CLI_SWITCH, offsetof(needle_settings, cite), NULL,
     "count the right answers whose first citation (quarry ask --cite) holds the needle", 0, 0},
    {"--journal", "FILE", CLI_TEXT, offsetof(needle_settings, eval.journal), NULL,
     "keep finished haystacks in FILE; the same command goes on from there when it was stopped", 0, 0},
    {0}};

static const cli_group needle_groups[] = {{"Measurement", needle_table, 0},
                                          {"Texts and policies", eval_options_table, offsetof(needle_settings, eval.input)},
                                          {"Reading", eval_way_table, offsetof(needle_settings, eval.input)},
                                          {"Model", cli_model_table, offsetof(needle_settings, eval.model)},
                                          {"Output", cli_output_table, offsetof(needle_settings, eval.output)},
                                          {0}};

static void on_answer(const needle_answer *a, void *data)
{
    (void)data;
    fprintf(stderr, "%s, %lld tokens, %s is %s at %.2f: %s %s: %s\n", a->text_name, (long long)a->n_tokens, a->needle->key,
            a->needle->number, (double)a->needle->at / (double)a->n_tokens, a->attn, a->correct ? "right" : "wrong", a->answer);
}

static void needle_print(const eval_input *in, const needle_result *results)
{
    const int width = eval_attn_width(&in->policies);
    eval_print_model(in);
    cli_print("%lld needles asked for, %s answers %lld; kept: of these, those a policy answers; KLD along its answers\n\n",
              (long long)results[0].asked, results[0].attn, (long long)results[0].full_correct);
    cli_print("%-*s  %9s  %22s  %22s  %18s  %6s  %6s\n", width, "policy", "kept", "share (95 % interval)", "net loss (interval)",
              "mean KLD ± s.e.", "rows", "bytes");
    for (int i = 0; i <= in->n_attn; i++) {
        const needle_result *r = &results[i];
        const double share = r->full_correct ? 100.0 * (double)r->kept / (double)r->full_correct : 0;
        char kept[48];
        snprintf(kept, sizeof kept, "%lld/%lld", (long long)r->kept, (long long)r->full_correct);
        cli_print("%-*s  %9s  %5.1f %% (%5.1f to %5.1f)  %5.1f %% (%5.1f to %5.1f)  %8.5f ± %7.5f  %4.1f %%  %4.1f %%\n", width, r->attn,
                  kept, share, 100 * r->kept_low, 100 * r->kept_high, 100 * r->loss, 100 * r->loss_low, 100 * r->loss_high, r->kld.mean,
                  r->kld.standard_error, 100 * r->reading.rows_share, 100 * r->reading.bytes_share);
    }
}

static void needle_print_citations(const eval_input *in, const needle_result *results)
{
    const int width = eval_attn_width(&in->policies);
    cli_print("\nof the right answers, those whose first citation holds the needle\n\n");
    cli_print("%-*s  %9s  %22s\n", width, "policy", "cited", "share (95 % interval)");
    for (int i = 0; i <= in->n_attn; i++) {
        const needle_result *r = &results[i];
        char cited[48];
        snprintf(cited, sizeof cited, "%lld/%lld", (long long)r->cited, (long long)r->correct);
        cli_print("%-*s  %9s  %5.1f %% (%5.1f to %5.1f)\n", width, r->attn, cited,
                  r->correct ? 100.0 * (double)r->cited / (double)r->correct : 0, 100 * r->cited_low, 100 * r->cited_high);
    }
}

/* Of one policy: a line for each position, a column for each depth. */
static void needle_print_grid(const char *attn, const needle_cell *cells, int n_depths, int n_positions)
{
    cli_print("\n%-*s", 10, "position");
    for (int d = 0; d < n_depths; d++) cli_print("  %9lld", (long long)cells[d * n_positions].length);
    cli_print("  %s: answered of asked\n", attn);
    for (int p = 0; p < n_positions; p++) {
        cli_print("%8.1f %%", 100 * cells[p].depth);
        for (int d = 0; d < n_depths; d++) {
            const needle_cell *c = &cells[d * n_positions + p];
            char text[48];
            snprintf(text, sizeof text, "%lld/%lld", (long long)c->correct, (long long)c->asked);
            cli_print("  %9s", text);
        }
        cli_print("\n");
    }
}

static json_t *json_grid(const needle_cell *cells, int64_t n)
{
    json_t *list = json_array();
    for (int64_t i = 0; i < n; i++)
        json_array_append_new(list, json_pack("{s:I, s:f, s:I, s:I}", "length", (json_int_t)cells[i].length, "depth", cells[i].depth,
                                              "asked", (json_int_t)cells[i].asked, "correct", (json_int_t)cells[i].correct));
    return list;
}

static int needle_print_json(eval_input *in, bool cite, const needle_result *results, const needle_cell *cells, int64_t n_cells)
{
    json_t *list = json_array();
    for (int i = 0; i <= in->n_attn; i++) {
        const needle_result *r = &results[i];
        json_t *item =
            json_pack("{s:s, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:o, s:o}", "attn", r->attn, "asked", (json_int_t)r->asked,
                      "full_correct", (json_int_t)r->full_correct, "correct", (json_int_t)r->correct, "kept", (json_int_t)r->kept,
                      "kept_low", r->kept_low, "kept_high", r->kept_high, "loss", r->loss, "loss_low", r->loss_low, "loss_high",
                      r->loss_high, "kld", eval_json_summary(&r->kld), "reading", eval_json_reading(&r->reading));
        if (cite)
            json_object_update_new(
                item, json_pack("{s:I, s:f, s:f}", "cited", (json_int_t)r->cited, "cited_low", r->cited_low, "cited_high", r->cited_high));
        if (n_cells > 0) json_object_set_new(item, "grid", json_grid(cells + i * n_cells, n_cells));
        json_array_append_new(list, item);
    }
    return eval_print_json(in, list);
}

static json_t *json_parameters(const eval_input *in, const needle_settings *s)
{
    json_t *parameters =
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:b, s:o}", "depths", s->depths, "count", (json_int_t)s->count, "needles",
                  (json_int_t)s->needles, "positions", (json_int_t)s->positions, "predict", (json_int_t)s->n_answer, "batch_size",
                  (json_int_t)s->eval.input.n_batch, "cite", s->cite, "attn", eval_json_policies(in));
    eval_json_way(parameters, &s->eval.input);
    return parameters;
}

static void needle_print_all(const eval_input *in, bool cite, const needle_result *results, const needle_cell *cells, int n_depths,
                             int n_positions)
{
    needle_print(in, results);
    for (int i = 0; n_positions > 0 && i <= in->n_attn; i++)
        needle_print_grid(results[i].attn, cells + (int64_t)i * n_depths * n_positions, n_depths, n_positions);
    if (cite) needle_print_citations(in, results);
}

static int measure_print(eval_input *in, const needle_settings *s, const needle_params *params)
{
    cli_progress progress;
    quarry_error error;
    const int64_t n_cells = (int64_t)params->n_depths * params->positions; /* of one policy */
    needle_cell *cells = NULL;
    needle_result *results = memory_zero((size_t)in->n_attn + 1, sizeof *results, "results", &error);
    if (!results || !(cells = memory_zero((size_t)in->n_attn + 1, (size_t)n_cells * sizeof *cells, "results", &error))) {
        memory_free(results);
        return cli_fail_error(&error);
    }
    const needle_answer_fn tell = s->eval.output.verbose ? on_answer : NULL;
    const quarry_watch watch = eval_measure_begin(&progress, &s->eval);
    int code = eval_measure_end(&progress, needle_measure(in->model, params, &watch, tell, NULL, results, cells, &error), &error);
    if (!code && s->eval.output.json)
        code = needle_print_json(in, s->cite, results, cells, n_cells);
    else if (!code)
        needle_print_all(in, s->cite, results, cells, params->n_depths, params->positions);
    memory_free(results);
    memory_free(cells);
    return code;
}

static int64_t longest(const int64_t *depths, int64_t n)
{
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) most = depths[i] > most ? depths[i] : most;
    return most;
}

static int needle_run(const void *settings, const cli_list *arguments)
{
    const needle_settings *s = settings;
    eval_input in = {0};
    quarry_error error;
    int64_t *depths = NULL;
    const int64_t n_depths = list_parse_numbers(s->depths, "--depths", 64, 1000000000, &depths, &error);
    if (n_depths < 0) return cli_fail_usage(&command_eval_needle, "%s", error.message);
    int code = eval_input_open(&in, &s->eval, arguments, &command_eval_needle);
    if (!code) code = eval_input_record(&in, &command_eval_needle, &s->eval, arguments, s->seed, json_parameters(&in, s));
    const eval_way way = code ? (eval_way){0} : eval_input_way(&in, &s->eval.input, longest(depths, n_depths));
    const needle_params params = {.attn = in.attn,
                                  .n_attn = in.n_attn,
                                  .texts = in.texts,
                                  .n_texts = in.n_texts,
                                  .depths = depths,
                                  .n_depths = (int)n_depths,
                                  .count = (int)s->count,
                                  .needles = (int)s->needles,
                                  .positions = (int)s->positions,
                                  .n_answer = (int)s->n_answer,
                                  .cite = s->cite,
                                  .seed = (uint64_t)s->seed,
                                  .way = way,
                                  .journal = in.journal};
    if (!code) code = measure_print(&in, s, &params);
    memory_free(depths);
    eval_input_close(&in);
    return code;
}

const cli_command command_eval_needle = {
    "eval needle",
    "[options] -f FILE...",
    "measure whether a policy still finds a sentence in a long text",
    "Puts a sentence with a number into a text, reads it with full attention, and asks for the number under each policy through the chat "
    "template. -v prints every answer.",
    needle_groups,
    sizeof(needle_settings),
    needle_run,
};
