"""The kinds of values and the base of the sections that a recipe is made of; schema.py and tail.py use them."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)

from megatron_smol.recipe.mixture import mixture_text, resolve_mixture
from megatron_smol.recipe.units import Amount, exact_tokens, parse_amount, parse_steps, parse_tokens

Precision = Literal[
    "fp32",
    "bf16",
    "fp8-tensorwise",
    "fp8-delayed",
    "fp8-blockwise",
    "emulated-fp8-tensorwise",
    "emulated-fp8-delayed",
    "emulated-fp8-blockwise",
]
Shape = Literal["linear", "cosine", "1-sqrt"]


def _number(value: object) -> object:
    """YAML 1.1 reads 1e-5 as text; in a field that holds a number it is a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _plain(amount: object) -> str | int:
    """An amount for a YAML file: 6T and 2000 steps as text, 65536 as a number."""
    return int(text) if (text := str(amount)).isdecimal() else text


def _at_least_one(tokens: int) -> int:
    if tokens < 1:
        raise ValueError("0 tokens are none; give at least 1, or leave the field out")
    return tokens


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
TokensOrSteps = Annotated[Amount, PlainValidator(parse_amount), PlainSerializer(_plain)]
Tokens = Annotated[
    int, PlainValidator(parse_tokens), PlainSerializer(lambda tokens: _plain(exact_tokens(tokens)))
]
SomeTokens = Annotated[Tokens, AfterValidator(_at_least_one)]
Steps = Annotated[int, PlainValidator(parse_steps), PlainSerializer(lambda steps: f"{steps} steps")]
Mixture = Annotated[dict[str, Fraction], PlainValidator(resolve_mixture), PlainSerializer(mixture_text)]
StepSpan = Annotated[tuple[int, int], Field(strict=False)]
# Names become folder names, metric names and parts of dotted overrides.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def field(meaning: str, default: Any = ..., unit: str = "", **constraints: Any) -> Any:
    """A recipe field: its meaning and unit are what the reference prints."""
    return Field(
        default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **constraints
    )


class Section(BaseModel):
    """Base of all sections: no unknown keys, no guessing of types, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
