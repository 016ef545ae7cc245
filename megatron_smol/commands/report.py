"""`smol report`: what runs did, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HELP = """Write one self-contained HTML page about a run, or several on the same axes.

Losses, mixtures drawn against planned, epochs against caps, validation and
evaluations by stage beside SmolLM2's own figures, speed, incidents with their
documents, fine-tuning, samples, recipe and hashes. The page needs no network;
its charts zoom (drag), show values (point) and hide lines (click a name).
A run may still be training.

\b
  smol report runs/demo                      # runs/demo/report.html
  smol report runs/a runs/b --output ab.html # compared
  smol report runs/demo runs/ablation-math   # with an ablation (its output)
  smol report runs/demo --watch              # anew until the run ends
"""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, and output folders of smol ablate.", metavar="RUN..."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Where the page goes; default: RUN/report.html, of several runs comparison.html."),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write it anew every --every seconds until all runs end, or Ctrl-C."),
    ] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two pages.", min=1.0)] = 30.0,
) -> None:
    from megatron_smol.report.render import Report
    from megatron_smol.report.watch import keep_writing

    made = Report(runs, output)
    if watch:
        keep_writing(made, every)
    else:
        made.write()
    print(made.path)


report.__doc__ = _HELP
