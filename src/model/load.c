/* From a GGUF file to weights ready for the kernels. Every tensor of the file must be one that the forward pass uses: a file with more in it is another
 * architecture than it says, and would give wrong text. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/internal.h"

typedef struct loader {
    quarry_model *m;
    int64_t n_used;
    int64_t weights_of_type[32]; /* weights per block type, to name the model's quantisation */
    quarry_error *error;
} loader;

static quarry_code fail(const loader *l, quarry_code code, const char *what, const char *name)
{
    return error_set(l->error, code, "%s: tensor %s %s", gguf_path(l->m->file), name, what);
}

/* The tensor [rows][cols] (rows 0: a vector of cols); NULL and *code on failure, or OK when it is absent and optional. */
static const gguf_tensor *find(loader *l, const char *name, int64_t rows, int64_t cols, bool optional, quarry_code *code)
{
    const gguf_tensor *t = gguf_find(l->m->file, name);
    *code = QUARRY_OK;
    if (!t) {
        if (!optional) *code = fail(l, QUARRY_ERROR_FORMAT, "is missing; the file is incomplete or of another architecture", name);
        return NULL;
    }
    int64_t want_rows = rows ? rows : 1;
    if (t->dims[0] != cols || t->dims[1] != want_rows || t->dims[2] != 1 || t->dims[3] != 1) {
        *code = error_set(l->error, QUARRY_ERROR_FORMAT, "%s: tensor %s is %lld x %lld, expected %lld x %lld from the metadata",
                          gguf_path(l->m->file), name, (long long)t->dims[1], (long long)t->dims[0], (long long)want_rows, (long long)cols);
        return NULL;
    }
    l->n_used++;
    l->m->n_params += cols * want_rows;
    return t;
}

static quarry_code load_vector(loader *l, const char *name, int64_t n, bool optional, float **out)
{
    quarry_code code;
    const gguf_tensor *t = find(l, name, 0, n, optional, &code);
    if (!t) return code;
    void *copy = NULL;
    const void *data = gguf_tensor_data(l->m->file, t, &copy, l->error);
    if (!data) return l->error ? l->error->code : QUARRY_ERROR_IO;
    *out = arena_alloc(&l->m->small, (size_t)n, sizeof **out, l->error);
    if (*out && n % block_info_get(t->type)->n_weights == 0)
        block_dequantize(t->type, data, n, *out);
    else
        code = *out ? fail(l, QUARRY_ERROR_FORMAT, "does not fill its blocks", name) : QUARRY_ERROR_MEMORY;
    memory_free(copy);
    return code;
}

static quarry_code load_matrix(loader *l, const char *name, int64_t rows, int64_t cols, bool optional, weight *w)
{
    quarry_code code;
    quarry_model *m = l->m;
    const gguf_tensor *t = find(l, name, rows, cols, optional, &code);
    if (!t) return code;
    void *copy = NULL;
    const void *data = gguf_tensor_data(m->file, t, &copy, l->error);
    if (!data) return l->error ? l->error->code : QUARRY_ERROR_IO;
    code = weight_make_in(w, &m->packed, m->kernels->matmul, m->pool, t->type, rows, cols, data, l->error);
    if (code == QUARRY_OK && !w->packed && copy) {
        m->copies[m->n_copies++] = copy;
        copy = NULL;
    }
    memory_free(copy);
    if (code != QUARRY_OK) return code;
    if (w->packed) gguf_tensor_release(m->file, t);
    m->weight_bytes += w->n_bytes;
    if ((unsigned)t->type < 32) l->weights_of_type[t->type] += rows * cols;
    return QUARRY_OK;
}

/* name of a layer's tensor: "blk.<layer>.<part>" */
static const char *layer_name(char *out, size_t capacity, int layer, const char *part)
{
    snprintf(out, capacity, "blk.%d.%s", layer, part);
    return out;
}

