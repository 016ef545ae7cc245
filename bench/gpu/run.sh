#!/usr/bin/env bash
# One step of the measurements on one GPU, under ten minutes: bash bench/gpu/run.sh STEP [--dry-run]
#
#   0  probe     ceilings of this GPU, whether FP8 is FP8, the repository's tests of the GPU path      4 minutes
#   1  grid      tokens/s of the 1.7B: precisions x lengths x micro-batches, a process a precision     8 minutes
#   2  ablate    what each fusion is worth, bf16 and fp8-tensorwise                                    9 minutes
#   3  peers     transformers eager, compiled, with Liger and torchao, in the same run                 6 minutes
#   4  loss      150 steps in bf16 (two seeds), fp8-tensorwise, fp8-blockwise on .te/tokens.bin        9 minutes
#
# Results are lines of $OUT/<step>.jsonl, written row by row: a step that is cut off leaves what it had. --dry-run takes the same steps
# with a tiny model on the CPU.
set -euo pipefail
step=${1:?usage: bash bench/gpu/run.sh 0..4 [--dry-run]}
dry=${2:-}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -n "$dry" ] || . bench/gpu/env.sh
export PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
failed=0

# box SECONDS MODULE ARGUMENTS...: a process of its own, so that a crash costs one; killed when its time is over.
box() {
  local seconds=$1 module=$2
  shift 2
  timeout --kill-after=10 "$seconds" "$PYTHON" -m "bench.gpu.$module" $dry "$@" || {
    echo "step $step: $module $* ended with code $?" >&2
    failed=1
  }
}

[ -n "$dry" ] || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv | tee "$OUT/machine.csv"
tokens=${TOKENS:-.te/tokens.bin}
if [ -n "$dry" ] && [ ! -f "$tokens" ]; then
  tokens=$OUT/random-tokens.bin
  head -c 200000 /dev/urandom >"$tokens"
fi
fp8="fp8-tensorwise fp8-delayed fp8-blockwise"
[ -z "$dry" ] || fp8="" # refused on a CPU, as it must be

case $step in
0)
  box 240 probe
  [ -n "$dry" ] || timeout 240 "$PYTHON" -m pytest tests/model 2>&1 | tee "$OUT/tests.txt" || true
  ;;
1)
  for precision in bf16 $fp8; do
    box 135 grid --seconds 100 "$precision"
  done
  ;;
2)
  for precision in bf16 ${fp8:+fp8-tensorwise}; do
    box 275 ablate --seconds 240 "$precision"
  done
  ;;
3) box 480 peers --seconds 400 ;;
4)
  box 135 loss bf16 42 "$tokens"
  box 135 loss bf16 43 "$tokens"
  if [ -z "$dry" ]; then
    box 135 loss fp8-tensorwise 42 "$tokens"
    box 135 loss fp8-blockwise 42 "$tokens"
  fi
  "$PYTHON" -m bench.gpu.loss_gap | tee "$OUT/loss-gap.txt" || failed=1
  ;;
*)
  echo "error: step '$step' is none of 0, 1, 2, 3, 4" >&2
  exit 2
  ;;
esac
exit $failed
