"""A row on its way through `smol chatdata`, what is counted of it, and chance that is the same in every run.

Generators and steps give (row, None) for a row that stays and (row, reason) for one that does not; `Stage` passes on
the first kind and counts both.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_smol.post.rows import Message, RowError, conversation, preference

Row = dict[
    str, Any
]  # "id", "source", and "messages" or "prompt", "chosen", "rejected"; what steps found, beside them
_SHOWN, _SHOWN_CHARACTERS = 3, 600


class Outcome(NamedTuple):
    """reason: why the row is dropped, in words that are the same for rows of the same kind; None: it stays."""

    row: Row
    reason: str | None = None


def turns_of(row: Row) -> list[Message]:
    """The conversation; of a preference the one that ends with the better answer."""
    turns: list[Message] = row["chosen"] if "chosen" in row else row["messages"]
    return turns


def text_of(row: Row) -> str:
    """All that is said in it, for steps that look at text."""
    return "\n".join(turn["content"] for turn in turns_of(row))


def check(row: Row) -> str | None:
    """Why `smol sft` or `smol dpo` could not read the row."""
    try:
        preference(row) if "chosen" in row else conversation(row)
    except RowError as error:
        return str(error)
    return None


def chance(*of: object) -> int:
    """A number from 0 to 2^31 - 1 that depends on its arguments only: seeds of requests, draws, order."""
    digest = hashlib.sha256("\0".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass
class Stage:
    """What one step did: rows in, kept and dropped by reason, a few of each."""

    title: str
    rows_in: int = 0
    kept: int = 0
    characters_kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped_samples: list[dict[str, Any]] = field(default_factory=list)

    def passed(self, outcomes: Iterable[Outcome]) -> Iterator[Row]:
        for row, reason in outcomes:
            self.rows_in += 1
            if reason is None:
                self.kept += 1
                self.characters_kept += len(text_of(row))
                yield row
                continue
            self.reasons[reason] += 1
            if len(self.dropped_samples) < _SHOWN:
                self.dropped_samples.append(sample(row) | {"reason": reason})

    def record(self) -> dict[str, Any]:
        """As the card shows it."""
        return {
            "step": self.title,
            "documents_in": self.rows_in,
            "kept": self.kept,
            "dropped": self.rows_in - self.kept,
            "characters_kept": self.characters_kept,
            "reasons": dict(self.reasons.most_common()),
            "dropped_samples": self.dropped_samples,
        }


def sample(row: Row) -> dict[str, Any]:
    """A row as the card shows it; also one that has no turns."""
    found = row.get("chosen") or row.get("messages")
    turns = found if isinstance(found, list) else []
    parts: list[str] = []
    if all(isinstance(turn, dict) for turn in turns):
        parts = [f"{turn.get('role')}: {turn.get('content')}" for turn in turns]
    if turns and isinstance(row.get("rejected"), list):
        parts.append(f"rejected: {row['rejected'][-1].get('content')}")
    text = "\n\n".join(parts) or str({name: row[name] for name in row if name != "id"})
    return {"id": str(row.get("id", "")), "text": text[:_SHOWN_CHARACTERS], "characters": len(text)}
