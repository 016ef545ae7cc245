"""`smol ablate` on a tiny run: what it plans, that it ranks, that it goes on after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_smol.ablate.config import load_ablation
from megatron_smol.ablate.recipes import STAGE, require_checkpoint, runs_of
from megatron_smol.errors import UserError
from tests.tiny import TinyRun, environment, rows, smol, write_recipe

BASE = ("stages.two.until=40 steps", "save.every=20 steps")


@pytest.fixture(scope="module")
def base(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run in progress: its second stage stands at step 20 and beyond."""
    folder = tmp_path_factory.mktemp("base")
    run = TinyRun(write_recipe(tiny_data, folder), tiny_data, folder)
    assert run.train(*BASE).returncode == 0
    for later in (run.run / "checkpoints").glob("long*"):
        assert later.is_dir()
    return run


def configure(base: TinyRun, folder: Path, **more: Any) -> Path:
    path = folder / "ablation.yaml"
    settings = {
        "name": "test", "base": str(base.recipe), "output": str(folder / "out"), "overrides": list(BASE),
        "from": {"run": str(base.run), "stage": "two", "at": "40 steps"}, "budget": "30 steps", "shares": [0.8],
        "candidates": {"maths": {"maths": 1}, "code": {"code": 1}}, "seeds": [0, 1], "rank_by": "loss:maths",
    }  # fmt: skip
    path.write_text(
        yaml.safe_dump({k: v for k, v in (settings | more).items() if v is not None}, sort_keys=False)
    )
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        smol("ablate", *arguments), env=environment(), capture_output=True, text=True, timeout=600
    )


def test_the_plan_of_the_runs(base: TinyRun, tmp_path: Path) -> None:
    """Each begins where the base run stands, with its ledger, mixes as the file says, and anneals to zero."""
    runs = runs_of(load_ablation(configure(base, tmp_path, shares=[0.5, 0.8])))
    assert [(r.arm.name, r.seed) for r in runs] == [
        (arm, seed)
        for arm in ("control", "maths 0.5", "maths 0.8", "code 0.5", "code 0.8")
        for seed in (0, 1)
    ]
    weights = {r.arm.name: {name: round(float(w), 3) for name, w in r.stage.weights.items()} for r in runs}
    assert weights["control"] == {"web": 0.5, "code": 0.3, "maths": 0.2}
    assert weights["maths 0.8"] == {"maths": 0.84, "web": 0.1, "code": 0.06}
    one = runs[2]
    assert (one.stage.start_step, one.stage.end_step) == (40, 70)
    assert one.plan.lr(one.stage.index, 40) == 2e-2 and one.plan.lr(one.stage.index, 69) < 1e-3
    assert one.recipe.page_length == 64, "that of the base: the order of its data stays"
    assert runs[0].plan.orders["web"] != runs[1].plan.orders["web"], "another seed, another order"
    before = one.plan.stage("two").tokens_after("maths")
    assert one.epochs()["maths"] > before / one.plan.orders["maths"].tokens_per_epoch


def test_it_ranks_goes_on_after_a_kill_and_tells(base: TinyRun, tmp_path: Path) -> None:
    config = configure(base, tmp_path)
    process = subprocess.Popen(
        smol("ablate", config), env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not list(
        (tmp_path / "out/maths").glob("seed-0/metrics.jsonl")
    ):  # in the middle of the third of six runs
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "out/control/seed-0/validation.jsonl").read_bytes()
    done = run(config, "--json")
    assert done.returncode == 0, done.stderr
    assert "run 1 of 6: control, seed 0: done" in done.stderr
    assert (tmp_path / "out/control/seed-0/validation.jsonl").read_bytes() == first
    found = json.loads(done.stdout)
    assert found["arms"][0] == "maths" and sorted(found["arms"]) == ["code", "control", "maths"]
    cells = {arm: found["cells"][arm]["loss:maths"] for arm in found["arms"]}
    assert cells["maths"]["difference"] == pytest.approx(cells["maths"]["mean"] - cells["control"]["mean"])
    assert cells["maths"]["difference"] < 0 and cells["control"]["difference"] is None
    for arm, cell in cells.items():
        ends = [
            next(
                r
                for r in rows(tmp_path / f"out/{arm}/seed-{seed}/validation.jsonl")
                if (r["stage"], r["when"]) == (STAGE, "end")
            )
            for seed in (0, 1)
        ]
        assert cell["values"] == [end["losses"]["maths"] for end in ends]
        assert cell["mean"] == pytest.approx(sum(cell["values"]) / 2)
        assert cell["error"] == pytest.approx(abs(cell["values"][0] - cell["values"][1]) / 2)
    assert json.loads((tmp_path / "out/results.json").read_text()) == found
    table = run(config, "--results").stdout
    assert "by loss:maths, lower is better" in table and "to the control" in table
    starts = rows(tmp_path / "out/maths/seed-1/metrics.jsonl")
    assert starts[0]["stage"] == STAGE and starts[0]["step"] == 41


def test_from_scratch(base: TinyRun, tmp_path: Path) -> None:
    config = configure(base, tmp_path, **{"from": None}, seeds=[3], budget="6 steps", rank_by="loss:mean")
    runs = runs_of(load_ablation(config))
    assert [r.arm.name for r in runs] == ["maths", "code"] and runs[0].recipe.init_from is None
    assert runs[0].recipe.seed == 6 and runs[0].recipe.data.seed == 8
    assert {name: float(w) for name, w in runs[0].stage.weights.items()} == {"maths": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {"a": {"maths": 0.4}}}, "candidate 'a': the weights sum to 0.4"),
        ({"candidates": {"a": {"poems": 1}}}, "names the source 'poems', which"),
        ({"candidates": {"control": {"maths": 1}}}, "cannot be called 'control'"),
        ({"shares": [1.2]}, "shares must lie above 0"),
        (
            {"from": {"run": "RUN", "stage": "three", "at": "1 steps"}},
            "no trunk stage 'three' (allowed: one, two)",
        ),
        (
            {"from": {"run": "RUN", "stage": "two", "at": "99 steps"}},
            "outside of stage 'two' (steps 6 to 40)",
        ),
        ({"from": {"run": "RUN", "stage": "two", "at": "33 steps"}}, "of that stage there are: two-0000"),
        ({"budgett": "1 steps"}, "budgett"),
    ],
)
def test_mistakes(base: TinyRun, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    if "from" in change:
        change = {"from": change["from"] | {"run": str(base.run)}}
    with pytest.raises(UserError) as found:
        require_checkpoint(runs_of(load_ablation(configure(base, tmp_path, **change))))
    assert message in str(found.value)


def test_rank_by_what_was_not_measured(base: TinyRun, tmp_path: Path) -> None:
    done = run(configure(base, tmp_path, seeds=[0], rank_by="arc:acc"), "--results")
    assert done.returncode == 2 and "rank_by 'arc:acc' was not measured" in done.stderr
