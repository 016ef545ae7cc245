"""Step 1: training speed of the 1.7B for each precision, length and micro-batch. Arguments: precisions, one process each."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.gpu.common import Options, Row, options, quick_weights, run_rows

LENGTHS = (2048, 8192)
TOKENS = (8192, 16384, 32768)  # of a micro-batch


def main() -> None:
    given = options(__doc__, 110)
    (precision,) = given.rest or ["bf16"]
    quick_weights()
    engines: list[Any] = []
    rows: list[Row] = [
        (
            f"{precision} {length} x {tokens // length}",
            partial(_row, given, precision, length, tokens, engines),
        )
        for length in LENGTHS
        for tokens in TOKENS
    ]
    run_rows("grid", rows, given)


def _row(given: Options, precision: str, length: int, tokens: int, engines: list[Any]) -> dict[str, Any]:
    from megatron_smol.measure.train import build, measure

    setting = given.setting(precision, length, tokens)
    if not engines:
        engines.append(build(setting))
    return measure(setting, engines[0])


if __name__ == "__main__":
    main()
