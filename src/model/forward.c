/* The forward pass: one for prefill, decode and batches of sessions. Reads top to bottom; n is the number of rows (tokens) throughout. */
#include <math.h>
#include <string.h>

#include "model/internal.h"

struct forward_scratch {
    arena step;     /* buffers of the current pass */
    arena shared;   /* attn_context.shared */
    arena *threads; /* [pool size] */
    int n_threads;
};

forward_scratch *forward_scratch_create(const quarry_model *m, quarry_error *error)
{
    forward_scratch *s = memory_zero(1, sizeof *s, "scratch", error);
    if (!s) return NULL;
    s->n_threads = thread_pool_size(m->pool);
    s->threads = memory_zero((size_t)s->n_threads, sizeof *s->threads, "scratch", error);
    if (!s->threads) {
        memory_free(s);
        return NULL;
    }
    return s;
}

void forward_scratch_destroy(forward_scratch *s)
{
    if (!s) return;
    for (int i = 0; i < s->n_threads; i++) arena_free(&s->threads[i]);
    memory_free(s->threads);
    arena_free(&s->step);
    arena_free(&s->shared);
    memory_free(s);
}

void forward_scratch_tally(const forward_scratch *s, memory_tally *tally)
{
    arena_tally(&s->step, tally);
    arena_tally(&s->shared, tally);
    for (int i = 0; i < s->n_threads; i++) arena_tally(&s->threads[i], tally);
}

arena *forward_scratch_threads(forward_scratch *s)
{
    return s->threads;
}

/* Everything one pass works on. */
typedef struct pass {
    quarry_model *m;
    forward_scratch *s;
    const forward_row *rows;
    attn_row *attn_rows; /* [n] */
    int64_t n;
    attn_shape attn;
    int64_t q_width, kv_width; /* n_head * head_dim, n_head_kv * head_dim */
    float *x;                  /* [n][n_embd] residual stream */
    float *normed;             /* [n][n_embd] */
    float *q;                  /* [n][n_head][head_dim] */
    float *q_far;              /* the same as far tokens of extended sequences see it; else NULL */
    float *k, *v;              /* [n][n_head_kv][head_dim] */
    float *attended;           /* [n][n_head][head_dim] */
    float *gate, *up;          /* [n][n_ff] */
    float *cs_far;             /* [n_rot] of the distances at which they do */
    float *cs[2];              /* [n][n_rot] cosine and sine of each pair: of layers that see everything, of local ones (or NULL) */
    bool precise;              /* no row reads a document: few rows, whose logits are the answer */
    void *quantized;           /* activations_bytes of the widest input */
    const float *norm;         /* weights of the norm being applied */
    const model_layer *layer;
    int layer_index;
} pass;

static bool alloc_floats(pass *p, float **out, int64_t width, quarry_error *error)
{
    *out = arena_alloc(&p->s->step, (size_t)p->n, (size_t)width * sizeof(float), error);
    return *out != NULL;
}

