"""Step 0: what this GPU reaches at the 1.7B's shapes: copies, matrix products in bf16 and FP8, attention at head width 64, and whether
Transformer Engine's FP8 is FP8 (its errors against bf16 must be neither zero nor large)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.gpu.common import Options, Row, options, run_rows

# Output and input width of each linear of the 1.7B, and a square that a GPU likes.
LINEARS = {
    "qkv": (6144, 2048),
    "proj": (2048, 2048),
    "fc1": (16384, 2048),
    "fc2": (2048, 8192),
    "head": (49152, 2048),
    "square": (8192, 8192),
}
HEADS, HEAD_WIDTH, TOKENS = 32, 64, 32768
# Relative Frobenius errors of one product on Gaussian data, emulated by casts on a CPU: forward, tensorwise E4M3.
EXPECTED_FP8_ERROR = 0.0375


def main() -> None:
    given = options(__doc__, 240)
    rows: list[Row] = [("copy", partial(_copy, given))]
    rows += [(f"linear {name}", partial(_linear, given, *shape)) for name, shape in LINEARS.items()]
    rows += [
        (f"{backend} {length}", partial(_attention, given, backend, length))
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "transformer engine")
        for length in (2048, 8192)
    ]
    rows += [
        (f"te mlp {name}", partial(_te_mlp, given, name)) for name in ("delayed", "tensorwise", "blockwise")
    ]
    run_rows("probe", rows, given)


def _device(given: Options) -> str:
    return "cpu" if given.dry_run else "cuda"


def _milliseconds(given: Options, work: Callable[[], object]) -> float:
    import torch

    def wait() -> None:
        if not given.dry_run:
            torch.cuda.synchronize()

    taken = []
    for _ in range(2 if given.dry_run else 13):
        wait()
        begin = time.perf_counter()
        work()
        wait()
        taken.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken[0 if given.dry_run else 3 :])


def _copy(given: Options) -> dict[str, Any]:
    import torch

    count = 1 << (20 if given.dry_run else 31)
    source = torch.zeros(count, dtype=torch.uint8, device=_device(given))
    target = torch.empty_like(source)
    return {"terabytes_per_second": 2 * count / _milliseconds(given, lambda: target.copy_(source)) / 1e9}


def _linear(given: Options, out: int, inner: int) -> dict[str, Any]:
    """Forward, input gradient and weight gradient: TFLOP/s in bf16 and in FP8, and FP8's error."""
    import torch

    tokens = TOKENS if out != inner or out == 2048 else out
    if given.dry_run:
        tokens, out, inner = 64, 128, 64
    x, weight, gradient = (
        torch.randn(shape, device=_device(given), dtype=torch.bfloat16)
        for shape in ((tokens, inner), (out, inner), (tokens, out))
    )
    products = {
        "forward": (x, weight.t(), torch.float8_e4m3fn),
        "input_gradient": (gradient, weight, torch.float8_e5m2),
        "weight_gradient": (gradient.t(), x, torch.float8_e5m2),
    }
    found: dict[str, Any] = {}
    for name, (left, right, kind) in products.items():
        flops = 2 * tokens * out * inner / 1e9
        found[f"{name}_bf16_tflops"] = flops / _milliseconds(given, partial(torch.matmul, left, right))
        try:
            multiply = _scaled(left, right, kind)
            found[f"{name}_fp8_tflops"] = flops / _milliseconds(given, multiply)
            found[f"{name}_fp8_error"] = _error(multiply(), left @ right)
        except (RuntimeError, ValueError) as error:
            found[f"{name}_fp8_refused"] = str(error)[:200]
    return found


def _scaled(left: Any, right: Any, kind: Any) -> Callable[[], Any]:
    """left @ right by one scale a tensor; Hopper wants the left row-major and the right column-major."""
    import torch

    (a, scale_a), (b, scale_b) = (
        _cast(left.contiguous(), kind),
        _cast(right.t().contiguous(), torch.float8_e4m3fn),
    )
    fast = kind is torch.float8_e4m3fn
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def _cast(x: Any, kind: Any) -> tuple[Any, Any]:
    import torch

    scale = torch.finfo(kind).max / x.abs().amax().float()
    return (x.float() * scale).to(kind), (1 / scale).reshape(())


def _error(found: Any, wanted: Any) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _attention(given: Options, backend: str, length: int) -> dict[str, Any]:
    """Causal, forward and backward: TFLOP/s of the causal half."""
    import torch

    windows, length = (1, 64) if given.dry_run else (TOKENS // length, length)
    te = backend == "transformer engine"
    shape = (length, windows, HEADS, HEAD_WIDTH) if te else (windows, HEADS, length, HEAD_WIDTH)
    q, k, v = (
        torch.randn(shape, device=_device(given), dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    attend = _te_attention() if te else _sdpa(backend)

    def both() -> None:
        out = attend(q, k, v)
        out.backward(torch.ones_like(out))

    forward = 4 * windows * HEADS * length * length * HEAD_WIDTH / 2 / 1e9
    return {
        "forward_tflops": forward / _milliseconds(given, lambda: attend(q, k, v)),
        "both_tflops": 3.5 * forward / _milliseconds(given, both),
    }


def _sdpa(backend: str) -> Callable[..., Any]:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _te_attention() -> Callable[..., Any]:
    import transformer_engine.pytorch as te

    attend: Callable[..., Any] = te.DotProductAttention(
        HEADS, HEAD_WIDTH, attn_mask_type="causal", qkv_format="sbhd"
    )
    return attend


def _te_mlp(given: Options, recipe: str) -> dict[str, Any]:
    """One feed-forward block under a recipe against itself in bf16: speed-up, and errors of output and gradients."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    recipe_of = {
        "delayed": partial(recipes.DelayedScaling, amax_history_len=1024, amax_compute_algo="max"),
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
    }[recipe]()
    block = te.LayerNormMLP(
        2048, 8192, bias=False, normalization="RMSNorm", activation="swiglu", params_dtype=torch.bfloat16
    )
    x = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(fp8: bool) -> tuple[Any, Any, Any]:
        block.zero_grad(set_to_none=True)
        x.grad = None
        with te.fp8_autocast(enabled=fp8, fp8_recipe=recipe_of):
            out = block(x)
        out.backward(torch.full_like(out, 1e-3))
        assert x.grad is not None
        return out.detach(), x.grad.clone(), block.fc1_weight.grad.clone()

    plain = step(False)
    for _ in range(3):  # a history of scales has to fill
        cast = step(True)
    errors = {
        f"{name}_error": _error(here, wanted)
        for name, here, wanted in zip(
            ("output", "input_gradient", "weight_gradient"), cast, plain, strict=True
        )
    }
    if errors["output_error"] < EXPECTED_FP8_ERROR / 4:
        raise RuntimeError(f"output differs from bf16 by {errors['output_error']:.1e}: this was not FP8")
    speed_up = _milliseconds(given, lambda: step(False)) / _milliseconds(given, lambda: step(True))
    return {**errors, "speed_up": speed_up}


if __name__ == "__main__":
    main()
