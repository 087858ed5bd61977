#include <stdio.h>
#include <string.h>

#include "attn/attn.h"
#include "cli/cli.h"
#include "cli/memory.h"

typedef struct info_settings {
    cli_model_options model;
    cli_session_options session;
    bool json;
} info_settings;

static const cli_option info_table[] = {{"--attn", "[POLICY]", CLI_MAYBE, offsetof(info_settings, session.attn), "ivfpq",
                                         "reckon memory for this retrieval policy; without POLICY: list them and their options instead, "
                                         "which needs no model",
                                         0, 0},
                                        {"--json", NULL, CLI_SWITCH, offsetof(info_settings, json), NULL, "print one JSON object", 0, 0},
                                        {0}};

static const cli_group info_groups[] = {{"Options", info_table, 0},
                                        {"Model", cli_model_table, offsetof(info_settings, model)},
                                        {"Context to reckon memory for", cli_session_table + 1, offsetof(info_settings, session)},
                                        {0}};

/* ---- retrieval policies ---- */

/* One line of a policy's options, "budget=0.02 share of …": the parts, not NUL-terminated. */
typedef struct option_line {
    const char *name, *initial, *help;
    int n_name, n_initial, n_help;
} option_line;

/* Takes the next line off *options; false at the end. */
static bool next_option(const char **options, option_line *line)
{
    const char *p = *options;
    if (!*p) return false;
    const char *end = p + strcspn(p, "\n");
    line->name = p;
    line->n_name = (int)strcspn(p, "= \n");
    p += line->n_name;
    p += *p == '=';
    line->initial = p;
    line->n_initial = (int)strcspn(p, " \n");
    p += line->n_initial;
    p += strspn(p, " ");
    line->help = p;
    line->n_help = (int)(end - p);
    *options = end + (*end == '\n');
    return true;
}

static void print_options(const char *options)
{
    option_line line;
    while (next_option(&options, &line)) {
        char pair[64];
        snprintf(pair, sizeof pair, "%.*s=%.*s", line.n_name, line.name, line.n_initial, line.initial);
        cli_print("    %-20s %.*s\n", pair, line.n_help, line.help);
    }
}

static json_t *options_json(const char *options)
{
    json_t *list = json_array();
    option_line line;
    while (next_option(&options, &line))
        json_array_append_new(list, json_pack("{s:s%, s:s%, s:s%}", "name", line.name, (size_t)line.n_name, "default", line.initial,
                                              (size_t)line.n_initial, "help", line.help, (size_t)line.n_help));
    return list;
}

static int list_policies(bool as_json)
{
    if (as_json) {
        json_t *list = json_array();
        for (int i = 0; attn_policies[i]; i++) {
            const attn_policy_type *p = attn_policies[i];
            json_array_append_new(
                list, json_pack("{s:s, s:s, s:o}", "name", p->name, "summary", p->summary, "options", options_json(p->options)));
        }
        return json_print(json_pack("{s:o}", "policies", list));
    }
    cli_print("Retrieval policies for --attn NAME or NAME:OPTION=VALUE,... (the first is the default)\n");
    for (int i = 0; attn_policies[i]; i++) {
        cli_print("\n  %-22s %s\n", attn_policies[i]->name, attn_policies[i]->summary);
        print_options(attn_policies[i]->options);
    }
    return CLI_OK;
}

/* ---- model ---- */

