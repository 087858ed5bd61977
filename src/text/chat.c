#include <stdio.h>
#include <string.h>

#include "text/tokenizer.h"
#include "text/unicode.h"

typedef enum chat_role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT } chat_role;

typedef enum system_place {
    SYSTEM_OWN_TURN,
    SYSTEM_IN_FIRST_USER, /* in front of the text of the user's turn that follows */
    SYSTEM_IN_LAST_USER,  /* in front of the text of the last user's turn */
} system_place;

/* In markup these bytes stand for the tokenizer's BOS and EOS and for the date that the template's text names. */
#define BOS "\x01"
#define EOS "\x02"
#define DATE "\x03"

struct chat_template {
    const char *name;
    const char *bos, *eos;          /* as text, for chat_render; bos NULL: unknown, or the family writes none */
    const char *open[3], *close[3]; /* by role */
    const char *generation;         /* opens the assistant's turn to be generated */
    system_place place;
    bool bos_in_turns; /* the user's turns open with BOS themselves, unless the template's text does otherwise */
    bool trim;         /* white space around a message is dropped, unless the template's text does otherwise */
    bool system_empty; /* a conversation begins with a system turn even if it has none to say */
};

static const chat_template families[] = {
    {.name = "chatml",
     .eos = "<|im_end|>",
     .open = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},
     .close = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},
     .generation = "<|im_start|>assistant\n"},
    {.name = "llama-2",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"<<SYS>>\n", BOS "[INST] ", " "},
     .close = {"\n<</SYS>>\n\n", " [/INST]", " " EOS},
     .generation = "",
     .place = SYSTEM_IN_FIRST_USER,
     .bos_in_turns = true,
     .trim = true},
    {.name = "llama-3",
     .bos = "<|begin_of_text|>",
     .eos = "<|eot_id|>",
     .open = {"<|start_header_id|>system<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n",
              "<|start_header_id|>assistant<|end_header_id|>\n\n"},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .generation = "<|start_header_id|>assistant<|end_header_id|>\n\n",
     .trim = true},
    {.name = "llama-3.1",
     .bos = "<|begin_of_text|>",
     .eos = "<|eot_id|>",
     .open = {"<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: " DATE "\n\n",
              "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"},
     .close = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},
     .generation = "<|start_header_id|>assistant<|end_header_id|>\n\n",
     .trim = true,
     .system_empty = true},
    {.name = "mistral-v1",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"", " [INST] ", " "},
     .close = {"\n\n", " [/INST]", EOS},
     .generation = "",
     .place = SYSTEM_IN_FIRST_USER},
    {.name = "mistral-v3",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"", "[INST] ", " "},
     .close = {"\n\n", "[/INST]", EOS},
     .generation = "",
     .place = SYSTEM_IN_LAST_USER},
    {.name = "mistral-v3-tekken",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"", "[INST]", ""},
     .close = {"\n\n", "[/INST]", EOS},
     .generation = "",
     .place = SYSTEM_IN_LAST_USER},
    {.name = "mistral-v7",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"[SYSTEM_PROMPT] ", "[INST] ", " "},
     .close = {"[/SYSTEM_PROMPT]", "[/INST]", EOS},
     .generation = ""},
    {.name = "mistral-v7-tekken",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"[SYSTEM_PROMPT]", "[INST]", ""},
     .close = {"[/SYSTEM_PROMPT]", "[/INST]", EOS},
     .generation = ""},
    {.name = "mistral",
     .bos = "<s>",
     .eos = "</s>",
     .open = {"", "[INST] ", ""},
     .close = {"\n\n", " [/INST]", EOS},
     .generation = "",
     .place = SYSTEM_IN_FIRST_USER},
    {.name = "gemma",
     .bos = "<bos>",
     .eos = "<end_of_turn>",
     .open = {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},
     .close = {"\n\n", "<end_of_turn>\n", "<end_of_turn>\n"},
     .generation = "<start_of_turn>model\n",
     .place = SYSTEM_IN_FIRST_USER,
     .trim = true},
    {.name = "phi-3",
     .bos = "<s>",
     .eos = "<|endoftext|>",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {"<|end|>\n", "<|end|>\n", "<|end|>\n"},
     .generation = "<|assistant|>\n"},
    {.name = "phi-4",
     .eos = "<|im_end|>",
     .open = {"<|im_start|>system<|im_sep|>", "<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"},
     .close = {"<|im_end|>", "<|im_end|>", "<|im_end|>"},
     .generation = "<|im_start|>assistant<|im_sep|>"},
    {.name = "zephyr",
     .eos = "</s>",
     .open = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .close = {EOS "\n", EOS "\n", EOS "\n"},
     .generation = "<|assistant|>\n"},
    {.name = "deepseek",
     .bos = "<\uFF5Cbegin\u2581of\u2581sentence\uFF5C>",
     .eos = "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
     .open = {"", "<\uFF5CUser\uFF5C>", "<\uFF5CAssistant\uFF5C>"},
     .close = {"", "", EOS},
     .generation = "<\uFF5CAssistant\uFF5C>"},
    {.name = "deepseek-r1",
     .bos = "<\uFF5Cbegin\u2581of\u2581sentence\uFF5C>",
     .eos = "<\uFF5Cend\u2581of\u2581sentence\uFF5C>",
     .open = {"", "<\uFF5CUser\uFF5C>", "<\uFF5CAssistant\uFF5C>"},
     .close = {"", "", EOS},
     .generation = "<\uFF5CAssistant\uFF5C><think>\n"},
    /* For models that were never taught turns: the messages one after the other, which the model continues. */
    {.name = "plain", .open = {"", "", ""}, .close = {"\n\n", "", "\n\n"}, .generation = ""},
};

