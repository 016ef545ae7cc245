"""Whole runs by the real command: the laws `resume`, `order`, `plan` and `ledger`, and how a run stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.checkpoint.folder import CHECKSUM
from megatron_smol.data.ledger import Ledger
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan, resolve_sizes
from tests.tiny import TinyRun, kill_group, ranks_of, rows, wait_for, write_recipe


def weights_of(run: Path, name: str = "long-00000013") -> dict[str, str]:
    """Checksums of the tensor files of a checkpoint."""
    files = json.loads((run / "checkpoints" / name / "complete.json").read_text())["files"]
    return {file: entry[CHECKSUM] for file, entry in files.items() if file.endswith(".distcp")}


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The uninterrupted run on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("whole")
    run = TinyRun(write_recipe(tiny_data, folder), tiny_data, folder)
    done = run.train(ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_the_plan_law(whole: TinyRun) -> None:
    """What `smol plan` says is what the run did: steps, LR and, to the token, every source of every stage."""
    recipe = load_recipe(whole.recipe)
    plan = make_plan(recipe, resolve_sizes(recipe))
    metrics = rows(whole.run / "metrics.jsonl")
    assert [(m["stage"], m["step"]) for m in metrics] == [
        (stage.name, step)
        for stage in plan.stages
        for step in range(stage.start_step + 1, stage.end_step + 1)
    ]
    for row in metrics:
        assert row["lr"] == plan.lr(row["stage_index"], row["step"] - 1)
        assert row["tokens"] == plan.stages[row["stage_index"]].tokens_at(row["step"])
    for stage in plan.stages:
        drawn: dict[str, int] = {}
        for row in metrics:
            for source, count in row["drawn"].items() if row["stage"] == stage.name else ():
                drawn[source] = drawn.get(source, 0) + count
        assert drawn == {name: count for name, count in stage.draws.items() if count}
    ledger = Ledger.from_json(json.loads((whole.run / "ledger.json").read_text()))
    last = plan.stages[-1]
    assert ledger.tokens() == {n: last.tokens_after(n) for n in plan.sizes if last.tokens_after(n)}
    assert ledger.consumed_tokens == last.end_tokens


def test_a_run_leaves_what_it_promises(whole: TinyRun) -> None:
    for name in ("recipe.yaml", "plan.json", "versions.json", "log.txt", "ledger.json", "metrics.jsonl"):
        assert (whole.run / name).stat().st_size > 0, name
    assert list((whole.run / "tensorboard").glob("events*"))
    kept = {path.name for path in (whole.run / "checkpoints").iterdir()}
    stage_ends = {"one-00000006", "two-00000012", "anneal-00000007", "long-00000013"}
    assert stage_ends | {"one-00000004", "two-00000009"} <= kept, "stage ends and branch points are kept"
    assert not [name for name in kept if name.startswith(".")]
    validated = {(v["stage"], v["when"]) for v in rows(whole.run / "validation.jsonl")}
    assert validated == {(s, w) for s in ("one", "two", "anneal", "long") for w in ("start", "end")}
    log = (whole.run / "log.txt").read_text()
    assert log.count("==") == 4 and "the ledger equals the plan" in log


def test_loss_falls(whole: TinyRun) -> None:
    losses = [row["loss"] for row in rows(whole.run / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5


def test_two_runs_are_equal(whole: TinyRun, tiny: TinyRun) -> None:
    """The control: without it, equality after a kill would say nothing."""
    assert tiny.train(ranks=2).returncode == 0
    assert rows(tiny.run / "metrics.jsonl") == rows(whole.run / "metrics.jsonl")
    assert weights_of(tiny.run) == weights_of(whole.run)


# Lines of metrics.jsonl after which a rank is killed: before the first save, at a stage's end, in a branch. (Random
# moments, twenty of them, are `make faults`'.)
@pytest.mark.parametrize("after", [1, 6, 12])
def test_kill_9_of_a_rank_then_the_same_command(whole: TinyRun, tiny: TinyRun, after: int) -> None:
    process = tiny.start(ranks=2)
    wait_for(tiny.run / "metrics.jsonl", after, process)
    os.kill(ranks_of(process)[after % 2], signal.SIGKILL)
    assert process.wait(60) != 0
    kill_group_if_alive(process)
    done = tiny.train(ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tiny.run / "metrics.jsonl") == rows(whole.run / "metrics.jsonl")
    assert rows(tiny.run / "validation.jsonl") == rows(whole.run / "validation.jsonl")
    assert weights_of(tiny.run) == weights_of(whole.run)
    assert (tiny.run / "ledger.json").read_text() == (whole.run / "ledger.json").read_text()


def kill_group_if_alive(process: Any) -> None:
    try:
        kill_group(process)
    except ProcessLookupError:
        process.wait()


def test_go_on_with_another_layout(whole: TinyRun, tiny: TinyRun) -> None:
    """Killed at DP 2, continued at TP 2: the same rows in the same steps, the loss to rounding."""
    process = tiny.start(ranks=2)
    wait_for(tiny.run / "metrics.jsonl", 5, process)
    kill_group(process)
    done = tiny.train("parallel.tp=2", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout
    compare_to_rounding(tiny.run, whole.run)


def test_one_process_reads_and_learns_the_same(whole: TinyRun, tiny: TinyRun) -> None:
    assert tiny.train().returncode == 0
    compare_to_rounding(tiny.run, whole.run)


def compare_to_rounding(run: Path, expected: Path) -> None:
    found, wanted = rows(run / "metrics.jsonl"), rows(expected / "metrics.jsonl")
    inexact = ("loss", "grad_norm")
    assert [{k: v for k, v in r.items() if k not in inexact} for r in found] == [
        {k: v for k, v in r.items() if k not in inexact} for r in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        assert [a[k] for k in inexact] == pytest.approx([b[k] for k in inexact], rel=1e-4)
    assert (run / "ledger.json").read_text() == (expected / "ledger.json").read_text()


def test_sigterm_saves_and_the_same_command_goes_on(whole: TinyRun, tiny: TinyRun) -> None:
    process = tiny.start(ranks=2)
    wait_for(tiny.run / "metrics.jsonl", 3, process)
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGTERM)
    process.wait(60)
    stopped_at = rows(tiny.run / "metrics.jsonl")[-1]
    newest = max((tiny.run / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime).name
    assert newest == f"{stopped_at['stage']}-{stopped_at['step']:08d}", "nothing is lost at a signal"
    assert "stopped by signal" in (tiny.run / "log.txt").read_text()
    assert tiny.train(ranks=2).returncode == 0
    assert rows(tiny.run / "metrics.jsonl") == rows(whole.run / "metrics.jsonl")
    assert weights_of(tiny.run) == weights_of(whole.run)


def test_exit_code_of_a_signal_asks_for_a_restart(tiny: TinyRun) -> None:
    import subprocess

    from tests.tiny import environment, smol

    command = smol("train", tiny.recipe)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(tiny.run / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)  # a second one changes nothing
    assert process.wait(60) == 75


def test_a_finished_run_says_so_and_does_nothing(whole: TinyRun) -> None:
    before = (whole.run / "metrics.jsonl").read_text()
    kept = sorted((whole.run / "checkpoints").iterdir())
    left_by_a_kill = a_checkpoint_of(whole.run / "checkpoints", step=2)
    done = whole.train(ranks=2)
    assert done.returncode == 0 and "all 4 stages are done" in done.stdout
    assert (whole.run / "metrics.jsonl").read_text() == before
    assert sorted((whole.run / "checkpoints").iterdir()) == kept, f"{left_by_a_kill} is one too many"


def a_checkpoint_of(checkpoints: Path, step: int) -> Path:
    """One that was published, whose killed process had no time to remove it."""
    found = shutil.copytree(checkpoints / "one-00000004", checkpoints / f"one-{step:08d}")
    state = json.loads((found / "state.json").read_text())
    (found / "state.json").write_text(json.dumps(state | {"step": step}))
    return found


def test_precision_changes_at_a_stage_boundary_and_survives_a_kill(whole: TinyRun, tiny: TinyRun) -> None:
    override = "stages.two.precision=bf16"
    process = tiny.start(override, ranks=2)
    wait_for(tiny.run / "metrics.jsonl", 9, process)
    kill_group(process)
    done = tiny.train(override, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found, fp32 = rows(tiny.run / "metrics.jsonl"), rows(whole.run / "metrics.jsonl")
    for row, expected in zip(found, fp32, strict=True):
        same = row["loss"] == expected["loss"]
        assert same == (row["stage"] in ("one", "anneal")), (
            "bf16 arithmetic in and after 'two', fp32 elsewhere"
        )
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-2)
