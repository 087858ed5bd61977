/* eval: how good and how fast a retrieval policy is. Metrics are plain arithmetic; tasks read a document once, fork the session, and ask under each
 * policy; nothing here prints. */
#ifndef EVAL_EVAL_H
#define EVAL_EVAL_H

#include <stdio.h>

#include "base/base.h"
#include "eval/journal.h"
#include "gen/gen.h"

/* ---- metrics.c ---- */

/* out[n] = logits - log(sum(exp(logits))), in double. */
void metric_log_softmax(const float *logits, int64_t n, double *out);
/* KL divergence sum p (log p - log q) in nats of two distributions given as logarithms, [n] each; terms with p = 0 are 0. Never negative. */
double metric_kld(const double *log_p, const double *log_q, int64_t n);
/* Index of the largest; the lower one of equals. */
int32_t metric_argmax(const float *logits, int64_t n);

/* A growing array of measurements; zero-initialise, free with series_free. */
typedef struct series {
    double *values;
    int64_t n, capacity;
} series;
quarry_code series_push(series *s, double value, quarry_error *error);
void series_free(series *s);

typedef struct metric_summary {
    int64_t n;
    double mean, sd; /* of the sample, n - 1 below; 0 for n < 2 */
    double standard_error, median, p99, max;
} metric_summary;
/* Sorts the values. All zero when there are none. */
void series_summarise(series *s, metric_summary *out);
/* The q-quantile of sorted[n], n > 0, interpolated between neighbours (NumPy's default, Hyndman and Fan's type 7). */
double metric_quantile(const double *sorted, int64_t n, double q);
/* Interval of a share of hits of n, at z standard deviations (1.96: 95 %). E. B. Wilson, JASA 22 (1927). [0, 1] when n is 0. */
void metric_wilson(int64_t hits, int64_t n, double z, double *low, double *high);
/* 95 % interval of the mean of n paired differences between -1 and 1, with the standard deviation sd: normal; where all are the same, nothing is known of what is rarer
 * than one in n / 3 ("rule of three"). */
void metric_loss_interval(int64_t n, double mean, double sd, double *low, double *high);

/* ---- lists.c: what a user writes on the command line ---- */

/* "512,1024" as numbers in a new array (memory_free); what: the flag, for the message. Returns how many, or QUARRY_ERROR_ARGUMENT or _MEMORY. */
int64_t list_parse_numbers(const char *text, const char *what, int64_t min, int64_t max, int64_t **out, quarry_error *error);
/* "ivfpq:budget=0.02,tail=1,window" as policy specs: a piece "option=value" belongs to the spec before it. */
typedef struct policy_list {
    char **specs;
    int n;
} policy_list;
quarry_code policy_list_add(policy_list *list, const char *text, quarry_error *error);
void policy_list_free(policy_list *list);

/* ---- digest.c: SHA-256 in hexadecimal, as sha256sum prints it ---- */

enum { DIGEST_CHARS = 64 + 1 };
void digest_bytes(const void *data, size_t n, char out[DIGEST_CHARS]);
quarry_code digest_file(const char *path, char out[DIGEST_CHARS], quarry_error *error); /* IO, MEMORY */

/* ---- common to the tasks ---- */

typedef struct eval_text {
    const char *name;
    const int32_t *tokens; /* [n_tokens], without BOS */
    int64_t n_tokens;
} eval_text;

/* How documents are read; as the fields of quarry_session_params. */
typedef struct eval_way {
    int n_batch;
    int64_t read_window;
    bool extend;
    const char *
        reference; /* the policy that others are compared with, which reads as they do; NULL: "full", and a document read with full attention */
} eval_way;

/* What a policy read, relative to reading everything. Layers that see a sliding window only, and are read the same under every policy, do not count. */
typedef struct eval_reading {
    double rows_share;   /* K|V rows */
    double index_share;  /* codes, page summaries; bytes of all rows are 1 here and below */
    double tables_share; /* codebooks and bases */
    double tail_share;   /* clusters */
    double bytes_share;  /* the sum */
    double bytes_per_token;
} eval_reading;

