"""A run that lives on a Slurm cluster for weeks: submit, check the nodes, train, decide, restart, tell.

    sbatch examples/smollm2_1.7b.sh ─► leg (one per start of the job) ─► preflight on every node
                                         └─► srun ─► rank (one per GPU) ─► smol train
                                         └─► decide: done, restart me, or stop ─► legs.jsonl, exit code, requeue

Nothing here imports torch, except a node's all-reduce in `preflight`.
"""
