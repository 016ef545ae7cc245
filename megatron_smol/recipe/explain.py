"""What is wrong with a recipe, or an ablation file, in one sentence: pydantic's findings put into a user's words.

`load` calls it with the data and the YAML nodes, so that a message can name the file, the line (or the override), the
dotted field, what was found and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_smol.errors import nearest
from megatron_smol.recipe.fields import aliases, dotted, section_at
from megatron_smol.recipe.schema import Recipe

Location = tuple[int | str, ...]


def explain(
    error: ValidationError,
    raw: Any,
    node: yaml.Node | None,
    name: str,
    root: type[BaseModel] = Recipe,
    overrides: Mapping[Location, str] = MappingProxyType({}),
) -> str:
    """The first problem as "file line n: sentence", and how many more there are.

    root: what the file is. overrides: by the place that they set, the last one last.
    """
    # A misspelt key is reported twice, as unknown and as missing; the unknown one names both.
    found = sorted(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    misspelt = {(*d["loc"][:-1], _meant(d, root)) for d in found if d["type"] == "extra_forbidden"}
    found = [d for d in found if d["type"] != "missing" or d["loc"] not in misspelt]
    first = found[0]
    more = f" (and {len(found) - 1} more problem{'s' if len(found) > 2 else ''})" if len(found) > 1 else ""
    return f"{_origin(first['loc'], node, name, overrides)}: {_sentence(first, raw, root)}{more}"


def _origin(location: Location, node: yaml.Node | None, name: str, overrides: Mapping[Location, str]) -> str:
    """Who said what is wrong: an override, or a line of the file."""
    for place, override in reversed(list(overrides.items())):
        if location[: len(place)] == place:
            return f"override '{override}'"
    line = _line(node, location)
    return name + (f" line {line}" if line else "")


def _sentence(details: ErrorDetails, raw: Any, root: type[BaseModel]) -> str:
    location, kind = details["loc"], details["type"]
    here = dotted(location, raw)
    inside = dotted(location[:-1], raw)
    if kind == "extra_forbidden":
        section = section_at(location[:-1], root)
        hint = nearest(str(location[-1]), aliases(section)) if section else ""
        return f"{f'{inside}: ' if inside else ''}'{location[-1]}' is not a field; {hint}"
    if kind == "missing":
        return (
            f"{inside or ('the recipe' if root is Recipe else 'the file')} lacks the field '{location[-1]}'"
        )
    if kind == "value_error":
        message = str(details["ctx"]["error"])
        return f"{here}: {message}" if here else message
    if kind == "string_pattern_mismatch":
        return f"{here} is {details['input']!r}; a name is made of letters, digits, '-' and '_'"
    allowed = (
        details["msg"].replace("Input should be", "it should be").replace("a valid dictionary", "a mapping")
    )
    allowed = allowed.replace("a valid dictionary or object to extract fields from", "a mapping of fields")
    allowed = allowed.replace("a valid tuple", "a list").replace("a valid list", "a list")
    if kind == "model_type":
        allowed = "it should be a section of fields"
    return f"{here} is {_shown(details['input'])}; {allowed}"


def _meant(details: ErrorDetails, root: type[BaseModel]) -> str:
    """The field that a misspelt key was probably meant to be."""
    section = section_at(details["loc"][:-1], root)
    hint = nearest(str(details["loc"][-1]), aliases(section)) if section else ""
    return hint.removeprefix("did you mean '").removesuffix("'?")


def _shown(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(node: yaml.Node | None, location: Location) -> int | None:
    """The line of the deepest part of `location` that the file has; None when nothing of it is there."""
    line: int | None = None
    for key in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(key)), None)
            if pair is None:
                return line
            node, line = pair[1], pair[0].start_mark.line + 1
        else:
            return line
    return line
