/* quarry context …: the contexts that were read and are kept. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "cli/documents.h"
#include "cli/json.h"
#include "gen/gen.h"

/* ---- the store, and contexts by their number ---- */

typedef struct context_settings {
    cli_store_options store;
    bool json, all;
} context_settings;

static const cli_option context_json_table[] = {
    {"--json", NULL, CLI_SWITCH, offsetof(context_settings, json), NULL, "print one JSON object", 0, 0}, {0}};

static int store_open(quarry_store **store, const cli_store_options *options)
{
    const quarry_store_params params = cli_store_params(options, NULL);
    quarry_error error;
    *store = quarry_store_open(&params, &error);
    return *store ? CLI_OK : cli_fail_error(&error);
}

/* The context that an argument names; NULL, after saying so, if there is none. */
static const catalogue_context *find(const catalogue_contexts *list, const char *argument)
{
    char *end;
    const long long id = strtoll(argument, &end, 10);
    for (int64_t i = 0; i < list->n && *argument && !*end; i++)
        if (list->items[i].id == id) return &list->items[i];
    cli_fail("no stored context has the number '%s'; 'quarry context list' shows them", argument);
    return NULL;
}

/* Opens the store and lists it. */
static int store_list(quarry_store **store, catalogue_contexts *list, const cli_store_options *options)
{
    quarry_error error;
    int code = store_open(store, options);
    if (!code && catalogue_list(store_catalogue(*store), list, &error) != QUARRY_OK) code = cli_fail_error(&error);
    return code;
}

static void time_text(int64_t microseconds, char text[32])
{
    const time_t seconds = (time_t)(microseconds / 1000000);
    struct tm tm;
    strftime(text, 32, "%Y-%m-%d %H:%M", localtime_r(&seconds, &tm));
}

/* ---- list ---- */

static json_t *context_json(const catalogue_context *c)
{
    char key[STORE_KEY_CHARS];
    store_key_text(&c->end, key);
    json_t *names = json_array();
    for (const char *name = c->names; names && *name;) {
        const size_t n = strcspn(name, "\n");
        json_array_append_new(names, json_text(name, n));
        name += n + (name[n] != 0);
    }
    return json_pack("{s:I, s:o, s:o, s:I, s:I, s:I, s:I, s:s, s:s, s:I, s:I}", "id", (json_int_t)c->id, "documents", names, "model",
                     json_text(c->model, strlen(c->model)), "tokens", (json_int_t)c->n_tokens, "pieces", (json_int_t)c->n_pieces, "bytes",
                     (json_int_t)c->n_bytes, "bytes_alone", (json_int_t)c->n_bytes_alone, "index", c->params, "end", key, "created",
                     (json_int_t)(c->created / 1000000), "last_used", (json_int_t)(c->last_used / 1000000));
}

static int list_print(const catalogue_contexts *list, const catalogue_totals *totals, const char *folder)
{
    for (int64_t i = 0; i < list->n; i++) {
        const catalogue_context *c = &list->items[i];
        char used[32];
        if (i == 0) cli_print("%6s  %9s  %9s  %-16s  %s\n", "number", "tokens", "MB", "last used", "documents (model)");
        time_text(c->last_used, used);
        cli_print("%6lld  %9lld  %9.1f  %-16s  ", (long long)c->id, (long long)c->n_tokens, (double)c->n_bytes / 1e6, used);
        for (const char *name = c->names; *name;) {
            const size_t n = strcspn(name, "\n");
            cli_print("%.*s%s", (int)n, name, name[n] && name[n + 1] ? ", " : "");
            name += n + (name[n] != 0);
        }
        cli_print(" (%s)\n", c->model);
    }
    cli_print("%s%lld contexts in %lld files, %.1f MB, in %s\n", list->n ? "\n" : "", (long long)totals->n_contexts,
              (long long)totals->n_pieces, (double)totals->n_bytes / 1e6, folder);
    return cli_flush() ? CLI_OK : CLI_PIPE_CLOSED;
}

static int list_json(const catalogue_contexts *list, const catalogue_totals *totals, const char *folder)
{
    json_t *items = json_array();
    for (int64_t i = 0; items && i < list->n; i++) json_array_append_new(items, context_json(&list->items[i]));
    return json_print(json_pack("{s:o, s:I, s:I, s:o}", "folder", json_text(folder, strlen(folder)), "pieces", (json_int_t)totals->n_pieces,
                                "bytes", (json_int_t)totals->n_bytes, "contexts", items));
}

