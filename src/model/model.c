/* Opening a model: metadata to shape, then weights, tokenizer and chat template. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/internal.h"

static int64_t arch_int(const quarry_model *m, const char *key, int64_t def)
{
    char full[128];
    snprintf(full, sizeof full, "%s.%s", m->arch->name, key);
    return gguf_int(m->file, full, def);
}

static double arch_float(const quarry_model *m, const char *key, double def)
{
    char full[128];
    snprintf(full, sizeof full, "%s.%s", m->arch->name, key);
    return gguf_float(m->file, full, def);
}

/* A dimension from the metadata, within bounds that keep all later products inside int64. */
static quarry_code dimension(const quarry_model *m, const char *key, int64_t def, int64_t max, int64_t *out, quarry_error *error)
{
    *out = arch_int(m, key, def);
    if (*out >= 1 && *out <= max) return QUARRY_OK;
    return error_set(error, QUARRY_ERROR_FORMAT, "%s: %s.%s is missing or out of range (%lld; 1 to %lld)", gguf_path(m->file),
                     m->arch->name, key, (long long)*out, (long long)max);
}

static quarry_code unsupported(const quarry_model *m, const char *what, quarry_error *error)
{
    return error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s: %s is not supported yet", gguf_path(m->file), what);
}

/* What the metadata may ask for that the forward pass does not do. */
static quarry_code check_features(const quarry_model *m, quarry_error *error)
{
    char key[128];
    snprintf(key, sizeof key, "%s.rope.scaling.type", m->arch->name);
    const char *scaling = gguf_string(m->file, key, NULL);
    if (scaling && strcmp(scaling, "none") != 0 && arch_float(m, "rope.scaling.factor", 1) != 1)
        return unsupported(m, "RoPE scaling", error);
    if (arch_int(m, "expert_count", 0) > 0) return unsupported(m, "a mixture of experts", error);
    if (arch_float(m, "final_logit_softcapping", 0) != 0 || arch_float(m, "attn_logit_softcapping", 0) != 0)
        return unsupported(m, "soft capping of logits", error);
    if (arch_int(m, "attention.value_length", m->shape.head_dim) != m->shape.head_dim)
        return unsupported(m, "a value length that differs from the key length", error);
    return QUARRY_OK;
}

/* Layers with a sliding window, and how wide it is. */
static quarry_code read_window(quarry_model *m, quarry_error *error)
{
    model_shape *s = &m->shape;
    int64_t window;
    if (m->arch->global_every == 0) return QUARRY_OK;
    quarry_code code = dimension(m, "attention.sliding_window", 0, 1 << 24, &window, error);
    if (code != QUARRY_OK) return code;
    s->window = (int)window;
    s->n_local = s->n_layer - s->n_layer / m->arch->global_every;
    return s->n_local < s->n_layer ? QUARRY_OK : unsupported(m, "a model without a layer that sees the whole context", error);
}

