#include "cli/answer.h"

#include <stdio.h>
#include <string.h>

#include "cli/memory.h"

int answer_check_room(const quarry_model *model, const answer_settings *settings, int64_t n_tokens, const char *what)
{
    quarry_model_info info;
    quarry_model_get_info(model, &info);
    int64_t limit = settings->session.n_ctx ? settings->session.n_ctx : settings->session.extend ? INT32_MAX : info.n_ctx_train;
    if (n_tokens < limit && (settings->session.extend || n_tokens < info.n_ctx_train)) return CLI_OK;
    if (settings->session.extend)
        return cli_fail("%s %lld tokens, which leaves no room in a context of %lld: raise -c or shorten the text", what,
                        (long long)n_tokens, (long long)limit);
    if (n_tokens < info.n_ctx_train)
        return cli_fail(
            "%s %lld tokens, which leaves no room in a context of %lld: raise -c (this model can do up to %lld) or shorten the text", what,
            (long long)n_tokens, (long long)limit, (long long)info.n_ctx_train);
    return cli_fail(
        "%s %lld tokens, but the context of this model ends at %lld: shorten the text, use a model with a longer context, or --extend",
        what, (long long)n_tokens, (long long)info.n_ctx_train);
}

int answer_read(quarry_session *session, const answer_settings *settings, const answer_input *input, quarry_stored *stored)
{
    cli_progress reading, asking;
    quarry_error error;
    quarry_watch watch = cli_progress_start(&reading, "reading", settings->output.quiet);
    cli_work_begin();
    int failed = quarry_session_read_stored(session, input->store, input->context, input->n_context, input->ends, input->n_ends,
                                            input->names, &watch, stored, &error);
    cli_progress_end(&reading);
    if (!failed && *stored->note && !settings->output.quiet) fprintf(stderr, "quarry: %s\n", stored->note);
    watch = cli_progress_start(&asking, "asking", true);
    if (!failed && input->cite) failed = quarry_session_cite(session, &error);
    if (!failed) failed = quarry_session_feed(session, input->question, input->n_question, &watch, &error);
    cli_work_end();
    if (failed) return cli_fail_error(&error);
    return cli_interrupted() ? cli_fail_interrupted() : CLI_OK;
}

/* ---- the answer's text ---- */

typedef struct answer_text {
    bool print, collect; /* as it comes; for JSON and citations: keep the text */
    char *text;
    size_t n, capacity;
    char last; /* character printed */
    bool out_of_memory;
} answer_text;

static bool on_text(const char *text, size_t n_bytes, void *data)
{
    answer_text *a = data;
    if (cli_interrupted()) return false;
    if (!n_bytes) return true;
    if (a->print) {
        a->last = text[n_bytes - 1];
        if (!cli_write(text, n_bytes) || !cli_flush()) return false;
    }
    if (!a->collect) return true;
    if (a->n + n_bytes > a->capacity) {
        size_t capacity = 2 * (a->n + n_bytes);
        a->out_of_memory = memory_grow(&a->text, capacity, 1, "answer", NULL) != QUARRY_OK;
        if (a->out_of_memory) return false;
        a->capacity = capacity;
    }
    memcpy(a->text + a->n, text, n_bytes);
    a->n += n_bytes;
    return true;
}

/* ---- statistics ---- */

typedef struct report {
    const quarry_model *model;
    const answer_settings *settings;
    quarry_stats stats;
    quarry_stop_reason reason;
    session_memory memory;
    process_memory process;
    const quarry_stored *stored; /* NULL: no store */
    const cite_request *cite;    /* NULL: no citations */
    cite_result citations;
} report;

static double per_second(int64_t n, double seconds)
{
    return seconds > 0 ? (double)n / seconds : 0;
}

static const char *const reason_names[] = {[QUARRY_STOP_END] = "end",
                                           [QUARRY_STOP_STRING] = "stop",
                                           [QUARRY_STOP_LENGTH] = "length",
                                           [QUARRY_STOP_CONTEXT] = "context",
                                           [QUARRY_STOP_CALLBACK] = "callback"};