/* Answers scored from 0 to 1, of one policy (ruler, doc). */
typedef struct score_result {
    const char *attn, *task;             /* task "all": ruler's counted ones, or all questions of doc */
    int64_t length, n;                   /* tokens (ruler: 0 for "all"; doc: mean of what is read); samples */
    double score, score_low, score_high; /* 0 to 1, with its 95 % interval (Wilson's, as of a share) */
    double score_full;
    double loss, loss_low, loss_high; /* mean of full's score less the policy's of the same sample, with its 95 % interval */
    bool counted;                     /* ruler: full attention is clearly above chance */
    eval_reading reading;
} score_result;

/* ---- kld.c: distance of next-token distributions from those of full attention, teacher-forced ---- */

typedef enum kld_task {
    KLD_PROSE,  /* the text that follows what was read */
    KLD_NEEDLE, /* the digits of the right answer to a question about a needle */
    KLD_TASKS
} kld_task;

extern const char *const kld_task_names[KLD_TASKS]; /* "prose", "needle" */

typedef struct kld_params {
    const char *const *attn; /* [n_attn] policies to compare with "full" */
    int n_attn;
    const eval_text *texts; /* [n_texts] */
    int n_texts;
    int64_t depth;    /* tokens read dense before */
    int64_t n_steps;  /* prose: tokens teacher-forced one by one */
    int samples;      /* prose: places, in turn from each text, spread over it; 0: no prose */
    bool consecutive; /* prose: from the first text's beginning on, one after the other, without what is left at the end of each text */
    int haystacks;    /* needle: documents, in turn from each text; 0: no needles */
    int needles;      /* needle: in each document; every one is asked for */
    uint64_t seed;    /* needle: of places, keys and numbers */
    bool audit;       /* compare what was read with exact scores: costs a full read per step */
    eval_way way;
    journal *journal; /* of finished samples; may be NULL */
} kld_params;

/* A mean over steps that lie together in samples; samples are places (prose) or questions (needle). */
typedef struct kld_summary {
    metric_summary steps;
    double clustered_error; /* standard error from the means of the samples; NAN for fewer than KLD_CLUSTERS */
} kld_summary;

enum { KLD_CLUSTERS = 5 };

typedef struct kld_result {
    const char *attn;
    kld_task task;
    int64_t n_samples;
    kld_summary kld;   /* KLD(full || policy), nats */
    kld_summary nll;   /* negative log likelihood of the next token, nats */
    kld_summary dnll;  /* the policy's less full's */
    double agreement;  /* share of steps whose most likely token is that of full */
    double perplexity; /* of the tokens */
    double mass;       /* audit: share of full's attention mass on rows that were read, mean over steps, layers and heads; else NAN */
    double
        recall; /* audit: share of the selected that are among the as many far tokens of largest score, mean over the same; NAN if nothing was selected */
    int64_t full_correct, correct, kept; /* needle: samples with every digit likeliest; kept by the policy, of those of full */
    double kept_low, kept_high;          /* 95 % interval of kept / full_correct */
    eval_reading reading;
} kld_result;

/* How many results kld_measure fills: for each task asked for, "full" and n_attn policies. */
int kld_n_results(const kld_params *params);
/* results[kld_n_results]: prose first. Errors: ARGUMENT (text too short, unknown policy), CONTEXT (deeper than the model was trained for), UNSUPPORTED (needles,
 * but no known chat template), FORMAT (a record of the journal), CANCELLED. */
quarry_code kld_measure(quarry_model *model, const kld_params *params, const quarry_watch *watch, kld_result *results, quarry_error *error);

/* ---- ppl.c: perplexity, by the same measurement ---- */

/* Fills depth, n_steps, samples and consecutive of params, whose texts are set: windows of so many tokens, of which the last n_scored are scored (0: the second half, as llama-perplexity has it) one by
 * one under the policy, and those before read with full attention. samples 0: every window of the texts. ARGUMENT if a text is shorter than a window, or n_scored than it. */
quarry_code ppl_windows(kld_params *params, int64_t window, int64_t n_scored, int samples, quarry_error *error);

/* ---- haystack.c: a text with needles in it ---- */

enum { NEEDLE_KEY_BYTES = 32, NEEDLE_DIGITS = 7, NEEDLE_MAX = 16, NEEDLE_POSITIONS = 64 };