static quarry_code read_shape(quarry_model *m, quarry_error *error)
{
    model_shape *s = &m->shape;
    int64_t n_layer, n_head, n_head_kv, head_dim, n_rot;
    quarry_code code;
    if ((code = dimension(m, "block_count", 0, 1024, &n_layer, error)) != QUARRY_OK ||
        (code = dimension(m, "embedding_length", 0, 1 << 20, &s->n_embd, error)) != QUARRY_OK ||
        (code = dimension(m, "feed_forward_length", 0, 1 << 22, &s->n_ff, error)) != QUARRY_OK ||
        (code = dimension(m, "context_length", 0, (int64_t)1 << 31, &s->n_ctx_train, error)) != QUARRY_OK ||
        (code = dimension(m, "attention.head_count", 0, 4096, &n_head, error)) != QUARRY_OK ||
        (code = dimension(m, "attention.head_count_kv", n_head, 4096, &n_head_kv, error)) != QUARRY_OK ||
        (code = dimension(m, "attention.key_length", s->n_embd / n_head, 1024, &head_dim, error)) != QUARRY_OK ||
        (code = dimension(m, "rope.dimension_count", head_dim, 1024, &n_rot, error)) != QUARRY_OK)
        return code;
    const gguf_tensor *embedding = gguf_find(m->file, "token_embd.weight");
    s->n_vocab = tokenizer_size(m->tokenizer);
    if (embedding && embedding->dims[1] > s->n_vocab) s->n_vocab = embedding->dims[1]; /* padded vocabularies */
    if (n_head % n_head_kv != 0 || n_head / n_head_kv > 64 || n_rot % 2 != 0 || n_rot > head_dim)
        return error_set(error, QUARRY_ERROR_FORMAT,
                         "%s: %lld query heads, %lld KV heads and %lld rotated of %lld dimensions do not fit together", gguf_path(m->file),
                         (long long)n_head, (long long)n_head_kv, (long long)n_rot, (long long)head_dim);
    if (head_dim % ATTN_HEAD_MULTIPLE != 0) return unsupported(m, "a head dimension that is no multiple of 8", error);
    s->n_layer = (int)n_layer;
    s->n_head = (int)n_head;
    s->n_head_kv = (int)n_head_kv;
    s->head_dim = (int)head_dim;
    s->n_rot = (int)n_rot;
    s->rms_eps = (float)arch_float(m, "attention.layer_norm_rms_epsilon", 1e-5);
    s->rope_base = (float)arch_float(m, "rope.freq_base", 10000);
    if (!(s->rms_eps > 0 && s->rope_base > 1) || !isfinite(s->rope_base))
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: RMS epsilon %g or RoPE base %g is out of range", gguf_path(m->file),
                         (double)s->rms_eps, (double)s->rope_base);
    if ((code = check_features(m, error)) != QUARRY_OK || (code = read_window(m, error)) != QUARRY_OK) return code;
    return gguf_metadata_error(m->file, error);
}

static quarry_code find_arch(quarry_model *m, quarry_error *error)
{
    char known[256];
    const char *name = gguf_string(m->file, "general.architecture", NULL);
    if (!name)
        return error_set(error, QUARRY_ERROR_FORMAT, "%s: general.architecture is missing; not a language model", gguf_path(m->file));
    m->arch = model_arch_find(name);
    if (m->arch) return QUARRY_OK;
    model_arch_names(known, sizeof known);
    return error_set(error, QUARRY_ERROR_UNSUPPORTED, "%s: architecture not supported: %.64s (supported: %s)", gguf_path(m->file), name,
                     known);
}

static quarry_code copy_string(const gguf_file *g, const char *key, char **out, quarry_error *error)
{
    size_t n;
    const char *text = gguf_string(g, key, &n);
    if (!text) return QUARRY_OK;
    *out = memory_string(text, n, error);
    return *out ? QUARRY_OK : QUARRY_ERROR_MEMORY;
}

static quarry_code find_chat(quarry_model *m, const char *family, quarry_error *error)
{
    quarry_code code = copy_string(m->file, "tokenizer.chat_template", &m->chat_text, error);
    if (code != QUARRY_OK) return code;
    if (m->chat_text || family)
        m->chat = chat_template_find(m->chat_text, family, &m->chat_error);
    else
        error_set(&m->chat_error, QUARRY_ERROR_UNSUPPORTED,
                  "%s has no chat template; name a family with --chat-template, or plain for a model that only continues text",
                  gguf_path(m->file));
    if (!m->chat && family) { /* the user's own choice was wrong: say so now */
        if (error) *error = m->chat_error;
        return m->chat_error.code;
    }
    return QUARRY_OK;
}

enum { FINGERPRINT_METHOD = 1 }; /* to be counted up when take_fingerprint changes */