static const char *const reason_notes[] = {[QUARRY_STOP_END] = "",
                                           [QUARRY_STOP_STRING] = "; ended at a stop string",
                                           [QUARRY_STOP_LENGTH] = "; cut at the limit of -n",
                                           [QUARRY_STOP_CONTEXT] = "; cut because the context is full",
                                           [QUARRY_STOP_CALLBACK] = ""};

static void print_report(const report *r)
{
    const quarry_stats *s = &r->stats;
    char a[32], b[32], c[32], text[256];
    fprintf(stderr, "\n");
    if (r->stored && r->stored->n_taken)
        fprintf(stderr, "stored     %lld tokens, read before, in %.2f s\n", (long long)r->stored->n_taken, r->stored->take_seconds);
    if (s->n_read || !r->stored || !r->stored->n_taken)
        fprintf(stderr, "read       %lld tokens in %.2f s, %.0f tokens/s\n", (long long)s->n_read, s->read_seconds,
                per_second(s->n_read, s->read_seconds));
    if (r->stored && r->stored->kept_bytes)
        fprintf(stderr, "kept       %.1f MB in %.2f s: not to be read again\n", (double)r->stored->kept_bytes / 1e6,
                r->stored->keep_seconds);
    if (s->n_fed) fprintf(stderr, "question   %lld tokens in %.2f s\n", (long long)s->n_fed, s->feed_seconds);
    fprintf(stderr, "answer     %lld tokens in %.2f s, %.1f tokens/s%s\n", (long long)s->n_generated, s->generate_seconds,
            per_second(s->n_generated, s->generate_seconds), reason_notes[r->reason]);
    if (s->kv_bytes_per_step > 0)
        fprintf(stderr, "attention  %s read %s of keys and values per token, full attention reads %s: %.1f times as much\n",
                r->settings->session.attn, cli_bytes(s->kv_bytes_per_step, a), cli_bytes(s->kv_bytes_full, b),
                s->kv_bytes_full / s->kv_bytes_per_step);
    fprintf(stderr, "memory     %s\n", memory_text(&r->memory, text, sizeof text));
    if (r->process.resident)
        fprintf(stderr, "           together %s of the %s that the system counts; at most it was %s\n",
                cli_bytes((double)session_memory_sum(&r->memory), a), cli_bytes((double)r->process.resident, b),
                cli_bytes((double)r->process.peak, c));
    fprintf(stderr, "disk       model %.1f MB", (double)r->memory.model_file / 1e6);
    if (r->memory.codebook_file) fprintf(stderr, ", codebooks %.1f MB", (double)r->memory.codebook_file / 1e6);
    if (r->stored && r->stored->taken_bytes + r->stored->kept_bytes)
        fprintf(stderr, ", stored context %.1f MB", (double)(r->stored->taken_bytes + r->stored->kept_bytes) / 1e6);
    fprintf(stderr, "\n");
}

static json_t *count_json(int64_t n, double seconds)
{
    return json_pack("{s:I, s:f, s:f}", "tokens", (json_int_t)n, "seconds", seconds, "tokens_per_second", per_second(n, seconds));
}

