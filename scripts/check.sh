#!/usr/bin/env bash
# All checks: formatting, gcc and clang with warnings as errors, sanitizers, a short fuzzing, then every test on the release build.
set -euo pipefail
cd "$(dirname "$0")/.."
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} CTEST_OUTPUT_ON_FAILURE=1

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# build FOLDER COMPILER OPTION…
build() {
    local folder=$1 compiler=$2; shift 2
    CC=$compiler cmake -S . -B "$folder" -DQUARRY_WERROR=ON "$@" >/dev/null
    compile "$folder"
}

# compile FOLDER [TARGET]
compile() {
    local log=$1/build.log
    cmake --build "$1" --target "${2:-all}" >"$log" 2>&1 || { grep -vE '^(\[ *[0-9]+%\]|g?make)' "$log" | head -n 60; return 1; }
}

tests() { ctest --test-dir "$1" --parallel "$CMAKE_BUILD_PARALLEL_LEVEL"; }

quick_tests() { (unset QUARRY_TEST_MODEL QUARRY_TEST_VOCABS && tests "$1"); }

step "packages"
scripts/install-deps.sh check

step "model and tokenizers for the tests"
if QUARRY_TEST_MODEL=$(scripts/fetch-model.sh); then export QUARRY_TEST_MODEL; else echo "NOTE: no model: the tests that need it are skipped"; unset QUARRY_TEST_MODEL; fi
if source=$(scripts/fetch-llama.sh); then export QUARRY_TEST_VOCABS=$source/models; else echo "NOTE: no tokenizers of other families: the tests that need them are skipped"; fi

step "formatting"
if clang-format --version | grep -q 'version 14\.'; then
    make --no-print-directory format FORMAT_FLAGS='--dry-run -Werror'
else
    echo "NOTE: skipped, the formatting is that of clang-format 14"
fi

# A processor with AVX-512 plays one without: the kernels are compared level by level in the first run, here all else rests on them.
step "clang: build, tests without the model, AVX2 at most"
build build-check/clang clang
level=scalar
! grep -qw avx2 /proc/cpuinfo || level=avx2
QUARRY_ISA=$level quick_tests build-check/clang

step "sanitizers: build, tests without the model"
build build-check/sanitize gcc -DQUARRY_SANITIZE=ON
quick_tests build-check/sanitize

step "fuzzing"
scripts/fuzz.sh

step "gcc: build, all tests"
build build-check/gcc gcc
compile build-check/gcc benches
tests build-check/gcc
