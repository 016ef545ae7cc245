"""`smol inspect`: what any step read or will read."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_smol.commands.arguments import Overrides, RecipePath


def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="The step whose batch to show; the first is 1.")] = 1,
    stage: Annotated[
        str | None, typer.Option(help="Its stage, where branches make the step ambiguous.")
    ] = None,
    index_only: Annotated[
        bool, typer.Option(help="Sources, epochs and windows only; needs no data on disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what any step read or will read: every row of its batch, decoded, with its source."""
    from megatron_smol.data.inspect import inspect_batch
    from megatron_smol.recipe.load import load_recipe

    inspect_batch(load_recipe(recipe, overrides or []), stage, step, index_only, json)
