"""`smol eval`: every task of a suite on every target, finished ones kept.

    MODEL ─ target ─► Target ─ as_hf_folder ─► harness.Harness ─► row, samples ─► results (evals.jsonl)
    suite ─ suites ─► Item   ─ tasks.load_tasks ─► Question ──┘

Data is read and checked before any model is exported or loaded, and a model is exported only when one of its
tasks has no result yet.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_smol.errors import UserError
from megatron_smol.evals.results import IDENTITY, Row, append_row, find_row, load_rows, write_samples
from megatron_smol.evals.suites import Suite, formulation, named_suite, suite_names
from megatron_smol.evals.target import Target, as_hf_folder

if TYPE_CHECKING:  # they import lm-eval, which reads the offline variables on the way
    from megatron_smol.evals.harness import Harness, Settings
    from megatron_smol.evals.tasks import Question


def evaluate(
    targets: list[Target],
    suite: Suite,
    settings: Settings,
    data_dir: Path | None = None,
    output: Path | None = None,
    again: bool = False,
) -> list[list[Row]]:
    """Ask every target every task that has no row yet (all of them when `again`); returns each target's rows."""
    from megatron_smol.evals.harness import quiet
    from megatron_smol.evals.tasks import load_tasks

    quiet()
    _say(f"reading {len(suite.items)} task{'s'[: len(suite.items) > 1]}, checking every gold answer")
    questions = load_tasks(suite.items, data_dir)
    return [
        _evaluate_one(target, suite, questions, settings, output or target.results, again)
        for target in targets
    ]


def _evaluate_one(
    target: Target, suite: Suite, questions: list[Question], settings: Settings, results: Path, again: bool
) -> list[Row]:
    known, rows = load_rows(results), []
    harness: Harness | None = None
    with ExitStack() as stack:
        for number, question in enumerate(questions, 1):
            wanted = _wanted(target, suite, question, settings)
            row = None if again else find_row(known, wanted)
            where = f"{question.label} ({number} of {len(questions)})"
            if row:
                _say(f"{where}: done before, {_figure(row)}")
            else:
                harness = harness or _open(stack, target, settings)
                _say(f"{where}: {question.count:,} questions")
                measured, samples = harness.ask(question)
                row = wanted | measured
                row["samples"] = write_samples(results, row, samples)
                append_row(results, row)
                _say(f"{where}: {_figure(row)}{_cut(row)}")
            rows.append(row)
    rows += _means(results, known, suite, rows)
    _table(target, rows, results)
    return rows


def _open(stack: ExitStack, target: Target, settings: Settings) -> Harness:
    from megatron_smol.evals.harness import Harness, require_chat_template

    folder = stack.enter_context(as_hf_folder(target))
    if settings.chat_template:
        require_chat_template(folder, target.name)
    return Harness(folder, target.name, settings)


def _wanted(target: Target, suite: Suite, question: Question, settings: Settings) -> Row:
    """What a row says of its model and of how it was asked."""
    return {
        "model": target.name,
        "fingerprint": target.fingerprint,
        "tokens": target.tokens,
        "stage": target.stage,
        "step": target.step,
        "suite": suite.name,
        "task": question.label,
        "definition": question.definition,
        "data": question.data,
        "limit": question.limit,
        "chat_template": settings.chat_template,
        "max_length": settings.max_length,
        "dtype": settings.dtype,
    }


def _means(results: Path, known: list[Row], suite: Suite, rows: list[Row]) -> list[Row]:
    """The suite's averages as rows of their own; the standard error takes the parts as independent, unknown where one's is."""
    by_task, added = {row["task"]: row for row in rows}, []
    for name, parts in suite.means.items():
        members = [by_task[part] for part in parts]
        figures = [row["metrics"][row["metric"]] for row in members]
        errors = [figure["stderr"] for figure in figures]
        figure = {
            "value": sum(figure["value"] for figure in figures) / len(figures),
            "stderr": None if None in errors else math.hypot(*errors) / len(figures),
            "higher_is_better": True,
        }
        row = members[-1] | {
            "task": name,
            "definition": "mean",
            "data": ",".join(parts),
            "metric": "mean",
            "metrics": {"mean": figure},
            "n": sum(row["n"] for row in members),
            "cut": sum(row["cut"] for row in members),
            "seconds": round(sum(row["seconds"] for row in members), 2),
            "samples": None,
        }
        before = find_row(known, {key: row[key] for key in IDENTITY})
        if before is None or before["metrics"] != row["metrics"]:
            append_row(results, row)
        added.append(row)
    return added


def be_offline() -> None:
    """No library asks the hub from here on. Before lm-eval, datasets or transformers are imported."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def require_lm_eval() -> None:
    """Say which extra is missing."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"smol eval needs lm-eval ({error}): pip install 'megatron-smol[eval]'") from error


# --- what a person sees ------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _figure(row: Row) -> str:
    figure = row["metrics"][row["metric"]]
    error = f" ± {figure['stderr']:.4f}" if figure["stderr"] is not None else ""
    return f"{row['metric']} {figure['value']:.4f}{error}"


def _cut(row: Row) -> str:
    if not row["cut"]:
        return ""
    return f"; warning: {row['cut']:,} prompts were longer than the context and lost their beginning"


def _table(target: Target, rows: list[Row], results: Path) -> None:
    at = f" after {target.tokens:,} tokens" if target.tokens is not None else ""
    table = Table("task", "metric")
    for name in ("value", "± stderr", "n", "shots"):
        table.add_column(name, justify="right")
    for row in rows:
        for name, figure in row["metrics"].items():
            error = "" if figure["stderr"] is None else f"{figure['stderr']:.4f}"
            shots = "" if row["samples"] is None else str(row["shots"])
            cells = [row["task"], name, f"{figure['value']:.4f}", error, f"{row['n']:,}", shots]
            table.add_row(*(escape(cell) for cell in cells), style="bold" if name == row["metric"] else "dim")
    console = Console()
    console.print(escape(f"{target.name}{at}"), style="italic", soft_wrap=True)
    console.print(table)
    console.print(f"kept in {escape(str(results))}", style="dim", soft_wrap=True)


def print_suites() -> None:
    """The named suites with the formulation of each task."""
    console = Console(soft_wrap=True, highlight=False)
    for name in suite_names():
        suite = named_suite(name)
        asked: list[Any] = [f"at most {suite.max_length:,} tokens a prompt"] if suite.max_length else []
        asked += ["inside the chat template"] if suite.chat_template else []
        console.print(f"[bold]{name}[/]  {escape(suite.about)} ({', '.join(asked)})")
        for task in dict.fromkeys(item.name for item in suite.items):
            console.print(f"  {task:<24}{escape(formulation(task))}")
