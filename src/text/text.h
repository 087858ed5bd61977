/* text: tokenizers and chat templates, made from a GGUF file's metadata. Immutable and thread-safe after creation. */
#ifndef TEXT_TEXT_H
#define TEXT_TEXT_H

#include "base/base.h"
#include "gguf/gguf.h"

/* ---- tokenizer ---- */

typedef struct tokenizer tokenizer;

/* Kinds: model "gpt2" (byte-level BPE; pre-tokenizers smollm, qwen2, llama-bpe, gpt-2 and their aliases; gpt-2 if none is named), model "llama" (SentencePiece BPE). Others: UNSUPPORTED,
 * naming model and pre-tokenizer. Copies what it needs: the file may be closed. */
tokenizer *tokenizer_create(const gguf_file *g, quarry_error *error);
void tokenizer_destroy(tokenizer *t);
void tokenizer_tally(const tokenizer *t, memory_tally *tally);

/* A growing array of tokens; zero-initialise, free with token_list_free. */
typedef struct token_list {
    int32_t *ids;
    int64_t n, capacity;
} token_list;
void token_list_free(token_list *list);
quarry_code token_list_push(token_list *list, int32_t id, quarry_error *error);

typedef enum tokenize_flags {
    TOKENIZE_PLAIN = 0,
    TOKENIZE_ADD_BOS = 1, /* BOS (and EOS) as the file's add_bos_token says */
    TOKENIZE_SPECIAL = 2, /* special tokens written out in the text become tokens */
} tokenize_flags;

/* Appends the tokens of text[n_bytes] to *list. Time n log n and bounded stack on any input; invalid UTF-8 is taken as bytes. User-defined tokens
 * are recognised without the flag too. Errors (the list is as it was): MEMORY, ARGUMENT (2 GiB or more). */
quarry_code tokenizer_encode(const tokenizer *t, const char *text, size_t n_bytes, int flags, token_list *list, quarry_error *error);

/* Decoded bytes of one token (special tokens: their written form), not NUL-terminated; NULL for an id out of range. */
const char *tokenizer_token_bytes(const tokenizer *t, int32_t id, size_t *n_bytes);
bool tokenizer_is_special(const tokenizer *t, int32_t id);     /* control tokens: not part of shown text */
bool tokenizer_is_end(const tokenizer *t, int32_t id);         /* EOS, EOT, EOM, <|im_end|>, … */
int32_t tokenizer_find(const tokenizer *t, const char *piece); /* id of a token written exactly so, or -1 */
int64_t tokenizer_size(const tokenizer *t);
int32_t tokenizer_bos(const tokenizer *t); /* -1 if none */
int32_t tokenizer_eos(const tokenizer *t);
const char *tokenizer_name(const tokenizer *t); /* "gpt2/smollm" */

/* Streaming detokenizer: holds back bytes of an unfinished UTF-8 character (at most 3). Bytes that can never become a character pass as U+FFFD. */
typedef struct detokenizer {
    char pending[4];
    int n_pending;
    bool at_start; /* SentencePiece drops the space in front of the first piece; set by detokenizer_start */
} detokenizer;
void detokenizer_start(detokenizer *d);
/* Appends the token's text to out (capacity bytes, at least token length + 16); returns bytes written. Special tokens give nothing. If all do not fit, U+FFFD give way. */
size_t detokenizer_push(detokenizer *d, const tokenizer *t, int32_t id, char *out, size_t capacity);
/* What is still held back, as U+FFFD; returns bytes written. */
size_t detokenizer_finish(detokenizer *d, char *out, size_t capacity);

/* ---- chat templates ---- */

typedef struct chat_template chat_template; /* a family: static, immutable */

/* Recognises the family of a Jinja template by its markers; name (a family) overrides it. Errors UNSUPPORTED: unknown template (says to use --chat-template and lists the
 * families), or unknown name. template_text may be NULL when name is given. */
const chat_template *chat_template_find(const char *template_text, const char *name, quarry_error *error);
const char *chat_template_name(
    const chat_template
        *c); /* "chatml", "llama-2", "llama-3", "llama-3.1", "mistral", "mistral-v1", …, "gemma", "phi-3", "zephyr", "deepseek", … */

typedef struct chat_part {
    const char *text;
    size_t n_bytes;
} chat_part;

/* One message; its text is the parts one after the other, each tokenised apart. */
typedef struct chat_message {
    const char *role; /* "system", "user", "assistant" */
    const chat_part *parts;
    int n_parts;
} chat_message;

/* Appends the tokens of messages, and with add_generation_prompt the opening of the assistant's turn. Markup is tokenised with special tokens, message text without
 * (a document cannot forge a turn), each part apart. first: the conversation starts here (BOS, default system prompt if the template has one). *split, if not
 * NULL, receives the list's length just before the last part of the last message (so that what precedes a question can be kept). Errors (the list is as it was): MEMORY, ARGUMENT (a role not named above; a system
 * message that no user message follows, where the family puts it into the user's). */
quarry_code chat_encode(const chat_template *c, const tokenizer *t, const char *template_text, const chat_message *messages, int n_messages,
                        bool first, bool add_generation_prompt, token_list *list, int64_t *split, quarry_error *error);
/* The same as text, for tests and `/apply-template`; free with memory_free. */
char *chat_render(const chat_template *c, const char *template_text, const chat_message *messages, int n_messages, bool first,
                  bool add_generation_prompt, quarry_error *error);

#endif
