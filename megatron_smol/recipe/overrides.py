"""`a.b=c` on the command line: change one field of a recipe's data before it is checked.

Sections by field name, stages by their name or index, sources by name. A path that the schema does not know
is an error that names the nearest field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_origin

from pydantic import BaseModel

from megatron_smol.errors import UserError, nearest
from megatron_smol.recipe.fields import aliases, bare, step_into
from megatron_smol.recipe.schema import Recipe


def apply_override(
    raw: dict[str, Any], override: str, parse: Callable[[str, str], Any]
) -> tuple[int | str, ...]:
    """Set the field that `override` ("path=value") names in `raw`; returns the keys and indices that lead there."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(
            f"override '{override}' is not of the form path.to.field=value, such as training.micro_batch=2"
        )
    holder: Any = raw
    annotation: Any = Recipe
    slots: list[int | str] = []
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        slot = _slot(holder, annotation, key, ".".join(keys[:depth]), override)
        slots.append(slot)
        annotation = step_into(annotation, key)
        if last:
            holder[slot] = parse(value, override)
        else:
            if isinstance(holder, dict) and holder.get(slot) is None:
                holder[slot] = {}
            holder = holder[slot]
    return tuple(slots)


def _slot(holder: Any, annotation: Any, key: str, parent: str, override: str) -> int | str:
    """The dict key or list index that `key` means inside `holder`, or a UserError with the nearest name."""
    where = f"override '{override}': "
    inside = f"'{parent}'" if parent else "a recipe"
    here = bare(annotation) if annotation is not None else None
    if isinstance(here, type) and issubclass(here, BaseModel) and isinstance(holder, dict):
        if key not in aliases(here):
            raise UserError(f"{where}{inside} has no field '{key}'; {nearest(key, aliases(here))}")
        return key
    if here is not None and get_origin(here) not in (dict, tuple):
        raise UserError(f"{where}{inside} is a single value and has no field '{key}'")
    if isinstance(holder, list):
        names = [item.get("name") if isinstance(item, dict) else None for item in holder]
        if key in names:
            return names.index(key)
        if key.isdecimal() and int(key) < len(holder):
            return int(key)
        raise UserError(f"{where}{inside} has no '{key}'; {nearest(key, [name for name in names if name])}")
    if isinstance(holder, dict):
        # Sources exist or they do not; inside a mixture new names are allowed, the schema checks them
        # afterwards.
        if get_origin(here) is dict and parent == "sources" and key not in holder:
            raise UserError(f"{where}there is no source '{key}'; {nearest(key, holder)}")
        return key
    raise UserError(f"{where}{inside} is a single value and has no field '{key}'")
