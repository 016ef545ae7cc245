"""`smol eval --compare A B`: what changed from one model to another, and whether it is more than chance.

Where both have the samples of the same questions, the difference is taken question by question: two models
agree on most of them, so its standard error is far smaller than that of two independent figures.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_smol.errors import UserError
from megatron_smol.evals.results import Row, load_rows, newest, read_samples
from megatron_smol.evals.target import RESULTS, find_target

BEYOND = 2.0  # standard errors
MIN_PAIRS = 2


@dataclass(frozen=True)
class Side:
    """One model's newest row of every task, and the file they came from."""

    name: str
    results: Path
    rows: dict[str, Row]


@dataclass(frozen=True)
class Delta:
    """B minus A in one task's figure. stderr None: neither samples nor standard errors; pairs 0: not paired."""

    task: str
    metric: str
    a: float
    b: float
    stderr: float | None
    pairs: int
    higher_is_better: bool
    note: str = ""

    @property
    def verdict(self) -> str:
        change = self.b - self.a
        if self.stderr is None:
            return "unknown"
        if abs(change) <= BEYOND * self.stderr:
            return "within noise"
        return "better" if (change > 0) == self.higher_is_better else "worse"


def open_side(source: str, output: Path | None = None) -> Side:
    """Rows of SOURCE: an evals.jsonl, a run folder (its newest evaluated model), or a model evaluated before."""
    path = Path(source).expanduser()
    if path.is_file():
        return _newest_model(source, path)
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        return _newest_model(source, output or path / RESULTS)
    target = find_target(source)
    results = output or target.results
    rows = [row for row in load_rows(results) if row["fingerprint"] == target.fingerprint]
    if not rows:
        raise UserError(
            f"{source} has no result in {results}; evaluate it first: smol eval {source} --suite NAME"
        )
    return Side(source, results, newest(rows))


def _newest_model(name: str, results: Path) -> Side:
    """The model that was trained longest; among models whose tokens are not known, the last one written."""
    rows = load_rows(results)
    if not rows:
        raise UserError(f"{results} has no results; make some with smol eval MODEL --suite NAME")
    furthest = max(enumerate(rows), key=lambda entry: (entry[1]["tokens"] or 0, entry[0]))[1]
    chosen = [row for row in rows if row["fingerprint"] == furthest["fingerprint"]]
    return Side(f"{name} ({furthest['model']})", results, newest(chosen))


def compare(a: Side, b: Side) -> list[Delta]:
    """The figures of the tasks that both have, in A's order. UserError when they share none."""
    shared = [task for task in a.rows if task in b.rows and a.rows[task]["metric"] == b.rows[task]["metric"]]
    if not shared:
        raise UserError(
            f"{a.name} and {b.name} share no task: {', '.join(a.rows)} against {', '.join(b.rows)}; evaluate both "
            "with the same suite"
        )
    return [_delta(a, b, task) for task in shared]


def _delta(a: Side, b: Side, task: str) -> Delta:
    row_a, row_b = a.rows[task], b.rows[task]
    metric = row_a["metric"]
    figure_a, figure_b = row_a["metrics"][metric], row_b["metrics"][metric]
    differs = [
        key
        for key in ("definition", "data", "limit", "chat_template", "max_length")
        if row_a[key] != row_b[key]
    ]
    note = f"asked otherwise: {', '.join(differs)}" if differs else ""
    value_a, value_b = figure_a["value"], figure_b["value"]
    differences = paired_differences(_scores(a, row_a, metric), _scores(b, row_b, metric))
    # Pairs that are not all of the questions would say something about other figures than those shown.
    if len(differences) == row_a["n"] == row_b["n"] >= MIN_PAIRS:
        stderr: float | None = standard_error(differences)
        pairs = len(differences)
    else:
        errors = (figure_a["stderr"], figure_b["stderr"])
        stderr, pairs = (None if None in errors else math.hypot(*errors)), 0
    return Delta(task, metric, value_a, value_b, stderr, pairs, figure_a["higher_is_better"], note)


def _scores(side: Side, row: Row, metric: str) -> list[tuple[str, Any]]:
    samples = read_samples(side.results, row) if row["samples"] else None
    return [(s["doc_hash"], s["scores"][metric]) for s in samples or [] if metric in s["scores"]]


def paired_differences(a: list[tuple[str, Any]], b: list[tuple[str, Any]]) -> list[float]:
    """B's score minus A's on each question that both answered; equal questions are paired in their order."""
    scores = dict(_numbered(b))
    pairs = [(score, scores[key]) for key, score in _numbered(a) if key in scores]
    if not all(isinstance(score, int | float) for pair in pairs for score in pair):
        return []  # a metric that is no mean of one number a question
    return [score_b - score_a for score_a, score_b in pairs]


def _numbered(scores: list[tuple[str, Any]]) -> list[tuple[tuple[str, int], Any]]:
    seen: Counter[str] = Counter()
    numbered = []
    for question, score in scores:
        numbered.append(((question, seen[question]), score))
        seen[question] += 1
    return numbered


def standard_error(values: list[float]) -> float:
    """Of the mean of `values`: sample standard deviation over the root of their number."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def print_comparison(a: Side, b: Side, deltas: list[Delta]) -> None:
    """A table of figures, differences and verdicts."""
    table = Table("task", "metric")
    for name in ("A", "B", "B - A", "± stderr", "pairs"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    colours = {"better": "green", "worse": "red", "unknown": "yellow"}
    for delta in deltas:
        error = "" if delta.stderr is None else f"{delta.stderr:.4f}"
        cells = [
            delta.task,
            delta.metric,
            f"{delta.a:.4f}",
            f"{delta.b:.4f}",
            f"{delta.b - delta.a:+.4f}",
            error,
        ]
        cells += [
            f"{delta.pairs:,}" if delta.pairs else "-",
            " ".join(filter(None, [delta.verdict, delta.note and f"({delta.note})"])),
        ]
        table.add_row(*(escape(cell) for cell in cells), style=colours.get(delta.verdict, ""))
    console = Console()
    console.print(escape(f"A: {a.name}\nB: {b.name}"), style="italic", soft_wrap=True)
    console.print(table)
    console.print(
        f"better or worse: by more than {BEYOND:g} standard errors, of the differences question by question where "
        "pairs are counted, else of two independent figures",
        style="dim",
        soft_wrap=True,
    )
