#!/usr/bin/env bash
# SmolLM2-1.7B on 256 H100s: sbatch examples/smollm2_1.7b.sh
#
# The same file trains any recipe on any number of GPUs: MODEL=smollm2_135m sbatch --nodes 8 examples/smollm2_1.7b.sh
#SBATCH --job-name=smollm2
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=runs/%x-%j.log
# --signal: every rank saves five minutes before the time limit and leaves with code 75, which requeues the job below.
# --open-mode=append: a requeued job goes on in the same log.

# --- site: change these -----------------------------------------------------------------------------------------
MODEL=${MODEL:-smollm2_1.7b}           # examples/$MODEL.yaml
VENV=${VENV:-.venv}
OVERRIDES=${OVERRIDES:-}               # such as "run_dir=/scratch/$USER/smollm2 save.every='1000 steps'"
# -----------------------------------------------------------------------------------------------------------------
set -uo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not inherit it since Slurm 22.05

"$VENV/bin/smol" plan "examples/$MODEL.yaml" $OVERRIDES || exit   # a recipe that does not plan never starts

# --wait: when one rank leaves, the others have 60 s to leave too (all save and return 75 together) before they are ended.
srun --export=ALL --kill-on-bad-exit=0 --wait=60 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$(( SLURM_NTASKS / SLURM_NNODES ))
  exec "$0" -m megatron_smol train "$@"' "$VENV/bin/python" "examples/$MODEL.yaml" $OVERRIDES
code=$?
echo "training left with code $code"
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
