"""Settings of the tail: SmolLM2's own for the model's size, a recipe's `tail:` section, then `a.b=c`.

`smol sft` and `smol dpo` take the fields of `tail.sft` and `tail.dpo` by name: lr=1e-4 epochs=1. Sources:
huggingface/alignment-handbook, recipes/smollm2 (sft and dpo configurations of 2024-11), and the SmolLM2
paper, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from megatron_smol.errors import UserError
from megatron_smol.recipe.explain import explain
from megatron_smol.recipe.load import RecipeLoader, load_recipe
from megatron_smol.recipe.overrides import apply_override
from megatron_smol.recipe.schema import Dpo, Section, Sft, Tail

Kind = Literal["sft", "dpo"]
SFT_LENGTH, DPO_LENGTH = 8192, 1024  # tokens


@dataclass(frozen=True)
class Size:
    """One of the three SmolLM2 models, and what its tail does otherwise than the others'."""

    name: str
    parameters: int
    sft: dict[str, Any]
    dpo: dict[str, Any]


_ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"
_SMALL: dict[str, dict[str, Any]] = {
    "sft": {"lr": 1e-3, "dataset": "HuggingFaceTB/smol-smoltalk"},
    "dpo": {"epochs": 2.0, "dataset": _ULTRAFEEDBACK},
}
SIZES = (
    Size(
        "1.7B",
        1_711_376_384,
        {"lr": 3e-4, "dataset": "HuggingFaceTB/smoltalk"},
        {"epochs": 3.0, "dataset": _ULTRAFEEDBACK},
    ),
    Size("360M", 361_821_120, **_SMALL),
    Size("135M", 134_515_008, **_SMALL),
)


class _TailAlone(Section):
    """A recipe of which only the tail is given."""

    tail: Tail


def read_tail(kind: Kind, recipe: Path | None, overrides: Sequence[str]) -> Sft | Dpo:
    """The section `tail.sft` or `tail.dpo` of a recipe (or an empty one) with the overrides applied.

    An override names a field of the section: lr=1e-4. Raises UserError with the nearest field.
    """
    changes = [f"tail.{kind}.{override}" for override in overrides]
    if recipe is not None:
        tail = load_recipe(recipe, changes).tail
    else:
        raw: dict[str, Any] = {"tail": {kind: {}}}
        for change in changes:
            apply_override(raw, change, _parse_value)
        try:
            tail = _TailAlone.model_validate(raw).tail
        except ValidationError as error:
            raise UserError(explain(error, raw, None, "the settings")) from None
    section = getattr(tail, kind) if tail is not None else None
    return section or (Sft() if kind == "sft" else Dpo())


def _parse_value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, RecipeLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': {' '.join(str(error).split())}") from None


def nearest_size(parameters: int) -> Size:
    """The SmolLM2 model whose parameter count is closest, by ratio."""
    return min(SIZES, key=lambda size: abs(math.log(parameters / size.parameters)))


def fill(section: Sft | Dpo, parameters: int, longest: int, on_gpu: bool) -> tuple[Sft | Dpo, list[str]]:
    """The section with nothing left open, and notes on what was chosen for the user.

    parameters: of the model. longest: the model's own limit, tokens. Raises UserError for lengths that the
    model or the section itself does not allow.
    """
    size = nearest_size(parameters)
    is_sft = isinstance(section, Sft)
    standard = SFT_LENGTH if is_sft else DPO_LENGTH
    chosen: dict[str, Any] = {
        **(size.sft if is_sft else size.dpo),
        "precision": "bf16" if on_gpu else "fp32",
        "seq_length": min(standard, longest),
    }
    notes = []
    if section.seq_length is None and longest < standard:
        notes.append(f"seq_length {longest:,} tokens: the model reads no more (SmolLM2's is {standard:,})")
    if abs(parameters / size.parameters - 1) > 0.05:
        notes.append(
            f"{parameters:,} parameters are not a SmolLM2 model's; settings of the nearest, {size.name}"
        )
    filled = section.model_copy(
        update={name: value for name, value in chosen.items() if getattr(section, name) is None}
    )
    length = filled.seq_length or 0
    if length > longest:
        raise UserError(
            f"seq_length is {length:,} and the model reads at most {longest:,} tokens (max_position_embeddings "
            "in its config.json); give a seq_length up to that"
        )
    if isinstance(filled, Dpo):
        prompt = filled.prompt_length or max(1, length // 2)
        if prompt >= length:
            raise UserError(
                f"prompt_length is {prompt:,} and seq_length {length:,}: nothing is left for the answers; "
                "prompt_length must be smaller"
            )
        filled = filled.model_copy(update={"prompt_length": prompt})
    return filled, notes


def accumulation(section: Sft | Dpo, ranks: int) -> int:
    """Forward passes per optimizer step on one rank; UserError when the batch does not divide so."""
    together = section.micro_batch * ranks
    if section.global_batch % together:
        raise UserError(
            f"global_batch {section.global_batch} is no multiple of micro_batch {section.micro_batch} x "
            f"{ranks} ranks = {together}; change global_batch or micro_batch"
        )
    return section.global_batch // together