static json_t *answer_json(const report *r, const answer_text *answer)
{
    const quarry_stats *s = &r->stats;
    quarry_model_info info;
    quarry_model_get_info(r->model, &info);
    double ratio = s->kv_bytes_per_step > 0 ? s->kv_bytes_full / s->kv_bytes_per_step : 1;
    json_t *memory = memory_json(&r->memory);
    json_object_set_new(memory, "resident", json_integer((json_int_t)r->process.resident));
    json_object_set_new(memory, "peak_resident", json_integer((json_int_t)r->process.peak));
    return json_pack("{s:o, s:s, s:{s:o, s:s, s:s, s:s, s:i}, s:s, s:o, s:o, s:o, s:{s:f, s:f, s:f}, s:o, s:{s:I, s:I}}", //
                     "answer", json_text(answer->n ? answer->text : "", answer->n), "stop", reason_names[r->reason],      //
                     "model", "name", json_text(info.name, strlen(info.name)), "architecture", info.architecture, "quantization",
                     info.quantization,                                                                                            //
                     "kernels", info.kernels, "threads", info.n_threads, "attention", r->settings->session.attn,                   //
                     "read", count_json(s->n_read, s->read_seconds), "question", count_json(s->n_fed, s->feed_seconds),            //
                     "generated", count_json(s->n_generated, s->generate_seconds),                                                 //
                     "kv_read_per_token", "bytes", s->kv_bytes_per_step, "full_attention_bytes", s->kv_bytes_full, "ratio", ratio, //
                     "memory", memory, "disk", "model", (json_int_t)r->memory.model_file, "codebooks", (json_int_t)r->memory.codebook_file);
}

static json_t *stored_json(const quarry_stored *s)
{
    return json_pack("{s:o, s:I, s:o, s:o}", "taken", count_json(s->n_taken, s->take_seconds), "bytes",
                     (json_int_t)(s->taken_bytes + s->kept_bytes), "kept",
                     json_pack("{s:I, s:f}", "bytes", (json_int_t)s->kept_bytes, "seconds", s->keep_seconds), "note",
                     json_text(s->note, strlen(s->note)));
}

static json_t *report_json(const report *r, const answer_text *answer)
{
    json_t *all = answer_json(r, answer);
    if (all && r->stored && json_object_set_new(all, "stored", stored_json(r->stored))) {
        json_decref(all);
        return NULL;
    }
    if (all && r->cite && json_object_set_new(all, "citations", cite_json(r->cite, &r->citations))) {
        json_decref(all);
        return NULL;
    }
    return all;
}

/* What follows the answer. */
static int report_write(report *r, const quarry_session *session, const answer_text *answer)
{
    const cli_output_options *output = &r->settings->output;
    quarry_error error;
    int code = CLI_OK;
    if (r->cite) {
        r->citations.n =
            quarry_session_citations(session, r->cite->documents, r->cite->n_documents, r->cite->max, &r->citations.items, &error);
        if (r->citations.n < 0) return cli_fail_error(&error);
        if (r->cite->html) code = cite_write_html(r->cite, &r->citations, answer->text, answer->n);
        if (code) return code;
        if (r->cite->text && !output->json) cite_print(r->cite, &r->citations);
        cli_flush();
    }
    quarry_session_get_stats(session, &r->stats);
    session_memory_held(session, &r->memory);
    process_memory_get(&r->process);
    if (output->json) return json_print(report_json(r, answer));
    if (!output->quiet) print_report(r);
    return CLI_OK;
}

int answer_run(const quarry_model *model, quarry_session *session, const answer_settings *settings, const quarry_sampling *sampling,
               const quarry_stored *stored, const cite_request *cite)
{
    answer_text answer = {.print = !settings->output.json, .collect = settings->output.json || cite};
    report r = {.model = model, .settings = settings, .stored = stored, .cite = cite};
    quarry_error error;
    int code = CLI_OK;
    cli_work_begin();
    int failed = quarry_session_generate(session, sampling, on_text, &answer, &r.reason, &error);
    cli_work_end();
    if (answer.last && answer.last != '\n') cli_print("\n");
    cli_flush();
    if (failed) {
        code = cli_fail_error(&error);
    } else if (cli_interrupted()) {
        code = cli_fail_interrupted();
    } else if (answer.out_of_memory) {
        code = cli_fail("out of memory");
    } else if (r.reason != QUARRY_STOP_CALLBACK) {
        code = report_write(&r, session, &answer);
    }
    quarry_free(r.citations.items);
    memory_free(answer.text);
    return code;
}
