/* A journal of finished samples, so that a measurement of hours survives being stopped. JSON Lines:
 *
 *     {"quarry_journal": 1, "header": {…}}           what is measured: parameters, digests, seed
 *     {"key": "prose 0", "record": {…}}              one line per finished sample, in the order they were finished
 *
 * Every line is written whole and flushed to the disk before the next sample begins. A last line without its newline was cut short when the
 * program was stopped: it is dropped, and its sample measured again. Real numbers keep all their digits, so a resumed measurement gives the
 * same result as one that ran through. */
#ifndef EVAL_JOURNAL_H
#define EVAL_JOURNAL_H

#include <jansson.h>

#include "base/base.h"

typedef struct journal journal;

/* Opens path, or creates it with this header (borrowed). Errors: IO; FORMAT for what is no journal, or damaged before its last line; ARGUMENT if
 * its header is another one (names the first field that differs), or another process has it open. */
journal *journal_open(const char *path, const json_t *header, quarry_error *error);
void journal_close(journal *j); /* NULL allowed */

/* The record of a finished sample, or NULL. Lives as long as the journal. j NULL: nothing is finished. */
const json_t *journal_find(const journal *j, const char *key);
/* Writes the record of a sample and keeps it; takes over the reference to record also on failure (NULL is MEMORY). j NULL: nothing happens. */
quarry_code journal_add(journal *j, const char *key, json_t *record, quarry_error *error);
int64_t journal_count(const journal *j);

#endif
