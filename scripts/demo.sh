#!/usr/bin/env bash
# The quick start: installs what is missing, builds, fetches the default model, and asks it about a document of about 7,500
# tokens that every Debian system has. The answer is to be found in the document (grep for it).
set -euo pipefail
cd "$(dirname "$0")/.."

document=/usr/share/common-licenses/GPL-3
question="Who publishes this license?"

scripts/install-deps.sh demo
echo "building"
make --no-print-directory >/dev/null
model=$(scripts/fetch-model.sh)
printf '\n$ quarry ask -m %s --doc %s "%s"\n\n' "${model##*/}" "$document" "$question"
build/quarry ask -m "$model" --doc "$document" "$question"
