"""What an ablation file may say. `recipes` turns it into one recipe a run.

Two kinds, both SmolLM2's (paper, section 3.1): from scratch (web data: a candidate alone for the whole budget), and
annealing (maths, code: from a checkpoint of a run in progress, `share` of the candidate in the running mixture, the
LR straight down to zero).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_smol.recipe.load import load_as
from megatron_smol.recipe.mixture import resolve_mixture
from megatron_smol.recipe.schema import TokensOrSteps

CONTROL = "control"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Start(Section):
    """The checkpoint that every run starts from."""

    run: Path = Field(description="run folder with the checkpoint")
    stage: str = Field(description="stage of the base recipe that it belongs to")
    at: TokensOrSteps = Field(
        description="where in that lineage: a step exactly ('2000 steps'), or, in tokens, the first checkpoint that the run "
        "saves at or after so many"
    )


class Evaluation(Section):
    """`smol eval` of every finished run."""

    tasks: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = Field(None, gt=0)


class Ablation(Section):
    """An ablation file."""

    name: str
    base: Path = Field(description="recipe with the model, the sources and everything that the runs share")
    output: Path = Field(description="folder of the runs and the results")
    from_: Start | None = Field(None, alias="from", description="absent: from scratch")
    budget: tuple[TokensOrSteps, ...] = Field(
        description="length of every run; a list compares several lengths", min_length=1
    )
    candidates: dict[str, dict[str, Any]] = Field(description="mixtures by name", min_length=1)
    shares: tuple[float, ...] = Field((0.6,), description="of a candidate in an annealing run; SmolLM2: 0.6")
    running: dict[str, Any] | None = Field(
        None, description="the rest; default: the mixture of the stage that is left"
    )
    control: bool = Field(True, description="annealing: also the running mixture alone")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="added to the recipe's data seed")
    rank_by: str = Field("loss:mean", description="loss:SOURCE, loss:mean, or TASK:METRIC of an evaluation")
    eval: Evaluation | None = None
    ranks: int = Field(0, ge=0, description="processes of a run on this machine; 0: one, without a launcher")
    jobs: int = Field(1, gt=0, description="runs at a time on this machine")
    overrides: tuple[str, ...] = Field((), description="of the base recipe, as a.b=c")

    @model_validator(mode="before")
    @classmethod
    def _no_recipe(cls, value: Any) -> Any:
        if isinstance(value, dict) and "stages" in value and "base" not in value:
            raise ValueError(
                "is a recipe; an ablation file names one as 'base', see examples/ablation_math.yaml"
            )
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _one_budget_or_several(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

    @field_validator("seeds", "shares", "budget")
    @classmethod
    def _no_twins(cls, value: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"a value is given twice in {', '.join(map(str, value))}")
        return value

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < share <= 1 for share in value):
            raise ValueError(f"shares must lie above 0 and at most 1, found {list(value)}")
        return value

    @model_validator(mode="after")
    def _mixtures(self) -> Ablation:
        if CONTROL in self.candidates:
            raise ValueError(f"a candidate cannot be called '{CONTROL}': that is the running mixture alone")
        for name, mixture in self.candidates.items():
            try:
                resolve_mixture(mixture)
            except ValueError as error:
                raise ValueError(f"candidate '{name}': {error}") from None
        return self


def load_ablation(path: Path) -> Ablation:
    """Read an ablation file; raises UserError."""
    return load_as(path, Ablation)
