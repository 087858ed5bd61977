#!/usr/bin/env bash
# The evaluation behind docs/report.md, by one command: measures every policy of scripts/report-policies on the default model and
# writes FOLDER/report.html. What was finished is kept in FOLDER: run it again after a stop and it goes on.
#   scripts/report.sh [-s small|normal|large] [-o FOLDER] [-m MODEL] [-p POLICIES] [-q QUARRY]
# small: minutes, to see that it works. normal: an hour or two on two cores. large: most of a day, with RULER.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

size=normal folder=build-report model='' policies=$here/report-policies quarry=$here/../build/quarry
while getopts s:o:m:p:q: flag; do
    case $flag in
        s) size=$OPTARG ;;
        o) folder=$OPTARG ;;
        m) model=$OPTARG ;;
        p) policies=$OPTARG ;;
        q) quarry=$OPTARG ;;
        *) exit 2 ;;
    esac
done
case $size in
    small) depths=(1500) samples=1 steps=24 needles=4 lengths=2000 count=1 ruler= ;;
    normal) depths=(2000 4000 7500) samples=6 steps=96 needles=8 lengths=2000,4000,7500 count=2 ruler= ;;
    large) depths=(1000 2000 4000 7500) samples=12 steps=128 needles=16 lengths=2000,3000,4000,6000,7500 count=10 ruler=yes ;;
    *) echo "report: -s $size: should be small, normal or large" >&2; exit 2 ;;
esac
[ -x "$quarry" ] || { echo "report: $quarry is not there: run make, or name it with -q" >&2; exit 1; }
[ -n "$model" ] || model=$("$here/fetch-model.sh")
documents=$("$here/fetch-documents.sh")
mkdir -p "$folder"

# Figures of another build are not these.
build=$(sha256sum <"$quarry")
if [ -e "$folder/build" ] && [ "$(cat "$folder/build")" != "$build" ]; then
    echo "report: quarry was built anew: measuring everything again" >&2
    rm -f "$folder"/*.json "$folder"/*.json.command "$folder"/*.journal "$folder"/*.codebook
fi
printf '%s\n' "$build" >"$folder/build"

# Two texts are for calibration, the others are measured.
calibration=("$documents/mansfield-park.txt" "$documents/pride-and-prejudice.txt")
texts=()
for text in "$documents"/*.txt; do
    case " ${calibration[*]} " in *" $text "*) ;; *) texts+=("$text") ;; esac
done
codebook=$folder/a2ats.codebook
if grep -v '^#' "$policies" | grep -q CODEBOOK && ! [ -e "$codebook" ]; then
    echo "report: calibrating a2ats" >&2
    "$quarry" calibrate -m "$model" -f "${calibration[0]}" -f "${calibration[1]}" -o "$codebook" >&2
fi

attn=()
while IFS= read -r policy; do
    case $policy in '' | '#'*) ;; *) attn+=(--attn "${policy//CODEBOOK/$codebook}") ;; esac
done <"$policies"

# measure NAME COMMAND…: its output becomes FOLDER/NAME.json, whole or not at all; it is measured again only if the command is another one.
results=()
measure() {
    local name=$1; shift
    local out=$folder/$name.json
    results+=("$out")
    if [ -e "$out" ] && [ "$(cat "$out.command" 2>/dev/null)" = "$*" ]; then return; fi
    echo "report: $name" >&2
    "$@" >"$out.part"
    mv "$out.part" "$out"
    printf '%s\n' "$*" >"$out.command"
}

for depth in "${depths[@]}"; do
    measure "kld-$depth" "$quarry" eval kld -m "$model" --json --task both --audit -d "$depth" -n "$steps" --samples "$samples" --needles "$needles" \
        --journal "$folder/kld-$depth.journal" "${attn[@]}" "${texts[@]}"
done
measure needle "$quarry" eval needle -m "$model" --json -d "$lengths" --count "$count" --journal "$folder/needle.journal" "${attn[@]}" "${texts[@]}"
if [ -n "$ruler" ] && "$quarry" eval ruler --help >/dev/null 2>&1; then
    measure ruler "$quarry" eval ruler -m "$model" --json --journal "$folder/ruler.journal" "${attn[@]}" "${texts[@]}"
fi
"$quarry" eval report "${results[@]}" -o "$folder/report.html"
echo "$folder/report.html"