static quarry_code load_layer(loader *l, int index)
{
    const quarry_model *m = l->m;
    const model_shape *s = &m->shape;
    model_layer *layer = &m->layers[index];
    int64_t q = (int64_t)s->n_head * s->head_dim, kv = (int64_t)s->n_head_kv * s->head_dim;
    const struct {
        const char *part;
        int64_t rows, cols;
        weight *w;
    } matrices[] = {
        {"attn_q.weight", q, s->n_embd, &layer->q},
        {"attn_k.weight", kv, s->n_embd, &layer->k},
        {"attn_v.weight", kv, s->n_embd, &layer->v},
        {"attn_output.weight", s->n_embd, q, &layer->o},
        {"ffn_gate.weight", s->n_ff, s->n_embd, &layer->gate},
        {"ffn_up.weight", s->n_ff, s->n_embd, &layer->up},
        {"ffn_down.weight", s->n_embd, s->n_ff, &layer->down},
    };
    const struct {
        const char *part;
        int64_t n;
        bool optional, wanted;
        float **out;
    } vectors[] = {
        {"attn_norm.weight", s->n_embd, false, true, &layer->attn_norm},
        {"ffn_norm.weight", s->n_embd, false, true, &layer->ffn_norm},
        {"post_attention_norm.weight", s->n_embd, false, m->arch->post_norms, &layer->attn_post},
        {"post_ffw_norm.weight", s->n_embd, false, m->arch->post_norms, &layer->ffn_post},
        {"attn_q.bias", q, !m->arch->qkv_bias, true, &layer->q_bias},
        {"attn_k.bias", kv, !m->arch->qkv_bias, true, &layer->k_bias},
        {"attn_v.bias", kv, !m->arch->qkv_bias, true, &layer->v_bias},
        {"attn_q_norm.weight", s->head_dim, false, m->arch->qk_norm, &layer->q_norm},
        {"attn_k_norm.weight", s->head_dim, false, m->arch->qk_norm, &layer->k_norm},
    };
    char name[64];
    quarry_code code = QUARRY_OK;
    for (size_t i = 0; i < sizeof matrices / sizeof matrices[0] && code == QUARRY_OK; i++)
        code = load_matrix(l, layer_name(name, sizeof name, index, matrices[i].part), matrices[i].rows, matrices[i].cols, false,
                           matrices[i].w);
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0] && code == QUARRY_OK; i++)
        if (vectors[i].wanted)
            code = load_vector(l, layer_name(name, sizeof name, index, vectors[i].part), vectors[i].n, vectors[i].optional, vectors[i].out);
    return code;
}

/* Radians per position of each pair; factors[n_rot / 2] divide them, or NULL. */
static double *rope_angles(loader *l, float base, const float *factors)
{
    int n_rot = l->m->shape.n_rot;
    double *inverse = arena_alloc(&l->m->small, (size_t)n_rot / 2, sizeof *inverse, l->error);
    for (int i = 0; inverse && i < n_rot / 2; i++) inverse[i] = pow((double)base, -2.0 * i / n_rot) / (factors ? (double)factors[i] : 1);
    return inverse;
}

/* `rope_freqs` (Llama 3) has factors; layers with a window have a base of their own (Gemma 3). */
static quarry_code load_rope(loader *l)
{
    quarry_model *m = l->m;
    int n = m->shape.n_rot / 2;
    float *factors = NULL;
    quarry_code code = load_vector(l, "rope_freqs.weight", n, true, &factors);
    if (code != QUARRY_OK) return code;
    for (int i = 0; factors && i < n; i++)
        if (!(factors[i] > 0)) return fail(l, QUARRY_ERROR_FORMAT, "has a factor that is not positive", "rope_freqs.weight");
    const bool local = m->shape.n_local > 0;
    if (!(m->rope_inverse[0] = rope_angles(l, m->shape.rope_base, factors))) return QUARRY_ERROR_MEMORY;
    if (local && !(m->rope_inverse[1] = rope_angles(l, m->arch->local_base, NULL))) return QUARRY_ERROR_MEMORY;
    return QUARRY_OK;
}

static void number_layers(quarry_model *m)
{
    const int every = m->arch->global_every;
    int n_global = 0, n_local = 0;
    for (int i = 0; i < m->shape.n_layer; i++) {
        const bool local = m->shape.n_local > 0 && (i + 1) % every != 0;
        m->layers[i].local = local;
        m->layers[i].kv_layer = local ? m->shape.n_layer - m->shape.n_local + n_local++ : n_global++;
    }
}