enum { N_FAMILIES = sizeof families / sizeof *families };

/* ---- recognition ---- */

static const chat_template *family(const char *name)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (strcmp(families[i].name, name) == 0) return &families[i];
    return NULL;
}

static const char *recognise_inst(const char *text)
{
    if (strstr(text, "[SYSTEM_PROMPT]")) return strstr(text, "[SYSTEM_PROMPT] ") ? "mistral-v7" : "mistral-v7-tekken";
    if (strstr(text, "' [INST] ' + system_message") || strstr(text, "[AVAILABLE_TOOLS]"))
        return strstr(text, " [INST]") ? "mistral-v1" : strstr(text, "\"[INST]\"") ? "mistral-v3-tekken" : "mistral-v3";
    return strstr(text, "<<SYS>>") ? "llama-2" : "mistral";
}

static const char *recognise(const char *text)
{
    if (strstr(text, "<|im_start|>")) return strstr(text, "<|im_sep|>") ? "phi-4" : "chatml";
    if (strstr(text, "[INST]")) return recognise_inst(text);
    if (strstr(text, "<|start_header_id|>")) return strstr(text, "Cutting Knowledge Date: December 2023") ? "llama-3.1" : "llama-3";
    if (strstr(text, "<start_of_turn>")) return "gemma";
    if (strstr(text, "<|assistant|>") && strstr(text, "<|end|>")) return "phi-3";
    if (strstr(text, "<|assistant|>") && strstr(text, "<|user|>")) {
        if (strstr(text, "eos_token") || strstr(text, "</s>")) return "zephyr";
    }
    if (strstr(text, "<\uFF5CUser\uFF5C>") && strstr(text, "<\uFF5CAssistant\uFF5C>"))
        return strstr(text, "<\uFF5CAssistant\uFF5C><think>\\n'}}") ? "deepseek-r1" : "deepseek";
    return NULL;
}

const chat_template *chat_template_find(const char *template_text, const char *name, quarry_error *error)
{
    const char *found = name ? name : template_text ? recognise(template_text) : NULL;
    const chat_template *c = found ? family(found) : NULL;
    if (c) return c;
    char names[400] = "";
    size_t n = 0;
    for (int i = 0; i < N_FAMILIES && n < sizeof names; i++)
        n += (size_t)snprintf(names + n, sizeof names - n, "%s%s", i > 0 ? ", " : "", families[i].name);
    if (name)
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "unknown chat template \"%.60s\"; known families: %s", name, names);
    else
        error_set(error, QUARRY_ERROR_UNSUPPORTED, "the model's chat template is %s; choose a family with --chat-template: %s",
                  template_text ? "of no known family" : "missing", names);
    return NULL;
}

const char *chat_template_name(const chat_template *c)
{
    return c->name;
}

/* ---- what a template's text says literally ---- */

