"""What `smol plan` shows, its JSON, the estimates behind it, and the generated reference."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from megatron_smol.recipe import estimate
from megatron_smol.recipe.document import JSON_FIELDS
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.memory import Layout, rank_memory
from megatron_smol.recipe.plan import Plan, make_plan
from megatron_smol.recipe.render import print_plan, to_json
from tests.recipe.recipes import EXAMPLES, SHIPPED, load, small

ROOT = Path(__file__).parents[2]


def shipped(name: str) -> Plan:
    return make_plan(load_recipe(EXAMPLES / f"{name}.yaml"))


def printed(plan: Plan, width: int) -> str:
    out = StringIO()
    print_plan(plan, console=Console(file=out, width=width, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("width", [100, 120])
def test_tables_fit(name: str, width: int) -> None:
    text = printed(shipped(name), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "nearest whole step" in text


def test_1_7b_shows_the_published_figures() -> None:
    text = printed(shipped("smollm2_1.7b"), 120)
    for figure in (
        "1,711,376,384",
        "5,240,000",
        "10.989T",
        "9.89T",
        "2,861,023",
        "3,814,697",
        "4,768,372",
        "8.33",
    ):
        assert figure in text
    assert "warning: source 'owm'" in text


def test_json_has_the_documented_keys_and_survives_json() -> None:
    plan = shipped("demo")
    document = to_json(plan, tokens_per_second_per_gpu=1000)
    assert set(document) | {"stages[].sources"} == set(JSON_FIELDS)
    assert json.loads(json.dumps(document)) == document
    for stage, described in zip(plan.stages, document["stages"], strict=True):
        for key in described:
            assert key in JSON_FIELDS["stages"], key
        for source in described["sources"].values():
            assert all(key in JSON_FIELDS["stages[].sources"] for key in source)
        assert sum(source["tokens"] for source in described["sources"].values()) == stage.tokens
        assert sum(source["windows"] for source in described["sources"].values()) == stage.samples
        for whole in (described["memory_per_gpu"], described["sent_per_step"]):
            assert whole.pop("total") == pytest.approx(sum(whole.values()), abs=len(whole))
            assert all(f"{part}" in JSON_FIELDS["stages"] for part in whole)
    assert all(key in JSON_FIELDS["compute"] for key in document["compute"])


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    plan = shipped("smollm2_1.7b")
    print_plan(plan, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["trunk"] == {"steps": 5_240_000, "tokens": 10_989_076_480_000}
    marks = {row["what"]: (row["step"], row["stage"]) for row in document["lr_boundaries"]}
    assert marks == {
        "warm-up ends": (2000, "stable-1"),
        "decay starts": (4_716_000, "stable-3"),
        "decay ends": (5_240_000, "decay"),
    }


def test_flops_per_token_of_the_1_7b() -> None:
    model = shipped("smollm2_1.7b").recipe.model
    counted = [
        estimate.flops_per_token(model, length, causal) / 1e9
        for length in (2048, 8192)
        for causal in (True, False)
    ]
    assert counted == pytest.approx([10.872, 11.476, 12.684, 15.099], abs=0.001)


def test_time_of_the_1_7b() -> None:
    """Modelled: 35 k tokens/s on an H100, which is about 40 % MFU, as good public runs of 1-2B models have."""
    plan = shipped("smollm2_1.7b")
    assumed = estimate.compute(plan)
    assert assumed.assumed and assumed.gpu_hours == pytest.approx(88_300, rel=0.01)
    given = estimate.compute(plan, 40_000)
    tokens = sum(stage.tokens for stage in plan.stages)
    assert given.gpu_hours == pytest.approx(tokens / 40_000 / 3600) and not given.assumed


def test_memory_of_the_1_7b() -> None:
    """6 bytes a weight and 12 sharded over 256 ranks; about 2.2 MB of activations a token (8192 tokens a GPU)."""
    plan = shipped("smollm2_1.7b")
    model, parallel, stage = plan.recipe.model, plan.recipe.parallel, plan.stages[0]
    memory = estimate.memory_per_gpu(model, parallel, stage)
    assert memory.weights + memory.gradients == pytest.approx(6 * model.parameters())
    assert memory.optimizer == pytest.approx(12 * model.parameters() / 256)
    assert memory.activations / 8192 == pytest.approx(2.2e6, rel=0.05)
    alone = estimate.memory_per_gpu(model, parallel.model_copy(update={"gpus": 1}), stage)
    assert alone.optimizer == pytest.approx(12 * model.parameters())
    halved = parallel.model_copy(update={"tp": 2})
    assert estimate.memory_per_gpu(model, halved, stage).weights == pytest.approx(
        memory.weights / 2, rel=0.001
    )


def test_pipeline_ranks_add_up_to_the_model() -> None:
    recipe = load(small(**{"parallel.pp": 2, "model.tied_embeddings": False}))
    stage, layout = make_plan(recipe).stages[0], Layout.of(recipe.parallel)
    ranks = [rank_memory(recipe.model, layout, stage, position, "cpu") for position in (0, 1)]
    assert sum(rank.weights for rank in ranks) == 4 * recipe.model.parameters()


def test_costs_show_memory_time_and_traffic() -> None:
    text = printed(shipped("smollm2_1.7b"), 120)
    for part in (
        "Transformer Engine",
        "logits",
        "workspace",
        "modelled for H100",
        "PaLM",
        "6.819 GB gradients",
    ):
        assert part in text
    assert "on the CPU" in printed(shipped("demo"), 120)


def test_saves_counted_as_they_happen() -> None:
    plan = make_plan(load(small(save={"every": "30 steps"})))
    for stage in plan.stages:
        steps = range(stage.start_step + 1, stage.end_step + 1)
        assert estimate.saves_in(plan, stage) == sum(plan.saves(stage.index, step) for step in steps)
    disk = estimate.disk(plan)
    assert (disk.kept, disk.written) == (4, 8)
    assert disk.bytes_at_once == 7 * 16 * plan.recipe.model.parameters()


def test_planning_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys; from megatron_smol.recipe.load import load_recipe; from megatron_smol.recipe.plan "
        "import make_plan;"
        "from megatron_smol.recipe.render import print_plan; print_plan(make_plan(load_recipe(sys.argv[1])));"
        "found = {'torch', 'megatron', 'transformers', 'scipy', 'pandas'} & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES / "smollm2_1.7b.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_recipe_reference", ROOT / "tools/make_recipe_reference.py"
    )
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TARGET.read_text(encoding="utf-8") == tool.reference(), (
        "run python tools/make_recipe_reference.py"
    )
