#!/usr/bin/env bash
# All figures of benchmarks/results anew, on a machine with a GPU, in pieces of at most eight minutes.
#
#   benchmarks/measure.sh PIECE [WORD …]    # the words go behind each of its commands
#   benchmarks/measure.sh --list [PIECE]    # the commands, without running them
#
#   tiny         shows on any machine that it runs        tiny_GPU.json
#   kernels      the kernels, and who else has them       kernels_GPU.csv, plots/
#   tune         ways to cut up local attention           local_attention_tuning_GPU.csv
#   steps        whole steps of base                      train_GPU.json
#   large        … of large                               train_GPU.json
#   accumulate   … with eight micro-steps, also without   train_GPU.json
#                the engine
#   shards       … on real shards, which the words name:  train_GPU.json
#                --data DIR …
#   options      8-bit products, recomputation, ZeRO 2,   train_GPU.json
#                DeepSpeed's checks
#   peers        Hugging Face's model                     train_GPU.json
#   several      two GPUs of this machine, four, …        train_GPU.json
#   plot         draws train_GPU.json                     plots/train.png
#   tests        the tests that need a GPU                gpu_tests_GPU.txt
#
# A piece goes on where it was cut off, by the eight minutes (exit code 124) or by anything else, when
# it is called again: what is done stands in measured_GPU.txt, with its commit. Take lines out of
# there to measure again. What fails is said at the end (exit code 1), and tried again.
#
# data_prep.json and sample_gpu are not measured here: docs/data.md and configs/sample_gpu.yaml say how.
#
# RESULTS  where all of it goes, by default benchmarks/results; what lies there is gone on with
# LIMIT_S  the seconds of a piece, 480; a command that takes longer by itself needs more
# GPUS     of this machine, for several
# PROJECT_COMMIT  which commit this is, where its files were copied from a repository
set -euo pipefail
trap 'exit 130' INT

usage() {
  sed -n '2,/^set /{/^#/s/^# \?//p}' "$0" >&2
  exit 2
}

RESULTS=$(realpath -m "${RESULTS:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.."
LIMIT_S=${LIMIT_S:-480}
# Tests side by side; with 14 of them the memory of one GPU did not do.
TESTS_AT_ONCE=4

PIECES=(tiny kernels tune steps large accumulate shards options peers several plot tests)
LISTING=false
if [[ ${1:-} == --list ]]; then
  LISTING=true
  shift
fi
PIECE=${1:-}
WORDS=("${@:2}")
if [[ -n $PIECE || $LISTING == false ]]; then
  [[ " ${PIECES[*]} " == *" $PIECE "* ]] || usage
fi

# The GPU as a part of a file's name, how many there are, the commit, and a line on all of it.
{ read -r GPU && read -r FOUND && read -r COMMIT && read -r ABOUT; } < <(python - <<'END'
import re

import torch

from train.benchmark.results import versions

on_gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name() if on_gpu else "CPU"
print(re.sub(r"\W+", "_", name.removeprefix("NVIDIA ").lower()))
print(torch.cuda.device_count())
print(versions()["commit"] or "not known")
print(name, *(f"{key} {value}" for key, value in versions().items()), sep=", ")
END
)
DONE=$RESULTS/measured_$GPU.txt
JSON=$RESULTS/train_$GPU.json
PLOTS=$RESULTS/plots
FAILED=()

# task COMMAND …: runs it unless it is done, within what is left of the time. INTO names a file for
# what it prints, AGAIN has it run although it is done.
task() {
  local command=("$@" "${WORDS[@]}") text code=0
  text=$(printf '%q ' "${command[@]}")
  # Where the results lie is no part of what is done.
  text=${text//"$RESULTS"/RESULTS} text=${text% }
  if $LISTING; then
    echo "$text"
    return
  fi
  if [[ -z ${AGAIN:-} ]] && grep -qxF "$COMMIT: $text" "$DONE" 2>/dev/null; then
    echo "== done before: $text"
    return
  fi
  local left=$((LIMIT_S - SECONDS))
  ((left > 0)) || cut_off "$text"
  echo "== $text"
  command=(timeout --foreground --kill-after=30 "$left" "${command[@]}")
  if [[ -n ${INTO:-} ]]; then
    printf '%s\n%s\n\n' "$text" "$ABOUT" >"$INTO"
    "${command[@]}" </dev/null 2>&1 | tee -a "$INTO" || code=$?
  else
    "${command[@]}" </dev/null || code=$?
  fi
  case $code in
    0) echo "$COMMIT: $text" >>"$DONE" ;;
    124 | 137) cut_off "$text" ;;
    *) FAILED+=("$text") ;;
  esac
}

