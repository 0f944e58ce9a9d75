#!/bin/bash
# A real model on one GPU within a quarter of an hour: bon_helpful_hh_gpu, stage by stage, both transforms, their report.
#
#   experiments/launch/one_gpu.sh MODEL [--data DIR] [--runs DIR] [--minutes N] [--scale X] [--experiment NAME]
#
# MODEL is the directory of a Hugging Face chat model, such as SmolLM2-135M-Instruct's. After each stage its seconds are in
# RUNS/one_gpu.log, beside all that it made. At the end of the minutes a job saves and stops; the same call goes on from
# there, and what is finished is not made again. `--scale 0.01` makes every size a hundredth, to see that all of it runs.
set -uo pipefail
here=$PWD start=$SECONDS
cd "$(dirname "$0")/../.." || exit

fail() {
    echo "error: $*" >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || fail "the model's directory is missing: one_gpu.sh models/SmolLM2-135M-Instruct"
model=$1 data='' runs=runs minutes=15 scale=1 experiment=bon_helpful_hh_gpu
shift
while [ $# -gt 0 ]; do
    case $1 in
        --data | --runs | --minutes | --scale | --experiment)
            [ $# -gt 1 ] || fail "$1 needs a value."
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        *) fail "there is no option $1; there are --data, --runs, --minutes, --scale and --experiment." ;;
    esac
done
for place in model data runs; do # of the caller's folder
    [[ -z ${!place} || ${!place} == /* ]] || printf -v "$place" %s "$here/${!place}"
done
[ -f "$model/config.json" ] || fail "$model has no config.json; give the directory of a Hugging Face model."
[[ $minutes =~ ^[1-9][0-9]{0,4}$ ]] || fail "--minutes is $minutes; give a whole number from 1 on."
[[ $scale =~ ^(1|0?\.[0-9]*[1-9][0-9]*)$ ]] || fail "--scale is $scale; give a number above 0, up to 1."

# A size times the scale, but at least its second argument, which must be small enough for the others.
scaled() { awk -v n="$1" -v least="$2" -v by="$scale" 'BEGIN { x = int(n * by + 0.5); print (x < least ? least : x) }'; }

sizes=()
if [ "$scale" != 1 ]; then
    sizes=(
        --reward-model.steps "$(scaled 400 4)" --reward-model.batch-size "$(scaled 32 8)" --reward-model.warmup-steps 1
        --calibration.prompts "$(scaled 1024 8)" --calibration.samples-per-prompt "$(scaled 64 16)"
        --policy.steps "$(scaled 300 3)" --policy.prompts-per-step "$(scaled 32 8)"
        --policy.samples-per-prompt "$(scaled 16 4)" --policy.warmup-steps 1
        --evaluation.prompts "$(scaled 400 8)" --evaluation.responses-per-prompt "$(scaled 64 16)"
        --data.response-length "$(scaled 64 8)"
    )
fi

mkdir -p "$runs" || exit
log=$runs/one_gpu.log
say() { echo "$(date -u +%FT%TZ) $*" | tee -a "$log"; }

# Runs a job in what is left of the minutes, and writes down how long it took. SIGTERM lets it save.
job() {
    local left=$((minutes * 60 - (SECONDS - start))) began=$SECONDS code=0
    [ $left -gt 0 ] || { say "$1: not begun, the minutes are over; the same call goes on"; exit 75; }
    timeout --signal=TERM --kill-after=60 "$left" .venv/bin/python -m ctrl_jax "$1" "$experiment" --model.path "$model" \
        ${data:+--data.path "$data"} "${sizes[@]}" "${@:2}" || code=$?
    say "$1: $((SECONDS - began)) s, code $code"
    case $code in
        0) ;;
        75 | 124) say "the minutes are over; the same call goes on"; exit 75 ;;
        *) exit $code ;;
    esac
}

[ -x .venv/bin/python ] || make setup EXTRA=cuda12 || exit
say "$experiment, scale $scale, $minutes minutes"
job reward-model --runs-dir "$runs"
job calibrate --runs-dir "$runs"
job sweep --runs-dir "$runs"
.venv/bin/python -m ctrl_jax runs --runs-dir "$runs" | tee "$runs/one_gpu.txt"
