"""`--rank` and `--world-size` of a preprocessing command: numbers, or `slurm` for those of the array job."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_smol.data.place import Share
from megatron_smol.errors import UserError

SLURM = "slurm"
_VARIABLES = {"--rank": "SLURM_ARRAY_TASK_ID", "--world-size": "SLURM_ARRAY_TASK_COUNT"}


def share_of(rank: str | None, world_size: str | None, environment: Mapping[str, str] = os.environ) -> Share:
    """The share of the work that the two options name; all of it without them."""
    if rank is None and world_size is None:
        return Share()
    if rank is None or world_size is None:
        raise UserError("--rank and --world-size belong together: give both, or neither")
    found = [_number(*option, environment) for option in (("--rank", rank), ("--world-size", world_size))]
    try:
        return Share(*found)
    except UserError as error:
        if SLURM not in (rank, world_size):
            raise
        raise UserError(
            f"{error}; Slurm's array indices must begin at 0 (sbatch --array=0-{found[1] - 1}); to run some "
            f"of them again, give --world-size as a number"
        ) from None


def _number(option: str, given: str, environment: Mapping[str, str]) -> int:
    value = given
    if given == SLURM:
        variable = _VARIABLES[option]
        if variable not in environment:
            raise UserError(
                f"{option} slurm, but {variable} is not set: this is no task of a Slurm array job (sbatch --array=0-63)"
            )
        value = environment[variable]
    if not value.isdecimal():
        raise UserError(f"{option} must be a number or '{SLURM}', found '{given}'")
    return int(value)
