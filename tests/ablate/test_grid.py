"""Candidates x shares x budgets, their table, and the array that Slurm gets; nothing is trained."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megatron_smol.ablate import results
from megatron_smol.ablate.array import render, submit
from megatron_smol.ablate.config import load_ablation
from megatron_smol.ablate.demo import rubbish_page
from megatron_smol.ablate.recipes import runs_of
from megatron_smol.ablate.view import print_plan, print_results
from megatron_smol.errors import UserError
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.plan import make_plan
from megatron_smol.slurm.submit import Shape
from tests.rebalance.runs import planted, write_ablation, write_run
from tests.tiny import environment, smol

EXAMPLES = Path(__file__).parents[2] / "examples"


def text_of(show: Any, *arguments: Any) -> str:
    stream = io.StringIO()
    show(*arguments, Console(file=stream, width=220))
    return stream.getvalue()


def test_a_grid_compares_within_a_budget(tmp_path: Path) -> None:
    path = write_ablation(
        tmp_path, write_run(tmp_path), planted, shares=[0.3, 0.6], budget=["100 steps", "40 steps"]
    )
    config = load_ablation(path)
    runs = runs_of(config)
    names = list(dict.fromkeys(run.arm.name for run in runs))
    assert len(names) == 14 and {"control 100 steps", "maths 0.3 40 steps"} <= set(names)
    assert {run.stage.steps for run in runs if "40 steps" in run.arm.name} == {40}
    found = results.collect(config, runs)
    assert found.content["code 0.3 40 steps"].control == "control 40 steps"
    assert found.content["control 40 steps"].control is None
    budgets = [found.content[arm].budget for arm in found.arms]
    assert budgets == sorted(budgets), "ranked within a budget"
    assert next(arm for arm in found.arms if "100" in arm) == "maths 0.6 100 steps"
    best = [arm for arm in found.arms if "40 steps" in arm]
    assert found.to_next[best[-1]] is None, "the last of a budget has no next"
    plan = text_of(print_plan, runs)
    assert "28 runs" in plan and "maths 0.3 (" in plan and "epochs)" in plan


def test_the_table_says_rank_error_p_and_cost(tmp_path: Path) -> None:
    path = write_ablation(tmp_path, write_run(tmp_path), planted)
    config = load_ablation(path)
    found = results.collect(config, runs_of(config))
    assert found.arms == ("maths", "code", "control", "rubbish") or found.arms[0] == "maths"
    assert found.arms[-1] == "rubbish"
    first, last = (found.cells[arm]["loss:maths"] for arm in (found.arms[0], found.arms[-1]))
    assert first.p is not None and first.p < 0.05 and first.difference is not None and first.difference < 0
    assert last.p is not None and last.p < 0.05 and last.difference is not None and last.difference > 0
    step = found.to_next["maths"]
    assert step is not None and step.p is not None and step.p < 0.05, "the best is clear of the second"
    assert found.tokens["maths"] == 2 * 100 * 512 and found.seconds["maths"] == 4.0
    assert found.started_from == {"run": str(tmp_path / "run"), "stage": "stable", "step": 3906}
    table = text_of(print_results, found)
    assert "by loss:maths, lower is better" in table and "102,400" in table and "everything else" in table
    assert json.loads(json.dumps(found.to_json()))["arms"] == list(found.arms)


def test_runs_that_are_not_done_are_left_out(tmp_path: Path) -> None:
    path = write_ablation(tmp_path, write_run(tmp_path), planted)
    config = load_ablation(path)
    shutil.rmtree(tmp_path / "ablated/code")
    (tmp_path / "ablated/rubbish/seed-1/validation.jsonl").unlink()
    found = results.collect(config, runs_of(config))
    assert set(found.arms) == {"control", "maths", "rubbish"}
    assert found.cells["rubbish"]["loss:maths"].error is None
    assert found.cells["maths"]["loss:maths"].p is not None


@pytest.mark.parametrize("name", ["plain", "a space"])
def test_the_array_gives_every_run_to_slurm_once(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    config = load_ablation(write_ablation(folder, write_run(folder), planted))
    runs = runs_of(config)
    script = tmp_path / "array.sh"
    script.write_text(render(config, runs, Shape(nodes=2, time="2:00:00", partition="gpu")))
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!") and f"#SBATCH --array=0-{len(runs) - 1}" in lines
    assert (
        "#SBATCH --nodes=2" in lines and "#SBATCH --partition=gpu" in lines and "#SBATCH --requeue" in lines
    )
    assert sum(line.startswith("exec ") for line in lines) == 1
    quote = '"' if " " in name else ""
    assert f"#SBATCH --output={quote}{folder}/ablated/slurm/%x-%A_%a.log{quote}" in lines
    assert "`smol ablate --submit`" in lines[1]
    chosen = []
    for element in range(len(runs)):
        # what the script would hand over: its last line, said instead of run
        said = script.read_text().replace("exec ", "env | grep -c SLURM_ARRAY; echo ")
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_JOB_ID": "7"}
        done = subprocess.run(["bash", "-c", said], env=environment, capture_output=True, text=True)
        count, command = done.stdout.splitlines()
        assert count == "0", "the leg must take itself for a job of its own"
        chosen.append(Path(command.partition(" megatron_smol.slurm.leg ")[2]))
    assert [path.name for path in chosen] == [f"{run.recipe.name}.yaml" for run in runs]
    assert all(path.is_file() for path in chosen)


def test_an_array_that_would_die_after_the_queue_is_not_submitted(tmp_path: Path) -> None:
    config = load_ablation(write_ablation(tmp_path, write_run(tmp_path), planted))
    with pytest.raises(
        UserError, match=r"a job of 3 ranks .* cannot train test-control-0: training.global_batch"
    ):
        submit(config, runs_of(config), Shape(nodes=3, gpus_per_node=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": ["5 steps", "5 steps"]}, "a value is given twice in 5 steps, 5 steps"),
        ({"budget": []}, "budget"),
        ({"jobs": 0}, "ablation.yaml line .*: jobs is 0; it should be greater than 0"),
        ({"seeds": "abc"}, r"ablation.yaml line .*: seeds is 'abc'; it should be a list"),
        ({"nme": "x"}, r"ablation.yaml line .*: 'nme' is not a field; did you mean 'name'\?"),
        ({"budgets": "5 steps"}, r"ablation.yaml line .*: 'budgets' is not a field; did you mean 'budget'\?"),
        (
            {"eval": {"task": ["piqa"]}},
            r"ablation.yaml line .*: eval: 'task' is not a field; did you mean 'tasks'\?",
        ),
    ],
)
def test_mistakes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_ablation(tmp_path, write_run(tmp_path), planted, **change)


def test_a_recipe_is_no_ablation() -> None:
    with pytest.raises(UserError, match=r"demo.yaml: is a recipe; an ablation file names one as 'base'"):
        load_ablation(EXAMPLES / "demo.yaml")


@pytest.mark.parametrize(
    ("rank_by", "evaluated", "says"),
    [
        ("loss:mean", None, None),
        ("loss:web", None, None),
        ("loss:nix", None, "allowed: loss:mean, loss:web, .*, and with an `eval:` TASK:METRIC"),
        ("piqa:acc_norm", ["piqa"], None),
        ("arc:acc", ["piqa"], r"TASK:METRIC with a TASK of eval.tasks \(piqa\)"),
        ("piqa:acc", None, "with an `eval:` TASK:METRIC"),
    ],
)
def test_what_to_rank_by_is_known_before_anything_is_trained(
    tmp_path: Path, rank_by: str, evaluated: list[str] | None, says: str | None
) -> None:
    path = write_ablation(tmp_path, write_run(tmp_path), planted)
    asked = {"rank_by": rank_by} | ({"eval": {"tasks": evaluated}} if evaluated else {})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | asked))
    command = smol("ablate", path, "--dry-run")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == (2 if says else 0), done.stderr
    assert says is None or (f"rank_by is '{rank_by}'" in done.stderr and re.search(says, done.stderr))


@pytest.mark.parametrize(
    ("at", "step"),
    [("1M", 2000), ("1000k", 2000), ("1100k", 2500), ("2M", 3906), ("1900k", 3906), ("1954 steps", 1954)],
)
def test_tokens_are_the_first_checkpoint_from_there_on(tmp_path: Path, at: str, step: int) -> None:
    """1 M tokens are 1,953.1 steps, and the run saves every 500 and at its end, 3,906."""
    run = write_run(tmp_path)
    path = write_ablation(tmp_path, run, planted)
    settings = yaml.safe_load(path.read_text())
    settings |= {
        "from": {"run": str(run), "stage": "stable", "at": at},
        "overrides": ["save.every=500 steps"],
    }
    path.write_text(yaml.safe_dump(settings))
    runs = runs_of(load_ablation(path))
    assert {one.stage.start_step for one in runs} == {step}
    done = subprocess.run(
        smol("ablate", path, "--dry-run"), env=environment(), capture_output=True, text=True
    )
    assert (
        done.returncode == 0
        and f"note: there is no checkpoint {run}/checkpoints/stable-{step:08d}" in done.stdout
    )


def test_the_shipped_ablation_starts_from_what_the_shipped_run_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    start = runs_of(load_ablation(EXAMPLES / "ablation_math.yaml"))[0].stage.start_step
    assert ("stable-1", start) in make_plan(load_recipe(EXAMPLES / "smollm2_1.7b.yaml")).kept()


def test_the_papers_protocols_plan_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    maths = runs_of(load_ablation(EXAMPLES / "ablation_math.yaml"))
    assert next(run.arm.name for run in maths) == "control" and len(maths) == 5
    for run in maths:
        assert abs(run.stage.tokens - 100e9) < 3e6 and 0 <= run.stage.start_tokens - 3e12 < 2000 * 2_097_152
        assert run.plan.lr(run.stage.index, run.stage.end_step - 1) < 2e-8
    owm = next(run for run in maths if run.arm.candidate == "owm")
    assert float(owm.stage.weights["owm"]) == pytest.approx(0.6, abs=1e-4)
    web = runs_of(load_ablation(EXAMPLES / "ablation_web.yaml"))
    assert {run.stage.seq_length for run in web} == {2048} and len(web) == 4
    assert all(abs(run.stage.tokens - 350e9) < 3e6 and run.recipe.init_from is None for run in web)


def test_rubbish_is_alike_everywhere_and_nothing_to_learn() -> None:
    page = rubbish_page(3)
    assert page == rubbish_page(3) != rubbish_page(4) and len(page.split()[0]) == 76
    assert set(page) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")
