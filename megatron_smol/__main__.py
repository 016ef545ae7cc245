"""`python -m megatron_smol`, which is what torchrun and srun start."""

from megatron_smol.cli import main

if __name__ == "__main__":
    main()
