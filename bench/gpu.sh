#!/usr/bin/env bash
# Everything that is measured on one GPU, in under 9 minutes: a line of figures for each part in out-gpu/PART.json, all
# of them in out-gpu/summary.json, the text in out-gpu/log.txt.
#
#     bash bench/gpu.sh
#     PEER=../nanoGPT SHAKESPEARE=input.txt bash bench/gpu.sh
#     PARTS=speed bash bench/gpu.sh       # all of the time for one part
#     DRY=1 bash bench/gpu.sh             # tiny sizes on the CPU, a few minutes: does all of it run?
#
# Parts, in this order:
#     machine     the GPU, its driver, torch
#     check       does the GPU compute what the CPU does?
#     char        time to val 1.4697 on shakespeare_char
#     recipe      tokens to a loss, 124M: GPT-2's recipe and ours
#     attention   torch's kernels, forward and backward
#     decode      tokens/s of sampling from 124M, against transformers (and nanoGPT) and the memory's bandwidth
#     decode_xl   the same for 1.5B, alone
#     peer        train.py's step against nanoGPT's, compiled, 124M
#     speed       tokens/s and MFU of 124M, 350M, 1.5B
#
# Needs no network. Each part has a limit, its share of the time that is left, so what one does not use the next ones
# have; one that fails or runs out of time does not stop the others, and keeps the figures it had.
#
# BUDGET       seconds in all (530)
# PEER         a checkout of nanoGPT; without it that part is left out
# SHAKESPEARE  the text of tiny Shakespeare, where data/shakespeare_char is not prepared
# CORPUS       name of a dataset for 'recipe' (Python's standard library, 8,192 ids)
# CHAR_FLAGS   more flags for train.py in 'char'
# PYTHON       the interpreter (python)
# OUT          the folder (out-gpu)
set -uo pipefail
started=$SECONDS
for name in PEER SHAKESPEARE OUT; do  # as they are seen from here
    path=${!name:-}
    if [[ -n $path && $path != /* ]]; then printf -v "$name" '%s' "$PWD/$path"; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
OUT=${OUT:-$PWD/out-gpu}
PYTHON=${PYTHON:-python}
BUDGET=${BUDGET:-530}
DRY=${DRY:-}
PEER=${PEER:-}
PARTS=${PARTS:-machine check char recipe attention decode decode_xl ${PEER:+peer} speed}
dry=()
if [[ -n $DRY ]]; then
    dry=(--dry)
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU that torch can use here; DRY=1 bash bench/gpu.sh runs every part on the CPU, with tiny sizes" >&2
    exit 1
fi

weight_of() {  # of a part; of the time that is left it gets weight / (weights of those to come)
    case $1 in
        machine) echo 2 ;;
        check) echo 12 ;;
        char) echo 10 ;;
        recipe) echo 34 ;;
        attention) echo 7 ;;
        decode) echo 9 ;;
        decode_xl) echo 7 ;;
        peer) echo 13 ;;
        speed) echo 36 ;;
        *) echo "PARTS: '$1' is none of machine, check, char, recipe, attention, decode, decode_xl, peer, speed" >&2; return 1 ;;
    esac
}

machine() {
    if [[ -z $DRY ]]; then
        nvidia-smi || return
    fi
    "$PYTHON" -c "
import json, platform, torch
cuda = torch.version.cuda and {'gpu': torch.cuda.get_device_name(), 'cuda': torch.version.cuda,
    'cudnn': torch.backends.cudnn.version(), 'memory_gb': round(torch.cuda.mem_get_info()[1] / 2**30, 1)}
print(json.dumps({'bench': 'machine', 'python': platform.python_version(), 'torch': torch.__version__, 'gpu': cuda}))"
}

command_of() {  # part limit -> the array `command`
    local part=$1 limit=$2
    case $part in
        machine) command=(bash -c "$(declare -f machine); machine") ;;
        attention)
            command=("$PYTHON" bench/attention.py)
            if [[ -n $DRY ]]; then command+=(--shapes=1x2x64x16 --dropouts=0.0 --n=2 --kept=False); fi ;;
        decode)
            command=("$PYTHON" bench/generate.py --rounds=2 ${PEER:+"--peer=$PEER"})
            if [[ -n $DRY ]]; then command+=(--n_layer=2 --n_embd=96 --vocab_size=512 --new_tokens=8); fi ;;
        decode_xl)
            command=("$PYTHON" bench/generate.py --rounds=2 --n_layer=48 --n_head=25 --n_embd=1600 --transformers=False)
            if [[ -n $DRY ]]; then command+=(--n_layer=2 --n_embd=100 --vocab_size=512 --new_tokens=8); fi ;;
        peer)
            command=("$PYTHON" bench/train_step.py --cases=gpt2 --rounds=2 "--peer=$PEER")
            if [[ -n $DRY ]]; then
                command+=(--steps=3 '--extra=--n_layer=2 --n_head=2 --n_embd=32 --batch_size=2 --block_size=32')
            fi ;;
        *)  # a little less than `timeout` gives it, so that it ends by itself
            command=("$PYTHON" bench/gpu.py "$part" "--limit=$((limit - 3))" "--out=$OUT" ${dry[@]+"${dry[@]}"})
            if [[ $part == char ]]; then command+=("--shakespeare=${SHAKESPEARE:-}" "--flags=${CHAR_FLAGS:-}"); fi
            if [[ $part == recipe ]]; then command+=("--corpus=${CORPUS:-}"); fi ;;
    esac
}

weights=0
for part in $PARTS; do
    weight=$(weight_of "$part") || exit 1
    weights=$((weights + weight))
    if [[ $part == peer && -z $PEER ]]; then
        echo "PARTS has 'peer', but PEER is not set; expected the path of a nanoGPT checkout: PEER=../nanoGPT" >&2
        exit 1
    fi
done
mkdir -p "$OUT" && : > "$OUT/log.txt" && : > "$OUT/parts.txt" || exit 1
export DRY PYTHON  # for machine()
for part in $PARTS; do
    weight=$(weight_of "$part")
    limit=$(((BUDGET - 8 - (SECONDS - started)) * weight / weights))  # the summary takes some seconds, too
    weights=$((weights - weight))
    limit=$((limit > 15 ? limit : 15))  # python alone takes some to start
    begun=$SECONDS
    rm -f "$OUT/$part.json"
    command_of "$part" "$limit"
    {
        echo "== $part, at most $limit s"
        timeout --kill-after=5 "$limit" "${command[@]}" 2>&1
        status=$?
        echo
        exit $status
    } | tee "$OUT/$part.txt" | tee -a "$OUT/log.txt"
    status=${PIPESTATUS[0]}
    if grep '^{.*}$' "$OUT/$part.txt" | tail -n 1 > "$OUT/$part.json.tmp" && [[ -s $OUT/$part.json.tmp ]]; then
        mv "$OUT/$part.json.tmp" "$OUT/$part.json"
    fi
    rm -f "$OUT/$part.txt" "$OUT/$part.json.tmp"
    echo "$part $status $((SECONDS - begun)) $limit" >> "$OUT/parts.txt"
done
"$PYTHON" bench/gpu.py summary "--out=$OUT" ${dry[@]+"${dry[@]}"} 2>&1 | tee -a "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