/* refusal: why a context of that size would be refused, "" if not. */
static void print_model(const quarry_model_info *m, const session_memory *need, const char *refusal)
{
    char a[32];
    memory_available available;
    cli_print("name          %s\n", *m->name ? m->name : "(none)");
    cli_print("architecture  %s: %d layers, width %d, %d query heads and %d KV heads of %d\n", m->architecture, m->n_layer, m->n_embd,
              m->n_head, m->n_head_kv, m->head_dim);
    cli_print("parameters    %.4g million, mostly %s\n", (double)m->n_params / 1e6, m->quantization);
    cli_print("tokenizer     %s, %d tokens\n", m->tokenizer, m->n_vocab);
    cli_print("chat template %s\n", *m->chat_template ? m->chat_template : "none recognised (name one with --chat-template)");
    cli_print("context       %lld tokens in training\n", (long long)m->n_ctx_train);
    cli_print("kernels       %s on %d threads\n", m->kernels, m->n_threads);
    cli_print("\nMemory with a context of %lld tokens, estimated\n", (long long)need->n_tokens);
    for (int i = 0; i < MEMORY_PARTS; i++)
        if (need->bytes[i]) cli_print("  %-16s %10s\n", memory_part_names[i], cli_bytes((double)need->bytes[i], a));
    cli_print("  %-16s %10s\n", "together", cli_bytes((double)session_memory_sum(need), a));
    memory_available_get("", &available);
    if (available.bytes != UINT64_MAX)
        cli_print("  %-16s %10s beside the weights, as %s has it now\n", "to be had", cli_bytes((double)available.bytes, a),
                  available.limit);
    if (*refusal) cli_print("Does not fit: %s\n", refusal);
    cli_print("\nOn disk\n  %-16s %7.1f MB\n", "model", (double)need->model_file / 1e6);
    if (need->codebook_file) cli_print("  %-16s %7.1f MB\n", "codebooks", (double)need->codebook_file / 1e6);
    if (need->stored_kv)
        cli_print("  %-16s %7.1f MB, estimated: keys and values %.1f, index %.1f\n", "stored context",
                  (double)(need->stored_kv + need->stored_index) / 1e6, (double)need->stored_kv / 1e6, (double)need->stored_index / 1e6);
}

static int print_model_json(const quarry_model_info *m, const session_memory *need, const char *refusal)
{
    memory_available available;
    json_t *shape = json_pack("{s:i, s:i, s:i, s:i, s:i, s:i, s:I, s:I}", "layers", m->n_layer, "heads", m->n_head, "kv_heads",
                              m->n_head_kv, "head_dim", m->head_dim, "embedding", m->n_embd, "vocabulary", m->n_vocab, "context",
                              (json_int_t)m->n_ctx_train, "parameters", (json_int_t)m->n_params);
    json_t *memory = memory_json(need);
    json_object_set_new(memory, "context", json_integer((json_int_t)need->n_tokens));
    memory_available_get("", &available);
    if (available.bytes != UINT64_MAX) json_object_set_new(memory, "available", json_integer((json_int_t)available.bytes));
    json_object_set_new(memory, "fits", json_boolean(!*refusal));
    json_t *disk = json_pack("{s:I, s:I, s:I, s:I}", "model", (json_int_t)need->model_file, "codebooks", (json_int_t)need->codebook_file,
                             "stored_kv", (json_int_t)need->stored_kv, "stored_index", (json_int_t)need->stored_index);
    return json_print(json_pack("{s:o, s:s, s:s, s:s, s:s, s:s, s:i, s:o, s:o, s:o}", "name", json_text(m->name, strlen(m->name)),
                                "architecture", m->architecture, "quantization", m->quantization, "tokenizer", m->tokenizer,
                                "chat_template", m->chat_template, "kernels", m->kernels, "threads", m->n_threads, "shape", shape, "memory",
                                memory, "disk", disk));
}

static int info_run(const void *settings, const cli_list *arguments)
{
    const info_settings *s = settings;
    quarry_model *model = NULL;
    quarry_model_info info;
    session_memory need;
    quarry_error error;
    cli_model_options options = s->model;
    if (!*s->session.attn) return list_policies(s->json);
    if (arguments->n > 1 || (arguments->n && options.path)) return cli_fail_usage(&command_info, "one model expected");
    if (arguments->n) options.path = arguments->items[0];
    int code = cli_model_open(&model, &options, NULL, NULL);
    if (code) return code;
    const quarry_session_params params = cli_session_params(&s->session);
    quarry_session *session = NULL;
    quarry_error refusal = {0};
    quarry_model_get_info(model, &info);
    if (session_memory_estimate(model, &params, 0, &need, &error) || !(session = quarry_session_open(model, &params, &error)))
        code = cli_fail_error(&error);
    else if (session_memory_check(session, need.n_tokens, &refusal) != QUARRY_OK && refusal.code != QUARRY_ERROR_MEMORY)
        code = cli_fail_error(&refusal);
    else if (s->json)
        code = print_model_json(&info, &need, refusal.message);
    else
        print_model(&info, &need, refusal.message);
    quarry_session_close(session);
    quarry_model_close(model);
    return code;
}

const cli_command command_info = {
    "info",   "[options] [MODEL]", "show a model, the memory it needs, and the chosen kernels", NULL, info_groups, sizeof(info_settings),
    info_run,
};