static quarry_code pass_alloc(pass *p, quarry_error *error)
{
    const model_shape *s = &p->m->shape;
    int64_t widest = s->n_embd > s->n_ff ? s->n_embd : s->n_ff;
    if (p->q_width > widest) widest = p->q_width;
    arena_reset(&p->s->step);
    bool ok = alloc_floats(p, &p->x, s->n_embd, error) && alloc_floats(p, &p->normed, s->n_embd, error) &&
              alloc_floats(p, &p->q, p->q_width, error) && alloc_floats(p, &p->k, p->kv_width, error) &&
              alloc_floats(p, &p->v, p->kv_width, error) && alloc_floats(p, &p->attended, p->q_width, error) &&
              alloc_floats(p, &p->gate, s->n_ff, error) && alloc_floats(p, &p->up, s->n_ff, error) &&
              alloc_floats(p, &p->cs[0], s->n_rot, error) && (s->n_local == 0 || alloc_floats(p, &p->cs[1], s->n_rot, error));
    if (ok && p->attn.extend.window) {
        p->cs_far = arena_alloc(&p->s->step, (size_t)s->n_rot, sizeof *p->cs_far, error);
        ok = p->cs_far && alloc_floats(p, &p->q_far, p->q_width, error);
    }
    p->quantized = ok ? arena_alloc(&p->s->step, activations_bytes(p->n, widest, p->precise), 1, error) : NULL;
    p->attn_rows = ok ? arena_alloc(&p->s->step, (size_t)p->n, sizeof *p->attn_rows, error) : NULL;
    return p->quantized && p->attn_rows ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

/* Allocates as a pass does, and touches nothing. */
quarry_code forward_scratch_estimate(quarry_model *m, const attn_shape *shape, int64_t n, size_t *n_bytes, quarry_error *error)
{
    forward_scratch s = {0};
    pass p = {.m = m, .s = &s, .n = n, .attn = *shape};
    p.q_width = (int64_t)m->shape.n_head * m->shape.head_dim;
    p.kv_width = (int64_t)m->shape.n_head_kv * m->shape.head_dim;
    const quarry_code code = pass_alloc(&p, error);
    arena_reset(&s.step);
    *n_bytes = s.step.n_bytes;
    arena_free(&s.step);
    return code;
}

/* ---- element-wise steps, in blocks of rows ---- */

enum { ROW_BLOCK = 16 };

typedef void (*rows_fn)(pass *p, int64_t row);

typedef struct rows_job {
    pass *p;
    rows_fn fn;
} rows_job;

static void rows_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const rows_job *job = context;
    int64_t end = (task + 1) * ROW_BLOCK < job->p->n ? (task + 1) * ROW_BLOCK : job->p->n;
    for (int64_t row = task * ROW_BLOCK; row < end; row++) job->fn(job->p, row);
}

static void for_rows(pass *p, rows_fn fn)
{
    rows_job job = {p, fn};
    int64_t n_tasks = (p->n + ROW_BLOCK - 1) / ROW_BLOCK;
    if (n_tasks > 1)
        thread_pool_run(p->m->pool, n_tasks, rows_task, &job);
    else
        rows_task(&job, 0, 0);
}

static void embed_row(pass *p, int64_t row)
{
    const forward_row *r = &p->rows[row];
    const quarry_model *m = p->m;
    const int64_t n_embd = m->shape.n_embd;
    float *x = p->x + row * n_embd;
    weight_row(&m->embedding, r->token, x);
    if (m->arch->scale_embedding)
        for (int64_t i = 0; i < n_embd; i++) x[i] *= sqrtf((float)n_embd);
    for (int kind = 0; kind < 2 && m->rope_inverse[kind]; kind++) {
        float *cs = p->cs[kind] + row * m->shape.n_rot;
        for (int i = 0; i < m->shape.n_rot / 2; i++) {
            double angle = (double)r->pos * m->rope_inverse[kind][i];
            cs[2 * i] = (float)cos(angle);
            cs[2 * i + 1] = (float)sin(angle);
        }
    }
}

static void norm_row(pass *p, int64_t row)
{
    const model_shape *s = &p->m->shape;
    p->m->kernels->vector->rms_norm(p->x + row * s->n_embd, p->norm, s->rms_eps, s->n_embd, p->normed + row * s->n_embd);
}

/* x += norm(normed): what a part of the layer gives, in normed, goes into the residual stream. */
static void add_normed_row(pass *p, int64_t row)
{
    const model_shape *s = &p->m->shape;
    float *x = p->x + row * s->n_embd, *y = p->normed + row * s->n_embd;
    p->m->kernels->vector->rms_norm(y, p->norm, s->rms_eps, s->n_embd, y);
    for (int64_t i = 0; i < s->n_embd; i++) x[i] += y[i];
}

