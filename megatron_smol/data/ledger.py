"""What a model has read, to the token: per stage, source and epoch, along the lineage of a run.

The trainer adds the rows of every global batch and saves the ledger in each checkpoint and in ledger.json.
`check` compares it with what the plan says should have been read. A batch that was read and not applied (train/guard.py)
counts as read, and as skipped besides: tokens trained on = tokens read - tokens skipped. A branch starts from a
copy of its parent's ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_smol.data.order import SourceOrder
from megatron_smol.data.stream import Rows, StageLike, Use, open_stream
from megatron_smol.errors import CheckpointError, UserError

VERSION = 1
ADVICE = "the recipe or its data changed since this run began; go back to them or use another run_dir"


class PlannedStage(StageLike, Protocol):
    """What `check` needs of a recipe.plan.StagePlan."""

    @property
    def parent(self) -> str | None: ...
    @property
    def start_step(self) -> int: ...
    @property
    def global_batch(self) -> int: ...


class PlanLike(Protocol):
    """What `check` needs of a recipe.plan.Plan."""

    @property
    def orders(self) -> Mapping[str, SourceOrder]: ...
    def stage(self, name: str) -> PlannedStage: ...


@dataclass
class StageUse:
    """What one stage read: for each source, the samples taken from each of its epochs, and how many were skipped."""

    seq_length: int
    samples_by_epoch: Use = field(default_factory=dict)
    skipped_by_epoch: Use = field(default_factory=dict)

    def samples(self) -> dict[str, int]:
        return {name: sum(by_epoch.values()) for name, by_epoch in self.samples_by_epoch.items()}

    def tokens(self) -> dict[str, int]:
        return {name: samples * self.seq_length for name, samples in self.samples().items()}

    def skipped_tokens(self) -> dict[str, int]:
        return {
            name: sum(by_epoch.values()) * self.seq_length for name, by_epoch in self.skipped_by_epoch.items()
        }

    def add(self, source: str, epoch: int, samples: int, applied: bool = True) -> None:
        for use in (self.samples_by_epoch,) if applied else (self.samples_by_epoch, self.skipped_by_epoch):
            by_epoch = use.setdefault(source, {})
            by_epoch[epoch] = by_epoch.get(epoch, 0) + samples


@dataclass
class Ledger:
    """What was consumed. `tokens_per_epoch` (by source) only serves to express tokens as epochs."""

    tokens_per_epoch: dict[str, int] = field(default_factory=dict)
    stages: dict[str, StageUse] = field(default_factory=dict)  # in the order they ran

    @classmethod
    def of(cls, plan: PlanLike) -> Ledger:
        """An empty ledger that knows the sizes of the plan's sources."""
        return cls({name: order.tokens_per_epoch for name, order in plan.orders.items()})

    def add(self, stage_name: str, seq_length: int, rows: Rows, applied: bool = True) -> None:
        """Count rows that a stage read, each worth `seq_length` tokens; not `applied`: skipped."""
        if not len(rows):
            return
        use = self.stages.setdefault(stage_name, StageUse(seq_length))
        if use.seq_length != seq_length:
            raise ValueError(
                f"stage '{stage_name}' has length {use.seq_length} in the ledger, got rows of {seq_length}"
            )
        for index, name in enumerate(rows.names):
            epochs, samples = np.unique(rows.epoch[rows.source == index], return_counts=True)
            for epoch, count in zip(epochs.tolist(), samples.tolist(), strict=True):
                use.add(name, epoch, count, applied)

    @property
    def consumed_samples(self) -> int:
        return sum(sum(use.samples().values()) for use in self.stages.values())

    @property
    def consumed_tokens(self) -> int:
        return sum(self.tokens().values())

    def tokens(self) -> dict[str, int]:
        """Tokens read from each source along the lineage."""
        total: dict[str, int] = {}
        for use in self.stages.values():
            for name, tokens in use.tokens().items():
                total[name] = total.get(name, 0) + tokens
        return total

    def skipped_tokens(self) -> dict[str, int]:
        """Tokens of each source that were read and not applied, along the lineage; {} where there are none."""
        total: dict[str, int] = {}
        for use in self.stages.values():
            for name, tokens in use.skipped_tokens().items():
                total[name] = total.get(name, 0) + tokens
        return total

    def epochs(self) -> dict[str, float]:
        """Tokens read over the tokens of one epoch, for each source whose size is known."""
        sizes = self.tokens_per_epoch
        return {name: tokens / sizes[name] for name, tokens in self.tokens().items() if name in sizes}

    def copy(self) -> Ledger:
        return Ledger.from_json(self.to_json())

    def check(self, plan: PlanLike, stage_name: str, samples: int) -> None:
        """Raise unless this is what the plan reads up to `samples` samples into the stage, to the token."""
        planned = planned_ledger(plan, stage_name, samples)
        if list(self.stages) != list(planned.stages):
            raise UserError(
                f"the ledger holds stages {', '.join(self.stages) or 'none'}, the plan "
                f"{', '.join(planned.stages) or 'none'}: {ADVICE}"
            )
        for name, use in planned.stages.items():
            _check_stage(name, self.stages[name], use)

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps; sums are there for people, and are checked when it is read back."""
        epochs, skipped = self.epochs(), self.skipped_tokens()
        sources = {
            name: {"tokens": tokens}
            | ({"skipped_tokens": skipped[name]} if name in skipped else {})
            | (
                {"tokens_per_epoch": self.tokens_per_epoch[name], "epochs": epochs[name]}
                if name in epochs
                else {}
            )
            for name, tokens in self.tokens().items()
        }
        return {
            "version": VERSION,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "skipped_tokens": sum(skipped.values()),
            "trained_tokens": self.consumed_tokens - sum(skipped.values()),
            "sources": sources,
            "unread_sources": {n: size for n, size in self.tokens_per_epoch.items() if n not in sources},
            "stages": [_stage_to_json(name, use) for name, use in self.stages.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """Read `to_json`'s result; CheckpointError when it is damaged or of another version."""
        if data.get("version") != VERSION:
            raise CheckpointError(f"ledger version {data.get('version')!r} is not known here, only {VERSION}")
        try:
            sizes = {
                n: entry["tokens_per_epoch"]
                for n, entry in data["sources"].items()
                if "tokens_per_epoch" in entry
            }
            ledger = cls(sizes | dict(data["unread_sources"]))
            for entry in data["stages"]:
                use = ledger.stages[entry["name"]] = StageUse(int(entry["seq_length"]))
                for source, read in entry["sources"].items():
                    skipped = read.get("skipped_by_epoch", {})
                    for epoch, samples in read["samples_by_epoch"].items():
                        use.add(source, int(epoch), int(samples) - int(skipped.get(epoch, 0)))
                    for epoch, samples in skipped.items():
                        use.add(source, int(epoch), int(samples), applied=False)
            found, written = ledger.consumed_tokens, data["consumed_tokens"]
            skips = (sum(ledger.skipped_tokens().values()), data.get("skipped_tokens", 0))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the ledger is damaged: {error!r}") from None
        if found != written:
            raise CheckpointError(
                f"the ledger is damaged: its stages add up to {found} tokens, it says {written}"
            )
        if skips[0] != skips[1]:
            raise CheckpointError(
                f"the ledger is damaged: its stages skipped {skips[0]} tokens, it says {skips[1]}"
            )
        return ledger