typedef struct needle {
    char key[NEEDLE_KEY_BYTES];     /* "copper-lantern" */
    char number[NEEDLE_DIGITS + 1]; /* "7316402" */
    double depth;                   /* where in the text it should be, 0 (beginning) to 1 */
    int64_t at;                     /* where it is: first token of its sentence in the haystack */
} needle;

/* The i-th of some thirty thousand keys in an order of its own for each seed; no two i have the same. */
void haystack_key(uint64_t i, uint64_t seed, char *out, size_t capacity);
/* Draws keys and numbers, distinct within the call, and depths: one in each n-th of the text. */
void needle_draw(needle *needles, int n, random_state *random);
/* " One of the special magic numbers for KEY is: NUMBER." (RULER, arXiv 2404.06654); returns the length, less than capacity. */
int needle_sentence(const needle *s, char *out, size_t capacity);
/* The question about it, as it follows the text. */
int needle_question(const needle *s, char *out, size_t capacity);
/* The beginning of a right answer, up to the number. */
int needle_answer_sentence(const needle *s, char *out, size_t capacity);
/* True if an answer contains the number, digits grouped by commas or not. */
bool needle_answered(const needle *s, const char *answer, size_t n_bytes);

/* starts[i] (of n): a sentence begins at token i, so that one can be put in front of it. pieces(i) is the text of token i. */
typedef const char *(*token_text_fn)(const void *data, int32_t token, size_t *n_bytes);
void sentence_starts(const int32_t *tokens, int64_t n, token_text_fn text, const void *data, bool *starts);

/* Fills out[n_tokens] with text from `first` on and the needles' sentences in it, each at the start of a sentence nearest to its depth; sets their `at`.
 * sentences[i] are the tokens of needles[i]. False if the text is too short or the sentences do not fit. */
bool haystack_build(const int32_t *text, const bool *starts, int64_t n_text, int64_t first, needle *needles, const token_list *sentences,
                    int n_needles, int32_t *out, int64_t n_tokens);

/* ---- cite.c: does an answer cite what it was taken from? ---- */

/* *holds: the passage that the session, asked after quarry_session_cite, would cite first has the needle's number in it. document[n_document]: the tokens that its
 * context ends with. */
quarry_code cite_first_holds(const quarry_model *model, const quarry_session *session, const int32_t *document, int64_t n_document,
                             const needle *s, bool *holds, quarry_error *error);

/* ---- needle.c: are needles still found? ---- */

typedef struct needle_params {
    const char *const *attn; /* [n_attn] policies to compare with "full" */
    int n_attn;
    const eval_text *texts; /* [n_texts] */
    int n_texts;
    const int64_t *depths; /* [n_depths] tokens per haystack */
    int n_depths;
    int count;     /* haystacks per depth and text; with positions: how often every position is asked for, per depth and text */
    int needles;   /* in each haystack; every one is asked for */
    int positions; /* needles lie in the middle of each n-th of the text, in turn; a multiple of needles. 0: at random */
    int n_answer;  /* most tokens of an answer */
    bool cite;     /* whether right answers cite the needle first */
    uint64_t seed;
    eval_way way;
    journal *journal; /* of finished haystacks; may be NULL */
} needle_params;

typedef struct needle_result {
    const char *attn;
    int64_t asked, full_correct;  /* the same for all policies */
    int64_t correct;              /* answered by this policy */
    int64_t cited;                /* of these, with the needle in the passage cited first; 0 if not asked for */
    int64_t kept;                 /* answered by this policy and by full */
    double kept_low, kept_high;   /* 95 % interval of kept / full_correct */
    double cited_low, cited_high; /* 95 % interval of cited / correct */
    double loss;                  /* share that full answers and the policy does not, less the share of the reverse */
    double loss_low, loss_high;   /* its 95 % interval, of paired differences */
    metric_summary kld;           /* KLD(full || policy) over the tokens of full's answers */
    eval_reading reading;
} needle_result;

/* Needles of one size of haystack at one position. */
typedef struct needle_cell {
    int64_t length; /* tokens */
    double depth;   /* where in the text they were meant to be, 0 to 1; they are at the sentence nearest to it */
    int64_t asked, correct;
} needle_cell;

