#include "eval/ruler.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* A sample as tokens: what is read, and what follows. */
typedef struct ruler_prompt {
    token_list context, question;
} ruler_prompt;

typedef struct ruler_run {
    quarry_model *model;
    const ruler_params *params;
    const char **specs; /* [n_policies], "full" first */
    int n_policies;
    ruler_source source;
    score_cell *cells; /* [tasks asked for][n_lengths][n_policies] */
    eval_watch watch;
    ruler_answer_fn on_answer;
    void *data;
} ruler_run;

int ruler_task_find(const char *name, size_t n)
{
    for (int i = 0; i < RULER_TASKS; i++)
        if (strlen(ruler_tasks[i].name) == n && memcmp(ruler_tasks[i].name, name, n) == 0) return i;
    return -1;
}

const char *ruler_task_name(int task)
{
    return ruler_tasks[task].name;
}

static int tasks_of(const ruler_params *p)
{
    int n = 0;
    for (int i = 0; i < RULER_TASKS; i++) n += p->tasks[i];
    return n;
}

int ruler_n_results(const ruler_params *p)
{
    return (tasks_of(p) * p->n_lengths + 1) * (p->n_attn + 1);
}

/* ---- a sample that fits ---- */

static void prompt_free(ruler_prompt *p)
{
    token_list_free(&p->context);
    token_list_free(&p->question);
}

static quarry_code prompt_encode(const quarry_model *model, const ruler_sample *s, ruler_prompt *out, quarry_error *error)
{
    const chat_template *chat = model_chat(model, error);
    if (!chat) return eval_failed(error);
    const chat_part parts[2] = {{s->context, strlen(s->context)}, {s->question, strlen(s->question)}};
    const chat_message message = {"user", parts, 2};
    token_list all = {0};
    int64_t split = 0;
    out->context.n = out->question.n = 0;
    quarry_code code = chat_encode(chat, model_tokenizer(model), model_chat_text(model), &message, 1, true, true, &all, &split, error);
    for (int64_t i = 0; i < all.n && code == QUARRY_OK; i++)
        code = token_list_push(i < split ? &out->context : &out->question, all.ids[i], error);
    if (code == QUARRY_OK)
        code = tokenizer_encode(model_tokenizer(model), s->prefix, strlen(s->prefix), TOKENIZE_PLAIN, &out->question, error);
    token_list_free(&all);
    return code;
}

/* The longest sample of at most `length` tokens with its answer: doubles the units, then halves the range. */
static quarry_code sample_fit(const ruler_run *r, int task, int64_t length, uint64_t seed, ruler_sample *sample, ruler_prompt *prompt,
                              quarry_error *error)
{
    int64_t low = 0, high = 0, used;
    for (int64_t units = 8;;) {
        quarry_code code = ruler_generate(task, &r->source, units, length, seed, sample, &used, error);
        if (code == QUARRY_OK) code = prompt_encode(r->model, sample, prompt, error);
        const bool fits = code == QUARRY_OK && prompt->context.n + prompt->question.n + ruler_tasks[task].n_predict <= length;
        if (code != QUARRY_OK) return code;
        if (fits) low = units;
        if (!fits) high = units;
        const bool last = fits && (high == low + 1 || used < units);
        if (last) return QUARRY_OK;
        ruler_sample_free(sample);
        if (!fits && units <= 1)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "%s does not fit %lld tokens; give a larger --lengths", ruler_tasks[task].name,
                             (long long)length);
        units = high == 0 ? 2 * low : high - low > 1 ? low + (high - low) / 2 : low;
    }
}

/* ---- asking ---- */

/* A score never falls as the answer goes on. */
static bool all_found(const void *data, const char *text)
{
    return ruler_score(data, text) >= 1;
}

static quarry_code ask(const ruler_run *r, const quarry_session *read, int policy, int task, const ruler_sample *sample,
                       const ruler_prompt *prompt, double *score, reading_sum *reading, int64_t length, quarry_error *error)
{
    char *text;
    const quarry_code code = answer_ask(r->model, read, policy, prompt->question.ids, prompt->question.n, ruler_tasks[task].n_predict,
                                        all_found, sample, &text, reading, error);
    if (code != QUARRY_OK) return code;
    *score = ruler_score(sample, text);
    if (r->on_answer) r->on_answer(ruler_tasks[task].name, length, r->specs[policy], *score, text, r->data);
    memory_free(text);
    return QUARRY_OK;
}

/* A record per policy of one sample, in *records. */
static quarry_code sample_measure(ruler_run *r, int task, int64_t length, uint64_t seed, json_t *records, quarry_error *error)
{
    ruler_sample sample = {0};
    ruler_prompt prompt = {{0}, {0}};
    const quarry_session_params params = {.n_batch = r->params->n_batch};
    quarry_session *session = NULL;
    quarry_code code = sample_fit(r, task, length, seed, &sample, &prompt, error);
    if (code == QUARRY_OK && !(session = session_open_policies(r->model, &params, r->specs, r->n_policies, error)))
        code = eval_failed(error);
    if (code == QUARRY_OK) code = eval_read(session, prompt.context.ids, prompt.context.n, &r->watch, error);
    for (int policy = 0; policy < r->n_policies && code == QUARRY_OK; policy++) {
        double score;
        reading_sum reading = {0};
        if ((code = eval_watch_ask(&r->watch, error)) != QUARRY_OK) break;
        code = ask(r, session, policy, task, &sample, &prompt, &score, &reading, length, error);
        if (code == QUARRY_OK && json_array_append_new(records, score_record(score, &reading)))
            code = error_memory(error, "journal record", 0);
    }
    quarry_session_close(session);
    ruler_sample_free(&sample);
    prompt_free(&prompt);
    return code;
}

