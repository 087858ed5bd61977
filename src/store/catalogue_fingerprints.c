#include <time.h>

#include "store/catalogue_db.h"

static bool recall(const quarry_file_identity *file, uint64_t *fingerprint, void *data)
{
    catalogue *c = data;
    quarry_error why = {0};
    bool row = false;
    sqlite3_stmt *statement = db_query(c, &why,
                                       "SELECT fingerprint FROM model_file WHERE device = ?1 AND inode = ?2 AND n_bytes = ?3"
                                       " AND modified = ?4 AND changed = ?5 AND method = ?6",
                                       "iiiiii", (int64_t)file->device, (int64_t)file->inode, (int64_t)file->n_bytes, file->modified,
                                       file->changed, (int64_t)file->method);
    if (!statement || db_step(c, statement, &row, &why) != QUARRY_OK) log_line(&c->log, QUARRY_LOG_WARN, "%s", why.message);
    if (row) *fingerprint = (uint64_t)sqlite3_column_int64(statement, 0);
    sqlite3_finalize(statement);
    return row;
}

static void remember(const quarry_file_identity *file, uint64_t fingerprint, void *data)
{
    catalogue *c = data;
    quarry_error why = {0};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const int64_t settled = ((int64_t)now.tv_sec - 2) * 1000000000; /* some file systems count in steps of 2 s */
    if (file->modified > settled || file->changed > settled) return;
    if (db_change(c, &why, "INSERT OR REPLACE INTO model_file VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)", "iiiiiii", (int64_t)file->device,
                  (int64_t)file->inode, (int64_t)file->n_bytes, file->modified, file->changed, (int64_t)file->method,
                  (int64_t)fingerprint) != QUARRY_OK)
        log_line(&c->log, QUARRY_LOG_WARN, "%s", why.message);
}

quarry_fingerprints catalogue_fingerprints(catalogue *c)
{
    return (quarry_fingerprints){recall, remember, c};
}
