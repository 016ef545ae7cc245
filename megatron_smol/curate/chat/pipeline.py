"""Carries a chat data file out: each part through its steps, all parts together through the common steps, then the mix.

    work/answers-MODEL.jsonl   every answer that was paid          work/parts/NAME.jsonl   what a part's steps let through
    train.jsonl, test.jsonl    what `smol sft` or `smol dpo` reads  card.json, card.html    what was kept, dropped and why

Everything but the answers is computed from the file and the answers, so the same command after a kill goes through the
answers that are there and asks for the rest. A part in which a request failed is made again by the next command.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_smol.curate.chat.card import write_card
from megatron_smol.curate.chat.config import ChatData, Part, Steps
from megatron_smol.curate.chat.rows import Outcome, Row, Stage, check
from megatron_smol.curate.chat.tools import Tools
from megatron_smol.curate.endpoint import Endpoint
from megatron_smol.curate.parts import written
from megatron_smol.data.files import require_folder, write_whole
from megatron_smol.errors import DataError, UserError

WORK, TRAIN, TEST, CARD = "work", "train.jsonl", "test.jsonl", "card.html"
_LINE_EVERY_SECONDS = 30.0


def chat_data(config: ChatData, *, overwrite: bool = False) -> Path:
    """Make what is not made yet; returns the card."""
    output = config.output.absolute()
    require_folder(output)
    _claim(config, output, overwrite)
    with ExitStack() as stack:
        models = {
            name: stack.enter_context(Endpoint(settings, output / WORK / f"answers-{name}.jsonl"))
            for name, settings in config.models.items()
        }
        run = _Run(config, output, models)
        return run.all()


class _Run:
    """One command's work. console: progress and the end, on stderr."""

    def __init__(self, config: ChatData, output: Path, models: dict[str, Endpoint]) -> None:
        self.config, self.output, self.models = config, output, models
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def all(self) -> Path:
        made = [self._part(part) for part in self.config.parts]
        card = self.output / CARD
        if card.is_file() and not any(made):
            return card
        card.unlink(missing_ok=True)  # written last: it stands for a whole output
        stages = [json.loads(self._file(part, ".json").read_text()) for part in self.config.parts]
        common, mixed = self._together()
        train, test, taken = self._mix(mixed)
        mixed.unlink()
        write_card(self.config, self.output, stages, common, taken, (train, test), self._usage())
        self._tell_failures()
        return card

    def _file(self, part: Part, ending: str) -> Path:
        return self.output / WORK / "parts" / (part.name + ending)

    # --- a part ----------------------------------------------------------------------------------------------

    def _part(self, part: Part) -> bool:
        """Make the part unless it is there whole; True when it was made."""
        record = self._file(part, ".json")
        if record.is_file() and not json.loads(record.read_text())["failed_requests"]:
            return False
        tools = Tools(self.models, part.name, self.config.seed)
        failed = self._failed()
        stages = [Stage("made" if part.given is None else "read")]
        rows = stages[0].passed(_checked(part.generator().outcomes(tools)))
        rows = self._stepped(rows, part.steps, tools, stages)
        with written(self._file(part, ".jsonl")) as stream:
            for row in self._shown(part, stages[0], rows):
                stream.write(orjson.dumps(row) + b"\n")
        about = {
            "part": part.name,
            "stages": [stage.record() for stage in stages],
            "failed_requests": self._failed() - failed,
        }
        write_whole(record, json.dumps(about))
        return True

    def _stepped(
        self, rows: Iterator[Row], steps: tuple[Steps, ...], tools: Tools, stages: list[Stage]
    ) -> Iterator[Row]:
        for entry in steps:
            stages.append(Stage(entry.step().title))
            rows = stages[-1].passed(_checked(entry.step().run(rows, tools)))
        return rows

    def _shown(self, part: Part, first: Stage, rows: Iterator[Row]) -> Iterator[Row]:
        """A bar on a terminal, a line now and then elsewhere."""
        generator: Any = part.generator()
        total = getattr(generator, "rows", None) or getattr(generator, "write", None) or None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        kept, told = 0, time.monotonic()
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(part.name, total=total)
            for row in rows:
                kept += 1
                bar.update(task, completed=first.rows_in, description=f"{part.name}: {kept:,} kept")
                if bar.disable and time.monotonic() - told > _LINE_EVERY_SECONDS:
                    told = time.monotonic()
                    of = f" of {total:,}" if total else ""
                    self._say(f"{part.name}: {first.rows_in:,}{of} rows made, {kept:,} kept; {self._paid()}")
                yield row
        self._say(f"{part.name}: {first.rows_in:,} rows made, {kept:,} kept; {self._paid()}")

    # --- all parts -------------------------------------------------------------------------------------------

    def _together(self) -> tuple[list[dict[str, Any]], Path]:
        """The common steps' records, and the file of all rows that they let through."""
        tools = Tools(self.models, "", self.config.seed)
        stages: list[Stage] = []
        rows = self._stepped(self._all_rows(), self.config.steps, tools, stages)
        path = self.output / WORK / "all.jsonl"
        with written(path) as stream:
            for row in rows:
                stream.write(orjson.dumps(row) + b"\n")
        return [stage.record() for stage in stages], path

    def _all_rows(self) -> Iterator[Row]:
        for part in self.config.parts:
            with self._file(part, ".jsonl").open("rb") as stream:
                for line in stream:
                    yield orjson.loads(line) | {"part": part.name}

    def _mix(self, path: Path) -> tuple[Counter[str], Counter[str], dict[str, tuple[int, int]]]:
        """Write the output in random order; rows of train and test by part, and (there, taken) of each part."""
        places: dict[str, list[int]] = {part.name: [] for part in self.config.parts}
        offset = 0
        with path.open("rb") as stream:
            for line in stream:
                places[orjson.loads(line)["part"]].append(offset)
                offset += len(line)
        wanted = self._wanted({name: len(found) for name, found in places.items()})
        order: list[tuple[str, int]] = []
        for name, found in places.items():
            drawn = random.Random(f"{self.config.seed} {name}").sample(found, wanted[name])
            order += [(name, place) for place in drawn]
        random.Random(self.config.seed).shuffle(order)
        if not order:
            raise DataError(f"not one row stayed; {self.output / WORK / 'parts'} says what dropped them")
        tests = round(self.config.test_share * len(order))
        counts = self._write(path, TEST, order[:tests]), self._write(path, TRAIN, order[tests:])
        return counts[1], counts[0], {name: (len(found), wanted[name]) for name, found in places.items()}

    def _wanted(self, there: dict[str, int]) -> dict[str, int]:
        """Rows to take of each part: its `take`, or its share of as many rows as all shares allow."""
        parts = self.config.parts
        if parts[0].share is None:
            return {
                part.name: there[part.name] if part.take is None else min(part.take, there[part.name])
                for part in parts
            }
        total = min(there[part.name] / (part.share or 1.0) for part in parts)
        total = min(total, self.config.rows or total)
        return {part.name: min(there[part.name], round(total * (part.share or 0.0))) for part in parts}

    def _write(self, source: Path, name: str, order: list[tuple[str, int]]) -> Counter[str]:
        if name == TEST and not order:
            (self.output / TEST).unlink(missing_ok=True)
            return Counter()
        with source.open("rb") as rows, written(self.output / name) as stream:
            for _, place in order:
                rows.seek(place)
                row = orjson.loads(rows.readline())
                stream.write(orjson.dumps({key: row[key] for key in row if key != "part"}) + b"\n")
        return Counter(part for part, _ in order)

    # --- what was paid ---------------------------------------------------------------------------------------

    def _usage(self) -> dict[str, dict[str, Any]]:
        return {name: model.usage() for name, model in self.models.items()}

    def _failed(self) -> int:
        return sum(sum(usage["failed"].values()) for usage in self._usage().values())

    def _paid(self) -> str:
        usages = self._usage().values()
        tokens = sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
        dollars = sum(usage["dollars"] for usage in usages)
        return f"{sum(usage['answers'] for usage in usages):,} answers, {tokens:,} tokens" + (
            f", ${dollars:,.2f}" if dollars else ""
        )

    def _tell_failures(self) -> None:
        for part in self.config.parts:
            if failed := json.loads(self._file(part, ".json").read_text())["failed_requests"]:
                self._say(
                    f"{part.name}: {failed:,} requests failed, the card says why; the same command asks for them again"
                )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


