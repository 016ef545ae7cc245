"""Where a dotted path leads in the schema: shared by overrides, error messages and the recipe reference."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from megatron_smol.recipe.schema import Recipe


def aliases(section: type[BaseModel]) -> dict[str, str]:
    """YAML key -> attribute name of a section's fields ("from" is `from_`)."""
    return {info.alias or name: name for name, info in section.model_fields.items()}


def bare(annotation: Any) -> Any:
    """The type without Annotated and without `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, UnionType):
            annotation = next(choice for choice in get_args(annotation) if choice is not type(None))
        else:
            return annotation


def step_into(annotation: Any, key: str) -> Any:
    """The type one path segment further; None inside a mixture and below a plain value."""
    here = bare(annotation)
    if isinstance(here, type) and issubclass(here, BaseModel):
        attribute = aliases(here).get(key)
        return None if attribute is None else here.model_fields[attribute].annotation
    if get_origin(here) is tuple:
        return get_args(here)[0]
    if (
        get_origin(here) is dict
        and isinstance(value := get_args(here)[1], type)
        and issubclass(value, BaseModel)
    ):
        return value
    return None


def section_at(location: tuple[int | str, ...], root: type[BaseModel] = Recipe) -> type[BaseModel] | None:
    """The section a pydantic error location points into, None when it is not a section."""
    annotation: Any = root
    for key in location:
        annotation = step_into(annotation, str(key))
        if annotation is None:
            return None
    here = bare(annotation)
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def dotted(location: tuple[int | str, ...], raw: Any) -> str:
    """A location as a user writes it: list items by name where they have one."""
    text = ""
    here = raw
    for key in location:
        try:
            here = here[key]
        except (LookupError, TypeError):
            here = None
        name = here.get("name") if isinstance(key, int) and isinstance(here, Mapping) else key
        if isinstance(name, str):
            text += f".{name}" if text else name
        else:
            text += f"[{key}]"
    return text
