"""What a curation file may say, and its errors in one sentence. `pipeline` carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_smol.curate.domains import Domains
from megatron_smol.curate.section import Section
from megatron_smol.curate.steps import STEPS, Step
from megatron_smol.errors import UserError, nearest
from megatron_smol.recipe.load import load_yaml


class Hub(Section):
    """A data set of the Hugging Face hub, or a local folder in its layout; its files are read in place."""

    name: str = Field(description="OWNER/NAME")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="commit, so that a run can be repeated")


class Inputs(Section):
    """Files of raw documents."""

    paths: tuple[str, ...] = Field(
        (),
        description="files, folders and globs, or URLs of them (s3://, gs://, hf://, https://): JSONL (plain, .gz, .zst), "
        "parquet, WARC; source files (local)",
    )
    hub: Hub | None = Field(None, description="in place of `paths`")
    code: bool = Field(
        False, description="of folders, the source files of Stack-Edu's 15 languages (code.py)"
    )
    text_key: str = Field("text", description="field of the text in JSONL and parquet")
    extract: Literal["trafilatura", "latex"] = Field(
        "trafilatura", description="HTML of WARC records to text; latex keeps formulas"
    )
    domains: Domains | None = Field(
        None, description="only pages of domains that pass this rule (domains.py)"
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_place(self) -> Inputs:
        if bool(self.paths) == (self.hub is not None):
            raise ValueError("give either `paths` or `hub`")
        return self


class Epochs(Section):
    """For the card: how often a recipe's stages would read this set."""

    recipe: Path
    source: str | None = Field(None, description="of the recipe; absent: the one of this curation's name")


class Slurm(Section):
    """Where the tasks run when it is a cluster (datatrove's SlurmPipelineExecutor)."""

    partition: str = Field(description="Slurm partition")
    time: str = Field("20:00:00", description="time limit of a task")
    cpus_per_task: int = Field(1, gt=0)
    mem_per_cpu_gb: int = Field(2, gt=0)
    sbatch: dict[str, str] = Field(default_factory=dict, description="more options of sbatch")


class Curation(Section):
    """A curation file: documents in, steps, documents out."""

    name: str
    inputs: Inputs
    output: Path
    steps: tuple[Step, ...]
    tasks: int = Field(
        8, gt=0, description="parts of the work: each reads its share of the files; a kill loses one"
    )
    workers: int = Field(0, ge=0, description="processes at once on this machine; 0: one a core")
    tokenizer: str | None = Field(None, description="to count tokens in the card; absent: characters only")
    epochs: Epochs | None = Field(None, description="needs `tokenizer`")
    slurm: Slurm | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("steps is a list, such as [gopher_quality, {minhash: {bands: 14, rows: 8}}]")
        return [_step(number, entry) for number, entry in enumerate(value, 1)]


def _step(number: int, entry: Any) -> Step:
    name, parameters = (entry, {}) if isinstance(entry, str) else _only_item(number, entry)
    if name not in STEPS:
        raise ValueError(f"step {number}, '{name}', is not known; {nearest(name, STEPS)}")
    try:
        return STEPS[name].model_validate(parameters or {})
    except ValidationError as error:
        raise ValueError(f"step {number}, {name}: {first_problem(error)}") from None


def _only_item(number: int, entry: Any) -> tuple[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(
            f"step {number} must be a name, or one `name: {{parameter: value}}`, found {entry!r}"
        )
    return next(iter(entry.items()))


def first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}{found}" if where and where != "steps" else message + found


def load_curation(
    path: Path, overrides: Mapping[str, Any] | None = None, inputs: Sequence[str] | None = None
) -> Curation:
    """Read a curation file; `overrides` of its fields and other `inputs` win. Raises UserError."""
    raw = load_yaml(path) | dict(overrides or {})
    if inputs:
        raw["inputs"] = dict(raw.get("inputs") or {}) | {"paths": list(inputs), "hub": None}
    try:
        return Curation.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
