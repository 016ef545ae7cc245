"""What "bf16" or "fp8-tensorwise" in a recipe means for megatron-core, and the precision law.

The law: FP8 asked for is FP8 that ran, or an error before step 1. megatron-core 0.16.1 runs FP8 as bf16 in
silence without Transformer Engine or with its local layers, so the refusal has to be ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_smol.errors import UserError, nearest
from megatron_smol.model.backend import Backend


@dataclass(frozen=True)
class Precision:
    """name: as in the recipe; params_dtype: of weights and activations; fp8: TransformerConfig's FP8 fields."""

    name: str
    params_dtype: torch.dtype
    fp8: dict[str, Any] | None = None

    @property
    def bf16(self) -> bool:
        return self.params_dtype is torch.bfloat16

    def require(self, backend: Backend) -> None:
        """Refuse what would not run as asked on this backend."""
        if self.fp8 is None:
            return
        if not backend.on_gpu or not backend.transformer_engine:
            have = "no GPU" if not backend.on_gpu else "no Transformer Engine"
            raise UserError(
                f"precision '{self.name}' needs Transformer Engine on an H100 or newer GPU, but here is {have}; "
                "megatron-core would run it as bf16 without a word. Install `megatron-smol[te]` there, or set "
                "training.precision=bf16"
            )
        if torch.cuda.get_device_capability(backend.device) < (9, 0):
            raise UserError(
                f"precision '{self.name}' needs compute capability 9.0 (H100), and "
                f"{torch.cuda.get_device_name(backend.device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(backend.device)))}; use bf16"
            )


# Hybrid = E4M3 forward, E5M2 gradients. megatron-core's own default for `delayed` is a history of 1 and
# `most_recent`, which is not what anyone means: 1024 and max, as in the Transformer Engine documentation.
PRECISIONS = {
    "fp32": Precision("fp32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16),
    "fp8-tensorwise": Precision(
        "fp8-tensorwise",
        torch.bfloat16,
        {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    ),
    "fp8-delayed": Precision(
        "fp8-delayed",
        torch.bfloat16,
        {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        },
    ),
    "fp8-blockwise": Precision("fp8-blockwise", torch.bfloat16, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
}


def precision(name: str) -> Precision:
    """Look a precision up by its recipe name."""
    try:
        return PRECISIONS[name]
    except KeyError:
        raise UserError(f"'{name}' is not a precision; {nearest(name, PRECISIONS)}") from None
