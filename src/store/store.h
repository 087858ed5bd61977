/* store: contexts that were read, kept on disk.
 *
 * A piece is one immutable file with the tokens [first, end) of a context: their ids, their K|V rows, the segments of the index that were sealed since its parent ended, and
 * the policy's state at `end`. It names its parent piece, or none where a context begins. A context is a chain of pieces, known by its last one; contexts with the same
 * beginning share pieces. All files of a store lie in one folder, beside the catalogue that knows which there are.
 *
 * Piece files belong to libquarry. The catalogue is a database (SQLite) and belongs to the program, as evaluation does, so that the library stays
 * without dependencies: what is below `gen` or in it must not call catalogue_*. */
#ifndef STORE_STORE_H
#define STORE_STORE_H

#include "store/catalogue.h"

#endif
