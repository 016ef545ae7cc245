"""`smol bench train` on the CPU: the real engine, one process and two; and what its parts make of their input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.errors import RunError, UserError
from megatron_smol.measure.kernels import Kernel, Profile, group_of
from megatron_smol.measure.setting import MODELS, make_setting, parse_layout
from megatron_smol.recipe.load import load_recipe
from tests.recipe.recipes import EXAMPLES
from tests.tiny import environment, smol

SMALL = (
    "bench",
    "train",
    "--model",
    "tiny",
    "--seq",
    "64",
    "--micro-batch",
    "2",
    "--steps",
    "3",
    "--warmup",
    "1",
)


def bench(path: Path, *arguments: str, ranks: int = 0) -> dict[str, Any]:
    command = smol(*SMALL, *arguments, "--json", path, ranks=ranks)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tokens/s a rank" in done.stdout and done.stdout.count("peak memory") == 1
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_one_process(tmp_path: Path) -> None:
    found = bench(tmp_path / "result.json", "--precision", "bf16")
    assert found["parameters"] == 4_000_000 and found["step_seconds"]["steps"] == 3
    # The median of rates is the rate of the median, for an odd number of steps.
    assert found["tokens_per_second"]["median"] == pytest.approx(128 / found["step_seconds"]["median"])
    rates, per_token = found["flops_per_second_per_gpu"], found["flops_per_token"]
    assert (
        rates["full"] / rates["causal"] == pytest.approx(per_token["full"] / per_token["causal"])
        and per_token["full"] > per_token["causal"]
    )
    assert found["mfu"] == {} and found["device"]["table"] is None  # a CPU has no peak here
    memory = found["memory_bytes"]
    assert memory["peak"] == pytest.approx(memory["estimated"]["total"], rel=0.1)
    assert memory["states"]["weights"] == 2 * 4_000_000 and memory["fits"] == {"80 GB": True, "141 GB": True}
    groups = found["kernels"]["seconds_by_group"]
    assert {"matrix products", "attention", "optimizer", "norm"} <= set(groups) and not found["kernels"][
        "fp8"
    ]
    assert found["losses"]["first"] == pytest.approx(8.3, abs=0.3)  # ln 4096: random ids, not zeros
    assert found["versions"]["megatron-core"] == "0.16.1"


def test_two_ranks_of_one_model(tmp_path: Path) -> None:
    found = bench(
        tmp_path / "result.json", "--precision", "fp32", "--layout", "tp=2", "--tokens", "256", ranks=2
    )
    assert (found["layout"]["tp"], found["layout"]["dp"], found["micro_batches"]) == (2, 1, 2)
    assert found["tokens_per_second"]["median"] == pytest.approx(
        2 * found["tokens_per_second_per_gpu"]["median"]
    )
    assert found["memory_bytes"]["states"]["weights"] < 4 * 4_000_000 / 2 * 1.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "smollm2_1b"], "did you mean 'smollm2_135m'|did you mean 'smollm2_1.7b'"),
        (["--layout", "tp=2"], "needs a multiple of 2 ranks, and 1 were started"),
        (["--layout", "pq=2"], "did you mean 'pp'|tp=2,pp=1,sp=true"),
        (["--layout", "tp=0"], "tp=0"),
        (["--precision", "fp9"], r"--precision 'fp9' is not known; did you mean 'fp32'\?"),
        (["--tokens", "100"], "no multiple of 128"),
        (["--precision", "fp8-tensorwise"], "needs Transformer Engine"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], says: str) -> None:
    import re

    done = subprocess.run(smol(*SMALL, *arguments), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and re.search(says, done.stderr), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_named_models_are_the_examples() -> None:
    for name, shape in MODELS.items():
        if name != "tiny":
            model = load_recipe(EXAMPLES / f"{name}.yaml").model
            assert {key: getattr(model, key) for key in shape} == shape
            made = make_setting(name, "bf16", 2048, 1, "", 1, 1, 1)
            assert made.recipe.model == model


def test_a_recipe_gives_its_model_and_optimizer() -> None:
    made = make_setting(str(EXAMPLES / "demo.yaml"), "fp32", 64, 1, "", 1, 1, 1)
    assert made.recipe.model == load_recipe(EXAMPLES / "demo.yaml").model


def test_layouts_are_read() -> None:
    assert parse_layout("tp=2, sp=true,recompute=full") == {
        "tp": 2,
        "sequence_parallel": True,
        "recompute": "full",
    }
    pipeline = make_setting("tiny", "fp32", 64, 2, "pp=2", 1, 1, 4)
    assert (
        pipeline.recipe.training.global_batch == 2 * 2 * 2
    )  # two data-parallel ranks, a micro-batch for each pipeline rank
    with pytest.raises(UserError, match="write such as"):
        parse_layout("tp")


@pytest.mark.parametrize(
    ("name", "group", "fp8"),
    [
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize64x128x64", "matrix products", True),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "matrix products", False),
        ("void transformer_engine::cast_transpose_kernel<__nv_fp8_e4m3>", "casts and copies", True),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication", False),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention", False),
        ("multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer", False),
        ("triton_poi_fused_mul_silu_0", "element-wise", False),
    ],
)
def test_kernels_are_known_by_their_names(name: str, group: str, fp8: bool) -> None:
    assert group_of(name) == group and Kernel(name, group, 1, 1.0).fp8 is fp8


def test_fp8_that_did_not_run_is_an_error() -> None:
    from megatron_smol.measure.train import _require_fp8

    plain = Kernel("nvjet_tst_128x256", "matrix products", 1, 1.0)
    eight_bit = Kernel("sm90_xmma_gemm_e4m3bf16", "matrix products", 1, 1.0)
    with pytest.raises(RunError, match="this was not FP8"):
        _require_fp8("fp8-tensorwise", Profile((plain,), 0))
    _require_fp8("fp8-tensorwise", Profile((plain, eight_bit), 0))
    _require_fp8("bf16", Profile((plain,), 0))
