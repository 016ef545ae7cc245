"""Step 2: what each fusion and choice is worth, at 8 windows of 2048. Arguments: bf16 (default) or an FP8 precision."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.gpu.common import Options, Row, options, quick_weights, run_rows

# megatron-core's TransformerConfig fields that are set after our own.
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rotary positions unfused": {"apply_rope_fusion": False},
    "SwiGLU unfused": {"bias_activation_fusion": False},
    "cross-entropy native": {"cross_entropy_fusion_impl": "native"},
    "cross-entropy unfused": {"cross_entropy_loss_fusion": False},
    "gradients accumulated by their kernel": {"gradient_accumulation_fusion": True},
    "CUDA graphs": {"cuda_graph_impl": "transformer_engine", "use_te_rng_tracker": True},
}
LAYOUTS = {"recompute full": "recompute=full", "recompute selective": "recompute=selective"}


def main() -> None:
    given = options(__doc__, 280)
    (precision,) = given.rest or ["bf16"]
    quick_weights()
    rows: list[Row] = [
        (f"{precision} {name}", partial(_row, given, precision, fields, ""))
        for name, fields in ABLATIONS.items()
    ]
    rows += [
        (f"{precision} {name}", partial(_row, given, precision, {}, layout))
        for name, layout in LAYOUTS.items()
    ]
    run_rows("ablate", rows, given)


def _row(given: Options, precision: str, fields: dict[str, Any], layout: str) -> dict[str, Any]:
    from megatron_smol.measure.train import measure
    from megatron_smol.model import llama

    original = llama.transformer_config

    def changed(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        for name, value in fields.items():
            getattr(config, name)  # an AttributeError where the field's name has changed
            setattr(config, name, value)
        return config

    llama.transformer_config = changed
    try:
        result = measure(given.setting(precision, 2048, 16384, layout=layout))
    finally:
        llama.transformer_config = original
    return {"changed": fields or layout, **result}


if __name__ == "__main__":
    main()