/* Of the tensors' names, shapes and data, and of the texts of all tokens (XXH3, 64 bits). */
static quarry_code take_fingerprint(quarry_model *m, quarry_error *error)
{
    XXH3_state_t *state = memory_aligned(1, sizeof *state, "fingerprint", error);
    if (!state) return QUARRY_ERROR_MEMORY;
    quarry_code code = QUARRY_OK;
    XXH3_64bits_reset(state);
    for (int64_t i = 0; i < gguf_n_tensors(m->file) && code == QUARRY_OK; i++) {
        const gguf_tensor *t = gguf_tensor_at(m->file, i);
        void *copy = NULL;
        const void *data = gguf_tensor_data(m->file, t, &copy, error);
        if (!data) code = QUARRY_ERROR_IO;
        XXH3_64bits_update(state, t->name, strlen(t->name));
        XXH3_64bits_update(state, t->dims, sizeof t->dims);
        if (data) XXH3_64bits_update(state, data, t->n_bytes);
        memory_free(copy);
    }
    for (int32_t i = 0; i < m->shape.n_vocab && code == QUARRY_OK; i++) {
        size_t n;
        const char *text = tokenizer_token_bytes(m->tokenizer, i, &n);
        XXH3_64bits_update(state, &n, sizeof n);
        XXH3_64bits_update(state, text, n);
    }
    m->fingerprint = XXH3_64bits_digest(state);
    memory_free(state);
    return code;
}

/* Remembered, or taken and given to be remembered if the file stayed as it was meanwhile. */
static quarry_code find_fingerprint(quarry_model *m, const quarry_fingerprints *known, quarry_error *error)
{
    quarry_file_identity before, after;
    const bool has_identity = known && gguf_identity(m->file, &before);
    if (has_identity) {
        before.method = FINGERPRINT_METHOD;
        if (known->recall(&before, &m->fingerprint, known->data)) return QUARRY_OK;
    }
    const quarry_code code = take_fingerprint(m, error);
    if (code != QUARRY_OK || !has_identity || !gguf_identity(m->file, &after)) return code;
    if (after.n_bytes == before.n_bytes && after.modified == before.modified && after.changed == before.changed)
        known->remember(&before, m->fingerprint, known->data);
    return QUARRY_OK;
}

static quarry_code open_parts(quarry_model *m, const char *path, const quarry_model_params *params, quarry_error *error)
{
    quarry_code code;
    cpu_isa isa;
    if ((code = cpu_choose(&isa, error)) != QUARRY_OK) return code;
    m->kernels = math_kernels_get(isa);
    m->file = gguf_open(path, !params->no_mmap, error);
    if (!m->file) return QUARRY_ERROR_IO;
    if ((code = find_arch(m, error)) != QUARRY_OK) return code;
    m->pool = thread_pool_create(params->n_threads ? params->n_threads : cpu_count(), error);
    m->tokenizer = m->pool ? tokenizer_create(m->file, error) : NULL;
    if (!m->tokenizer) return QUARRY_ERROR_FORMAT;
    if ((code = read_shape(m, error)) != QUARRY_OK) return code;
    if ((code = copy_string(m->file, "general.name", &m->name, error)) != QUARRY_OK) return code;
    if ((code = find_chat(m, params->chat_template, error)) != QUARRY_OK) return code;
    if ((code = find_fingerprint(m, params->fingerprints, error)) != QUARRY_OK) return code;
    if ((code = model_load_weights(m, error)) != QUARRY_OK) return code;
    if (params->mlock) model_lock_weights(m);
    return QUARRY_OK;
}

quarry_model *quarry_model_open(const char *path, const quarry_model_params *params, quarry_error *error)
{
    quarry_model_params defaults = {0};
    if (!params) params = &defaults;
    if (!path || !*path) {
        error_set(error, QUARRY_ERROR_ARGUMENT, "no model file given");
        return NULL;
    }
    quarry_model *m = memory_zero(1, sizeof *m, "model", error);
    if (!m) return NULL;
    pthread_mutex_init(&m->forward_lock, NULL);
    m->log = (logger){params->log, params->log_data};
    if (open_parts(m, path, params, error) != QUARRY_OK) {
        quarry_model_close(m);
        return NULL;
    }
    log_line(&m->log, QUARRY_LOG_INFO, "%s: %s, %s, %lld parameters, %.1f MB of weights, %s kernels, %d threads", path, m->arch->name,
             m->quantization, (long long)m->n_params, (double)m->weight_bytes / 1e6, m->kernels->isa, thread_pool_size(m->pool));
    return m;
}

