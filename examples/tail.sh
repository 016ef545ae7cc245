#!/usr/bin/env bash
# From a trained run to a chat model on one node of 8 GPUs: sbatch examples/tail.sh
#
# Export, SFT, DPO, each with SmolLM2's settings for the model's size; what is done already is not done again. Compute nodes
# without a network: give local files as SFT_DATA and DPO_DATA, or load the data sets once on a login node and set
# HF_HUB_OFFLINE=1 here.
#SBATCH --job-name=smollm2-tail
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=runs/%x-%j.log
# --signal: two minutes before the time limit this script requeues itself. What is lost is at most the steps since the last
# checkpoint (save_every, 100 steps).

# --- site: change these -----------------------------------------------------------------------------------------
RUN=${RUN:-runs/smollm2-1.7b}                          # the run's folder; hf/, sft/ and dpo/ go into it
RECIPE=${RECIPE:-examples/smollm2_1.7b.yaml}           # its `tail:` section; "" for the defaults of the model's size
VENV=${VENV:-.venv}
CHECKPOINT=${CHECKPOINT:-$RUN}                         # or one checkpoint: $RUN/checkpoints/decay-00001234
SFT_DATA=${SFT_DATA:-}                                 # a file or OWNER/NAME:CONFIG:SPLIT; "": the recipe's
DPO_DATA=${DPO_DATA:-}
GPUS=${GPUS:-8}
ACCELERATE=${ACCELERATE:-examples/accelerate/fsdp.yaml}   # multi_gpu.yaml for the 135M and 360M
# -----------------------------------------------------------------------------------------------------------------
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

tail_step() {   # sft|dpo, the model it starts from, its data
  "$VENV/bin/accelerate" launch --config_file "$ACCELERATE" --num_processes "$GPUS" -m megatron_smol "$1" "$2" \
    --output "$RUN/$1" ${RECIPE:+--recipe "$RECIPE"} ${3:+--data "$3"} &
  wait $!   # in the background, so that the trap runs at once
}

[ -f "$RUN/hf/config.json" ] || "$VENV/bin/smol" convert to-hf "$CHECKPOINT" "$RUN/hf"
tail_step sft "$RUN/hf" "$SFT_DATA"
tail_step dpo "$RUN/sft" "$DPO_DATA"
"$VENV/bin/smol" report "$RUN"