/* Copies a Jinja string literal's text[n] to out, escapes resolved; returns the length. */
static size_t unescape(const char *text, size_t n, char *out)
{
    size_t n_out = 0;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (c == '\\' && i + 1 < n) {
            c = text[++i];
            c = c == 'n' ? '\n' : c == 't' ? '\t' : c;
        }
        out[n_out++] = c;
    }
    return n_out;
}

/* The system message that a chatml template uses when a conversation has none: '<|im_start|>system\n…<|im_end|>' inside one string literal, or as plain text outside of
 * Jinja's braces. NULL if it writes none out. */
static const char *default_system(const char *text, size_t *n)
{
    static const char opening[] = "<|im_start|>system";
    for (const char *p = text; p && (p = strstr(p, opening)); p++) {
        char quote = p > text && (p[-1] == '\'' || p[-1] == '"') ? p[-1] : '{';
        const char *start = p + strlen(opening);
        if (*start == '\n')
            start++;
        else if (start[0] == '\\' && start[1] == 'n')
            start += 2;
        else
            continue;
        const char *end = strstr(start, "<|im_end|>"), *stop = start;
        while (*stop && *stop != quote) stop += *stop == '\\' && stop[1] ? 2 : 1;
        if (!end || end > stop || end == start) continue;
        *n = (size_t)(end - start);
        return start;
    }
    return NULL;
}

/* Llama 3.1's templates state a date, from the clock or as a default that is written out: the default, so that a saved context stays valid tomorrow. */
static const char *stated_date(const char *text, size_t *n)
{
    static const char fallback[] = "26 Jul 2024", setting[] = "set date_string = \"";
    const char *start = text ? strstr(text, setting) : NULL, *end = NULL;
    if (start) {
        start += strlen(setting);
        end = strchr(start, '"');
    }
    *n = end ? (size_t)(end - start) : strlen(fallback);
    return end ? start : fallback;
}

/* ---- writing ---- */

/* Writes tokens (tokenizer given) or text. The first error stays and stops everything. A space at the end of markup is held back and goes with what follows, as it would if the
 * whole were tokenised at once. */
typedef struct writer {
    const chat_template *family;
    const tokenizer *tokenizer;
    const char *template_text;
    token_list *list;
    char *text, *scratch;
    size_t n, capacity, scratch_capacity;
    bool space, at_start, trim, bos_in_turns, drop_thinking, strip_after_thinking;
    quarry_error *error;
    quarry_code code;
} writer;

static void put(writer *w, const char *text, size_t n, bool markup)
{
    if (w->code != QUARRY_OK || n == 0) return;
    if (!w->tokenizer) {
        if (w->n + n + 1 > w->capacity) {
            size_t capacity = 2 * w->capacity + n + 256;
            if ((w->code = memory_grow(&w->text, capacity, 1, "rendered chat", w->error)) != QUARRY_OK) return;
            w->capacity = capacity;
        }
        memcpy(w->text + w->n, text, n);
        w->n += n;
        return;
    }
    if (w->space) {
        if (n + 1 > w->scratch_capacity) {
            if ((w->code = memory_grow(&w->scratch, n + 1, 1, "chat message", w->error)) != QUARRY_OK) return;
            w->scratch_capacity = n + 1;
        }
        w->scratch[0] = ' ';
        memcpy(w->scratch + 1, text, n++);
        text = w->scratch;
    }
    w->space = markup && text[n - 1] == ' ';
    w->code = tokenizer_encode_part(w->tokenizer, text, n - w->space, markup, &w->at_start, w->list, w->error);
}

/* A space that was held back and that nothing follows which could take it. */
static void put_space(writer *w)
{
    if (!w->space || w->code != QUARRY_OK) return;
    w->space = false;
    w->code = tokenizer_encode_part(w->tokenizer, " ", 1, false, &w->at_start, w->list, w->error);
}

static void put_token(writer *w, int32_t id, const char *text)
{
    if (w->code != QUARRY_OK) return;
    if (!w->tokenizer || id < 0) {
        if (text) put(w, text, strlen(text), true);
        return;
    }
    put_space(w);
    w->code = token_list_push(w->list, id, w->error);
    w->at_start = true;
}

/* A tokenizer without BOS writes none. */
static void put_bos(writer *w)
{
    put_token(w, w->tokenizer ? tokenizer_bos(w->tokenizer) : -1, w->tokenizer ? NULL : w->family->bos);
}

