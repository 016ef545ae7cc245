"""Chat data as it lies on a disk or a hub: rows out of files, each checked before anything is made of it.

    FILE | OWNER/NAME:CONFIG:SPLIT ─ read_rows ─► (where, row) ─ conversation | preference ─► turns

A row that cannot be used raises RowError with a reason; prepare.py counts, names and skips it, or refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_smol.data.corpus import opened
from megatron_smol.data.inputs import COMPRESSED
from megatron_smol.errors import DataError, UserError
from megatron_smol.post.template import END_OF_TEXT, ROLES, TURN_END, TURN_START

Message = dict[str, str]  # role, content
_LINES = (".jsonl", ".json", ".ndjson")
_ENDINGS = tuple(kind + packed for kind in _LINES for packed in ("", *COMPRESSED))
_FILES = ".jsonl, .json, .jsonl.gz, .jsonl.zst, .parquet"
# (configuration, split) of the data sets that SmolLM2's tail read.
_HUB_DEFAULTS = {
    "HuggingFaceTB/smoltalk": ("all", "train"),
    "HuggingFaceH4/ultrafeedback_binarized": ("default", "train_prefs"),
}


class RowError(ValueError):
    """Why a row cannot be used, in words that are the same for rows of the same kind."""


class NotJson(NamedTuple):
    """Stands for a line that is no JSON."""

    reason: str


class Preference(NamedTuple):
    """A prompt of one or more turns, the better answer and the worse one."""

    prompt: list[Message]
    chosen: str
    rejected: str


# --- reading -------------------------------------------------------------------------------------------------


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Each row with where it stands ("chat.jsonl:12"), from a local file or a hub data set."""
    path = Path(source).expanduser()
    if path.is_file():
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    elif _is_hub_name(source):
        yield from _hub_rows(source)
    else:
        raise UserError(
            f"there is no data file {source}; give a file ({_FILES}) or a hub name (OWNER/NAME:CONFIG:SPLIT)"
        )


def _is_hub_name(source: str) -> bool:
    name = source.split(":")[0]
    looks_like_a_file = Path(name).suffix in (*_LINES, *COMPRESSED, ".parquet")
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not looks_like_a_file


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.name.endswith(_ENDINGS):
        raise UserError(f"{path} is of no known kind; give {_FILES}")
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return NotJson("not JSON")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"{path} is not a whole parquet file ({error}); copy it again") from error


def _hub_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, *rest = source.split(":")
    configuration, split = _HUB_DEFAULTS.get(name, ("", "train"))
    configuration = (rest[0] if rest else "") or configuration
    split = (rest[1] if len(rest) > 1 else "") or split
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except (
        Exception
    ) as error:  # the hub client raises a dozen kinds: offline, not found, gated, no such split
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set {name} (configuration {configuration or 'default'}, split {split}) could not be "
            f"fetched: {reason}; go online, name another as OWNER/NAME:CONFIG:SPLIT, or give a local file"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name} row {number}", row


# --- checking ------------------------------------------------------------------------------------------------


def conversation(row: Any) -> list[Message]:
    """The turns of a SmolTalk-style row: {"messages": [{"role", "content"}, ...]}."""
    turns = _turns(_field(row, "messages"))
    if all(turn["role"] != "assistant" for turn in turns):
        raise RowError("no assistant turn")
    return turns


def preference(row: Any) -> Preference:
    """An UltraFeedback-style row: `chosen` and `rejected` as answers, or as whole conversations.

    `prompt` is text or turns; whole conversations carry their own.
    """
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        better, worse, prompt = chosen, rejected, _prompt(row)
    else:
        (before, better), (also_before, worse) = _split(chosen), _split(rejected)
        if before != also_before:
            raise RowError("chosen and rejected answer different prompts")
        given = _prompt(row) if not any(turn["role"] == "user" for turn in before) else []
        prompt = before + given  # `before` is then a system turn or nothing
    for answer in (better, worse):
        _check_text(answer)
    if better.strip() == worse.strip():
        raise RowError("chosen equals rejected")
    if prompt[-1]["role"] != "user":
        raise RowError("the prompt does not end with a user turn")
    return Preference(prompt, better, worse)


def _field(row: Any, name: str) -> Any:
    if isinstance(row, NotJson):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    if row.get(name) is None:
        raise RowError(f"no '{name}'")
    return row[name]


def _prompt(row: Any) -> list[Message]:
    prompt = _field(row, "prompt")
    if isinstance(prompt, str):
        _check_text(prompt)
        return [{"role": "user", "content": prompt}]
    return _turns(prompt)


def _split(answer: Any) -> tuple[list[Message], str]:
    """The turns before the last one, and the last one's text."""
    turns = _turns(answer)
    if turns[-1]["role"] != "assistant":
        raise RowError("no assistant turn at the end")
    return turns[:-1], turns[-1]["content"]


def _turns(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError("no turns")
    return [_turn(item, first=index == 0) for index, item in enumerate(value)]


def _turn(item: Any, first: bool) -> Message:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise RowError("a turn without role and content")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise RowError(f"unknown role {role!r}")
    if role == "system" and not first:
        raise RowError("a system turn that is not the first")
    _check_text(content, may_be_empty=role == "system")
    return {"role": role, "content": content}


def _check_text(content: Any, may_be_empty: bool = False) -> None:
    if not isinstance(content, str):
        raise RowError("content that is not text")
    if not may_be_empty and not content.strip():
        raise RowError("empty content")
    # Tokenizers read these as what they look like: such text would end its own turn and begin another.
    for token in (TURN_START, TURN_END, END_OF_TEXT):
        if token in content:
            raise RowError(f"content holds the control token {token}")
