#!/usr/bin/env bash
# SmolLM2-360M on 64 H100s: sbatch examples/smollm2_360m.sh
#
# The same as smollm2_1.7b.sh but for the name and the number of nodes.
#SBATCH --job-name=smollm2_360m
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.log
# --signal: every rank saves five minutes before the time limit (Slurm looks every 30 s, so give a save a minute more
#   than it takes) and leaves with code 75; the job then puts itself back into the queue. --requeue allows that.
# --mem=0: all memory of the nodes; clusters that give memory by the core would leave some of it out.
# --open-mode=append: all legs of a job write one log; without it each requeue would empty it.

# --- site: change these, or set them in sbatch's environment ----------------------------------------------------
MODEL=${MODEL:-smollm2_360m}                      # examples/$MODEL.yaml
RECIPE=${RECIPE:-examples/$MODEL.yaml}            # or any other file
VENV=${VENV:-.venv}
export OVERRIDES=${OVERRIDES:-}                   # such as "run_dir=/scratch/$USER/smollm2 save.every='1000 steps'"
export SPARES=${SPARES:-0}                        # with sbatch --nodes=9 --no-kill: one node waits to replace a lost one
export ALERT=${ALERT:-}                           # a command that hears how each leg ends: 'mail -s "$MESSAGE" you@example.org'
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}      # of 12 cores a rank; the rest feeds the GPU
# export NCCL_SOCKET_IFNAME=eth0                  # the interface ranks meet on, where NCCL picks a wrong one
# export NCCL_IB_HCA=mlx5                         # the InfiniBand cards for tensors
# export NCCL_DEBUG=WARN                          # INFO when a job hangs while its ranks meet
# -----------------------------------------------------------------------------------------------------------------
# Preflight, srun, the restart decision and its exit codes: megatron_smol/slurm/leg.py, docs/operations.md
exec "$VENV/bin/python" -m megatron_smol.slurm.leg "$RECIPE"
