/* Shared by the files of this room. */
#ifndef MODEL_INTERNAL_H
#define MODEL_INTERNAL_H

#include <pthread.h>

#include "model/model.h"

/* An architecture as data: what differs between the families that one forward pass serves. */
typedef struct model_arch {
    const char *name;     /* general.architecture */
    bool rope_halves;     /* RoPE pairs (i, i + n_rot/2) instead of (2i, 2i+1) */
    bool qkv_bias;        /* attn_q/k/v.bias are required */
    bool qk_norm;         /* RMS norm of every query and key head before RoPE */
    bool post_norms;      /* RMS norm of what attention and feed-forward add to the residual stream */
    bool scale_embedding; /* embeddings times sqrt(n_embd) */
    bool gelu;            /* gate through GELU (tanh) instead of SiLU */
    int global_every;     /* > 0: of that many layers the last sees everything, the others attention.sliding_window tokens */
    float local_base;     /* RoPE base of those others */
} model_arch;

const model_arch *model_arch_find(const char *name); /* NULL if not supported */
void model_arch_names(char *out, size_t capacity);   /* "llama, qwen2, …" */

typedef struct model_layer {
    bool local;                      /* sees the last `window` tokens only */
    int kv_layer;                    /* number in the cache, where those that see everything come first */
    float *attn_norm, *ffn_norm;     /* [n_embd] */
    float *attn_post, *ffn_post;     /* [n_embd] or NULL */
    float *q_norm, *k_norm;          /* [head_dim] or NULL */
    float *q_bias, *k_bias, *v_bias; /* [n_head * head_dim], [n_head_kv * head_dim] or NULL */
    weight q, k, v, o;               /* [n_head d][n_embd], [n_head_kv d][n_embd] twice, [n_embd][n_head d] */
    weight gate, up, down;           /* [n_ff][n_embd] twice, [n_embd][n_ff] */
} model_layer;

struct quarry_model {
    gguf_file *file;
    char *name, *chat_text; /* general.name; tokenizer.chat_template or NULL */
    const model_arch *arch;
    model_shape shape;
    const math_kernels *kernels;
    thread_pool *pool;
    tokenizer *tokenizer;
    const chat_template *chat; /* NULL: chat_error says why */
    quarry_error chat_error;
    const char *quantization;
    int64_t n_params;
    size_t weight_bytes;
    arena packed;            /* matrices */
    arena small;             /* norms, biases, layers, rope factors */
    model_layer *layers;     /* [n_layer] */
    float *output_norm;      /* [n_embd] */
    weight embedding;        /* [n_vocab][n_embd] */
    weight output;           /* the same; not used when tied */
    bool tied;               /* output is embedding */
    double *rope_inverse[2]; /* [n_rot / 2] radians per position: of layers that see everything, of local ones */
    uint64_t fingerprint;    /* of tensors and tokenizer */
    void **copies;           /* source blocks read into memory that weights refer to (no mmap, types without a packed layout) */
    int64_t n_copies;
    bool locked; /* the weights are kept in RAM */
    pthread_mutex_t forward_lock;
    logger log;
};

/* memory.c: keeps the weights in RAM, or tells the log why not. */
void model_lock_weights(quarry_model *m);
void model_unlock_weights(quarry_model *m);

/* load.c: fills everything from m->file on. */
quarry_code model_load_weights(quarry_model *m, quarry_error *error);

#endif
