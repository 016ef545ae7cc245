"""`smol plan --fit`: what it proposes can be run and fits, the best is first, and what cannot be says why."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from itertools import pairwise

import pytest
from rich.console import Console

from megatron_smol.errors import UserError
from megatron_smol.recipe.devices import parse_cluster
from megatron_smol.recipe.fit import Fit, budget, fit, tensor_parallel_choices
from megatron_smol.recipe.fit_view import print_fit, to_json
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.memory import memory
from megatron_smol.recipe.plan import make_plan
from tests.recipe.recipes import EXAMPLES, load, small


def shipped(name: str, cluster: str) -> Fit:
    return fit(make_plan(load_recipe(EXAMPLES / f"{name}.yaml")), parse_cluster(cluster))


@pytest.fixture(scope="module")
def big() -> Fit:
    return shipped("smollm2_1.7b", "64xH100-80GB")


def test_the_fastest_is_first_and_data_parallel(big: Fit) -> None:
    """As NVIDIA recommends for 1B models, and SmolLM2 was trained: no model parallelism."""
    best = big.proposals[0].layout
    assert (best.tp, best.pp, best.cp, best.dp, best.recompute) == (1, 1, 1, 64, "none")
    assert all(a.seconds <= b.seconds for a, b in pairwise(big.proposals))


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("smollm2_1.7b", "64xH100-80GB"),
        ("smollm2_1.7b", "8xL40S-48GB"),
        ("smollm2_360m", "16xA100-40GB"),
    ],
)
def test_every_proposal_is_a_recipe_that_fits(name: str, cluster: str) -> None:
    """The settings are accepted by the recipe's own checks, and every stage's memory is within the budget."""
    found = shipped(name, cluster)
    for proposal in [*found.proposals[:8], found.proposals[-1]]:
        recipe = load_recipe(EXAMPLES / f"{name}.yaml", proposal.overrides())
        plan = make_plan(recipe)
        assert proposal.layout.ranks == recipe.parallel.gpus == found.cluster.gpus
        for stage, chosen in zip(plan.stages, proposal.stages, strict=True):
            assert stage.micro_batch == chosen.work.micro_batch
            needed = memory(recipe.model, proposal.layout, stage, "te").total
            assert needed == chosen.memory.total <= budget(found.cluster)


def test_windows_that_sequence_parallelism_does_not_cut() -> None:
    """160 tokens: over tp 4 and cp 8 they would be cut into 64 pieces, which the recipe refuses."""
    data = small(**{"training.seq_length": 160, "stages.2.seq_length": 160, "stages.2.global_batch": 8})
    data["model"] |= {"heads": 8, "kv_heads": 4, "hidden_size": 128}
    found = fit(make_plan(load(data)), parse_cluster("32xH100-80GB"))
    assert any((one.layout.tp, one.layout.cp) == (4, 8) for one in found.proposals)
    for proposal in found.proposals:
        load(data, *proposal.overrides())


def test_little_memory_brings_recomputation_or_model_parallelism() -> None:
    plenty = shipped("smollm2_1.7b", "8xH100-80GB").proposals[0].layout
    little = shipped("smollm2_1.7b", "8xH100-20GB").proposals[0].layout
    assert (plenty.tp, plenty.pp, plenty.cp, plenty.recompute) == (1, 1, 1, "none")
    assert little != plenty and (little.recompute == "full" or little.tp * little.pp * little.cp > 1)


def test_heads_that_do_not_divide_are_refused_with_what_does(big: Fit) -> None:
    small_model = load_recipe(EXAMPLES / "smollm2_135m.yaml").model
    assert tensor_parallel_choices(small_model, 8) == [1, 3]
    assert tensor_parallel_choices(load(small()).model, 8) == [1, 2, 3, 6]  # 12 heads, but 6 for keys
    assert tensor_parallel_choices(load(small()).model, 4) == [1, 2, 3]
    found = shipped("smollm2_135m", "8xA100-40GB")
    (refusal,) = [one for one in found.rejections if one.what.startswith("tp 2")]
    assert "key/value heads (3)" in refusal.why and refusal.why.endswith("1, 3")
    (layers,) = [one for one in found.rejections if one.what == "pp 4, 8"]
    assert "30 layers" in layers.why
    assert not any(one.what.startswith("tp 2, 4") for one in big.rejections)


def test_the_obvious_alternatives_have_their_reason(big: Fit) -> None:
    reasons = {one.what: one.why for one in big.rejections}
    assert "more than 70 GB" in reasons["micro-batch 16 in stable-1"]
    assert any(
        what.startswith("tp 2") and "tensor-parallel communication" in why for what, why in reasons.items()
    )
    assert any("recompute full" in what and "slower" in why for what, why in reasons.items())


def test_a_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UserError, match=r"do not divide the global batch.*allowed: .*12") as error:
        fit(
            make_plan(load(small(**{"training.global_batch": 12, "stages.2.global_batch": 12}))),
            parse_cluster("7xH100-80GB"),
        )
    assert "7 data-parallel ranks" in str(error.value)


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"no layout of smollm2-1\.7b fits 1 x H100 8 GB.*more than 5\.2 GB"):
        shipped("smollm2_1.7b", "1xH100-8GB")


def test_fp8_needs_a_gpu_that_has_it() -> None:
    recipe = load_recipe(EXAMPLES / "smollm2_1.7b.yaml", ["training.precision=fp8-tensorwise"])
    with pytest.raises(UserError, match="A100 has no FP8"):
        fit(make_plan(recipe), parse_cluster("8xA100-80GB"))
    eight_bit = fit(make_plan(recipe), parse_cluster("64xH100-80GB")).proposals[0]
    sixteen_bit = shipped("smollm2_1.7b", "64xH100-80GB").proposals[0]
    assert 1.1 < eight_bit.tokens_per_second_per_gpu / sixteen_bit.tokens_per_second_per_gpu < 1.4


def test_table_and_json_say_the_same(big: Fit) -> None:
    out = StringIO()
    print_fit(big, console=Console(file=out, width=120, highlight=False))
    text, document = out.getvalue(), to_json(big)
    assert json.loads(json.dumps(document)) == document
    best = document["proposals"][0]
    assert f"{best['tokens_per_second_per_gpu']:,.0f}" in text and " ".join(
        best["overrides"]
    ) in text.replace("\n", " ")
    for rejection in document["rejections"]:
        assert rejection["what"] in text
    stage = best["stages"]["stable-1"]
    assert sum(v for k, v in stage["memory"].items() if k != "total") == pytest.approx(
        stage["memory"]["total"]
    )
    assert sum(v for k, v in stage["step_seconds"].items() if k != "total") == pytest.approx(
        stage["step_seconds"]["total"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fit", "many"], "is not a cluster"),
        (["--fit", "8xH100-80GB", "--calibration", "nowhere.json"], "nowhere.json is not a result"),
        (["--calibration", "nowhere.json"], "goes with --fit"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "megatron_smol", "plan", str(EXAMPLES / "smollm2_135m.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