static quarry_code check_all_used(loader *l)
{
    quarry_model *m = l->m;
    if (l->n_used == gguf_n_tensors(m->file)) return QUARRY_OK;
    return error_set(l->error, QUARRY_ERROR_UNSUPPORTED,
                     "%s: %lld of its %lld tensors are not part of architecture %s as this version knows it; it would give wrong text",
                     gguf_path(m->file), (long long)(gguf_n_tensors(m->file) - l->n_used), (long long)gguf_n_tensors(m->file),
                     m->arch->name);
}

static quarry_code check_room(const loader *l, size_t n_bytes)
{
    memory_available available;
    memory_available_get("", &available);
    const uint64_t left = available.address < available.bytes ? available.address : available.bytes;
    if (n_bytes <= left) return QUARRY_OK;
    return error_set(l->error, QUARRY_ERROR_MEMORY,
                     "%s: the weights take %.0f MiB of memory, and %s leaves %.0f: use a smaller model, or one quantised to fewer bits",
                     gguf_path(l->m->file), (double)n_bytes / (1 << 20), left < available.bytes ? available.address_limit : available.limit,
                     (double)left / (1 << 20));
}

/* Memory for all matrices at once: apart, most are too small for huge pages. */
static quarry_code reserve_matrices(loader *l)
{
    size_t n_bytes = 0, n_copied = 0, largest = 0;
    const bool mapped = gguf_is_mapped(l->m->file);
    for (int64_t i = 0; i < gguf_n_tensors(l->m->file); i++) {
        const gguf_tensor *t = gguf_tensor_at(l->m->file, i);
        const size_t packed = t->n_dims == 2 ? weight_packed_bytes(t->type, t->dims[1], t->dims[0]) : 0;
        n_bytes += (packed + 63) / 64 * 64;
        if (mapped) continue;
        if (!packed) n_copied += t->n_bytes;
        if (t->n_bytes > largest) largest = t->n_bytes; /* what is packed was read before */
    }
    const quarry_code code = check_room(l, n_bytes + n_copied + largest);
    if (code != QUARRY_OK) return code;
    return arena_reserve(&l->m->packed, n_bytes, l->error);
}

/* Gives back the pages of what was copied once more: faults in one tensor bring in pages of those beside it, which were given back before. */
static void release_copied(const quarry_model *m)
{
    const gguf_file *g = m->file;
    uint64_t first = 0;
    for (int64_t i = 0; i < gguf_n_tensors(g); i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        if (t->n_dims != 2 || weight_packed_bytes(t->type, t->dims[1], t->dims[0])) continue;
        gguf_release(g, first, t->offset);
        first = t->offset + t->n_bytes;
    }
    gguf_release(g, first, gguf_size(g));
}

quarry_code model_load_weights(quarry_model *m, quarry_error *error)
{
    quarry_error own = {0}; /* gguf_tensor_data reports only through an error */
    loader l = {.m = m, .error = error ? error : &own};
    const model_shape *s = &m->shape;
    m->copies = memory_zero((size_t)gguf_n_tensors(m->file), sizeof *m->copies, "model", l.error);
    m->layers = m->copies ? arena_alloc(&m->small, (size_t)s->n_layer, sizeof *m->layers, l.error) : NULL;
    if (!m->layers) return QUARRY_ERROR_MEMORY;
    memset(m->layers, 0, (size_t)s->n_layer * sizeof *m->layers);
    number_layers(m);
    quarry_code code = reserve_matrices(&l);
    if (code == QUARRY_OK) code = load_matrix(&l, "token_embd.weight", s->n_vocab, s->n_embd, false, &m->embedding);
    for (int i = 0; i < s->n_layer && code == QUARRY_OK; i++) code = load_layer(&l, i);
    if (code == QUARRY_OK) code = load_vector(&l, "output_norm.weight", s->n_embd, false, &m->output_norm);
    m->tied = !gguf_find(m->file, "output.weight");
    if (code == QUARRY_OK) code = load_matrix(&l, "output.weight", s->n_vocab, s->n_embd, true, &m->output);
    if (code == QUARRY_OK) code = load_rope(&l);
    if (code == QUARRY_OK) code = check_all_used(&l);
    if (code == QUARRY_OK) code = gguf_check(m->file, l.error);
    int most = 0;
    for (int i = 0; i < 32; i++)
        if (l.weights_of_type[i] > l.weights_of_type[most]) most = i;
    m->quantization = block_type_name((uint32_t)most);
    release_copied(m);
    return code;
}