static int list_run(const void *settings, const cli_list *arguments)
{
    const context_settings *s = settings;
    quarry_store *store = NULL;
    catalogue_contexts list = {0};
    catalogue_totals totals;
    quarry_error error;
    if (arguments->n) return cli_fail_usage(&command_context_list, "no arguments expected, got '%s'", arguments->items[0]);
    int code = store_list(&store, &list, &s->store);
    if (!code && catalogue_get_totals(store_catalogue(store), &totals, &error) != QUARRY_OK) code = cli_fail_error(&error);
    if (!code) code = (s->json ? list_json : list_print)(&list, &totals, catalogue_folder(store_catalogue(store)));
    catalogue_contexts_free(&list);
    quarry_store_close(store);
    return code;
}

/* ---- rm ---- */

static int rm_run(const void *settings, const cli_list *arguments)
{
    const context_settings *s = settings;
    quarry_store *store = NULL;
    catalogue_contexts list = {0};
    catalogue_removed all = {0};
    quarry_error error;
    if (!arguments->n == !s->all)
        return cli_fail_usage(&command_context_rm, "name the numbers of contexts ('quarry context list' shows them), or --all");
    int code = store_list(&store, &list, &s->store);
    for (int i = 0; i < arguments->n && !code; i++) /* all of them first: nothing is removed if one is mistyped */
        if (!find(&list, arguments->items[i])) code = CLI_FAILED;
    for (int64_t i = 0; !code && i < (s->all ? list.n : arguments->n); i++) {
        const catalogue_context *c = s->all ? &list.items[i] : find(&list, arguments->items[i]);
        catalogue_removed removed = {0};
        if (catalogue_remove(store_catalogue(store), c->id, &removed, &error) != QUARRY_OK) code = cli_fail_error(&error);
        all.n_contexts += removed.n_contexts;
        all.n_pieces += removed.n_pieces;
        all.n_bytes += removed.n_bytes;
    }
    if (!code)
        cli_print("removed %lld contexts, %lld files, %.1f MB\n", (long long)all.n_contexts, (long long)all.n_pieces,
                  (double)all.n_bytes / 1e6);
    catalogue_contexts_free(&list);
    quarry_store_close(store);
    return code;
}

/* ---- verify ---- */

static void verify_report(const char *line, void *data)
{
    (void)data;
    cli_fail("%s", line);
}

/* Tests all checksums of the pieces of one context. */
static int verify_context(catalogue *c, const catalogue_context *context, thread_pool *pool, arena *scratch)
{
    catalogue_chain chain;
    quarry_error error;
    int code = catalogue_chain_of(c, &context->end, &chain, &error) == QUARRY_OK ? CLI_OK : cli_fail_error(&error);
    for (int64_t i = 0; i < chain.n && !code; i++) {
        char *path = catalogue_piece_path(c, &chain.pieces[i].key, &error);
        piece_file *piece = path ? piece_open(path, &error) : NULL;
        if (!piece || piece_verify(piece, pool, scratch, &error) != QUARRY_OK) code = cli_fail_error(&error);
        piece_close(piece);
        memory_free(path);
    }
    if (!code)
        cli_print("%lld: %lld tokens in %lld files, all checksums are right\n", (long long)context->id, (long long)context->n_tokens,
                  (long long)chain.n);
    catalogue_chain_free(&chain);
    return code;
}

static int verify_run(const void *settings, const cli_list *arguments)
{
    const context_settings *s = settings;
    quarry_store *store = NULL;
    catalogue_contexts list = {0};
    quarry_error error;
    int64_t n_faults = 0;
    thread_pool *pool = NULL;
    arena *scratch = NULL;
    int code = store_list(&store, &list, &s->store), n_threads = cpu_count();
    if (!code && (!(pool = thread_pool_create(n_threads, &error)) ||
                  !(scratch = memory_zero((size_t)n_threads, sizeof *scratch, "verification", &error)) ||
                  catalogue_verify(store_catalogue(store), verify_report, NULL, &n_faults, &error) != QUARRY_OK))
        code = cli_fail_error(&error);
    int failed = n_faults ? CLI_FAILED : CLI_OK;
    for (int64_t i = 0; !code && i < (arguments->n ? arguments->n : list.n); i++) {
        const catalogue_context *c = arguments->n ? find(&list, arguments->items[i]) : &list.items[i];
        if (!c || verify_context(store_catalogue(store), c, pool, scratch)) failed = CLI_FAILED;
    }
    for (int i = 0; scratch && i < n_threads; i++) arena_free(&scratch[i]);
    memory_free(scratch);
    thread_pool_destroy(pool);
    catalogue_contexts_free(&list);
    quarry_store_close(store);
    return code ? code : failed;
}

/* ---- info ---- */

