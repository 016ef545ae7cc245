"""`smol rebalance`: which weights the next stage could have, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HELP = """Propose the weights of the next stage from what the run and its ablations measured. Applies nothing.

Reads the ablations that started from RUN (those in folders beside it, and --ablation), its evaluations by category, its
validation losses at stage ends, and what the epoch caps leave. Prints for every source the planned and the proposed weight
and says what it comes from: an ablation (with its standard error), a cap, or a guess. Where an ablation has enough arms
(two shares of each candidate), a mixture law is fitted to each loss and its error on left-out arms is shown.

\b
Rule: the source that helped most gains --step, the others in proportion; sources that harmed lose likewise; what
nothing was shown of shares the rest as planned. Only differences that the ablation's seeds tell from noise (p < 0.05)
move a weight. No cap is passed, and what later stages read is kept free.

The proposal is written as a diff of the recipe, for you to edit and apply (patch RECIPE FILE), and printed as an override.
Exit code 3 when nothing was measured that could tell, 2 when the caps leave no mixture at all.

\b
  smol rebalance runs/demo --next decay
  smol rebalance runs/demo --next stage4 --tokens 1T                 # a stage that the recipe does not have yet
  smol rebalance runs/demo --next decay --recipe examples/demo.yaml --ablation runs/ablation-math
"""


def rebalance(
    run: Annotated[Path, typer.Argument(help="Run folder, such as runs/demo.", metavar="RUN")],
    next_stage: Annotated[
        str, typer.Option("--next", help="The stage to propose for; it has not begun.", metavar="STAGE")
    ],
    tokens: Annotated[
        str | None, typer.Option(help="Length of a stage that the recipe does not have yet: 200M, 500 steps.")
    ] = None,
    ablation: Annotated[
        list[Path] | None,
        typer.Option(help="Output folder of an ablation to read as well; may be repeated.", metavar="FOLDER"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="The recipe file to change; default: RUN/recipe.yaml.")
    ] = None,
    step: Annotated[
        float, typer.Option(help="The most that evidence moves a weight by.", min=0.001, max=1.0)
    ] = 0.1,
    output: Annotated[
        Path | None, typer.Option(help="Where the diff goes; default: RUN/rebalance-STAGE.diff.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the proposal as JSON.")] = False,
) -> None:
    import json as jsonlib

    from rich.console import Console

    from megatron_smol.rebalance.evidence import gather
    from megatron_smol.rebalance.report import make_proposal
    from megatron_smol.rebalance.run import open_subject
    from megatron_smol.rebalance.view import print_proposal, write_diff

    subject = open_subject(run, next_stage, tokens, recipe)
    proposal = make_proposal(subject, gather(run, subject.plan, ablation or []), step)
    path = output or run / f"rebalance-{next_stage}.diff"
    write_diff(proposal, path)
    if json:
        print(jsonlib.dumps(proposal.to_json(), indent=1))
        return
    console = Console(highlight=False)
    print_proposal(proposal, console)
    console.print(f"\n{proposal.diff}", markup=False, end="")
    override = f"; as an override: '{proposal.override}'" if proposal.override else ""
    console.print(f"written with its reasons: {path}{override}", markup=False, soft_wrap=True)


rebalance.__doc__ = _HELP
