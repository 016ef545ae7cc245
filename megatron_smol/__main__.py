"""`python -m megatron_smol`, which is what torchrun and srun start."""

from megatron_smol.cli import entry

if __name__ == "__main__":
    entry()
