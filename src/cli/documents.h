/* The documents of --doc. */
#ifndef CLI_DOCUMENTS_H
#define CLI_DOCUMENTS_H

#include "cli/cli.h"

/* Reads the files of paths (-: standard input, once) into documents[paths->n]. Returns an exit code after saying what is wrong; command: for its usage. */
int cli_documents_read(quarry_document **documents, const cli_list *paths, const cli_command *command);
void cli_documents_free(quarry_document *documents, int n); /* NULL allowed */
/* Their names, a line each; free with memory_free. NULL out of memory. */
char *cli_documents_names(const quarry_document *documents, int n);

bool cli_is_blank(const char *text, size_t n); /* white space only */

#endif
