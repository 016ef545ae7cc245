#!/usr/bin/env bash
# Evaluation beside training, as SmolLM2 did it: one Slurm job of one GPU for each checkpoint.
#
#   bash examples/eval.sh runs/smollm2-1.7b                       a job for the end of every stage so far, sft and dpo
#   bash examples/eval.sh runs/smollm2-1.7b/checkpoints/stable-1-00100000 ...      jobs for these
#
# Run it as often as you like: a job whose results are in RUN/evals.jsonl ends at once, and one that was killed goes on
# with the next task. Sites differ in partitions: SBATCH_PARTITION=gpu bash examples/eval.sh ...
#SBATCH --job-name=smol-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=12
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/%x-%j.log

# --- site: change these -----------------------------------------------------------------------------------------
SUITE=${SUITE:-early-signal}           # smollm2-base, smollm2-instruct
TASKS=${TASKS:-}                       # in place of a suite, such as arc_easy,piqa
VENV=${VENV:-.venv}
OPTIONS=${OPTIONS:-}                   # such as "--data-dir /scratch/$USER/evals" where compute nodes have no network
# -----------------------------------------------------------------------------------------------------------------
set -euo pipefail

if [ -n "${SLURM_JOB_ID:-}" ]; then    # the job: one checkpoint
  if [ -n "$TASKS" ]; then asked=(--tasks "$TASKS"); else asked=(--suite "$SUITE"); fi
  exec "$VENV/bin/smol" eval "$1" "${asked[@]}" $OPTIONS
fi

[ $# -gt 0 ] || { echo "usage: bash examples/eval.sh RUN | CHECKPOINT..." >&2; exit 2; }
mkdir -p runs
for model in "$@"; do
  [ -d "$model" ] || { echo "error: there is no folder '$model'; give a run, or checkpoints of one" >&2; exit 2; }
  checkpoints=$model
  if [ -d "$model/checkpoints" ]; then checkpoints=$("$VENV/bin/smol" eval "$model" --stages --list); fi
  while IFS= read -r checkpoint; do
    SUITE=$SUITE TASKS=$TASKS VENV=$VENV OPTIONS=$OPTIONS sbatch --export=ALL "$0" "$checkpoint"
  done <<< "$checkpoints"
done
