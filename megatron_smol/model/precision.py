"""What "bf16" or "fp8-tensorwise" in a recipe means for megatron-core, and the precision law.

The law: FP8 asked for is FP8 that ran, or an error before step 1. megatron-core 0.16.1 runs FP8 as bf16 in
silence without Transformer Engine or with its local layers, so the refusals have to be ours: `Precision.require` looks
at the machine, `require_layers` at the model that was built, recipe/checks.py at shapes.

`emulated-fp8-*` is not FP8: it rounds as FP8 would and computes in fp32 (model/emulated_fp8.py), so that a laptop can
say whether a model diverges. It has names of its own, which the log, the plan and every checkpoint carry, so that
neither continues as the other unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from megatron_smol.errors import UserError, nearest
from megatron_smol.model.backend import Backend
from megatron_smol.recipe.schema import Fp8

EMULATED = "emulated-"


@dataclass(frozen=True)
class Precision:
    """name: as in the recipe; params_dtype: of weights and activations.

    fp8: TransformerConfig's FP8 fields, for Transformer Engine; emulated: the same fields, rounded to only.
    """

    name: str
    params_dtype: torch.dtype
    fp8: dict[str, Any] | None = None
    emulated: dict[str, Any] | None = None

    @property
    def bf16(self) -> bool:
        return self.params_dtype is torch.bfloat16

    @property
    def fields(self) -> dict[str, Any]:
        """The FP8 fields, whoever carries them out."""
        return self.fp8 or self.emulated or {}

    def bf16_layers(self, layers: int) -> list[int]:
        """Numbers, from 0, of the layers that stay in bf16."""
        if not self.fields.get("first_last_layers_bf16"):
            return []
        first, last = (self.fields[f"num_layers_at_{end}_in_bf16"] for end in ("start", "end"))
        return [number for number in range(layers) if number < first or number >= layers - last]

    def require(self, backend: Backend) -> None:
        """Refuse what would not run as asked on this backend."""
        if self.emulated is not None and backend.transformer_engine:
            raise UserError(
                f"precision '{self.name}' rounds the PyTorch layers of a CPU, but here is Transformer Engine; ask for "
                f"{self.name.removeprefix(EMULATED)}"
            )
        if self.fp8 is None:
            return
        if not backend.on_gpu or not backend.transformer_engine:
            have = "no GPU" if not backend.on_gpu else "no Transformer Engine"
            raise UserError(
                f"precision '{self.name}' needs Transformer Engine on an H100 or newer GPU, but here is {have}; "
                "megatron-core would run it as bf16 without a word. Install `megatron-smol[te]` there, set "
                f"training.precision=bf16, or try how it rounds with training.precision={EMULATED}{self.name}"
            )
        if torch.cuda.get_device_capability(backend.device) < (9, 0):
            raise UserError(
                f"precision '{self.name}' needs compute capability 9.0 (H100), and "
                f"{torch.cuda.get_device_name(backend.device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(backend.device)))}; use bf16"
            )
        if self.fp8["fp8_recipe"] == "blockwise":
            self._require_blockwise()

    def _require_blockwise(self) -> None:
        from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support

        able, why = check_fp8_block_scaling_support()
        if not able:
            raise UserError(
                f"precision '{self.name}' cannot run here: {why}; use fp8-tensorwise, fp8-delayed or bf16"
            )

    def transformer_engine_recipe(self, recipes: Any) -> Any:
        """The recipe object these fields ask of Transformer Engine; recipes: its module `common.recipe`."""
        assert self.fp8 is not None
        scale_format = {"hybrid": recipes.Format.HYBRID, "e4m3": recipes.Format.E4M3}[self.fp8["fp8"]]
        if self.fp8["fp8_recipe"] == "delayed":
            return recipes.DelayedScaling(
                fp8_format=scale_format,
                amax_history_len=self.fp8["fp8_amax_history_len"],
                amax_compute_algo=self.fp8["fp8_amax_compute_algo"],
            )
        kinds = {"tensorwise": recipes.Float8CurrentScaling, "blockwise": recipes.Float8BlockScaling}
        return kinds[self.fp8["fp8_recipe"]](fp8_format=scale_format)

    def require_recipe(self, built: Any, recipes: Any) -> None:
        """Refuse when megatron-core built another recipe than asked for: `built` is its `get_fp8_recipe(config)`."""
        wanted = self.transformer_engine_recipe(recipes)
        names = ("fp8_format", "amax_history_len", "amax_compute_algo")
        differs = [
            name
            for name in names
            if hasattr(wanted, name) and getattr(built, name, None) != getattr(wanted, name)
        ]
        if not isinstance(built, type(wanted)) or differs:
            raise UserError(
                f"precision '{self.name}' asks for Transformer Engine's {wanted!r}, but megatron-core built {built!r}; "
                "install the versions this package pins (`smol doctor`), or use bf16"
            )

    def describe(self, layers: int) -> str:
        """For the log: which rounding, by which kernels, in which layers."""
        if not self.fields:
            return f"{self.name} in all {layers} layers"
        formats = {"hybrid": "E4M3 forward, E5M2 gradients", "e4m3": "E4M3"}[self.fields["fp8"]]
        kernels = (
            "emulated: rounded as FP8, computed in fp32" if self.emulated else "Transformer Engine's kernels"
        )
        spared = [number + 1 for number in self.bf16_layers(layers)]
        listed = f"bf16 in layers {', '.join(map(str, spared))}" if spared else "no layer in bf16"
        return (
            f"{self.name} ({formats}; {kernels}) in {layers - len(spared)} of {layers} layers; {listed}; embedding and "
            "output layer in bf16"
        )


def require_layers(model: nn.Module, name: str) -> None:
    """Refuse a model whose linear layers are megatron-core's own, which never look at FP8."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    decoder = getattr(model, "decoder", model)
    for where, module in decoder.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            raise UserError(
                f"precision '{name}' was asked for, but layer {where} is megatron-core's {type(module).__name__}, which "
                "would compute in bf16 without a word; build the model with Transformer Engine's layers, or use bf16"
            )


# Hybrid = E4M3 forward, E5M2 gradients. megatron-core's own default for `delayed` is a history of 1 and
# `most_recent`, which is not what anyone means: 1024 and max, as in the Transformer Engine documentation.
_FP8: dict[str, dict[str, Any]] = {
    "fp8-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8-delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "fp8-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
PRECISIONS = (
    {"fp32": Precision("fp32", torch.float32), "bf16": Precision("bf16", torch.bfloat16)}
    | {name: Precision(name, torch.bfloat16, fp8=fields) for name, fields in _FP8.items()}
    | {
        f"{EMULATED}{name}": Precision(f"{EMULATED}{name}", torch.bfloat16, emulated=fields)
        for name, fields in _FP8.items()
    }
)


def precision(name: str, fp8: Fp8 | None = None) -> Precision:
    """Look a precision up by its recipe name, with the recipe's section `fp8`."""
    try:
        found = PRECISIONS[name]
    except KeyError:
        raise UserError(f"'{name}' is not a precision; {nearest(name, PRECISIONS)}") from None
    if not found.fields:
        return found
    first, last = (fp8 or Fp8()).bf16_layers(name)
    fields = found.fields | {
        "first_last_layers_bf16": bool(first or last),
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
    if found.emulated is not None:
        return replace(found, emulated=fields)
    return replace(found, fp8=fields | {"fp8_param": (fp8 or Fp8()).gather_parameters})
