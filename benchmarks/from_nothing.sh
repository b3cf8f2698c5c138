#!/usr/bin/env bash
# From nothing to chat on one GPU: language model, reading, hypernetwork, each for its minutes. Started again after an
# interruption it goes on at the last checkpoint.
#
#   benchmarks/from_nothing.sh OUT DATA BASE GIST PRETRAIN [more options of every stage]      the last three in minutes; GIST may be 0
#
# DATA holds text/ (plain text, .txt or .txt.xz) and */train.jsonl (conversations). Variables: PRESET (small), STAGES (of "base gist
# pretrain", those to run now), TOKENIZER (folder whose tokenizer is taken), BASE_BATCH, GIST_BATCH, BATCH, WORKERS; START (a model folder
# whose language model and hypernetwork go on, not from nothing; GIST is 0 then).
#
# On a GPU, --compile and --cuda-graphs behind the minutes are for speed.
#
#   PRESET=test WORKERS=1 BASE_BATCH=4 GIST_BATCH=4 BATCH=4 TOKENIZER=checkpoints/tiny benchmarks/from_nothing.sh /tmp/dry DATA 0.1 0.1 0.1      a minute on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$1 DATA=$2 BASE=$3 GIST=$4 PRETRAIN=$5
shift 5
ulimit -n "$(ulimit -Hn)"      # every tensor on its way from a worker is an open file
data=(--text "$DATA/text" --qa "$DATA"/*/train.jsonl --workers "${WORKERS:-14}" --wild-share 0.35 --random-share 0.15 --rival-share 0.3
      --record-share 0.1 --mined-share 0.25 --scene-share 0.35 --text-share 0.5 --context-length 512 --conversation-length 320 --eval-every 4 --save-every 0.5)

stage() {      # name, folder of the run, its options
    local name=$1 out=$2
    shift 2
    [[ " ${STAGES:-base gist pretrain} " == *" $name "* && ! -e $out/done ]] || return 0
    [[ -e $out/state.safetensors ]] && set -- "$@" --resume
    python3 train.py --stage "$name" --out "$out" "${data[@]}" "$@"
    touch "$out/done"
}

new=(--preset "${PRESET:-small}" ${TOKENIZER:+--tokenizer "$TOKENIZER"} --curriculum 60000)
[[ ${START:-} ]] && new=(--model "$START" --curriculum 0)
stage base "$OUT/base" "${new[@]}" --minutes "$BASE" --batch "${BASE_BATCH:-256}" --warmup 200 --copy-share 0.15 --plain-share 0.15 "$@"
hyper=(--meta-rank 32 --answer-rank 4 --packing 0.2 --recall-share 0.3 --conversations 4 --question-share 0.75 --lr 2.5e-3 --weight-decay 0.05)
eager=()      # the stage gist is not compiled
for option in "$@"; do [[ $option == --compile ]] || eager+=("$option"); done
start=$OUT/base
if [[ $GIST != 0 ]]; then
    start=$OUT/gist
    stage gist "$OUT/gist" --model "$OUT/base" --minutes "$GIST" --warmup 60 --batch "${GIST_BATCH:-64}" "${hyper[@]}" "${eager[@]}"
fi
stage pretrain "$OUT/pretrain" --model "$start" ${START:+--hypernet "$START"} --minutes "$PRETRAIN" --warmup 200 --read-lr 6.25e-4 --muon-lr 4.5e-3 --batch "${BATCH:-64}" \
    "${hyper[@]}" "$@"
