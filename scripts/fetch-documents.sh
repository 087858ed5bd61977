#!/usr/bin/env bash
# Puts long public-domain texts into the cache and prints their folder: six novels by Jane Austen (110 to 220 thousand tokens
# each), out of the Debian package r-cran-janeaustenr, which is unpacked and not installed.
# Where it cannot be had, the folder holds the GNU GPL 3 instead (about 7,500 tokens), which every Debian system has.
set -euo pipefail
. "$(dirname "$0")/cache.sh"
here=$(cd "$(dirname "$0")" && pwd)

package=r-cran-janeaustenr
folder=$cache/documents
licence=/usr/share/common-licenses/GPL-3
mkdir -p "$folder" || fail "cannot create $folder; set QUARRY_CACHE to a folder that can be written"
exec 9>"$folder/.lock"
flock 9

download() { (cd "$work" && apt-get download -qq "$package") >"$work/log" 2>&1; }

update_lists() { # only root may
    if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; else sudo -n apt-get update -qq; fi >"$work/log" 2>&1
}

if [ ! -f "$folder/emma.txt" ]; then
    work=$(mktemp -d "$folder/.fetch-XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "fetching six novels (1.6 MB, Debian package $package)" >&2
    if download || { update_lists && download; }; then
        dpkg-deb -x "$work"/*.deb "$work/package"
        mkdir "$work/novels"
        python3 "$here/extract_austen.py" "$(find "$work/package" -path '*/data/Rdata.rdb')" "$work/novels"
        mv "$work/novels/emma.txt" "$work/emma.txt"
        mv "$work"/novels/*.txt "$folder/"
        mv "$work/emma.txt" "$folder/" # last: it tells that all are there
    elif [ -f "$licence" ]; then
        echo "cannot fetch $package (apt-get update, as root, may help); the text is $licence instead" >&2
        cp "$licence" "$folder/gpl-3.txt"
    else
        fail "cannot fetch $package: $(tail -n 1 "$work/log")"
    fi
fi
echo "$folder"
