/* Common to the tests: cmocka and its prerequisites. */
#ifndef TEST_H
#define TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define TEST_COUNT(tests) (sizeof(tests) / sizeof((tests)[0]))

#endif
