#!/usr/bin/env bash
# Run all measurements of one GPU in under 9 minutes.
#
#     bash bench/gpu.sh
#     PEER=../nanoGPT SHAKESPEARE=input.txt bash bench/gpu.sh
#     PARTS=speed bash bench/gpu.sh       # all of the time for one part
#     DRY=1 bash bench/gpu.sh             # tiny sizes on the CPU: does everything run?
#
# Writes the figures of each part to out-gpu/PART.json, all of them to out-gpu/summary.json, and the
# text to out-gpu/log.txt. The parts, in order:
#     machine     the GPU, its driver, torch
#     check       tests/test_gpu.py: does the GPU compute the same as the CPU?
#     char        time to val 1.4697 on shakespeare_char
#     recipe      tokens to a loss, 124M: GPT-2's recipe and ours
#     attention   torch's kernels, forward and backward
#     decode      tokens/s from 124M, against transformers, nanoGPT and the memory's bandwidth
#     decode_xl   the same for 1.5B, alone
#     peer        train.py's step against nanoGPT's, compiled, 124M
#     speed       tokens/s and MFU of 124M, 350M, 1.5B
#
# Needs no network. Each part gets a share of the remaining time, so later parts get the time that
# earlier ones leave. A part that fails or runs out of time does not stop the others and keeps its
# figures so far.
#
# BUDGET       seconds in all (530)
# PEER         a checkout of nanoGPT; without it the part 'peer' is left out
# SHAKESPEARE  the text of tiny Shakespeare, if data/shakespeare_char is not prepared
# CORPUS       a dataset for 'recipe' (default: Python's standard library, 8,192 ids)
# CHAR_FLAGS   more flags for train.py in 'char'
# PYTHON       the interpreter (python)
# OUT          the folder (out-gpu)
set -uo pipefail
started=$SECONDS
for name in PEER SHAKESPEARE OUT; do  # relative to the current folder
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

weight_of() {  # a part gets weight / (weights of the parts to come) of the remaining time
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
        check) command=("$PYTHON" -m pytest -q tests/test_gpu.py) ;;
        attention)
            command=("$PYTHON" -m bench.attention)
            if [[ -n $DRY ]]; then command+=(--shapes=1x2x64x16 --dropouts=0.0 --n=2 --kept=False); fi ;;
        decode)
            command=("$PYTHON" -m bench.generate --rounds=2 ${PEER:+"--peer=$PEER"})
            if [[ -n $DRY ]]; then command+=(--n_layer=2 --n_embd=96 --vocab_size=512 --new_tokens=8); fi ;;
        decode_xl)
            command=("$PYTHON" -m bench.generate --rounds=2 --n_layer=48 --n_head=25 --n_embd=1600 --transformers=False)
            if [[ -n $DRY ]]; then command+=(--n_layer=2 --n_embd=100 --vocab_size=512 --new_tokens=8); fi ;;
        peer)
            command=("$PYTHON" -m bench.train_step --cases=gpt2 --rounds=2 "--peer=$PEER")
            if [[ -n $DRY ]]; then
                command+=(--steps=3 '--extra=--n_layer=2 --n_head=2 --n_embd=32 --batch_size=2 --block_size=32')
            fi ;;
        *)  # a little less than the limit of `timeout`, so that it ends by itself
            command=("$PYTHON" -m bench.gpu "$part" "--limit=$((limit - 3))" "--out=$OUT" ${dry[@]+"${dry[@]}"})
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
export DRY PYTHON  # machine() reads them
for part in $PARTS; do
    weight=$(weight_of "$part")
    limit=$(((BUDGET - 8 - (SECONDS - started)) * weight / weights))  # 8 s for the summary
    weights=$((weights - weight))
    limit=$((limit > 15 ? limit : 15))  # the start of python takes some
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
"$PYTHON" -m bench.gpu summary "--out=$OUT" ${dry[@]+"${dry[@]}"} 2>&1 | tee -a "$OUT/log.txt"
exit "${PIPESTATUS[0]}"
