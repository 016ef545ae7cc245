"""`python -m megatron_smol`, which is what torchrun and srun start."""

from megatron_smol.train.signals import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # before the imports, in which its launcher may end
    from megatron_smol.cli import entry

    entry()