cut_off() {
  echo "== $PIECE is not done after $LIMIT_S s; the same command goes on with $1" >&2
  exit 124
}

train() { task python -m train.benchmark --json "$JSON" "$@"; }

ours() { train --case "$1" --who ours "${@:2}"; }

ours_on() { task deepspeed --num_gpus "$1" --module train.benchmark --json "$JSON" "${@:2}"; }

kernels() { task python -m kernels.benchmark "$@"; }

peers() {
  local case name flash
  for case in abstracts-1024 notes-8192 full-8192; do
    train --case "$case" --who "Hugging Face sdpa" "Hugging Face sdpa, sparse"
    train --case "$case" --who "Hugging Face sdpa, compiled"
    # Of these two, what is installed.
    flash=()
    for name in flash_attention_4 flash_attention_2; do
      flash+=("Hugging Face $name"{,", packed",", packed, sparse"})
    done
    train --case "$case" --who "${flash[@]}"
  done
}

options() {
  ours large-1024 --label rowwise fp8=rowwise
  ours large-1024 --label tensorwise fp8=tensorwise
  ours abstracts-1024 --label rowwise fp8=rowwise
  ours abstracts-1024 --label "recompute mlp" recompute=mlp
  ours abstracts-1024 --label "recompute layer" recompute=layer
  ours abstracts-1024 --label "ZeRO 2" zero_stage=2
  ours accumulate-8 --label "ZeRO 2" zero_stage=2
  ours abstracts-1024 --label "DeepSpeed's checks" \
    'deepspeed={bf16: {check_grad_overflow: true}, zero_optimization: {compute_grad_norm: true}}'
}

several() {
  local number gpus=${GPUS:-$FOUND}
  if $LISTING; then
    gpus=${GPUS:-8}
  elif ((gpus < 2)); then
    echo "error: several needs two GPUs or more of one machine, this one has $gpus" >&2
    exit 2
  fi
  for number in 2 4 8; do
    ((number <= gpus)) || continue
    ours_on "$number" --case accumulate-8
    ours_on "$number" --case abstracts-1024
    ours_on "$number" --case abstracts-1024 --label "ZeRO 2" zero_stage=2
    ours_on "$number" --case abstracts-1024 --label "ZeRO 3" zero_stage=3
    ours_on "$number" --case abstracts-1024 --label uncompiled compile=none
  done
}

tests() {
  local file INTO parts=$RESULTS/gpu_tests_$GPU.parts
  while read -r file; do
    INTO=$parts/${file//\//.}.txt
    task python -m pytest -v -rA -n "$TESTS_AT_ONCE" -m gpu "$file"
    if [[ -s $INTO ]]; then cat "$parts"/*.txt >"$RESULTS/gpu_tests_$GPU.txt"; fi
  done < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | sort)
}

run() {
  local case operation
  case $1 in
    tiny) task python -m train.benchmark --json "$RESULTS/tiny_$GPU.json" --case tiny ;;
    kernels)
      for operation in rope rope_in_place unpad embedding layer_norm geglu \
        linear_cross_entropy stable_adamw local_attention; do
        kernels --op "$operation" --csv "$RESULTS/kernels_$GPU.csv"
      done
      # The last draws all that the file then holds.
      kernels --op global_attention --csv "$RESULTS/kernels_$GPU.csv" --plot "$PLOTS"
      ;;
    tune) kernels --tune --csv "$RESULTS/local_attention_tuning_$GPU.csv" ;;
    steps) for case in abstracts-1024 notes-8192 full-8192; do ours "$case"; done ;;
    large) for case in large-1024 large-8192; do ours "$case"; done ;;
    accumulate)
      ours accumulate-8
      ours notes-accumulate-8
      train --case accumulate-8 --who "ours, without engine"
      ;;
    shards) ours shards ;;
    plot) AGAIN=true train --case --plot "$PLOTS/train.png" ;;
    options | peers | several | tests) "$1" ;;
  esac
}

if $LISTING; then
  for PIECE in ${PIECE:-"${PIECES[@]}"}; do
    echo "# $PIECE"
    run "$PIECE"
  done
  exit
fi
mkdir -p "$RESULTS/gpu_tests_$GPU.parts" "$PLOTS"
run "$PIECE"
if ((${#FAILED[@]})); then
  printf '== failed: %s\n' "${FAILED[@]}" >&2
  exit 1
fi
echo "== $PIECE is done: $RESULTS"
