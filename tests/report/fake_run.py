"""Run folders as the trainer leaves them, made from a recipe without training: test data only."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_smol.data.ledger import planned_ledger
from megatron_smol.data.stream import StageStream
from megatron_smol.recipe.load import dump_recipe, parse_recipe
from megatron_smol.recipe.plan import Plan, StagePlan, make_plan
from megatron_smol.recipe.render import to_json
from megatron_smol.report.render import Report

RECIPE = """
name: small
run_dir: runs/small
tokenizer: none
model: {layers: 2, hidden_size: 64, heads: 4, kv_heads: 2, ffn_size: 128, vocab_size: 512}
data: {seed: 8, holdout_tokens: 4096}
sources:
  docs: {path: data/docs, tokens: 300_000, max_epochs: 4}
  code: {path: data/code, tokens: 200_000}
  math: {path: data/math, tokens: 20_000, max_epochs: 2}
training: {seq_length: 128, global_batch: 8, micro_batch: 4, precision: fp32}
stages:
  - {name: stable, until: 60 steps, mixture: {docs: 0.9, code: 0.1}}
  - {name: decay, until: 90 steps, mixture: {docs: 0.6, code: 0.2, math: 0.2}}
  - name: anneal
    from: {stage: stable, before_end: 10 steps}
    tokens: 15 steps
    lr: {end: 0.0}
    mixture: {math: 0.6, docs: 0.4}
  - name: long
    from: {stage: decay, before_end: 8 steps}
    tokens: 12 steps
    seq_length: 512
    global_batch: 2
    micro_batch: 1
    mixture: {docs: 0.5, code: 0.5}
lr: {peak: 3e-3, warmup: 10 steps, decay_start: 55 steps}
"""
SAMPLES = [
    {"prompt": "The function returns", "text": " a list of <b>objects</b> & names.", "stage": "decay"},
    {"prompt": "2 + 2 =", "text": "2 + 2 = 4", "model": "long"},
]


def small_plan() -> Plan:
    return make_plan(parse_recipe(RECIPE))


def loss_at(tokens: int, scale: int, noise: random.Random) -> float:
    return 5.5 + 5.3 * math.exp(-9 * tokens / scale) + noise.gauss(0, 0.08)


def stage_rows(plan: Plan, stage: StagePlan, noise: random.Random) -> list[dict[str, Any]]:
    """The metrics rows of a whole stage, with the windows that the data order really draws."""
    stream = StageStream(stage, plan.orders)
    rows = []
    for step in range(stage.start_step + 1, stage.end_step + 1):
        start = (step - 1 - stage.start_step) * stage.global_batch
        seconds = 0.5 + 0.2 * noise.random()
        tokens = stage.tokens_at(step)
        rows.append(
            {
                "stage": stage.name,
                "stage_index": stage.index,
                "step": step,
                "tokens": tokens,
                "loss": loss_at(tokens, plan.trunk[-1].end_tokens, noise),
                "lr": plan.lr(stage.index, step - 1),
                "grad_norm": 1.0,
                "seq_length": stage.seq_length,
                "global_batch": stage.global_batch,
                "seconds": seconds,
                "tokens_per_s": stage.tokens_per_step / seconds,
                "drawn": stream.rows(start, start + stage.global_batch).counts(),
            }
        )
    return rows


def validation_rows(plan: Plan, stage: StagePlan, noise: random.Random) -> list[dict[str, Any]]:
    rows = []
    for when, step in (("start", stage.start_step), ("end", stage.end_step)):
        tokens = stage.tokens_at(step)
        losses = {
            n: loss_at(tokens, plan.trunk[-1].end_tokens, noise) + i / 4 for i, n in enumerate(plan.orders)
        }
        row = {"stage": stage.name, "stage_index": stage.index, "step": step, "tokens": tokens}
        rows.append({**row, "when": when, "losses": losses})
    return rows


def write_run(folder: Path, plan: Plan) -> Path:
    """A finished run of `plan`, with every file that a report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(1)
    last = plan.stages[-1]
    write_lines(folder / "metrics.jsonl", [row for s in plan.stages for row in stage_rows(plan, s, noise)])
    write_lines(
        folder / "validation.jsonl", [row for s in plan.stages for row in validation_rows(plan, s, noise)]
    )
    documents = {
        "plan.json": to_json(plan),
        "ledger.json": planned_ledger(plan, last.name, last.samples).to_json(),
        "versions.json": {"torch": "2.13.0+cpu", "python": "3.11.7"},
        "samples.json": SAMPLES,
    }
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "recipe.yaml").write_text(dump_recipe(plan.recipe))
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def keep_lines(path: Path, count: int, and_half: bool = False) -> None:
    """Cut a JSON-lines file back to `count` rows, and half of the next one as a kill leaves it."""
    lines = path.read_text().splitlines(keepends=True)
    half = lines[count][: len(lines[count]) // 2] if and_half else ""
    path.write_text("".join(lines[:count]) + half)


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what is in the run folder by now, and return its path."""
    report = Report([run])
    report.write()
    return report.path
