#!/usr/bin/env bash
# The quick start: installs what is missing, builds, fetches the default model, and asks it about a document of about 7,500
# tokens that every Debian system has. The answer is in one line near its end; asked without the document, the model
# invents another.
set -euo pipefail
cd "$(dirname "$0")/.."

document=/usr/share/common-licenses/GPL-3
next="When was the WIPO copyright treaty adopted?"
question="Which command shows the warranty?"
answer='ABSOLUTELY NO WARRANTY; for details type'

scripts/install-deps.sh demo
echo "building"
make --no-print-directory >/dev/null
model=$(scripts/fetch-model.sh)
printf '\n$ quarry ask -m %s --doc %s "%s"\n\n' "${model##*/}" "$document" "$question"
build/quarry ask -m "$model" --doc "$document" "$question"
printf '\nThe document is not read again:\n\n$ quarry ask -m %s --doc %s "%s"\n\n' "${model##*/}" "$document" "$next"
build/quarry ask -m "$model" --doc "$document" "$next"

printf '\nThe line of the document that tells:\n'
grep -n "$answer" "$document"
