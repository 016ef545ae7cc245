"""The command `smol`: the doors of the package, which are in megatron_smol/commands/.

Each command imports what it needs when it is called, so that `smol plan` does not wait for torch. UserError
becomes one sentence and its exit code.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

import typer

from megatron_smol.commands import evals, post, run, slurm
from megatron_smol.commands.ablate import ablate
from megatron_smol.commands.annotate import annotate
from megatron_smol.commands.bench import bench_app
from megatron_smol.commands.chatdata import chatdata
from megatron_smol.commands.classifier import classifier
from megatron_smol.commands.convert import convert_app
from megatron_smol.commands.curate import curate
from megatron_smol.commands.inspect import inspect
from megatron_smol.commands.preprocess import preprocess
from megatron_smol.commands.rebalance import rebalance
from megatron_smol.commands.report import report
from megatron_smol.commands.source import data_app
from megatron_smol.errors import NO_ROOM, DataError, DiskError, UserError, leave, ranks_have_met
from megatron_smol.train import signals

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The SmolLM2 recipe as one YAML, run by megatron-core: [bold]plan[/] → [bold]preprocess[/] → [bold]train[/] → "
    "[bold]convert[/] → [bold]report[/].",
)
# A launcher ends all ranks when one leaves: the first must have told the error by then.
_LEFT_TO_THE_FIRST_SECONDS = 2.0
# In the order in which a newcomer meets them.
COMMANDS: tuple[Callable[..., None], ...] = (
    run.plan,
    curate,
    annotate,
    classifier,
    preprocess,
    run.train,
    slurm.submit,
    slurm.status,
    slurm.simulate,
    inspect,
    chatdata,
    post.sft,
    post.dpo,
    post.chat,
    post.generate,
    evals.eval,
    ablate,
    rebalance,
    report,
    run.doctor,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The command: always ends with SystemExit, an error told in one sentence."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        if _is_mine_to_tell(error):
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(_LEFT_TO_THE_FIRST_SECONDS)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in NO_ROOM:
            kind: type[UserError] = DiskError
        elif error.errno in (errno.EACCES, errno.EROFS):
            kind = DataError
        elif error.filename and error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            kind = UserError  # a path on the command line: a file where a folder is needed, or the other way round
        else:
            raise
        what = f"{error.strerror}: {error.filename or 'a file'}"
        print(f"error: {what}; mend that, then run again", file=sys.stderr)
        sys.exit(kind.exit_code)


def entry() -> None:
    """Entry point of `smol` and `python -m megatron_smol`: `main` in a process of its own."""
    try:
        main()
    except SystemExit as done:
        signals.ignore()  # one that comes now would turn a finished command into a failed one
        leave(done.code if isinstance(done.code, int) else 0 if done.code is None else 1)


def _is_mine_to_tell(error: UserError) -> bool:
    """What all ranks found alike is told by the first of them: an error they shared, or one before they met."""
    return os.environ.get("RANK", "0") == "0" or (ranks_have_met() and not error.alike)
