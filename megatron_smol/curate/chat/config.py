"""What a chat data file may say, and its errors in one sentence. `pipeline` carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_smol.curate.chat.constrained import Constraints
from megatron_smol.curate.chat.given import Given
from megatron_smol.curate.chat.magpie import Magpie
from megatron_smol.curate.chat.preferences import Preferences
from megatron_smol.curate.chat.sampling import Generator
from megatron_smol.curate.chat.steps import (
    Decontaminate,
    Exact,
    Judge,
    Length,
    Match,
    Only,
    Semantic,
    Step,
    Turns,
)
from megatron_smol.curate.chat.texts import Rewrite, Summarize
from megatron_smol.curate.config import first_problem
from megatron_smol.curate.endpoint import EndpointSettings
from megatron_smol.curate.section import Section
from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_yaml


class Steps(Section):
    """One entry of `steps`: the name of a step with its parameters."""

    score: Judge | None = None
    field: Only | None = None
    turns: Turns | None = None
    length: Length | None = None
    match: Match | None = None
    exact: Exact | None = None
    semantic: Semantic | None = None
    decontaminate: Decontaminate | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {value: {}} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Steps:
        _only_one(self, tuple(type(self).model_fields))
        return self

    def step(self) -> Step:
        return next(step for _, step in self if step is not None)


_GENERATORS = ("magpie", "constraints", "rewrite", "summarize", "given", "preferences")


class Part(Section):
    """Rows of one kind: where they come from, what stays, how many of them the output has."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    magpie: Magpie | None = None
    constraints: Constraints | None = None
    rewrite: Rewrite | None = None
    summarize: Summarize | None = None
    given: Given | None = None
    preferences: Preferences | None = None
    steps: tuple[Steps, ...] = ()
    take: int | None = Field(None, ge=0, description="rows of the output at most")
    share: float | None = Field(None, gt=0, le=1, description="of the output's rows; for all parts, or none")

    @model_validator(mode="after")
    def _one(self) -> Part:
        _only_one(self, _GENERATORS)
        if self.take is not None and self.share is not None:
            raise ValueError("give `take` (rows) or `share` (of all rows), not both")
        return self

    def generator(self) -> Generator | Given | Preferences:
        found: Generator | Given | Preferences = next(
            getattr(self, name) for name in _GENERATORS if getattr(self, name) is not None
        )
        return found

    def models(self) -> list[str]:
        return [*self.generator().models(), *(name for entry in self.steps for name in entry.step().models())]


class ChatData(Section):
    """A chat data file: parts in, steps over all of them, one set of rows out."""

    name: str
    output: Path
    models: dict[str, EndpointSettings] = Field(default_factory=dict)
    parts: tuple[Part, ...] = Field(min_length=1)
    steps: tuple[Steps, ...] = Field((), description="over the rows of all parts together")
    rows: int | None = Field(None, gt=0, description="of the output at most, where parts have shares")
    test_share: float = Field(
        0.0, ge=0, lt=1, description="of the rows, into test.jsonl; smol-smoltalk: 0.05"
    )
    seed: int = 42

    @field_validator("parts")
    @classmethod
    def _names(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        names = [part.name for part in value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"part '{min(twice)}' is there twice; names are for one part each")
        shares = [part.share for part in value if part.share is not None]
        if shares and (len(shares) < len(value) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(
                f"shares are of all parts and add up to 1; {len(shares)} of {len(value)} parts have one, together "
                f"{sum(shares):g}"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> ChatData:
        named = [name for part in self.parts for name in part.models()]
        named += [name for entry in self.steps for name in entry.step().models()]
        if unknown := sorted(set(named) - set(self.models)):
            raise ValueError(
                f"model '{unknown[0]}' is not among `models`; there are: {', '.join(self.models) or 'none'}"
            )
        kinds = {part.preferences is not None for part in self.parts if part.given is None}
        if len(kinds) > 1:
            raise ValueError(
                "preferences and conversations are in one file; make two: `smol dpo` and `smol sft` read one kind each"
            )
        return self


def _only_one(section: Section, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = "none" if not given else " and ".join(given)
        raise ValueError(f"one of {', '.join(names)} is to be given, found {found}")


def load_chat_data(path: Path, overrides: Mapping[str, Any] | None = None) -> ChatData:
    """Read a chat data file; `overrides` of its fields win. Raises UserError."""
    try:
        return ChatData.model_validate(load_yaml(path) | dict(overrides or {}))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