def _checked(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """No step passes on what training could not read."""
    for row, reason in outcomes:
        yield Outcome(row, reason or check(row))


def _claim(config: ChatData, output: Path, overwrite: bool) -> None:
    """Another file's rows are neither continued nor mixed with this one's; answers stay, they were paid."""
    plan = output / WORK / "chatdata.json"  # of models their name alone: where one is served changes no row
    models = {name: settings.model for name, settings in config.models.items()}
    about = config.model_dump(mode="json", exclude={"models", "output"}) | {
        "models": models,
        "inputs": _inputs(config),
    }
    wanted = json.dumps(about, indent=1)
    begun = plan.read_text() if plan.is_file() else "" if (output / TRAIN).exists() else wanted
    if begun != wanted:
        if not overwrite:
            raise UserError(
                f"{output} holds rows of another configuration or of other inputs; use --overwrite to replace them (answers "
                "of models are kept and not asked for again), or choose another output"
            )
        shutil.rmtree(output / WORK / "parts", ignore_errors=True)
        for name in (CARD, "card.json", TRAIN, TEST):
            (output / name).unlink(missing_ok=True)
    plan.parent.mkdir(parents=True, exist_ok=True)
    write_whole(plan, wanted)


def _inputs(config: ChatData) -> dict[str, int]:
    """Bytes of the local files that the parts read."""
    named = set[str]()
    for part in config.parts:
        generator: Any = part.generator()
        for name in ("data", "prompts", "inputs"):
            value = getattr(generator, name, None)
            named |= {value} if isinstance(value, str) else set(value or ()) if name == "inputs" else set()
    return {name: Path(name).stat().st_size for name in sorted(named) if Path(name).is_file()}
