#!/usr/bin/env bash
# Builds the fuzz targets and runs each for QUARRY_FUZZ_SECONDS (20), from the seeds in fuzz/corpus/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build-check/fuzz
CC=clang cmake -S . -B $build -DQUARRY_FUZZ=ON -DQUARRY_WERROR=ON >/dev/null
cmake --build $build --parallel "$(nproc)" >$build/build.log 2>&1 || { tail -n 60 $build/build.log; exit 1; }
for target in fuzz/*.c; do
    [ -e "$target" ] || { echo "no fuzz targets"; break; }
    name=$(basename "$target" .c)
    name=${name#fuzz_}
    found=$build/corpus/$name # what a run finds is kept beside the build: the next one starts from there
    mkdir -p "$found"
    folders=("$found")
    [ ! -d "fuzz/corpus/$name" ] || folders+=("fuzz/corpus/$name")
    echo "fuzzing $name for ${QUARRY_FUZZ_SECONDS:-20} s"
    if ! $build/fuzz_"$name" -max_total_time="${QUARRY_FUZZ_SECONDS:-20}" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$build/$name-" "${folders[@]}" >"$build/$name.log" 2>&1; then
        tail -n 60 "$build/$name.log"
        echo "fuzz target $name failed; the input that did it: $(ls -t $build/"$name"-* | head -n 1)"
        exit 1
    fi
    grep -E 'number_of_executed_units' "$build/$name.log" || true
done
