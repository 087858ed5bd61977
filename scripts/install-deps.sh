#!/usr/bin/env bash
# Installs the Debian packages that a task needs: as root, by `sudo -n`, or else one line says which are missing.
#   scripts/install-deps.sh [--check] build|demo|check|bench
# --check only looks. Instant and silent when nothing is missing.
set -euo pipefail

look_only=
if [ "${1:-}" = --check ]; then look_only=1; shift; fi

# package[:command] - a command found in PATH does as well as the package
build=(gcc:gcc libc6-dev binutils:objcopy make:make cmake:cmake libjansson-dev nettle-dev libsqlite3-dev libxxhash-dev)
demo=("${build[@]}" python3:python3 python3-pip:pip3 ca-certificates)
check=("${demo[@]}" python3-xxhash libcmocka-dev clang:clang libclang-rt-dev clang-format:clang-format)
bench=("${demo[@]}" g++:g++)
case "${1:-}" in
    build) wanted=("${build[@]}") ;;
    demo) wanted=("${demo[@]}") ;;
    check) wanted=("${check[@]}") ;;
    bench) wanted=("${bench[@]}") ;;
    *) echo "usage: scripts/install-deps.sh [--check] build|demo|check|bench" >&2; exit 2 ;;
esac

if ! command -v dpkg-query >/dev/null; then
    [ -n "$look_only" ] || echo "install-deps: not a Debian system; needed are the equivalents of: ${wanted[*]%%:*}" >&2
    exit 0
fi
# (a package that was never seen makes dpkg-query fail, its answer about the others stands)
installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${wanted[@]%%:*}" 2>/dev/null || true)
missing=()
for entry in "${wanted[@]}"; do
    package=${entry%%:*} command=${entry#"${entry%%:*}"}
    case $'\n'$installed$'\n' in *$'\n'"$package installed"$'\n'*) continue ;; esac
    if [ -n "$command" ] && command -v "${command#:}" >/dev/null; then continue; fi
    missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

by_hand="apt-get install --no-install-recommends ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
    if ! sudo -n true 2>/dev/null; then look_only=1; fi
fi
if [ -n "$look_only" ]; then
    echo "missing packages: ${missing[*]} (as root: $by_hand)" >&2
    exit 1
fi

echo "installing packages: ${missing[*]}" >&2
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A fresh image has no package lists, an old one stale ones: update only when the first try fails.
"${install[@]}" >"$log" 2>&1 || { "${as_root[@]}" apt-get update -qq >"$log" 2>&1 && "${install[@]}" >>"$log" 2>&1; } || {
    tail -n 20 "$log" >&2
    echo "could not install: ${missing[*]} (by hand: $by_hand)" >&2
    exit 1
}
