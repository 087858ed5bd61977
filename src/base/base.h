/* base: errors, logs, memory arenas, threads, CPU features, random numbers, files, what memory there is. Depends on nothing above it. */
#ifndef BASE_H
#define BASE_H

#include "base/arena.h"
#include "base/available.h"
#include "base/bytes.h"
#include "base/cpu.h"
#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/resident.h"
#include "base/threads.h"

#endif
