"""A proposal on the terminal, and as the file that a person edits: reasons as comments, then the diff."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_smol.data.files import write_whole
from megatron_smol.rebalance.report import Proposal
from megatron_smol.recipe.units import format_tokens


def print_proposal(proposal: Proposal, console: Console) -> None:
    stage = proposal.subject.stage
    _print_weights(proposal, console)
    for line in proposal.lines:
        for reason in line.reasons:
            console.print(f"  {line.source}: {reason}", markup=False)
    _print_measured(proposal, console)
    for note in proposal.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"nothing was changed; stage '{stage.name}' ({format_tokens(stage.tokens)} tokens) is yours to decide",
        markup=False,
    )


def _print_weights(proposal: Proposal, console: Console) -> None:
    stage = proposal.subject.stage
    table = Table(
        title=f"stage '{stage.name}', {format_tokens(stage.tokens)} tokens: a proposal", title_justify="left"
    )
    for column in ("source", "planned", "proposed", "highest", "epochs at the end", "cap", "from"):
        table.add_column(column, justify="left" if column in ("source", "from") else "right")
    for line in proposal.lines:
        table.add_row(
            line.source,
            f"{line.planned:.2%}",
            f"{line.proposed:.2%}",
            f"{line.highest:.2%}",
            f"{line.epochs_after:.3f}",
            f"{line.cap:g}",
            line.basis,
        )
    console.print(table)


def _print_measured(proposal: Proposal, console: Console) -> None:
    evidence = proposal.evidence
    if proposal.laws:
        table = Table(title="mixture laws: what they say of this stage's mixture", title_justify="left")
        for column in ("metric", "law", "arms", "error left out", "of the mean", "planned", "proposed", ""):
            table.add_column(column, justify="right" if column not in ("metric", "law", "") else "left")
        for own in proposal.laws:
            law = own.law
            doubt = [] if law.holds else ["says little"]
            doubt += [] if own.inside else ["beyond the arms"]
            figures = (law.left_out_error, law.mean_error, own.planned, own.proposed)
            cells = [f"{figure:.4f}" for figure in figures]
            table.add_row(own.metric, law.kind, str(law.arms), *cells, ", ".join(doubt))
        console.print(table)
    elif evidence.ablations:
        console.print(
            "no mixture law: an ablation needs 3 arms more than the directions it varies in, such as two shares of each "
            "candidate",
            markup=False,
        )
    if evidence.validation:
        sources = list(evidence.validation[-1][1])
        table = Table(
            "at the end of stage", *sources, title="validation loss, nats per token", title_justify="left"
        )
        for stage, losses in evidence.validation:
            table.add_row(stage, *(f"{losses[name]:.3f}" if name in losses else "" for name in sources))
        console.print(table)
    if evidence.evaluations:
        table = Table(
            "category", "task", "score", "since the stage before", title="evaluations", title_justify="left"
        )
        for found in sorted(evidence.evaluations, key=lambda own: own.category):
            error = "" if found.error is None else f" ± {found.error:.4f}"
            change = found.change
            since = "" if change is None else f"{change.b - change.a:+.4f}, {change.verdict}"
            table.add_row(found.category, found.task, f"{found.value:.4f}{error}", since)
        console.print(table)


def write_diff(proposal: Proposal, path: Path) -> None:
    """Lines before the diff are comments to `patch`."""
    stage = proposal.subject.stage
    lines = [
        f"# Proposed mixture of stage '{stage.name}' ({format_tokens(stage.tokens)} tokens). Edit the weights, they sum to 1; then",
        f"# patch {proposal.subject.recipe_path} {path}",
        *([f"# or give smol train '{proposal.override}'"] if proposal.override else []),
        "#",
        *(
            f"# {line.source} {line.planned:g} -> {line.proposed:g}: {reason}"
            for line in proposal.lines
            for reason in line.reasons
        ),
        *(f"# {note}" for note in proposal.notes),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n" + proposal.diff)
