"""The law `precision`: what cannot run as asked is refused before a step is taken."""

from __future__ import annotations

import pytest
import torch

from megatron_smol.errors import UserError
from megatron_smol.model.backend import Backend
from megatron_smol.model.precision import PRECISIONS, precision

CPU = Backend(torch.device("cpu"), "gloo", transformer_engine=False)
GPU_WITHOUT_TE = Backend(torch.device("cuda", 0), "nccl", transformer_engine=False)
FP8 = [name for name in PRECISIONS if name.startswith("fp8")]


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("backend", [CPU, GPU_WITHOUT_TE], ids=["cpu", "gpu-without-te"])
def test_fp8_without_transformer_engine_is_refused(name: str, backend: Backend) -> None:
    with pytest.raises(UserError, match="Transformer Engine"):
        precision(name).require(backend)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_runs_everywhere_is_accepted(name: str) -> None:
    precision(name).require(CPU)


def test_unknown_precision_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'fp8-tensorwise'"):
        precision("fp8-tensorwize")


def test_delayed_scaling_is_not_megatron_cores_default() -> None:
    """megatron-core's own default (history 1, most_recent) is not the delayed scaling that anyone means."""
    fp8 = precision("fp8-delayed").fp8
    assert fp8 and (fp8["fp8_amax_history_len"], fp8["fp8_amax_compute_algo"]) == (1024, "max")
