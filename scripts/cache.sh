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