void quarry_model_close(quarry_model *m)
{
    if (!m) return;
    model_unlock_weights(m);
    for (int i = 0; m->layers && i < m->shape.n_layer; i++) {
        model_layer *l = &m->layers[i];
        weight *all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (size_t j = 0; j < sizeof all / sizeof all[0]; j++) weight_free(all[j]);
    }
    weight_free(&m->embedding);
    weight_free(&m->output);
    for (int64_t i = 0; i < m->n_copies; i++) memory_free(m->copies[i]);
    memory_free(m->copies);
    arena_free(&m->packed);
    arena_free(&m->small);
    tokenizer_destroy(m->tokenizer);
    thread_pool_destroy(m->pool);
    gguf_close(m->file);
    memory_free(m->name);
    memory_free(m->chat_text);
    pthread_mutex_destroy(&m->forward_lock);
    memory_free(m);
}

void quarry_model_get_info(const quarry_model *m, quarry_model_info *info)
{
    const model_shape *s = &m->shape;
    *info = (quarry_model_info){
        .name = m->name ? m->name : "",
        .architecture = m->arch->name,
        .quantization = m->quantization,
        .chat_template = m->chat ? chat_template_name(m->chat) : "",
        .tokenizer = tokenizer_name(m->tokenizer),
        .kernels = m->kernels->isa,
        .n_layer = s->n_layer,
        .n_head = s->n_head,
        .n_head_kv = s->n_head_kv,
        .head_dim = s->head_dim,
        .n_embd = (int)s->n_embd,
        .n_vocab = (int)s->n_vocab,
        .n_threads = thread_pool_size(m->pool),
        .n_ctx_train = s->n_ctx_train,
        .n_params = m->n_params,
        .weight_bytes = m->weight_bytes,
        .kv_bytes_per_token = kv_row_bytes(KV_F16, s->head_dim) * (size_t)s->n_head_kv * (size_t)(s->n_layer - s->n_local),
    };
}

const char *quarry_version(void)
{
    return QUARRY_VERSION;
}

void quarry_free(void *memory)
{
    memory_free(memory);
}

int64_t quarry_tokenize(const quarry_model *m, const char *text, size_t n_bytes, bool with_special, int32_t **tokens, quarry_error *error)
{
    token_list list = {0};
    int flags = with_special ? TOKENIZE_ADD_BOS | TOKENIZE_SPECIAL : TOKENIZE_PLAIN;
    quarry_code code = tokenizer_encode(m->tokenizer, text, n_bytes, flags, &list, error);
    if (code != QUARRY_OK) {
        token_list_free(&list);
        return code;
    }
    *tokens = list.ids;
    return list.n;
}

const char *quarry_token_text(const quarry_model *m, int32_t token, size_t *n_bytes)
{
    return tokenizer_token_bytes(m->tokenizer, token, n_bytes);
}

bool quarry_token_ends(const quarry_model *m, int32_t token)
{
    return tokenizer_is_end(m->tokenizer, token);
}

const model_shape *model_shape_of(const quarry_model *m)
{
    return &m->shape;
}

const tokenizer *model_tokenizer(const quarry_model *m)
{
    return m->tokenizer;
}

const chat_template *model_chat(const quarry_model *m, quarry_error *error)
{
    if (!m->chat && error) *error = m->chat_error;
    return m->chat;
}

const char *model_chat_text(const quarry_model *m)
{
    return m->chat_text;
}

const math_kernels *model_kernels(const quarry_model *m)
{
    return m->kernels;
}

thread_pool *model_pool(const quarry_model *m)
{
    return m->pool;
}

const logger *model_logger(const quarry_model *m)
{
    return &m->log;
}

attn_shape model_attn_shape(const quarry_model *m, kv_type type)
{
    const model_shape *s = &m->shape;
    return (attn_shape){
        .kv = {.n_layer = s->n_layer - s->n_local,
               .n_head_kv = s->n_head_kv,
               .head_dim = s->head_dim,
               .type = type,
               .n_local = s->n_local,
               .window = s->window},
        .n_head = s->n_head,
        .scale = 1 / sqrtf((float)s->head_dim),
        .rope = {.n_rot = s->n_rot, .halves = m->arch->rope_halves, .inverse = m->rope_inverse[0]},
        .fingerprint = m->fingerprint,
    };
}

void model_lock(quarry_model *m)
{
    pthread_mutex_lock(&m->forward_lock);
}

void model_unlock(quarry_model *m)
{
    pthread_mutex_unlock(&m->forward_lock);
}
