"""Checked rows into tokens, once for all ranks and restarts, with a summary of what was kept and what was not.

    read_rows ─► conversation | preference ─ tokenizer ─► WORK/tokens.arrow ─ split ─► training, held out

The file is memory-mapped: a data set larger than memory is no problem, and ranks share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_smol.data.files import flush_to_disk, partial_path, publish, write_whole
from megatron_smol.errors import DataError
from megatron_smol.post.rows import RowError, conversation, preference, read_rows
from megatron_smol.post.template import CHATML, CHATML_MARKED, TURN_END
from megatron_smol.recipe.schema import Dpo, Sft

TOKENS, SUMMARY, BAD_ROWS = "tokens.arrow", "summary.json", "bad_rows.jsonl"
NO_LOSS = -100  # label of a token that carries none: PyTorch's ignore_index
_BATCH = 512  # rows tokenized together
_NAMED = 3  # bad rows of a kind that the terminal names; the file has all

Columns = dict[str, list[int]]


@dataclass
class Summary:
    """What became of the data. Lengths are tokens of whole rows before anything was cut."""

    rows: int = 0
    kept: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first rows
    bad_count: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # what was cut -> rows
    tokens: int = 0
    shortest: int = 0
    median: int = 0
    p95: int = 0
    longest: int = 0

    def lines(self, unit: str) -> list[str]:
        """The summary for the terminal; unit is "conversations" or "pairs"."""
        said = [
            f"data: {self.kept:,} of {self.rows:,} rows kept, {self.tokens:,} tokens; a row has {self.median:,} "
            f"tokens (median), 95 % up to {self.p95:,}, from {self.shortest:,} to {self.longest:,}"
        ]
        for reason, count in sorted(self.bad_count.items(), key=lambda item: -item[1]):
            examples = ", ".join(self.bad[reason]) + (", ..." if count > len(self.bad[reason]) else "")
            said.append(f"  skipped {count:,}: {reason} ({examples})")
        said += [f"  {count:,} {unit} {what}" for what, count in self.cut.items() if count]
        return said


def prepare(
    source: str,
    section: Sft | Dpo,
    tokenizer: Any,
    work: Path,
    bad_rows: Path,
    strict: bool,
    console: Console,
) -> Summary:
    """Write WORK/tokens.arrow and return its summary; what an earlier start of the same run wrote is used.

    strict: the first bad row is an error. Raises DataError when no row can be used.
    """
    if (work / SUMMARY).is_file() and (work / TOKENS).is_file():
        return Summary(**json.loads((work / SUMMARY).read_text()))
    writer = _Preparation(section, tokenizer, strict)
    partial = partial_path(work / TOKENS)
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in writer.columns])
    columns = (SpinnerColumn(), TextColumn("tokenizing {task.completed:,} rows"), TimeElapsedColumn())
    try:
        with (
            partial.open("wb") as stream,
            pa.ipc.new_stream(stream, schema) as table,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            task = bar.add_task("", total=None)
            for batch in writer.batches(read_rows(source)):
                table.write_table(pa.Table.from_pylist(batch, schema=schema))
                bar.update(task, completed=writer.summary.rows)
            table.close()
            flush_to_disk(stream)
        if not writer.summary.kept:
            raise DataError(f"no row of {source} can be used: {writer.why_none()}")
        write_whole(bad_rows, "".join(json.dumps(row) + "\n" for row in writer.bad_rows))
        publish(partial, work / TOKENS)
    finally:
        partial.unlink(missing_ok=True)
    summary = writer.finished()
    write_whole(work / SUMMARY, json.dumps(asdict(summary)))
    return summary


def split(work: Path, section: Sft | Dpo) -> tuple[Any, Any | None]:
    """(training rows in shuffled order, held-out rows or None) as memory-mapped datasets, by the seed alone."""
    import datasets

    rows = datasets.Dataset.from_file(str(work / TOKENS))
    order = np.random.default_rng(section.seed).permutation(len(rows))
    heldout = min(section.heldout_rows, len(rows) // 10)
    training = rows.select(order[heldout:])
    return training, rows.select(np.sort(order[:heldout])) if heldout else None


class _Preparation:
    """Turns rows into token columns, batch by batch, and keeps count."""

    def __init__(self, section: Sft | Dpo, tokenizer: Any, strict: bool) -> None:
        self._section, self._tokenizer, self._strict = section, tokenizer, strict
        self.summary = Summary()
        self.bad_rows: list[dict[str, str]] = []
        self._lengths: list[int] = []
        self._check: Callable[[Any], Any]
        self._tokenize: Callable[[list[Any]], list[Columns | str]]
        if isinstance(section, Sft):
            self.columns: tuple[str, ...] = ("input_ids", "labels")
            self._check, self._tokenize = conversation, self._tokenize_sft
        else:
            self.columns = ("prompt_ids", "chosen_ids", "rejected_ids")
            self._check, self._tokenize = preference, self._tokenize_dpo

    def batches(self, rows: Iterator[tuple[str, Any]]) -> Iterator[list[Columns]]:
        """Columns of the rows that can be used, up to 512 rows at a time."""
        while batch := list(islice(rows, _BATCH)):
            places, checked = [], []
            for where, row in batch:
                self.summary.rows += 1
                try:
                    checked.append(self._check(row))
                    places.append(where)
                except RowError as error:
                    self._refuse(where, str(error))
            tokens = self._tokenize(checked) if checked else []
            kept = []
            for where, found in zip(places, tokens, strict=True):
                if isinstance(found, str):
                    self._refuse(where, found)
                else:
                    kept.append(found)
            self.summary.kept += len(kept)
            if kept:
                yield kept

    def finished(self) -> Summary:
        lengths = np.array(self._lengths)
        self.summary.tokens = int(lengths.sum())
        quantiles = np.quantile(lengths, (0, 0.5, 0.95, 1), method="nearest")
        self.summary.shortest, self.summary.median, self.summary.p95, self.summary.longest = map(
            int, quantiles
        )
        return self.summary

    def why_none(self) -> str:
        if not self.bad_rows:
            return "it is empty"
        first = self.bad_rows[0]
        return f"{len(self.bad_rows):,} are bad, the first is {first['row']}: {first['reason']}"

    def _refuse(self, where: str, reason: str) -> None:
        if self._strict:
            raise DataError(
                f"{where}: {reason}; mend the row, or leave --strict out to skip and count such rows"
            )
        self.bad_rows.append({"row": where, "reason": reason})
        self.summary.bad_count[reason] = self.summary.bad_count.get(reason, 0) + 1
        named = self.summary.bad.setdefault(reason, [])
        if len(named) < _NAMED:
            named.append(where)

    def _cut(self, what: str, count: int = 1) -> None:
        self.summary.cut[what] = self.summary.cut.get(what, 0) + count

    def _tokenize_sft(self, conversations: list[Any]) -> list[Columns | str]:
        section = self._section
        assert isinstance(section, Sft) and section.seq_length is not None
        only_assistant = section.loss_on == "assistant"
        encoded = self._tokenizer.apply_chat_template(
            conversations,
            chat_template=CHATML_MARKED if only_assistant else CHATML,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=only_assistant,
        )
        masks = encoded["assistant_masks"] if only_assistant else [None] * len(conversations)
        found: list[Columns | str] = []
        for ids, mask in zip(encoded["input_ids"], masks, strict=True):
            labels = ids if mask is None else [i if m else NO_LOSS for i, m in zip(ids, mask, strict=True)]
            length = len(ids)
            if section.packing:
                # As the packer of TRL in 2024: the end-of-turn token between conversations too.
                ids, labels = [*ids, self._tokenizer.eos_token_id], [*labels, self._tokenizer.eos_token_id]
                if length > section.seq_length:
                    self._cut(f"longer than {section.seq_length:,} tokens: they go on in the next sequence")
            elif length > section.seq_length:
                ids, labels = ids[: section.seq_length], labels[: section.seq_length]
                self._cut(f"cut at the end to {section.seq_length:,} tokens")
            if all(label == NO_LOSS for label in labels):
                found.append(f"no assistant token within {section.seq_length:,} tokens")
                continue
            self._lengths.append(length)
            found.append({"input_ids": ids, "labels": labels})
        return found

    def _tokenize_dpo(self, pairs: list[Any]) -> list[Columns | str]:
        section = self._section
        assert isinstance(section, Dpo) and section.seq_length and section.prompt_length
        # Prompt and answer apart, as at inference: the answer's tokens never merge with the prompt's end.
        prompts = self._tokenizer.apply_chat_template(
            [pair.prompt for pair in pairs], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        chosen = self._ids([pair.chosen + TURN_END for pair in pairs])
        rejected = self._ids([pair.rejected + TURN_END for pair in pairs])
        found: list[Columns | str] = []
        for prompt, better, worse in zip(prompts, chosen, rejected, strict=True):
            length = len(prompt) + max(len(better), len(worse))
            kept = prompt[-section.prompt_length :]
            room = section.seq_length - len(kept)
            if better[:room] == worse[:room]:
                found.append(f"chosen equals rejected within {section.seq_length:,} tokens")
                continue
            if len(kept) < len(prompt):
                self._cut(f"with the prompt cut from the left to {section.prompt_length:,} tokens")
            if max(len(better), len(worse)) > room:
                self._cut(f"with an answer cut at the end, at {section.seq_length:,} tokens")
            self._lengths.append(length)
            found.append({"prompt_ids": kept, "chosen_ids": better[:room], "rejected_ids": worse[:room]})
        return found

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids
