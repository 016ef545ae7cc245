"""From a YAML file and `a.b=c` overrides to a checked `Recipe`, and back to YAML.

The way in for every command. All that can be wrong with a recipe's text is reported here as one sentence that
names the file, the line and the field: YAML's own errors, duplicate keys, unknown keys, wrong types, misfits.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_smol.errors import UserError
from megatron_smol.recipe.explain import explain
from megatron_smol.recipe.overrides import apply_override
from megatron_smol.recipe.schema import Recipe

Root = TypeVar("Root", bound=BaseModel)


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 asks for 1.0e-5) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As in SafeLoader, but a repeated key is an error instead of the last one winning silently."""
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a plain value"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                first = seen[key.value].start_mark.line + 1
                problem = f"key '{key.value}' is given twice (first on line {first}); remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = key
        return super().construct_mapping(node, deep)


# YAML 1.2's number: exponent without sign or dot allowed. Listed first, so it wins over YAML 1.1's rule.
_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
for _first in "-+.0123456789":
    RecipeLoader.yaml_implicit_resolvers[_first] = [
        ("tag:yaml.org,2002:float", _NUMBER),
        *RecipeLoader.yaml_implicit_resolvers.get(_first, []),
    ]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` such as "stages.stable-1.until=1M" win over the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no recipe file '{path}'; the shipped ones are under examples/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file '{path}' cannot be read: {error}") from error
    return parse_recipe(text, str(path), overrides)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, by the rules of recipes; for files that are not recipes."""
    return _load_mapping(path)[0]


def load_as(path: str | Path, root: type[Root]) -> Root:
    """A file that is not a recipe, checked by its own model and explained as a recipe is."""
    raw, node = _load_mapping(path)
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, raw, node, str(path), root)) from None


def _load_mapping(path: str | Path) -> tuple[dict[str, Any], yaml.Node | None]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return _parse_mapping(text, str(path))


def _parse_mapping(text: str, name: str) -> tuple[dict[str, Any], yaml.Node | None]:
    raw, node = _parse_yaml(text, name)
    if not isinstance(raw, dict):
        raise UserError(f"{name} must be a mapping of fields such as 'name: my-run', but is {_kind(raw)}")
    return raw, node


def parse_recipe(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Like `load_recipe`, from text; `name` stands for the file in messages."""
    raw, node = _parse_mapping(text, name)
    places: dict[tuple[int | str, ...], str] = {}
    for override in overrides:
        place = apply_override(raw, override, _parse_value)
        places.pop(place, None)  # the last one counts, and comes last
        places[place] = override
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain(error, raw, node, name, overrides=places)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: groups multiplied out, nothing left to defaults; loads back equal."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def _parse_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """The data, without aliases shared between places, and the node tree that knows its lines."""
    loader = RecipeLoader(text)
    try:
        node = loader.get_single_node()
        return (_unshared(loader.construct_document(node)) if node is not None else None), node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name} line {mark.line + 1}, column {mark.column + 1}" if mark else name
        raise UserError(f"{where} is not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(
            f"{name} is not valid YAML: an alias holds itself (or it is nested hundreds deep)"
        ) from None
    finally:
        loader.dispose()


def _parse_value(text: str, override: str) -> Any:
    """The value side of an override, read as YAML like the file itself."""
    return _parse_yaml(text, f"the value in override '{override}'")[0]


def _unshared(value: Any) -> Any:
    """A copy in which what a YAML alias repeats is separate, so that an override changes one place only."""
    if isinstance(value, Mapping):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
