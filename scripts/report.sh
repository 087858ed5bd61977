#!/usr/bin/env bash
# The evaluation behind docs/report.md, by one command: measures every policy of scripts/report-policies on the default model and
# writes FOLDER/report.html. What was finished is kept in FOLDER: run it again after a stop and it goes on.
#   scripts/report.sh [-s small|normal|large] [-o FOLDER] [-m MODEL] [-p POLICIES] [-q QUARRY]
# small: minutes, to see that it works. normal: an hour or more on two cores. large: most of a day.
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
    small) depths=(1500) samples=1 steps=24 needles=4 lengths=2000 count=1 positions=4 ruler=2000 tasks=1 ;;
    normal) depths=(7400) samples=3 steps=64 needles=3 lengths=2000,4500,7500 count=1 positions=8 ruler=2048,4096,8192 tasks=6 ;;
    large) depths=(2000 4000 7400) samples=12 steps=128 needles=16 lengths=2000,3000,4500,6000,7500 count=4 positions=8 ruler=2048,4096,8192 tasks=25 ;;
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
folder=$(cd "$folder" && pwd) quarry=$(realpath "$quarry") model=$(realpath "$model") policies=$(realpath "$policies")
cd "$folder" # so that the page names the codebook without a folder
codebook=a2ats.codebook
if grep -v '^#' "$policies" | grep -q CODEBOOK && ! [ -e "$codebook" ]; then
    echo "report: calibrating a2ats" >&2
    "$quarry" calibrate -m "$model" -f "${calibration[0]}" -f "${calibration[1]}" -o "$codebook" >&2
fi

attn=() answering=()
while IFS= read -r policy; do
    case $policy in '' | '#'*) continue ;; '+'*) answering+=(--attn "${policy#+}") ;; esac
    policy=${policy#+}
    attn+=(--attn "${policy//CODEBOOK/$codebook}")
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
    measure "kld-$depth" "$quarry" eval kld -m "$model" --json --task both -d "$depth" -n "$steps" --samples "$samples" --needles "$needles" \
        --journal "$folder/kld-$depth.journal" "${attn[@]}" "${texts[@]}"
done
measure audit "$quarry" eval kld -m "$model" --json --audit -d 4000 -n 16 --samples 2 --journal "$folder/audit.journal" "${attn[@]}" "${texts[@]}"
measure needle "$quarry" eval needle -m "$model" --json -d "$lengths" --positions "$positions" --needles 4 --count "$count" --journal "$folder/needle.journal" \
    "${answering[@]}" "${texts[@]}"
measure ruler "$quarry" eval ruler -m "$model" --json --lengths "$ruler" --samples "$tasks" --journal "$folder/ruler.journal" "${answering[@]:0:2}" "${texts[@]}"
"$quarry" eval report "${results[@]}" -o "$folder/report.html"
echo "$folder/report.html"
