"""What srun starts once per GPU: Slurm's rank variables under torch's names, then `smol train`.

The stop signals are held back from the first line on, until the training's own flag takes them: one that arrives
during the imports (seconds) waits instead of killing the rank; one that comes while it leaves is ignored. A rank that
fails says so in a row of its own, because srun keeps only the largest exit code, and a rank that was killed while
waiting for the culprit has a larger one.
"""

from __future__ import annotations

from megatron_smol.train import signals

signals.hold()

import contextlib  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

from megatron_smol.errors import EXIT_RESTART_ME, leave  # noqa: E402
from megatron_smol.slurm.legs import append_row  # noqa: E402


def main() -> None:
    """`python -m megatron_smol.slurm.rank train RECIPE [a.b=c]`, in a Slurm step."""
    slurm = os.environ
    per_node = int(slurm["SLURM_NTASKS"]) // int(slurm["SLURM_NNODES"])
    os.environ.update(
        RANK=slurm["SLURM_PROCID"],
        LOCAL_RANK=slurm["SLURM_LOCALID"],
        WORLD_SIZE=slurm["SLURM_NTASKS"],
        LOCAL_WORLD_SIZE=str(per_node),
    )
    code = _run()
    signals.ignore()
    if code not in (0, EXIT_RESTART_ME):
        row = {"rank": int(slurm["RANK"]), "host": socket.gethostname(), "code": code}
        with contextlib.suppress(OSError):  # a full disk: srun's code must do
            append_row(Path(slurm["SMOL_EXITS"]), row)
    leave(code)


def _run() -> int:
    """The command line `smol` in this process; its exit code."""
    from megatron_smol.cli import main as smol

    try:
        smol()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