static int info_print(catalogue *c, const catalogue_context *context)
{
    catalogue_chain chain;
    quarry_error error;
    char created[32], used[32];
    if (catalogue_chain_of(c, &context->end, &chain, &error) != QUARRY_OK) return cli_fail_error(&error);
    time_text(context->created, created);
    time_text(context->last_used, used);
    cli_print("number     %lld\nmodel      %s (fingerprint %016llx)\ntokens     %lld\nindex      %s\ncreated    %s\nlast used  %s\nsize    "
              "   %.1f MB, %.1f of them shared with no other\n",
              (long long)context->id, context->model, (unsigned long long)context->fingerprint, (long long)context->n_tokens,
              context->params, created, used, (double)context->n_bytes / 1e6, (double)context->n_bytes_alone / 1e6);
    for (int64_t i = 0; i < chain.n; i++) {
        char *path = catalogue_piece_path(c, &chain.pieces[i].key, &error);
        piece_file *piece = path ? piece_open(path, &error) : NULL;
        cli_print("tokens %lld to %lld  %.1f MB  %s\n", (long long)chain.pieces[i].first,
                  (long long)(chain.pieces[i].first + chain.pieces[i].n_tokens), (double)chain.pieces[i].n_bytes / 1e6, path ? path : "");
        if (!piece) cli_fail_error(&error);
        for (const char *line = piece ? piece_about(piece) : ""; *line;) {
            const size_t n = strcspn(line, "\n");
            cli_print("    %.*s\n", (int)n, line);
            line += n + (line[n] != 0);
        }
        piece_close(piece);
        memory_free(path);
    }
    catalogue_chain_free(&chain);
    return CLI_OK;
}

static int info_run(const void *settings, const cli_list *arguments)
{
    const context_settings *s = settings;
    quarry_store *store = NULL;
    catalogue_contexts list = {0};
    if (arguments->n != 1)
        return cli_fail_usage(&command_context_info, "one context expected: its number ('quarry context list' shows them)");
    int code = store_list(&store, &list, &s->store);
    const catalogue_context *c = code ? NULL : find(&list, arguments->items[0]);
    if (!code) code = !c ? CLI_FAILED : s->json ? json_print(context_json(c)) : info_print(store_catalogue(store), c);
    catalogue_contexts_free(&list);
    quarry_store_close(store);
    return code;
}

/* ---- export ---- */

static int export_run(const void *settings, const cli_list *arguments)
{
    const context_settings *s = settings;
    quarry_store *store = NULL, *target = NULL;
    catalogue_contexts list = {0};
    quarry_error error;
    if (arguments->n != 2) return cli_fail_usage(&command_context_export, "the number of a context and a folder expected");
    int code = store_list(&store, &list, &s->store);
    const catalogue_context *c = code ? NULL : find(&list, arguments->items[0]);
    if (!code && !c) code = CLI_FAILED;
    if (!code) code = store_open(&target, &(cli_store_options){.folder = arguments->items[1], .max_gb = s->store.max_gb});
    if (!code && store_copy(store, target, c, &error) != QUARRY_OK) code = cli_fail_error(&error);
    if (!code)
        cli_print("%lld tokens, %.1f MB, are now in %s: quarry ask --store %s\n", (long long)c->n_tokens, (double)c->n_bytes / 1e6,
                  arguments->items[1], arguments->items[1]);
    catalogue_contexts_free(&list);
    quarry_store_close(target);
    quarry_store_close(store);
    return code;
}

/* ---- create ---- */

typedef struct create_settings {
    cli_model_options model;
    cli_session_options session;
    cli_store_options store;
    cli_output_options output;
    cli_list documents;
    const char *system;
} create_settings;

static const cli_option create_table[] = {{"--doc", "FILE", CLI_LIST, offsetof(create_settings, documents), NULL,
                                           "document to read, plain text or Markdown; -: standard input; may be repeated", 0, 0},
                                          {"-sys, --system-prompt", "TEXT", CLI_TEXT, offsetof(create_settings, system), NULL,
                                           "instructions for the model, ahead of the documents; the same must be given with the question",
                                           0, 0},
                                          CLI_KV_RAM(offsetof(create_settings, session)),
                                          {0}};