static void sample_key(char *out, size_t capacity, int task, int64_t length, int i)
{
    snprintf(out, capacity, "%s %lld %d", ruler_tasks[task].name, (long long)length, i);
}

static quarry_code sample_run(ruler_run *r, int task, int64_t length, int i, score_cell *cells, quarry_error *error)
{
    char key[64];
    sample_key(key, sizeof key, task, length, i);
    const json_t *kept = journal_find(r->params->journal, key);
    json_t *records = kept ? json_incref(json_object_get(kept, "policies")) : json_array();
    quarry_code code = records || kept ? QUARRY_OK : error_memory(error, "journal record", 0);
    const uint64_t seed = ((r->params->seed * 31 + (uint64_t)task) * 1000003 + (uint64_t)length) * 1000003 + (uint64_t)i;
    if (code == QUARRY_OK && !kept) code = sample_measure(r, task, length, seed, records, error);
    if (code == QUARRY_OK && !kept) code = journal_add(r->params->journal, key, json_pack("{s:O}", "policies", records), error);
    if (code == QUARRY_OK) code = score_cells_add(cells, r->n_policies, records, key, "eval ruler", error);
    json_decref(records);
    return code;
}

/* ---- results ---- */

static void results_fill(ruler_run *r, score_result *results)
{
    const ruler_params *p = r->params;
    int n = 0, n_cells = 0;
    score_result *all = results + tasks_of(p) * p->n_lengths * r->n_policies;
    for (int task = 0; task < RULER_TASKS; task++)
        for (int l = 0; l < p->n_lengths && p->tasks[task]; l++) {
            score_result *out = &results[n];
            score_cells_finish(&r->cells[n], r->n_policies, r->model, out);
            for (int policy = 0; policy < r->n_policies; policy++, n++) {
                out[policy].attn = r->specs[policy];
                out[policy].task = ruler_tasks[task].name;
                out[policy].length = p->lengths[l];
                out[policy].counted = out[0].score_low > RULER_GATE;
            }
        }
    for (int i = 0; i < n; i += r->n_policies) n_cells += results[i].counted;
    for (int policy = 0; policy < r->n_policies; policy++) { /* cells weigh the same */
        score_result *out = &all[policy];
        double variance[2] = {0, 0};
        *out = (score_result){.attn = r->specs[policy], .task = "all", .counted = n_cells > 0};
        reading_sum sum = {0}, sum_full = {0};
        for (int i = policy; i < n; i += r->n_policies) {
            const score_result *cell = &results[i];
            if (!cell->counted) continue;
            out->n += cell->n;
            out->score += cell->score / n_cells;
            out->score_full += cell->score_full / n_cells;
            out->loss += cell->loss / n_cells;
            variance[0] += pow((cell->score_high - cell->score_low) / 2 / n_cells, 2);
            variance[1] += pow((cell->loss_high - cell->loss_low) / 2 / n_cells, 2);
            attn_cost_add(&sum.cost, &r->cells[i].reading.cost);
            attn_cost_add(&sum_full.cost, &r->cells[i - policy].reading.cost);
            sum.tokens += r->cells[i].reading.tokens;
            sum_full.tokens += r->cells[i - policy].reading.tokens;
        }
        out->score_low = out->score - sqrt(variance[0]);
        out->score_high = out->score + sqrt(variance[0]);
        out->loss_low = out->loss - sqrt(variance[1]);
        out->loss_high = out->loss + sqrt(variance[1]);
        reading_relate(&sum, &sum_full, r->model, &out->reading);
    }
}

quarry_code ruler_measure(quarry_model *model, const ruler_params *params, const quarry_watch *watch, ruler_answer_fn on_answer, void *data,
                          score_result *results, quarry_error *error)
{
    ruler_run r = {
        .model = model, .params = params, .n_policies = params->n_attn + 1, .watch = {watch, 0, 0}, .on_answer = on_answer, .data = data};
    quarry_code code = QUARRY_OK;
    int n_cells = tasks_of(params) * params->n_lengths * r.n_policies, n = 0;
    char key[64];
    if (n_cells == 0 || params->samples < 1)
        return error_set(error, QUARRY_ERROR_ARGUMENT, "tasks, lengths and samples must be at least 1");
    for (int l = 0; l < params->n_lengths && code == QUARRY_OK; l++)
        code = eval_check_length(model, params->lengths[l], "--lengths", error);
    if (code != QUARRY_OK) return code;
    if (!(r.specs = eval_policies(NULL, params->attn, params->n_attn, error))) return QUARRY_ERROR_MEMORY;
    r.cells = memory_zero((size_t)n_cells, sizeof *r.cells, "scores", error);
    code = r.cells ? ruler_source_make(&r.source, params->text ? params->text : "", params->n_bytes, error) : QUARRY_ERROR_MEMORY;
    for (int task = 0; task < RULER_TASKS; task++)
        for (int l = 0; l < params->n_lengths && params->tasks[task]; l++)
            for (int i = 0; i < params->samples; i++) {
                sample_key(key, sizeof key, task, params->lengths[l], i);
                if (!journal_find(params->journal, key)) r.watch.total += params->lengths[l];
            }
    for (int task = 0; task < RULER_TASKS; task++)
        for (int l = 0; l < params->n_lengths && params->tasks[task]; l++, n += r.n_policies)
            for (int i = 0; i < params->samples && code == QUARRY_OK; i++)
                code = sample_run(&r, task, params->lengths[l], i, &r.cells[n], error);
    if (code == QUARRY_OK) results_fill(&r, results);
    score_cells_free(r.cells, n_cells);
    memory_free(r.specs);
    ruler_source_free(&r.source);
    return code;
}