/* Head norms, RoPE, and the new K|V rows of one token: in an extended sequence without RoPE, and with it as a local row. */
static void rotate_row(pass *p, int64_t row)
{
    const model_shape *s = &p->m->shape;
    const vector_kernels *vector = p->m->kernels->vector;
    const model_layer *l = p->layer;
    const forward_row *r = &p->rows[row];
    const float *cs = p->cs[l->local] + row * s->n_rot;
    const bool extended = !l->local && p->q_far;
    int d = s->head_dim;
    for (int h = 0; h < s->n_head; h++) {
        float *q = p->q + row * p->q_width + (int64_t)h * d;
        if (l->q_norm) vector->rms_norm(q, l->q_norm, s->rms_eps, d, q);
        if (extended) {
            float *far = p->q_far + row * p->q_width + (int64_t)h * d;
            memcpy(far, q, (size_t)d * sizeof *q);
            vector->rope(far, p->cs_far, s->n_rot, p->m->arch->rope_halves);
        }
        vector->rope(q, cs, s->n_rot, p->m->arch->rope_halves);
    }
    for (int h = 0; h < s->n_head_kv; h++) {
        float *k = p->k + row * p->kv_width + (int64_t)h * d, *v = p->v + row * p->kv_width + (int64_t)h * d;
        int layer = l->kv_layer;
        if (l->k_norm) vector->rms_norm(k, l->k_norm, s->rms_eps, d, k);
        if (extended) {
            kv_write(p->m->kernels, kv_row(r->kv, layer, h, r->pos), &p->attn.kv, k, v);
            layer += p->attn.extend.near_layer;
        }
        vector->rope(k, cs, s->n_rot, p->m->arch->rope_halves);
        kv_write(p->m->kernels, kv_row(r->kv, layer, h, r->pos), &p->attn.kv, k, v);
    }
}

static void glu_row(pass *p, int64_t row)
{
    const vector_kernels *vector = p->m->kernels->vector;
    int64_t n = p->m->shape.n_ff;
    (p->m->arch->gelu ? vector->geglu : vector->swiglu)(p->gate + row * n, p->up + row * n, n, p->gate + row * n);
}

/* ---- matrix products ---- */

static activations quantize(pass *p, const float *x, int64_t width)
{
    activations a = {.n_rows = p->n, .n_in = width, .x = x, .precise = p->precise, .quantized = p->quantized};
    activations_quantize(&a, p->m->kernels->matmul, p->m->pool);
    return a;
}

/* Products that run in one loop. */
typedef struct products {
    matmul_job jobs[3];
    int n;
} products;

static products layer_qkv(const pass *p, const model_layer *l)
{
    return (products){{{&l->q, l->q_bias, p->q, false}, {&l->k, l->k_bias, p->k, false}, {&l->v, l->v_bias, p->v, false}}, 3};
}

static products output_products(const quarry_model *m, float *logits)
{
    return (products){{{m->tied ? &m->embedding : &m->output, NULL, logits, false}}, 1};
}

/* next: what follows in this pass or begins another. */
static void multiply(pass *p, const activations *a, const products *now, const products *next)
{
    matmul_expect(p->m->pool, p->n, next->jobs, next->n);
    matmul_run(p->m->kernels->matmul, p->m->pool, a, now->jobs, now->n);
}

/* ---- the pass ---- */

static quarry_code run_layer(pass *p, attn_cost *cost, quarry_error *error)
{
    const model_layer *l = p->layer;
    const model_shape *s = &p->m->shape;
    bool last = p->layer_index + 1 == s->n_layer;
    const bool post = p->m->arch->post_norms; /* else the products add to the residual stream themselves */
    float *sum = post ? p->normed : p->x;
    products qkv = layer_qkv(p, l), o = {{{&l->o, NULL, sum, !post}}, 1}, down = {{{&l->down, NULL, sum, !post}}, 1};
    products glu = {{{&l->gate, NULL, p->gate, false}, {&l->up, NULL, p->up, false}}, 2};
    products after = last ? output_products(p->m, NULL) : layer_qkv(p, l + 1);

    p->norm = l->attn_norm;
    for_rows(p, norm_row);
    activations a = quantize(p, p->normed, s->n_embd);
    multiply(p, &a, &qkv, &o);
    for_rows(p, rotate_row);

    attn_context c = {p->m->kernels, p->m->pool, p->s->threads, &p->s->shared};
    quarry_code code = attn_forward(&c, &p->attn, l->kv_layer, p->attn_rows, p->n, p->q, p->attended, cost, error);
    if (code != QUARRY_OK) return code;
    a = quantize(p, p->attended, p->q_width);
    multiply(p, &a, &o, &glu);
    p->norm = l->attn_post;
    if (post) for_rows(p, add_normed_row);

    p->norm = l->ffn_norm;
    for_rows(p, norm_row);
    a = quantize(p, p->normed, s->n_embd);
    multiply(p, &a, &glu, &down);
    for_rows(p, glu_row);
    a = quantize(p, p->gate, s->n_ff);
    multiply(p, &a, &down, &after);
    p->norm = l->ffn_post;
    if (post) for_rows(p, add_normed_row);
    return QUARRY_OK;
}