static int create_run(const void *settings, const cli_list *arguments)
{
    const create_settings *s = settings;
    quarry_document *documents = NULL;
    quarry_model *model = NULL;
    quarry_session *session = NULL;
    quarry_store *store = NULL;
    quarry_prompt prompt = {0};
    quarry_stored stored;
    quarry_error error;
    char *names = NULL;
    if (arguments->n || !s->documents.n) return cli_fail_usage(&command_context_create, "name documents with --doc FILE, and nothing else");
    int code = cli_documents_read(&documents, &s->documents, &command_context_create);
    if (!code) code = store_open(&store, &s->store);
    if (!code) code = cli_model_open(&model, &s->model, &s->output, store);
    if (!code && quarry_prompt_build(model, documents, s->documents.n, s->system, "?", &prompt, &error)) code = cli_fail_error(&error);
    if (!code) code = cli_session_open(&session, model, &s->session);
    if (!code && !session_can_save(session))
        code = cli_fail("--attn %s: what is read under this policy is not kept; create the context under ivfpq", s->session.attn);
    if (!code && !(names = cli_documents_names(documents, s->documents.n))) code = cli_fail("out of memory");
    if (!code) {
        cli_progress reading;
        quarry_watch watch = cli_progress_start(&reading, "reading", s->output.quiet);
        cli_work_begin();
        if (quarry_session_read_stored(session, store, prompt.context, prompt.n_context, prompt.ends, s->documents.n, names, &watch,
                                       &stored, &error))
            code = cli_fail_error(&error);
        cli_progress_end(&reading);
        cli_work_end();
        if (!code && cli_interrupted()) code = cli_fail_interrupted();
    }
    if (!code && *stored.note) fprintf(stderr, "quarry: %s\n", stored.note);
    if (!code && stored.n_taken + stored.n_kept < prompt.n_context)
        code = *stored.note ? CLI_FAILED
                            : cli_fail("%lld of %lld tokens are kept: texts of less than 64 tokens are read again as quickly",
                                       (long long)(stored.n_taken + stored.n_kept), (long long)prompt.n_context);
    if (!code && !s->output.quiet)
        cli_print("%lld tokens are kept: %lld were, %lld are new (%.1f MB)\n", (long long)prompt.n_context, (long long)stored.n_taken,
                  (long long)stored.n_kept, (double)stored.kept_bytes / 1e6);
    quarry_store_close(store);
    quarry_session_close(session);
    quarry_prompt_free(&prompt);
    quarry_model_close(model);
    memory_free(names);
    cli_documents_free(documents, s->documents.n);
    return code;
}

/* ---- the commands ---- */

static const cli_option rm_table[] = {
    {"--all", NULL, CLI_SWITCH, offsetof(context_settings, all), NULL, "all contexts of all models", 0, 0}, {0}};

#define STORE_GROUP                                                                                                                        \
    {                                                                                                                                      \
        "Store", cli_store_table, offsetof(context_settings, store)                                                                        \
    }
static const cli_group list_groups[] = {STORE_GROUP, {"Output", context_json_table, 0}, {0}};
static const cli_group plain_groups[] = {STORE_GROUP, {0}};
static const cli_group rm_groups[] = {{"What", rm_table, 0}, STORE_GROUP, {0}};
static const cli_group create_groups[] = {{"Documents", create_table, 0},
                                          {"Model", cli_model_table, offsetof(create_settings, model)},
                                          {"Context", cli_session_table, offsetof(create_settings, session)},
                                          {"Store", cli_store_table, offsetof(create_settings, store)},
                                          {"Output", cli_output_table + 1, offsetof(create_settings, output)},
                                          {0}};

const cli_command command_context_create = {"context create",
                                            "[options] --doc FILE...",
                                            "read documents and keep what was read",
                                            "Later questions about the same documents with the same model ('quarry ask') take it from the "
                                            "store. A long text is kept in parts as it is read: the same command goes on "
                                            "where it was stopped.",
                                            create_groups,
                                            sizeof(create_settings),
                                            create_run};
const cli_command command_context_list = {"context list",           "[options]", "list the contexts that are kept", NULL, list_groups,
                                          sizeof(context_settings), list_run};
const cli_command command_context_info = {
    "context info", "[options] NUMBER", "say what a kept context consists of", NULL, list_groups, sizeof(context_settings), info_run};
const cli_command command_context_verify = {
    "context verify",
    "[options] [NUMBER...]",
    "test the checksums of kept contexts",
    "Without a number all of them. Changes nothing; a damaged context is also found, and removed, when it is used.",
    plain_groups,
    sizeof(context_settings),
    verify_run};
const cli_command command_context_rm = {"context rm",
                                        "[options] NUMBER...",
                                        "remove kept contexts",
                                        "Parts that other contexts share stay.",
                                        rm_groups,
                                        sizeof(context_settings),
                                        rm_run};
const cli_command command_context_export = {"context export",
                                            "[options] NUMBER FOLDER",
                                            "copy a kept context into a store of its own",
                                            "The folder can be carried to another machine: 'quarry ask --store FOLDER' uses it there, and "
                                            "'quarry context export --store FOLDER NUMBER STORE' copies it into the store of that machine.",
                                            plain_groups,
                                            sizeof(context_settings),
                                            export_run};
