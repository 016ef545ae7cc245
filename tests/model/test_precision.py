"""The law `precision`: what cannot run as asked is refused before a step is taken."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_smol.errors import UserError
from megatron_smol.model.backend import Backend
from megatron_smol.model.precision import PRECISIONS, precision, require_layers
from megatron_smol.recipe.load import parse_recipe
from megatron_smol.recipe.schema import Fp8
from tests import ranks
from tests.helpers import run_ranks
from tests.layouts import Layout

CPU = Backend(torch.device("cpu"), "gloo", transformer_engine=False)
GPU_WITHOUT_TE = Backend(torch.device("cuda", 0), "nccl", transformer_engine=False)
GPU = Backend(torch.device("cuda", 0), "nccl", transformer_engine=True)
FP8 = [name for name in PRECISIONS if name.startswith("fp8")]
EMULATED = [name for name in PRECISIONS if name.startswith("emulated")]


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("backend", [CPU, GPU_WITHOUT_TE], ids=["cpu", "gpu-without-te"])
def test_fp8_without_transformer_engine_is_refused(name: str, backend: Backend) -> None:
    with pytest.raises(UserError, match=f"Transformer Engine.*training.precision=emulated-{name}"):
        precision(name).require(backend)


@pytest.mark.parametrize("name", FP8)
def test_fp8_on_an_older_gpu_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match=r"compute capability 9\.0 \(H100\), and A100 has 8\.0"):
        precision(name).require(GPU)


@pytest.mark.parametrize("name", EMULATED)
def test_emulation_is_not_run_where_fp8_would(name: str) -> None:
    with pytest.raises(
        UserError, match=f"here is Transformer Engine; ask for {name.removeprefix('emulated-')}"
    ):
        precision(name).require(GPU)


@pytest.mark.parametrize("name", ["fp32", "bf16", *EMULATED])
def test_what_runs_everywhere_is_accepted(name: str) -> None:
    precision(name).require(CPU)


def test_unknown_precision_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'fp8-tensorwise'"):
        precision("fp8-tensorwize")


def test_delayed_scaling_is_not_megatron_cores_default() -> None:
    """megatron-core's own default (history 1, most_recent) is not the delayed scaling that anyone means."""
    fp8 = precision("fp8-delayed").fp8
    assert fp8 and (fp8["fp8_amax_history_len"], fp8["fp8_amax_compute_algo"]) == (1024, "max")


def test_layers_that_stay_in_bf16() -> None:
    def numbers(name: str, fp8: Fp8 | None = None) -> list[int]:
        return precision(name, fp8).bf16_layers(8)

    assert numbers("fp8-tensorwise") == numbers("emulated-fp8-tensorwise") == [0, 7]
    assert numbers("fp8-delayed") == numbers("fp8-blockwise") == numbers("bf16") == []
    assert numbers("fp8-blockwise", Fp8(bf16_first=2, bf16_last=1)) == [0, 1, 7]
    assert numbers("fp8-tensorwise", Fp8(bf16_first=0)) == [7]
    assert precision("fp8-tensorwise", Fp8(gather_parameters=True)).fp8["fp8_param"] is True  # type: ignore[index]


def test_the_log_says_which_rounding_which_kernels_and_which_layers() -> None:
    assert precision("fp8-tensorwise").describe(24) == (
        "fp8-tensorwise (E4M3 forward, E5M2 gradients; Transformer Engine's kernels) in 22 of 24 layers; bf16 in layers "
        "1, 24; embedding and output layer in bf16"
    )
    assert "emulated: rounded as FP8, computed in fp32" in precision("emulated-fp8-delayed").describe(24)


# --- the recipe --------------------------------------------------------------------------------------------

RECIPE = """
name: shapes
run_dir: nowhere
tokenizer: none
model: {{layers: 4, hidden_size: {hidden}, heads: 4, kv_heads: 2, ffn_size: {ffn}, vocab_size: 256}}
sources: {{a: {{path: a, tokens: 10M}}}}
training: {{seq_length: {length}, global_batch: 2, micro_batch: 1, precision: {precision}}}
stages: [{{name: one, until: 10 steps, mixture: {{a: 1}}}}]
lr: {{peak: 1e-3}}
{more}
"""


def parse(name: str, hidden: int = 128, ffn: int = 256, length: int = 128, more: str = "") -> Any:
    return parse_recipe(RECIPE.format(precision=name, hidden=hidden, ffn=ffn, length=length, more=more))


