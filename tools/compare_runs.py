"""Did a change move the training? Compare two runs of the same recipe, step by step.

Usage: python tools/compare_runs.py runs/before runs/after [--rel 0]

Exit code 0 when every step read the same rows at the same learning rate and the losses and gradient norms
agree within --rel (default: bit-equal); 1 with the first difference otherwise. A refactor shows 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

EXACT = ("stage", "step", "tokens", "lr", "seq_length", "global_batch", "drawn")
MEASURED = ("loss", "grad_norm")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="run folder")
    parser.add_argument("after", type=Path, help="run folder")
    parser.add_argument(
        "--rel", type=float, default=0.0, help="relative difference allowed in loss and gradient norm"
    )
    given = parser.parse_args(arguments)
    steps, worst = 0, 0.0
    for a, b in zip_longest(read(given.before), read(given.after)):
        if a is None or b is None:
            return differ(f"only {given.after if a is None else given.before} has {place(a or b)}")
        for key in EXACT:
            if a[key] != b[key]:
                return differ(f"{place(a)}: {key} is {a[key]} and {b[key]}")
        for key in MEASURED:
            difference = abs(a[key] - b[key]) / max(abs(a[key]), math.ulp(1.0))
            worst = max(worst, difference)
            if difference > given.rel:
                return differ(f"{place(a)}: {key} is {a[key]!r} and {b[key]!r}, {difference:.1e} apart")
        steps += 1
    print(f"equal: {steps} steps, largest relative difference {worst:.1e}")
    return 0


def read(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist; name a run folder")
    return [json.loads(line) for line in path.read_text().splitlines()]


def place(row: dict[str, Any]) -> str:
    return f"{row['stage']} step {row['step']}"


def differ(what: str) -> int:
    print(f"different: {what}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