/* The logits of the rows that want them. Those whose destinations do not follow each other are copied there. */
static quarry_code run_output(pass *p, quarry_error *error)
{
    quarry_model *m = p->m;
    int64_t n = 0, width = m->shape.n_embd, n_vocab = m->shape.n_vocab;
    float **out = arena_alloc(&p->s->step, (size_t)p->n, sizeof *out, error);
    bool adjacent = true;
    if (!out) return QUARRY_ERROR_MEMORY;
    for (int64_t i = 0; i < p->n; i++) {
        if (!p->rows[i].logits) continue;
        memmove(p->x + n * width, p->x + i * width, (size_t)width * sizeof *p->x);
        out[n] = p->rows[i].logits;
        adjacent = adjacent && out[n] == out[0] + n * n_vocab;
        n++;
    }
    if (n == 0) return QUARRY_OK;
    float *logits = adjacent ? out[0] : arena_alloc(&p->s->step, (size_t)n, (size_t)n_vocab * sizeof *logits, error);
    if (!logits) return QUARRY_ERROR_MEMORY;
    p->n = n;
    p->norm = m->output_norm;
    for_rows(p, norm_row);
    activations a = quantize(p, p->normed, width);
    products now = output_products(m, logits), first = layer_qkv(p, m->layers);
    multiply(p, &a, &now, &first);
    for (int64_t i = 0; i < n && !adjacent; i++) memcpy(out[i], logits + i * n_vocab, (size_t)n_vocab * sizeof *logits);
    return QUARRY_OK;
}

static quarry_code check_rows(const quarry_model *m, const forward_row *rows, int64_t n, quarry_error *error)
{
    for (int64_t i = 0; i < n; i++)
        if (rows[i].token < 0 || rows[i].token >= m->shape.n_vocab)
            return error_set(error, QUARRY_ERROR_ARGUMENT, "token %d is not in the vocabulary (0 to %lld)", rows[i].token,
                             (long long)m->shape.n_vocab - 1);
    return QUARRY_OK;
}

static void commit_rows(const forward_row *rows, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (rows[i].pos >= kv_length(rows[i].kv)) kv_commit(rows[i].kv, rows[i].pos + 1);
}

quarry_code model_forward(quarry_model *m, forward_scratch *s, const forward_row *rows, int64_t n, attn_cost *cost,
                          forward_cancel_fn cancel, void *data, quarry_error *error)
{
    pass p = {.m = m, .s = s, .rows = rows, .n = n};
    quarry_code code = check_rows(m, rows, n, error);
    if (code != QUARRY_OK || n == 0) return code;
    p.precise = true;
    for (int64_t i = 0; i < n; i++) p.precise &= !rows[i].dense;
    p.q_width = (int64_t)m->shape.n_head * m->shape.head_dim;
    p.kv_width = (int64_t)m->shape.n_head_kv * m->shape.head_dim;
    p.attn = rows[0].policy ? rows[0].policy->shape : model_attn_shape(m, kv_shape_of(rows[0].kv)->type);
    if ((code = pass_alloc(&p, error)) != QUARRY_OK) return code;
    for (int64_t i = 0; i < n; i++) {
        if (i + 1 == n || rows[i + 1].kv != rows[i].kv)
            if ((code = kv_reserve(rows[i].kv, rows[i].pos + 1, error)) != QUARRY_OK) return code;
        p.attn_rows[i] =
            (attn_row){rows[i].kv, rows[i].policy, rows[i].pos, rows[i].dense, rows[i].observer, p.q_far ? p.q_far + i * p.q_width : NULL};
    }
    if (p.q_far) attn_extend_angles(&p.attn.extend, m->rope_inverse[0], m->shape.n_rot / 2, p.cs_far);
    for_rows(&p, embed_row);
    for (int i = 0; i < m->shape.n_layer; i++) {
        if (cancel && cancel(data)) return error_set(error, QUARRY_ERROR_CANCELLED, "cancelled");
        p.layer = &m->layers[i];
        p.layer_index = i;
        if ((code = run_layer(&p, cost, error)) != QUARRY_OK) return code;
    }
    if ((code = run_output(&p, error)) != QUARRY_OK) return code;
    if ((code = gguf_check(m->file, error)) != QUARRY_OK) return code;
    commit_rows(rows, n);
    return QUARRY_OK;
}