@pytest.mark.parametrize("name", [*FP8, *EMULATED])
def test_shapes_that_fit_are_accepted(name: str) -> None:
    parse(name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fp8-tensorwise", {"hidden": 136}, r"multiples of 16, but model\.hidden_size is 136"),
        ("fp8-delayed", {"ffn": 104}, r"multiples of 16, but model\.ffn_size / tp is 104"),
        ("fp8-tensorwise", {"length": 24}, r"multiples of 16, but micro_batch \* seq_length / cp is 24"),
        ("fp8-blockwise", {"hidden": 192}, r"multiples of 128, but model\.hidden_size is 192"),
        (
            "fp8-blockwise",
            {"more": "parallel: {tp: 2}"},
            r"multiples of 128, but model\.hidden_size / tp is 64",
        ),
        (
            "fp8-delayed",
            {"more": "fp8: {bf16_first: 1}"},
            r"scaling history megatron-core keeps for all layers",
        ),
        ("fp8-tensorwise", {"more": "fp8: {bf16_first: 2, bf16_last: 2}"}, r"spare 4 of 4 layers"),
        (
            "fp8-blockwise",
            {"more": "fp8: {gather_parameters: true}"},
            r"works with fp8-tensorwise and fp8-delayed",
        ),
        ("emulated-fp8-tensorwise", {"more": "fp8: {gather_parameters: true}"}, r"works with fp8-tensorwise"),
        ("emulated-fp8-delayed", {"more": "parallel: {recompute: full}"}, r"recompute to none or selective"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(name, **changes)


def test_other_precisions_have_no_such_conditions() -> None:
    for name in ("bf16", "emulated-fp8-blockwise"):
        parse(name, hidden=136, ffn=104, length=24)


# --- what was built ----------------------------------------------------------------------------------------


def _local_layers() -> str:
    try:
        require_layers(ranks.engine(Layout(1)).gpt, "fp8-tensorwise")
    except UserError as error:
        return str(error)
    return ""


def test_layers_that_never_look_at_fp8_are_refused() -> None:
    [message] = run_ranks(_local_layers, 1)
    assert "is megatron-core's RowParallelLinear, which would compute in bf16 without a word" in message


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    """Transformer Engine's own module of recipes: plain Python, which imports without a GPU, and without the rest of it.

    TE_SOURCE names an unpacked wheel (`pip download --no-deps transformer-engine==2.11.0`) where it is not installed.
    """
    found = importlib.util.find_spec("transformer_engine")
    installed = found.submodule_search_locations[0] if found and found.submodule_search_locations else None
    source = os.environ.get("TE_SOURCE", installed and str(Path(installed).parent))
    if source is None:
        pytest.skip("transformer-engine is not installed, and TE_SOURCE names no unpacked wheel")
    path = Path(source) / "transformer_engine" / "common" / "recipe" / "__init__.py"
    spec = importlib.util.spec_from_file_location("transformer_engine_recipes", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_objects_are_the_right_classes(recipes: ModuleType) -> None:
    def of(name: str) -> Any:
        return precision(name).transformer_engine_recipe(recipes)

    tensorwise, delayed, blockwise = of("fp8-tensorwise"), of("fp8-delayed"), of("fp8-blockwise")
    assert type(tensorwise) is recipes.Float8CurrentScaling and tensorwise.float8_current_scaling()
    assert type(delayed) is recipes.DelayedScaling and delayed.delayed()
    assert type(blockwise) is recipes.Float8BlockScaling and blockwise.float8_block_scaling()
    assert (delayed.amax_history_len, delayed.amax_compute_algo) == (1024, "max")
    hybrid, e4m3 = recipes.Format.HYBRID, recipes.Format.E4M3
    assert [r.fp8_format for r in (tensorwise, delayed, blockwise)] == [hybrid, hybrid, e4m3]
    # What the emulation rounds by are these objects' own settings.
    assert (
        blockwise.x_block_scaling_dim,
        blockwise.w_block_scaling_dim,
        blockwise.grad_block_scaling_dim,
    ) == (1, 2, 1)
    assert blockwise.fp8_quant_fwd_inp.power_2_scale and not tensorwise.fp8_quant_fwd_inp.power_2_scale


def test_a_recipe_that_megatron_core_built_otherwise_is_refused(recipes: ModuleType) -> None:
    asked = precision("fp8-delayed")
    asked.require_recipe(asked.transformer_engine_recipe(recipes), recipes)
    for other in (
        recipes.Float8CurrentScaling(),
        recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID, amax_history_len=1),
        SimpleNamespace(),
        None,
    ):
        with pytest.raises(UserError, match="megatron-core built"):
            asked.require_recipe(other, recipes)
