"""`smol bench train`: speed, memory and kernels of the real training step on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_smol.prepare import prepare_libraries

bench_app = typer.Typer(no_args_is_help=True, help="Measure this machine.")


@bench_app.callback()
def _bench() -> None:
    """Measure this machine."""


@bench_app.command()
def train(
    model: Annotated[
        str, typer.Option(help="smollm2_1.7b, smollm2_360m, smollm2_135m, tiny, or a recipe's file.")
    ] = "smollm2_1.7b",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, bf16, fp8-tensorwise, fp8-delayed or fp8-blockwise; emulated-fp8-... without the hardware."
        ),
    ] = "bf16",
    seq: Annotated[int, typer.Option(help="Tokens of a window.", min=1)] = 2048,
    micro_batch: Annotated[int, typer.Option(help="Windows of a forward pass on one rank.", min=1)] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an optimizer step over all ranks; default: one micro-batch a rank.", min=1
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="Such as tp=2,pp=2,sp=true,recompute=full; the other ranks are data parallel.")
    ] = "tp=1,pp=1",
    steps: Annotated[int, typer.Option(help="Optimizer steps that are timed.", min=1)] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them.", min=1)] = 5,
    json: Annotated[Path | None, typer.Option(help="Write the whole result to this file.")] = None,
) -> None:
    """Time training steps on random tokens, count memory, and say what ran.

    On the CPU, small: smol bench train --model tiny --precision fp32 --seq 128 --micro-batch 2 --steps 5. Several ranks: torchrun
    --nproc-per-node 2 -m megatron_smol bench train --layout tp=2. A result from a GPU sharpens the plan:
    smol plan RECIPE --fit 64xH100-80GB --calibration RESULT.
    """
    from megatron_smol.measure.setting import make_setting

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    setting = make_setting(model, precision, seq, micro_batch, layout, steps, warmup, world_size, tokens)
    prepare_libraries()
    from megatron_smol.measure.train import measure
    from megatron_smol.measure.view import print_result

    result = measure(setting)
    if os.environ.get("RANK", "0") != "0":
        return
    if json is not None:
        import json as encoder

        from megatron_smol.data.files import write_whole

        json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(json, encoder.dumps(result, indent=1) + "\n")
    print_result(result)
