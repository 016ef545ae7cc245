"""The formulas of `smol plan` against the real engine: bytes that real CPU steps hold and allocate, FLOPs by torch's counter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smol.recipe import estimate
from megatron_smol.recipe.devices import DEVICES, parse_cluster
from megatron_smol.recipe.flops import flops_per_token, gemm_weights
from megatron_smol.recipe.load import load_recipe
from megatron_smol.recipe.memory import (
    Batches,
    Layout,
    linear_weights_per_layer,
    memory,
    rank_memory,
    rank_parameters,
)
from megatron_smol.recipe.plan import make_plan
from megatron_smol.recipe.schema import Model
from megatron_smol.recipe.traffic import traffic
from tests.helpers import run_ranks
from tests.recipe import memory_ranks
from tests.recipe.recipes import EXAMPLES, SHIPPED

EVERYTHING = [(shape, micro_batch) for shape in memory_ranks.SHAPES for micro_batch in (1, 4)]
SOME = [("deep", 4), ("wide", 1)]
BIG = load_recipe(EXAMPLES / "smollm2_1.7b.yaml").model


@pytest.mark.parametrize(
    ("ranks", "parallel", "precision", "jobs"),
    [
        (1, "", "fp32", EVERYTHING),
        (1, "", "bf16", EVERYTHING),
        (2, "tp: 2", "fp32", EVERYTHING),
        (2, "tp: 2", "bf16", EVERYTHING),
        (2, "tp: 2, sequence_parallel: true", "bf16", SOME),
        (2, "pp: 2", "fp32", SOME),
        (2, "pp: 2, vpp: 2", "bf16", SOME),
        (2, "cp: 2", "fp32", SOME),
        (2, "cp: 2, cp_comm: all_gather", "bf16", SOME),
        (1, "recompute: full", "fp32", SOME),
        (1, "recompute: selective", "bf16", SOME),
        (2, "", "bf16", SOME),
        (2, "distributed_optimizer: false", "bf16", SOME),
    ],
)
def test_memory_is_within_a_tenth_of_what_a_step_allocates(
    ranks: int, parallel: str, precision: str, jobs: list[tuple[str, int]]
) -> None:
    for rank, results in enumerate(run_ranks(memory_ranks.compare, ranks, jobs, parallel, precision)):
        for job, found in zip(jobs, results, strict=True):
            counted, estimated = found.pop("parameters")
            assert counted == estimated, (rank, job)
            if "recompute" in parallel or "pp" in parallel:
                # What was let go before the end was counted with what is kept: only the peak is comparable.
                del found["saved"]
            for name, (counted, estimated) in found.items():
                assert estimated == pytest.approx(counted, rel=0.1), (rank, job, name)


def executed_flops(model: Model, seq_length: int, recompute: str = "none") -> float:
    """Of a token, attention counted in full: a flash kernel's backward pass makes five products for the forward's two
    (Dao et al. 2022, arXiv 2205.14135), and full recomputation repeats the forward pass of the layers."""
    layers = model.layers * linear_weights_per_layer(model)
    attention = 4 * model.layers * model.hidden_size * seq_length
    again = {"none": 0, "full": 2 * layers + attention}[recompute]
    return 6 * gemm_weights(model) + attention * 3.5 + again


@pytest.mark.parametrize("shape", list(memory_ranks.SHAPES))
def test_flops_are_what_a_counter_counts(shape: str) -> None:
    (counted,) = run_ranks(memory_ranks.counted_flops, 1, shape, "")
    made = memory_ranks.recipe(shape, 2, "", "fp32")
    tokens, length = 2 * made.training.seq_length, made.training.seq_length
    assert counted["forward"] == tokens * flops_per_token(made.model, length, causal=False) / 3
    assert counted["all"] == tokens * executed_flops(made.model, length)


def test_flops_of_recomputation() -> None:
    (counted,) = run_ranks(memory_ranks.counted_flops, 1, "deep", "recompute: full")
    made = memory_ranks.recipe("deep", 2, "", "fp32")
    length = made.training.seq_length
    assert counted["all"] == 2 * length * executed_flops(made.model, length, "full")


def test_both_flop_conventions_differ_by_half_of_attention() -> None:
    difference = flops_per_token(BIG, 2048, causal=False) - flops_per_token(BIG, 2048)
    assert difference == 6 * BIG.layers * BIG.hidden_size * 2048


@pytest.mark.parametrize("name", SHIPPED)
def test_parameters_of_all_ranks_are_the_models(name: str) -> None:
    model = load_recipe(EXAMPLES / f"{name}.yaml").model
    assert rank_parameters(model, Layout(), 0) == model.parameters()
    for pp in (2, 3, 5):
        if model.layers % pp:
            continue
        whole = sum(rank_parameters(model, Layout(pp=pp), position) for position in range(pp))
        assert whole == model.parameters() + model.vocab_size * model.hidden_size  # the tied table twice


def test_memory_on_a_gpu_with_transformer_engine() -> None:
    """No fp32 copies in the norms, logits once: about 2.2 MB of activations a token for the 1.7B."""
    work = Batches(2048, 4, 1024, "bf16")
    found = memory(BIG, Layout(dp=256), work, "te")
    assert found.activations / 8192 == pytest.approx(2.17e6, rel=0.01)
    assert found.logits == 2 * 8192 * BIG.vocab_size
    on_cpu = memory(BIG, Layout(dp=256), work, "cpu")
    assert on_cpu.activations > found.activations and on_cpu.logits == 3 * found.logits
    fp8 = memory(BIG, Layout(dp=256), Batches(2048, 4, 1024, "fp8-delayed"), "te")
    assert fp8.weights == found.weights + 2 * 24 * 67_108_864
    assert fp8.activations < found.activations


def test_the_last_micro_batches_limit_what_a_pipeline_holds() -> None:
    many, few = (Batches(2048, 1, batch, "bf16") for batch in (64, 1))
    first = [rank_memory(BIG, Layout(pp=4), work, 0, "te").activations for work in (many, few)]
    assert first[0] == 4 * first[1]


# --- communication -----------------------------------------------------------------------------------------


WORK = Batches(2048, 4, 1024, "bf16")
ACTIVATION = 4 * 2048 * 2048 * 2  # bytes of the residual stream of a micro-batch


def test_traffic_of_data_parallel_ranks() -> None:
    found = traffic(BIG, Layout(dp=256), WORK)
    assert found.gradients == pytest.approx(4 * BIG.parameters() * 255 / 256)
    assert found.parameters == pytest.approx(2 * BIG.parameters() * 255 / 256)
    assert (found.tensor, found.pipeline, found.context) == (0, 0, 0)
    whole = traffic(BIG, Layout(dp=256, distributed_optimizer=False), WORK)
    assert whole.gradients == 2 * found.gradients and whole.parameters == 0


def test_traffic_of_tensor_parallel_ranks() -> None:
    """Four all-reduces a layer and two besides, each twice (n - 1) / n of the residual stream."""
    micro_batches = 1024 // 4 // 128
    found = traffic(BIG, Layout(tp=2, dp=128), WORK)
    assert found.tensor == micro_batches * 0.5 * ACTIVATION * (24 * 8 + 2)
    split = traffic(BIG, Layout(tp=2, dp=128, sequence_parallel=True), WORK)
    assert split.tensor == micro_batches * 0.5 * ACTIVATION * (24 * 10 + 2)
    again = traffic(BIG, Layout(tp=2, dp=128, recompute="full"), WORK)
    assert again.tensor == micro_batches * 0.5 * ACTIVATION * (24 * 12 + 2)


def test_traffic_of_pipeline_and_context_parallel_ranks() -> None:
    pipeline = traffic(BIG, Layout(pp=2, dp=128), WORK)
    assert pipeline.pipeline == 2 * 2 * ACTIVATION
    assert traffic(BIG, Layout(pp=2, vpp=3, dp=128), WORK).pipeline == 3 * pipeline.pipeline
    context = traffic(BIG, Layout(cp=2, dp=128), WORK)
    assert context.context == 2 * 24 * 3 * (
        ACTIVATION / 2 * 2
    )  # keys and values of half a window, three times


# --- a measurement in place of the model's own efficiency --------------------------------------------------


def test_time_of_a_plan_is_the_sum_of_its_stages() -> None:
    plan = make_plan(load_recipe(EXAMPLES / "smollm2_1.7b.yaml"))
    cost = estimate.compute(plan)
    parallel = plan.recipe.parallel
    seconds = sum(s.steps * estimate.stage_time(BIG, parallel, s).total for s in plan.stages)
    assert cost.gpu_hours == pytest.approx(256 * seconds / 3600)
    assert cost.flops < cost.flops_full and cost.device == "H100"
    faster = estimate.compute(plan, device=DEVICES["H200"])
    assert faster.gpu_hours < cost.gpu_hours


def test_clusters_are_read() -> None:
    cluster = parse_cluster("64xh100-80GB")
    assert (cluster.gpus, cluster.device.name, cluster.device.memory) == (64, "H100", 80e9)
    assert parse_cluster("8xA100-40GB").device.memory_rate == 1.555e12
    assert str(parse_cluster("16 x H200-141GB")) == "16 x H200 141 GB"


@pytest.mark.parametrize(
    ("text", "says"),
    [("H100", "64xH100-80GB"), ("8xG100-80GB", "did you mean"), ("0xH100-80GB", "no GPUs")],
)
def test_clusters_that_are_none(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_cluster(text)


def result(tokens_per_second: float) -> dict[str, Any]:
    """Of `smol bench train --json`, what a calibration reads."""
    return {
        "model": BIG.model_dump(),
        "layout": {"tp": 1, "pp": 1, "cp": 1, "vpp": 1, "dp": 1},
        "seq_length": 2048,
        "micro_batch": 8,
        "global_batch": 8,
        "precision": "bf16",
        "tokens_per_second_per_gpu": {"median": tokens_per_second},
        "device": {"name": "NVIDIA H200", "table": "H200"},
    }


def test_a_measurement_becomes_the_models_speed(tmp_path: Path) -> None:
    from megatron_smol.recipe.speed import EFFICIENCY, Calibration, step_time

    file = tmp_path / "result.json"
    file.write_text(json.dumps(result(43_210)))
    calibration = Calibration.from_file(file)
    work = Batches(2048, 8, 8, "bf16")
    same = step_time(BIG, Layout(), work, DEVICES["H200"], calibration)
    assert same.tokens_per_second_per_gpu == pytest.approx(43_210)
    assert calibration.of("fp8-tensorwise") == EFFICIENCY  # not measured


@pytest.mark.parametrize("broken", ["no JSON", "{}", json.dumps(result(1) | {"device": {"table": None}})])
def test_a_file_that_is_no_measurement(tmp_path: Path, broken: str) -> None:
    from megatron_smol.errors import UserError
    from megatron_smol.recipe.speed import Calibration

    file = tmp_path / "result.json"
    file.write_text(broken)
    with pytest.raises(UserError, match="measure"):
        Calibration.from_file(file)


# What others published, tokens/s a GPU. Sources: llm-foundry, scripts/train/benchmarking/README.md; Smol Training Playbook
# (Llama-3.2-1B-like on nanotron); torchtitan, benchmarks/llama3_h100_202412; Megatron-Bridge performance summary 25.11; TinyLlama README.
_MPT_1B = Model(layers=24, hidden_size=2048, heads=16, kv_heads=16, ffn_size=5461, vocab_size=50368)
_MPT_3B = Model(layers=32, hidden_size=2560, heads=20, kv_heads=20, ffn_size=6827, vocab_size=50368)
_LLAMA_1B = Model(layers=16, hidden_size=2048, heads=32, kv_heads=8, ffn_size=8192, vocab_size=128256)
_LLAMA_8B = Model(
    layers=32,
    hidden_size=4096,
    heads=32,
    kv_heads=8,
    ffn_size=14336,
    vocab_size=128256,
    tied_embeddings=False,
)
_TINY_LLAMA = Model(
    layers=22, hidden_size=2048, heads=32, kv_heads=4, ffn_size=5632, vocab_size=32000, tied_embeddings=False
)
PUBLISHED = [
    (_MPT_1B, "8xH100-80GB", Batches(2048, 8, 128, "bf16"), 45_455),
    (_MPT_1B, "64xH100-80GB", Batches(2048, 8, 1024, "bf16"), 44_402),
    (_MPT_1B, "8xH100-80GB", Batches(8192, 2, 32, "bf16"), 29_157),
    (_MPT_1B, "8xH100-80GB", Batches(8192, 2, 32, "fp8-delayed"), 32_010),
    (_MPT_3B, "16xH100-80GB", Batches(2048, 8, 256, "bf16"), 24_142),
    (_MPT_3B, "8xH100-80GB", Batches(2048, 8, 128, "fp8-delayed"), 30_586),
    (_LLAMA_1B, "8xH100-80GB", Batches(4096, 4, 64, "bf16"), 42_000),
    (_LLAMA_8B, "8xH100-80GB", Batches(8192, 1, 64, "bf16"), 6_667),
    (_LLAMA_8B, "8xH100-80GB", Batches(8192, 1, 64, "fp8-tensorwise"), 14_451),
    (_TINY_LLAMA, "16xA100-40GB", Batches(2048, 8, 1024, "bf16"), 24_000),
]


def test_speed_is_in_the_middle_of_published_runs() -> None:
    """A model of one number cannot tell trainers apart: within 20 % of most, and of half on either side."""
    from statistics import median

    from megatron_smol.recipe.speed import step_time

    ratios = []
    for model, text, work, published in PUBLISHED:
        cluster = parse_cluster(text)
        layout = replace(Layout(), dp=cluster.gpus)
        modelled = step_time(model, layout, work, cluster.device).tokens_per_second_per_gpu
        ratios.append(published / modelled)
    assert median(ratios) == pytest.approx(1.0, abs=0.03)
    assert sum(abs(ratio - 1) < 0.2 for ratio in ratios) >= 8
