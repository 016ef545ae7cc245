"""The gaps between the curves that step 4 wrote: over the last third of the steps, against the gap of another seed."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path


def main() -> int:
    path = Path(os.environ.get("OUT", "runs/gpu")) / "loss.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    curves = {(row["precision"], row["seed"]): row["losses"] for row in rows if "losses" in row}
    plain = [key for key in curves if key[0] == "bf16"]
    if len(plain) < 2:
        print(
            f"error: {path} has {len(plain)} bf16 curves; two seeds are needed as a yardstick",
            file=sys.stderr,
        )
        return 2
    base = plain[0]
    floor = abs(gap(curves[base], curves[plain[1]]))
    for key, losses in curves.items():
        if key != base:
            here = gap(curves[base], losses)
            print(
                f"{key[0]} seed {key[1]}: {here:+.4f} nats against {base[0]} seed {base[1]} ({abs(here) / floor:.2f} x the seeds' gap)"
            )
    return 0


def gap(base: list[float], other: list[float]) -> float:
    """Mean difference over the last third."""
    tail = max(len(base) // 3, 1)
    return statistics.fmean(other[-tail:]) - statistics.fmean(base[-tail:])


if __name__ == "__main__":
    sys.exit(main())