/* One question answered, for whoever wants to look. Texts end with NUL and live until the callback returns. */
typedef struct needle_answer {
    const char *text_name, *attn, *answer;
    const needle *needle;
    int64_t n_tokens;
    bool correct, full_correct;
} needle_answer;
typedef void (*needle_answer_fn)(const needle_answer *answer, void *data);

/* results[1 + n_attn]: "full" first. cells[1 + n_attn][n_depths][positions]; on_answer, which sees what is not in the journal, and cells may be NULL. Errors as kld_measure; UNSUPPORTED when the model has no known chat template. */
quarry_code needle_measure(quarry_model *model, const needle_params *params, const quarry_watch *watch, needle_answer_fn on_answer,
                           void *data, needle_result *results, needle_cell *cells, quarry_error *error);

/* ---- ruler.c: the synthetic tasks of RULER (arXiv 2404.06654) that need no data set ---- */

enum { RULER_MOST_LENGTHS = 16, RULER_N_TASKS = 11 };

typedef struct ruler_params {
    const char *const *attn; /* [n_attn] policies to compare with "full" */
    int n_attn;
    const char *text; /* [n_bytes] haystacks and words come from it; NULL: tasks that need none */
    size_t n_bytes;
    const int64_t *lengths; /* [n_lengths] tokens, question and room for the answer included */
    int n_lengths;
    bool tasks[RULER_N_TASKS]; /* which */
    int samples;               /* per task and length */
    uint64_t seed;
    int n_batch;
    journal *journal; /* of finished samples; may be NULL */
} ruler_params;

#define RULER_GATE 0.2 /* a task and length counts where the lower end of full attention's interval is above it */

/* Names of the tasks, for options; returns the task or -1. */
int ruler_task_find(const char *name, size_t n);
const char *ruler_task_name(int task);
/* How many results ruler_measure fills: for every task and length "full" and n_attn policies, then "all" for each of them. */
int ruler_n_results(const ruler_params *params);
/* on_answer, if not NULL, sees every answer. Errors as needle_measure. */
typedef void (*ruler_answer_fn)(const char *task, int64_t length, const char *attn, double score, const char *answer, void *data);
quarry_code ruler_measure(quarry_model *model, const ruler_params *params, const quarry_watch *watch, ruler_answer_fn on_answer, void *data,
                          score_result *results, quarry_error *error);

/* ---- doc.c: questions about documents of one's own ---- */

typedef struct doc_document {
    char *path; /* NULL: inline */
    char *text; /* [n_bytes]; NULL until loaded */
    size_t n_bytes;
    int64_t line; /* of the file that first names it, from 1 */
} doc_document;

typedef struct doc_question {
    int64_t line; /* of the file, from 1 */
    int document;
    char *question;
    char **answers; /* [n_answers] accepted, normalised (doc_normalise) */
    int n_answers;
} doc_question;

/* A file of questions. Owns everything in it. */
typedef struct doc_set {
    char *path;
    doc_document *documents; /* [n_documents], each once */
    int n_documents;
    doc_question *questions; /* [n_questions] */
    int n_questions;
} doc_set;

/* JSON Lines (docs/eval.md); path is for messages and the folder that documents are relative to. Errors FORMAT (path, line and what is wrong), MEMORY; doc_set_free also after them. */
quarry_code doc_parse(doc_set *set, const char *path, const char *text, size_t n_bytes, quarry_error *error);
/* Reads the documents that are files. Errors: IO, FORMAT (empty). */
quarry_code doc_load(doc_set *set, quarry_error *error);
void doc_set_free(doc_set *set);

/* text as a new string (memory_free) that begins and ends with a space, as does every word in it: lower case, without punctuation and articles, white space one space, as SQuAD
 * normalises (Rajpurkar et al., arXiv 1606.05250; its evaluate-v2.0.py); a character of Chinese or Japanese is a word. " " if no word is left. */
char *doc_normalise(const char *text, quarry_error *error);
/* *right: an accepted answer is among the words of text. */
quarry_code doc_answered(const doc_question *q, const char *text, bool *right, quarry_error *error);