static void put_markup(writer *w, const char *markup)
{
    while (*markup) {
        size_t n = strcspn(markup, BOS EOS DATE);
        put(w, markup, n, true);
        markup += n;
        if (*markup == *BOS && w->bos_in_turns) put_bos(w);
        if (*markup == *EOS) put_token(w, w->tokenizer ? tokenizer_eos(w->tokenizer) : -1, w->family->eos);
        if (*markup == *DATE) {
            const char *date = stated_date(w->template_text, &n);
            put(w, date, n, true);
        }
        markup += *markup != 0;
    }
}

static bool is_white(const char *text, size_t n, size_t *length)
{
    uint32_t cp;
    *length = utf8_decode(text, n, &cp);
    return cp != UTF8_INVALID && (unicode_class_of(cp) == UNICODE_SPACE || (cp >= 0x1C && cp <= 0x1F));
}

static chat_part trim_left(chat_part p)
{
    size_t length;
    while (p.n_bytes > 0 && is_white(p.text, p.n_bytes, &length)) {
        p.text += length;
        p.n_bytes -= length;
    }
    return p;
}

static chat_part trim_right(chat_part p)
{
    while (p.n_bytes > 0) {
        size_t start = p.n_bytes - 1, length;
        while (start > 0 && p.n_bytes - start < 4 && ((unsigned char)p.text[start] & 0xC0) == 0x80) start--;
        if (!is_white(p.text + start, p.n_bytes - start, &length) || length != p.n_bytes - start) break;
        p.n_bytes = start;
    }
    return p;
}

/* Reasoning models leave the thoughts of earlier answers out: what follows the last "</think>" is the text of the returned part from *offset on. */
static int skip_thinking(const chat_message *m, bool strip, size_t *offset)
{
    static const char end[] = "</think>";
    for (int k = m->n_parts - 1; k >= 0; k--) {
        const char *text = m->parts[k].text;
        for (size_t i = m->parts[k].n_bytes; i >= strlen(end); i--) {
            if (memcmp(text + i - strlen(end), end, strlen(end)) != 0) continue;
            while (strip && i < m->parts[k].n_bytes && text[i] == '\n') i++;
            *offset = i;
            return k;
        }
    }
    *offset = 0;
    return 0;
}

/* The message's text; *split, if not NULL, receives the list's length before the last part. */
static void put_content(writer *w, const chat_message *m, bool left, bool right, bool drop_thinking, int64_t *split)
{
    size_t offset = 0;
    int first = drop_thinking ? skip_thinking(m, w->strip_after_thinking, &offset) : 0, last = m->n_parts - 1;
    if (split) *split = w->list->n;
    while (left && first < last && offset == 0 && trim_left(m->parts[first]).n_bytes == 0) first++;
    int end = last;
    while (right && end > first && trim_right(m->parts[end]).n_bytes == 0) end--;
    for (int k = first; k <= end; k++) {
        chat_part p = m->parts[k];
        if (k == first) p = (chat_part){p.text + offset, p.n_bytes - offset};
        if (left && k == first) p = trim_left(p);
        if (right && k == end) p = trim_right(p);
        if (k == last && split) *split = w->list->n;
        put(w, p.text, p.n_bytes, false);
    }
    if (end < last && split) *split = w->list->n;
}

/* ---- conversations ---- */

static bool role_parse(const char *role, chat_role *r)
{
    static const char *const names[] = {"system", "user", "assistant"};
    for (int i = 0; i < 3; i++) {
        *r = (chat_role)i;
        if (role && strcmp(role, names[i]) == 0) return true;
    }
    return false;
}

/* The user's message number i carries the system's text: number of the message it comes from, or -1. */
static int carried_system(const chat_template *c, const chat_message *messages, int n_messages, int i)
{
    chat_role r;
    if (c->place == SYSTEM_IN_FIRST_USER) return i > 0 && role_parse(messages[i - 1].role, &r) && r == ROLE_SYSTEM ? i - 1 : -1;
    for (int k = i + 1; k < n_messages; k++)
        if (role_parse(messages[k].role, &r) && r == ROLE_USER) return -1;
    for (int k = i - 1; k >= 0; k--)
        if (role_parse(messages[k].role, &r) && r == ROLE_SYSTEM) return k;
    return -1;
}

