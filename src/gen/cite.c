/* Citations: which passages an answer was written from. Nothing is learned about a model beforehand: every head of every layer counts, each by how concentrated
 * it is. A weight w of the softmax counts as w * w (the head's share w of the token, times itself), so that the heads that copy from the text (retrieval heads,
 * arXiv 2404.15574), which put most of their weight on one token, outvote the many that spread theirs; and what the tokens of the question gave
 * is subtracted from what those of the answer gave, per token, for some places draw attention whatever is asked. docs/cite.md has the figures. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "gen/passages.h"
#include "gen/session.h"

/* Sums are integers, so that they do not depend on the order in which threads add: squares of weights in units of 2^-32. 2^32 rows of whole heads fit. */
#define SQUARE_ONE 4294967296.0
#define LOG_LEAST (-6.9314718f) /* log of the least weight that counts, 2^-10: a head cannot have more than 1,024 such */

typedef struct cite_counts {
    attn_observer observer;
    const math_kernels *kernels;
    int64_t n_tokens;             /* positions [0, n_tokens) are counted */
    _Atomic uint64_t *squares[2]; /* [n_tokens] received from the question, from the answer */
    atomic_llong n_rows[2];       /* tokens of question and answer */
    atomic_bool failed;           /* out of memory somewhere */
    bool answering;
} cite_counts;

static void count(cite_counts *c, float score, float log_mass, int64_t pos)
{
    const float log_weight = score - log_mass;
    if (!(log_weight >= LOG_LEAST)) return;
    const double square = exp(2.0 * (double)(log_weight < 0 ? log_weight : 0));
    atomic_fetch_add_explicit(&c->squares[c->answering][pos], (uint64_t)(square * SQUARE_ONE), memory_order_relaxed);
}

/* Rows [first, end), whose scores nobody kept. */
static void count_range(cite_counts *c, const attn_reading *r, const float *log_mass, int64_t first, int64_t end, arena *scratch)
{
    if (end > c->n_tokens) end = c->n_tokens;
    if (first >= end) return;
    const size_t n = (size_t)(end - first), g = (size_t)r->group;
    float *scores = arena_alloc(scratch, n * g, sizeof *scores, NULL);
    if (!scores || !attn_reading_scores(r, c->kernels, first, end, scores, scratch)) {
        atomic_store(&c->failed, true);
        return;
    }
    for (size_t h = 0; h < g; h++)
        for (size_t i = 0; i < n; i++) count(c, scores[h * n + i], log_mass[h], first + (int64_t)i);
}

/* Sinks are left out: what they receive says nothing about them. */
static void on_reading(void *data, const attn_reading *r, arena *scratch)
{
    cite_counts *c = data;
    float log_mass[ATTN_MAX_GROUP];
    if (r->layer == 0 && r->head == 0) atomic_fetch_add(&c->n_rows[c->answering], 1);
    for (int h = 0; h < r->group; h++) log_mass[h] = r->state->m[h] + logf(r->state->l[h]);
    const attn_selection *far = r->selected;
    if (far->all) {
        count_range(c, r, log_mass, r->n_sinks, r->far_end, scratch);
    } else {
        for (int h = 0; h < r->group; h++)
            for (int64_t i = 0; i < far->n; i++)
                if (far->ids[i] < c->n_tokens) count(c, r->scores[h * far->n + i], log_mass[h], far->ids[i]);
    }
    count_range(c, r, log_mass, r->far_end > ATTN_SINKS ? r->far_end : ATTN_SINKS, r->pos + 1, scratch);
}

void cite_question_ends(cite_counts *c)
{
    if (c) c->answering = true;
}

void cite_destroy(cite_counts *c)
{
    if (!c) return;
    memory_free((void *)c->squares[0]);
    memory_free((void *)c->squares[1]);
    memory_free(c);
}

int quarry_session_cite(quarry_session *s, quarry_error *error)
{
    const size_t n = (size_t)s->tokens.n;
    cite_counts *c = memory_zero(1, sizeof *c, "citations", error);
    if (!c) return QUARRY_ERROR_MEMORY;
    for (int i = 0; i < 2; i++)
        if (!(c->squares[i] = memory_zero(n, sizeof *c->squares[i], "citations", error))) {
            cite_destroy(c);
            return QUARRY_ERROR_MEMORY;
        }
    c->observer = (attn_observer){on_reading, c};
    c->kernels = model_kernels(s->model);
    c->n_tokens = s->tokens.n;
    cite_destroy(s->cite);
    s->cite = c;
    session_set_observer(s, &c->observer);
    return QUARRY_OK;
}

/* Weights of the tokens: what the answer's tokens gave on average beyond the question's. */
static void weights_fill(const cite_counts *c, double *weights)
{
    const double of_question = c->n_rows[0] ? 1 / (SQUARE_ONE * (double)c->n_rows[0]) : 0;
    const double of_answer = c->n_rows[1] ? 1 / (SQUARE_ONE * (double)c->n_rows[1]) : 0;
    for (int64_t i = 0; i < c->n_tokens; i++) {
        const double w = (double)c->squares[1][i] * of_answer - (double)c->squares[0][i] * of_question;
        weights[i] = w > 0 ? w : 0;
    }
}

int64_t quarry_session_citations(const quarry_session *s, const quarry_document *documents, int n_documents, int64_t max_citations,
                                 quarry_citation **citations, quarry_error *error)
{
    const cite_counts *c = s->cite;
    if (!c) return error_set(error, QUARRY_ERROR_ARGUMENT, "no citations: call quarry_session_cite before the question is fed");
    if (atomic_load(&c->failed)) return error_set(error, QUARRY_ERROR_MEMORY, "out of memory while citing");
    if (n_documents < 0 || (n_documents && !documents))
        return error_set(error, QUARRY_ERROR_ARGUMENT, "n_documents is %d without documents", n_documents);
    int64_t n = QUARRY_ERROR_MEMORY;
    const size_t n_tokens = (size_t)c->n_tokens;
    size_t *starts = memory_alloc(n_tokens, sizeof *starts, "citations", error);
    double *weights = memory_alloc(n_tokens, sizeof *weights, "citations", error);
    prompt_span *spans = memory_zero((size_t)n_documents, sizeof *spans, "citations", error);
    passage_source *sources = memory_zero((size_t)n_documents, sizeof *sources, "citations", error);
    if (!starts || !weights || !spans || !sources) goto done;
    weights_fill(c, weights);
    n = prompt_locate(s->model, s->tokens.ids, c->n_tokens, documents, n_documents, spans, starts, error);
    if (n) goto done;
    for (int i = 0; i < n_documents; i++)
        sources[i] = (passage_source){documents[i].text, documents[i].n_bytes, starts + spans[i].first, weights + spans[i].first,
                                      spans[i].end - spans[i].first};
    n = passages_find(sources, n_documents, max_citations, citations, error);
done:
    memory_free(starts);
    memory_free(weights);
    memory_free(spans);
    memory_free(sources);
    return n;
}
