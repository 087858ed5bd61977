#!/usr/bin/env bash
# Puts llama.cpp's source into the cache and prints its folder. It is the peer that bench/compare.py measures beside, and its
# models/ggml-vocab-*.gguf are tokenizers of a dozen families for the tests. Nothing of it becomes part of quarry.
# It comes out of the source distribution of the Python package llama-cpp-python (77 MB).
set -euo pipefail
. "$(dirname "$0")/cache.sh"

version=0.3.36
digest=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
source=$cache/llama.cpp-$version

if [ ! -d "$source" ]; then
    mkdir -p "$cache" || fail "cannot create $cache; set QUARRY_CACHE to a folder that can be written"
    exec 9>"$cache/.llama.lock"
    flock 9
    if [ ! -d "$source" ]; then
        echo "fetching llama.cpp's source (77 MB, from the Python package llama-cpp-python==$version)" >&2
        work=$(mktemp -d "$cache/.llama-XXXXXX")
        trap 'rm -rf "$work"' EXIT
        pip_download "$work" --no-binary llama-cpp-python "llama-cpp-python==$version" || fail "cannot download llama-cpp-python==$version with pip"
        archive=$work/llama_cpp_python-$version.tar.gz
        echo "$digest  $archive" | sha256sum --check --status || fail "${archive##*/} has another SHA-256 than $digest: not used"
        tar -xzf "$archive" -C "$work" --strip-components=2 "llama_cpp_python-$version/vendor/llama.cpp"
        mv "$work/llama.cpp" "$source"
    fi
fi
echo "$source"
