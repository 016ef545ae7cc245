"""A proposal as a change of the recipe's text: comments, order and every other line stay as they are.

Works on the places that YAML's own parser gives, not on patterns; the changed text is read back and compared before anyone
sees it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import yaml

from megatron_smol.errors import UserError
from megatron_smol.rebalance.room import UNITS
from megatron_smol.recipe.load import RecipeLoader


def flow_mixture(units: Mapping[str, int]) -> str:
    """{docs: 0.6, code: 0.4}, from whole units; sources without any are left out."""
    return "{" + ", ".join(f"{name}: {count / UNITS:g}" for name, count in units.items() if count) + "}"


def replace_mixture(text: str, stage: str, units: Mapping[str, int]) -> str:
    """The recipe's text with another mixture in one stage; a block stays a block."""
    key, value = _field(_stage_node(text, stage), "mixture")
    if value.start_mark.index < key.end_mark.index:  # *alias: its node stands elsewhere
        start = text.index("*", key.end_mark.index)
        end = start + len(text[start:].split()[0])
        return text[:start] + flow_mixture(units) + text[end:]
    assert isinstance(value, yaml.MappingNode), "the recipe was loaded before"
    if value.flow_style:
        start, end = text.index("{", value.start_mark.index), value.end_mark.index  # behind an &anchor
        return text[:start] + flow_mixture(units) + text[end:]
    first = value.value[0][0].start_mark
    lines = [f"{name}: {count / UNITS:g}" for name, count in units.items() if count]
    block = ("\n" + " " * first.column).join(lines)
    return text[: first.index] + block + text[_line_end(text, _end(value)) :]


def append_stage(text: str, name: str, tokens: str, mixture: Mapping[str, object], where: str) -> str:
    """The recipe's text with one stage more behind the last one of the trunk."""
    stages = _stages_node(text)
    if stages.flow_style:
        raise UserError(f"the stages of {where} are written on one line; write stage '{name}' there first")
    trunk = [node for node in stages.value if not any(key.value == "from" for key, _ in node.value)]
    last = trunk[-1]
    column = last.value[0][0].start_mark.column
    dash = text.rindex("-", 0, last.value[0][0].start_mark.index) - text.rindex(
        "\n", 0, last.value[0][0].start_mark.index
    )
    inner = "{" + ", ".join(f"{source}: {weight}" for source, weight in mixture.items()) + "}"
    pad = " " * (dash - 1)
    lines = [
        f"{pad}-{' ' * (column - dash)}name: {name}",
        f"{' ' * column}tokens: {tokens}",
        f"{' ' * column}mixture: {inner}",
    ]
    end = _line_end(text, _end(last))
    return text[:end] + "\n" + "\n".join(lines) + (text[end:] or "\n")


def unified(before: str, after: str, path: str) -> str:
    """As `patch FILE DIFF` reads it."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), path, path, n=3
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


def _stages_node(text: str) -> yaml.SequenceNode:
    loader = RecipeLoader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    _, stages = _field(root, "stages")
    assert isinstance(stages, yaml.SequenceNode), "the recipe was loaded before"
    return stages


def _stage_node(text: str, stage: str) -> yaml.Node:
    return next(node for node in _stages_node(text).value if _field(node, "name")[1].value == stage)


def _field(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node]:
    assert isinstance(node, yaml.MappingNode), "the recipe was loaded before"
    for key, value in node.value:
        if key.value == name:
            return key, value
    line = node.start_mark.line + 1
    raise UserError(f"line {line} of the recipe takes '{name}' from elsewhere (<<); write it out there first")


def _end(node: yaml.Node) -> int:
    """Behind the last character of a node; a block's own mark lies behind the comments that follow it, an alias' elsewhere."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style:
        return node.end_mark.index
    parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
    return max(_end(part) for part in parts)


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    return len(text) if found < 0 else found
