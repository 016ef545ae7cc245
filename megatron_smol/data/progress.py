"""What preprocessing shows while it runs: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_smol.data.indexed import TokenArray
from megatron_smol.data.manifest import Manifest
from megatron_smol.data.tokenizer import Tokenizer


class Progress:
    """Counts finished blocks; rates leave out what an earlier run had done."""

    def __init__(self, input_bytes: int, log_interval: int) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("tokenizing", total=max(1, input_bytes), rate="")
        self._start = time.monotonic()
        self._input_bytes, self._kept_bytes, self._done_bytes = max(1, input_bytes), 0, 0
        self._documents = self._tokens = self._logged = 0
        self._log_interval = log_interval

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(escape(text))

    def kept(self, record: dict[str, Any]) -> None:
        self._kept_bytes += record["input_bytes"]
        self._bar.advance(self._task, record["input_bytes"])

    def tokenized(self, record: dict[str, Any]) -> None:
        self._documents += record["documents"]
        self._done_bytes += record["input_bytes"]
        self._tokens += record["tokens"]
        seconds = max(1e-9, time.monotonic() - self._start)
        rate = f"{self._documents / seconds:,.0f} documents/s  {self._tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, advance=record["input_bytes"], rate=rate)
        if self._bar.disable and self._documents - self._logged >= self._log_interval:
            self._logged = self._documents
            self.note(
                f"tokenized {self._documents:,} documents, {self._tokens:,} tokens ({rate}; {self._left(seconds)})"
            )

    def _left(self, seconds: float) -> str:
        """How far it is, and how long the rest will take at the rate so far."""
        done = self._kept_bytes + self._done_bytes
        rest = (self._input_bytes - done) * seconds / max(1, self._done_bytes)
        return (
            f"{min(1.0, done / self._input_bytes):.0%} of the input, about {_duration(max(0.0, rest))} left"
        )

    def assembled(self, done: int, shards: int) -> None:
        self._bar.update(self._task, description=f"writing shards {done}/{shards}")
        if self._bar.disable and shards > 1:
            self.note(f"wrote shard {done} of {shards}")

    def summary(self, manifest: Manifest, ends: tuple[TokenArray, TokenArray], tokenizer: Tokenizer) -> None:
        """What was written, what was left out, and decoded text from both ends for the eye."""
        seconds = time.monotonic() - self._start
        fast = "" if tokenizer.backend == "hf" else ", same ids as Hugging Face's on a sample"
        self.note(
            f"{manifest.source}: {manifest.tokens:,} tokens in {manifest.documents:,} documents, "
            f"{len(manifest.shards)} shard(s), {seconds:.1f} s (backend {tokenizer.backend}{fast})"
        )
        skipped = {
            "empty documents skipped": manifest.empty_documents,
            "bad lines skipped": manifest.bad_lines,
            "characters dropped, not in the vocabulary": manifest.dropped_characters,
            f"documents left out, shorter than {manifest.min_doc_tokens} tokens": manifest.short_documents,
            f"documents left out, longer than {manifest.max_doc_tokens} tokens": manifest.long_documents,
        }
        for what, count in skipped.items():
            if count:
                self.note(f"  {count:,} {what}")
        for what, ids in zip(("begins: ", "ends:   "), ends, strict=True):
            self.note(f"  {what}{tokenizer.decode(ids)!r}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
