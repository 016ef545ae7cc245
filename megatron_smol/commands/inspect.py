"""`smol inspect`: what any step read or will read, and when a text was or will be read."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_smol.commands.arguments import Overrides, RecipePath


def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(help="The step whose batch to show; the first is 1, and shown by default.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="The step in which a lineage reads its so-many-th token, such as 7.3T."),
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(help="Tell which steps read the documents that hold this text.", metavar="TEXT"),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Its stage, where branches make the step ambiguous; --find: only this one."),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="--find: search this source only; may be given several times.")
    ] = None,
    max_documents: Annotated[
        int, typer.Option(help="--find: stop the search after this many documents.", min=1)
    ] = 10,
    index_only: Annotated[
        bool, typer.Option(help="Sources, epochs and windows only; needs no data on disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what any step read or will read: every row of its batch, decoded, with its source and documents.

    With --find the other way round: the stages, steps and rows that read a text, in every lineage.
    """
    from megatron_smol.data.inspect import inspect_batch, inspect_text
    from megatron_smol.errors import UserError
    from megatron_smol.recipe.load import load_recipe
    from megatron_smol.recipe.units import parse_tokens

    given = {"--step": step, "--tokens": tokens, "--find": find}
    if len(asked := [name for name, value in given.items() if value is not None]) > 1:
        raise UserError(f"{' and '.join(asked)} ask different questions; give one of them")
    if find is None and source:
        raise UserError("--source says where to search; give --find TEXT with it")
    loaded = load_recipe(recipe, overrides or [])
    if find is not None:
        inspect_text(loaded, find, source or (), stage, max_documents, json)
        return
    try:
        token = None if tokens is None else parse_tokens(tokens)
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from None
    inspect_batch(loaded, stage, 1 if step is None else step, index_only, json, token)