typedef struct doc_params {
    const char *const *attn; /* [n_attn] policies to compare with "full" */
    int n_attn;
    const doc_set *set; /* loaded */
    int n_answer;       /* most tokens of an answer */
    int n_batch;
    journal *journal; /* of answered questions; may be NULL */
} doc_params;

typedef struct doc_result {
    score_result score; /* of one question 0 or 1 */
    int64_t correct, full_correct;
    int64_t kept;               /* answered by this policy and by full */
    double kept_low, kept_high; /* 95 % interval of kept / full_correct */
} doc_result;

/* results[1 + n_attn]: "full" first. on_answer, if not NULL, sees every answer that was not in the journal. Errors: CONTEXT (names the line), UNSUPPORTED (no known chat template), those of
 * policies, FORMAT (the journal), CANCELLED. */
typedef void (*doc_answer_fn)(const doc_question *question, const char *attn, bool correct, const char *answer, void *data);
quarry_code doc_measure(quarry_model *model, const doc_params *params, const quarry_watch *watch, doc_answer_fn on_answer, void *data,
                        doc_result *results, quarry_error *error);

/* ---- report.c: a page of what evaluations printed with --json (docs/eval.md) ---- */

/* Reads paths[n] and writes out, whole or not at all. Errors IO, FORMAT (names the file and what is wrong with it), MEMORY. */
quarry_code report_write(const char *const *paths, int n, const char *out, quarry_error *error);
/* Its two halves: an envelope from text (*envelope is the caller's also on failure, and may then be NULL), and the page. */
quarry_code report_check(const char *name, const char *text, size_t n_bytes, json_t **envelope, quarry_error *error);
quarry_code report_render(FILE *out, const char *const *names, json_t *const *envelopes, int n, quarry_error *error);

/* ---- speed.c: tokens per second, and seconds ---- */

typedef enum speed_kind {
    SPEED_PROMPT, /* read n tokens at once, after the depth; the index is sealed in it */
    SPEED_GEN,    /* decode n tokens one by one, in each of n_parallel sequences */
    SPEED_READ,   /* read a document of n tokens from nothing, index sealed */
    SPEED_ASK,    /* after the depth feed a question of n tokens and take the likeliest next one: time to first token */
    SPEED_KINDS
} speed_kind;

extern const char *const speed_kind_names[SPEED_KINDS]; /* "pp", "tg", "read", "ttft" */

typedef struct speed_test {
    speed_kind kind;
    int64_t n;      /* tokens, of each sequence */
    int n_parallel; /* sequences decoded together; 1 for all kinds but SPEED_GEN */
} speed_test;

typedef struct speed_params {
    const char *const *attn; /* [n_attn] */
    int n_attn;
    const speed_test *tests; /* [n_tests] */
    int n_tests;
    int64_t depth; /* tokens in the cache before; filled once for all tests and policies, with other tokens in each sequence */
    int repetitions;
    int n_batch;
    int64_t read_window; /* as quarry_session_params */
    bool extend;
    const int32_t *tokens; /* [n_tokens] to read, from the start again when they run out; NULL: pseudo-random ones */
    int64_t n_tokens;
} speed_params;

typedef struct speed_result {
    const char *attn;
    speed_test test;
    int64_t n_depth;       /* 0 for SPEED_READ */
    const double *seconds; /* [n_samples] that one run of the test took */
    int n_samples;
    double seconds_mean, seconds_sd;
    double rate_mean, rate_sd; /* tokens per second: n * n_parallel over the seconds */
} speed_result;
typedef void (*speed_result_fn)(const speed_result *result, void *data);

/* Tokens per second of one run. */
double speed_rate(const speed_test *test, double seconds);

/* Calls on_result for every test and policy. Not timed: tokenising, sampling (but for the one token of SPEED_ASK), filling the depth, opening
 * sessions, and a first run of each. Policies take turns in each repetition, so that a slow moment of the machine meets all. A depth past the
 * length the model was trained for is allowed. */
quarry_code speed_measure(quarry_model *model, const speed_params *params, const quarry_watch *watch, speed_result_fn on_result, void *data,
                          quarry_error *error);

#endif
