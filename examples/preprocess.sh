#!/bin/bash
# Tokenize a large corpus with a Slurm array job: 64 tasks over one shared folder.
#
#   sbatch examples/preprocess.sh 's3://bucket/web/*.jsonl.zst' data/web
#
# Of another size, on a first submission: TASKS=32 sbatch --array=0-31 examples/preprocess.sh INPUT OUTPUT
# Each task does its share, none waits for another, and the one that ends last writes the shards and the
# manifest. Killed, requeued or repeated tasks do no harm: submit the failed ones again
# (sbatch --array=3,17 ...), or all. The files are the same as from one process.
#
#SBATCH --job-name=preprocess
#SBATCH --array=0-63
#SBATCH --cpus-per-task=16
#SBATCH --mem=24G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=preprocess-%A-%a.log
set -euo pipefail

INPUT=${1:?usage: sbatch examples/preprocess.sh INPUT OUTPUT [options of smol preprocess]}
OUTPUT=${2:?usage: sbatch examples/preprocess.sh INPUT OUTPUT [options of smol preprocess]}
VENV=${VENV:-.venv}
TOKENIZER=${TOKENIZER:-HuggingFaceTB/SmolLM2-135M}
# Fixed, not Slurm's count: so that a part of the array can be submitted again.
TASKS=${TASKS:-64}
if [ "${SLURM_ARRAY_TASK_ID:-}" = "${SLURM_ARRAY_TASK_MIN:-}" ] && [ "${SLURM_ARRAY_TASK_COUNT:-$TASKS}" != "$TASKS" ]; then
    echo "this array has $SLURM_ARRAY_TASK_COUNT of $TASKS tasks: the source is complete when the others have run too, here or in" \
        "other arrays (to split the corpus in $SLURM_ARRAY_TASK_COUNT instead: TASKS=$SLURM_ARRAY_TASK_COUNT sbatch --array=0-$((SLURM_ARRAY_TASK_COUNT - 1)) ...)"
fi

exec "$VENV/bin/smol" preprocess "$INPUT" --output "$OUTPUT" --tokenizer "$TOKENIZER" \
    --rank slurm --world-size "$TASKS" --workers "${SLURM_CPUS_PER_TASK:-1}" "${@:3}"
