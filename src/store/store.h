/* store: contexts that were read, kept on disk.
 *
 * A piece is one immutable file with the tokens [first, end) of a context: their ids, their K|V rows, the segments of the index that were sealed since its parent ended, and
 * the policy's state at `end`. It names its parent piece, or none where a context begins. A context is a chain of pieces, known by its last one; contexts with the same
 * beginning share pieces. All files of a store lie in one folder, beside the catalogue that knows which there are.
 *
 * Both belong to the library, so that whoever embeds it never reads a text twice either: its one dependency beyond libc is SQLite. */
#ifndef STORE_STORE_H
#define STORE_STORE_H

#include "store/catalogue.h"
#include "store/piece.h"
#include "store/tier.h"

#endif
