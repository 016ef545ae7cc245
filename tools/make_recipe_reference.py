"""Write docs/recipe.md, the reference of all recipe fields, from the schema.

Run `python tools/make_recipe_reference.py` after a change of the schema; a test compares the page with it.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_smol.recipe.document import JSON_FIELDS
from megatron_smol.recipe.fields import bare
from megatron_smol.recipe.plan import ROUNDING_RULE
from megatron_smol.recipe.schema import Recipe
from megatron_smol.recipe.units import HOW_TO_WRITE, Amount

TARGET = Path(__file__).parent.parent / "docs" / "recipe.md"
INTRODUCTION = f"""# Recipe reference

A recipe is one YAML file. This page is generated from its schema (`tools/make_recipe_reference.py`); complete
examples with the source of every number are in `examples/`. A key that is not listed here is an error.

- Amounts: {HOW_TO_WRITE}.
  Suffixes are decimal: k, M, B, T.
- Rounding: {ROUNDING_RULE}.
  `smol plan` prints the result.
- Any field can be changed on the command line: `training.micro_batch=2`, `stages.stable-1.until=1M`,
  `sources.dclm.max_epochs=3`; stages and sources go by their names.
- Mixtures are names and weights that sum to 1. `web: {{weight: 0.9, of: {{a: 0.6, b: 0.4}}}}` is a group: its
  weight is shared out by the inner weights, which sum to 1 themselves. Groups nest; a source that is named
  twice adds up.
- A stage follows the last stage that is not a branch. With `from` it is a branch: it starts inside an earlier
  stage and continues that stage's data and learning rate.
- The LR of a step is that at the tokens consumed before it: the first step of a warm-up has LR 0. LR
  boundaries in steps are steps of the trunk.
- Epoch caps: a source that any lineage reads more often than its `max_epochs` makes the plan an error, or a
  warning with `data.over_epochs: warn`. Without a cap there is a warning above 4 epochs.
"""
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Amount: "amount"}


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted path, outermost first."""
    yield path, model
    for name, info in model.model_fields.items():
        inner, here = bare(info.annotation), f"{path}.{info.alias or name}".lstrip(".")
        if get_origin(inner) is tuple:
            yield from sections(get_args(inner)[0], f"{here}[]")
        elif (
            get_origin(inner) is dict
            and isinstance(get_args(inner)[1], type)
            and is_section(get_args(inner)[1])
        ):
            yield from sections(get_args(inner)[1], f"{here}.<name>")
        elif is_section(inner):
            yield from sections(inner, here)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_name(info: FieldInfo) -> str:
    """The type in a user's words."""
    kept = strip_optional(info.annotation)
    inner = bare(kept)
    if inner is Amount or (
        extra(info).get("unit") in ("tokens", "steps") and inner is int and has_parser(info, kept)
    ):
        return "amount"
    if get_origin(inner) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(inner))
    if get_origin(inner) is tuple:
        return "list of sections"
    if get_origin(inner) is dict:
        if is_section(get_args(inner)[1]):
            return "sections by name"
        return "mixture" if get_args(inner)[1] is Fraction else "lists by name"
    return "section" if is_section(inner) else NAMES[inner]


def strip_optional(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        return next(choice for choice in get_args(annotation) if choice is not type(None))
    return annotation


def has_parser(info: FieldInfo, annotation: Any) -> bool:
    """Whether the field reads texts such as 6T: its type carries a validator of ours."""
    notes = [*info.metadata, *(get_args(annotation)[1:] if get_origin(annotation) is Annotated else ())]
    return any(type(note).__name__ == "PlainValidator" for note in notes)


def extra(info: FieldInfo) -> dict[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def default_text(info: FieldInfo) -> str:
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return ""
    if isinstance(info.default, BaseModel):
        return "its defaults"
    return f"`{str(info.default).lower() if isinstance(info.default, bool) else info.default}`"


def reference() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for path, model in sections(Recipe):
        title = f"`{path}`" if path else "Top level"
        lines += [f"## {title}", "", str(model.__doc__), "", "| field | type | unit | default | meaning |"]
        lines += ["|---|---|---|---|---|"]
        for name, info in model.model_fields.items():
            cells = [
                f"`{info.alias or name}`",
                type_name(info),
                extra(info).get("unit", ""),
                default_text(info),
            ]
            cells.append(str(info.description).replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["## `smol plan --json`", "", "| key | content |", "|---|---|"]
    lines += [f"| `{key}` | {text} |" for key, text in JSON_FIELDS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET}")