static void put_message(writer *w, const chat_message *messages, int n_messages, int i, chat_role role, int64_t *split)
{
    const chat_template *c = w->family;
    if (role == ROLE_SYSTEM && c->place != SYSTEM_OWN_TURN) return;
    int system = role == ROLE_USER && c->place != SYSTEM_OWN_TURN ? carried_system(c, messages, n_messages, i) : -1;
    put_markup(w, c->open[role]);
    if (system >= 0) {
        put_markup(w, c->open[ROLE_SYSTEM]);
        put_content(w, &messages[system], false, false, false, NULL);
        put_markup(w, c->close[ROLE_SYSTEM]);
    }
    put_content(w, &messages[i], w->trim, w->trim, w->drop_thinking && role == ROLE_ASSISTANT, i == n_messages - 1 ? split : NULL);
    put_markup(w, c->close[role]);
}

/* What a conversation begins with: BOS, and a system turn if it has none but the template writes one. */
static void put_beginning(writer *w, bool has_system)
{
    const chat_template *c = w->family;
    bool writes_bos = w->template_text ? strstr(w->template_text, "bos_token") != NULL : c->bos != NULL;
    if (!w->bos_in_turns && (writes_bos || (w->tokenizer && w->tokenizer->add_bos))) put_bos(w);
    if (has_system) return;
    size_t n = 0;
    const char *text = strcmp(c->name, "chatml") == 0 && w->template_text ? default_system(w->template_text, &n) : NULL;
    if (!text && !c->system_empty) return;
    put_markup(w, c->open[ROLE_SYSTEM]);
    if (text) {
        char *plain = memory_alloc(n, 1, "system message", w->error);
        if (plain)
            put(w, plain, unescape(text, n, plain), false);
        else
            w->code = QUARRY_ERROR_MEMORY;
        memory_free(plain);
    }
    put_markup(w, c->close[ROLE_SYSTEM]);
}

static quarry_code write_chat(writer *w, const chat_message *messages, int n_messages, bool first, bool add_generation_prompt,
                              int64_t *split)
{
    chat_role role = ROLE_USER;
    bool has_system = false;
    const char *text = w->template_text;
    w->trim = w->family->trim && (!text || strstr(text, "strip()") || strstr(text, "trim"));
    w->bos_in_turns = w->family->bos_in_turns && (!text || strstr(text, "bos_token + '[INST]"));
    w->drop_thinking = text && strstr(text, "split('</think>')");
    w->strip_after_thinking = text && strstr(text, "split('</think>')[-1].lstrip(");
    for (int i = 0; i < n_messages; i++) {
        if (!role_parse(messages[i].role, &role))
            return error_set(w->error, QUARRY_ERROR_ARGUMENT, "unknown role \"%.40s\"; a message is from system, user or assistant",
                             messages[i].role ? messages[i].role : "");
        has_system |= role == ROLE_SYSTEM;
    }
    if (role == ROLE_SYSTEM && n_messages > 0 && w->family->place != SYSTEM_OWN_TURN)
        return error_set(w->error, QUARRY_ERROR_ARGUMENT,
                         "chat template %s puts the system message into the user's: a user message must follow it", w->family->name);
    if (first) put_beginning(w, has_system);
    for (int i = 0; i < n_messages && role_parse(messages[i].role, &role); i++) put_message(w, messages, n_messages, i, role, split);
    if (add_generation_prompt) put_markup(w, w->family->generation);
    put_space(w);
    return w->code;
}

quarry_code chat_encode(const chat_template *c, const tokenizer *t, const char *template_text, const chat_message *messages, int n_messages,
                        bool first, bool add_generation_prompt, token_list *list, int64_t *split, quarry_error *error)
{
    int64_t n_before = list->n;
    writer w = {.family = c, .tokenizer = t, .template_text = template_text, .list = list, .at_start = true, .error = error};
    if (split) *split = n_before;
    quarry_code code = write_chat(&w, messages, n_messages, first, add_generation_prompt, split);
    if (code != QUARRY_OK) list->n = n_before;
    memory_free(w.scratch);
    return code;
}

char *chat_render(const chat_template *c, const char *template_text, const chat_message *messages, int n_messages, bool first,
                  bool add_generation_prompt, quarry_error *error)
{
    writer w = {.family = c, .template_text = template_text, .error = error};
    quarry_code code = write_chat(&w, messages, n_messages, first, add_generation_prompt, NULL);
    char *text = code == QUARRY_OK ? memory_string(w.text ? w.text : "", w.n, error) : NULL;
    memory_free(w.text);
    return text;
}