def planned_ledger(plan: PlanLike, stage_name: str, samples: int) -> Ledger:
    """What the plan reads from the root of the lineage up to `samples` samples into the stage, by
    arithmetic alone.
    """
    ledger = Ledger.of(plan)
    stage: PlannedStage | None = plan.stage(stage_name)
    path: list[tuple[PlannedStage, int]] = []
    while stage is not None:
        path.append((stage, samples))
        parent = plan.stage(stage.parent) if stage.parent is not None else None
        if parent is not None:  # how far the parent had come when this stage left it
            samples = (stage.start_step - parent.start_step) * parent.global_batch
        stage = parent
    for stage, read in reversed(path):
        if use := open_stream(stage, plan.orders).use(read):
            ledger.stages[stage.name] = StageUse(stage.seq_length, use)
    return ledger


def _check_stage(stage_name: str, found: StageUse, planned: StageUse) -> None:
    if found.seq_length != planned.seq_length:
        raise UserError(
            f"stage '{stage_name}' read windows of {found.seq_length} tokens by the ledger, "
            f"{planned.seq_length} by the plan: {ADVICE}"
        )
    for source in sorted(found.samples_by_epoch.keys() | planned.samples_by_epoch.keys()):
        ledger_epochs = found.samples_by_epoch.get(source, {})
        plan_epochs = planned.samples_by_epoch.get(source, {})
        for epoch in sorted(ledger_epochs.keys() | plan_epochs.keys()):
            have, want = ledger_epochs.get(epoch, 0), plan_epochs.get(epoch, 0)
            if have != want:
                raise UserError(
                    f"stage '{stage_name}' read {have * found.seq_length} tokens of epoch {epoch} of source "
                    f"'{source}' by the ledger, {want * found.seq_length} by the plan: {ADVICE}"
                )


def _stage_to_json(name: str, use: StageUse) -> dict[str, Any]:
    samples, tokens = use.samples(), use.tokens()
    return {
        "name": name,
        "seq_length": use.seq_length,
        "samples": sum(samples.values()),
        "tokens": sum(tokens.values()),
        "sources": {
            source: {
                "samples": samples[source],
                "tokens": tokens[source],
                "samples_by_epoch": _by_epoch(by_epoch),
            }
            | (
                {"skipped_by_epoch": _by_epoch(skipped)}
                if (skipped := use.skipped_by_epoch.get(source))
                else {}
            )
            for source, by_epoch in sorted(use.samples_by_epoch.items())
        },
    }


def _by_epoch(samples: Mapping[int, int]) -> dict[str, int]:
    return {str(epoch): count for epoch, count in sorted(samples.items())}
